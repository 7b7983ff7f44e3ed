"""Bases: digests, seals, refusal of what was changed, sharing through the cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vm_runtime.snapshots.errors import BrokenSnapshotError
from vm_runtime.snapshots.memory import PAGE_SIZE, BaseCache, BaseMemory, memory_digest

SIZE_BYTES = 8 << 20


def test_a_frozen_base_is_sparse_and_its_digest_does_not_depend_on_holes(
    base_file: tuple[Path, str], tmp_path: Path
) -> None:
    path, digest = base_file
    assert path.stat().st_blocks * 512 < SIZE_BYTES // 4
    dense = tmp_path / "dense"
    dense.write_bytes(path.read_bytes())
    assert memory_digest(dense) == memory_digest(path) == digest


def test_a_sealed_base_cannot_be_changed_by_anybody(base: BaseMemory) -> None:
    for attempt in (
        lambda: os.pwrite(base.fd, b"x", 0),
        lambda: os.ftruncate(base.fd, PAGE_SIZE),
        lambda: os.ftruncate(base.fd, 2 * SIZE_BYTES),
    ):
        with pytest.raises(PermissionError):
            attempt()


def test_a_sealed_base_may_still_be_opened_for_writing(base: BaseMemory) -> None:
    """QEMU before 9 opens it that way even for a private mapping."""
    os.close(os.open(f"/proc/self/fd/{base.fd}", os.O_RDWR))


def test_a_changed_base_is_refused(base_file: tuple[Path, str]) -> None:
    path, digest = base_file
    with path.open("r+b") as file:
        file.seek(5 * PAGE_SIZE + 7)
        file.write(b"!")
    with pytest.raises(BrokenSnapshotError, match="was changed"):
        BaseMemory.load_sealed(path, digest=digest, size_bytes=SIZE_BYTES)


def test_data_written_into_a_hole_is_noticed(base_file: tuple[Path, str]) -> None:
    path, digest = base_file
    with path.open("r+b") as file:
        file.seek(1500 * PAGE_SIZE)
        file.write(b"!")
    assert memory_digest(path) != digest


def test_a_truncated_base_is_refused(base_file: tuple[Path, str]) -> None:
    path, digest = base_file
    os.truncate(path, SIZE_BYTES - PAGE_SIZE)
    with pytest.raises(BrokenSnapshotError, match="truncated"):
        BaseMemory.load_sealed(path, digest=digest, size_bytes=SIZE_BYTES)


def test_the_cache_loads_once_and_forgets_with_the_last_user(base_file: tuple[Path, str]) -> None:
    path, digest = base_file
    cache = BaseCache()
    first = cache.acquire(path, digest=digest, size_bytes=SIZE_BYTES)
    path.rename(path.with_suffix(".away"))  # so that a second load would fail
    second = cache.acquire(path, digest=digest, size_bytes=SIZE_BYTES)
    assert os.fstat(first.fd).st_ino == os.fstat(second.fd).st_ino
    first.close()
    first.close()
    cache.acquire(path, digest=digest, size_bytes=SIZE_BYTES).close()
    second.close()
    with pytest.raises(FileNotFoundError):
        cache.acquire(path, digest=digest, size_bytes=SIZE_BYTES)


def test_a_failed_load_leaves_nothing_in_the_cache(base_file: tuple[Path, str]) -> None:
    path, _ = base_file
    cache = BaseCache()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(BrokenSnapshotError):
        cache.acquire(path, digest="0" * 64, size_bytes=SIZE_BYTES)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_a_new_cache_adopts_the_base_of_a_running_process(base: BaseMemory) -> None:
    cache = BaseCache()
    with cache.adopt(os.getpid(), digest=base.digest, path=base.path) or pytest.fail("not found") as adopted:
        assert os.fstat(adopted.fd).st_ino == os.fstat(base.fd).st_ino


def test_a_forged_base_is_not_adopted(tmp_path: Path) -> None:
    digest = "1" * 64
    fd = os.memfd_create(f"hypercell-base-{digest}", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, SIZE_BYTES)
        assert BaseCache().adopt(os.getpid(), digest=digest, path=tmp_path) is None
    finally:
        os.close(fd)
