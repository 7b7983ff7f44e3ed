"""A snapshot as one file, to be carried to another host that has the same image.

The file is a Zstandard stream of a tar with, in this order, `manifest.json` and one member per part, `<kind>/<digest>`.
A base is packed as a layer over nothing, so that its holes cost nothing. What is read back may come from anybody: only
the members the manifest names are accepted, in that order, with the sizes it names, and every digest is compared.
Blocking: call it from a thread.
"""

from __future__ import annotations

import functools
import itertools
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import zstandard

from vm_runtime.snapshots.digests import part_digest
from vm_runtime.snapshots.errors import BrokenSnapshotError
from vm_runtime.snapshots.layers import Layer, encode_index
from vm_runtime.snapshots.manifest import MAX_MANIFEST_BYTES, Manifest, Part, PartKind
from vm_runtime.snapshots.memory import (
    CHUNK_BYTES,
    PAGE_SIZE,
    BaseMemory,
    non_zero_pages,
    removed_on_error,
    write_all,
)
from vm_runtime.snapshots.pages import Run, append_run
from vm_runtime.snapshots.store import Draft, SnapshotStore

_MANIFEST_NAME = "manifest.json"

# Fast, and already 3 to 5 times smaller on guest memory; higher levels cost minutes for some percent.
_COMPRESSION_LEVEL = 3
# What a foreign stream may make the decompressor allocate: zstd's own default for files it did not write.
_MAX_WINDOW_BYTES = 128 << 20
# A layer's table of runs: 16 bytes for each, and never more than one run per two pages.
_TABLE_BYTES_PER_PAGE = 8


def export_snapshot(store: SnapshotStore, snapshot_id: str, path: Path) -> int:
    """Write a snapshot to the new file `path`; answers its length. Every part is checked on the way out or before.

    Raises UnknownSnapshotError, BrokenSnapshotError, StoreFullError; nothing is left of the file then.
    """
    manifest = store.get(snapshot_id)
    problems = store.verify(snapshot_id)
    if problems:
        raise BrokenSnapshotError(f"Snapshot {snapshot_id} cannot be exported: {' '.join(problems)}")
    with removed_on_error(path), path.open("xb") as file:
        compressor = zstandard.ZstdCompressor(level=_COMPRESSION_LEVEL, write_checksum=True)
        with compressor.stream_writer(file, closefd=False) as sink:
            text = manifest.to_json()
            _write_member(sink, _MANIFEST_NAME, len(text), [text])
            for kind, part in manifest.parts():
                source = store.part_path(kind, part.digest)
                if kind is PartKind.BASE:
                    _write_base(sink, source, part)
                else:
                    with source.open("rb") as content:
                        chunks = iter(functools.partial(content.read, CHUNK_BYTES), b"")
                        _write_member(sink, _member_name(kind, part), part.size_bytes, chunks)
            sink.write(bytes(2 * tarfile.BLOCKSIZE))
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def import_snapshot(store: SnapshotStore, path: Path, *, has_image: Callable[[str], bool]) -> Manifest:
    """Read an exported file into the store. has_image: whether this host has the image of that digest.

    Raises BrokenSnapshotError with the reason if anything is not as the manifest says, StoreFullError.
    """
    try:
        with path.open("rb") as file:
            reader = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).stream_reader(file)
            return _import_stream(store, _Source(reader), has_image)
    except zstandard.ZstdError as error:
        raise BrokenSnapshotError(f"{path} is not an exported snapshot, or was truncated: {error}.") from error


