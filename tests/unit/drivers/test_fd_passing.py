"""A VMM is passed what it can only read."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vm_runtime.drivers.qemu.fd_passing import may_pass
from vm_runtime.snapshots.pages import PageBuffer

STRANGER = 1_900_000_001


@pytest.fixture
def stranger() -> Iterator[int]:
    """A process of another user."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    with subprocess.Popen(["/bin/sleep", "60"], user=STRANGER) as process:
        yield process.pid
        process.kill()


def _fd(path: Path, mode: int) -> int:
    path.write_bytes(b"x")
    path.chmod(mode)
    return os.open(path, os.O_RDONLY)


@pytest.mark.parametrize(("mode", "allowed"), [(0o644, True), (0o600, True), (0o666, False), (0o664, False)])
def test_another_users_process_is_lent_what_only_its_owner_writes(
    tmp_path: Path, stranger: int, mode: int, allowed: bool
) -> None:
    fd = _fd(tmp_path / "file", mode)
    assert may_pass(fd, stranger) is allowed
    os.close(fd)


def test_a_process_of_the_owner_is_lent_sealed_memory_only(tmp_path: Path) -> None:
    fd = _fd(tmp_path / "file", 0o400)
    assert not may_pass(fd, os.getpid())
    os.close(fd)
    buffer = PageBuffer(1, shared=True)
    sealed = buffer.seal()
    assert sealed is not None
    assert may_pass(sealed, os.getpid())
    unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    assert not may_pass(unsealed, os.getpid())
    os.close(unsealed)


def test_a_process_that_has_ended_is_lent_nothing(tmp_path: Path) -> None:
    with subprocess.Popen(["/bin/true"]) as process:
        process.wait()
    fd = _fd(tmp_path / "file", 0o644)
    assert not may_pass(fd, process.pid)
    os.close(fd)
