"""The store: complete or invisible, nothing needed is removed, nothing broken is used, a full disk harms nobody."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.unit.snapshots.small_snapshots import PAGES, kill_while, publish
from vm_runtime.snapshots import index
from vm_runtime.snapshots.errors import (
    BrokenSnapshotError,
    SnapshotInUseError,
    SnapshotRequestError,
    StoreFullError,
    StoreIndexError,
    UnknownSnapshotError,
)
from vm_runtime.snapshots.index import SCHEMA, SCHEMA_VERSION
from vm_runtime.snapshots.layers import Layer
from vm_runtime.snapshots.manifest import Manifest, PartKind, SnapshotContents
from vm_runtime.snapshots.store import Collected, Pin, SnapshotStore

SIZE_BYTES = 8 << 20

Fill = Callable[..., SnapshotContents]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SnapshotStore]:
    with SnapshotStore(tmp_path / "store") as store:
        yield store


def _publish(store: SnapshotStore, fill: Fill, **values: object) -> Manifest:
    with store.begin() as draft:
        return draft.publish(fill(draft, **values))


def _listed(store: SnapshotStore) -> list[str]:
    return [entry.id for entry in store.ls()]


def _files(store: SnapshotStore) -> set[str]:
    """Everything but the index and the lock."""
    names = {str(path.relative_to(store.directory)) for path in store.directory.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith(("index.sqlite", "lock"))}


def test_a_published_snapshot_can_be_found_and_is_whole(store: SnapshotStore, fill: Fill) -> None:
    manifest = _publish(store, fill, name="one")
    assert _listed(store) == [manifest.id] == [entry.id for entry in store.ls(name="one", owner="local")]
    assert store.ls(name="two") == []
    assert store.get(manifest.id) == manifest
    assert store.resolve(manifest.id[:8]) == store.resolve("one") == manifest.id
    assert _device(store, manifest) == b"device"
    assert store.verify(manifest.id) == []


def test_equal_parts_are_stored_once(store: SnapshotStore, fill: Fill) -> None:
    one, two = _publish(store, fill, device=b"1"), _publish(store, fill, device=b"2")
    assert one.id != two.id
    assert len(list((store.directory / "parts" / "base").iterdir())) == 1


def test_an_aborted_draft_leaves_nothing(store: SnapshotStore, fill: Fill) -> None:
    before = _files(store)
    with pytest.raises(ZeroDivisionError), store.begin() as draft:
        fill(draft)
        raise ZeroDivisionError
    with store.begin() as draft:
        fill(draft)
    assert _files(store) == before
    assert store.ls() == []


def test_a_draft_without_one_of_its_parts_is_not_published(store: SnapshotStore, fill: Fill, tmp_path: Path) -> None:
    with SnapshotStore(tmp_path / "other") as other, other.begin() as foreign:
        contents = fill(foreign)
    with pytest.raises(BrokenSnapshotError, match="missing"), store.begin() as draft:
        draft.publish(contents)
    assert _files(store) == set()


def test_a_lost_or_damaged_index_is_made_again(store: SnapshotStore, fill: Fill) -> None:
    manifest = _publish(store, fill)
    store.close()
    index = store.directory / "index.sqlite"
    for damage in (index.unlink, lambda: index.write_bytes(b"nonsense" * 1000)):
        damage()
        with SnapshotStore(store.directory) as opened:
            assert _listed(opened) == [manifest.id]


def test_a_store_of_an_older_version_keeps_all_it_has(tmp_path: Path) -> None:
    """golden/store-2: three snapshots, a flattened form of the last, a pin of a sandbox and one of a machine, all
    written by the version whose index had version 2."""
    directory = shutil.copytree(Path(__file__).parent / "golden" / "store-2", tmp_path / "store")
    before = {path.relative_to(directory) for path in directory.rglob("*") if path.is_file()}
    for _ in range(2):
        with SnapshotStore(directory) as store:
            assert store.gc() == Collected(parts=0, drafts=0, freed_bytes=0)
            one, two, three = store.ls()
            assert [entry.execution_count for entry in (one, two, three)] == [1, 2, 3]
            assert (two.name, three.parent, three.layers) == ("named", two.id, 2)
            assert one.added_bytes > two.added_bytes > 0
            flattened = store.flattened(three.id)
            assert flattened is not None
            assert [store.verify(id_) for id_ in (one.id, two.id, three.id, flattened.id)] == [[]] * 4
            with pytest.raises(SnapshotInUseError, match="8c1e9d1e"):
                store.rm(three.id)
            assert {path.relative_to(directory) for path in directory.rglob("*") if path.is_file()} >= before
    with SnapshotStore(directory) as store:
        for user in store.pin_users():
            store.unpin(user)
        assert store.rm_many([one.id, two.id, three.id]).parts == 8
        assert _files(store) == set()


def test_the_index_has_the_tables_of_its_version() -> None:
    """Others need another version, so that an older index is made again."""
    golden = Path(__file__).parent / "golden" / f"index-{SCHEMA_VERSION}.sql"
    assert golden.read_text() == SCHEMA


def test_an_index_that_names_a_removed_snapshot_is_corrected(store: SnapshotStore, fill: Fill) -> None:
    store.manifest_path(_publish(store, fill).id).unlink()
    with SnapshotStore(store.directory) as opened:
        assert opened.ls() == []


def test_what_a_sandbox_needs_is_not_removed(store: SnapshotStore, fill: Fill) -> None:
    manifest = _publish(store, fill)
    store.pin("sandbox-1", Pin(snapshots=(manifest.id,)))
    with pytest.raises(SnapshotInUseError, match="sandbox-1"):
        store.rm(manifest.id)
    store.unpin("sandbox-1")
    assert store.rm(manifest.id).parts == 3
    assert _files(store) == set()
    with pytest.raises(UnknownSnapshotError):
        store.get(manifest.id)


def test_parts_that_another_snapshot_or_a_live_machine_needs_stay(store: SnapshotStore, fill: Fill) -> None:
    one, two = _publish(store, fill, device=b"1"), _publish(store, fill, device=b"2")
    store.rm(one.id)
    assert store.verify(two.id) == []
    store.pin("machine", Pin(bases=(two.state.of_kind(PartKind.BASE)[0].digest,)))
    store.rm(two.id)
    assert _files(store) == {"pins/machine.json", f"parts/base/{two.state.of_kind(PartKind.BASE)[0].digest}"}


def test_what_a_snapshot_brings_and_what_removing_it_frees(store: SnapshotStore) -> None:
    """Memory, device state and disks count once, to who brought them, and are freed with the last who needs them."""
    page, base = 4096, PAGES
    one = publish(store, 1, layers=[1], disks=[3])  # base, layer (table, page), device, disk (header, page)
    two = publish(store, 2, layers=[1, 2], disks=[3, 5])  # layer, device, disk (header, three pages)
    flat = publish(store, 2, base=9, disks=[3], flattened_from=two.id)  # a base
    three = publish(store, 3, base=9, disks=[3], sandbox_id="child")  # device only
    assert [entry.added_bytes // page for entry in store.ls()] == [base + 2 + 1 + 2, 2 + 1 + 4, 1]
    assert store.entry(three.id) == store.ls()[-1]
    alone = store.index.freed_bytes([two.id, one.id])
    assert [freed // page for freed in alone] == [2 + 1 + 4, 2 + 1 + 4 + base + 2 + 1]
    assert store.index.freed_bytes([three.id, two.id])[1] // page == 1 + base + 2 + 1 + 4
    parts = [*flat.state.parts[:1], *two.state.parts[-1:]]  # a base and the disk of three pages
    store.pin("machine-1", Pin.of_parts(parts))
    assert store.index.freed_bytes([three.id, two.id])[1] // page == 1 + 2 + 1
    store.pin("sandbox-1", Pin(snapshots=(two.id,)))
    assert store.index.freed_bytes([two.id]) == [0]
    store.unpin("sandbox-1")
    assert store.rm(two.id).freed_bytes // page == 2 + 1
    assert store.index.sandboxes_since(0)[0] == {"one", "child"}
    assert store.index.sandboxes_since(store.index.sandboxes_since(0)[1])[0] == set()


def test_a_pin_needs_a_name_and_something_that_exists(store: SnapshotStore) -> None:
    with pytest.raises(SnapshotRequestError):
        store.pin("../escape", Pin())
    with pytest.raises(UnknownSnapshotError):
        store.pin("sandbox-1", Pin(snapshots=("0" * 32,)))


def test_removal_waits_for_no_draft_and_leaves_it_alone(store: SnapshotStore, fill: Fill) -> None:
    old = _publish(store, fill, device=b"old")
    rubbish = store.directory / "drafts" / "left-by-a-crash"
    rubbish.mkdir()
    (rubbish / "base").write_bytes(bytes(100))
    (store.directory / "parts" / "layer" / ("f" * 64)).write_bytes(bytes(100))
    with SnapshotStore(store.directory) as other, store.begin() as draft, other.begin() as second:
        contents, others = fill(draft), fill(second, device=b"other")
        assert store.gc().parts == 1
        assert not rubbish.exists()
        assert other.rm(old.id).parts == 3, "the draft has copies of its own"
        manifest, another = draft.publish(contents), second.publish(others)
    assert store.verify(manifest.id) == store.verify(another.id) == []
    store.rm_many([manifest.id, another.id])
    assert _files(store) == set()


def test_what_a_killed_process_left_goes_with_the_next_removal(store: SnapshotStore, fill: Fill) -> None:
    manifest = _publish(store, fill)
    for step in range(40):
        if not kill_while(store.directory, step, "publish", step, layers=[step]):
            break
        store.rm_many([])
        assert not list((store.directory / "drafts").iterdir())
        assert [id_ for id_ in store.ids() if store.verify(id_)] == []
    assert step > 8, "it was killed at each of its steps"
    store.rm_many([entry.id for entry in store.ls()])
    assert _files(store) == set()
    with pytest.raises(UnknownSnapshotError):
        store.get(manifest.id)


def test_snapshots_are_taken_and_removed_by_several_at_once(store: SnapshotStore) -> None:
    """Each thread's snapshots have the parts of the others', and are whole as long as they are there."""

    def work(which: SnapshotStore, worker: int) -> None:
        for number in range(12):
            manifest = publish(
                which, worker * 100 + number, sandbox_id=str(worker), layers=[number % 3], disks=[number % 2]
            )
            assert which.verify(manifest.id) == []
            which.pin(f"sandbox-{worker}", Pin(snapshots=(manifest.id,)))
            which.rm_many([entry.id for entry in which.ls(sandbox_id=str(worker))])
            assert which.verify(manifest.id) == []
        which.unpin(f"sandbox-{worker}")

    with SnapshotStore(store.directory) as other, ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, (store, other)[worker % 2], worker) for worker in range(6)]:
            done.result()
        for each in (store, other):
            each.rm_many([entry.id for entry in each.ls()])
    assert _files(store) == set()


def test_collection_removes_what_a_killed_writer_left(store: SnapshotStore, fill: Fill) -> None:
    with store.begin() as draft:
        manifest = draft.publish(fill(draft))
    store.pin("sandbox-1", Pin(snapshots=(manifest.id,)))
    left = [store.directory / "manifests" / f".{manifest.id}.json.0011aabb", store.directory / "pins/.x.json.0011aabb"]
    young = store.directory / "pins" / ".sandbox-2.json.22ccdd33"
    for path in (*left, young):
        path.write_text("{")
    for path in left:
        os.utime(path, (0, 0))
    store.gc()
    assert young.exists(), "it might be being written just now"
    assert not [path for path in left if path.exists()]
    assert store.get(manifest.id) == manifest
    assert list(store.pins()) == ["sandbox-1"]


def test_a_manifest_that_was_damaged_keeps_its_parts_and_hinders_no_removal(store: SnapshotStore, fill: Fill) -> None:
    manifest, other = _publish(store, fill), _publish(store, fill, device=b"other")
    path = store.manifest_path(manifest.id)
    path.write_bytes(path.read_bytes().replace(b"local", b"other"))
    assert store.gc().parts == 0
    assert store.rm(other.id).parts == 1
    assert _device(store, manifest) == b"device"
    assert "was changed" in store.verify(manifest.id)[0]
    assert store.rm(manifest.id).parts == 3


@pytest.mark.parametrize("what", ["manifest", "pin"])
def test_no_part_is_removed_while_nobody_knows_what_is_needed(store: SnapshotStore, fill: Fill, what: str) -> None:
    """The index was lost, and a manifest or pin cannot be read."""
    manifest, other = _publish(store, fill), _publish(store, fill, device=b"other")
    store.pin("sandbox-1", Pin(snapshots=(manifest.id,)))
    store.close()
    (store.directory / "index.sqlite").unlink()
    path = store.manifest_path(manifest.id) if what == "manifest" else store.directory / "pins" / "sandbox-1.json"
    path.write_bytes(path.read_bytes()[:-1])
    with SnapshotStore(store.directory) as store:
        with pytest.raises(BrokenSnapshotError, match="cannot be read"):
            store.gc()
        if what == "pin":
            with pytest.raises(BrokenSnapshotError, match="cannot be read"):
                store.rm(other.id)
            path.unlink()
            assert store.rm(other.id).parts == 1
        else:
            assert store.rm(other.id).parts == 0
            store.unpin("sandbox-1")
            assert store.rm(manifest.id).parts == 4
            assert _files(store) == set()


@pytest.mark.parametrize("kind", [PartKind.BASE, PartKind.DEVICE, PartKind.DISK])
@pytest.mark.parametrize("damage", ["missing", "truncated", "tampered"])
def test_a_damaged_part_is_found(store: SnapshotStore, fill: Fill, kind: PartKind, damage: str) -> None:
    manifest = _publish(store, fill)
    path = next((store.directory / "parts" / kind).iterdir())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        with path.open("r+b") as file:
            file.write(b"?")
    (problem,) = store.verify(manifest.id)
    assert kind in problem
    if kind is PartKind.DEVICE:
        with pytest.raises(BrokenSnapshotError):
            _device(store, manifest)


@pytest.mark.parametrize("reference", ["", "..", "../../etc/passwd", "0" * 32, "*"])
def test_a_reference_to_nothing_is_unknown(store: SnapshotStore, reference: str) -> None:
    for look in (store.get, store.resolve, store.rm, store.verify):
        with pytest.raises(UnknownSnapshotError):
            look(reference)


def _opened(store: SnapshotStore, manifest: Manifest) -> list[Layer]:
    layers = store.open_layers(manifest.state.of_kind(PartKind.LAYER), memory_bytes=SIZE_BYTES)
    for layer in layers:
        layer.close()
    return layers


@pytest.fixture
def small_store(tmp_path: Path) -> Iterator[SnapshotStore]:
    """A store on a real file system of one MiB."""
    with _tmpfs(tmp_path, mib=1) as directory, SnapshotStore(directory) as store:
        yield store


@contextlib.contextmanager
def _tmpfs(tmp_path: Path, *, mib: int) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small tmpfs")
    directory = tmp_path / "small"
    directory.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(directory), b"tmpfs", 0, f"size={mib}m".encode()):
        pytest.skip(f"needs to mount a small tmpfs: {os.strerror(ctypes.get_errno())}")
    try:
        yield directory
    finally:
        libc.umount2(os.fsencode(directory), 0)


def test_a_full_disk_fails_the_snapshot_and_nothing_else(small_store: SnapshotStore, fill: Fill) -> None:
    kept = _publish(small_store, lambda draft: _small(fill, draft, b"kept"))
    before = _files(small_store)
    with pytest.raises(StoreFullError, match="No room"), small_store.begin() as draft:
        draft.add_bytes(PartKind.DEVICE, bytes(2 << 20))
    assert _files(small_store) == before
    for free_kib in range(0, 64, 4):
        _fill_up(small_store.directory / "ballast", free_kib=free_kib)
        try:
            added = _publish(small_store, lambda draft: _small(fill, draft, b"x" * 9000))
        except StoreFullError:
            assert _files(small_store) == before | {"ballast"}
        else:
            assert small_store.verify(added.id) == []
            small_store.rm(added.id)
        (small_store.directory / "ballast").unlink()
    assert small_store.verify(kept.id) == []
    assert _listed(small_store) == [kept.id]


def _small(fill: Fill, draft: object, device: bytes) -> SnapshotContents:
    return fill(draft, device=device)


def _fill_up(path: Path, *, free_kib: int) -> None:
    status = os.statvfs(path.parent)
    with path.open("wb") as file:
        file.write(bytes(max(0, status.f_bavail * status.f_frsize - free_kib * 1024)))


def test_snapshots_can_be_removed_from_a_full_disk(tmp_path: Path) -> None:
    """SQLite's log has room reserved, so that the index does not hinder who makes room."""
    with _tmpfs(tmp_path, mib=16) as directory:
        with SnapshotStore(directory) as store:
            ids = [publish(store, number, layers=[number], disks=[number]).id for number in range(100)]
            store.pin("sandbox-1", Pin(snapshots=(ids[0],)))
        with SnapshotStore(directory) as store:
            _fill_up(directory / "ballast", free_kib=0)
            with pytest.raises(StoreFullError):
                publish(store, 100, layers=[100])
            assert len(store.ls()) == 100
            store.unpin("sandbox-1")
            assert store.rm_many(ids).parts == 1 + 3 * 100
            (directory / "ballast").unlink()
            assert _files(store) == set()


