"""A stand-in for a VMM: an ordinary process that maps a base privately and writes into it when told to."""

from __future__ import annotations

import datetime
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from vm_runtime.paged.backing import BackingChain
from vm_runtime.snapshots.layers import copy_sparse
from vm_runtime.snapshots.manifest import (
    Part,
    PartKind,
    Shape,
    SnapshotContents,
)
from vm_runtime.snapshots.memory import PAGE_SIZE, BaseMemory, freeze_memfd
from vm_runtime.snapshots.store import Draft

SIZE_BYTES = 8 << 20

_CHILD = """
import ctypes, hashlib, mmap, os, sys
fd, size = int(sys.argv[1]), int(sys.argv[2])
memory = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
for line in sys.stdin:
    command, *arguments = line.split()
    if command == "write":
        page, pages, byte = map(int, arguments)
        memory[page * 4096:(page + pages) * 4096] = bytes([byte]) * (pages * 4096)
    elif command == "touch":
        for page in range(0, size, 4096):
            memory[page]
    elif command == "open":
        print(os.open(arguments[0], os.O_RDONLY), flush=True)
        continue
    print(hashlib.sha256(memory).hexdigest(), flush=True)
"""


class Mapper:
    """The process. `write` fills pages with a byte; both answer the SHA-256 of all it sees."""

    def __init__(self, base: BaseMemory) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(base.fd), str(base.size_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[base.fd],
            text=True,
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        self.address = int(self._process.stdout.readline())

    def write(self, page: int, pages: int, byte: int) -> str:
        return self._ask(f"write {page} {pages} {byte}")

    def touch(self) -> str:
        return self._ask("touch")

    def pass_files(self, files: Mapping[int, int]) -> dict[int, int]:
        """Opens the files of our descriptors there; answers its own."""
        return {key: int(self._ask(f"open /proc/{os.getpid()}/fd/{fd}")) for key, fd in files.items()}

    def _ask(self, command: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(command, file=self._process.stdin, flush=True)
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.communicate(timeout=30)


@pytest.fixture
def base_file(tmp_path: Path) -> tuple[Path, str]:
    """A sparse base file and its digest: pages 0-99 and 500-509 hold data, all others are zero."""
    fd = os.memfd_create("ram")
    os.ftruncate(fd, SIZE_BYTES)
    for page in (*range(100), *range(500, 510)):
        os.pwrite(fd, hashlib.sha256(b"%d" % page).digest() * (PAGE_SIZE // 32), page * PAGE_SIZE)
    digest = freeze_memfd(fd, tmp_path / "base.ram")
    os.close(fd)
    return tmp_path / "base.ram", digest


@pytest.fixture
def base(base_file: tuple[Path, str]) -> Iterator[BaseMemory]:
    path, digest = base_file
    with BaseMemory.load_sealed(path, digest=digest, size_bytes=SIZE_BYTES) as base:
        yield base


@pytest.fixture
def mapper(base: BaseMemory) -> Iterator[Callable[[], Mapper]]:
    """Starts processes that map the base."""
    started: list[Mapper] = []

    def start() -> Mapper:
        started.append(Mapper(base))
        return started[-1]

    yield start
    for process in started:
        process.close()


@pytest.fixture
def fill(base_file: tuple[Path, str]) -> Callable[..., SnapshotContents]:
    """Fills a draft with a base, a layer, device state and a disk; answers the contents to publish."""

    def fill(
        draft: Draft, *, name: str | None = None, device: bytes = b"device", layer: Part | None = None
    ) -> SnapshotContents:
        path, digest = base_file
        with path.open("rb") as source, draft.path("base").open("wb") as copy:
            copy.truncate(SIZE_BYTES)
            copy_sparse(source.fileno(), copy.fileno(), SIZE_BYTES)
        base = draft.add(PartKind.BASE, draft.path("base"), digest=digest)
        disk = draft.add_bytes(PartKind.DISK, b"QFI\xfb a disk")
        return SnapshotContents(
            created_at=datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
            owner="local",
            name=name,
            sandbox_id="8c1e9d1e-0000-4000-8000-000000000000",
            template="python3",
            image_digest="ab" * 32,
            shape=Shape(memory_mib=8, vcpus=1, disk_mib=1024),
            state=BackingChain(base=base, layers=(layer,) if layer else (), disks=(disk,)).state(
                driver="qemu",
                format="qemu-pages-1",
                needs={"version": "7.2.22"},
                device=draft.add_bytes(PartKind.DEVICE, device),
            ),
            wire_marker="cd" * 16,
        )

    return fill
