"""Content of files over HTTP, of any size in constant memory: a slow client holds the guest, a slow guest the client.

Knows Tornado and the media types; what may be read and written is the guest's affair.
"""

from __future__ import annotations

import asyncio
import logging
import re
from dataclasses import dataclass
from typing import Any

from tornado.iostream import StreamClosedError

from gateway.endpoint import JSON, OCTETS, Endpoint, EndpointHandler, to_json
from gateway.errors import ApiError
from gateway.file_models import PathQuery, WriteQuery, WrittenAnswer, mode_number
from gateway.state import Gateway
from kernels.errors import KernelsError
from kernels.files import FileDownload, FileUpload

log = logging.getLogger(__name__)

# Content in chunks with a running checksum (vm_runtime/wire/chunks.py), which pass through the gateway as they are.
CHUNKS = "application/vnd.hypercell.chunks"
# A client may send the content's CRC-32 beforehand; otherwise it compares the one that is answered.
CRC_HEADER = "X-Content-Crc32"
# After an upload has failed, so much of it is still read, that clients which send before they listen get the answer:
# more than any file, so that only content without an end is cut off.
DRAIN_BYTES = 64 * 1024 * 1024 * 1024
# No upload takes longer; one that stalls ends after `client_timeout_s`.
UPLOAD_TIMEOUT_S = 7 * 86_400.0
_RANGE = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))\Z")
_CRC = re.compile(r"[0-9a-fA-F]{8}\Z")


@dataclass(frozen=True, kw_only=True)
class ByteRange:
    """offset: below zero it counts from the end. length: None to the end."""

    offset: int
    length: int | None


def parse_range(header: str | None) -> ByteRange | None:
    """One range of bytes; None for all, also for what RFC 9110 (14.2) lets a server ignore: other units, several
    ranges, nonsense."""
    found = _RANGE.match(header or "")
    if found is None:
        return None
    first, last, suffix = found.groups()
    if suffix is not None:
        return ByteRange(offset=-int(suffix), length=None) if int(suffix) else ByteRange(offset=2**62, length=None)
    if not last:
        return ByteRange(offset=int(first), length=None)
    if int(last) < int(first):
        return None
    return ByteRange(offset=int(first), length=int(last) - int(first) + 1)


