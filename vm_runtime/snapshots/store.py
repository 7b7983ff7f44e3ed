"""The store: a directory of immutable snapshots, each complete or invisible.

Knows files and digests; knows nothing of VMMs or of processes. Blocking file I/O: call it from a thread.

    STORE/manifests/<id>.json           the truth about which snapshots there are
          parts/<kind>/<digest>         base, layer, device, disk: shared by all snapshots that need them
          pins/<user>.json              what a live or sleeping sandbox needs, whoever runs or does not run
          drafts/<random>/              being made by whoever holds its lock; rubbish if nobody does
          index.sqlite                  who needs which part; made again from the files above when lost
          lock                          shared by all who have the store open, exclusive to make the index again

A snapshot is published by renaming its parts into place, syncing, and then renaming its manifest. It lists all of its
parts, so removing one never harms another: parts go when the last manifest and the last pin that names them go. The
index counts them, so a removal costs what it removes. Its transactions exclude each other, and none waits for a disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from vm_runtime.files import sync, try_lock
from vm_runtime.snapshots.digests import FileIdentity, part_digest
from vm_runtime.snapshots.directory import PartKey, StoreDirectory, write_new
from vm_runtime.snapshots.errors import (
    BrokenSnapshotError,
    SnapshotError,
    SnapshotInUseError,
    SnapshotRequestError,
    UnknownSnapshotError,
)
from vm_runtime.snapshots.index import Index, SnapshotEntry
from vm_runtime.snapshots.layers import Layer
from vm_runtime.snapshots.manifest import Digest, Manifest, Part, PartKind, SnapshotContents, SnapshotId, StatePart
from vm_runtime.snapshots.memory import full_or_same, removed_on_error

_T = TypeVar("_T")

# What is removed without letting go of the index: some milliseconds for others that wait, and as many open files.
_PORTION = 64


class Pin(BaseModel):
    """What one user (a sandbox) needs: whole snapshots, and single parts (kind/digest) of a machine that runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    snapshots: tuple[SnapshotId, ...] = ()
    bases: tuple[Digest, ...] = ()
    layers: tuple[Digest, ...] = ()
    devices: tuple[Digest, ...] = ()
    disks: tuple[Digest, ...] = ()
    files: tuple[Digest, ...] = ()

    @classmethod
    def of_parts(cls, parts: Iterable[StatePart]) -> Pin:
        """The pin of these single parts."""
        found: dict[str, list[str]] = {}
        for part in parts:
            found.setdefault(f"{part.kind}s", []).append(part.digest)
        return cls.model_validate(found)

    def parts(self) -> Iterator[PartKey]:
        for kind in PartKind:
            yield from ((kind, digest) for digest in getattr(self, f"{kind}s"))


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a removal or collection removed."""

    parts: int = 0
    drafts: int = 0
    freed_bytes: int = 0

    def __add__(self, other: Collected) -> Collected:
        return Collected(
            parts=self.parts + other.parts,
            drafts=self.drafts + other.drafts,
            freed_bytes=self.freed_bytes + other.freed_bytes,
        )


class SnapshotStore(StoreDirectory):
    """A store's directory with its index. Close it. Several processes may have the same one open.

    Every method that reads or changes the index raises StoreIndexError if that fails.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        # Parts that were pinned, and are not any more; the next removal looks whether anything needs them.
        self._released: set[PartKey] = set()
        self._unreadable: list[Path] = []
        with contextlib.ExitStack() as stack:
            stack.callback(super().close)
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, lock)
            sole = try_lock(lock)
            if not sole:
                fcntl.flock(lock, fcntl.LOCK_SH)
            self.index = Index(directory / "index.sqlite", sole=sole)
            stack.callback(self.index.close)
            with self.index.exclusive():
                self._reconcile()
            fcntl.flock(lock, fcntl.LOCK_SH)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Twice is harmless."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Looking

    def resolve(self, reference: str) -> str:
        """The id for an id, a unique beginning of one, or a name. Raises UnknownSnapshotError, SnapshotRequestError."""
        ids = self.ids()
        if reference in ids:
            return reference
        found = [id_ for id_ in ids if len(reference) >= 4 and id_.startswith(reference)]
        found = found or [manifest.id for manifest in self.ls(name=reference)]
        if not found:
            raise UnknownSnapshotError(reference)
        if len(found) > 1:
            raise SnapshotRequestError(f"{reference!r} means several snapshots: {', '.join(sorted(found))}.")
        return found[0]

    def ls(
        self, *, sandbox_id: str | None = None, owner: str | None = None, name: str | None = None
    ) -> list[SnapshotEntry]:
        """The snapshots that match everything given, oldest first, from the index; flattened forms are left out."""
        return self.index.entries(sandbox_id=sandbox_id, owner=owner, name=name)

    def entry(self, snapshot_id: str) -> SnapshotEntry:
        """What `ls` has of one snapshot. Raises UnknownSnapshotError."""
        for entry in self.index.entries(id=snapshot_id):
            return entry
        raise UnknownSnapshotError(snapshot_id)

    def flattened(self, snapshot_id: str) -> Manifest | None:
        """The shortest known form of the same state, if there is one. It is removed together with the snapshot."""
        for id_ in self.index.flattened(snapshot_id):
            with contextlib.suppress(BrokenSnapshotError, UnknownSnapshotError):  # the snapshot itself is as good
                return self.get(id_)
        return None

    def checked_path(self, kind: PartKind, part: Part) -> Path:
        """The path of a part whose content is what its digest says. Raises BrokenSnapshotError.

        It is read only when its file is not the one that was written or read here last (FileIdentity), so that using a
        large part again costs nothing. `verify` always reads.
        """
        path = self.part_path(kind, part.digest)
        try:
            identity = FileIdentity.of(kind, path)
        except FileNotFoundError as error:
            raise BrokenSnapshotError(f"The {kind} {part.digest} is missing.") from error
        if identity.size_bytes != part.size_bytes or self.index.checked(kind, part.digest) != identity:
            self.check_part(kind, part)
            self.index.note_checked(kind, part.digest, identity)
        return path

    def open_layers(self, parts: Iterable[Part], *, memory_bytes: int) -> list[Layer]:
        """Open and check layers of guest memory; close each. Raises BrokenSnapshotError."""
        layers: list[Layer] = []
        try:
            for part in parts:
                layers.append(Layer.open(self.checked_path(PartKind.LAYER, part), size_bytes=memory_bytes))
        except BaseException:
            for layer in layers:
                layer.close()
            raise
        return layers

    def verify(self, snapshot_id: str) -> list[str]:
        """Read and compare every part; answers what is wrong, as sentences. Raises UnknownSnapshotError."""
        try:
            manifest = self.get(snapshot_id)
        except BrokenSnapshotError as error:
            return [str(error)]
        problems: list[str] = []
        for kind, part in manifest.parts():
            try:
                self.check_part(kind, part)
                if kind is PartKind.LAYER:
                    path = self.part_path(kind, part.digest)
                    Layer.open(path, size_bytes=manifest.state.memory_bytes).close()
            except BrokenSnapshotError as error:
                problems.append(str(error))
        return problems

    # Making

    @contextlib.contextmanager
    def begin(self) -> Iterator[Draft]:
        """A snapshot in the making. Leaving without `publish` removes all of it; a full disk raises StoreFullError.

        It may stay open for long; nobody waits for it.
        """
        try:
            with contextlib.ExitStack() as stack:
                with self.index.exclusive():  # no collection meets it before it is locked
                    directory = self.open_draft(stack)
                yield Draft(self, directory)
        except OSError as error:
            raise full_or_same(error, self.directory) from error

    # Keeping and removing

    def pin(self, user: str, pin: Pin, *, durable: bool = True) -> None:
        """Keep what a sandbox needs, until it is unpinned; replaces what this user had pinned. Survives restarts.

        durable: it must survive a power loss too; a running machine does not, so its pin need not wait for the disk.
        Raises UnknownSnapshotError, SnapshotRequestError (not a name), StoreFullError.
        """
        path = self.pin_path(user)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with removed_on_error(temporary):
            write_new(temporary, pin.model_dump_json().encode(), synced=durable)
            with self.index.exclusive():
                for snapshot_id in pin.snapshots:
                    if not self.manifest_path(snapshot_id).exists():
                        raise UnknownSnapshotError(snapshot_id)
                self._released.update(self.index.pin(user, snapshots=pin.snapshots, parts=pin.parts()))
                temporary.replace(path)
            if durable:
                sync(path.parent)

    def unpin(self, user: str) -> None:
        """Harmless if nothing is pinned. What nobody needs any more goes with the next removal."""
        path = self.pin_path(user)
        with self.index.exclusive():
            path.unlink(missing_ok=True)
            self._released.update(self.index.pin(user))

    def pins(self) -> dict[str, Pin]:
        """Who needs what. Raises BrokenSnapshotError if a pin cannot be read."""
        pins: dict[str, Pin] = {}
        for user in sorted(self.pin_users()):
            with contextlib.suppress(FileNotFoundError):
                pins[user] = self.read_pin(user)
        return pins

    def read_pin(self, user: str) -> Pin:
        """Raises FileNotFoundError, BrokenSnapshotError."""
        path = self.pin_path(user)
        try:
            return Pin.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise BrokenSnapshotError(f"The pin {path} cannot be read; mend or remove it.") from error

    def rm(self, snapshot_id: str) -> Collected:
        """Remove a snapshot, its flattened forms, and the parts that only they needed.

        Raises UnknownSnapshotError; SnapshotInUseError if a live or sleeping sandbox needs it, naming it;
        BrokenSnapshotError if there is a pin that cannot be read, and so might name it.
        """
        return self._remove([snapshot_id], strict=True)

    def rm_many(self, ids: Sequence[str]) -> Collected:
        """Remove those of these snapshots that no sandbox needs, as `rm` does, faster than one after the other.

        Removes what was unpinned since the last removal, too, also if `ids` is empty. Raises BrokenSnapshotError.
        """
        return self._remove(ids, strict=False)

    def gc(self) -> Collected:
        """Look at all files: what a killed process left is removed, and the index is corrected. For every start.

        Removes drafts that nobody works on, and parts that no manifest and no pin names. Raises BrokenSnapshotError if
        there is a manifest or a pin that cannot be read, and so might name any part: no part is removed then.
        """
        with contextlib.ExitStack() as stack, self.index.exclusive():
            self._reconcile()
            dead = self.dead_drafts(stack)
            for path in dead:
                stack.callback(shutil.rmtree, path, ignore_errors=True)
            live = {_draft_user(path) for path in (self.directory / "drafts").iterdir() if path not in dead}
            for user in self.index.pins():
                if user.startswith(".") and user not in live:
                    self.index.pin(user)
            strays = self.part_keys() - self.index.needed()
        self.remove_half_written()
        for path in self._still_unreadable():
            raise BrokenSnapshotError(f"{path} cannot be read; mend or remove it. No part is removed until then.")
        return Collected(drafts=len(dead)) + self._drop(list(strays))

    # Inside

    def _remove(self, ids: Sequence[str], *, strict: bool) -> Collected:
        was_unreadable = self._still_unreadable()
        for path in was_unreadable:
            if path.parent.name == "pins":
                raise BrokenSnapshotError(f"The pin {path} cannot be read; mend or remove it.")
        candidates: list[PartKey] = []
        for some in _portions(ids):
            with self.unlinking() as unlink, self.index.exclusive():
                doomed: list[str] = []
                for id_ in some:
                    try:
                        self._check_removable(id_)
                    except SnapshotRequestError:
                        if strict:
                            raise
                    else:
                        # The snapshot last: a flattened form without it would stay for ever.
                        doomed += [*self.index.flattened(id_), id_]
                for id_ in doomed:
                    with contextlib.suppress(FileNotFoundError):
                        unlink(self.manifest_path(id_))
                candidates += self.index.remove(doomed)
        if ids:  # a manifest whose parts were removed must not come back after a power loss
            sync(self.directory / "manifests")
        with self.index.exclusive():
            candidates += self._released
            self._released.clear()
        collected = self._drop(list(dict.fromkeys(candidates)))
        with contextlib.ExitStack() as stack:
            has_dead = bool(self.dead_drafts(stack))
        if has_dead or (was_unreadable and not self._still_unreadable()):
            collected += self.gc()
        return collected

    def _check_removable(self, snapshot_id: str) -> None:
        if not self.manifest_path(snapshot_id).exists():
            raise UnknownSnapshotError(snapshot_id)
        users = [f"sandbox {user}" for user in self.index.users(snapshot_id) if self.pin_path(user).exists()]
        if users:
            raise SnapshotInUseError(snapshot_id, users=users)

    def _drop(self, candidates: Sequence[PartKey]) -> Collected:
        """Remove those of these parts that nothing needs."""
        count = freed_bytes = 0
        for some in _portions(candidates if not self._still_unreadable() else ()):
            with self.unlinking() as unlink, self.index.exclusive():
                for kind, digest in self.index.forget_unneeded(some):
                    with contextlib.suppress(FileNotFoundError):
                        freed_bytes += unlink(self.part_path(kind, digest))
                        count += 1
        return Collected(parts=count, freed_bytes=freed_bytes)

    def _reconcile(self) -> None:
        """Make the index agree with manifests and pins. Within `exclusive`.

        Files that cannot be read stay out of it, and what the index knows of them stays in it.
        """
        self._unreadable = []
        on_disk, indexed = self.ids(), self.index.ids()
        missing: list[Manifest] = []
        for snapshot_id in on_disk - indexed:
            try:
                missing.append(self.get(snapshot_id))
            except BrokenSnapshotError:
                self._unreadable.append(self.manifest_path(snapshot_id))
        for manifest in sorted(missing, key=lambda manifest: manifest.created_at):
            self.index.add(manifest, self.stored_bytes(manifest))
        self.index.remove(indexed - on_disk)
        known = self.index.pins()
        for user in self.pin_users():
            try:
                pin = self.read_pin(user)
            except BrokenSnapshotError:
                if user not in known:
                    self._unreadable.append(self.pin_path(user))
            else:
                if known.get(user, (set(), set())) != (set(pin.snapshots), set(pin.parts())):
                    self.index.pin(user, snapshots=pin.snapshots, parts=pin.parts())
            known.pop(user, None)
        for user in known:
            if not user.startswith("."):
                self.index.pin(user)

    def _still_unreadable(self) -> list[Path]:
        """Manifests and pins of which nobody knows what they need, for they cannot be read."""
        self._unreadable = [path for path in self._unreadable if path.exists()]
        return self._unreadable


