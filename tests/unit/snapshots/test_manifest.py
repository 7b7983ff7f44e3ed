"""The manifest's format: golden files, an id that follows the content, and refusal of everything else."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from vm_runtime.paged.backing import BackingChain
from vm_runtime.saving.record import SavedRecord
from vm_runtime.snapshots.errors import BrokenSnapshotError
from vm_runtime.snapshots.manifest import (
    MAX_LAYERS,
    MAX_MANIFEST_BYTES,
    KernelInformation,
    Manifest,
    Part,
    PartKind,
    Shape,
    SnapshotContents,
    State,
    StatePart,
)

GOLDEN = Path(__file__).parent / "golden"
VERSION_1 = (GOLDEN / "manifest-1.json").read_bytes().rstrip(b"\n")
VERSION_2 = (GOLDEN / "manifest-2.json").read_bytes().rstrip(b"\n")
WHOLE = (GOLDEN / "manifest-2-whole.json").read_bytes().rstrip(b"\n")

PAGES = BackingChain(
    base=Part(digest="01" * 32, size_bytes=512 << 20),
    layers=(Part(digest="02" * 32, size_bytes=8192), Part(digest="03" * 32, size_bytes=12288)),
    disks=(Part(digest="05" * 32, size_bytes=1 << 30), Part(digest="06" * 32, size_bytes=196608)),
).state(
    driver="qemu",
    format="qemu-pages-1",
    needs={"version": "7.2.22", "machine": "microvm", "cpu_model": "max", "accelerator": "tcg"},
    device=Part(digest="04" * 32, size_bytes=13000),
)
FILES = State(
    driver="fake",
    format="fake-files-1",
    parts=(StatePart(kind=PartKind.FILE, name="home.tar", digest="07" * 32, size_bytes=10240),),
)


def _contents(state: State = PAGES) -> SnapshotContents:
    return SnapshotContents(
        created_at=datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
        owner="local",
        name="before the cleaning",
        sandbox_id="8c1e9d1e-0000-4000-8000-000000000000",
        template="python3",
        image_digest="ab" * 32,
        parents=("12" * 16,),
        shape=Shape(memory_mib=512, vcpus=1, disk_mib=1024),
        state=state,
        kernel=KernelInformation(name="python3", language="python", state="idle", execution_count=7),
        wire_marker="cd" * 16,
    )


@pytest.mark.parametrize(("state", "golden"), [(PAGES, VERSION_2), (FILES, WHOLE)], ids=["pages", "whole"])
def test_the_format_of_version_2_stays_as_it_is(state: State, golden: bytes) -> None:
    manifest = Manifest.of(_contents(state))
    assert manifest.to_json() == golden
    assert Manifest.parse(golden) == manifest


def test_a_manifest_of_version_1_is_read_and_keeps_its_id_and_its_text() -> None:
    manifest = Manifest.parse(VERSION_1)
    assert manifest.state == PAGES
    assert manifest.model_dump(exclude={"id"}) == _contents().model_dump()
    assert manifest.id == json.loads(VERSION_1)["id"]
    assert manifest.to_json() == VERSION_1
    assert Manifest.of(manifest).to_json() == VERSION_1


def test_a_machine_record_of_version_1_is_read(tmp_path: Path) -> None:
    old = json.loads(VERSION_1)
    memory = {**old["memory"], "layers": old["memory"]["layers"][:1]}
    record = {"format": 1, "snapshot": old, "memory": memory, "disks": old["disks"]}
    (tmp_path / "saved.json").write_text(json.dumps(record))
    found = SavedRecord.read(tmp_path)
    assert found is not None
    assert found.snapshot.state == PAGES
    assert [part.digest[:2] for part in found.state.parts] == ["01", "02", "05", "06"]
    found.write(tmp_path)
    assert SavedRecord.read(tmp_path) is not None
    (tmp_path / "saved.json").write_text(json.dumps({"format": 1, "snapshot": {}}))
    assert SavedRecord.read(tmp_path) is None


def test_parts_are_listed_once_and_in_order() -> None:
    kinds = [kind for kind, _ in _contents().parts()]
    assert kinds == [PartKind.BASE, PartKind.LAYER, PartKind.LAYER, PartKind.DEVICE, PartKind.DISK, PartKind.DISK]
    twice = State(driver="fake", format="f", parts=(*FILES.parts, *FILES.parts))
    assert len(_contents(twice).parts()) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "another"}, "id does not fit"),
        ({"format_version": 3}, "format version 3"),
        ({"surprise": 1}, "Extra inputs"),
        ({"wire_marker": "x"}, "pattern"),
        ({"device": {"digest": "../../etc/passwd", "size_bytes": 1}}, "pattern"),
        ({"disks": [{"digest": "05" * 32, "size_bytes": 1, "format": "raw", "backing": "06" * 32}]}, "not a chain"),
        ({"memory": None}, "no manifest of format 1"),
        ({"memory": {"size_bytes": 4097, "base": {"digest": "01" * 32, "size_bytes": 4097}, "layers": []}}, "multiple"),
        (
            {"memory": {"size_bytes": 1, "base": {"digest": "01" * 32, "size_bytes": 4096}, "layers": []}},
            "another size",
        ),
        ({"created_at": "2026-01-02T03:04:05"}, "timezone"),
    ],
)
def test_a_changed_manifest_of_version_1_is_refused_with_the_reason(change: dict[str, object], reason: str) -> None:
    with pytest.raises(BrokenSnapshotError, match=reason):
        Manifest.parse(json.dumps(json.loads(VERSION_1) | change).encode())


def _part(kind: str, size_bytes: int = 4096, digest: str = "01" * 32) -> dict[str, object]:
    return {"kind": kind, "digest": digest, "size_bytes": size_bytes, "name": None}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"driver": ""}, "at least 1"),
        ({"surprise": 1}, "Extra inputs"),
        ({"parts": [_part("base", 4097)]}, "multiple"),
        ({"parts": [_part("base", 1 << 60)]}, "larger than any host"),
        ({"parts": [_part("base"), _part("base", 8192, "02" * 32)]}, "one base"),
        ({"parts": [_part("layer")]}, "one base"),
        ({"parts": [_part("disk")] * (MAX_LAYERS + 1)}, "more than"),
        ({"parts": [_part("file", digest="../../etc/passwd")]}, "pattern"),
        ({"parts": [_part("surprise")]}, "Input should be"),
        ({"needs": {str(number): "x" for number in range(17)}}, "at most 16"),
    ],
)
def test_a_changed_state_is_refused_with_the_reason(change: dict[str, object], reason: str) -> None:
    values = json.loads(VERSION_2)
    values["state"] |= change
    with pytest.raises(BrokenSnapshotError, match=reason):
        Manifest.parse(json.dumps(values).encode())


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b" " * (MAX_MANIFEST_BYTES + 1)])
def test_what_is_no_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(BrokenSnapshotError):
        Manifest.parse(text)
