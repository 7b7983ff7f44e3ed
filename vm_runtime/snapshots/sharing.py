"""Puts pages into a process that does not run yet: long runs as mappings of the files that have them, so that all who
map them share them; the others as copies.

A copy takes some 2 microseconds and 4 KiB of memory for each page, a mapping 10 microseconds for a whole run and no
memory until it is written. Knows neither snapshots nor VMMs; blocking.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vm_runtime.snapshots.errors import ProcessMemoryError
from vm_runtime.snapshots.injection import calls_in_process, can_inject
from vm_runtime.snapshots.memory import PAGE_SIZE
from vm_runtime.snapshots.pages import write_pages

_log = logging.getLogger(__name__)

# Shorter runs are copied: they would take long to map, and most are small objects that are written soon anyway.
LONG_RUN_PAGES = 4
# Linux allows a process 65,530 mappings (vm.max_map_count); each that lies in another one adds two.
_MAX_MAPPED_RUNS = 16384

_NR_MMAP = 9  # x86-64
# <asm-generic/mman.h>; Python's mmap has only some of them.
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_FLAGS = mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE


class Piece(NamedTuple):
    """Pages that shall be seen from page `first` of the target on. address: where they lie in this process. source,
    position: the same pages as a file, from its page `position` on."""

    first: int
    pages: int
    address: int
    source: int
    position: int


@dataclass(frozen=True, kw_only=True)
class SharedPages:
    """Pages for many processes. files: what the pieces can be mapped from: descriptors of this process, by source."""

    pieces: Sequence[Piece]
    files: Mapping[int, int]


def place_pages(pid: int, address: int, pieces: Iterable[Piece], *, passed: Mapping[int, int]) -> None:
    """Make a process see pages in its private mapping at `address`.

    passed: descriptors in that process, by source; pages of other sources are copied. Raises ProcessMemoryError.
    """
    every = list(pieces)
    mapped = _to_map(every, passed) if passed and can_inject() else []
    if mapped:
        try:
            _map_runs(pid, address, mapped, passed)
        except ProcessMemoryError as error:
            # What was mapped already is what the copy writes there.
            _log.info("Pages are copied into process %d: %s", pid, error)
            mapped = []
    done = {piece.first for piece in mapped}
    write_pages(pid, address, ((p.address, p.first, p.pages) for p in every if p.first not in done))


def _to_map(pieces: list[Piece], passed: Mapping[int, int]) -> list[Piece]:
    long = [piece for piece in pieces if piece.pages >= LONG_RUN_PAGES and piece.source in passed]
    long.sort(key=lambda piece: piece.pages, reverse=True)
    return long[:_MAX_MAPPED_RUNS]


def _map_runs(pid: int, address: int, pieces: list[Piece], passed: Mapping[int, int]) -> None:
    access = mmap.PROT_READ | mmap.PROT_WRITE
    calls = [
        (address + first * PAGE_SIZE, pages * PAGE_SIZE, access, _FLAGS, passed[source], position * PAGE_SIZE)
        for first, pages, _, source, position in pieces
    ]
    with calls_in_process(pid) as thread:
        thread.call_each(_NR_MMAP, calls)
