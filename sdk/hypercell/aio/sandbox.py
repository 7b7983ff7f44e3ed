"""A sandbox: one isolated machine with one kernel. Its life, its code, its family and its past.

Knows the routes of the gateway's sandbox API (docs/sandbox_calls.md); connections are aio/transport.py's affair.
"""

from __future__ import annotations

import asyncio
import builtins  # the class has a method `list`
import json
import os
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from hypercell.aio.callbacks import OnError, OnResult, OnText, call_back
from hypercell.aio.commands import AsyncCommands
from hypercell.aio.files import AsyncFiles
from hypercell.aio.kernel import AsyncKernel
from hypercell.aio.transport import START_TIMEOUT_S, Transport, leave_to_parent
from hypercell.errors import (
    ClosedError,
    CodeTimeoutError,
    ConnectionLostError,
    ForkError,
    HypercellError,
    KernelDiedError,
    NotFoundError,
    StateError,
    UnsupportedError,
)
from hypercell.execution import Execution, Recorder
from hypercell.identifiers import in_path
from hypercell.kernel_messages import KernelMessage
from hypercell.locate import locate
from hypercell.timeouts import takes_timeout
from hypercell.values import (
    CheckpointInfo,
    ForkFailure,
    GuestMetrics,
    OnTimeout,
    SandboxEvent,
    SandboxInfo,
    SandboxMetrics,
    SandboxTree,
    SnapshotInfo,
)

