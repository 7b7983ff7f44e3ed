"""Layers: files with the pages in which a machine's memory differs from what lies under it.

Knows nothing of processes being paused or of the store. Blocking file I/O: call it from a thread.

    offset  0  8 bytes  magic "HCLAYER\\n"
            8  u32      version, 1
           12  u32      page size, 4096
           16  u64      size of guest memory in bytes
           24  u64      number of runs
           32  u64      number of pages in the payload
           40  runs     u64 first page, u64 number of pages | ZERO (bit 63: all of these pages are zero, no payload)
               zeros    up to the next multiple of the page size
               payload  the pages of the runs that are not zero, in the same order

Little-endian; runs ascending and disjoint. A layer's digest is the SHA-256 of its file.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import hashlib
import itertools
import mmap
import operator
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from vm_runtime.snapshots.errors import BrokenSnapshotError
from vm_runtime.snapshots.memory import (
    CHUNK_BYTES,
    PAGE_SIZE,
    BaseMemory,
    data_extents,
    memory_digest,
    removed_on_error,
    write_all,
)
from vm_runtime.snapshots.pages import PageBuffer, Run, append_run, count_pages, mapped_address
from vm_runtime.snapshots.sharing import LONG_RUN_PAGES, Piece, SharedPages, place_pages

LAYER_VERSION = 1
_MAGIC = b"HCLAYER\n"
_HEADER = struct.Struct("<8sIIQQQ")
_RUN = struct.Struct("<QQ")
_ZERO_FLAG = 1 << 63
_ZERO_PAGE = bytes(PAGE_SIZE)
_CHUNK_PAGES = CHUNK_BYTES // PAGE_SIZE
# Copied by one system call, which cannot be interrupted: some 10 ms.
_COPY_BYTES = 16 << 20
# To pass a VMM a file's descriptor takes as long as to copy so many pages (1 MiB).
_MAPPED_PAGES = 256


class Segment(NamedTuple):
    """Pages first..first+pages of guest memory lie in `source`, from its page `position` on."""

    first: int
    pages: int
    source: int
    position: int


# The sources of pages that are zero, and of those that only the base has; layers are numbered from 0.
ZERO_SOURCE = -1
BASE_SOURCE = -2


_FIRST = operator.itemgetter(0)


def overlay(lower: Sequence[Segment], upper: Sequence[Segment]) -> list[Segment]:
    """What is seen when `upper` lies over `lower`; both ascending and disjoint, and so is the result."""
    result: list[Segment] = []
    append, make = result.append, Segment._make  # tens of thousands of them, on the way of each restore
    above = iter(upper)
    over = next(above, None)
    for segment in lower:
        first, count, source, position = segment
        end = first + count
        while over is not None and over[0] + over[1] <= first:
            append(over)
            over = next(above, None)
        if over is None or over[0] >= end:
            append(segment)
            continue
        cursor = first
        while over is not None and over[0] < end:
            if over[0] > cursor:
                append(make((cursor, over[0] - cursor, source, position + cursor - first)))
            cursor = over[0] + over[1]
            if cursor > end:
                break  # it continues over the next lower segment, which adds it
            append(over)
            over = next(above, None)
        if cursor < end:
            append(make((cursor, end - cursor, source, position + cursor - first)))
    if over is not None:
        append(over)
        result.extend(above)
    return result


@dataclass(frozen=True, kw_only=True)
class Layer:
    """An open, checked layer file. Close it when done; machines restored from it do not need it any more.

    fd: the file; size_bytes: guest memory; runs of data (ascending, in the order of the payload) and of zeros.
    """

    path: Path
    fd: int
    size_bytes: int
    data_runs: tuple[Run, ...]
    zero_runs: tuple[Run, ...]
    payload_offset: int

    @classmethod
    def open(cls, path: Path, *, size_bytes: int, digest: str | None = None) -> Self:
        """Open a layer for guest memory of this size. digest: check it too, which reads the file.

        Raises BrokenSnapshotError if it is truncated, tampered with, or made for another size or version.
        """
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if digest is not None and file_digest(path) != digest:
                raise BrokenSnapshotError(f"The layer {path} does not have the digest {digest}: it was changed.")
            data_runs, zero_runs, payload_offset = _read_index(fd, path, size_bytes)
        except BaseException:
            os.close(fd)
            raise
        return cls(
            path=path,
            fd=fd,
            size_bytes=size_bytes,
            data_runs=tuple(data_runs),
            zero_runs=tuple(zero_runs),
            payload_offset=payload_offset,
        )

    @property
    def long_pages(self) -> int:
        """Pages in runs that are long enough to be mapped."""
        return sum(count for _, count in self.data_runs if count >= LONG_RUN_PAGES)

    def segments(self, source: int) -> list[Segment]:
        """Where this layer's pages lie, as the source of that number; positions count pages of the file."""
        position = self.payload_offset // PAGE_SIZE
        segments = [Segment(first, count, ZERO_SOURCE, 0) for first, count in self.zero_runs]
        for first, count in self.data_runs:
            segments.append(Segment(first, count, source, position))
            position += count
        return sorted(segments)

    def close(self) -> None:
        os.close(self.fd)


