"""Files over HTTP and WebSocket, against a real agent and a real machine."""

from __future__ import annotations

import asyncio
import json
import random
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
from tornado.httpclient import HTTPResponse

from gateway.file_content import ByteRange, parse_range
from hypercell import AsyncFiles, NotFoundError, StateError
from hypercell.aio.transport import Transport
from hypercell.locate import Gateway
from tests.unit.gateway.client import request
from tests.unit.gateway.conftest import Box
from tests.unit.gateway.test_exec_http import ask, connect
from vm_runtime.wire.chunks import ChunkReader, ChunkWriter

CHUNKS = "application/vnd.hypercell.chunks"
MIB = 1024 * 1024


async def content(
    box: Box, method: str, path: str, body: bytes | None = None, *, query: str = "", **headers: str
) -> HTTPResponse:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await request(
        box,
        method,
        f"{box.path}/files/content?path={path}{query}",
        body,
        headers={"Authorization": f"token {box.token}", **named},
    )


async def test_there_and_back(box: Box) -> None:
    data = random.Random(1).randbytes(3 * MIB + 5)
    put = await content(box, "PUT", "a/b%20c", data, query="&mode=0640")
    assert json.loads(put.body) == {"size_bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
    got = await content(box, "GET", "a/b%20c")
    assert (got.code, got.body) == (200, data)
    assert (got.headers["Content-Length"], got.headers["X-File-Mode"]) == (str(len(data)), "0640")
    head = await content(box, "HEAD", "a/b%20c")
    assert (head.code, head.headers["Content-Length"], head.body) == (200, str(len(data)), b"")
    part = await content(box, "GET", "a/b%20c", Range="bytes=5-9")
    assert (part.code, part.body) == (206, data[5:10])
    assert part.headers["Content-Range"] == f"bytes 5-9/{len(data)}"
    beyond = await content(box, "GET", "a/b%20c", Range=f"bytes={len(data)}-")
    assert (beyond.code, beyond.headers["Content-Range"]) == (416, f"bytes */{len(data)}")
    assert (await content(box, "DELETE", "a/b%20c")).code == 204
    assert json.loads((await content(box, "GET", "a/b%20c")).body)["code"] == "file_not_found"


async def test_content_with_checksums(box: Box) -> None:
    data = random.Random(2).randbytes(MIB)
    writer = ChunkWriter()
    chunks = b"".join([writer.header(data), data, writer.end()])
    assert (await content(box, "PUT", "f", chunks, Content_Type=CHUNKS)).code == 200
    got = await content(box, "GET", "f", Accept=CHUNKS)
    reader = ChunkReader()
    assert b"".join(bytes(piece) for piece in reader.feed(got.body)) == data
    reader.check_done()
    broken = bytearray(chunks)
    broken[1000] ^= 1
    for wrong in (bytes(broken), chunks[:-8]):
        refused = await content(box, "PUT", "f", wrong, Content_Type=CHUNKS)
        assert (refused.code, json.loads(refused.body)["code"]) == (400, "content_broken")
    wrong_crc = await content(box, "PUT", "f", b"new", X_Content_Crc32="00000000")
    assert (wrong_crc.code, json.loads(wrong_crc.body)["code"]) == (400, "content_broken")
    assert (await content(box, "PUT", "g", b"new", X_Content_Crc32=f"{zlib.crc32(b'new'):08x}")).code == 200
    assert (await content(box, "GET", "f")).body == data
    assert not [entry for entry in (await ask(box, "GET", "/files"))["entries"] if entry["name"].endswith(".part")]


async def test_proc_files_and_empty_ones(box: Box) -> None:
    assert b"Linux" in (await content(box, "GET", "/proc/version")).body
    await content(box, "PUT", "empty", b"")
    got = await content(box, "GET", "empty")
    assert (got.code, got.body) == (200, b"")


async def test_refusals(box: Box) -> None:
    await ask(box, "POST", "/files/mkdir", {"path": "d/e"}, code=201)
    for method, path, code, reason in (
        ("GET", "nothing", 404, "file_not_found"),
        ("GET", "d", 409, "is_a_directory"),
        ("GET", "/dev/zero", 409, "not_a_file"),
        ("GET", "a%00b", 400, "invalid_request"),
        ("GET", "", 400, "invalid_request"),
        ("GET", "x" * 300, 400, "bad_path"),
        ("PUT", "d", 409, "is_a_directory"),
        ("PUT", "/proc/x", 404, "file_not_found"),
        ("DELETE", "d", 409, "directory_not_empty"),
        ("DELETE", "nothing", 404, "file_not_found"),
    ):
        answer = await content(box, method, path, b"x" if method == "PUT" else None)
        assert (path, answer.code, json.loads(answer.body)["code"]) == (path, code, reason)
    bad_mode = await content(box, "PUT", "f", b"x", query="&mode=999")
    assert json.loads(bad_mode.body)["code"] == "invalid_request"
    assert (await content(box, "DELETE", "d", query="&recursive=true")).code == 204


async def test_directories(box: Box) -> None:
    made = await ask(box, "POST", "/files/mkdir", {"path": "p/q", "mode": "0711"}, code=201)
    assert (made["path"], made["mode"], made["kind"]) == (f"{box.home}/p/q", "0711", "directory")
    await content(box, "PUT", "p/q/f", b"12345")
    renamed = await ask(box, "POST", "/files/rename", {"old_path": "p/q/f", "new_path": "p/q/g"})
    assert (renamed["name"], renamed["size_bytes"]) == ("g", 5)
    listing = await ask(box, "GET", "/files?path=p&depth=2")
    assert [entry["path"] for entry in listing["entries"]] == [f"{box.home}/p/q", f"{box.home}/p/q/g"]
    assert (await ask(box, "GET", "/files/stat?path=p/q/g"))["modified_at"].endswith("Z")
    assert (await ask(box, "GET", "/files?path=p&depth=0", code=400))["code"] == "invalid_request"
    assert (await ask(box, "GET", "/files?path=p/q/g", code=409))["code"] == "not_a_directory"


async def test_watch(box: Box) -> None:
    await ask(box, "POST", "/files/mkdir", {"path": "w"}, code=201)
    socket = await connect(box, "/files/watch?path=w&recursive=true")
    assert json.loads(await socket.read_message() or "") == {"type": "watching"}
    await content(box, "PUT", "w/f", b"x")
    seen: list[dict[str, Any]] = []
    async with asyncio.timeout(60):
        while not seen or seen[-1]["event"] != "renamed":
            seen.append(json.loads(await socket.read_message() or ""))
    assert seen[-1]["path"] == f"{box.home}/w/f"
    await content(box, "DELETE", "w", query="&recursive=true")
    async with asyncio.timeout(60):
        while (message := await socket.read_message()) is not None:
            seen.append(json.loads(message))
    assert (seen[-1]["event"], seen[-1]["path"]) == ("deleted", f"{box.home}/w")


async def test_upload_that_breaks_off_leaves_nothing(box: Box) -> None:
    await ask(box, "POST", "/files/mkdir", {"path": "u"}, code=201)
    _, writer = await asyncio.open_connection(*box.url.removeprefix("http://").split(":"))
    head = f"PUT {box.path}/files/content?path=u/f HTTP/1.1\r\nHost: localhost\r\nAuthorization: token {box.token}\r\n"
    writer.write(f"{head}Content-Length: 10000000\r\n\r\n".encode() + bytes(1_000_000))
    await writer.drain()
    await entries(box, "u", 1)
    writer.close()
    await entries(box, "u", 0)


async def entries(box: Box, path: str, count: int) -> None:
    async with asyncio.timeout(60):
        while len((await ask(box, "GET", f"/files?path={path}"))["entries"]) != count:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_full_disk(box: Box) -> None:
    if box.home != "/home/user":
        pytest.skip("tests/unit/guest/test_files.py fills a disk of this host")
    fill = "for s in 1G 100M 10M 1M 64K; do i=0; while fallocate -l $s fill-$s-$i; do i=$((i+1)); done; done"
    await ask(box, "POST", "/exec", {"command": fill, "timeout_s": 300})
    full = await content(box, "PUT", "large", bytes(16 * MIB))
    assert (full.code, json.loads(full.body)["code"]) == (507, "disk_full")
    names = [entry["name"] for entry in (await ask(box, "GET", "/files"))["entries"]]
    assert "fill-1M-0" in names
    assert not [name for name in names if "large" in name]


def resident_mib(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) // 1024


async def test_large_file_in_constant_memory(box: Box) -> None:
    """200 MB up and down without a client library, which would hold it."""
    size = 200_000_000
    block = random.Random(3).randbytes(MIB)
    before = highest = resident_mib(box.pid)
    address = box.url.removeprefix("http://").split(":")
    url = f"{box.path}/files/content?path=large HTTP/1.1\r\nHost: localhost\r\nAuthorization: token {box.token}\r\n"
    reader, writer = await asyncio.open_connection(*address)
    writer.write(f"PUT {url}Content-Length: {size}\r\nConnection: close\r\n\r\n".encode())
    sent, crc = 0, 0
    while sent < size:
        piece = block[: size - sent]
        crc = zlib.crc32(piece, crc)
        writer.write(piece)
        await writer.drain()
        sent += len(piece)
        highest = max(highest, resident_mib(box.pid))
    answer = await reader.read()
    assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {"size_bytes": size, "crc32": f"{crc:08x}"}
    writer.close()
    reader, writer = await asyncio.open_connection(*address)
    writer.write(f"GET {url}Connection: close\r\n\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")
    got, got_crc = 0, 0
    while piece := await reader.read(MIB):
        got += len(piece)
        got_crc = zlib.crc32(piece, got_crc)
        highest = max(highest, resident_mib(box.pid))
    writer.close()
    assert (got, got_crc) == (size, crc)
    assert highest - before < 64
    await content(box, "DELETE", "large")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("bytes=0-0", ByteRange(offset=0, length=1)),
        ("bytes=5-", ByteRange(offset=5, length=None)),
        ("bytes=-5", ByteRange(offset=-5, length=None)),
        ("bytes=9-5", None),
        ("bytes=0-1,3-4", None),
        ("lines=0-1", None),
        ("bytes=" + "9" * 30 + "-", None),
    ],
)
def test_ranges(header: str | None, expected: ByteRange | None) -> None:
    assert parse_range(header) == expected


async def test_a_refused_upload_is_answered_whatever_follows(box: Box) -> None:
    async with Transport.leased(Gateway(url=box.url, token=box.token)) as transport:
        files = AsyncFiles(transport, box.sandbox_id)
        await files.write("is_a_file", b"")
        large = (bytes(MIB) for _ in range(200))
        with pytest.raises(NotFoundError, match="missing"):
            await files.write("missing/x", large, parents=False)
        with pytest.raises(StateError):
            await files.write("is_a_file/x", (bytes(MIB) for _ in range(200)))