# A program that is killed leaves no sandbox for longer than this.
DEFAULT_TIMEOUT_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where the code of a context runs."""

    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None


class AsyncSandbox:
    """A connection to one sandbox. Get one with `await AsyncSandbox.create()` or `.connect(id)`.

    `async with` ends it: one that this program made is killed at the end, one it only connected to goes on. Without
    `async with` you must call `kill` or `close`. A process forked from this one uses it over a connection of its own.
    An object belongs to the event loop in which it was made.
    """

    def __init__(self, transport: Transport, info: SandboxInfo, *, kill_at_exit: bool) -> None:
        self._transport = transport
        self._info = info
        self._path = f"/api/sandboxes/{in_path(info.id, 'sandbox')}"
        self._made_kernel = AsyncKernel(transport, info.id)
        self._pid = os.getpid()
        self._commands = AsyncCommands(transport, info.id)
        self._files = AsyncFiles(transport, info.id)
        # By context; those of contexts that another object made are not known here.
        self._places: dict[str | None, _Place] = {}
        self._kill_at_exit = kill_at_exit
        self._closed = False

    @classmethod
    @takes_timeout
    async def create(
        cls,
        *,
        template: str | None = None,
        snapshot: str | None = None,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        memory_mib: int | None = None,
        vcpus: int | None = None,
        disk_mib: int | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        timeout: float | None = None,
        on_timeout: OnTimeout = "delete",
        idle_timeout_s: float | None = None,
        checkpoints: str | None = None,
        tags: Mapping[str, str] | None = None,
        url: str | None = None,
        token: str | None = None,
    ) -> AsyncSandbox:
        """A new sandbox.

        template: the kernelspec it is made from (None: the gateway's default). snapshot: start from this snapshot (id
        or name) instead. name: for people. env: variables of its kernel. memory_mib (a multiple of 256), vcpus,
        disk_mib (of 1024): its size (None: as the template says). timeout_s: it is deleted after so long (None: never);
        on_timeout="sleep": it sleeps instead, and has no limit any more. idle_timeout_s: it sleeps after so long
        without activity (0: never, None: as the gateway says). checkpoints: "off", "cell" (after every cell) or
        "timer:<minutes>". tags: words to find it by (`list`). url, token: the gateway (else HYPERCELL_URL and
        HYPERCELL_TOKEN, or the one running here).

        Raises NoGatewayError, TokenError, LimitError, CapacityError, NotFoundError (template or snapshot).
        """
        sandbox_id = str(uuid.uuid4())
        body = {
            "kernel_id": sandbox_id,
            "template": template,
            "snapshot": snapshot,
            "name": name,
            "env": dict(env) if env else None,
            "memory_mib": memory_mib,
            "vcpus": vcpus,
            "disk_mib": disk_mib,
            "max_lifetime_s": timeout_s or 0,
            "idle_timeout_s": idle_timeout_s,
            "checkpoints": checkpoints,
            "on_timeout": on_timeout,
            "tags": dict(tags) if tags else None,
        }
        transport = Transport.lease(locate(url=url, token=token))
        try:
            given = {name: value for name, value in body.items() if value is not None}
            model = await _create(transport, sandbox_id, given)
        except BaseException:
            await transport.release()
            raise
        return cls(transport, SandboxInfo.parse(model), kill_at_exit=True)

    @classmethod
    async def connect(cls, sandbox_id: str, *, url: str | None = None, token: str | None = None) -> AsyncSandbox:
        """The sandbox of this id. At the end of `async with` it goes on. Raises NotFoundError."""
        path = f"/api/sandboxes/{in_path(sandbox_id, 'sandbox')}"
        transport = Transport.lease(locate(url=url, token=token))
        try:
            model = await transport.call("GET", path)
        except BaseException:
            await transport.release()
            raise
        return cls(transport, SandboxInfo.parse(model), kill_at_exit=False)

    @classmethod
    async def list(
        cls,
        *,
        tags: Mapping[str, str | None] | None = None,
        states: Sequence[str] | None = None,
        name: str | None = None,
        template: str | None = None,
        limit: int | None = None,
        after: SandboxInfo | None = None,
        url: str | None = None,
        token: str | None = None,
    ) -> builtins.list[SandboxInfo]:
        """The gateway's sandboxes that match all that is given, oldest first.

        tags: with these values (None: any). states: in one of these. limit: at most so many (up to 1,000); after: those
        that come after this one, the last of the page before.
        """
        query = {
            "tags": ",".join(key if value is None else f"{key}={value}" for key, value in (tags or {}).items()) or None,
            "states": ",".join(states) if states else None,
            "name": name,
            "template": template,
            "limit": limit,
            "after": None if after is None else f"{after.created_at:%Y-%m-%dT%H:%M:%S.%fZ},{after.id}",
        }
        async with Transport.leased(locate(url=url, token=token)) as transport:
            return [SandboxInfo.parse(model) for model in await transport.call("GET", "/api/sandboxes", query=query)]

    @classmethod
    async def snapshots(cls, *, url: str | None = None, token: str | None = None) -> builtins.list[SnapshotInfo]:
        """All snapshots in the gateway's store, oldest first: checkpoints, templates, imported ones."""
        async with Transport.leased(locate(url=url, token=token)) as transport:
            return [SnapshotInfo.parse(model) for model in await transport.call("GET", "/api/snapshots")]

    @classmethod
    async def delete_snapshot(cls, snapshot_id: str, *, url: str | None = None, token: str | None = None) -> None:
        """Removes a snapshot. Raises NotFoundError, and StateError if a sandbox needs it."""
        async with Transport.leased(locate(url=url, token=token)) as transport:
            await transport.call("DELETE", f"/api/snapshots/{in_path(snapshot_id, 'snapshot')}")

    @property
    def _kernel(self) -> AsyncKernel:
        """Its connection, which is a new one in a process that was forked."""
        if self._made_kernel.pid != os.getpid():
            leave_to_parent(self._made_kernel)
            self._made_kernel = AsyncKernel(self._transport, self.id)
        return self._made_kernel

    @property
    def id(self) -> str:
        """The sandbox's id, which is also its kernel's."""
        return self._info.id

    @property
    def commands(self) -> AsyncCommands:
        """Commands in the sandbox."""
        return self._commands

    @property
    def files(self) -> AsyncFiles:
        """Files in the sandbox."""
        return self._files

    async def info(self) -> SandboxInfo:
        """What the gateway knows about it now. Raises NotFoundError if it is gone."""
        return self._update(await self._transport.call("GET", self._path))

    async def metrics(self) -> SandboxMetrics:
        """What it takes of its host, and what runs in it uses of its machine, now."""
        value = await self._transport.call("GET", f"{self._path}/metrics")
        guest = value.get("guest")
        return SandboxMetrics.parse({**value, "guest": guest and GuestMetrics.parse(guest)})

    @takes_timeout
    async def run_code(
        self,
        code: str,
        *,
        timeout_s: float | None = None,
        timeout: float | None = None,
        total_timeout_s: float | None = None,
        context: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
        on_result: OnResult | None = None,
        on_error: OnError | None = None,
    ) -> Execution:
        """Runs code in the sandbox's kernel, like a cell of a notebook: variables stay. Returns what it gave.

        An exception in the code is in the result's `error` (`raise_for_error()` raises it). on_...: called as output
        comes; a slow one holds the kernel. timeout_s: from when it is this code's turn; then the kernel is interrupted.
        total_timeout_s: the same from now on; where other code keeps the kernel, this raises without it. context: from
        `create_context`. env, cwd: variables and directory while it runs, for all of the kernel's process; else the
        context's. Cancelled, the code is interrupted. Calls of one context wait for each other.

        Raises CodeTimeoutError (says whether the code has stopped, and holds what it had said), KernelDiedError,
        ConnectionLostError, NotFoundError (the sandbox is gone), StateError (it is paused).
        """
        recorder = Recorder()
        usual = self._places.get(context, _Place())
        env, cwd = {**usual.env, **(env or {})}, cwd or usual.cwd

        async def take(message: KernelMessage) -> None:
            if message.msg_type == "execute_reply" and (env or cwd) and "hypercell" not in message.content:
                raise UnsupportedError(
                    "The code ran, but without `env` and `cwd`: this sandbox was made by an older version."
                )
            heard = recorder.take(message)
            if heard.stdout is not None:
                await call_back(on_stdout, heard.stdout)
            elif heard.stderr is not None:
                await call_back(on_stderr, heard.stderr)
            elif heard.result is not None:
                await call_back(on_result, heard.result)
            elif heard.error is not None:
                await call_back(on_error, heard.error)

        try:
            await self._kernel.execute(
                code,
                take=take,
                timeout_s=timeout_s,
                total_timeout_s=total_timeout_s,
                context_id=context,
                env=env,
                cwd=cwd,
            )
        except (CodeTimeoutError, KernelDiedError) as error:
            error.execution = recorder.execution
            raise
        return recorder.execution

    async def create_context(self, *, env: Mapping[str, str] | None = None, cwd: str | None = None) -> str:
        """A second line of execution in the same kernel: its code runs beside the main one, on the same variables.

        Returns its id, for `run_code(context=)`. env, cwd: of all code that this object runs in it. For variables of
        its own, fork. Raises UnsupportedError if the kernel has none.
        """
        context = await self._kernel.create_context()
        self._places[context] = _Place(env=dict(env or {}), cwd=cwd)
        return context

    async def delete_context(self, context: str) -> None:
        """Ends a context."""
        await self._kernel.delete_context(context)
        self._places.pop(context, None)

    async def interrupt(self) -> None:
        """Raises KeyboardInterrupt in the code that runs, whoever runs it."""
        await self._kernel.interrupt()

    async def restart(self) -> None:
        """A new kernel in the same sandbox: files stay, variables go."""
        await self._kernel.restart()

    async def fork(
        self, n: int = 1, *, name: str | None = None, same_random: bool = False, mid_cell: bool = False
    ) -> builtins.list[AsyncSandbox]:
        """n children that go on from this instant, with every variable, file and process as it is now.

        name: theirs, for people. same_random: they draw the same random numbers. mid_cell: do not wait for the end of
        the code that runs; the children go on with it, too. Each child is killed at the end of an `async with` of its
        own. Raises LimitError, StateError, and ForkError if some could not be made.
        """
        body: dict[str, Any] = {"count": n, "same_random": same_random, "mid_cell": mid_cell}
        if name is not None:
            body["name"] = name
        asking = asyncio.create_task(
            self._transport.call("POST", f"{self._path}/fork", body=body, timeout_s=START_TIMEOUT_S)
        )
        try:
            answer = await asyncio.shield(asking)
        except asyncio.CancelledError:
            # The gateway makes them all the same, and only its answer says which they are.
            with suppress(HypercellError):
                for model in (await asking)["children"]:
                    if "id" in model:
                        await self._transport.call("DELETE", f"/api/sandboxes/{in_path(model['id'], 'sandbox')}")
            raise
        children, failures = [], []
        for model in answer["children"]:
            if "error" in model:
                failures.append(ForkFailure(code=model["error"]["code"], message=model["error"]["message"]))
            else:
                transport = Transport.lease(self._transport.gateway)
                children.append(AsyncSandbox(transport, SandboxInfo.parse(model), kill_at_exit=True))
        if failures:
            raise ForkError(failures, children)
        return children

    async def tree(self) -> SandboxTree:
        """Its family: ancestors, siblings and descendants that are left."""
        answer = await self._transport.call("GET", f"{self._path}/tree")
        return SandboxTree(root=answer["root"], nodes=[SandboxInfo.parse(node) for node in answer["nodes"]])

    async def create_snapshot(self, name: str | None = None) -> CheckpointInfo:
        """Saves memory, disk and kernel of this instant; the sandbox goes on. `create(snapshot=name)` starts from it,
        `goto(name)` returns to it. Raises StateError if this sandbox has a snapshot of that name."""
        body = {} if name is None else {"name": name}
        answer = await self._transport.call("POST", f"{self._path}/checkpoints", body=body, timeout_s=START_TIMEOUT_S)
        return CheckpointInfo.parse(answer)

    async def checkpoints(self) -> builtins.list[CheckpointInfo]:
        """The points of its past that can be returned to, oldest first."""
        return [CheckpointInfo.parse(one) for one in await self._transport.call("GET", f"{self._path}/checkpoints")]

    async def goto(self, target: str | int) -> SandboxInfo:
        """Puts the sandbox back or forth to a checkpoint: its id or name, or a cell's number. Raises NotFoundError."""
        body = {"target": str(target)}
        return self._update(
            await self._transport.call("POST", f"{self._path}/goto", body=body, timeout_s=START_TIMEOUT_S)
        )

    async def undo(self) -> SandboxInfo:
        """Puts the sandbox back to before the last cell. Raises NotFoundError if no checkpoint is that old."""
        return await self._act("undo")

    async def sleep(self) -> SandboxInfo:
        """Saves it and frees its memory; `wake`, and anything that uses it, goes on where it was."""
        return await self._act("sleep")

    async def wake(self) -> SandboxInfo:
        """Wakes it from its sleep."""
        return await self._act("wake")

    async def pause(self) -> SandboxInfo:
        """Stops its processors; its memory stays. Nothing but `resume` starts them."""
        return await self._act("pause")

    async def resume(self) -> SandboxInfo:
        """Goes on after `pause`."""
        return await self._act("resume")

    async def _act(self, action: Literal["sleep", "wake", "pause", "resume", "undo"]) -> SandboxInfo:
        return self._update(await self._transport.call("POST", f"{self._path}/{action}", timeout_s=START_TIMEOUT_S))

    def _update(self, model: Mapping[str, Any]) -> SandboxInfo:
        self._info = SandboxInfo.parse(model)
        return self._info

    @takes_timeout
    async def set_timeout(
        self, timeout_s: float | None = None, *, timeout: float | None = None, on_timeout: OnTimeout | None = None
    ) -> SandboxInfo:
        """It is deleted so long from now (None: never), or sleeps (on_timeout; None: as it was)."""
        return await self._patch(max_lifetime_s=timeout_s or 0, on_timeout=on_timeout)

    async def set_idle_timeout(self, idle_timeout_s: float) -> SandboxInfo:
        """It sleeps after so long without activity (0: never)."""
        return await self._patch(idle_timeout_s=idle_timeout_s)

    async def set_checkpoints(self, policy: str) -> SandboxInfo:
        """When checkpoints are taken by themselves: "off", "cell" or "timer:<minutes>"."""
        return await self._patch(checkpoints=policy)

    async def set_tags(self, tags: Mapping[str, str]) -> SandboxInfo:
        """These tags instead of those it has."""
        return await self._patch(tags=dict(tags))

    async def rename(self, name: str) -> SandboxInfo:
        """Gives it another name, for people."""
        return await self._patch(name=name)

    async def _patch(self, **fields: Any) -> SandboxInfo:
        body = {field: value for field, value in fields.items() if value is not None}
        return self._update(await self._transport.call("PATCH", self._path, body=body))

    async def events(self) -> AsyncGenerator[SandboxEvent, None]:
        """Its changes from now on, until it is gone, or the iteration or the sandbox is closed. Raises
        ConnectionLostError: the gateway ended, or this was too slow, and changes may be missed."""
        kind = ""
        try:
            async with self._transport.stream("GET", f"{self._path}/events", timeout_s=None) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data:"):
                        value = json.loads(line.removeprefix("data:"))
                        kind = str(value["kind"])
                        yield SandboxEvent(sandbox_id=self.id, kind=kind, data=value.get("data", {}))
        except ClosedError:
            return  # `close` ends it
        if kind != "deleted":
            raise ConnectionLostError(f"The gateway tells no more of sandbox {self.id}; changes may be missed.")

    async def kill(self) -> None:
        """Ends the sandbox for good. One that is gone already is fine."""
        try:
            # A lease of its own, since it may be closed already.
            async with Transport.leased(self._transport.gateway) as transport:
                with suppress(NotFoundError):
                    await transport.call("DELETE", self._path)
        finally:
            await self.close()

    async def close(self) -> None:
        """Ends this connection, and what uses it: watches and iterations end, calls raise ClosedError. The sandbox goes
        on. Twice is harmless."""
        if not self._closed:
            self._closed = True
            await self._kernel.close()
            await self._transport.release()

    async def __aenter__(self) -> AsyncSandbox:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        # The sandbox of a process that was forked from the one that made it is its parent's to kill.
        if self._kill_at_exit and not self._closed and self._pid == os.getpid():
            await self.kill()
        else:
            await self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._info.id} {self._info.name or ''}>".replace(" >", ">")


async def _create(transport: Transport, sandbox_id: str, body: Mapping[str, Any]) -> Any:
    """POST that is safe to repeat, because this side chose the id. Cancelled, it leaves nothing behind."""
    try:
        try:
            return await transport.call("POST", "/api/sandboxes", body=body, timeout_s=START_TIMEOUT_S)
        except ConnectionLostError:
            try:
                return await transport.call("POST", "/api/sandboxes", body=body, timeout_s=START_TIMEOUT_S)
            except StateError:
                return await transport.call("GET", f"/api/sandboxes/{sandbox_id}")
    except asyncio.CancelledError:
        with suppress(HypercellError):
            await asyncio.shield(transport.call("DELETE", f"/api/sandboxes/{sandbox_id}"))
        raise
