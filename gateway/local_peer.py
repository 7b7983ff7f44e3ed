"""Which user is at the other end of a TCP connection on loopback, from /proc/net/tcp.

nbclient's gateway client opens its WebSocket without any token. A process of the gateway's own user could read the
token from `gateway.json` anyway, so letting it in gives it nothing it does not have. Linux only (proc(5)).
"""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path


def peer_uid(peer: tuple[str, int], local: tuple[str, int], *, proc: Path = Path("/proc/net")) -> int | None:
    """The user id that owns the socket `peer` connected to `local` on this machine; None when there is none."""
    wanted = (_hex_address(peer), _hex_address(local))
    table = "tcp6" if ":" in peer[0] else "tcp"
    try:
        lines = (proc / table).read_text().splitlines()[1:]
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if len(fields) > 7 and (fields[1], fields[2]) == wanted:
            return int(fields[7])
    return None


def _hex_address(address: tuple[str, int]) -> str:
    # The kernel prints 32-bit words in the byte order of the machine.
    packed = ipaddress.ip_address(address[0].split("%")[0]).packed
    words = (packed[i : i + 4] for i in range(0, len(packed), 4))
    text = "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
    return f"{text}:{address[1]:04X}"
