"""Checkpoints and time travel: snapshots on a sandbox's own time line, and going back to one of them.

Going back restores another machine and ends the one that there is; its state becomes a checkpoint first, so that one
can return to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import statistics
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from weakref import WeakKeyDictionary

from kernels.background import Background
from kernels.connected import ConnectedMachine
from kernels.errors import (
    CellRunsError,
    CheckpointLimitError,
    KernelsError,
    MachineFailedError,
    RequestError,
    SnapshotExistsError,
    UnknownSandboxError,
    UnknownSnapshotError,
)
from kernels.live import LiveSandbox
from kernels.machines import Machines
from kernels.models import Checkpoint, CheckpointPolicy, EventKind, Sandbox, SandboxState
from kernels.registry import Registry
from kernels.snapshots import LEFT_AT, Snapshots, cell_of, checkpoint_of, is_automatic, store_errors
from vm_runtime.errors import VmRuntimeError
from vm_runtime.saving.threads import uncancelled
from vm_runtime.saving.values import AfterCapture
from vm_runtime.snapshots.errors import SnapshotError
from vm_runtime.snapshots.index import SnapshotEntry
from vm_runtime.snapshots.manifest import Manifest
from vm_runtime.snapshots.store import SnapshotStore

log = logging.getLogger(__name__)

# A snapshot by name is for people to type; ids and cell numbers are told apart from names by their form.
MAX_NAME_CHARACTERS = 100
# A machine whose last pauses took longer than this in the median is too slow for checkpoints after every cell; they are
# then taken at most so often. One long pause means nothing: the host may have been busy.
MAX_PAUSE_MS = 100.0
JUDGED_PAUSES = 5
SLOW_INTERVAL_S = 60.0
_SLOW = (
    f"The median pause of the last {JUDGED_PAUSES} checkpoints was longer than {MAX_PAUSE_MS:.0f} ms: there is at most "
    f"one each {SLOW_INTERVAL_S:.0f} s, and cells in between have none."
)
# Timers are minutes; a second late is on time.
WATCH_INTERVAL_S = 1.0
# Checkpoints by name, which nothing thins out: a guest can take them, too, and must not fill the host's disk.
MAX_NAMED = 100
# How many automatic checkpoints one sandbox keeps at most, whatever the budget: a list that people can read.
MAX_CHECKPOINTS = 200


@dataclass
class _Pace:
    """How long the pauses of one machine's last checkpoints were, and until when there are none for that."""

    pauses: deque[float] = field(default_factory=lambda: deque(maxlen=JUDGED_PAUSES))
    slow_until: float = 0.0

    def note(self, pause_ms: float, now: float) -> None:
        self.pauses.append(pause_ms)
        if len(self.pauses) == JUDGED_PAUSES and statistics.median(self.pauses) > MAX_PAUSE_MS:
            self.slow_until = now + SLOW_INTERVAL_S