class _Source:
    """Reads members one after the other; every length is known before it is read."""

    def __init__(self, reader: zstandard.ZstdDecompressionReader) -> None:
        self._reader = reader

    def read(self, size: int) -> bytes:
        """Exactly so many bytes."""
        pieces: list[bytes] = []
        while size:
            piece = self._reader.read(min(size, CHUNK_BYTES))
            if not piece:
                raise BrokenSnapshotError("The exported snapshot ends early: it was truncated.")
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def header(self, name: str, *, max_bytes: int) -> int:
        """The length of the next member, which must be a plain file of that name."""
        try:
            member = tarfile.TarInfo.frombuf(self.read(tarfile.BLOCKSIZE), "ascii", "strict")
        except (tarfile.TarError, ValueError) as error:
            raise BrokenSnapshotError(f"The exported snapshot has no readable header for {name}.") from error
        if member.name != name or member.type != tarfile.REGTYPE:
            raise BrokenSnapshotError(f"The exported snapshot has {member.name!r:.100} where {name} belongs.")
        if not 0 <= member.size <= max_bytes:
            raise BrokenSnapshotError(
                f"In the exported snapshot {name} has {member.size} bytes, more than {max_bytes}."
            )
        return member.size

    def copy(self, size: int, path: Path) -> None:
        """Write a member's content to a new file, leaving holes where it is zero."""
        with path.open("xb", buffering=0) as file:
            file.truncate(size)
            for offset in range(0, size, CHUNK_BYTES):
                content = self.read(min(CHUNK_BYTES, size - offset))
                if content.count(0) != len(content):
                    write_all(file.fileno(), content, offset)
            os.fsync(file.fileno())
        self.read(-size % tarfile.BLOCKSIZE)

    def finish(self) -> None:
        if self.read(2 * tarfile.BLOCKSIZE).strip(b"\0") or self._reader.read(1):
            raise BrokenSnapshotError("The exported snapshot has something behind its last part.")


def _import_stream(store: SnapshotStore, source: _Source, has_image: Callable[[str], bool]) -> Manifest:
    size = source.header(_MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
    manifest = Manifest.parse(source.read(size))
    source.read(-size % tarfile.BLOCKSIZE)
    if not has_image(manifest.image_digest):
        raise BrokenSnapshotError(
            f"Snapshot {manifest.id} needs the image {manifest.image_digest}, which this host does not have."
        )
    with store.begin() as draft:
        for kind, part in manifest.parts():
            if kind is PartKind.BASE:
                path = _read_base(source, draft, part)
            else:
                path = draft.path(f"{kind}-{part.digest}")
                size = source.header(_member_name(kind, part), max_bytes=part.size_bytes)
                source.copy(size, path)
                if kind is PartKind.LAYER:
                    Layer.open(path, size_bytes=manifest.state.memory_bytes).close()
            if path.stat().st_size != part.size_bytes or part_digest(kind, path) != part.digest:
                raise BrokenSnapshotError(f"The {kind} {part.digest} was changed: its content has another digest.")
            draft.add(kind, path, digest=part.digest)
        source.finish()
        return draft.publish(manifest)


def _write_base(sink: zstandard.ZstdCompressionWriter, path: Path, part: Part) -> None:
    with BaseMemory.open_file(path, digest=part.digest, size_bytes=part.size_bytes) as base:
        runs: list[Run] = []
        for first, content in non_zero_pages(base.fd, base.size_bytes):
            append_run(runs, first, len(content) // PAGE_SIZE)
        index = encode_index(base.size_bytes, runs, [])
        size = len(index) + sum(count for _, count in runs) * PAGE_SIZE
        pages = (content for _, content in non_zero_pages(base.fd, base.size_bytes))
        _write_member(sink, _member_name(PartKind.BASE, part), size, itertools.chain([index], pages))


def _read_base(source: _Source, draft: Draft, part: Part) -> Path:
    packed, path = draft.path("packed-base"), draft.path("base")
    limit = part.size_bytes + part.size_bytes // PAGE_SIZE * _TABLE_BYTES_PER_PAGE + 2 * PAGE_SIZE
    source.copy(source.header(_member_name(PartKind.BASE, part), max_bytes=limit), packed)
    layer = Layer.open(packed, size_bytes=part.size_bytes)
    try:
        with path.open("xb", buffering=0) as file:
            file.truncate(part.size_bytes)
            position = layer.payload_offset
            for first, count in layer.data_runs:
                for done in range(0, count * PAGE_SIZE, CHUNK_BYTES):
                    content = os.pread(layer.fd, min(CHUNK_BYTES, count * PAGE_SIZE - done), position + done)
                    write_all(file.fileno(), content, first * PAGE_SIZE + done)
                position += count * PAGE_SIZE
            os.fsync(file.fileno())
    finally:
        layer.close()
        packed.unlink()
    return path


def _member_name(kind: PartKind, part: Part) -> str:
    return f"{kind}/{part.digest}"


def _write_member(
    sink: zstandard.ZstdCompressionWriter, name: str, size: int, chunks: Iterable[bytes | memoryview]
) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o600
    sink.write(member.tobuf(tarfile.GNU_FORMAT))
    written = 0
    for chunk in chunks:
        sink.write(chunk)
        written += len(chunk)
    if written != size:
        raise BrokenSnapshotError(f"{name} changed while it was exported.")
    sink.write(bytes(-size % tarfile.BLOCKSIZE))
