"""Files in a sandbox over HTTP: list, stat, make directories, rename, remove. Content is in gateway/file_content.py."""

from __future__ import annotations

from gateway.endpoint import OCTETS, Call, Endpoint, Operation, Routes
from gateway.file_content import CHUNKS, ContentHandler
from gateway.file_models import (
    FileAnswer,
    ListingAnswer,
    ListQuery,
    MkdirRequest,
    PathQuery,
    PathRequest,
    RemoveQuery,
    RenameRequest,
    StatQuery,
    SymlinkRequest,
    UserQuery,
    WriteQuery,
    WrittenAnswer,
    mode_number,
)
from kernels.files import SandboxFiles

# What the guest or its machine may answer (gateway/errors.py).
FILE_ERRORS = (400, 404, 409, 501, 502, 503, 504, 507)

_CONTENT = Endpoint(
    path="/api/sandboxes/{sandbox_id}/files/content",
    handler=ContentHandler,
    operations={
        "GET": Operation(
            name="readFile",
            summary=f"A file's content, or a range of it. `Accept: {CHUNKS}` gets it with checksums.",
            query=PathQuery,
            reply=bytes,
            media=OCTETS,
            errors=(*FILE_ERRORS, 416),
        ),
        "PUT": Operation(
            name="writeFile",
            summary="Writes a file whole or not at all; one that is there is replaced, or appended to. "
            f"`Content-Type: {CHUNKS}` brings checksums with it.",
            query=WriteQuery,
            request_media=OCTETS,
            reply=WrittenAnswer,
            errors=FILE_ERRORS,
        ),
    },
)
routes = Routes(_CONTENT)


async def _files(call: Call, given: UserQuery | PathRequest) -> SandboxFiles:
    return (await call.gateway.service.files(call.path["sandbox_id"])).as_user(given.user)


@routes("GET /api/sandboxes/{sandbox_id}/files", errors=FILE_ERRORS)
async def list_files(call: Call, query: ListQuery) -> ListingAnswer:
    """What is in a directory, or a page of it."""
    files = await _files(call, query)
    listing = await files.list(query.path, depth=query.depth, limit=query.limit, after=query.after)
    return ListingAnswer.of(listing)


@routes("GET /api/sandboxes/{sandbox_id}/files/stat", errors=FILE_ERRORS)
async def stat_file(call: Call, query: StatQuery) -> FileAnswer:
    """One file, directory or link."""
    files = await _files(call, query)
    return FileAnswer.of(await files.stat(query.path, follow=query.follow))


@routes("POST /api/sandboxes/{sandbox_id}/files/mkdir", status=201, errors=FILE_ERRORS)
async def make_directory(call: Call, body: MkdirRequest) -> FileAnswer:
    """A new directory."""
    files = await _files(call, body)
    made = await files.mkdir(body.path, mode=mode_number(body.mode), parents=body.parents, exist_ok=body.exist_ok)
    return FileAnswer.of(made)


@routes("POST /api/sandboxes/{sandbox_id}/files/rename", errors=FILE_ERRORS)
async def rename_file(call: Call, body: RenameRequest) -> FileAnswer:
    """Renames or moves a file or directory; a file of the new name is replaced."""
    files = await _files(call, body)
    return FileAnswer.of(await files.rename(body.old_path, body.new_path))


@routes("POST /api/sandboxes/{sandbox_id}/files/symlink", status=201, errors=FILE_ERRORS)
async def make_symlink(call: Call, body: SymlinkRequest) -> FileAnswer:
    """A new link."""
    files = await _files(call, body)
    return FileAnswer.of(await files.symlink(body.path, body.target))


@routes("DELETE /api/sandboxes/{sandbox_id}/files/content", errors=FILE_ERRORS)
async def remove_file(call: Call, query: RemoveQuery) -> None:
    """Removes a file, a link or a directory."""
    files = await _files(call, query)
    await files.remove(query.path, recursive=query.recursive)
