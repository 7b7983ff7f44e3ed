"""What is kept of a fake machine: the files of its home directory, and the marker of its next session.

Stored as wholes, each time. Nothing is done in the background.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from tests.fake_driver.guest import MARKER_FILE
from tests.fake_driver.machine import GUEST_DIRECTORY, HOME_DIRECTORY, FakeMachine
from vm_runtime.drivers.base import Capture, FlatteningStatus, MachinePaths, OpenState, States, UnloadedMachine
from vm_runtime.machine import Machine
from vm_runtime.snapshots.manifest import Manifest, PartKind, State, StatePart
from vm_runtime.snapshots.store import Draft, SnapshotStore
from vm_runtime.spec import MachineSpec

STATE_FORMAT = "fake-files-1"
_HOME, _AGENT = "home.tar", "agent.json"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FakeContent:
    """home: a tar of the home directory. marker: hex, opens the agent's next session."""

    home: bytes
    marker: str


# Starts a machine with this content, its kernel running.
StartMachine = Callable[[MachineSpec, MachinePaths, FakeContent], Awaitable[FakeMachine]]


class FakeStates(States):
    """See `States`. held: the ids of machines that were loaded and not released."""

    def __init__(self, store: SnapshotStore, *, driver: str, start: StartMachine) -> None:
        self._store = store
        self._driver = driver
        self._start_machine = start
        self.held: set[str] = set()

    async def _start(self, spec: MachineSpec, paths: MachinePaths, content: FakeContent) -> FakeMachine:
        machine = await self._start_machine(spec, paths, content)
        self.held.add(machine.id)
        return machine

    @asynccontextmanager
    async def opened(self, state: State) -> AsyncIterator[OpenState]:
        content = await asyncio.to_thread(self._read, state)
        yield _FakeState(self._start, lambda: content)

    def _read(self, state: State) -> FakeContent:
        parts = {part.name: self._store.checked_path(part.kind, part).read_bytes() for part in state.parts}
        return FakeContent(home=parts[_HOME], marker=json.loads(parts[_AGENT])["marker"])

    async def make_room(self, machine: Machine) -> None:
        """Nothing: there are no chains."""

    def capturing(self, machine: Machine, *, children: int, last: bool) -> AbstractAsyncContextManager[Capture]:
        assert isinstance(machine, FakeMachine)
        return _itself(FakeCapture(self._driver, self._start, machine))

    async def set_backing(self, machine: Machine, state: State) -> None:
        """Nothing: each state is whole."""

    async def reopen(self, machine: Machine) -> None:
        """Nothing: it uses no files of the store."""

    def release(self, machine: Machine) -> None:
        self.held.discard(machine.id)

    def shorten(self, manifest: Manifest, state: State, *, stopped: bool) -> None:
        """Nothing: there are no chains."""

    def flattening(self) -> FlatteningStatus:
        return FlatteningStatus()

    def quiet(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    async def settled(self) -> None:
        """Nothing is done in the background."""

    async def close(self) -> None:
        """Nothing is held."""


class _FakeState(OpenState):
    def __init__(self, start: StartMachine, content: Callable[[], FakeContent]) -> None:
        self._start = start
        self._content = content

    async def start_unloaded(self, spec: MachineSpec, *, paths: MachinePaths) -> UnloadedMachine:
        return UnloadedFakeMachine(lambda: self._start(spec, paths, self._content()))


class FakeCapture(_FakeState, Capture):
    """All of it is read while the machine stands still."""

    def __init__(self, driver: str, start: StartMachine, machine: FakeMachine) -> None:
        super().__init__(start, self._captured)
        self._driver = driver
        self._machine = machine
        self._taken: FakeContent | None = None

    def _captured(self) -> FakeContent:
        assert self._taken is not None
        return self._taken

    async def prepare(self) -> None:
        """Nothing: it is small."""

    async def catch_up(self) -> None:
        """Nothing."""

    async def take(self) -> None:
        self._taken = await asyncio.to_thread(_read_machine, self._machine.paths)

    async def store(self, draft: Draft) -> State:
        return await asyncio.to_thread(self._store, draft, self._captured())

    def _store(self, draft: Draft, content: FakeContent) -> State:
        files = {_HOME: content.home, _AGENT: json.dumps({"marker": content.marker}).encode()}
        parts = []
        for name, data in files.items():
            part = draft.add_bytes(PartKind.FILE, data)
            parts.append(StatePart(kind=PartKind.FILE, name=name, digest=part.digest, size_bytes=part.size_bytes))
        return State(driver=self._driver, format=STATE_FORMAT, parts=tuple(parts))

    async def commit(self, state: State) -> None:
        """Nothing: the next one is whole, too."""


class UnloadedFakeMachine(UnloadedMachine):
    """Starts its process when it is loaded."""

    def __init__(self, start: Callable[[], Awaitable[FakeMachine]]) -> None:
        self._start = start
        self._machine: FakeMachine | None = None

    async def load(self) -> FakeMachine:
        self._machine = await self._start()
        return self._machine

    async def discard(self) -> None:
        if self._machine is not None:
            await self._machine.kill()


def unpack_home(content: bytes, paths: MachinePaths) -> None:
    """Make the home directory of a machine. Blocking."""
    home = paths.disk_dir / HOME_DIRECTORY
    home.mkdir(mode=0o700, parents=True)
    if content:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            archive.extractall(home, filter="data")


def _read_machine(paths: MachinePaths) -> FakeContent:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in sorted((paths.disk_dir / HOME_DIRECTORY).iterdir()):
            archive.add(path, arcname=path.name)
    marker = (paths.run_dir / GUEST_DIRECTORY / MARKER_FILE).read_text()
    return FakeContent(home=packed.getvalue(), marker=marker)


@asynccontextmanager
async def _itself(value: T) -> AsyncIterator[T]:
    yield value
