"""What the host may ask of the guest: a table of stream kinds with one function each, and the check of parameters."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from vm_runtime.guest.commands import Commands
from vm_runtime.guest.exec import HANDLERS as EXEC_HANDLERS
from vm_runtime.guest.files import HANDLERS as FILES_HANDLERS
from vm_runtime.guest.files import Files
from vm_runtime.guest.kernel_manager import KernelError, KernelManager
from vm_runtime.guest.params import environment, param
from vm_runtime.guest.paths import CHANNEL_PORTS, Paths
from vm_runtime.guest.uniqueness import Uniqueness
from vm_runtime.guest.usage import usage_of
from vm_runtime.wire.errors import LinkClosedError, OpenRejectedError, StreamResetError
from vm_runtime.wire.relay import relay
from vm_runtime.wire.stream import Incoming

# A started kernel has its sockets, so connecting takes no time; this only ends a wait on a broken one.
CONNECT_LIMIT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Guest:
    """What the functions below act on."""

    kernel_manager: KernelManager
    uniqueness: Uniqueness
    paths: Paths
    commands: Commands
    files: Files
    root_files: Files
    power_off: Callable[[], None]


Handle = Callable[[Guest, Incoming], Awaitable[None]]
T = TypeVar("T")


async def handle(guest: Guest, incoming: Incoming) -> None:
    """Serve one stream. Raises OpenRejectedError, which the link sends to the host."""
    serve = HANDLERS.get(incoming.kind)
    if serve is None:
        raise OpenRejectedError("unknown_kind", f"This agent does not know streams of kind {incoming.kind!r}.")
    try:
        await serve(guest, incoming)
    except KernelError as error:
        raise OpenRejectedError(error.code, str(error)) from error


async def _kernel_start(guest: Guest, incoming: Incoming) -> None:
    params = incoming.params
    if params.get("argv") is not None:
        raise OpenRejectedError("not_supported", "This agent starts ipykernel only; leave argv out.")
    pid, replaces = await guest.kernel_manager.start(
        key=param(params, "key", str, None), env=environment(params), cwd=param(params, "cwd", str, None)
    )
    await incoming.answer({"pid": pid, "replaces": replaces})


async def _kernel_restart(guest: Guest, incoming: Incoming) -> None:
    await incoming.answer({"pid": await guest.kernel_manager.restart(env=environment(incoming.params))})


async def _kernel_stop(guest: Guest, incoming: Incoming) -> None:
    await guest.kernel_manager.stop(grace_s=float(param(incoming.params, "grace_s", (int, float), 0.0)))
    await incoming.answer()


async def _kernel_interrupt(guest: Guest, incoming: Incoming) -> None:
    guest.kernel_manager.interrupt()
    await incoming.answer()


async def _kernel_hold(guest: Guest, incoming: Incoming) -> None:
    limit_s = float(param(incoming.params, "limit_s", (int, float)))
    unanswered = param(incoming.params, "unanswered", bool, False)
    await incoming.answer(await guest.kernel_manager.hold(limit_s=limit_s, unanswered=unanswered))


async def _kernel_release(guest: Guest, incoming: Incoming) -> None:
    await guest.kernel_manager.release(waits=param(incoming.params, "waits", bool))
    await incoming.answer()


async def _kernel_quiesce(guest: Guest, incoming: Incoming) -> None:
    await incoming.answer(await guest.kernel_manager.quiesce(quiet=param(incoming.params, "quiet", bool)))


async def _kernel_channel(guest: Guest, incoming: Incoming) -> None:
    port = CHANNEL_PORTS.get(param(incoming.params, "channel", str))
    if port is None:
        raise OpenRejectedError("bad_params", f"channel must be one of {', '.join(CHANNEL_PORTS)}.")
    path = guest.paths.kernel_socket(port)
    await _relay_to(incoming, asyncio.open_unix_connection(path), code="no_kernel")


async def _tunnel(guest: Guest, incoming: Incoming) -> None:
    port = param(incoming.params, "port", int)
    if not 0 < port < 65536:
        raise OpenRejectedError("bad_params", "port must be from 1 to 65535.")
    await _relay_to(incoming, asyncio.open_connection("127.0.0.1", port), code="connection_refused")


async def _template_prepare(guest: Guest, incoming: Incoming) -> None:
    params = incoming.params
    pid = await guest.kernel_manager.prepare(warmup=param(params, "warmup", str, ""), env=environment(params))
    await incoming.answer({"pid": pid})


async def _sandbox_identify(guest: Guest, incoming: Incoming) -> None:
    identity = param(incoming.params, "identity", dict)
    if not all(isinstance(value, str) for value in identity.values()):
        raise OpenRejectedError("bad_params", "identity is an object of strings.")
    guest.uniqueness.identify(identity)
    guest.uniqueness.set_clock(param(incoming.params, "wall_clock_ns", int))
    await incoming.answer()


async def _machine_clock(guest: Guest, incoming: Incoming) -> None:
    guest.uniqueness.set_clock(param(incoming.params, "wall_clock_ns", int))
    await incoming.answer()


async def _machine_usage(guest: Guest, incoming: Incoming) -> None:
    await incoming.answer(await usage_of(guest.paths.home))


async def _machine_poweroff(guest: Guest, incoming: Incoming) -> None:
    async with await incoming.accept() as stream:
        stream.end()
        with contextlib.suppress(LinkClosedError, StreamResetError):
            await stream.read()  # the host has our answer once it ends its side
    guest.power_off()


def _on(part: Callable[[Guest], T], serve: Callable[[T, Incoming], Awaitable[None]]) -> Handle:
    """A handler that acts on one part of the guest only."""

    async def run(guest: Guest, incoming: Incoming) -> None:
        await serve(part(guest), incoming)

    return run


HANDLERS: dict[str, Handle] = {
    "kernel.start": _kernel_start,
    "kernel.restart": _kernel_restart,
    "kernel.stop": _kernel_stop,
    "kernel.interrupt": _kernel_interrupt,
    "kernel.hold": _kernel_hold,
    "kernel.release": _kernel_release,
    "kernel.quiesce": _kernel_quiesce,
    "kernel.channel": _kernel_channel,
    "sandbox.identify": _sandbox_identify,
    "template.prepare": _template_prepare,
    "tunnel": _tunnel,
    "machine.clock": _machine_clock,
    "machine.usage": _machine_usage,
    "machine.poweroff": _machine_poweroff,
    **{kind: _on(lambda guest: guest.commands, serve) for kind, serve in EXEC_HANDLERS.items()},
    **{kind: _on(lambda guest: guest.files, serve) for kind, serve in FILES_HANDLERS.items()},
    **{f"root.{kind}": _on(lambda guest: guest.root_files, serve) for kind, serve in FILES_HANDLERS.items()},
}


async def _relay_to(
    incoming: Incoming, connecting: Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]], *, code: str
) -> None:
    """Join the stream to a socket in the guest, until either is over."""
    try:
        async with asyncio.timeout(CONNECT_LIMIT_S):
            reader, writer = await connecting
    except OSError as error:  # TimeoutError is one
        raise OpenRejectedError(code, f"Nothing in the machine takes this connection: {error}") from error
    try:
        stream = await incoming.accept()
        await relay(stream, reader, writer)
    finally:
        writer.close()
