"""How children ended, and the values they ended with: kept for their parents until these end themselves.

Values are bytes that nobody here looks into. They lie on disk, so that a killed gateway loses none.

    STATE/outcomes/<child id>.json   and   .value
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kernels.errors import LimitError

# docs/sandbox_calls.md: what crosses between sandboxes by value.
MAX_VALUE_BYTES = 16 << 20
MAX_MESSAGE_CHARACTERS = 4000
# Kept for one parent: a loop of forks that end must not fill the host's disk.
MAX_PER_PARENT = 10_000
MAX_PARENT_BYTES = 1 << 30


class Outcome(BaseModel):
    """How a child ended. state: `exited` with a status and a value, `crashed` with a message, or `offered`: it waits
    for its parent to take over its state. call_id: of the offer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    child_id: str
    parent_id: str
    state: Literal["exited", "crashed", "offered"]
    status: str = ""
    message: str = ""
    call_id: str = ""


class Outcomes:
    """Records and waits. Blocking file I/O, small: a value of the largest size takes some 20 ms in a thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[str, Outcome] = {}
        self._changed = asyncio.Condition()

    def load(self) -> None:
        """What an earlier gateway recorded; half-written ones are dropped."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.glob("*.json"):
            try:
                outcome = Outcome.model_validate_json(path.read_bytes())
            except ValidationError:
                path.unlink()
                continue
            self._known[outcome.child_id] = outcome
        for path in self._directory.iterdir():
            if path.name.startswith(".") or path.stem not in self._known:
                path.unlink()

    def get(self, child_id: str) -> Outcome | None:
        return self._known.get(child_id)

    def value(self, child_id: str) -> bytes:
        """The value of a child that ended or offered; empty if there is none. Blocking."""
        path = self._directory / f"{child_id}.value"
        return path.read_bytes() if path.exists() else b""

    async def record(self, outcome: Outcome, value: bytes = b"") -> None:
        """The first word counts: a child that ended cannot crash later. An offer may still become an end."""
        known = self._known.get(outcome.child_id)
        if known is not None and known.state != "offered":
            return
        siblings = [each.child_id for each in self._known.values() if each.parent_id == outcome.parent_id]
        if len(siblings) >= MAX_PER_PARENT or await asyncio.to_thread(self._bytes_of, siblings) > MAX_PARENT_BYTES:
            raise LimitError(
                f"The parent has {len(siblings)} results of children; at most {MAX_PER_PARENT} and "
                f"{MAX_PARENT_BYTES >> 20} MiB are kept until it ends."
            )
        await asyncio.to_thread(self._write, outcome, value)
        async with self._changed:
            self._known[outcome.child_id] = outcome
            self._changed.notify_all()

    def _bytes_of(self, child_ids: list[str]) -> int:
        paths = [self._directory / f"{child_id}.value" for child_id in child_ids]
        return sum(path.stat().st_size for path in paths if path.exists())

    def _write(self, outcome: Outcome, value: bytes) -> None:
        (self._directory / f"{outcome.child_id}.value").write_bytes(value)
        temporary = self._directory / f".{outcome.child_id}-{secrets.token_hex(4)}"
        temporary.write_text(outcome.model_dump_json())
        temporary.replace(self._directory / f"{outcome.child_id}.json")

    async def poke(self) -> None:
        """Something changed that a wait's `give_up` may ask for."""
        async with self._changed:
            self._changed.notify_all()

    async def wait(
        self, child_ids: list[str], *, timeout_s: float | None, give_up: Callable[[], bool]
    ) -> Outcome | None:
        """The outcome of the first of these that has one; None if the time is over or `give_up` says so."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                while True:
                    for child_id in child_ids:
                        if child_id in self._known:
                            return self._known[child_id]
                    if give_up():
                        return None
                    await self._changed.wait()
        except TimeoutError:
            return None

    async def forget(self, *, child_id: str | None = None, parent_id: str | None = None) -> None:
        """Drops one outcome, or all of a parent's."""
        for outcome in list(self._known.values()):
            if outcome.child_id == child_id or outcome.parent_id == parent_id:
                del self._known[outcome.child_id]
                for suffix in (".json", ".value"):
                    await asyncio.to_thread((self._directory / f"{outcome.child_id}{suffix}").unlink, missing_ok=True)