@dataclass(eq=False)
class Checkpoints:
    """The checkpoints of one service's sandboxes."""

    _registry: Registry
    _machines: Machines
    _store: SnapshotStore
    _snapshots: Snapshots
    _background: Background
    _budget_mib: int
    _paces: WeakKeyDictionary[LiveSandbox, _Pace] = field(default_factory=WeakKeyDictionary, init=False)
    # Sandboxes whose checkpoint after a cell waits for its turn: one that waits will have later cells in it, too.
    _waiting: set[str] = field(default_factory=set, init=False)

    async def all(self, sandbox_id: str) -> list[Checkpoint]:
        """Oldest first. Errors: UnknownSandboxError, StorageError."""
        self._registry.get(sandbox_id)
        with store_errors():
            entries = await asyncio.to_thread(self._store.ls, sandbox_id=sandbox_id)
        return [checkpoint_of(entry) for entry in entries]

    async def checkpoint(self, sandbox_id: str, *, name: str | None) -> Checkpoint:
        """A checkpoint now. Errors: RequestError (bad name), SandboxStateError, CheckpointLimitError,
        MachineFailedError; it runs on."""
        if name is not None and not (name.isprintable() and 0 < len(name) <= MAX_NAME_CHARACTERS):
            raise RequestError(f"A checkpoint's name has 1 to {MAX_NAME_CHARACTERS} printable characters.")
        async with self._machines.lock(sandbox_id):
            with store_errors():
                if name is not None:
                    await asyncio.to_thread(self._check_named, sandbox_id, name)
                manifest = await self._take(sandbox_id, name=name)
                return checkpoint_of(await asyncio.to_thread(self._store.entry, manifest.id))

    def _check_named(self, sandbox_id: str, name: str) -> None:
        """Errors: SnapshotExistsError; RequestError where there are so many that only their owner can decide which may
        go."""
        entries = self._store.ls(sandbox_id=sandbox_id)
        if any(entry.name == name for entry in entries):
            raise SnapshotExistsError(f"This sandbox has a checkpoint named {name!r} already.")
        count = sum(not is_automatic(entry) for entry in entries)
        loose, freed = self._removable(sandbox_id)
        budget_mib = self._budget_mib
        if count >= MAX_NAMED or freed[-1] - freed[len(loose)] > budget_mib << 20:
            raise RequestError(
                f"This sandbox has {count} named checkpoints, at most {MAX_NAMED} and {budget_mib} MiB are kept. "
                "Delete some (`DELETE /api/snapshots/{id}`) first."
            )

    async def _take(
        self,
        sandbox_id: str,
        *,
        name: str | None,
        then: AfterCapture = AfterCapture.RESUME,
        before_resume: Callable[[], Awaitable[object]] | None = None,
    ) -> Manifest:
        try:
            taken = await self._snapshots.take(sandbox_id, name=name, then=then, before_resume=before_resume)
        except (SnapshotError, VmRuntimeError) as error:
            raise MachineFailedError(f"No checkpoint could be taken; the sandbox runs on. {error}") from error
        self._registry.notify(sandbox_id, EventKind.CHECKPOINT, taken.manifest.id)
        return taken.manifest

    def cell_ended(self, sandbox_id: str) -> None:
        """A cell has ended; its kernel waits with the next one, unless it was released from that."""
        if self._registry.get(sandbox_id).checkpoints != CheckpointPolicy.CELL:
            live = self._machines.live.get(sandbox_id)
            if live is not None and live.next_waits:
                self._background.spawn(live.release_cells(waits=False))
        elif sandbox_id not in self._waiting:
            self._waiting.add(sandbox_id)
            self._background.spawn(self._after_cell(sandbox_id))

    async def _after_cell(self, sandbox_id: str) -> None:
        async with AsyncExitStack() as locked:
            await locked.enter_async_context(self._machines.cell_lock(sandbox_id))
            self._waiting.discard(sandbox_id)
            live = self._machines.live.get(sandbox_id)
            # The next cell runs already: its own end is the better moment.
            if live is None or self._registry.get(sandbox_id).execution_state == "busy":
                return
            now = asyncio.get_running_loop().time()
            pace = self._paces.setdefault(live, _Pace())
            if now < pace.slow_until:
                await live.release_cells(waits=False)
                return
            try:
                # Unlocked before it is stored: the next cell may end meanwhile.
                taken = await self._snapshots.take(
                    sandbox_id, then=AfterCapture.RESUME, strict=True, captured=locked.aclose
                )
            except CellRunsError as error:
                log.info("No checkpoint of sandbox %s after this cell: %s", sandbox_id, error)
                return
            except (SnapshotError, VmRuntimeError, CheckpointLimitError) as error:
                log.warning("No checkpoint of sandbox %s: %s", sandbox_id, error)
                return
            pace.note(taken.pause_ms, now)
            if now < pace.slow_until:
                self._registry.checkpoint_problem(sandbox_id, _SLOW)
            self._registry.notify(sandbox_id, EventKind.CHECKPOINT, taken.manifest.id)

    def _removable(self, sandbox_id: str) -> tuple[list[str], list[int]]:
        """The checkpoints that may go by themselves, oldest first, and what removing the first 0, 1, ... of them, then
        of those with a name, would free. The newest, and what the sandbox wakes from, are not among them."""
        kept = self._registry.get(sandbox_id).snapshot_id
        entries = [entry for entry in self._store.ls(sandbox_id=sandbox_id)[:-1] if entry.id != kept]
        loose = [entry.id for entry in entries if is_automatic(entry)]
        named = [entry.id for entry in entries if not is_automatic(entry)]
        return loose, [0, *self._store.index.freed_bytes([*loose, *named])]

    def _thin(self, sandbox_ids: Iterable[str]) -> None:
        """Removes the oldest checkpoints that nobody named where there are too many or they take too much."""
        budget_bytes = self._budget_mib << 20
        for sandbox_id in sandbox_ids:
            with contextlib.suppress(UnknownSandboxError):  # its checkpoints are being removed
                loose, freed = self._removable(sandbox_id)
                self._store.rm_many(loose[: too_many(freed, loose=len(loose), budget_bytes=budget_bytes)])

    async def watch(self) -> None:
        """Until cancelled: takes the checkpoints of sandboxes whose policy is "timer:<minutes>", and thins out those of
        each sandbox that has new ones, whatever took them."""
        taken: WeakKeyDictionary[LiveSandbox, float] = WeakKeyDictionary()
        newest = 0
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            try:
                grown, newest = await asyncio.to_thread(self._store.index.sandboxes_since, newest)
                await self._snapshots.removing(self._thin, grown)
            except SnapshotError as error:
                log.error("Checkpoints could not be thinned out: %s", error)
            now = asyncio.get_running_loop().time()
            for sandbox_id, live in list(self._machines.live.items()):
                minutes = timer_minutes(self._registry.get(sandbox_id).checkpoints)
                if minutes is not None and now - taken.setdefault(live, now) >= minutes * 60:
                    taken[live] = now
                    self._background.spawn(self._on_timer(sandbox_id))

    async def _on_timer(self, sandbox_id: str) -> None:
        try:
            await self.checkpoint(sandbox_id, name=None)
        except KernelsError as error:
            log.warning("No checkpoint of sandbox %s: %s", sandbox_id, error)

    async def goto(self, sandbox_id: str, target: str, *, reply_to: dict[str, Any] | None = None) -> Sandbox:
        """Takes a sandbox back (or forth) to a checkpoint: an id or its beginning, a name, or a cell's number.

        reply_to: the cell that asked for it from inside (docs/sandbox_calls.md). RequestError, MachineFailedError.
        """
        await self._catch_up(sandbox_id, inside=reply_to is not None)
        async with self._machines.lock(sandbox_id):
            with store_errors():
                entry = await asyncio.to_thread(self._find, sandbox_id, target)
            return await self._goto(sandbox_id, entry, reply_to)

    async def undo(self, sandbox_id: str, *, reply_to: dict[str, Any] | None = None) -> Sandbox:
        """Back to before the last cell that ended. Errors: as `goto`."""
        await self._catch_up(sandbox_id, inside=reply_to is not None)
        async with self._machines.lock(sandbox_id):
            with store_errors():
                entry = await asyncio.to_thread(self._before, sandbox_id)
            return await self._goto(sandbox_id, entry, reply_to)

    async def _catch_up(self, sandbox_id: str, *, inside: bool) -> None:
        """Has the checkpoint after a cell whose end its client knows already come before what it asks now."""
        sandbox, live = self._registry.get(sandbox_id), self._machines.live.get(sandbox_id)
        if live is not None and sandbox.state is SandboxState.RUNNING:
            await live.catch_up(inside=inside)

    def _before(self, sandbox_id: str) -> SnapshotEntry:
        """The newest checkpoint, or the nearest of its ancestors, that was taken after an earlier cell than the last
        (which has no checkpoint of its own where they are rarer than cells), or of an earlier kernel."""
        by_id = {each.id: each for each in self._store.ls(sandbox_id=sandbox_id)}
        found = by_id.get(self._registry.get(sandbox_id).snapshot_id or "")
        live = self._machines.live.get(sandbox_id)
        last = live.cell if live is not None else None
        if last is None and found is not None:
            last = cell_of(found)
        started_at = live.kernel_started_at if live is not None else None
        while found is not None:
            is_of_this_kernel = started_at is None or found.created_at > started_at
            if cell_of(found) not in (None, last if is_of_this_kernel else None):
                return found
            found = by_id.get(found.parent or "")
        raise UnknownSnapshotError("There is no earlier checkpoint to go back to; `%sandbox checkpoints` lists them.")

    async def _goto(self, sandbox_id: str, entry: SnapshotEntry, reply_to: dict[str, Any] | None) -> Sandbox:
        """The state that is left is stored, while the other one starts; until both exist, nothing is given up."""
        try:
            manifest = await asyncio.to_thread(self._store.get, entry.id)
        except SnapshotError as error:
            raise MachineFailedError(f"The checkpoint could not be restored: {error}") from error
        state = self._registry.get(sandbox_id).state
        live = None if state is SandboxState.ASLEEP else self._machines.running(sandbox_id)
        if live is not None and state is SandboxState.RUNNING:
            await live.hold_clients()  # what is asked from now on is asked of the other state
        running = asyncio.Event()
        restoring = asyncio.create_task(
            self._machines.restore(
                sandbox_id,
                manifest,
                keep_random=True,
                drop_requests=True,
                extra=_answers(entry, reply_to, live),
                on_running=lambda _: running.set(),
            )
        )
        restoring.add_done_callback(lambda _: running.set())
        try:
            if live is not None:
                # To the millisecond: one goes back and forth more than once in a second.
                name = f"{LEFT_AT}{datetime.now(UTC).replace(tzinfo=None).isoformat(' ', 'milliseconds')}"
                # Storing can wait for the start, and the greeting keeps the guest busy, not us.
                await self._take(sandbox_id, name=name, then=AfterCapture.STOP, before_resume=running.wait)
            try:
                connected = await restoring
            except (SnapshotError, VmRuntimeError, KernelsError) as error:
                raise MachineFailedError(f"The checkpoint could not be restored: {error}") from error
            await self._snapshots.exchange(sandbox_id, connected, manifest)
        except BaseException:
            await uncancelled(self._stay(restoring, live if state is SandboxState.RUNNING else None))
            raise
        return self._registry.get(sandbox_id)

    @staticmethod
    async def _stay(restoring: asyncio.Task[ConnectedMachine], live: LiveSandbox | None) -> None:
        """Goes nowhere. live: what ran, and runs on unless it has been given up already."""
        restoring.cancel()
        (found,) = await asyncio.gather(restoring, return_exceptions=True)
        if isinstance(found, ConnectedMachine):
            await found.close()
        if live is not None:
            await live.resume()

    def _find(self, sandbox_id: str, target: str) -> SnapshotEntry:
        entries = self._store.ls(sandbox_id=sandbox_id)
        named = [each for each in entries if each.name == target]
        by_id = [each for each in entries if len(target) >= 4 and each.id.startswith(target)]
        by_cell = [each for each in entries if target.isdecimal() and cell_of(each) == int(target)]
        for found in (named, by_cell, by_id):
            if found:
                return found[-1]
        raise UnknownSnapshotError(
            f"Sandbox {sandbox_id} has no checkpoint {target!r}: give an id, a name or a cell's number "
            "from `%sandbox checkpoints`."
        )


