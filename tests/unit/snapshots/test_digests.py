"""A disk's digest follows its content only, and a checked file is known again until somebody changes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vm_runtime.snapshots.digests import FileIdentity, disk_digest
from vm_runtime.snapshots.manifest import PartKind


def test_a_disks_digest_does_not_depend_on_holes(tmp_path: Path) -> None:
    sparse, full = tmp_path / "sparse", tmp_path / "full"
    content = bytes(1 << 20) + b"x" * 5000 + bytes(1 << 20) + b"end"
    full.write_bytes(content)
    with sparse.open("wb") as file:
        file.truncate(len(content))
        file.seek(1 << 20)
        file.write(b"x" * 5000)
        file.seek(len(content) - 3)
        file.write(b"end")
    assert disk_digest(sparse) == disk_digest(full)


def test_a_disks_digest_depends_on_content_place_and_length(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    digests = set()
    for content in (b"", bytes(4096), bytes(8192), b"a", b"a\0", bytes(4096) + b"a", b"b"):
        path.write_bytes(content)
        digests.add(disk_digest(path))
    assert len(digests) == 7


@pytest.mark.parametrize("kind", [PartKind.BASE, PartKind.DISK])
def test_a_written_file_is_not_the_one_that_was_checked(kind: PartKind, tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(b"content")
    checked = FileIdentity.of(kind, path)
    assert FileIdentity.of(kind, path) == checked
    while FileIdentity.of(kind, path) == checked:  # a file system's clock ticks every few milliseconds
        path.write_bytes(b"changed")
    assert FileIdentity.of(kind, path) != checked