class Draft:
    """A snapshot in the making; from `SnapshotStore.begin`."""

    def __init__(self, store: SnapshotStore, directory: Path) -> None:
        self._store = store
        self._directory = directory
        self._staged: dict[tuple[PartKind, str], tuple[Path, FileIdentity]] = {}

    def path(self, name: str) -> Path:
        """A path for a new file on the store's file system; it is removed with the draft."""
        return self._directory / name

    def add(self, kind: PartKind, path: Path, *, digest: str | None = None) -> Part:
        """Take a finished, synced file of this draft as a part. digest: if it is known already."""
        identity = FileIdentity.of(kind, path)  # of before the reading, so that a later change is seen
        digest = digest or part_digest(kind, path)
        self._staged.setdefault((kind, digest), (path, identity))
        return Part(digest=digest, size_bytes=identity.size_bytes)

    def add_bytes(self, kind: PartKind, content: bytes) -> Part:
        """Take a small part, such as device state, from memory."""
        path = self.path(f"{kind}-{len(self._staged)}")
        with removed_on_error(path):
            write_new(path, content, synced=True)
        return self.add(kind, path)

    def publish(self, contents: SnapshotContents) -> Manifest:
        """Make the snapshot visible. Every part it names must have been added, or be in the store.

        Raises BrokenSnapshotError if one is missing or has another size, UnknownSnapshotError if it is a flattened form
        of one that was removed, StoreFullError; nothing is visible then.
        """
        store = self._store
        manifest = Manifest.of(contents)
        written = self.path("manifest.json")
        write_new(written, manifest.to_json(), synced=True)
        target = store.manifest_path(manifest.id)
        with store.index.exclusive():
            existed = target.exists()
            placing = [(kind, part) for kind, part in manifest.parts() if not self._is_stored(kind, part)]
            # From here on no part that it needs goes, whoever is removed.
            keys = [(kind, part.digest) for kind, part in manifest.parts()]
            store.index.pin(_draft_user(self._directory), parts=keys)
        try:
            self._place(placing)
            with store.index.exclusive():
                origin = manifest.flattened_from
                if origin is not None and not store.manifest_path(origin).exists():
                    raise UnknownSnapshotError(origin)
                store.index.add(manifest, store.stored_bytes(manifest))
                store.index.pin(_draft_user(self._directory))
                written.replace(target)
            sync(target.parent)
        except BaseException:
            with contextlib.suppress(SnapshotError):  # what is left then is left to a collection
                self._take_back(manifest, existed=existed)
            raise
        self._staged.clear()
        return manifest

    def _is_stored(self, kind: PartKind, part: Part) -> bool:
        """Whether the store has a part; if not, it was added. Raises BrokenSnapshotError if neither."""
        path = self._store.part_path(kind, part.digest)
        if path.exists() and path.stat().st_size == part.size_bytes:
            return True
        _, identity = self._staged.get((kind, part.digest), (None, None))
        if identity is None or identity.size_bytes != part.size_bytes:
            raise BrokenSnapshotError(f"The {kind} {part.digest} of the new snapshot is missing or incomplete.")
        return False

    def _place(self, parts: Sequence[tuple[PartKind, Part]]) -> None:
        """Move added parts to where they belong."""
        for kind, part in parts:
            path, before = self._staged[kind, part.digest]
            after = FileIdentity.of(kind, path.replace(self._store.part_path(kind, part.digest)))
            if (before.mtime_ns, before.size_bytes) == (after.mtime_ns, after.size_bytes):
                self._store.index.note_checked(kind, part.digest, after)
        for kind in {kind for kind, _ in parts}:
            sync(self._store.directory / "parts" / kind)

    def _take_back(self, manifest: Manifest, *, existed: bool) -> None:
        """Undo an attempt to publish. Parts that another snapshot came to need meanwhile stay."""
        store = self._store
        with store.index.exclusive():
            if not existed:
                store.manifest_path(manifest.id).unlink(missing_ok=True)
                store.index.remove([manifest.id])
            store.index.pin(_draft_user(self._directory))
        store._drop([(kind, part.digest) for kind, part in manifest.parts()])


def _portions(whole: Sequence[_T]) -> Iterator[Sequence[_T]]:
    return (whole[first : first + _PORTION] for first in range(0, len(whole), _PORTION))


def _draft_user(directory: Path) -> str:
    """Under which name the index keeps what a draft needs; no pin has such a one."""
    return f".{directory.name}"
