"""Snapshots as one file: carried to another store whole, and refused when they are anything else."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from vm_runtime.snapshots.archive import export_snapshot, import_snapshot
from vm_runtime.snapshots.errors import BrokenSnapshotError
from vm_runtime.snapshots.manifest import Manifest, PartKind, SnapshotContents
from vm_runtime.snapshots.store import SnapshotStore

Fill = Callable[..., SnapshotContents]
Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SnapshotStore]:
    with SnapshotStore(tmp_path / "store") as store:
        yield store


@pytest.fixture
def exported(store: SnapshotStore, fill: Fill, tmp_path: Path) -> tuple[Manifest, Path]:
    with store.begin() as draft:
        manifest = draft.publish(fill(draft, name="carried"))
    export_snapshot(store, manifest.id, tmp_path / "exported")
    return manifest, tmp_path / "exported"


@pytest.fixture
def other(tmp_path: Path) -> Iterator[SnapshotStore]:
    with SnapshotStore(tmp_path / "other") as other:
        yield other
        assert list((other.directory / "drafts").iterdir()) == []


def _import(store: SnapshotStore, path: Path) -> Manifest:
    return import_snapshot(store, path, has_image=lambda _: True)


def test_an_exported_snapshot_is_the_same_elsewhere(
    exported: tuple[Manifest, Path], store: SnapshotStore, other: SnapshotStore
) -> None:
    manifest, path = exported
    assert _import(other, path) == manifest == _import(other, path)
    assert other.verify(manifest.id) == []
    (part,) = manifest.state.of_kind(PartKind.BASE)
    base = other.part_path(PartKind.BASE, part.digest)
    assert base.read_bytes() == store.part_path(PartKind.BASE, part.digest).read_bytes()
    assert base.stat().st_blocks * 512 < base.stat().st_size // 4


def test_an_image_that_is_missing_is_the_reason_for_a_refusal(
    exported: tuple[Manifest, Path], other: SnapshotStore
) -> None:
    manifest, path = exported
    with pytest.raises(BrokenSnapshotError, match=manifest.image_digest):
        import_snapshot(other, path, has_image=lambda _: False)


def test_a_damaged_snapshot_is_not_exported(
    exported: tuple[Manifest, Path], store: SnapshotStore, tmp_path: Path
) -> None:
    manifest, _ = exported
    store.part_path(PartKind.DEVICE, manifest.state.of_kind(PartKind.DEVICE)[0].digest).write_bytes(b"dEvice")
    with pytest.raises(BrokenSnapshotError, match="cannot be exported"):
        export_snapshot(store, manifest.id, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_truncated_file_is_refused_wherever_it_ends(exported: tuple[Manifest, Path], other: SnapshotStore) -> None:
    _, path = exported
    content = path.read_bytes()
    for length in (0, 3, 20, *range(100, len(content), max(1, len(content) // 12)), len(content) - 8):
        path.write_bytes(content[:length])
        with pytest.raises(BrokenSnapshotError):
            _import(other, path)
    assert other.ls() == []


def test_flipped_bits_are_refused_or_change_nothing(exported: tuple[Manifest, Path], other: SnapshotStore) -> None:
    """Some bits of a Zstandard frame mean nothing to its content, such as those of the window's size."""
    manifest, path = exported
    content = path.read_bytes()
    refused = 0
    for position in range(0, len(content), max(1, len(content) // 40)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        try:
            assert _import(other, path) == manifest
        except BrokenSnapshotError:
            refused += 1
    assert refused > 30
    assert all(other.verify(snapshot_id) == [] for snapshot_id in other.ids())


def _repack(path: Path, change: Callable[[Members], Members]) -> None:
    raw = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        members = [(member, (archive.extractfile(member) or pytest.fail("odd")).read()) for member in archive]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for member, content in change(members):
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    text = packed.getvalue().rstrip(b"\0")
    path.write_bytes(zstandard.ZstdCompressor().compress(text + bytes(-len(text) % 512) + bytes(1024)))


def _rename(name: str) -> Callable[[Members], Members]:
    def change(members: Members) -> Members:
        members[2][0].name = name
        return members

    return change


def _retype(kind: bytes) -> Callable[[Members], Members]:
    def change(members: Members) -> Members:
        members[2][0].type, members[2][0].linkname = kind, "/etc/passwd"
        return members

    return change


def _manifest_with(**values: object) -> Callable[[Members], Members]:
    def change(members: Members) -> Members:
        text = json.dumps(json.loads(members[0][1]) | values).encode()
        return [(members[0][0], text), *members[1:]]

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_rename("../../../etc/cron.d/evil"), "belongs"),
        (_rename("/etc/passwd"), "belongs"),
        (_retype(tarfile.SYMTYPE), "belongs"),
        (_retype(tarfile.LNKTYPE), "belongs"),
        (lambda members: members[1:], "belongs"),
        (lambda members: [members[0], *reversed(members[1:])], "belongs"),
        (lambda members: members[:-1], "no readable header|ends early"),
        (lambda members: [*members, members[-1]], "behind its last part"),
        (lambda members: [*members[:2], (members[2][0], members[2][1] + b"!"), *members[3:]], "more than"),
        (lambda members: [*members[:2], (members[2][0], members[2][1][:-1]), *members[3:]], "another digest"),
        (lambda members: [*members[:2], (members[2][0], b"dEvice"), *members[3:]], "another digest"),
        (lambda members: [members[0], (members[1][0], b"HCLAYER\n" + bytes(88)), *members[2:]], "format 0"),
        (_manifest_with(owner="somebody else"), "id does not fit"),
        (_manifest_with(format_version=99), "format version 99"),
    ],
)
def test_a_hostile_file_is_refused_with_the_reason(
    exported: tuple[Manifest, Path], other: SnapshotStore, change: Callable[[Members], Members], reason: str
) -> None:
    _, path = exported
    _repack(path, change)
    with pytest.raises(BrokenSnapshotError, match=reason):
        _import(other, path)
    assert other.ls() == []
    assert [p for p in (other.directory / "parts").rglob("*") if p.is_file()] == []


def test_a_repacked_file_that_was_not_changed_is_accepted(
    exported: tuple[Manifest, Path], other: SnapshotStore
) -> None:
    manifest, path = exported
    _repack(path, lambda members: members)
    assert _import(other, path) == manifest
