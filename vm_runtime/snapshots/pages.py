"""The pages that a process has written into a private mapping: found, read and written from outside.

Linux mechanism only: knows nothing of VMMs, files or snapshots. Needs ptrace rights over the process (same user without
Yama, `PR_SET_PTRACER`, or CAP_SYS_PTRACE). Everything here is blocking; what happens in a machine's pause is marked.

A page of a private file mapping that was written is anonymous (or swapped out), all others still are the file's. Linux
6.7 answers that for a range with one ioctl (PAGEMAP_SCAN, Documentation/admin-guide/mm/pagemap.rst); before, it is one
64-bit word per page in /proc/PID/pagemap. Measured for 512 MiB: 5 to 10 ms and 12 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import struct
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vm_runtime.files import opened
from vm_runtime.snapshots.errors import ProcessMemoryError
from vm_runtime.snapshots.memory import PAGE_SIZE

# A run of pages: (first page, number of pages), counted from the start of the mapping.
Run = tuple[int, int]

# <linux/fs.h>: _IOWR('f', 16, struct pm_scan_arg), twelve u64.
_PAGEMAP_SCAN = 0xC0606610
_PM_SCAN_ARG = struct.Struct("<12Q")
_PM_SCAN_WP_MATCHING = 1 << 0
_PM_SCAN_CHECK_WPASYNC = 1 << 1
_PAGE_IS_WRITTEN = 1 << 1
_PAGE_IS_FILE = 1 << 2
_PAGE_IS_PRESENT = 1 << 3
_PAGE_IS_SWAPPED = 1 << 4
_PROTECT = _PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC

# Regions per ioctl call (24 bytes each). A busy clone has a few thousand; a full vector only means another call.
_REGIONS_PER_CALL = 16384

# The kernel refuses longer vectors (UIO_MAXIOV).
_IOV_MAX = 1024
# One process_vm_* call moves at most MAX_RW_COUNT, just under 2 GiB; longer runs are cut well below that.
_MAX_RUN_PAGES = (64 << 20) // PAGE_SIZE
_MAX_CALL_PAGES = (1 << 30) // PAGE_SIZE

# /proc/PID/pagemap, top byte of each little-endian word: bit 63 present, 62 swapped, 61 file page or shared.
_PAGEMAP_CHUNK_BYTES = 1 << 20
_ANONYMOUS_BYTES = bytes((byte & 0xC0 != 0) and (byte & 0x20 == 0) for byte in range(256))
_ANONYMOUS_RUN = re.compile(rb"\x01+")

# Memory files in which pages lie that clones map; for people who look at a VMM's mappings.
PAGES_NAME = "hypercell-pages"
# <asm-generic/mman-common.h>, Linux 5.14.
_MADV_POPULATE_WRITE = 23
# <linux/fcntl.h>: seal, shrink, grow, future write (Linux 5.1): mappings that are there may be written on.
_READ_ONLY_SEALS = 0x1 | 0x2 | 0x4 | 0x10

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def process_errors(pid: int) -> Iterator[None]:
    """Turn what the system says about a process out of reach into ProcessMemoryError."""
    try:
        yield
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessMemoryError(f"Process {pid} is gone.") from error
    except PermissionError as error:
        raise ProcessMemoryError(f"No ptrace rights over process {pid}: {error.strerror}.") from error


def find_mapping(pid: int, *, inode: int, size_bytes: int) -> int:
    """Address at which a process maps the file with this inode (`os.fstat(fd).st_ino`) whole; for guest RAM.

    Pages of other files may lie over it (sharing.py), and a VMM may map it in pieces: nothing in between may be free.
    """
    found: int | None = None
    spans: list[tuple[int, int]] = []
    with process_errors(pid):
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            span, _, offset, _, found_inode, *_ = line.split(None, 5)
            start, _, stop = span.partition("-")
            spans.append((int(start, 16), int(stop, 16)))
            if found is None and int(found_inode) == inode:
                found = int(start, 16) - int(offset, 16)
    end = found or 0
    for low, high in spans:  # ascending
        if low <= end < high:
            end = high
    if found is None or end < found + size_bytes:
        raise ProcessMemoryError(f"Process {pid} does not map the guest memory with inode {inode} whole.")
    return found


def written_pages(pid: int, address: int, length: int) -> list[Run]:
    """The pages of a private file mapping that are no longer the file's: ascending, disjoint, not adjacent runs.

    Part of the pause if the answer must be exact. Raises ProcessMemoryError.
    """
    with process_errors(pid), opened(f"/proc/{pid}/pagemap") as fd:
        try:
            own = scan_pagemap(fd, address, length, swapped=False)
            # Asked last: a page that goes to swap before the answer is not missed.
            return scan_pagemap(fd, address, length, swapped=True) if has_swapped(pid) else own
        except OSError as error:
            if error.errno != errno.ENOTTY:  # Linux < 6.7
                raise
            return read_pagemap(fd, address, length)


def has_swapped(pid: int) -> bool:
    """Whether a page of the process is in swap. Errors: FileNotFoundError, ProcessLookupError."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmSwap:\s+(\d+) kB$", text, re.MULTILINE)
    return found is None or found[1] != "0"


