"""The manifest's format: a golden file, an id that follows the content, and refusal of everything else."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from vm_runtime.snapshots.errors import BrokenSnapshotError
from vm_runtime.snapshots.manifest import (
    MAX_MANIFEST_BYTES,
    DiskPart,
    KernelInformation,
    Manifest,
    MemoryParts,
    Part,
    PartKind,
    Shape,
    SnapshotContents,
    Vmm,
)

GOLDEN = Path(__file__).parent / "golden" / "manifest-1.json"


def _contents() -> SnapshotContents:
    return SnapshotContents(
        created_at=datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
        owner="local",
        name="before the cleaning",
        sandbox_id="8c1e9d1e-0000-4000-8000-000000000000",
        template="python3",
        image_digest="ab" * 32,
        parents=("12" * 16,),
        shape=Shape(memory_mib=512, vcpus=1, disk_mib=1024),
        vmm=Vmm(driver="qemu", version="7.2.22", machine="microvm", cpu_model="max", accelerator="tcg"),
        memory=MemoryParts(
            size_bytes=512 << 20,
            base=Part(digest="01" * 32, size_bytes=512 << 20),
            layers=(Part(digest="02" * 32, size_bytes=8192), Part(digest="03" * 32, size_bytes=12288)),
        ),
        device=Part(digest="04" * 32, size_bytes=13000),
        disks=(
            DiskPart(digest="05" * 32, size_bytes=1 << 30, format="raw"),
            DiskPart(digest="06" * 32, size_bytes=196608, format="qcow2", backing="05" * 32),
        ),
        kernel=KernelInformation(name="python3", language="python", state="idle", execution_count=7),
        wire_marker="cd" * 16,
    )


def test_the_format_of_version_1_stays_as_it_is() -> None:
    manifest = Manifest.of(_contents())
    assert manifest.to_json() == GOLDEN.read_bytes().rstrip(b"\n")
    assert Manifest.parse(GOLDEN.read_bytes()) == manifest


def test_parts_are_listed_once_and_in_order() -> None:
    kinds = [kind for kind, _ in _contents().parts()]
    assert kinds == [PartKind.BASE, PartKind.LAYER, PartKind.LAYER, PartKind.DEVICE, PartKind.DISK, PartKind.DISK]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "another"}, "id does not fit"),
        ({"format_version": 2}, "format version 2"),
        ({"surprise": 1}, "Extra inputs"),
        ({"wire_marker": "x"}, "pattern"),
        ({"device": {"digest": "../../etc/passwd", "size_bytes": 1}}, "pattern"),
        ({"disks": [{"digest": "05" * 32, "size_bytes": 1, "format": "raw", "backing": "06" * 32}]}, "not a chain"),
        ({"memory": {"size_bytes": 4097, "base": {"digest": "01" * 32, "size_bytes": 4097}}}, "multiple"),
        ({"memory": {"size_bytes": 1 << 60, "base": {"digest": "01" * 32, "size_bytes": 1 << 60}}}, "less than"),
        ({"created_at": "2026-01-02T03:04:05"}, "timezone"),
    ],
)
def test_a_changed_manifest_is_refused_with_the_reason(change: dict[str, object], reason: str) -> None:
    values = json.loads(GOLDEN.read_bytes()) | change
    with pytest.raises(BrokenSnapshotError, match=reason):
        Manifest.parse(json.dumps(values).encode())


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b" " * (MAX_MANIFEST_BYTES + 1)])
def test_what_is_no_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(BrokenSnapshotError):
        Manifest.parse(text)
