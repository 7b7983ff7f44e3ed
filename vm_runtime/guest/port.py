"""The virtio port that carries the wire: how it is found without udev, and how a host that hung up is noticed."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable
from pathlib import Path

from vm_runtime.guest.paths import Paths

PORT_NAME = "hypercell.wire"

# vmlinux announces ports a moment after the driver is there; sysfs cannot be waited on. Only while booting.
FIND_INTERVAL_S = 0.02
FIND_LIMIT_S = 30.0


async def find_port(paths: Paths) -> Path:
    """The device of the wire's port. Raises TimeoutError if vmlinux does not announce it."""
    async with asyncio.timeout(FIND_LIMIT_S):
        while True:
            for entry in paths.ports.glob("*/name"):
                if entry.read_text().strip() == PORT_NAME:
                    return paths.dev / entry.parent.name
            await asyncio.sleep(FIND_INTERVAL_S)


def open_port(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)


class HangUpWatch:
    """Calls `on_hang_up` when the host closes its end of the port. Edge-triggered: a closed port costs nothing."""

    def __init__(self, fd: int, on_hang_up: Callable[[], None]) -> None:
        self._fd = fd
        self._on_hang_up = on_hang_up
        self._epoll = select.epoll()
        self._epoll.register(fd, select.EPOLLHUP | select.EPOLLET)
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._changed)

    def _changed(self) -> None:
        if any(events & select.EPOLLHUP for _, events in self._epoll.poll(0)):
            self._on_hang_up()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._epoll.fileno())
        self._epoll.close()
