"""The agent: serves the host over the wire, and keeps zygote and kernel. All that the host talks to in the guest."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vm_runtime.guest.commands import Account, Commands
from vm_runtime.guest.files import Files
from vm_runtime.guest.host_calls import HostCalls
from vm_runtime.guest.keeper import Answers, KernelError, KernelKeeper, User
from vm_runtime.guest.limits import CGROUPS, UserLimits, lock_memory
from vm_runtime.guest.notices import Notices
from vm_runtime.guest.paths import Paths
from vm_runtime.guest.renewal import Renewal
from vm_runtime.guest.requests import Guest, handle
from vm_runtime.guest.user_threads import UserThreads
from vm_runtime.wire.carriers import Carrier, DeviceCarrier
from vm_runtime.wire.errors import LinkClosedError, OpenRejectedError, StreamResetError
from vm_runtime.wire.greeting import Hello, Welcome
from vm_runtime.wire.link import Link
from vm_runtime.wire.protocol import BOOT_MARKER
from vm_runtime.wire.serving import serve
from vm_runtime.wire.stream import Incoming

# Told in WELCOME, for people: what code is inside a snapshot. What a host may rely on is the wire's version.
AGENT_VERSION = "1"

PORT_NAME = "hypercell.wire"

# vmlinux announces ports a moment after the driver is there; sysfs cannot be waited on. Only while booting.
FIND_PORT_INTERVAL_S = 0.02
FIND_PORT_LIMIT_S = 30.0

# Where root's relative paths begin.
ROOT_HOME = "/root"


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """user: whom kernels run as, None for the agent's own. owns_machine: False where clock and name are not ours.
    wire: the descriptors to read the wire from and to write it to, None if it is a virtio port."""

    paths: Paths
    user: User | None
    owns_machine: bool
    wire: tuple[int, int] | None = None


class Agent:
    """One agent on one carrier. Use as an async context manager, then `serve`."""

    def __init__(self, settings: AgentSettings) -> None:
        self._notices = Notices()
        self._renewal = Renewal(paths=settings.paths, owns_machine=settings.owns_machine)
        limits = UserLimits(CGROUPS if settings.owns_machine else None)
        self._keeper = KernelKeeper(paths=settings.paths, user=settings.user, limits=limits, notify=self._notices.post)
        power_off = _tell_init if settings.owns_machine else _nothing
        home = str(settings.paths.home)
        self._threads = UserThreads(settings.user)
        self._root_threads = UserThreads(None)
        usual = self._keeper.environment
        self._commands = Commands(
            Account(user=settings.user, home=home, threads=self._threads, environment=usual),
            root=Account(
                user=None,
                home=ROOT_HOME,
                threads=self._root_threads,
                environment=lambda: {**usual(), "HOME": ROOT_HOME, "USER": "root", "LOGNAME": "root"},
            ),
            limits=limits,
        )
        self._guest = Guest(
            keeper=self._keeper,
            renewal=self._renewal,
            paths=settings.paths,
            commands=self._commands,
            files=Files(home=home, threads=self._threads),
            root_files=Files(home=ROOT_HOME, threads=self._root_threads),
            power_off=power_off,
        )
        self._calls = HostCalls(settings.paths.host_calls)
        self._link: Link | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Agent:
        await self._keeper.__aenter__()
        await self._calls.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._commands.__aexit__(*exc)
        self._threads.close()
        self._root_threads.close()
        await self._calls.__aexit__(*exc)
        await self._keeper.__aexit__(*exc)

    async def serve(self, carrier: Carrier, *, marker: bytes = BOOT_MARKER) -> None:
        """Serve the host's sessions, one after the other, until the carrier ends (a virtio port never does). marker:
        of the first one."""
        await serve(carrier, self._on_session, make_welcome=self.welcome, marker=marker)

    def hang_up(self) -> None:
        """The host is gone: end its session, so that the kernel keeps its output instead of waiting for a reader."""
        if self._link is not None and not self._link.closed:
            task = asyncio.get_running_loop().create_task(self._link.close("hung_up", "The host closed its end"))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def welcome(self, hello: Hello) -> Welcome:
        """All that follows a restore, then how things are here. A part that fails is told, and the rest goes on."""
        problems: list[str] = []
        if hello.restored or hello.identity:
            try:
                self._renewal.renew(wall_clock_ns=hello.wall_clock_ns, entropy=hello.entropy, identity=hello.identity)
            except OSError as error:
                problems.append(f"The machine could not be renewed: {error}")
        try:
            await self._keeper.renew(
                key=hello.kernel_key,
                restored=hello.restored,
                keep_random=hello.keep_random,
                drop_requests=hello.extra.get("drop_requests") is True,
                quiet=hello.extra.get("quiet") is True,
            )
        except KernelError as error:
            problems.append(str(error))
        if (answers := _answers(hello)) != Answers():
            try:
                await self._keeper.answer(answers)
            except KernelError as error:
                problems.append(str(error))
        self._notices.forget()
        extra: dict[str, Any] = {"problems": problems} if problems else {}
        if self._keeper.last_exit is not None:
            extra["kernel_exited"] = self._keeper.last_exit
        return Welcome(agent_version=AGENT_VERSION, kernel=self._keeper.describe(), extra=extra)

    async def _on_session(self, link: Link) -> None:
        self._link = link
        link.on_open = self._handle
        assert link.hello is not None
        self._calls.begin_session(link, restored=link.hello.restored, answers=link.hello.extra.get("calls"))
        with contextlib.suppress(LinkClosedError, OpenRejectedError, StreamResetError):
            await self._notices.run(link)

    async def _handle(self, incoming: Incoming) -> None:
        await handle(self._guest, incoming)


def _answers(hello: Hello) -> Answers:
    """HELLO's `extra.answer` and `extra.aborted`: what cells of the state that was left are told
    (docs/sandbox_calls.md)."""
    aborted = hello.extra.get("aborted")
    rest = [_request(each) for each in aborted] if isinstance(aborted, list) else []
    known = tuple(each for each in rest if each is not None)
    match hello.extra.get("answer"):
        case {"reply_to": reply_to, "text": str(text)}:
            return Answers(reply_to=_request(reply_to), text=text, aborted=known)
        case _:
            return Answers(aborted=known)


def _request(value: Any) -> dict[str, Any] | None:
    match value:
        case {"idents": list(idents), "header": dict(header)}:
            return {"idents": idents, "header": header}
        case _:
            return None


def _tell_init() -> None:
    os.kill(1, signal.SIGTERM)


def _nothing() -> None:
    """The machine is not ours to power off."""


async def _find_port(paths: Paths) -> Path:
    """The device of the virtio port that carries the wire, without udev. Raises TimeoutError."""
    async with asyncio.timeout(FIND_PORT_LIMIT_S):
        while True:
            for entry in paths.ports.glob("*/name"):
                if entry.read_text().strip() == PORT_NAME:
                    return paths.dev / entry.parent.name
            await asyncio.sleep(FIND_PORT_INTERVAL_S)


async def _run(settings: AgentSettings) -> None:
    if settings.wire is None:
        port = await _find_port(settings.paths)
        reading = writing = os.open(port, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    else:
        reading, writing = settings.wire
    async with Agent(settings) as agent:
        await agent.serve(DeviceCarrier(reading, writing, on_hang_up=agent.hang_up))


def main(settings: AgentSettings) -> None:
    """Run the agent in this process until it fails; init starts it anew then."""
    logging.basicConfig(level=logging.WARNING, format="hypercell-agent: %(message)s")
    lock_memory()
    gc.freeze()  # its modules live as long as it does
    asyncio.run(_run(settings))
