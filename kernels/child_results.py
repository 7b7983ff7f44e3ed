"""How children ended, and the values they ended with: kept for their parents until these end themselves.

Values are bytes that nobody here looks into. They lie on disk, so that a killed gateway loses none.

    STATE/outcomes/<child id>.json   and   .value
"""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kernels.errors import LimitError
from vm_runtime.saving.threads import uncancelled

# docs/sandbox_calls.md: what crosses between sandboxes by value.
MAX_VALUE_BYTES = 16 << 20
MAX_MESSAGE_CHARACTERS = 4000
# Kept for one parent: a loop of forks that end must not fill the host's disk.
MAX_PER_PARENT = 10_000
MAX_PARENT_BYTES = 1 << 30


class ChildResult(BaseModel):
    """How a child ended. state: `exited` with a status and a value, `crashed` with a message, or `offered`: it waits
    for its parent to take over its state. call_id: of the offer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    child_id: str
    parent_id: str
    state: Literal["exited", "crashed", "offered"]
    status: str = ""
    message: str = ""
    call_id: str = ""


@dataclass
class _Family:
    """What is kept for one parent: the length of each child's value, by the child's id, and of all together."""

    value_bytes: dict[str, int] = field(default_factory=dict)
    total_bytes: int = 0

    def keep(self, child_id: str, value_bytes: int) -> None:
        self.drop(child_id)
        self.value_bytes[child_id] = value_bytes
        self.total_bytes += value_bytes

    def drop(self, child_id: str) -> None:
        self.total_bytes -= self.value_bytes.pop(child_id, 0)


@dataclass(eq=False)
class _Wait:
    """Of one caller for some children. changed: those that are to be looked at. news: there are some."""

    changed: dict[str, None]
    news: asyncio.Event = field(default_factory=asyncio.Event)


class ChildResults:
    """Records and waits. Blocking file I/O, small: a value of the largest size takes some 20 ms in a thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[str, ChildResult] = {}
        self._families: defaultdict[str, _Family] = defaultdict(_Family)
        self._waits: defaultdict[str, set[_Wait]] = defaultdict(set)
        self._recording = asyncio.Lock()

    def load(self) -> None:
        """What an earlier gateway recorded; half-written ones are dropped."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.glob("*.json"):
            try:
                result = ChildResult.model_validate_json(path.read_bytes())
            except ValidationError:
                path.unlink()
                continue
            path = self._value_path(result.child_id)
            self._note(result, path.stat().st_size if path.exists() else 0)
        for path in self._directory.iterdir():
            if path.name.startswith(".") or path.stem not in self._known:
                path.unlink()

    def get(self, child_id: str) -> ChildResult | None:
        return self._known.get(child_id)

    def value(self, child_id: str) -> bytes:
        """The value of a child that ended or offered; empty if there is none. Blocking."""
        path = self._value_path(child_id)
        return path.read_bytes() if path.exists() else b""

    async def record(self, result: ChildResult, value: bytes = b"") -> None:
        """The first record counts: a child that ended cannot crash later. An offer may still become an end."""
        async with self._recording:
            known = self._known.get(result.child_id)
            if known is not None and known.state != "offered":
                return
            family = self._families[result.parent_id]
            count = len(family.value_bytes) - (known is not None)
            others_bytes = family.total_bytes - family.value_bytes.get(result.child_id, 0)
            if count >= MAX_PER_PARENT or others_bytes + len(value) > MAX_PARENT_BYTES:
                raise LimitError(
                    f"The parent has {count} results of children; at most {MAX_PER_PARENT} and "
                    f"{MAX_PARENT_BYTES >> 20} MiB are kept until it ends."
                )
            await uncancelled(self._keep(result, value))

    async def _keep(self, result: ChildResult, value: bytes) -> None:
        await asyncio.to_thread(self._write, result, value)
        self._note(result, len(value))
        self.notify(result.child_id)

    def _note(self, result: ChildResult, value_bytes: int) -> None:
        self._known[result.child_id] = result
        self._families[result.parent_id].keep(result.child_id, value_bytes)

    def _write(self, result: ChildResult, value: bytes) -> None:
        self._value_path(result.child_id).write_bytes(value)
        self._write_record(result)

    def _write_record(self, result: ChildResult) -> None:
        temporary = self._directory / f".{result.child_id}-{secrets.token_hex(4)}"
        temporary.write_text(result.model_dump_json())
        temporary.replace(self._directory / f"{result.child_id}.json")

    def notify(self, child_id: str) -> None:
        """Something changed that `is_over` looks at. Costs nothing but the waits for this child."""
        for wait in self._waits.get(child_id, ()):
            wait.changed[child_id] = None
            wait.news.set()

    async def wait(
        self, child_ids: Sequence[str], *, timeout_s: float | None, is_over: Callable[[str], bool]
    ) -> ChildResult | None:
        """The result of the first of these that has one; None when the time is over, or one of them `is_over`."""
        wait = _Wait(changed=dict.fromkeys(child_ids))
        for child_id in child_ids:
            self._waits[child_id].add(wait)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    changed, wait.changed = wait.changed, {}
                    for child_id in changed:
                        if child_id in self._known:
                            return self._known[child_id]
                    if any(map(is_over, changed)):
                        return None
                    wait.news.clear()
                    await wait.news.wait()
        except TimeoutError:
            return None
        finally:
            for child_id in dict.fromkeys(child_ids):
                self._waits[child_id].discard(wait)
                if not self._waits[child_id]:
                    del self._waits[child_id]

    async def adopt(self, child_id: str, parent_id: str) -> None:
        """What a child has of its own children is its parent's from now on, which continues in its state."""
        async with self._recording:
            family = self._families.pop(child_id, _Family())
            for each, value_bytes in family.value_bytes.items():
                result = self._known[each].model_copy(update={"parent_id": parent_id})
                self._note(result, value_bytes)
                await asyncio.to_thread(self._write_record, result)

    async def forget(self, *, child_id: str | None = None, parent_id: str | None = None) -> None:
        """Drops one result, or all of a parent's."""
        family = self._families.pop(parent_id, None) if parent_id is not None else None
        child_ids = list(family.value_bytes) if family is not None else []
        if child_id in self._known:
            child_ids.append(child_id)
        for each in child_ids:
            result = self._known.pop(each)
            if result.parent_id in self._families:
                self._families[result.parent_id].drop(each)
        await asyncio.to_thread(self._unlink, child_ids)

    def _unlink(self, child_ids: list[str]) -> None:
        for child_id in child_ids:
            (self._directory / f"{child_id}.json").unlink(missing_ok=True)
            self._value_path(child_id).unlink(missing_ok=True)

    def _value_path(self, child_id: str) -> Path:
        return self._directory / f"{child_id}.value"
