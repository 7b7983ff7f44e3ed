"""Bases: the guest RAM that many machines map privately, immutable and checked before anybody maps it.

Knows nothing of VMMs, layers or the store. Everything here is blocking file I/O: call it from a thread.

A base is a sparse file of exactly the size of guest RAM. Its digest covers the pages that are not zero, so that it
costs what was written and does not depend on where a file system puts holes:

    sha256( b"hypercell-memory-1\\n" + <u64 size> + sha256(index) + sha256(content) )

    index    <u64 first page> <u64 pages> for every maximal run of non-zero 4 KiB pages, ascending
    content  the bytes of these runs, in the same order
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from vm_runtime.snapshots.errors import BrokenSnapshotError, SnapshotError, StoreFullError

PAGE_SIZE = 4096

# Large enough that system calls vanish beside the copying, small enough to stay in the L2 cache.
CHUNK_BYTES = 1 << 20

MEMFD_NAME_PREFIX = "hypercell-base-"

_DIGEST_MAGIC = b"hypercell-memory-1\n"
_ZERO_PAGE = bytes(PAGE_SIZE)
_ZERO_CHUNK = bytes(CHUNK_BYTES)

_ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True, kw_only=True)
class BaseMemory:
    """An open, immutable base. Close it when the last VMM that should map it has been started.

    fd: for the VMM to inherit.
    size_bytes: size of guest RAM.
    digest: hex, see the module.
    path: where its data came from.
    sealed: whether it is a sealed memfd, which is safe for a VMM that insists on opening it for writing (QEMU < 9);
        otherwise the VMM should open it read-only.
    """

    fd: int
    size_bytes: int
    digest: str
    path: Path
    sealed: bool
    _on_close: Callable[[], None] | None = field(default=None, repr=False, compare=False)
    _closed: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)

    @classmethod
    def load_sealed(cls, path: Path, *, digest: str, size_bytes: int) -> Self:
        """Copy the data of a sparse base file into a memfd, check the digest and seal it against every change.

        Costs the data that is there (about 1 GB/s), not the size. Raises BrokenSnapshotError if size or digest differ.
        """
        with path.open("rb", buffering=0) as file:
            _check_size(file.fileno(), path, size_bytes)
            fd = os.memfd_create(MEMFD_NAME_PREFIX + digest, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(fd, size_bytes)
                _check_digest(_copy_pages(file.fileno(), size_bytes=size_bytes, sink=fd), digest, path)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _ALL_SEALS)
            except BaseException:
                os.close(fd)
                raise
        return cls(fd=fd, size_bytes=size_bytes, digest=digest, path=path, sealed=True)

    @classmethod
    def open_file(cls, path: Path, *, digest: str, size_bytes: int) -> Self:
        """Open a base file itself, read-only. The caller has checked its digest (`SnapshotStore.checked_path`)."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check_size(fd, path, size_bytes)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd=fd, size_bytes=size_bytes, digest=digest, path=path, sealed=False)

    def close(self) -> None:
        """Give the descriptor back; closing twice is harmless. Machines that map the base keep its pages alive."""
        if self._closed.is_set():
            return
        self._closed.set()
        os.close(self.fd)
        if self._on_close is not None:
            self._on_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass
class _Shared:
    """One base that several users hold through descriptors of their own."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    base: BaseMemory | None = None
    users: int = 0


class BaseCache:
    """One open sealed base per digest, for all machines of this process; dropped when its last user closes it.

    Safe to use from several threads: two users who ask for the same base at the same time load it once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shared: dict[str, _Shared] = {}

    def acquire(self, path: Path, *, digest: str, size_bytes: int) -> BaseMemory:
        """A base of one's own to close; loads it only if nobody holds it. Errors as of `BaseMemory.load_sealed`."""
        load = functools.partial(BaseMemory.load_sealed, path, digest=digest, size_bytes=size_bytes)
        return self._share(digest, load)

    def adopt(self, pid: int, *, digest: str, path: Path) -> BaseMemory | None:
        """The sealed base that a running VMM still has open, so that new machines share its pages with the old ones.

        For a gateway that starts again. The VMM is not trusted: seals and digest are checked. None if it has none.
        """
        for link in _links_to_memfd(pid, MEMFD_NAME_PREFIX + digest):
            with contextlib.suppress(BrokenSnapshotError, FileNotFoundError):
                return self._share(digest, functools.partial(_adopt_memfd, link, digest=digest, path=path))
        return None

    def _share(self, digest: str, load: Callable[[], BaseMemory]) -> BaseMemory:
        with self._lock:
            shared = self._shared.setdefault(digest, _Shared())
            shared.users += 1
        try:
            with shared.lock:
                if shared.base is None:
                    shared.base = load()
                base = shared.base
            return BaseMemory(
                fd=os.dup(base.fd),
                size_bytes=base.size_bytes,
                digest=digest,
                path=base.path,
                sealed=base.sealed,
                _on_close=lambda: self._release(digest, shared),
            )
        except BaseException:
            self._release(digest, shared)
            raise

    def _release(self, digest: str, shared: _Shared) -> None:
        with self._lock:
            shared.users -= 1
            if shared.users:
                return
            del self._shared[digest]
        if shared.base is not None:
            shared.base.close()


def freeze_memfd(fd: int, path: Path) -> str:
    """Write the RAM of a booted machine (a memfd or any file) sparsely to the new file `path`, and sync it.

    The machine must be paused. Answers the digest. Raises StoreFullError; what was written of `path` is then removed.
    """
    size_bytes = os.fstat(fd).st_size
    with removed_on_error(path), path.open("xb", buffering=0) as file:
        os.ftruncate(file.fileno(), size_bytes)
        digest = _copy_pages(fd, size_bytes=size_bytes, sink=file.fileno())
        os.fsync(file.fileno())
    return digest