class ContentHandler(EndpointHandler):
    """GET, HEAD and PUT of a file's content."""

    def initialize(self, gateway: Gateway, endpoint: Endpoint) -> None:
        super().initialize(gateway, endpoint)
        self._upload: FileUpload | None = None
        self._failure: Exception | None = None
        self._drained_bytes = 0
        self._stall: asyncio.TimerHandle | None = None
        self._chunked = False
        self._size_bytes: int | None = None

    async def prepare(self) -> None:
        self.check_request()
        if self.request.method != "PUT" or self._finished:
            return
        connection: Any = self.request.connection
        connection.set_max_body_size(2**62)
        connection.set_body_timeout(UPLOAD_TIMEOUT_S)
        self._chunked = self.request.headers.get("Content-Type", "").partition(";")[0].strip().lower() == CHUNKS
        try:
            query: WriteQuery = self.parse_query(WriteQuery)
            self._expected_crc()
            files = (await self.gateway.service.files(self.path_kwargs["sandbox_id"])).as_user(query.user)
            self._upload = await files.write(
                query.path, mode=mode_number(query.mode), parents=query.parents, append=query.append
            )
        except (KernelsError, ApiError) as error:
            self._failure = error
            if self.request.headers.get("Expect", "").lower() == "100-continue":
                raise  # nothing has been sent yet, and nothing will be
        if self._client_gone:
            self._end_upload()
        self._expect_more()

    async def data_received(self, chunk: bytes) -> None:
        if self.request.method != "PUT":
            super().data_received(chunk)
            return
        if self._stall is not None:
            self._stall.cancel()
        if self._upload is not None:
            try:
                if self._chunked:
                    await self._upload.write_chunks(chunk)
                else:
                    await self._upload.write(chunk)
            except KernelsError as error:
                self._end_upload()
                self._failure = error
            self.gateway.service.registry.touch(self.path_kwargs["sandbox_id"])
        else:
            self._drained_bytes += len(chunk)
            if self._drained_bytes > DRAIN_BYTES and self._failure is not None and not self._finished:
                self.send_error(500, exc_info=(type(self._failure), self._failure, None))
        self._expect_more()

    async def put(self, **path: str) -> None:
        if self._stall is not None:
            self._stall.cancel()
        if self._finished:
            return
        if self._failure is not None:
            raise self._failure
        assert self._upload is not None
        try:
            expected = self._expected_crc()
            if expected is not None and not self._chunked and expected != self._upload.crc32:
                raise ApiError(
                    400,
                    "content_broken",
                    f"The content's CRC-32 is {self._upload.crc32:08x}, not what {CRC_HEADER} says.",
                )
            written = await self._upload.commit()
        finally:
            self._end_upload()
        self.set_header("Content-Type", JSON)
        await self.finish(to_json(WrittenAnswer.of(written)))

    def _expected_crc(self) -> int | None:
        header = self.request.headers.get(CRC_HEADER)
        if header is None:
            return None
        if not _CRC.match(header):
            raise ApiError(400, "invalid_request", f"{CRC_HEADER} has eight hexadecimal digits.")
        return int(header, 16)

    def _expect_more(self) -> None:
        seconds = self.gateway.settings.client_timeout_s
        self._stall = asyncio.get_running_loop().call_later(seconds, self._abort)

    def on_connection_close(self) -> None:
        self._end_upload()
        super().on_connection_close()

    def on_finish(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
        self._end_upload()
        super().on_finish()

    def _end_upload(self) -> None:
        """Given up, it leaves nothing in the guest; after its commit this does nothing."""
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.close()

    async def get(self, **path: str) -> None:
        query: PathQuery = self.parse_query(PathQuery)
        files = (await self.gateway.service.files(path["sandbox_id"])).as_user(query.user)
        part = parse_range(self.request.headers.get("Range"))
        offset, length = (part.offset, part.length) if part is not None else (0, None)
        is_head = self.request.method == "HEAD"
        async with await files.read(query.path, offset=offset, length=0 if is_head else length) as download:
            self._describe(download, part)
            if not is_head:
                await self._send(download, path["sandbox_id"])

    head = get

    def _describe(self, download: FileDownload, part: ByteRange | None) -> None:
        found, chunked = download.part, CHUNKS in self.request.headers.get("Accept", "")
        self.set_header("Content-Type", CHUNKS if chunked else OCTETS)
        self.set_header("Accept-Ranges", "bytes")
        self.set_header("Vary", "Accept")
        self.set_header("X-File-Mode", f"{found.mode:04o}")
        size, is_head = found.size_bytes, self.request.method == "HEAD"
        if is_head:
            if found.length is not None and not chunked:
                self.set_header("Content-Length", str(size))
            return
        if part is not None and found.length is not None:
            if found.length == 0:
                self._size_bytes = size
                raise ApiError(416, "range_not_satisfiable", f"The file has {size} bytes, none of them in the range.")
            self.set_status(206)
            last = found.offset + found.length - 1
            self.set_header("Content-Range", f"bytes {found.offset}-{last}/{size}")
        if found.length is not None and not chunked:
            self.set_header("Content-Length", str(found.length))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        if self._size_bytes is not None:
            self.set_header("Content-Range", f"bytes */{self._size_bytes}")
        super().write_error(status_code, **kwargs)

    async def _send(self, download: FileDownload, sandbox_id: str) -> None:
        chunked = self._headers["Content-Type"] == CHUNKS
        try:
            async for data in download.chunks() if chunked else download.content():
                self.write(bytes(data))
                async with asyncio.timeout(self.gateway.settings.client_timeout_s):
                    await self.flush()
                self.gateway.service.registry.touch(sandbox_id)
        except (StreamClosedError, TimeoutError):
            self._abort()  # the client has disconnected, or reads nothing any more
        except KernelsError as error:
            if not self._headers_written:
                raise
            # Half of it is sent: only a connection that is cut shows the client that this was not all.
            log.info("A download from sandbox %s was cut off: %s", sandbox_id, error)
            self._abort()

    def _abort(self) -> None:
        self._auto_finish = False
        stream: Any = getattr(self.request.connection, "stream", None)
        if stream is not None:
            stream.close()
