"""Bases for machines to map: sealed copies of what sandboxes of different users share, the files themselves otherwise.

QEMU before 9 opens guest RAM for writing although it maps it privately. What is done about it depends on who shares it:

* a template's base is shared by different users: it is copied into a sealed memfd, once for all machines of this
  process;
* a base that was flattened from a sandbox's own chain belongs to that sandbox and its forks. Copying 500 MB would make
  every wake as slow as that, so the file itself is mapped (mode 0666 in a directory of mode 0700; the VMM gets a
  descriptor). A VMM that was broken into could then write into the base of its own family. It cannot do so unseen:
  the file's times change, so it is read and compared before it is used again, and `verify` always reads it.

QEMU 9 and later maps every base read-only.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import OrderedDict
from pathlib import Path

from vm_runtime.snapshots.manifest import Part, PartKind
from vm_runtime.snapshots.memory import BaseCache, BaseMemory
from vm_runtime.snapshots.store import SnapshotStore

# Sealed copies kept for the next machine although nobody maps them now: a template's has some 200 MB of host memory.
KEPT_BASES = 2

TEMPLATE_MODE = 0o600
FAMILY_MODE = 0o666
READ_ONLY_MODE = 0o644


class Bases:
    """Gives out bases; close each one, and this at the end. Safe to use from several tasks."""

    def __init__(self, store: SnapshotStore, *, seal: bool) -> None:
        self._store = store
        self._seal = seal
        self._cache = BaseCache()
        self._kept: OrderedDict[str, BaseMemory] = OrderedDict()
        self._lock = threading.Lock()

    def mode(self, *, family: bool) -> int:
        """The mode of a new base's file. family: flattened from a sandbox's own chain."""
        if not self._seal:
            return READ_ONLY_MODE
        return FAMILY_MODE if family else TEMPLATE_MODE

    async def acquire(self, part: Part) -> BaseMemory:
        """A checked base of one's own to close. BrokenSnapshotError."""
        return await asyncio.to_thread(self._acquire, part)

    async def adopt(self, pid: int, part: Part) -> BaseMemory:
        """The same, sharing what a running VMM maps already where it can."""
        return await asyncio.to_thread(self._adopt, pid, part)

    def close(self) -> None:
        """Let go of what is kept; twice is harmless."""
        with self._lock:
            kept, self._kept = self._kept, OrderedDict()
        for base in kept.values():
            base.close()

    def _acquire(self, part: Part) -> BaseMemory:
        path = self._store.part_path(PartKind.BASE, part.digest)
        if not self._is_sealed(path):
            self._store.checked_path(PartKind.BASE, part)
            return BaseMemory.open_file(path, digest=part.digest, size_bytes=part.size_bytes)
        base = self._cache.acquire(path, digest=part.digest, size_bytes=part.size_bytes)
        self._keep(part)
        return base

    def _adopt(self, pid: int, part: Part) -> BaseMemory:
        path = self._store.part_path(PartKind.BASE, part.digest)
        if self._is_sealed(path):
            base = self._cache.adopt(pid, digest=part.digest, path=path)
            if base is not None:
                self._keep(part)
                return base
        return self._acquire(part)

    def _keep(self, part: Part) -> None:
        dropped: list[BaseMemory] = []
        with self._lock:
            if part.digest not in self._kept:
                path = self._store.part_path(PartKind.BASE, part.digest)
                self._kept[part.digest] = self._cache.acquire(path, digest=part.digest, size_bytes=part.size_bytes)
            self._kept.move_to_end(part.digest)
            while len(self._kept) > KEPT_BASES:
                dropped.append(self._kept.popitem(last=False)[1])
        for base in dropped:
            base.close()

    def _is_sealed(self, path: Path) -> bool:
        if not self._seal:
            return False
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_mode & 0o002 == 0
        return True  # missing, which the loading says
