"""Files over the wire: content both ways, directories, watches, and what must leave nothing behind."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vm_runtime
from tests.unit.guest.conftest import Host
from vm_runtime.guest.files import _remove_path
from vm_runtime.guest.keeper import User
from vm_runtime.guest.user_threads import UserThreads
from vm_runtime.guest.watch import WATCHES_MAX, Watch
from vm_runtime.wire.chunks import CHUNK_HEADER, ChunkError, ChunkReader, ChunkWriter
from vm_runtime.wire.errors import OpenRejectedError, StreamResetError

MIB = 1024 * 1024


@pytest.fixture
def home(tmp_path: Path, host: Host) -> Path:
    return tmp_path / "home"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def run_program(*argv: str) -> int:
    return subprocess.run(argv, check=False).returncode


async def wait_for_names(directory: Path, count: int) -> None:
    async with asyncio.timeout(60):
        while len(names(directory)) != count:  # noqa: ASYNC110 (nothing tells when a file appears)
            await asyncio.sleep(0.01)


def chunks_of(content: bytes, size: int = 100_000) -> list[bytes]:
    writer = ChunkWriter()
    pieces = [content[at : at + size] for at in range(0, len(content), size)]
    return [*(writer.header(piece) + piece for piece in pieces), writer.end()]


async def read(host: Host, path: str, **params: Any) -> tuple[bytes, dict[str, Any]]:
    assert host.link is not None
    stream = await host.link.open("files.read", {"path": path, **params}, timeout_s=60)
    reader = ChunkReader()
    content = bytearray()
    while data := await stream.read():
        for piece in reader.feed(data):
            content += piece
    stream.end()
    reader.check_done()
    assert reader.crc32 == zlib.crc32(content)
    return bytes(content), dict(stream.result)


async def write(
    host: Host, path: str, content: bytes, *, kind: str = "files.write", cut: bool = False, **params: Any
) -> dict[str, Any]:
    """cut: the end is missing."""
    assert host.link is not None
    stream = await host.link.open(kind, {"path": path, **params}, timeout_s=60)
    for data in chunks_of(content)[: -1 if cut else None]:
        await stream.write(data)
    stream.end()
    return dict(json.loads(await stream.read()))


async def listing(host: Host, path: str, **params: Any) -> dict[str, Any]:
    assert host.link is not None
    stream = await host.link.open("files.list", {"path": path, **params}, timeout_s=60)
    data = b""
    while more := await stream.read():
        data += more
    stream.end()
    return dict(json.loads(data))


async def code_of(awaitable: Any) -> str:
    with pytest.raises((OpenRejectedError, StreamResetError)) as refused:
        await awaitable
    return str(refused.value.code)


async def test_there_and_back(host: Host, home: Path) -> None:
    content = random.Random(1).randbytes(5 * MIB + 1)
    assert await write(host, "a/b/c.bin", content) == {"size_bytes": len(content), "crc32": zlib.crc32(content)}
    assert (home / "a/b/c.bin").read_bytes() == content
    again, result = await read(host, "a/b/c.bin")
    assert again == content
    assert (result["size_bytes"], result["length"], result["mode"]) == (len(content), len(content), 0o644)
    assert names(home / "a/b") == ["c.bin"]


async def test_empty_file(host: Host, home: Path) -> None:
    await write(host, "empty", b"")
    assert (await read(host, "empty"))[0] == b""
    assert (home / "empty").stat().st_size == 0


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [(2, 3, b"234"), (8, 100, b"89"), (-3, None, b"789"), (-100, 2, b"01"), (10, None, b""), (99, 1, b""), (0, 0, b"")],
)
async def test_ranges(host: Host, home: Path, offset: int, length: int | None, expected: bytes) -> None:
    (home / "digits").write_bytes(b"0123456789")
    content, result = await read(host, "digits", offset=offset, length=length)
    assert content == expected
    assert result["size_bytes"] == 10


async def test_file_whose_size_only_reading_tells(host: Host) -> None:
    content, result = await read(host, "/proc/self/status")
    assert b"Threads:" in content
    assert result["length"] is None


async def test_mode_is_kept_or_as_asked(host: Host, home: Path) -> None:
    (home / "script").write_text("old")
    (home / "script").chmod(0o755)
    await write(host, "script", b"new")
    assert (home / "script").stat().st_mode & 0o7777 == 0o755
    await write(host, "script", b"new", mode=0o600)
    assert (home / "script").stat().st_mode & 0o7777 == 0o600


async def test_writing_through_a_link_keeps_the_link(host: Host, home: Path) -> None:
    (home / "target").write_text("old")
    (home / "link").symlink_to("target")
    await write(host, "link", b"new")
    assert (home / "link").is_symlink()
    assert (home / "target").read_bytes() == b"new"


async def test_upload_that_is_given_up_leaves_nothing(host: Host, home: Path) -> None:
    (home / "f").write_text("old")
    assert host.link is not None
    for give_up in ("reset", "cut off", "session"):
        stream = await host.link.open("files.write", {"path": "f"}, timeout_s=60)
        await stream.write(chunks_of(b"x" * 100_000)[0])
        await wait_for_names(home, 2)
        if give_up == "reset":
            stream.reset()
        elif give_up == "cut off":
            stream.end()
            assert await code_of(stream.read()) == "content_broken"
        else:
            await host.hello(restored=True)
        await wait_for_names(home, 1)
        assert (home / "f").read_text() == "old"


async def test_broken_content_is_refused(host: Host, home: Path) -> None:
    assert host.link is not None
    stream = await host.link.open("files.write", {"path": "f"}, timeout_s=60)
    await stream.write(CHUNK_HEADER.pack(4, zlib.crc32(b"good")) + b"evil")
    assert await code_of(stream.read()) == "content_broken"
    assert names(home) == []


async def test_full_disk(host: Host, home: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if run_program("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)) != 0:
        pytest.skip("a full disk takes the right to mount a tmpfs")
    try:
        assert host.link is not None
        (disk / "f").write_text("old")
        stream = await host.link.open("files.write", {"path": f"{disk}/f"}, timeout_s=60)
        with pytest.raises(StreamResetError, match="No space left") as refused:
            for data in chunks_of(bytes(4 * MIB)):
                await stream.write(data)
        assert refused.value.code == "disk_full"
        assert names(disk) == ["f"]
        assert (disk / "f").read_text() == "old"
        # It fits beside the file, but not at its end.
        (disk / "f").write_bytes(bytes(700 * 1024))
        assert await code_of(write(host, f"{disk}/f", b"x" * 200 * 1024, kind="files.append")) == "disk_full"
        assert (disk / "f").read_bytes() == bytes(700 * 1024)
        assert names(disk) == ["f"]
    finally:
        assert run_program("umount", str(disk)) == 0


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("", "bad_path"),
        ("a\0b", "bad_path"),
        ("x" * 300, "bad_path"),
        ("x" * 5000, "bad_path"),
        ("nothing", "file_not_found"),
        ("dir", "is_a_directory"),
        ("file/below", "not_a_directory"),
        ("pipe", "not_a_file"),
        ("/dev/null", "not_a_file"),
        ("loop", "bad_path"),
    ],
)
async def test_what_cannot_be_read(host: Host, home: Path, path: str, code: str) -> None:
    (home / "dir").mkdir()
    (home / "file").touch()
    (home / "loop").symlink_to("loop")
    os.mkfifo(home / "pipe")
    assert await code_of(read(host, path)) == code


@pytest.mark.parametrize(
    ("path", "params", "code"),
    [
        ("dir", {}, "is_a_directory"),
        ("new/", {}, "is_a_directory"),
        ("pipe", {}, "not_a_file"),
        ("file/below", {}, "not_a_directory"),
        ("no/such", {"parents": False}, "file_not_found"),
        ("x", {"mode": 0o10000}, "bad_params"),
        ("x", {"parents": 1}, "bad_params"),
    ],
)
async def test_what_cannot_be_written(host: Host, home: Path, path: str, params: dict[str, Any], code: str) -> None:
    (home / "dir").mkdir()
    (home / "file").touch()
    os.mkfifo(home / "pipe")
    assert await code_of(write(host, path, b"x", **params)) == code
    assert names(home) == ["dir", "file", "pipe"]


async def test_listing(host: Host, home: Path) -> None:
    (home / "d/e").mkdir(parents=True)
    (home / "d/e/f").write_text("12345")
    (home / "link").symlink_to("/etc")
    (home / os.fsdecode(b"\xff")).touch()
    first = await listing(host, ".")
    assert [(entry["name"], entry["kind"]) for entry in first["entries"]] == [
        ("d", "directory"), ("link", "link"), ("\ufffd", "file"),
    ]  # fmt: skip
    assert first["entries"][1]["target"] == "/etc"
    deep = await listing(host, "d", depth=3)
    assert [entry["path"] for entry in deep["entries"]] == [f"{home}/d/e", f"{home}/d/e/f"]
    assert (deep["entries"][1]["size_bytes"], deep["truncated"]) == (5, False)
    assert await code_of(listing(host, "nothing")) == "file_not_found"
    assert await code_of(listing(host, "d/e/f")) == "not_a_directory"


async def test_listing_in_pages(host: Host, home: Path) -> None:
    for name in ("a/b/c", "a/b!/c", "a/b.d", "a!/x", "b"):
        (home / "t" / name).mkdir(parents=True)
    (home / "t/link").symlink_to("a")
    (home / "t" / os.fsdecode(b"z\xff")).touch()
    for depth in (1, 2, 9):
        whole = (await listing(host, "t", depth=depth))["entries"]
        for limit in (1, 2, 3, len(whole) - 1):
            found: list[Any] = []
            after: dict[str, Any] = {}
            while True:
                page = await listing(host, "t", depth=depth, limit=limit, **after)
                assert len(page["entries"]) <= limit and page["truncated"] == (page["next"] is not None)
                found += page["entries"]
                if page["next"] is None:
                    break
                after = {"after": page["next"]}
            assert found == whole
    # What was the last one may be gone.
    page = await listing(host, "t", limit=2)
    (home / "t/b").rmdir()
    following = await listing(host, "t", after=page["next"])
    assert [entry["name"] for entry in following["entries"]] == ["link", "z\ufffd"]
    assert await code_of(listing(host, "t", after="é")) == "bad_params"
    assert await code_of(listing(host, "t", limit=10_001)) == "bad_params"


async def test_appending(host: Host, home: Path) -> None:
    await write(host, "f", b"one\n", kind="files.append")
    (home / "f").chmod(0o640)
    inode = (home / "f").stat().st_ino
    assert await write(host, "f", b"two\n", kind="files.append") == {"size_bytes": 4, "crc32": zlib.crc32(b"two\n")}
    assert ((home / "f").read_bytes(), (home / "f").stat().st_ino) == (b"one\ntwo\n", inode)
    assert (home / "f").stat().st_mode & 0o777 == 0o640
    assert await code_of(write(host, "f", b"lost", kind="files.append", cut=True)) == "content_broken"
    await wait_for_names(home, 1)
    assert (home / "f").read_bytes() == b"one\ntwo\n"


async def test_home_links_and_root(host: Host, home: Path) -> None:
    (home / "a").write_text("x")
    assert (await host.call("files.stat", path="~/a"))["path"] == f"{home}/a"
    assert (await host.call("files.stat", path="~"))["path"] == str(home)
    assert await code_of(host.call("files.stat", path="./~")) == "file_not_found"
    assert (await host.call("files.symlink", path="~/l", target="a"))["target"] == "a"
    assert (home / "l").read_text() == "x"
    assert await code_of(host.call("files.symlink", path="l", target="b")) == "file_exists"
    assert (await host.call("root.files.stat", path="~"))["path"] == "/root"


async def test_stat_rename_remove(host: Host, home: Path) -> None:
    (home / "a").write_text("abc")
    (home / "link").symlink_to("a")
    assert (await host.call("files.stat", path="link"))["kind"] == "file"
    assert (await host.call("files.stat", path="link", follow=False))["target"] == "a"
    assert (await host.call("files.rename", old_path="a", new_path="b"))["path"] == f"{home}/b"
    assert await code_of(host.call("files.stat", path="link")) == "file_not_found"
    (home / "d/e").mkdir(parents=True)
    (home / "d/out").symlink_to(home / "b")
    assert await code_of(host.call("files.remove", path="d")) == "directory_not_empty"
    await host.call("files.remove", path="d", recursive=True)
    await host.call("files.remove", path="link")
    assert names(home) == ["b"]
    assert await code_of(host.call("files.remove", path="nothing")) == "file_not_found"


async def test_a_refusal_names_the_path_that_is_wrong(host: Host, home: Path) -> None:
    (home / "a").touch()
    (home / "d/e").mkdir(parents=True)
    for old, new, wrong in (("a", "no/b", "no/b"), ("no", "b", "no"), ("a", "a/b", "a/b"), ("d", "d/e/f", "d/e/f")):
        with pytest.raises(OpenRejectedError) as raised:
            await host.call("files.rename", old_path=old, new_path=new)
        assert raised.value.reason.startswith(f"{home}/{wrong}: ")


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
@pytest.mark.parametrize("path", [".", "..", "sub/.."])
async def test_what_cannot_be_removed_is_not_emptied(path: str, tmp_path: Path) -> None:
    home = tmp_path / "above/home"
    (home / "sub").mkdir(parents=True)
    (home / "kept").touch()
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    for given in (home, home / "sub", home / "kept"):
        os.chown(given, 65534, 65534)
    threads = UserThreads(User(name="nobody", uid=65534, gid=65534))
    with pytest.raises(PermissionError):
        await threads.run(_remove_path, f"{home}/{path}", True)
    threads.close()
    assert names(home) == ["kept", "sub"]


async def test_mkdir(host: Host, home: Path) -> None:
    assert (await host.call("files.mkdir", path="a/b/c", mode=0o700))["mode"] == 0o700
    await host.call("files.mkdir", path="a/b/c", exist_ok=True)
    assert await code_of(host.call("files.mkdir", path="a/b/c")) == "file_exists"
    assert await code_of(host.call("files.mkdir", path="a/b", parents=False)) == "file_exists"
    (home / "file").touch()
    assert await code_of(host.call("files.mkdir", path="file")) == "file_exists"


class Changes:
    """Follows a watch of the home directory."""

    def __init__(self, host: Host, home: Path) -> None:
        self._host = host
        self._home = home
        self._rest = b""
        self.seen: list[dict[str, Any]] = []

    async def __aenter__(self) -> Changes:
        assert self._host.link is not None
        self._stream = await self._host.link.open("files.watch", {"path": ".", "recursive": True}, timeout_s=60)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stream.reset()

    async def until(self, event: str, name: str) -> list[dict[str, Any]]:
        """The changes up to this one, which are forgotten then."""
        async with asyncio.timeout(60):
            while True:
                for at, change in enumerate(self.seen):
                    if (change["event"], change["path"]) == (event, f"{self._home}/{name}"):
                        found, self.seen = self.seen[: at + 1], self.seen[at + 1 :]
                        return found
                *lines, self._rest = (self._rest + await self._stream.read()).split(b"\n")
                self.seen.extend(json.loads(line) for line in lines)


async def test_watch(host: Host, home: Path) -> None:
    async with Changes(host, home) as changes:
        (home / "f").write_text("x")
        await changes.until("created", "f")
        await changes.until("modified", "f")
        (home / "f").rename(home / "g")
        assert (await changes.until("renamed", "g"))[-1]["old_path"] == f"{home}/f"
        (home / "d/e").mkdir(parents=True)
        (home / "d/e/early").touch()
        await changes.until("created", "d/e/early")
        (home / "d/e/late").touch()
        await changes.until("created", "d/e/late")
        (home / "g").unlink()
        await changes.until("deleted", "g")


async def test_every_move_is_one_change(host: Host, home: Path) -> None:
    """Also where the agent reads between the two records of one: as often as may be, it runs beside the mover."""
    mover = "import os, sys\nfor n in range(300): os.rename(f'{sys.argv[1]}/{n}', f'{sys.argv[1]}/{n + 1}')"
    async with Changes(host, home) as changes:
        (home / "0").touch()
        await changes.until("created", "0")
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", mover, str(home))
        seen = await changes.until("renamed", "300")
        assert await process.wait() == 0
        assert [Path(change["old_path"]).name for change in seen if change["event"] == "renamed"] == [
            str(number) for number in range(300)
        ]
        assert {change["event"] for change in seen} <= {"renamed", "attributes"}


async def test_a_watch_follows_directories_that_are_moved(host: Host, home: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (home / "a/below").mkdir(parents=True)
    async with Changes(host, home) as changes:
        (home / "a").rename(home / "b")
        assert (await changes.until("renamed", "b"))[-1]["old_path"] == f"{home}/a"
        (home / "b/below/f").touch()
        assert all(not change["path"].startswith(f"{home}/a") for change in await changes.until("created", "b/below/f"))
        (home / "b").rename(outside)
        await changes.until("deleted", "b")
        (outside / "below/unseen").touch()
        (home / "seen").touch()
        assert all("unseen" not in change["path"] for change in await changes.until("created", "seen"))
        outside.rename(home / "c")
        await changes.until("created", "c/below/unseen")
        (home / "c/below/again").touch()
        await changes.until("created", "c/below/again")


def run_with_watches(program: str, home: Path) -> str:
    """What a program of its own says that has `home` and `Watch`, with few descriptors."""
    given = (
        "import os, resource, sys\nfrom vm_runtime.guest.watch import OpenRejectedError, Watch\nhome = sys.argv[1]\n"
    )
    limit = "resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))\n"
    command = [sys.executable, "-c", given + limit + program, str(home)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=Path(vm_runtime.__file__).parents[1])
    assert said.returncode == 0, said.stderr
    return said.stdout


def test_too_many_watches_are_told_as_such(home: Path) -> None:
    watches = "watches = []\ntry:\n    while True: watches.append(Watch(home, recursive=False))\n"
    assert (
        run_with_watches(watches + "except OpenRejectedError as error: print(error.code)", home) == "too_many_watches\n"
    )
    for number in range(WATCHES_MAX):
        (home / f"d{number}").mkdir()
    with pytest.raises(OpenRejectedError) as raised:
        Watch(str(home), recursive=True)
    assert raised.value.code == "too_many_watches"


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_a_directory_that_may_not_be_read_is_left_out_of_a_watch(home: Path) -> None:
    for directory in (home, *home.parents[:3]):
        directory.chmod(0o755)
    (home / "closed").mkdir(mode=0)
    (home / "open").mkdir()
    (home / "open").chmod(0o777)
    become = "os.setresuid(65534, 65534, 65534)\nwatch = Watch(home, recursive=True)\n"
    assert "'created'" in run_with_watches(become + "open(home + '/open/f', 'w'); print(watch.read())", home)


async def test_watch_ends_with_what_it_watches(host: Host, home: Path) -> None:
    assert host.link is not None
    (home / "d").mkdir()
    stream = await host.link.open("files.watch", {"path": "d"}, timeout_s=60)
    (home / "d").rmdir()
    data = b""
    while more := await stream.read():
        data += more
    assert json.loads(data.splitlines()[-1]) == {"event": "deleted", "path": f"{home}/d"}
    assert await code_of(host.link.open("files.watch", {"path": "nothing"})) == "file_not_found"


_LIBC = ctypes.CDLL(None, use_errno=True)


class LibcOfGvisor:
    """The C library where the kernel has no setfsuid and setfsgid."""

    def __init__(self) -> None:
        self.libc = _LIBC

    def __getattr__(self, name: str) -> Any:
        return (lambda user: -1) if name in ("setfsuid", "setfsgid") else getattr(self.libc, name)


@pytest.mark.parametrize("libc", [None, LibcOfGvisor], ids=["linux", "gvisor"])
async def test_threads_have_the_users_rights_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, libc: Callable[[], Any] | None
) -> None:
    if libc is not None:
        monkeypatch.setattr(ctypes, "CDLL", lambda *arguments, **options: libc())
    if os.geteuid() != 0:
        pytest.skip("becoming another user takes root")
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    threads = UserThreads(User(uid=12345, gid=12346, name="someone"))
    try:
        with pytest.raises(PermissionError):
            await threads.run((tmp_path / "secret").read_text)
        await threads.run((tmp_path / "open" / "mine").touch)
        status = (tmp_path / "open" / "mine").stat()
        assert (status.st_uid, status.st_gid) == (12345, 12346)
        effective = await threads.run(lambda: Path("/proc/thread-self/status").read_text())
        assert "CapEff:\t0000000000000000" in effective
    finally:
        threads.close()
    assert os.geteuid() == 0


def test_chunks_in_any_pieces() -> None:
    content = random.Random(2).randbytes(70_000)
    data = b"".join(chunks_of(content, 30_000))
    for size in (1, 7, 8, 9, 4096, len(data)):
        reader = ChunkReader()
        got = b"".join(bytes(piece) for at in range(0, len(data), size) for piece in reader.feed(data[at : at + size]))
        reader.check_done()
        assert (got, reader.size_bytes) == (content, len(content))


@pytest.mark.parametrize("at", [0, 3, 5, 20, -1])
def test_one_changed_byte_is_noticed(at: int) -> None:
    data = bytearray(b"".join(chunks_of(b"some content", 5)))
    data[at] ^= 0x40
    reader = ChunkReader()
    with pytest.raises(ChunkError):
        reader.feed(bytes(data))
        reader.check_done()


def test_swapped_and_missing_chunks_are_noticed() -> None:
    first, second, end = chunks_of(b"0123456789", 5)
    for wrong in (second + first + end, first + end, second + end, first + second, first + second + end + end):
        reader = ChunkReader()
        with pytest.raises(ChunkError):
            reader.feed(wrong)
            reader.check_done()