# Runs, and their pages.
CapturedPart = tuple[tuple[Run, ...], PageBuffer]


@dataclass(frozen=True, kw_only=True)
class CapturedPages:
    """Pages copied out of a paused machine, still in memory. Later parts lie over earlier ones.

    Written to a file when the machine runs again: see `write`.
    """

    size_bytes: int
    parts: tuple[CapturedPart, ...]

    @property
    def page_count(self) -> int:
        """Pages held, before anything is dropped."""
        return sum(segment.pages for segment in self.segments())

    def write(self, path: Path, *, parent: MemoryImage) -> tuple[str, int]:
        """Write the pages that differ from the image under them to the new file `path`, and sync it.

        Answers the digest and the size of the file in bytes. Raises StoreFullError; nothing is left of the file then.
        """
        data: list[tuple[int, memoryview]] = []
        zeros: list[Run] = []
        for segment in self.segments():
            _add_changed(segment.first, self.content(segment), parent, data, zeros)
        digest = hashlib.sha256()
        with removed_on_error(path), path.open("xb", buffering=0) as file:
            index = encode_index(self.size_bytes, [(first, len(pages) // PAGE_SIZE) for first, pages in data], zeros)
            position = 0
            for content in (memoryview(index), *(pages for _, pages in data)):
                digest.update(content)
                write_all(file.fileno(), content, position)
                position += len(content)
            os.fsync(file.fileno())
        return digest.hexdigest(), position

    def files(self) -> dict[int, int]:
        """Descriptors of what the pages can be mapped from, by part. They belong to this."""
        sealed = {number: buffer.seal() for number, (_, buffer) in enumerate(self.parts)}
        return {number: fd for number, fd in sealed.items() if fd is not None}

    def shared(self) -> SharedPages:
        """For clones that have what lies under them already: a fork that needs no file. As long as this exists."""
        starts = [buffer.address for _, buffer in self.parts]
        pieces = [
            Piece(s.first, s.pages, starts[s.source] + s.position * PAGE_SIZE, s.source, s.position)
            for s in self.segments()
        ]
        return SharedPages(pieces=pieces, files=self.files())

    def content(self, segment: Segment) -> memoryview:
        """The pages of one of `segments`."""
        memory = memoryview(self.parts[segment.source][1].memory)
        return memory[segment.position * PAGE_SIZE : (segment.position + segment.pages) * PAGE_SIZE]

    def segments(self) -> list[Segment]:
        """Where the pages lie: the source is the number of the part."""
        seen: list[Segment] = []
        for source, (runs, _) in enumerate(self.parts):
            position = 0
            upper: list[Segment] = []
            for first, count in runs:
                upper.append(Segment(first, count, source, position))
                position += count
            seen = overlay(seen, upper)
        return seen


class MemoryImage:
    """Guest memory as a snapshot has it: a base and the layers over it, lowest first. Owns neither."""

    def __init__(self, base: BaseMemory, layers: Sequence[Layer]) -> None:
        self.base = base
        self.layers: tuple[Layer, ...] = tuple(layers)
        self.segments: list[Segment] = []
        for source, layer in enumerate(self.layers):
            if layer.size_bytes != base.size_bytes:
                raise BrokenSnapshotError(f"The layer {layer.path} was not made for the base {base.digest}.")
            self.segments = overlay(self.segments, layer.segments(source))

    def over(self, layer: Layer) -> MemoryImage:
        """The image with one more layer on top, in less time than a new one of all of them."""
        image = MemoryImage(self.base, ())
        upper = layer.segments(len(self.layers))
        image.layers = (*self.layers, layer)
        image.segments = overlay(self.segments, upper)
        return image

    def close_layers(self) -> None:
        """For an image that is used by one owner, as its layers are then."""
        for layer in self.layers:
            layer.close()

    @property
    def size_bytes(self) -> int:
        return self.base.size_bytes

    @property
    def layered_bytes(self) -> int:
        """What a restore copies into a new machine; many restores of a large one are reason to flatten."""
        return sum(segment.pages for segment in self.segments) * PAGE_SIZE

    def read(self, first: int, count: int) -> bytes:
        """The content of pages."""
        pieces: list[bytes] = []
        index = max(0, bisect.bisect_right(self.segments, first, key=_FIRST) - 1)
        end = first + count
        while first < end:
            above = self.segments[index] if index < len(self.segments) else Segment(end, 0, BASE_SOURCE, 0)
            if first < above.first:
                seen = Segment(first, min(above.first, end) - first, BASE_SOURCE, first)
            else:
                seen, index = above, index + 1
            size = min(seen.first + seen.pages, end) - first
            if size > 0:
                pieces.append(self._read_source(seen, first - seen.first, size))
                first += size
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def files(self) -> dict[int, int]:
        """Descriptors of what the pages can be mapped from, for `restore_into`, by layer: of those where it pays."""
        return {source: layer.fd for source, layer in enumerate(self.layers) if layer.long_pages >= _MAPPED_PAGES}

    def restore_into(self, pid: int, address: int, *, passed: Mapping[int, int] | None = None) -> None:
        """Put the layers' pages into a process that maps the base privately at `address`, before it runs.

        A VMM must have no device state loaded yet: virtio reads its rings from guest memory while loading it.
        passed: the descriptors of `files` in that process; without them all is copied. Raises ProcessMemoryError.
        """
        with self.opened_pieces() as pieces:
            place_pages(pid, address, pieces, passed=passed or {})

    @contextlib.contextmanager
    def opened_pieces(self) -> Iterator[list[Piece]]:
        """For `place_pages`, within the context."""
        maps = [mmap.mmap(layer.fd, 0, access=mmap.ACCESS_COPY) for layer in self.layers]
        zeros = PageBuffer(_CHUNK_PAGES if any(s.source == ZERO_SOURCE for s in self.segments) else 1)
        try:
            pieces: list[Piece] = []
            starts = [mapped_address(mapping) for mapping in maps]
            for first, count, source, position in self.segments:
                if source == ZERO_SOURCE:
                    for done in range(0, count, _CHUNK_PAGES):
                        size = min(_CHUNK_PAGES, count - done)
                        pieces.append(Piece(first + done, size, zeros.address, ZERO_SOURCE, 0))
                else:
                    pieces.append(Piece(first, count, starts[source] + position * PAGE_SIZE, source, position))
            yield pieces
        finally:
            for mapping in maps:
                mapping.close()

    def flatten(self, path: Path, *, step: Callable[[], None] = lambda: None) -> str:
        """Write base and layers as one new base file, sparse and synced; answers its digest.

        Shares blocks with the base where the file system can (copy_file_range). Runs for as long as the base's data
        needs, so do it in the background, for a chain that is restored often or has become long. step: called between
        the pieces, to wait in or to give up by raising.
        """
        with removed_on_error(path), path.open("x+b", buffering=0) as file:
            target = file.fileno()
            os.ftruncate(target, self.size_bytes)
            copy_sparse(self.base.fd, target, self.size_bytes, step=step)
            for first, content in self._layered_pages(zeros=True):
                step()
                write_all(target, content, first * PAGE_SIZE)
            os.fsync(target)
            return memory_digest(path, step=step)

    def merge_layers(self, path: Path, *, step: Callable[[], None] = lambda: None) -> str:
        """Write all layers as one new layer file over the same base, synced; answers its digest."""
        data: list[Run] = []
        zeros: list[Run] = []
        for segment in self.segments:
            append_run(zeros if segment.source == ZERO_SOURCE else data, segment.first, segment.pages)
        digest = hashlib.sha256()
        with removed_on_error(path), path.open("xb", buffering=0) as file:
            position = 0
            pages = (content for _, content in self._layered_pages(zeros=False))
            for content in itertools.chain([encode_index(self.size_bytes, data, zeros)], pages):
                step()
                digest.update(content)
                write_all(file.fileno(), content, position)
                position += len(content)
            os.fsync(file.fileno())
        return digest.hexdigest()

    def _layered_pages(self, *, zeros: bool) -> Iterator[tuple[int, bytes]]:
        """(first page, content) of what lies over the base, ascending, in pieces. zeros: those that are zero too."""
        for segment in self.segments:
            if zeros or segment.source != ZERO_SOURCE:
                for done in range(0, segment.pages, _CHUNK_PAGES):
                    size = min(_CHUNK_PAGES, segment.pages - done)
                    yield segment.first + done, self._read_source(segment, done, size)

    def _read_source(self, segment: Segment, skip: int, count: int) -> bytes:
        if segment.source == ZERO_SOURCE:
            return bytes(count * PAGE_SIZE)
        fd = self.base.fd if segment.source == BASE_SOURCE else self.layers[segment.source].fd
        content = os.pread(fd, count * PAGE_SIZE, (segment.position + skip) * PAGE_SIZE)
        if len(content) != count * PAGE_SIZE:
            raise BrokenSnapshotError("A part of the snapshot was truncated while it was read.")
        return content


def encode_index(size_bytes: int, data: Sequence[Run], zeros: Sequence[Run]) -> bytes:
    """Header, run table and padding of a layer file."""
    runs = sorted([(first, count) for first, count in data] + [(first, count | _ZERO_FLAG) for first, count in zeros])
    index = _HEADER.pack(_MAGIC, LAYER_VERSION, PAGE_SIZE, size_bytes, len(runs), count_pages(data))
    index += b"".join(_RUN.pack(first, count) for first, count in runs)
    return index + bytes(-len(index) % PAGE_SIZE)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex: the digest of every part but bases."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_sparse(source: int, target: int, size_bytes: int, *, step: Callable[[], None] = lambda: None) -> None:
    """Copy the data extents of a file into another, which is empty and of that size; shares blocks where it can."""
    for start, end in data_extents(source, size_bytes):
        position = start
        while position < end:
            step()
            try:
                copied = os.copy_file_range(source, target, min(_COPY_BYTES, end - position), position, position)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                copied = 0
            if copied == 0:  # between two file systems, or from a memfd
                content = os.pread(source, min(CHUNK_BYTES, end - position), position)
                if not content:
                    raise BrokenSnapshotError("A base was truncated while it was copied.")
                write_all(target, content, position)
                copied = len(content)
            position += copied


def _read_index(fd: int, path: Path, size_bytes: int) -> tuple[list[Run], list[Run], int]:
    header = os.pread(fd, _HEADER.size, 0)
    if len(header) != _HEADER.size or not header.startswith(_MAGIC):
        raise BrokenSnapshotError(f"{path} is not a layer.")
    _, version, page_size, found_size, run_count, payload_pages = _HEADER.unpack(header)
    if version != LAYER_VERSION or page_size != PAGE_SIZE:
        raise BrokenSnapshotError(f"The layer {path} has the format {version} with pages of {page_size} bytes.")
    if found_size != size_bytes:
        raise BrokenSnapshotError(f"The layer {path} is for {found_size} bytes of memory, not for {size_bytes}.")
    total_pages = size_bytes // PAGE_SIZE
    table_bytes = run_count * _RUN.size
    payload_offset = _HEADER.size + table_bytes + -(_HEADER.size + table_bytes) % PAGE_SIZE
    if run_count > total_pages or os.fstat(fd).st_size != payload_offset + payload_pages * PAGE_SIZE:
        raise BrokenSnapshotError(f"The layer {path} does not have the length its header says: it was truncated.")
    data_runs: list[Run] = []
    zero_runs: list[Run] = []
    end = 0
    for first, flagged in _RUN.iter_unpack(os.pread(fd, table_bytes, _HEADER.size)):
        count = flagged & ~_ZERO_FLAG
        if first < end or count == 0 or first + count > total_pages:
            raise BrokenSnapshotError(f"The layer {path} has an impossible table of pages.")
        (zero_runs if flagged & _ZERO_FLAG else data_runs).append((first, count))
        end = first + count
    if count_pages(data_runs) != payload_pages:
        raise BrokenSnapshotError(f"The layer {path} has an impossible table of pages.")
    return data_runs, zero_runs, payload_offset


def _add_changed(
    first: int, content: memoryview, parent: MemoryImage, data: list[tuple[int, memoryview]], zeros: list[Run]
) -> None:
    """Sort the pages of one captured run into changed data and changed to zero; drop the unchanged ones."""
    pages = len(content) // PAGE_SIZE
    start = -1  # of the changed run that is being collected
    for done in range(0, pages, _CHUNK_PAGES):
        size = min(_CHUNK_PAGES, pages - done)
        above = bytes(content[done * PAGE_SIZE : (done + size) * PAGE_SIZE])
        below = parent.read(first + done, size)
        same_chunk = above == below
        for page in range(done, done + size):
            position = (page - done) * PAGE_SIZE
            now = above[position : position + PAGE_SIZE] if not same_chunk else b""
            same = same_chunk or now == below[position : position + PAGE_SIZE]
            zero = not same and now == _ZERO_PAGE
            if zero:
                append_run(zeros, first + page, 1)
            if same or zero:
                if start >= 0:
                    data.append((first + start, content[start * PAGE_SIZE : page * PAGE_SIZE]))
                    start = -1
            elif start < 0:
                start = page
    if start >= 0:
        data.append((first + start, content[start * PAGE_SIZE :]))