def scan_pagemap(pagemap_fd: int, address: int, length: int, *, swapped: bool) -> list[Run]:
    """Anonymous pages by PAGEMAP_SCAN. Raises OSError(ENOTTY) on Linux < 6.7.

    swapped: also those in swap; Linux reports a protected page that never was there as one of them.
    """
    return _scan(pagemap_fd, address, length, _own_masks(swapped=swapped), flags=0)


def protect_pagemap(pagemap_fd: int, address: int, length: int) -> None:
    """Write-protects the anonymous or swapped pages that are not. Raises as `scan_pagemap`."""
    inverted, wanted, any_of, returned = _own_masks(swapped=True)
    _scan(pagemap_fd, address, length, (inverted, wanted | _PAGE_IS_WRITTEN, any_of, returned), flags=_PROTECT)


def _own_masks(*, swapped: bool) -> tuple[int, int, int, int]:
    """For `_scan`: pages that are no longer the file's. What is returned is the same for neighbours, so that runs stay
    long."""
    anywhere = _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED if swapped else _PAGE_IS_PRESENT
    return _PAGE_IS_FILE, _PAGE_IS_FILE, anywhere, _PAGE_IS_PRESENT


def scan_unprotected(pagemap_fd: int, address: int, length: int) -> list[Run]:
    """Pages of any kind that are not write-protected; protects each in the same step. For just these masks Linux looks
    at one bit of each page, in a fraction of the time of `scan_pagemap`. Raises OSError(ENOTTY) as that does."""
    masks = (0, _PAGE_IS_WRITTEN, 0, _PAGE_IS_WRITTEN)
    return _scan(pagemap_fd, address, length, masks, flags=_PROTECT)


