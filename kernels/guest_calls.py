"""The host's side of what a sandbox asks from inside (docs/sandbox_calls.md): one function per op, in a table.

A guest is hostile: it may ask about itself and its descendants only, values are bounded and never looked into. An op
that ends the machine which asked is run in the background, since the asking stream ends with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from pydantic import TypeAdapter

from kernels.background import Background
from kernels.checkpoints import Checkpoints
from kernels.child_results import MAX_VALUE_BYTES, ChildResult
from kernels.errors import KernelsError, MachineFailedError, RequestError, UnknownSandboxError
from kernels.forks import Forks
from kernels.lifecycle import Lifecycle
from kernels.models import Checkpoint, Sandbox
from kernels.registry import Registry
from kernels.session import CallHandler
from vm_runtime.wire.errors import OpenRejectedError
from vm_runtime.wire.stream import Incoming, Stream

# A wait that the guest gives no limit for still ends: nobody waits for a child longer than a week.
MAX_WAIT_S = 7 * 86400.0
# As many of the newest as fit into an answer (32 KiB).
MAX_LISTED_CHECKPOINTS = 100
# A guest's calls, of which it may have many at a time, are looked through once each.
MAX_WAITED_IDS = 1000
# A guest's text for itself or others (names, targets): what a person would type.
MAX_TEXT_CHARACTERS = 200

_SANDBOX = TypeAdapter(Sandbox)
_CHECKPOINT = TypeAdapter(Checkpoint)

_CODES: dict[type[KernelsError], str] = {UnknownSandboxError: "unknown_sandbox", RequestError: "refused"}


class GuestCalls:
    """Gives each sandbox the handler of its calls."""

    def __init__(
        self, registry: Registry, lifecycle: Lifecycle, checkpoints: Checkpoints, forks: Forks, background: Background
    ) -> None:
        self._registry = registry
        self._background = background
        self._lifecycle = lifecycle
        self._checkpoints = checkpoints
        self._forks = forks
        self._receiving: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._ops: dict[str, Callable[[str, Incoming], Awaitable[None]]] = {
            "info": self._info,
            "tree": self._tree,
            "fork": self._fork,
            "exit": self._exit,
            "offer": self._offer,
            "result": self._result,
            "wait": self._wait,
            "become": self._become,
            "kill": self._kill,
            "snapshot": self._snapshot,
            "checkpoints": self._list_checkpoints,
            "restore": partial(self._goto, field="name"),
            "goto": self._goto,
            "undo": self._undo,
            "sleep": self._sleep,
        }

    def handler_for(self, sandbox_id: str) -> CallHandler:
        """Serves the calls of one sandbox."""

        async def handle(incoming: Incoming) -> None:
            op = self._ops.get(str(incoming.params.get("op")))
            if op is None:
                raise OpenRejectedError("unknown_op", "This host does not know that op; its version may be older.")
            try:
                await op(sandbox_id, incoming)
            except KernelsError as error:
                code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), "failed")
                raise OpenRejectedError(code, str(error)) from error

        return handle

    # About itself and its family

    async def _info(self, me: str, incoming: Incoming) -> None:
        await incoming.answer(_json(self._registry.get(me)))

    async def _tree(self, me: str, incoming: Incoming) -> None:
        nodes = self._forks.tree(me)
        await incoming.answer({"root": nodes[0].id, "nodes": [_brief(node) for node in nodes]})

    async def _kill(self, me: str, incoming: Incoming) -> None:
        target = self._descendant(me, _text(incoming, "id"))
        # Not broken off with the stream: half-forgotten, it would be nobody's.
        await self._away(self._lifecycle.end(target))
        await incoming.answer()

    # Forks

    async def _fork(self, me: str, incoming: Incoming) -> None:
        children = await self._forks.fork(
            me,
            count=_integer(incoming, "n"),
            name=_text(incoming, "name", None),
            same_random=incoming.params.get("same_random") is True,
            mid_cell=True,
            call_id=_text(incoming, "call_id"),
        )
        await incoming.answer({"children": [_child(child, index) for index, child in enumerate(children)]})

    async def _exit(self, me: str, incoming: Incoming) -> None:
        value = await self._value(me, await incoming.accept())
        await self._record(me, incoming, "exited", value)
        self._background.spawn(self._lifecycle.end(me))

    async def _offer(self, me: str, incoming: Incoming) -> None:
        stream = await incoming.accept()
        await self._record(me, incoming, "offered", await self._value(me, stream))
        # Answered by the greeting of the machine that takes the state over, or never.
        await stream.wait_lost()

    async def _value(self, me: str, stream: Stream) -> bytes:
        """One at a time of each sandbox, since they are held in memory."""
        async with self._receiving.setdefault(me, asyncio.Lock()):
            return await _value(stream)

    async def _record(self, me: str, incoming: Incoming, state: Any, value: bytes) -> None:
        parent_id = self._registry.get(me).parent_id
        if parent_id is not None:
            await self._forks.child_results.record(
                ChildResult(
                    child_id=me, parent_id=parent_id, state=state, status=_text(incoming, "status", "ok") or "ok",
                    call_id=_text(incoming, "call_id"),
                ),
                value,
            )  # fmt: skip

    async def _result(self, me: str, incoming: Incoming) -> None:
        child_id = _text(incoming, "id")
        result = self._result_of(me, child_id)
        if result is None:
            self._descendant(me, child_id)
            result = await self._wait_for(me, [child_id], _timeout(incoming))
        if result is None:
            running = child_id in self._registry and self._registry.get(child_id).execution_state == "busy"
            await incoming.answer({"state": "running" if running else "idle"})
            return
        value = await asyncio.to_thread(self._forks.child_results.value, child_id)
        stream = await incoming.accept({"state": result.state, "status": result.status, "message": result.message})
        await stream.write(value)
        stream.end()

    async def _wait(self, me: str, incoming: Incoming) -> None:
        ids = incoming.params.get("ids")
        if ids is None:
            ids = self._registry.lineage.children(me)
        if not isinstance(ids, list) or len(ids) > MAX_WAITED_IDS or not all(isinstance(each, str) for each in ids):
            raise RequestError(f"ids must be a list of at most {MAX_WAITED_IDS} children's ids.")
        descendants = set(self._registry.lineage.descendants(me))
        for child_id in ids:
            if self._result_of(me, child_id) is None and child_id not in descendants:
                raise UnknownSandboxError(child_id)
        result = await self._wait_for(me, ids, _timeout(incoming))
        if result is not None:
            await incoming.answer({"id": result.child_id})
            return
        idle = [each for each in ids if each in self._registry and self._registry.get(each).execution_state != "busy"]
        await incoming.answer({"id": idle[0] if idle else None})

    async def _wait_for(self, me: str, ids: list[str], timeout_s: float | None) -> ChildResult | None:
        """The first result; None when the time is over or one of them is idle: its cell ended without a result."""

        def is_idle(child_id: str) -> bool:
            return child_id in self._registry and self._registry.get(child_id).execution_state == "idle"

        return await self._forks.child_results.wait(ids, timeout_s=timeout_s, is_over=is_idle)

    def _result_of(self, me: str, child_id: str) -> ChildResult | None:
        result = self._forks.child_results.get(child_id)
        return result if result is not None and result.parent_id == me else None

    async def _become(self, me: str, incoming: Incoming) -> None:
        child_id = self._descendant(me, _text(incoming, "id"))
        await self._away(self._forks.become(me, child_id))

    # Its own states

    async def _list_checkpoints(self, me: str, incoming: Incoming) -> None:
        checkpoints = await self._checkpoints.all(me)
        newest = [_CHECKPOINT.dump_python(each, mode="json") for each in checkpoints[-MAX_LISTED_CHECKPOINTS:]]
        await incoming.answer({"checkpoints": newest})

    async def _snapshot(self, me: str, incoming: Incoming) -> None:
        checkpoint = await self._checkpoints.checkpoint(me, name=_text(incoming, "name"))
        await incoming.answer(_CHECKPOINT.dump_python(checkpoint, mode="json"))

    async def _goto(self, me: str, incoming: Incoming, *, field: str = "target") -> None:
        await self._away(self._checkpoints.goto(me, _text(incoming, field), reply_to=_reply_to(incoming)))

    async def _undo(self, me: str, incoming: Incoming) -> None:
        await self._away(self._checkpoints.undo(me, reply_to=_reply_to(incoming)))

    async def _sleep(self, me: str, incoming: Incoming) -> None:
        await self._away(self._lifecycle.sleep(me))

    def _descendant(self, me: str, target: str) -> str:
        """The id of a descendant from its id or the beginning of it. Errors: UnknownSandboxError."""
        lineage = self._registry.lineage
        if lineage.is_descendant(target, me) and target in self._registry:
            return target
        found = [each for each in lineage.descendants(me) if len(target) >= 4 and each.startswith(target)]
        if len(found) == 1:
            return found[0]
        raise UnknownSandboxError(target)

    async def _away(self, work: Awaitable[object]) -> None:
        """Runs what ends the asking machine. The caller's stream ends with it; what fails before that is raised."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def run() -> None:
            try:
                await work
            except Exception as error:
                if done.done():
                    raise
                done.set_exception(error if isinstance(error, KernelsError) else MachineFailedError(str(error)))
            else:
                if not done.done():
                    done.set_result(None)

        self._background.spawn(run())
        await done