def test_an_index_with_bad_pages_is_made_again(store: SnapshotStore) -> None:
    ids = [publish(store, number, layers=[number]).id for number in range(40)]
    store.close()
    path = store.directory / "index.sqlite"
    with path.open("r+b") as file:
        half = file.seek(path.stat().st_size // 2 // 4096 * 4096)
        file.write(b"?" * half)
    with SnapshotStore(store.directory) as opened:
        assert _listed(opened) == ids
        assert opened.rm_many(ids).parts == 81


def test_an_index_that_others_use_is_not_made_again(store: SnapshotStore) -> None:
    """They would go on with the old one, and each would remove what only the other knows of."""
    (store.directory / "index.sqlite").unlink()
    with pytest.raises(StoreIndexError, match="missing while another process"):
        SnapshotStore(store.directory)
    store.close()
    SnapshotStore(store.directory).close()


def test_nothing_is_half_made_where_the_index_cannot_be_written(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_BUSY_TIMEOUT_S", 0.01)
    with SnapshotStore(store.directory) as other:
        manifest = publish(other, 1)
        before = _files(store)
        with contextlib.closing(sqlite3.connect(store.directory / "index.sqlite")) as greedy, other.begin() as draft:
            contents = SnapshotContents.model_validate(manifest.model_dump(exclude={"id"}) | {"name": "new"})
            greedy.execute("BEGIN IMMEDIATE")
            for change in (
                lambda: draft.publish(contents),
                lambda: other.pin("sandbox-1", Pin(snapshots=(manifest.id,))),
                lambda: other.rm(manifest.id),
                other.gc,
            ):
                with pytest.raises(StoreIndexError, match="locked"):
                    change()
        assert _files(store) == before
        assert other.verify(manifest.id) == []


def _device(store: SnapshotStore, manifest: Manifest) -> bytes:
    (device,) = manifest.state.of_kind(PartKind.DEVICE)
    return store.checked_path(PartKind.DEVICE, device).read_bytes()