def memory_digest(path: Path, *, step: Callable[[], None] = lambda: None) -> str:
    """The digest of a base file, by reading all of its data. step: called between the pieces of long work."""
    with path.open("rb", buffering=0) as file:
        return _copy_pages(file.fileno(), size_bytes=os.fstat(file.fileno()).st_size, sink=None, step=step)


@contextlib.contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """Remove a file that could not be finished; a full disk becomes StoreFullError."""
    try:
        yield
    except OSError as error:
        path.unlink(missing_ok=True)
        raise full_or_same(error, path) from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def full_or_same(error: OSError, path: Path) -> Exception:
    """StoreFullError if the error says that there is no room, else the error itself."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFullError(f"No room left on the file system of {path.parent}; free some, then try again.")
    return error


def data_extents(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what is not a hole, in whole pages, ascending and disjoint."""
    position = 0
    while position < size_bytes:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        # A file system may report extents in units smaller than a page.
        start = max(position, start - start % PAGE_SIZE)
        end = min(size_bytes, end + -end % PAGE_SIZE)
        yield start, end
        position = end


class MemoryDigest:
    """Computes a base's digest from its runs of non-zero pages, given in ascending order."""

    def __init__(self, size_bytes: int, *, magic: bytes = _DIGEST_MAGIC) -> None:
        self._size_bytes = size_bytes
        self._magic = magic
        self._index = hashlib.sha256()
        self._content = hashlib.sha256()
        self._first = 0
        self._count = 0

    def add(self, first_page: int, content: bytes | memoryview) -> None:
        """Add pages that are not zero; adjacent ones are joined, so that the digest does not depend on the pieces."""
        if first_page != self._first + self._count:
            self._close_run()
            self._first = first_page
        self._count += len(content) // PAGE_SIZE
        self._content.update(content)

    def hexdigest(self) -> str:
        self._close_run()
        whole = hashlib.sha256(self._magic + struct.pack("<Q", self._size_bytes))
        whole.update(self._index.digest() + self._content.digest())
        return whole.hexdigest()

    def _close_run(self) -> None:
        if self._count:
            self._index.update(struct.pack("<QQ", self._first, self._count))
            self._count = 0


def non_zero_runs(chunk: bytes) -> list[tuple[int, int]]:
    """(start, end) in bytes of the runs of non-zero pages of a chunk of whole pages, relative to it."""
    if chunk == _ZERO_CHUNK[: len(chunk)]:
        return []
    runs: list[tuple[int, int]] = []
    start = -1
    for position in range(0, len(chunk), PAGE_SIZE):
        if chunk[position : position + PAGE_SIZE] != _ZERO_PAGE:
            if start < 0:
                start = position
        elif start >= 0:
            runs.append((start, position))
            start = -1
    if start >= 0:
        runs.append((start, len(chunk)))
    return runs


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """pwrite until everything is written."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        offset += written
        view = view[written:]


def non_zero_pages(fd: int, size_bytes: int) -> Iterator[tuple[int, memoryview]]:
    """(first page, content) of everything in a file that is not zero, ascending; long runs come in pieces."""
    for start, end in data_extents(fd, size_bytes):
        for offset in range(start, end, CHUNK_BYTES):
            chunk = os.pread(fd, min(CHUNK_BYTES, end - offset), offset)
            if len(chunk) != min(CHUNK_BYTES, end - offset):
                raise BrokenSnapshotError(f"Guest memory ends early, at byte {offset + len(chunk)} of {size_bytes}.")
            view = memoryview(chunk)
            for run_start, run_end in non_zero_runs(chunk):
                yield (offset + run_start) // PAGE_SIZE, view[run_start:run_end]


def _copy_pages(source: int, *, size_bytes: int, sink: int | None, step: Callable[[], None] = lambda: None) -> str:
    """Digest of the source's non-zero pages, which are written to the sink at the same places."""
    digest = MemoryDigest(size_bytes)
    for first_page, content in non_zero_pages(source, size_bytes):
        step()
        digest.add(first_page, content)
        if sink is not None:
            write_all(sink, content, first_page * PAGE_SIZE)
    return digest.hexdigest()


def _check_size(fd: int, path: Path, size_bytes: int) -> None:
    if size_bytes <= 0 or size_bytes % PAGE_SIZE:
        raise SnapshotError(f"Guest memory of {size_bytes} bytes is not a whole number of pages.")
    found = os.fstat(fd).st_size
    if found != size_bytes:
        raise BrokenSnapshotError(f"The base {path} has {found} bytes instead of {size_bytes}: it was truncated.")


def _check_digest(found: str, wanted: str, path: Path) -> None:
    if found != wanted:
        raise BrokenSnapshotError(f"The base {path} has the digest {found} instead of {wanted}: it was changed.")


def _links_to_memfd(pid: int, name: str) -> list[Path]:
    """The /proc/PID/fd links of a process that lead to memfds of this name; none if it has ended or is out of reach."""
    links: list[Path] = []
    with contextlib.suppress(FileNotFoundError, PermissionError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since the directory was read
                if str(link.readlink()).startswith(f"/memfd:{name}"):
                    links.append(link)
    return links


def _adopt_memfd(link: Path, *, digest: str, path: Path) -> BaseMemory:
    fd = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _ALL_SEALS != _ALL_SEALS:
            raise BrokenSnapshotError(f"{link} is not sealed.")
        size_bytes = os.fstat(fd).st_size
        _check_digest(_copy_pages(fd, size_bytes=size_bytes, sink=None), digest, link)
    except BaseException:
        os.close(fd)
        raise
    return BaseMemory(fd=fd, size_bytes=size_bytes, digest=digest, path=path, sealed=True)
