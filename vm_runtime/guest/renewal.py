"""What a machine needs after a restore, and at its first greeting: clock, random pool, hostname, identity.

On the path of every restore, so: no subprocess, no import, nothing that waits.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Mapping

from vm_runtime.guest.paths import Paths

# linux/random.h: _IOW('R', 0x03, int[2]) and _IO('R', 0x07).
_RNDADDENTROPY = 0x40085203
_RNDRESEEDCRNG = 0x5207

# The clock is set only if it is off by more: stepping it for nothing disturbs timers.
CLOCK_TOLERANCE_NS = 50_000_000

# Linux's HOST_NAME_MAX.
HOSTNAME_MAX = 64

# More lines than a person writes; what is beyond is lost.
HOSTS_BYTES_MAX = 1 << 20

# Marks our line in /etc/hosts, which may have others of the image's and of the user's.
HOSTS_MARK = b"# this machine"


class Renewal:
    """`owns_machine`: False where the agent runs on someone else's machine, whose clock and name are not ours."""

    def __init__(self, *, paths: Paths, owns_machine: bool) -> None:
        self._path = str(paths.identity)
        self._hosts = str(paths.hosts)
        self._owns_machine = owns_machine
        self._identity: Mapping[str, str] | None = None

    def renew(self, *, wall_clock_ns: int, entropy: bytes, identity: Mapping[str, str]) -> None:
        """The identity's `hostname`, if there is one, becomes the machine's. Raises OSError for what vmlinux has
        refused, when all else is done."""
        refused: list[OSError] = []
        try:
            self.set_clock(wall_clock_ns)
        except OSError as error:
            refused.append(error)
        try:
            if self._owns_machine:
                _feed_random_pool(entropy)
        except OSError as error:
            refused.append(error)
        self.identify(identity)
        if refused:
            raise OSError(refused[0].errno, "; ".join(str(error) for error in refused))

    def set_clock(self, wall_clock_ns: int) -> None:
        """What time it is. A clock that nobody may set is the host's already (gVisor). Raises OSError where vmlinux
        refuses otherwise."""
        if self._owns_machine and abs(time.time_ns() - wall_clock_ns) > CLOCK_TOLERANCE_NS:
            with contextlib.suppress(PermissionError):
                time.clock_settime_ns(time.CLOCK_REALTIME, wall_clock_ns)

    def identify(self, identity: Mapping[str, str]) -> None:
        """Who this machine is from now on. Also called when a warm machine is given to a sandbox."""
        if identity == self._identity:
            return
        if self._owns_machine and (hostname := identity.get("hostname")):
            socket.sethostname(hostname[:HOSTNAME_MAX])
            _write_hosts(self._hosts, hostname[:HOSTNAME_MAX])
        _write_identity(self._path, identity)
        self._identity = dict(identity)


def _feed_random_pool(entropy: bytes) -> None:
    """Credit the host's entropy, then reseed at once: else clones share random numbers until vmlinux reseeds. Where
    there is no pool, random numbers are the host's already (gVisor)."""
    fd = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _RNDADDENTROPY, struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy)
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
    finally:
        os.close(fd)


def _write_hosts(path: str, hostname: str) -> None:
    """Have the machine's name resolve. In place, since the file is mounted at /etc/hosts."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        lines = os.read(fd, HOSTS_BYTES_MAX).splitlines()
        others = [line for line in lines if not line.endswith(HOSTS_MARK)]
        text = b"\n".join([*others, b"127.0.0.1 " + hostname.encode() + b" " + HOSTS_MARK, b""])
        os.pwrite(fd, text, 0)
        os.ftruncate(fd, len(text))
    finally:
        os.close(fd)


def _write_identity(path: str, identity: Mapping[str, str]) -> None:
    """Whoever reads it sees the old one or the new one, whole. Plain system calls: a restored machine has run no other
    code yet, and if it is emulated, translates what it runs for the first time."""
    new = path + ".new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, json.dumps(dict(identity)).encode())
    finally:
        os.close(fd)
    os.rename(new, path)  # noqa: PTH104