def timer_minutes(policy: str) -> int | None:
    """N of a policy "timer:N", None for the other policies. Errors: RequestError for a policy that is none."""
    if policy in (CheckpointPolicy.OFF, CheckpointPolicy.CELL):
        return None
    kind, _, minutes = policy.partition(":")
    if kind != "timer" or not minutes.isdecimal() or int(minutes) == 0:
        raise RequestError(f"checkpoints must be off, cell or timer:<minutes>, not {policy!r}.")
    return int(minutes)


def _answers(entry: SnapshotEntry, reply_to: Mapping[str, Any] | None, live: LiveSandbox | None) -> dict[str, Any]:
    """What the state that is gone to answers the clients of the one that is left (docs/sandbox_calls.md): that what
    they had asked for is not run, and the cell that asked for this, that it is done."""
    answers: dict[str, Any] = {"aborted": live.pending_requests.cells_but([reply_to]) if live is not None else []}
    if reply_to is not None:
        cell = cell_of(entry)
        text = f"Went back to the checkpoint of {entry.created_at:%Y-%m-%d %H:%M:%S} UTC"
        answers["answer"] = {
            "reply_to": reply_to,
            "text": text + (f", after cell {cell}." if cell is not None else "."),
        }
    return answers


def too_many(freed: Sequence[int], *, loose: int, budget_bytes: int) -> int:
    """How many of the oldest checkpoints go, of `loose` that may: none, or so many that the rest fits.

    freed: what removing the first 0, 1, ... of all would free, those too that may not go; the last is what they take.
    """
    least = max(0, loose - MAX_CHECKPOINTS)
    enough = (count for count in range(least, loose) if freed[-1] - freed[count] <= budget_bytes)
    return next(enough, loose)
