"""Requests and answers of the HTTP API about files. Their meaning is in docs/exec_and_files.md."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from gateway.models import Answer, SandboxRequest, Timestamp, UserName
from kernels.files import FileKind

# As deep as vm_runtime/guest/files.py lists.
DEPTH_MAX = 32
# As many entries as vm_runtime/guest/listing.py puts into one answer.
ENTRIES_MAX = 10_000


def _encodable(text: str) -> str:
    if len(text.encode("utf-8", "surrogatepass")) >= 4096 or any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("a path has at most 4095 bytes of UTF-8")
    return text


FilePath = Annotated[
    str, StringConstraints(min_length=1, max_length=4095, pattern=r"^[^\u0000]*$"), AfterValidator(_encodable)
]
# Octal, as chmod takes it: JSON has no octal numbers, and 644 would be another mode.
Mode = Annotated[str, StringConstraints(pattern=r"^[0-7]{3,4}$")]


def mode_number(mode: str | None) -> int | None:
    return None if mode is None else int(mode, 8)


class Query(BaseModel):
    """Parameters of a URL: text, made into what it stands for."""

    model_config = ConfigDict(extra="forbid")


class UserQuery(Query):
    """user: with whose rights, and in whose home relative paths begin."""

    user: UserName = "user"


class PathQuery(UserQuery):
    path: FilePath


class WriteQuery(PathQuery):
    mode: Mode | None = None
    parents: bool = True
    append: bool = False


class RemoveQuery(PathQuery):
    recursive: bool = False


class ListQuery(UserQuery):
    path: FilePath = "."
    depth: int = Field(1, ge=1, le=DEPTH_MAX)
    limit: int | None = Field(None, ge=1, le=ENTRIES_MAX)
    after: str | None = None


class StatQuery(PathQuery):
    follow: bool = True


class WatchQuery(UserQuery):
    path: FilePath = "."
    recursive: bool = False


class PathRequest(SandboxRequest):
    user: UserName = "user"


class MkdirRequest(PathRequest):
    path: FilePath
    mode: Mode | None = None
    parents: bool = True
    exist_ok: bool = False


class RenameRequest(PathRequest):
    old_path: FilePath
    new_path: FilePath


class SymlinkRequest(PathRequest):
    """target: where it leads, whether there is such a thing or not."""

    path: FilePath
    target: FilePath


class FileAnswer(Answer):
    """mode: octal. target: where a link leads, else null."""

    name: str
    path: str
    kind: FileKind
    size_bytes: int
    mode: Annotated[str, BeforeValidator("{:04o}".format)]
    uid: int
    gid: int
    modified_at: Timestamp
    target: str | None


class ListingAnswer(Answer):
    """path: absolute. truncated: there is more; `next` is where it continues, for `after` of the next request (null:
    the sandbox is too old to report it; list it directory by directory)."""

    path: str
    entries: list[FileAnswer]
    truncated: bool
    next: str | None


class WrittenAnswer(Answer):
    """crc32: of the content, eight hexadecimal digits."""

    size_bytes: int
    crc32: Annotated[str, BeforeValidator("{:08x}".format)]


class ChangeFrame(Answer):
    """A message on the WebSocket of a watch."""

    type: Literal["change"] = "change"
    event: Literal["created", "modified", "attributes", "deleted", "renamed", "overflow"]
    path: str
    old_path: str | None
