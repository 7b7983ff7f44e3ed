"""A sandbox: one isolated machine with one kernel. Its life, its code, its family and its past.

Made by sdk/make_blocking.py from aio/sandbox.py: change that.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping, Sequence

from hypercell.aio.sandbox import AsyncSandbox
from hypercell.blocking.commands import Commands
from hypercell.blocking.files import Files
from hypercell.blocking.portal import (
    BlockingCall,
    OnError,
    OnResult,
    OnText,
    Wrapper,
    here,
    iterate,
    register,
    wrap,
)
from hypercell.execution import Execution
from hypercell.timeouts import takes_timeout
from hypercell.values import (
    CheckpointInfo,
    OnTimeout,
    SandboxEvent,
    SandboxInfo,
    SandboxMetrics,
    SandboxTree,
    SnapshotInfo,
)

DEFAULT_TIMEOUT_S = 3600.0


class Sandbox(Wrapper):
    """A connection to one sandbox. Get one with `Sandbox.create()` or `.connect(id)`.

    `with` ends it: one that this program made is killed at the end, one it only connected to goes on. Without
    `with` you must call `kill` or `close`. A process forked from this one uses it over a connection of its own.
    An object belongs to the event loop in which it was made.
    """

    _async: AsyncSandbox

    @classmethod
    @takes_timeout
    def create(
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
    ) -> Sandbox:
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
        result: Sandbox = wrap(
            BlockingCall().run(
                AsyncSandbox.create(
                    template=template,
                    snapshot=snapshot,
                    name=name,
                    env=env,
                    memory_mib=memory_mib,
                    vcpus=vcpus,
                    disk_mib=disk_mib,
                    timeout_s=timeout_s,
                    on_timeout=on_timeout,
                    idle_timeout_s=idle_timeout_s,
                    checkpoints=checkpoints,
                    tags=tags,
                    url=url,
                    token=token,
                )
            )
        )
        return result

    @classmethod
    def connect(cls, sandbox_id: str, *, url: str | None = None, token: str | None = None) -> Sandbox:
        """The sandbox of this id. At the end of `with` it goes on. Raises NotFoundError."""
        result: Sandbox = wrap(BlockingCall().run(AsyncSandbox.connect(sandbox_id, url=url, token=token)))
        return result

    @classmethod
    def list(
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
        return BlockingCall().run(
            AsyncSandbox.list(
                tags=tags, states=states, name=name, template=template, limit=limit, after=after, url=url, token=token
            )
        )

    @classmethod
    def snapshots(cls, *, url: str | None = None, token: str | None = None) -> builtins.list[SnapshotInfo]:
        """All snapshots in the gateway's store, oldest first: checkpoints, templates, imported ones."""
        return BlockingCall().run(AsyncSandbox.snapshots(url=url, token=token))

    @classmethod
    def delete_snapshot(cls, snapshot_id: str, *, url: str | None = None, token: str | None = None) -> None:
        """Removes a snapshot. Raises NotFoundError, and StateError if a sandbox needs it."""
        BlockingCall().run(AsyncSandbox.delete_snapshot(snapshot_id, url=url, token=token))

    @property
    def id(self) -> str:
        """The sandbox's id, which is also its kernel's."""
        return self._async.id

    @property
    def commands(self) -> Commands:
        """Commands in the sandbox."""
        result: Commands = wrap(self._async.commands)
        return result

    @property
    def files(self) -> Files:
        """Files in the sandbox."""
        result: Files = wrap(self._async.files)
        return result

    def info(self) -> SandboxInfo:
        """What the gateway knows about it now. Raises NotFoundError if it is gone."""
        return BlockingCall().run(self._async.info())

    def metrics(self) -> SandboxMetrics:
        """What it takes of its host, and what runs in it uses of its machine, now."""
        return BlockingCall().run(self._async.metrics())

    @takes_timeout
    def run_code(
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
        return BlockingCall().run(
            self._async.run_code(
                code,
                timeout_s=timeout_s,
                total_timeout_s=total_timeout_s,
                context=context,
                env=env,
                cwd=cwd,
                on_stdout=here(on_stdout),
                on_stderr=here(on_stderr),
                on_result=here(on_result),
                on_error=here(on_error),
            )
        )

    def create_context(self, *, env: Mapping[str, str] | None = None, cwd: str | None = None) -> str:
        """A second line of execution in the same kernel: its code runs beside the main one, on the same variables.

        Returns its id, for `run_code(context=)`. env, cwd: of all code that this object runs in it. For variables of
        its own, fork. Raises UnsupportedError if the kernel has none.
        """
        return BlockingCall().run(self._async.create_context(env=env, cwd=cwd))

    def delete_context(self, context: str) -> None:
        """Ends a context."""
        BlockingCall().run(self._async.delete_context(context))

    def interrupt(self) -> None:
        """Raises KeyboardInterrupt in the code that runs, whoever runs it."""
        BlockingCall().run(self._async.interrupt())

    def restart(self) -> None:
        """A new kernel in the same sandbox: files stay, variables go."""
        BlockingCall().run(self._async.restart())

    def fork(
        self, n: int = 1, *, name: str | None = None, same_random: bool = False, mid_cell: bool = False
    ) -> builtins.list[Sandbox]:
        """n children that go on from this instant, with every variable, file and process as it is now.

        name: theirs, for people. same_random: they draw the same random numbers. mid_cell: do not wait for the end of
        the code that runs; the children go on with it, too. Each child is killed at the end of an `with` of its
        own. Raises LimitError, StateError, and ForkError if some could not be made.
        """
        result: builtins.list[Sandbox] = wrap(
            BlockingCall().run(self._async.fork(n, name=name, same_random=same_random, mid_cell=mid_cell))
        )
        return result

    def tree(self) -> SandboxTree:
        """Its family: ancestors, siblings and descendants that are left."""
        return BlockingCall().run(self._async.tree())

    def create_snapshot(self, name: str | None = None) -> CheckpointInfo:
        """Saves memory, disk and kernel of this instant; the sandbox goes on. `create(snapshot=name)` starts from it,
        `goto(name)` returns to it. Raises StateError if this sandbox has a snapshot of that name.
        """
        return BlockingCall().run(self._async.create_snapshot(name))

    def checkpoints(self) -> builtins.list[CheckpointInfo]:
        """The points of its past that can be returned to, oldest first."""
        return BlockingCall().run(self._async.checkpoints())

    def goto(self, target: str | int) -> SandboxInfo:
        """Puts the sandbox back or forth to a checkpoint: its id or name, or a cell's number. Raises NotFoundError."""
        return BlockingCall().run(self._async.goto(target))

    def undo(self) -> SandboxInfo:
        """Puts the sandbox back to before the last cell. Raises NotFoundError if no checkpoint is that old."""
        return BlockingCall().run(self._async.undo())

    def sleep(self) -> SandboxInfo:
        """Saves it and frees its memory; `wake`, and anything that uses it, goes on where it was."""
        return BlockingCall().run(self._async.sleep())

    def wake(self) -> SandboxInfo:
        """Wakes it from its sleep."""
        return BlockingCall().run(self._async.wake())

    def pause(self) -> SandboxInfo:
        """Stops its processors; its memory stays. Nothing but `resume` starts them."""
        return BlockingCall().run(self._async.pause())

    def resume(self) -> SandboxInfo:
        """Goes on after `pause`."""
        return BlockingCall().run(self._async.resume())

    @takes_timeout
    def set_timeout(
        self, timeout_s: float | None = None, *, timeout: float | None = None, on_timeout: OnTimeout | None = None
    ) -> SandboxInfo:
        """It is deleted so long from now (None: never), or sleeps (on_timeout; None: as it was)."""
        return BlockingCall().run(self._async.set_timeout(timeout_s, on_timeout=on_timeout))

    def set_idle_timeout(self, idle_timeout_s: float) -> SandboxInfo:
        """It sleeps after so long without activity (0: never)."""
        return BlockingCall().run(self._async.set_idle_timeout(idle_timeout_s))

    def set_checkpoints(self, policy: str) -> SandboxInfo:
        """When checkpoints are taken by themselves: "off", "cell" or "timer:<minutes>"."""
        return BlockingCall().run(self._async.set_checkpoints(policy))

    def set_tags(self, tags: Mapping[str, str]) -> SandboxInfo:
        """These tags instead of those it has."""
        return BlockingCall().run(self._async.set_tags(tags))

    def rename(self, name: str) -> SandboxInfo:
        """Gives it another name, for people."""
        return BlockingCall().run(self._async.rename(name))

    def events(self) -> Iterator[SandboxEvent]:
        """Its changes from now on, until it is gone, or the iteration or the sandbox is closed. Raises
        ConnectionLostError: the gateway ended, or this was too slow, and changes may be missed.
        """
        return iterate(self._async.events())

    def kill(self) -> None:
        """Ends the sandbox for good. One that is gone already is fine."""
        BlockingCall().run(self._async.kill())

    def close(self) -> None:
        """Ends this connection, and what uses it: watches and iterations end, calls raise ClosedError. The sandbox goes
        on. Twice is harmless.
        """
        BlockingCall().run(self._async.close())

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exc_info: object) -> None:
        BlockingCall().run(self._async.__aexit__(*exc_info))


register(AsyncSandbox, Sandbox)
