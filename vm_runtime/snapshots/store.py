"""The store: a directory of immutable snapshots, each complete or invisible.

Knows files and digests; knows nothing of VMMs or of processes. Blocking file I/O: call it from a thread.

    STORE/manifests/<id>.json           the truth about which snapshots there are
          parts/<kind>/<digest>         base, layer, device, disk: shared by all snapshots that need them
          pins/<user>.json              what a live or sleeping sandbox needs, whoever runs or does not run
          drafts/<random>/              being made; whatever is here while nobody holds the lock is rubbish
          index.sqlite                  made again from the manifests when lost
          lock                          shared by drafts, exclusive for removal

A snapshot is published by renaming its parts into place, syncing, and then renaming its manifest. It lists all of its
parts, so removing one never harms another: parts go when the last manifest and the last pin that names them go.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from vm_runtime.snapshots.digests import FileIdentity, part_digest
from vm_runtime.snapshots.errors import (
    BrokenSnapshotError,
    SnapshotError,
    SnapshotInUseError,
    SnapshotRequestError,
    UnknownSnapshotError,
)
from vm_runtime.snapshots.index import Index
from vm_runtime.snapshots.layers import Layer
from vm_runtime.snapshots.manifest import (
    MAX_MANIFEST_BYTES,
    Digest,
    Manifest,
    MemoryParts,
    Part,
    PartKind,
    SnapshotContents,
    SnapshotId,
)
from vm_runtime.snapshots.memory import full_or_same

_USER_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
_SNAPSHOT_ID = re.compile(r"^[0-9a-f]{32}$")


class Pin(BaseModel):
    """What one user (a sandbox) needs: whole snapshots, and single parts (kind/digest) of a machine that runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    snapshots: tuple[SnapshotId, ...] = ()
    bases: tuple[Digest, ...] = ()
    layers: tuple[Digest, ...] = ()
    devices: tuple[Digest, ...] = ()
    disks: tuple[Digest, ...] = ()

    def parts(self) -> Iterator[tuple[PartKind, str]]:
        for kind, digests in zip(PartKind, (self.bases, self.layers, self.devices, self.disks), strict=True):
            yield from ((kind, digest) for digest in digests)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a collection removed."""

    parts: int
    drafts: int
    freed_bytes: int


class SnapshotStore:
    """One store directory, made if it is missing. Close it. Several processes may have the same one open."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("manifests", "pins", "drafts", *(f"parts/{kind}" for kind in PartKind)):
            (directory / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        self.index = Index(directory / "index.sqlite")
        try:
            self._reconcile()
        except BaseException:
            self.index.close()
            raise

    def close(self) -> None:
        self.index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Looking

    def get(self, snapshot_id: str) -> Manifest:
        """Raises UnknownSnapshotError, or BrokenSnapshotError if the manifest was tampered with."""
        if not _SNAPSHOT_ID.match(snapshot_id):
            raise UnknownSnapshotError(snapshot_id)
        try:
            with self.manifest_path(snapshot_id).open("rb") as file:
                manifest = Manifest.parse(file.read(MAX_MANIFEST_BYTES + 1))
        except FileNotFoundError as error:
            raise UnknownSnapshotError(snapshot_id) from error
        if manifest.id != snapshot_id:
            raise BrokenSnapshotError(f"The file of snapshot {snapshot_id} holds another one, {manifest.id}.")
        return manifest

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

    def ls(self, *, sandbox_id: str | None = None, owner: str | None = None, name: str | None = None) -> list[Manifest]:
        """The snapshots that match everything given, oldest first, from the index; flattened forms are left out."""
        return self.index.manifests(sandbox_id=sandbox_id, owner=owner, name=name)

    def flattened(self, snapshot_id: str) -> Manifest | None:
        """The shortest known form of the same state, if there is one. It is removed together with the snapshot."""
        return next(iter(self.index.flattened(snapshot_id)), None)

    def part_path(self, kind: PartKind, digest: str) -> Path:
        """Where a part lies, or would lie. Its content is only what its digest says if somebody checked that."""
        return self.directory / "parts" / kind / digest

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
            self._check_part(kind, part)
            self.index.note_checked([(kind, part.digest, identity)])
        return path

    def open_layers(self, memory: MemoryParts) -> list[Layer]:
        """Open and check the layers of a snapshot, lowest first; close each. Raises BrokenSnapshotError."""
        layers: list[Layer] = []
        try:
            for part in memory.layers:
                layers.append(Layer.open(self.checked_path(PartKind.LAYER, part), size_bytes=memory.size_bytes))
        except BaseException:
            for layer in layers:
                layer.close()
            raise
        return layers

    def read_device(self, manifest: Manifest) -> bytes:
        """The device state of a snapshot, checked. Raises BrokenSnapshotError."""
        return self.checked_path(PartKind.DEVICE, manifest.device).read_bytes()

    def verify(self, snapshot_id: str) -> list[str]:
        """Read and compare every part; answers what is wrong, as sentences. Raises UnknownSnapshotError."""
        try:
            manifest = self.get(snapshot_id)
        except BrokenSnapshotError as error:
            return [str(error)]
        problems: list[str] = []
        for kind, part in manifest.parts():
            try:
                self._check_part(kind, part)
                if kind is PartKind.LAYER:
                    path = self.part_path(kind, part.digest)
                    Layer.open(path, size_bytes=manifest.memory.size_bytes).close()
            except BrokenSnapshotError as error:
                problems.append(str(error))
        return problems

    # Making

    @contextlib.contextmanager
    def begin(self) -> Iterator[Draft]:
        """A snapshot in the making. Leaving without `publish` removes all of it; a full disk raises StoreFullError.

        Do not call `rm` or `gc` within: they wait until no draft is open.
        """
        directory = self.directory / "drafts" / secrets.token_hex(8)
        try:
            with self._locked(fcntl.LOCK_SH):
                try:
                    directory.mkdir(mode=0o700)
                    yield Draft(self, directory)
                finally:
                    shutil.rmtree(directory, ignore_errors=True)
        except BaseException as error:
            # Parts already in place when publishing failed; if others are at work, a later collection finds them.
            with contextlib.suppress(OSError, SnapshotError), self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB):
                self._collect()
            if isinstance(error, OSError):
                raise full_or_same(error, directory) from error
            raise

    # Keeping and removing

    def pin(self, user: str, pin: Pin, *, durable: bool = True) -> None:
        """Keep what a sandbox needs, until it is unpinned; replaces what this user had pinned. Survives restarts.

        durable: it must survive a power loss too; a running machine does not, so its pin need not wait for the disk.
        Raises UnknownSnapshotError, SnapshotRequestError (not a name), StoreFullError.
        """
        if not _USER_NAME.match(user):
            raise SnapshotRequestError(f"{user!r} cannot be the name of a pin.")
        with self._locked(fcntl.LOCK_SH):
            for snapshot_id in pin.snapshots:
                if not self.manifest_path(snapshot_id).exists():
                    raise UnknownSnapshotError(snapshot_id)
            path = self.directory / "pins" / f"{user}.json"
            _write_whole(path, pin.model_dump_json().encode(), synced=durable)

    def unpin(self, user: str) -> None:
        """Harmless if nothing is pinned."""
        (self.directory / "pins" / f"{user}.json").unlink(missing_ok=True)

    def pin_users(self) -> set[str]:
        """Who has pinned something, also where that cannot be read."""
        return {path.stem for path in (self.directory / "pins").glob("*.json") if _USER_NAME.match(path.stem)}

    def pins(self) -> dict[str, Pin]:
        """Who needs what. Raises BrokenSnapshotError if a pin cannot be read: nothing may be removed then."""
        pins: dict[str, Pin] = {}
        for path in sorted((self.directory / "pins").glob("*.json")):
            try:
                pins[path.stem] = Pin.model_validate_json(path.read_bytes())
            except FileNotFoundError:
                continue
            except ValidationError as error:
                raise BrokenSnapshotError(f"The pin {path} cannot be read; mend or remove it.") from error
        return pins

    def rm(self, snapshot_id: str) -> Collected:
        """Remove a snapshot, its flattened forms, and the parts that only they needed.

        Raises UnknownSnapshotError; SnapshotInUseError if a live or sleeping sandbox needs it, naming it.
        """
        with self._locked(fcntl.LOCK_EX):
            path = self.manifest_path(snapshot_id)
            if not _SNAPSHOT_ID.match(snapshot_id) or not path.exists():
                raise UnknownSnapshotError(snapshot_id)
            users = [f"sandbox {user}" for user, pin in self.pins().items() if snapshot_id in pin.snapshots]
            if users:
                raise SnapshotInUseError(snapshot_id, users=users)
            # The snapshot last: a flattened form without it would stay for ever.
            doomed = [*(flat.id for flat in self.index.flattened(snapshot_id)), snapshot_id]
            for id_ in doomed:
                self.manifest_path(id_).unlink(missing_ok=True)
            sync_directory(path.parent)
            self.index.remove(doomed)
            return self._collect()

    def gc(self) -> Collected:
        """Remove drafts that nobody works on, and parts that no manifest and no pin names. Waits for running drafts."""
        with self._locked(fcntl.LOCK_EX):
            return self._collect()

    # Inside

    def _collect(self) -> Collected:
        needed: set[tuple[PartKind, str]] = set()
        for pin in self.pins().values():
            needed.update(pin.parts())
        for snapshot_id in self.ids():
            # A manifest that cannot be read might need anything: nothing is collected until a person has looked.
            needed.update((kind, part.digest) for kind, part in self.get(snapshot_id).parts())
        removed: list[tuple[PartKind, str]] = []
        freed_bytes = 0
        for kind in PartKind:
            for path in (self.directory / "parts" / kind).iterdir():
                if (kind, path.name) not in needed:
                    freed_bytes += path.stat().st_blocks * 512
                    path.unlink()
                    removed.append((kind, path.name))
        self.index.forget_checked(removed)
        drafts = list((self.directory / "drafts").iterdir())
        for draft in drafts:
            shutil.rmtree(draft)
        # Whoever wrote one of these was killed: who writes holds the lock that excludes ours.
        for half_written in itertools.chain.from_iterable(
            (self.directory / name).glob(".*") for name in ("manifests", "pins")
        ):
            half_written.unlink()
        return Collected(parts=len(removed), drafts=len(drafts), freed_bytes=freed_bytes)

    def _reconcile(self) -> None:
        """Make the index say what the manifests say. Broken manifests stay out of it; `verify` names them."""
        on_disk, indexed = self.ids(), self.index.ids()
        missing: list[Manifest] = []
        for snapshot_id in on_disk - indexed:
            with contextlib.suppress(BrokenSnapshotError, UnknownSnapshotError):
                missing.append(self.get(snapshot_id))
        if missing:
            self.index.add(missing)
        if indexed - on_disk:
            self.index.remove(indexed - on_disk)

    def ids(self) -> set[str]:
        """The ids of all snapshots, also of those whose manifest turns out to be broken."""
        names = (path.stem for path in (self.directory / "manifests").glob("*.json"))
        return {name for name in names if _SNAPSHOT_ID.match(name)}

    def manifest_path(self, snapshot_id: str) -> Path:
        """Where the manifest of a snapshot lies, or would lie."""
        return self.directory / "manifests" / f"{snapshot_id}.json"

    def _check_part(self, kind: PartKind, part: Part) -> None:
        path = self.part_path(kind, part.digest)
        try:
            size_bytes = path.stat().st_size
        except FileNotFoundError as error:
            raise BrokenSnapshotError(f"The {kind} {part.digest} is missing.") from error
        if size_bytes != part.size_bytes:
            raise BrokenSnapshotError(f"The {kind} {part.digest} has {size_bytes} bytes instead of {part.size_bytes}.")
        if part_digest(kind, path) != part.digest:
            raise BrokenSnapshotError(f"The {kind} {part.digest} was changed: its content has another digest.")

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, how)
            yield
        finally:
            os.close(fd)


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
        if (kind, digest) in self._staged or self._store.part_path(kind, digest).exists():
            path.unlink()
        else:
            self._staged[kind, digest] = path, identity
        return Part(digest=digest, size_bytes=identity.size_bytes)

    def add_bytes(self, kind: PartKind, content: bytes) -> Part:
        """Take a small part, such as device state, from memory."""
        path = self.path(f"{kind}-{len(self._staged)}")
        _write_whole(path, content)
        return self.add(kind, path)

    def publish(self, contents: SnapshotContents) -> Manifest:
        """Make the snapshot visible. Every part it names must have been added, or be in the store.

        Raises BrokenSnapshotError if one is missing or has another size, StoreFullError; nothing is visible then.
        """
        manifest = Manifest.of(contents)
        for kind, part in manifest.parts():
            path, _ = self._staged.get((kind, part.digest), (self._store.part_path(kind, part.digest), None))
            if not path.exists() or path.stat().st_size != part.size_bytes:
                raise BrokenSnapshotError(f"The {kind} {part.digest} of the new snapshot is missing or incomplete.")
        placed: list[tuple[PartKind, str, FileIdentity]] = []
        target = self._store.manifest_path(manifest.id)
        written = self.path("manifest.json")
        _write_whole(written, manifest.to_json())
        try:
            for (kind, digest), (path, before) in self._staged.items():
                after = FileIdentity.of(kind, path.replace(self._store.part_path(kind, digest)))
                if (before.mtime_ns, before.size_bytes) == (after.mtime_ns, after.size_bytes):
                    placed.append((kind, digest, after))
            for kind in {kind for kind, _ in self._staged}:
                sync_directory(self._store.directory / "parts" / kind)
            written.replace(target)
            sync_directory(target.parent)
            self._store.index.add([manifest])
            self._store.index.note_checked(placed)
        except BaseException:
            # Parts without a manifest are invisible, and those another draft came to need meanwhile are not ours to
            # remove: a collection tells them apart.
            target.unlink(missing_ok=True)
            raise
        self._staged.clear()
        return manifest


def sync_directory(directory: Path) -> None:
    """Make renames and removals in a directory survive a power loss."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_whole(path: Path, content: bytes, *, synced: bool = True) -> None:
    """Write a small file so that it is there whole or not at all; synced: also after a power loss."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            if synced:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if synced:
            sync_directory(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise full_or_same(error, path) from error
        raise