def _scan(pagemap_fd: int, address: int, length: int, masks: tuple[int, int, int, int], *, flags: int) -> list[Run]:
    """masks: inverted, wanted, any of them, returned (pagemap.rst)."""
    room = min(_REGIONS_PER_CALL, length // PAGE_SIZE)
    vector = (ctypes.c_uint64 * (3 * room))()
    runs: list[Run] = []
    position, end = address, address + length
    while position < end:
        argument = bytearray(
            _PM_SCAN_ARG.pack(
                _PM_SCAN_ARG.size,
                flags,
                position,
                end,
                0,
                ctypes.addressof(vector),
                room,
                0,  # no limit on pages
                *masks,
            )
        )
        regions = fcntl.ioctl(pagemap_fd, _PAGEMAP_SCAN, argument)
        values = array("Q", memoryview(vector).cast("B")[: regions * 24].tobytes())
        for start, stop in zip(values[0::3], values[1::3], strict=True):
            append_run(runs, (start - address) // PAGE_SIZE, (stop - start) // PAGE_SIZE)
        # Not from `walk_end`: Linux 6.18 leaves the place of an earlier internal flush there at the end of a walk.
        position = values[-2] if regions == room else end
    return runs


def read_pagemap(pagemap_fd: int, address: int, length: int) -> list[Run]:
    """Anonymous or swapped pages by reading /proc/PID/pagemap; works on every Linux."""
    runs: list[Run] = []
    words_start = address // PAGE_SIZE * 8
    words_length = length // PAGE_SIZE * 8
    for offset in range(0, words_length, _PAGEMAP_CHUNK_BYTES):
        size = min(_PAGEMAP_CHUNK_BYTES, words_length - offset)
        words = os.pread(pagemap_fd, size, words_start + offset)
        if len(words) != size:
            raise ProcessMemoryError("The mapping of guest memory is gone.")
        for match in _ANONYMOUS_RUN.finditer(words[7::8].translate(_ANONYMOUS_BYTES)):
            append_run(runs, offset // 8 + match.start(), match.end() - match.start())
    return runs


def append_run(runs: list[Run], first: int, count: int) -> None:
    """Add a run behind all others, joining it with the last one if it begins where that ends."""
    if runs and runs[-1][0] + runs[-1][1] == first:
        runs[-1] = (runs[-1][0], runs[-1][1] + count)
    else:
        runs.append((first, count))


def union(*many: Iterable[Run]) -> list[Run]:
    """The pages that are in any of several lists of runs."""
    joined: list[Run] = []
    for first, count in sorted(run for runs in many for run in runs):
        if joined and joined[-1][0] + joined[-1][1] >= first:
            joined[-1] = (joined[-1][0], max(joined[-1][1], first + count - joined[-1][0]))
        else:
            joined.append((first, count))
    return joined


def intersection(some: Sequence[Run], others: Sequence[Run]) -> list[Run]:
    """The pages that are in both of two ascending lists of disjoint runs."""
    shared: list[Run] = []
    index = 0
    for first, count in some:
        while index < len(others) and sum(others[index]) <= first:
            index += 1
        at = index
        while at < len(others) and others[at][0] < first + count:
            start = max(first, others[at][0])
            append_run(shared, start, min(first + count, sum(others[at])) - start)
            at += 1
    return shared


def count_pages(runs: Iterable[Run]) -> int:
    return sum(count for _, count in runs)


class PageBuffer:
    """Memory of this process that is already faulted in, so that copying into it runs at full speed.

    Faulting costs about as much as the copying itself (0.25 ms per MB): reserve it before the pause.
    shared: other processes can map it once it is sealed, which costs a little more.
    """

    def __init__(self, capacity_pages: int, *, shared: bool = False) -> None:
        self.capacity_pages = max(capacity_pages, 1)
        size_bytes = self.capacity_pages * PAGE_SIZE
        self._fd = -1
        if shared:
            self._fd = os.memfd_create(PAGES_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            weakref.finalize(self, os.close, self._fd)
            os.ftruncate(self._fd, size_bytes)
        self.memory = mmap.mmap(self._fd, size_bytes)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        with contextlib.suppress(OSError):  # Linux < 5.14: faulted in when it is used, slower
            self.memory.madvise(_MADV_POPULATE_WRITE)

    @property
    def address(self) -> int:
        return mapped_address(self.memory)

    def seal(self) -> int | None:
        """The file of a shared buffer, to which nobody else can write; None for another buffer. Twice is harmless."""
        if self._fd < 0:
            return None
        with contextlib.suppress(PermissionError):  # sealed already
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _READ_ONLY_SEALS)
        return self._fd


def mapped_address(memory: mmap.mmap) -> int:
    """Address of a writable (or copy-on-write) mapping. It is valid until the mapping is closed."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def read_pages(pid: int, address: int, runs: Sequence[Run], buffer: PageBuffer) -> None:
    """Copy runs of pages out of a process, one behind the other, to the start of the buffer. Part of the pause."""
    if count_pages(runs) > buffer.capacity_pages:
        raise ValueError("The buffer is too small.")
    position = buffer.address
    pairs: list[tuple[int, int, int]] = []
    for first, count in runs:
        pairs.append((position, address + first * PAGE_SIZE, count))
        position += count * PAGE_SIZE
    _transfer(_libc.process_vm_readv, pid, pairs)


def write_pages(pid: int, address: int, pieces: Iterable[tuple[int, int, int]]) -> None:
    """Copy pages into a process that does not run yet. pieces: (address in this process, first page there, pages)."""
    pairs = [(local, address + first * PAGE_SIZE, count) for local, first, count in pieces]
    _transfer(_libc.process_vm_writev, pid, pairs)


def _transfer(call: ctypes._NamedFuncPointer, pid: int, pairs: Iterable[tuple[int, int, int]]) -> None:
    """pairs: (address here, address there, pages)."""
    local, remote = array("Q"), array("Q")
    pages = 0
    for here, there, count in pairs:
        for done in range(0, count, _MAX_RUN_PAGES):
            size = min(_MAX_RUN_PAGES, count - done)
            if len(local) == 2 * _IOV_MAX or pages + size > _MAX_CALL_PAGES:
                _transfer_batch(call, pid, local, remote, pages)
                local, remote, pages = array("Q"), array("Q"), 0
            local.extend((here + done * PAGE_SIZE, size * PAGE_SIZE))
            remote.extend((there + done * PAGE_SIZE, size * PAGE_SIZE))
            pages += size
    if pages:
        _transfer_batch(call, pid, local, remote, pages)


def _transfer_batch(
    call: ctypes._NamedFuncPointer, pid: int, local: array[int], remote: array[int], pages: int
) -> None:
    moved = call(
        ctypes.c_int(pid),
        ctypes.c_void_p(local.buffer_info()[0]),
        ctypes.c_ulong(len(local) // 2),
        ctypes.c_void_p(remote.buffer_info()[0]),
        ctypes.c_ulong(len(remote) // 2),
        ctypes.c_ulong(0),
    )
    if moved != pages * PAGE_SIZE:
        code = ctypes.get_errno()
        reason = os.strerror(code) if moved < 0 else f"only {moved} of {pages * PAGE_SIZE} bytes"
        raise ProcessMemoryError(f"The memory of process {pid} cannot be copied: {reason}.")
