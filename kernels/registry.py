"""The registry: every sandbox's record in memory, on disk and on the event bus, changed in one place.

Guards the state table. Knows nothing of machines. Times that are shown are the host's wall clock's, which may be set;
what is decided by time is decided by clocks that only run: a life counts suspends of the host, idleness does not.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kernels.errors import UnknownSandboxError
from kernels.events import EventBus
from kernels.index import Index, SandboxRecord
from kernels.lineage import Lineage
from kernels.models import EventKind, Sandbox, SandboxEvent, SandboxState
from kernels.states import check
from vm_runtime.drivers.base import Failure

# Activity is a time for people and idle limits: this is exact enough for both, and it comes with each piece of output.
TOUCH_INTERVAL_S = 0.5


class Registry:
    """Records by sandbox id, oldest first. `index` must be open; `load()` reads what an earlier gateway wrote.

    bus: where each change is published. lineage: who came from whom; changed only here.
    """

    def __init__(self, index: Index, bus: EventBus) -> None:
        self.bus = bus
        self._index = index
        self._records: dict[str, SandboxRecord] = {}
        self._active: dict[str, float] = {}  # CLOCK_MONOTONIC at the last activity
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self.lineage = Lineage()

    def load(self) -> None:
        for record in self._index.all():
            sandbox = record.sandbox
            if record.boot_id != self._boot_id:  # only the wall clock can tell
                record = self._born(record, _since(sandbox.created_at))
            self._records[sandbox.id] = record
            self._active[sandbox.id] = time.monotonic() - _since(sandbox.last_activity)
        for sandbox_id, parent_id in self._index.ancestors().items():
            self.lineage.add(sandbox_id, parent_id, gone=sandbox_id not in self._records)
        for record in self._records.values():
            self.lineage.add(record.sandbox.id, record.sandbox.parent_id)
        for sandbox_id in self._index.ancestors().keys() - self._records.keys():
            # Only where a gateway was killed while it removed the last descendant.
            for forgotten in self.lineage.remove(sandbox_id):
                self._index.remove_ancestor(forgotten)

    def __contains__(self, sandbox_id: str) -> bool:
        return sandbox_id in self._records

    def __len__(self) -> int:
        return len(self._records)

    def record(self, sandbox_id: str) -> SandboxRecord:
        """Errors: UnknownSandboxError."""
        try:
            return self._records[sandbox_id]
        except KeyError:
            raise UnknownSandboxError(sandbox_id) from None

    def get(self, sandbox_id: str) -> Sandbox:
        """Errors: UnknownSandboxError."""
        return self.record(sandbox_id).sandbox

    def ids(self) -> list[str]:
        return list(self._records)

    def sandboxes(self) -> list[Sandbox]:
        return [record.sandbox for record in self._records.values()]

    def records(self) -> list[SandboxRecord]:
        return list(self._records.values())

    def add(self, record: SandboxRecord) -> None:
        record = self._born(record, 0.0)
        self._records[record.sandbox.id] = record
        self._active[record.sandbox.id] = time.monotonic()
        self.lineage.add(record.sandbox.id, record.sandbox.parent_id)
        self._index.put(record)
        self._publish(record.sandbox.id, EventKind.CREATED, {"state": record.sandbox.state})

    def update(self, sandbox_id: str, **fields: Any) -> None:
        """Changes fields of the record that users do not see (machine, key, marker, ...)."""
        record = self.record(sandbox_id).model_copy(update=fields)
        self._records[sandbox_id] = record
        self._index.put(record)

    def move(self, sandbox_id: str, state: SandboxState, *, reason: str | None = None, **changes: Any) -> Sandbox:
        """Moves a sandbox to `state`; one that sleeps or has failed has no machine. One write, so that a gateway killed
        in between leaves no record without a machine. Errors: UnknownSandboxError, SandboxStateError (no such move)."""
        record = self.record(sandbox_id)
        if state is not record.sandbox.state:
            check(sandbox_id, record.sandbox.state, state)
        sandbox = replace(record.sandbox, state=state, reason=reason, unresponsive_since=None, **changes)
        machine_id = "" if state in (SandboxState.ASLEEP, SandboxState.FAILED) else record.machine_id
        self._records[sandbox_id] = record.model_copy(update={"sandbox": sandbox, "machine_id": machine_id})
        self._index.put(self._records[sandbox_id])
        self._publish(sandbox_id, EventKind.STATE, {"state": state, "reason": reason})
        return sandbox

    def change(self, sandbox_id: str, **changes: Any) -> Sandbox:
        """Changes what users see of a sandbox, but not its state."""
        record = self.record(sandbox_id)
        sandbox = replace(record.sandbox, **changes)
        self._records[sandbox_id] = record.model_copy(update={"sandbox": sandbox})
        self._index.put(self._records[sandbox_id])
        return sandbox

    def execution_state(self, sandbox_id: str, state: str) -> str:
        """The kernel's own state; what it was before. Not written to disk at once: it changes twice with every cell."""
        record = self._records.get(sandbox_id)
        if record is None or record.sandbox.execution_state == state:
            return state
        self._active[sandbox_id] = time.monotonic()
        self._replace(record, execution_state=state, last_activity=datetime.now(UTC))
        self._publish(sandbox_id, EventKind.EXECUTION_STATE, {"execution_state": state})
        return record.sandbox.execution_state

    def unresponsive(self, sandbox_id: str, since: datetime | None) -> None:
        """Its machine runs and has not answered since then; None: it does again."""
        record = self._records.get(sandbox_id)
        if record is None:
            return
        self._replace(record, unresponsive_since=since)
        self._publish(sandbox_id, EventKind.UNRESPONSIVE, {"since": None if since is None else since.isoformat()})
        if since is not None:
            self.execution_state(sandbox_id, "unknown")

    def touch(self, sandbox_id: str) -> None:
        """The sandbox is in use. Not written to disk at once: that is so with every message."""
        record, now = self._records.get(sandbox_id), time.monotonic()
        if record is not None and now - self._active[sandbox_id] >= TOUCH_INTERVAL_S:
            self._active[sandbox_id] = now
            self._replace(record, last_activity=datetime.now(UTC))

    def age_s(self, sandbox_id: str) -> float:
        """Since it was made. Errors: UnknownSandboxError."""
        return _boot_time_s() - self.record(sandbox_id).born_s

    def idle_s(self, sandbox_id: str) -> float:
        """Since it did something, or a client did. Errors: UnknownSandboxError."""
        self.record(sandbox_id)
        return time.monotonic() - self._active[sandbox_id]

    def fail(self, sandbox_id: str, reason: str) -> None:
        """The sandbox has lost its machine and has nothing to go back to."""
        self.move(sandbox_id, SandboxState.FAILED, reason=reason, execution_state="dead")
        self.notify(sandbox_id, EventKind.KERNEL_DEAD, reason)

    def fall_back(self, sandbox_id: str, reason: str) -> None:
        """The sandbox has lost its machine and sleeps on its last checkpoint; clients learn that it was restarted."""
        self.crash(sandbox_id, reason)
        self.move(sandbox_id, SandboxState.ASLEEP, reason=reason, execution_state="idle")
        self.notify(sandbox_id, EventKind.KERNEL_RESTARTED, reason)

    def crash(self, sandbox_id: str, reason: str) -> None:
        """Its kernel has lost its state without being asked to, and comes back."""
        self.change(sandbox_id, crashes=self.record(sandbox_id).sandbox.crashes + 1)
        self.notify(sandbox_id, EventKind.KERNEL_RESTARTING, reason)

    def notify(self, sandbox_id: str, kind: EventKind, reason: str | None = None, **data: Any) -> None:
        """An event that changes nothing in the record."""
        self._publish(sandbox_id, kind, data if reason is None else {"reason": reason, **data})

    def flattening_failed(self, failure: Failure) -> None:
        """Called by the saver for each attempt."""
        if failure.sandbox_id is not None and failure.sandbox_id in self:
            self.notify(failure.sandbox_id, EventKind.FLATTENING_FAILED, failure.reason)

    def checkpoint_problem(self, sandbox_id: str, problem: str | None) -> None:
        """Notes what keeps its checkpoints away or makes them rare, None for nothing; an event if that has changed.
        Unknown ids are fine."""
        if sandbox_id in self and self.record(sandbox_id).sandbox.checkpoint_problem != problem:
            self.change(sandbox_id, checkpoint_problem=problem)
            self._publish(sandbox_id, EventKind.CHECKPOINT_PROBLEM, {"reason": problem})

    def remove(self, sandbox_id: str) -> None:
        """Forgets a sandbox; unknown ids are fine."""
        record = self._records.pop(sandbox_id, None)
        if record is not None:
            del self._active[sandbox_id]
            forgotten = self.lineage.remove(sandbox_id)
            if not forgotten:
                self._index.put_ancestor(sandbox_id, record.sandbox.parent_id)
            self._index.remove(sandbox_id)
            for ancestor_id in forgotten:
                self._index.remove_ancestor(ancestor_id)
            data = {"state": SandboxState.GONE, "parent_id": record.sandbox.parent_id}
            self._publish(sandbox_id, EventKind.DELETED, data)

    def adopt(self, sandbox_id: str, parent_id: str) -> None:
        """The children of a sandbox become those of its parent, which continues in its state."""
        for child_id in self.lineage.adopt(sandbox_id, parent_id):
            if child_id in self._records:
                self.change(child_id, parent_id=parent_id)
            else:
                self._index.put_ancestor(child_id, parent_id)

    def flush(self) -> None:
        """Writes what was kept in memory only (activity, execution state)."""
        for record in self._records.values():
            self._index.put(record)

    def _born(self, record: SandboxRecord, age_s: float) -> SandboxRecord:
        return record.model_copy(update={"boot_id": self._boot_id, "born_s": _boot_time_s() - age_s})

    def _replace(self, record: SandboxRecord, **changes: Any) -> None:
        sandbox = replace(record.sandbox, **changes)
        self._records[sandbox.id] = record.model_copy(update={"sandbox": sandbox})

    def _publish(self, sandbox_id: str, kind: EventKind, data: Mapping[str, Any]) -> None:
        self.bus.publish(SandboxEvent(sandbox_id=sandbox_id, kind=kind, data=data))


def _since(moment: datetime) -> float:
    """Seconds by the wall clock, which may have been set back meanwhile."""
    return max(0.0, (datetime.now(UTC) - moment).total_seconds())


def _boot_time_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
