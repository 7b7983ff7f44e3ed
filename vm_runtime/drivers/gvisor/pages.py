"""Keeps the pages of a machine's states once each: a state's pages are in some files, and its index says where.

gVisor writes all pages of a machine each time, in an order of its own, so what is the same is found by content.

    index   one entry for each page of the state, in gVisor's order: blake2b of the page (16 bytes), number of the page
            in its file, number of the file (u32 each, little endian). A page of zeros is in no file: 0, NO_FILE.
    files   pages, without anything else; the first one of a state that lies on nothing is what gVisor has written

A state shares files with the one that it lies on; it has at most MAX_FILES. Knows no machine and no store. Blocking.
"""

from __future__ import annotations

import array
import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

from vm_runtime.snapshots.errors import BrokenSnapshotError

PAGE = 4096
NO_FILE = 0xFFFFFFFF
# More make a restore slower: each is read in small pieces.
MAX_FILES = 16
# Above this share of new pages a state of files of its own is as good.
_NEW_SHARE = 0.5
_ENTRY = struct.Struct("<16sII")
_DIGEST_BYTES = 16
_ZEROS = bytes(PAGE)
_READ_PAGES = 256
# A guest of the largest host there is.
_MAX_INDEX_BYTES = 1 << 32


@dataclass(frozen=True, kw_only=True)
class KnownPages:
    """Pages that are stored: where each is, by its digest. files: how many files there are."""

    places: dict[bytes, tuple[int, int]]
    files: int


@dataclass(frozen=True, kw_only=True)
class SplitPages:
    """used: numbers of the known files that the index names, in their new order. new_pages: written to a file of their
    own, which comes last; 0 if there is no such file."""

    used: tuple[int, ...]
    new_pages: int


NOTHING = KnownPages(places={}, files=0)


def known_pages(index: Path, *, files: int) -> KnownPages:
    """What a state has. BrokenSnapshotError if the index is none."""
    places: dict[bytes, tuple[int, int]] = {}
    for digest, page, file in _ENTRY.iter_unpack(_read_index(index)):
        if file != NO_FILE:
            places[digest] = (file, page)
    return KnownPages(places=places, files=files)


def split(pages: int, known: KnownPages, *, index: Path, new: Path) -> SplitPages:
    """Write a state's index, and a file with the pages that are not known. pages: a descriptor of all pages.

    If nothing is known, or little, the new file is as gVisor has written it. Both are synced.
    """
    if known.files >= MAX_FILES:
        known = KnownPages(places={key: place for key, place in known.places.items() if place[0] == 0}, files=1)
    entries, fresh = _look_up(pages, known)
    if not known.files or len(fresh) > _NEW_SHARE * len(entries):
        known = NOTHING
        fresh = list(range(len(entries)))
        entries = [(digest, 0, page) for page, (digest, _, _) in enumerate(entries)]
    used = sorted({file for _, file, _ in entries if file not in (NO_FILE, known.files)})
    numbers = {old: number for number, old in enumerate(used)}
    numbers |= {known.files: len(used), NO_FILE: NO_FILE}
    with index.open("xb", buffering=0) as file:
        file.write(b"".join(_ENTRY.pack(digest, page, numbers[number]) for digest, number, page in entries))
        os.fsync(file.fileno())
    if fresh:
        with new.open("xb", buffering=0) as file:
            for first, count in _runs(fresh):
                _copy(pages, first * PAGE, file.fileno(), count * PAGE)
            os.fsync(file.fileno())
    return SplitPages(used=tuple(used), new_pages=len(fresh))


def joined(index: Path, files: Sequence[Path]) -> int | None:
    """A memory file with all pages in gVisor's order; None where the only file is just that. Close it.

    Raises BrokenSnapshotError if the index does not fit the files.
    """
    content = _read_index(index)
    entries = array.array("Q", content)
    if sys.byteorder == "big":
        entries.byteswap()
    # Pages that follow each other in one file differ by 1 here.
    places = entries[2::3]
    if len(files) == 1 and places == array.array("Q", range(files[0].stat().st_size // PAGE)):
        return None
    starts = [0, *(at for at, (one, next_) in enumerate(pairwise(places), start=1) if next_ - one != 1)]
    sources = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in files]
    target = os.memfd_create("hypercell-pages", os.MFD_CLOEXEC)
    try:
        sizes = [os.fstat(source).st_size // PAGE for source in sources]
        os.ftruncate(target, len(places) * PAGE)
        for start, end in pairwise([*starts, len(places)] if places else []):
            number, first = divmod(places[start], 1 << 32)
            if number == NO_FILE:
                continue
            if number >= len(sources) or first + end - start > sizes[number]:
                raise BrokenSnapshotError(f"{index.name} names pages that are not there.")
            os.lseek(target, start * PAGE, os.SEEK_SET)
            _copy(sources[number], first * PAGE, target, (end - start) * PAGE)
        os.lseek(target, 0, os.SEEK_SET)
    except BaseException:
        os.close(target)
        raise
    finally:
        for source in sources:
            os.close(source)
    return target


def _read_index(path: Path) -> bytes:
    size_bytes = path.stat().st_size
    if size_bytes % _ENTRY.size or size_bytes > _MAX_INDEX_BYTES:
        raise BrokenSnapshotError(f"{path.name} is no index of pages.")
    return path.read_bytes()


def _look_up(pages: int, known: KnownPages) -> tuple[list[tuple[bytes, int, int]], list[int]]:
    """The entries of an index, and the pages that are new, in the order in which they are written to the new file."""
    places = dict(known.places)
    entries: list[tuple[bytes, int, int]] = []
    fresh: list[int] = []
    zeros = blake2b(_ZEROS, digest_size=_DIGEST_BYTES).digest()
    places[zeros] = (NO_FILE, 0)
    size_bytes = os.fstat(pages).st_size
    for offset in range(0, size_bytes, _READ_PAGES * PAGE):
        chunk = memoryview(os.pread(pages, _READ_PAGES * PAGE, offset))
        for start in range(0, len(chunk), PAGE):
            digest = blake2b(chunk[start : start + PAGE], digest_size=_DIGEST_BYTES).digest()
            place = places.get(digest)
            if place is None:
                place = places[digest] = (known.files, len(fresh))
                fresh.append((offset + start) // PAGE)
            entries.append((digest, *place))
    return entries, fresh


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(first, count) of ascending numbers that follow each other."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and sum(runs[-1]) == number:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs


def _copy(source: int, offset: int, target: int, count: int) -> None:
    """To where the target stands."""
    while count > 0:
        copied = os.sendfile(target, source, offset, count)
        if copied == 0:
            raise BrokenSnapshotError("A file of pages is shorter than it was.")
        offset += copied
        count -= copied