async def _value(stream: Stream) -> bytes:
    value = bytearray()
    while data := await stream.read():
        value += data
        if len(value) > MAX_VALUE_BYTES:
            raise OpenRejectedError("too_large", f"A value has at most {MAX_VALUE_BYTES} bytes.")
    return bytes(value)


_REQUIRED: Any = object()


def _text(incoming: Incoming, name: str, default: Any = _REQUIRED) -> Any:
    value = incoming.params.get(name)
    if value is None and default is not _REQUIRED:
        return default
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT_CHARACTERS:
        raise RequestError(f"{name} must be a text of 1 to {MAX_TEXT_CHARACTERS} characters.")
    return value


def _integer(incoming: Incoming, name: str) -> int:
    value = incoming.params.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name} must be a whole number.")
    return value


def _timeout(incoming: Incoming) -> float:
    value = incoming.params.get("timeout_s")
    if value is None:
        return MAX_WAIT_S
    if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
        raise RequestError("timeout_s must be a number of seconds, 0 or more.")
    return min(float(value), MAX_WAIT_S)


def _reply_to(incoming: Incoming) -> dict[str, Any] | None:
    value = incoming.params.get("reply_to")
    return value if isinstance(value, Mapping) and isinstance(value, dict) else None


def _json(sandbox: Sandbox) -> dict[str, Any]:
    value: dict[str, Any] = _SANDBOX.dump_python(sandbox, mode="json")
    return value


def _brief(sandbox: Sandbox) -> dict[str, Any]:
    """What a tree shows; brief, since an answer has at most 32 KiB."""
    whole = _json(sandbox)
    return {name: whole[name] for name in ("id", "parent_id", "index", "name", "state", "execution_state")}


def _child(child: Sandbox | KernelsError, index: int) -> dict[str, Any]:
    if isinstance(child, KernelsError):
        return {"index": index, "error": {"code": "failed", "message": str(child)}}
    return {"id": child.id, "index": child.index, "name": child.name, "url": None}
