"""The store against a model: whatever is published, pinned and removed, through which process, and who is killed in it,
the files are those that are needed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.snapshots.small_snapshots import kill_while, publish
from vm_runtime.snapshots.errors import SnapshotInUseError, UnknownSnapshotError
from vm_runtime.snapshots.manifest import Manifest, PartKind
from vm_runtime.snapshots.store import Pin, SnapshotStore

SANDBOXES = st.sampled_from(["one", "two"])
USERS = st.sampled_from(["sandbox-a", "sandbox-b", "machine-c"])
NUMBERS = st.lists(st.integers(1, 6), max_size=4, unique=True).map(sorted)
STORES = st.integers(0, 1)
Key = tuple[PartKind, str]


class Model(RuleBasedStateMachine):
    """Two open stores on one directory, as of two processes, and a third process that is killed now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.stores = [SnapshotStore(self.directory), SnapshotStore(self.directory)]
        self.manifests: dict[str, Manifest] = {}
        self.pins: dict[str, Pin] = {}
        self.number = 0
        self.tidy = True

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        shutil.rmtree(self.directory)

    @initialize()
    def begin(self) -> None:
        self.publish(0, "one", 1, [], [])

    # What is done

    @rule(which=STORES, sandbox_id=SANDBOXES, base=st.integers(1, 2), layers=NUMBERS, disks=NUMBERS)
    def publish(self, which: int, sandbox_id: str, base: int, layers: list[int], disks: list[int]) -> None:
        self.number += 1
        manifest = publish(
            self.stores[which], self.number, sandbox_id=sandbox_id, base=base, layers=layers, disks=disks
        )
        self.manifests[manifest.id] = manifest

    @rule(which=STORES, data=st.data(), layers=NUMBERS)
    def flatten(self, which: int, data: st.DataObject, layers: list[int]) -> None:
        origin = self.draw_snapshot(data)
        self.number += 1
        values: dict[str, Any] = {"base": 3, "layers": layers, "flattened_from": origin}
        if origin not in self.manifests:
            try:
                publish(self.stores[which], self.number, **values)
            except UnknownSnapshotError:
                return
            raise AssertionError("a flattened form of nothing was published")
        manifest = publish(self.stores[which], self.number, sandbox_id=self.manifests[origin].sandbox_id, **values)
        self.manifests[manifest.id] = manifest

    @rule(which=STORES, data=st.data(), user=USERS)
    def pin(self, which: int, data: st.DataObject, user: str) -> None:
        pin = self.draw_pin(data)
        try:
            self.stores[which].pin(user, pin)
        except UnknownSnapshotError:
            assert not self.manifests.keys() >= set(pin.snapshots)
        else:
            assert self.manifests.keys() >= set(pin.snapshots)
            self.pins[user] = pin

    @rule(which=STORES, user=USERS)
    def unpin(self, which: int, user: str) -> None:
        self.stores[which].unpin(user)
        self.pins.pop(user, None)

    @rule(which=STORES, data=st.data())
    def rm(self, which: int, data: st.DataObject) -> None:
        id_ = self.draw_snapshot(data)
        try:
            self.stores[which].rm(id_)
        except UnknownSnapshotError:
            assert id_ not in self.manifests
        except SnapshotInUseError:
            assert self.is_pinned(id_)
        else:
            assert id_ in self.manifests and not self.is_pinned(id_)
            self.removed([id_])

    @rule(which=STORES, data=st.data())
    def rm_many(self, which: int, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.manifests) or ["0" * 32]), max_size=8))
        self.stores[which].rm_many(ids)
        self.removed([id_ for id_ in ids if not self.is_pinned(id_)])

    @rule(which=STORES)
    def gc(self, which: int) -> None:
        self.stores[which].gc()
        self.tidy = True

    @rule(which=STORES)
    def reopen(self, which: int) -> None:
        self.stores[which].close()
        self.stores[which] = SnapshotStore(self.directory)
        self.stores[which].gc()  # as each start does: what was unpinned is known to who unpinned it only
        self.tidy = True

    @rule(
        step=st.integers(0, 25), operation=st.sampled_from(["publish", "pin", "unpin", "rm_many", "gc"]), data=st.data()
    )
    def kill(self, step: int, operation: str, data: st.DataObject) -> None:
        """Another process is killed, before or after any change of a file."""
        arguments: tuple[Any, ...] = ()
        values: dict[str, Any] = {}
        may_go: set[str] = set()
        if operation == "publish":
            self.number += 1
            arguments = (self.number,)
            values = {"layers": data.draw(NUMBERS), "disks": data.draw(NUMBERS)}
        elif operation == "pin":
            pin = self.draw_pin(data, known=True)
            arguments = (data.draw(USERS), pin.model_dump())
        elif operation == "unpin":
            arguments = (data.draw(USERS),)
        elif operation == "rm_many":
            ids = data.draw(st.lists(st.sampled_from(sorted(self.manifests) or ["0" * 32]), max_size=8))
            free = {id_ for id_ in ids if not self.is_pinned(id_)}
            may_go = {id_ for id_ in self.manifests if {id_, self.origin(id_)} & free}
            arguments = (ids,)
        kill_while(self.directory, step, operation, *arguments, **values)
        store = self.stores[0]
        found = {id_: store.get(id_) for id_ in store.ids()}
        assert set(found) >= set(self.manifests) - may_go
        assert len(set(found) - set(self.manifests)) <= (operation == "publish")
        assert not [id_ for id_ in found if self.origin(id_, found) not in found], "a flattened form of nothing"
        changed = {
            user for user in found_pins(store) | self.pins.keys() if store.pins().get(user) != self.pins.get(user)
        }
        assert changed <= ({arguments[0]} if operation in ("pin", "unpin") else set())
        self.manifests, self.pins, self.tidy = found, store.pins(), False

    # What must be so

    @invariant()
    def everything_is_whole(self) -> None:
        store = self.stores[0]
        assert store.ids() == set(self.manifests)
        assert {id_: store.verify(id_) for id_ in self.manifests} == {id_: [] for id_ in self.manifests}
        assert store.pins() == self.pins

    @precondition(lambda self: self.tidy)
    @invariant()
    def what_is_there_is_needed(self) -> None:
        for store in self.stores:
            store.rm_many([])
            listed = {id_ for id_, manifest in self.manifests.items() if manifest.flattened_from is None}
            assert {entry.id for entry in store.ls()} == listed
            for id_ in listed:
                flattened = store.flattened(id_)
                assert (flattened is None) == all(each.flattened_from != id_ for each in self.manifests.values())
        on_disk = {(kind, path.name) for kind in PartKind for path in (self.directory / "parts" / kind).iterdir()}
        assert on_disk == {key for key in self.needed(self.manifests) if self.path(key).exists()}
        assert not list((self.directory / "drafts").iterdir())

    @precondition(lambda self: self.tidy)
    @rule(data=st.data())
    def what_removal_frees(self, data: st.DataObject) -> None:
        listed = sorted(id_ for id_, manifest in self.manifests.items() if manifest.flattened_from is None)
        ids = data.draw(st.permutations(listed))[: data.draw(st.integers(0, len(listed)))]
        freed = self.stores[0].index.freed_bytes(ids)
        for count in range(len(ids)):
            gone = {id_ for id_ in ids[: count + 1] if not self.is_pinned(id_)}
            left = [id_ for id_ in self.manifests if self.origin(id_) not in gone]
            lost = self.needed(self.manifests) - self.needed(left)
            assert freed[count] == sum(self.path(key).stat().st_blocks * 512 for key in lost)

    # The model

    def origin(self, id_: str, manifests: dict[str, Manifest] | None = None) -> str:
        return (manifests or self.manifests)[id_].flattened_from or id_

    def is_pinned(self, id_: str) -> bool:
        return any(id_ in pin.snapshots for pin in self.pins.values())

    def removed(self, ids: Iterable[str]) -> None:
        for id_ in [each for each in self.manifests if each in ids or self.origin(each) in ids]:
            del self.manifests[id_]

    def needed(self, ids: Iterable[str]) -> set[Key]:
        keys = {(kind, part.digest) for id_ in ids for kind, part in self.manifests[id_].parts()}
        return keys.union(*(pin.parts() for pin in self.pins.values()))

    def path(self, key: Key) -> Path:
        return self.stores[0].part_path(*key)

    def draw_snapshot(self, data: st.DataObject) -> str:
        """The id of one that is there, or of none."""
        originals = [id_ for id_, manifest in self.manifests.items() if manifest.flattened_from is None]
        return data.draw(st.sampled_from([*sorted(originals), "f" * 32]))

    def draw_pin(self, data: st.DataObject, *, known: bool = False) -> Pin:
        """Some snapshots, and the parts of one that is there."""
        ids = sorted(id_ for id_, manifest in self.manifests.items() if manifest.flattened_from is None)
        choice = ids if known else [*ids, "f" * 32]
        snapshots = data.draw(st.lists(st.sampled_from(choice), max_size=2)) if choice else []
        parts: list[Key] = []
        for id_ in data.draw(st.lists(st.sampled_from(ids), max_size=1)) if ids else ():
            parts = [(kind, part.digest) for kind, part in self.manifests[id_].parts()]
        by_kind = {f"{kind}s": tuple(digest for each, digest in parts if each == kind) for kind in PartKind}
        return Pin(snapshots=tuple(dict.fromkeys(snapshots)), **by_kind)


def found_pins(store: SnapshotStore) -> set[str]:
    return set(store.pins())


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=30, stateful_step_count=25, deadline=None, phases=[Phase.generate])
