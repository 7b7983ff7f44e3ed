"""How gVisor's machines are kept: all of a machine's state each time, of which the pages are stored once (pages.py).

A state's parts: `state` (gVisor's own objects, zstd), `places` (which page belongs where), `index`, and the files of
pages, `pages`, those of earlier states first. Nothing is done in the background, and a machine uses no file of the
store once it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Protocol

import zstandard

from vm_runtime.drivers.base import Capture, FlatteningStatus, MachinePlace, OpenState, Shell, States
from vm_runtime.drivers.gvisor.machine import GvisorMachine
from vm_runtime.drivers.gvisor.pages import NOTHING, joined, known_pages, split
from vm_runtime.errors import DriverError, MachineError, MachineStartError
from vm_runtime.machine import Machine
from vm_runtime.snapshots.errors import BrokenSnapshotError
from vm_runtime.snapshots.manifest import Manifest, PartKind, State, StatePart
from vm_runtime.snapshots.store import Draft, SnapshotStore
from vm_runtime.spec import MachineSpec

STATE_FORMAT = "gvisor-whole-1"
# A guest with a million files has some hundred MiB; it bounds what a foreign state can unfold to.
MAX_STATE_BYTES = 4 << 30
_STATE, _PLACES, _INDEX, _PAGES = "state", "places", "index", "pages"

# Opens what gVisor takes: its own objects, which page belongs where, and all pages. Each call gives descriptors with a
# position of their own, since a restore reads them.
OpenFiles = Callable[[], list[int]]


class Sandboxes(Protocol):
    """What is needed of the driver."""

    @property
    def needs(self) -> Mapping[str, str]: ...

    async def create(self, spec: MachineSpec, *, place: MachinePlace) -> GvisorMachine:
        """A sandbox without state (STARTING). Errors: MachineStartError, DriverError."""
        ...

    async def keep(self, machine: GvisorMachine) -> None:
        """It runs: let it outlive this process."""
        ...


class GvisorStates(States):
    """See `States`."""

    def __init__(self, store: SnapshotStore, sandboxes: Sandboxes, *, driver: str) -> None:
        self._store = store
        self._sandboxes = sandboxes
        self._driver = driver
        self._grounds: dict[Machine, State] = {}

    @asynccontextmanager
    async def opened(self, state: State) -> AsyncIterator[OpenState]:
        with ExitStack() as stack:
            paths = await asyncio.to_thread(self._paths, state, stack)
            yield _Opened(self._sandboxes, lambda: _open_all(paths), lambda machine: self._lie(machine, state))

    def _lie(self, machine: Machine, state: State) -> None:
        self._grounds[machine] = state

    def _paths(self, state: State, stack: ExitStack) -> list[Path]:
        found: dict[str | None, list[Path]] = {}
        for part in state.parts:
            found.setdefault(part.name, []).append(self._store.checked_path(part.kind, part))
        if set(found) - {_PAGES} != {_STATE, _PLACES, _INDEX}:
            raise BrokenSnapshotError("The state has other parts than this version knows.")
        pages = joined(found[_INDEX][0], found.get(_PAGES, []))
        if pages is not None:
            stack.callback(os.close, pages)
        whole = found[_PAGES][0] if pages is None else Path(f"/proc/self/fd/{pages}")
        objects = _decompressed(found[_STATE][0])
        stack.callback(os.close, objects)
        return [Path(f"/proc/self/fd/{objects}"), found[_PLACES][0], whole]

    async def make_room(self, machine: Machine) -> None:
        """Nothing: there are no chains."""

    @asynccontextmanager
    async def capturing(self, machine: Machine, *, children: int, last: bool) -> AsyncIterator[Capture]:
        assert isinstance(machine, GvisorMachine)
        capture = GvisorCapture(self._sandboxes, machine, self._grounds, self._store, driver=self._driver)
        try:
            yield capture
        finally:
            capture.close()

    async def rest_on(self, machine: Machine, state: State) -> None:
        self._lie(machine, state)

    async def reopen(self, machine: Machine) -> None:
        """Nothing: it uses no files of the store."""

    def release(self, machine: Machine) -> None:
        self._grounds.pop(machine, None)

    def shorten(self, manifest: Manifest, state: State, *, stopped: bool) -> None:
        """Nothing: there are no chains."""

    def flattening(self) -> FlatteningStatus:
        return FlatteningStatus()

    def quiet(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    async def settled(self) -> None:
        """Nothing is done in the background."""

    async def close(self) -> None:
        self._grounds.clear()


class _Opened(OpenState):
    """on_loaded: called with each machine that was made of it."""

    def __init__(self, sandboxes: Sandboxes, files: OpenFiles, on_loaded: Callable[[Machine], None]) -> None:
        self._sandboxes = sandboxes
        self._files = files
        self._on_loaded = on_loaded

    async def shell(self, spec: MachineSpec, *, place: MachinePlace) -> Shell:
        machine = await self._sandboxes.create(spec, place=place)
        return GvisorShell(self._sandboxes, machine, self._files, self._on_loaded)


class GvisorCapture(_Opened, Capture):
    """Its files lie in memory until they are stored. grounds: what each machine lies on; none if it was booted.
    `close()` it."""

    def __init__(
        self,
        sandboxes: Sandboxes,
        machine: GvisorMachine,
        grounds: dict[Machine, State],
        store: SnapshotStore,
        *,
        driver: str,
    ) -> None:
        super().__init__(sandboxes, self._reopened, lambda machine: None)  # what it lies on is not stored yet
        self._machine = machine
        self._grounds = grounds
        self._store = store
        self._driver = driver
        self._taken: list[int] = []

    def _reopened(self) -> list[int]:
        return _open_all([Path(f"/proc/self/fd/{fd}") for fd in self._taken])

    async def prepare(self) -> None:
        """Nothing: gVisor cannot tell what has changed."""

    async def catch_up(self) -> None:
        """Nothing."""

    async def take(self) -> None:
        for name in (_STATE, _PLACES, _PAGES):
            self._taken.append(os.memfd_create(f"hypercell-{name}", os.MFD_CLOEXEC))
        await self._machine.save(self._taken)

    async def store(self, draft: Draft) -> State:
        parts = await asyncio.to_thread(self._parts, draft)
        return State(driver=self._driver, format=STATE_FORMAT, needs=dict(self._sandboxes.needs), parts=tuple(parts))

    def _parts(self, draft: Draft) -> list[StatePart]:
        def add(name: str) -> StatePart:
            part = draft.add(PartKind.FILE, draft.path(name))
            return StatePart(kind=PartKind.FILE, name=name, digest=part.digest, size_bytes=part.size_bytes)

        known, files = NOTHING, []
        # The last one that was stored: it may have been captured, and not stored yet, when this one was prepared.
        if (ground := self._grounds.get(self._machine)) is not None:
            files = [part for part in ground.parts if part.name == _PAGES]
            index = next(part for part in ground.parts if part.name == _INDEX)
            known = known_pages(self._store.checked_path(index.kind, index), files=len(files))
        with draft.path(_STATE).open("xb") as file:
            file.write(zstandard.ZstdCompressor(level=1).compress(os.pread(self._taken[0], _size(self._taken[0]), 0)))
            file.flush()
            os.fsync(file.fileno())
        _copy(self._taken[1], draft.path(_PLACES))
        found = split(self._taken[2], known, index=draft.path(_INDEX), new=draft.path(_PAGES))
        parts = [add(_STATE), add(_PLACES), add(_INDEX), *(files[number] for number in found.used)]
        return [*parts, add(_PAGES)] if found.new_pages else parts

    async def commit(self, state: State) -> None:
        self._grounds[self._machine] = state

    def close(self) -> None:
        """Twice is harmless."""
        for fd in self._taken:
            os.close(fd)
        self._taken.clear()


class GvisorShell(Shell):
    """A sandbox that has been created; it fits any state of its spec."""

    def __init__(
        self,
        sandboxes: Sandboxes,
        machine: GvisorMachine,
        files: OpenFiles,
        on_loaded: Callable[[Machine], None],
    ) -> None:
        self._sandboxes = sandboxes
        self._machine = machine
        self._files = files
        self._on_loaded = on_loaded

    async def load(self) -> GvisorMachine:
        try:
            await self._machine.restore(self._files)
            await self._sandboxes.keep(self._machine)
        except BaseException as error:
            death = await asyncio.shield(asyncio.create_task(self._machine.kill()))
            if isinstance(error, (MachineError, DriverError)):
                raise MachineStartError(
                    f"Machine {self._machine.id} could not be restored: {error}", serial_tail=death.serial_tail
                ) from error
            raise
        self._on_loaded(self._machine)
        return self._machine

    async def discard(self) -> None:
        await self._machine.kill()


def _open_all(paths: list[Path]) -> list[int]:
    opened: list[int] = []
    try:
        for path in paths:
            opened.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except BaseException:
        for fd in opened:
            os.close(fd)
        raise
    return opened


def _size(fd: int) -> int:
    return os.fstat(fd).st_size


def _decompressed(path: Path) -> int:
    """A memory file with what a zstd file holds. Close it. BrokenSnapshotError."""
    target = os.memfd_create("hypercell-state", os.MFD_CLOEXEC)
    try:
        with path.open("rb") as file:
            for chunk in zstandard.ZstdDecompressor().read_to_iter(file):
                os.write(target, chunk)
                if os.lseek(target, 0, os.SEEK_CUR) > MAX_STATE_BYTES:
                    raise BrokenSnapshotError(f"The state of gVisor's objects has more than {MAX_STATE_BYTES} bytes.")
    except zstandard.ZstdError as error:
        os.close(target)
        raise BrokenSnapshotError(f"The state of gVisor's objects cannot be read: {error}") from error
    except BaseException:
        os.close(target)
        raise
    return target


def _copy(source: int, target: Path) -> None:
    """A new file with all of a descriptor's, synced."""
    size_bytes = _size(source)
    with target.open("xb", buffering=0) as file:
        offset = 0
        while offset < size_bytes:
            offset += os.sendfile(file.fileno(), source, offset, size_bytes - offset)
        os.fsync(file.fileno())
