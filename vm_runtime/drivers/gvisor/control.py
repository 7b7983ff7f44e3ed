"""runsc's control socket: what a sandbox is asked, each on a connection of its own. Blocking: call it from a thread.

The protocol is gVisor's urpc (pkg/urpc): one JSON object each way, with descriptors beside it. It is what the commands
`runsc start`, `pause`, `checkpoint` and `restore` use, of which each would take 20 to 40 ms more.
"""

from __future__ import annotations

import array
import base64
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vm_runtime.drivers.gvisor.bundle import CONTAINER
from vm_runtime.errors import VmmCommandError, VmmProtocolError

# Saving and restoring take 1 ms for each MiB; a host with ten times the work that it has CPUs for takes a minute.
TIMEOUT_S = 120.0
# An answer is an error's text at most.
_MAX_ANSWER_BYTES = 1 << 20


def _route(address: bytes, mask: bytes) -> dict[str, Any]:
    ip = socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)
    return {"Destination": {"IP": ip, "Mask": base64.b64encode(mask).decode()}, "Gateway": ""}


_NO_GATEWAY = {"Route": {"Destination": {"IP": "", "Mask": None}, "Gateway": ""}, "Name": ""}
# What `--network=none` means: 127.0.0.1 and ::1. Needed before the guest runs, also before a restore: a socket that is
# bound there makes the sandbox panic otherwise.
_LOOPBACK = {
    "LoopbackLinks": [
        {
            "Name": "lo",
            "Addresses": [{"Address": "127.0.0.1", "PrefixLen": 8}, {"Address": "::1", "PrefixLen": 128}],
            "Routes": [
                _route(bytes([127, 0, 0, 0]), bytes([255, 0, 0, 0])),
                _route(bytes(15) + b"\x01", b"\xff" * 16),
            ],
            "GVisorGRO": False,
        }
    ],
    "FDBasedLinks": None,
    "XDPLinks": None,
    "Defaultv4Gateway": _NO_GATEWAY,
    "Defaultv6Gateway": _NO_GATEWAY,
    "PCAP": False,
    "LogPackets": False,
    "NATBlob": False,
    "DisconnectOk": False,
}


class Control:
    """The calls. Errors of all: VmmCommandError (it was refused), VmmProtocolError (no answer, or nonsense)."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self) -> None:
        """Let a new sandbox run what its bundle says."""
        self._call("Network.CreateLinksAndRoutes", _LOOPBACK)
        self._call("containerManager.StartRoot", CONTAINER)

    def pause(self) -> None:
        """Stop all that runs in it; they count, so it needs as many `resume`."""
        self._call("containerManager.Pause")

    def resume(self) -> None:
        self._call("containerManager.Resume")

    def save(self, files: Sequence[int]) -> None:
        """Write its state to three empty files: state, where pages belong, pages. It runs on afterwards, if it ran."""
        options = {
            "key": None,
            "metadata": {"compression": "none"},
            "MemoryFileSaveOpts": {"ExcludeCommittedZeroPages": False},
            "have_pages_file": True,
            "Resume": True,
        }
        self._call("containerManager.Checkpoint", options, files)

    def restore(self, files: Sequence[int]) -> None:
        """Let a new sandbox continue what `save` has written. Each file must be at its beginning."""
        self._call("Network.CreateLinksAndRoutes", _LOOPBACK)
        self._call("containerManager.Restore", {"HavePagesFile": True, "HaveDeviceFile": False}, files)

    def _call(self, method: str, argument: Any = None, files: Sequence[int] = ()) -> None:
        request = json.dumps({"method": method, "arg": argument}).encode()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(TIMEOUT_S)
                connection.connect(str(self._path))
                socket.send_fds(connection, [request], list(array.array("i", files)))
                answer = _read_object(connection)
        except (OSError, ValueError) as error:
            raise VmmProtocolError(f"The sandbox gave no answer to {method}: {error}") from error
        if answer.get("success") is not True:
            raise VmmCommandError(method, "error", str(answer.get("err"))[:1000])


def _read_object(connection: socket.socket) -> dict[str, Any]:
    data = b""
    while more := connection.recv(65536):
        data += more
        if len(data) > _MAX_ANSWER_BYTES:
            break
        try:
            value = json.loads(data)
        except ValueError:
            continue  # the rest is on its way
        if isinstance(value, dict):
            return value
    raise ValueError(f"{data[:100]!r} is no answer")
