"""One call to the host, over the agent's socket. Blocks; an interrupt takes the call back. Knows no ops."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vm_runtime.guest.sandbox.errors import HostError, InterruptedCallError, ValueRefusedError

# As in vm_runtime.guest.host_calls, which this module cannot import: it is asyncio's world, and loads it.
_LENGTHS = struct.Struct(">II")
VALUE_BYTES_MAX = 16 << 20

_AGENT_GONE = "This Python does not run inside a sandbox: there is no agent to ask ({error})."


@dataclass(frozen=True, kw_only=True)
class Reply:
    """result: a JSON object of the host's; value: bytes of another sandbox's, or b""."""

    result: Mapping[str, Any]
    value: bytes


def run_directory() -> Path:
    """Where the agent's socket and the identity are."""
    return Path(os.environ.get("HYPERCELL_RUN", "/run/hypercell"))


def ask(op: str, *, value: bytes = b"", limit_s: float | None = None, **params: Any) -> Reply:
    """Ask the host. limit_s: for callers who would rather do without (TimeoutError then).

    Raises HostError with the host's sentence, InterruptedCallError, ValueRefusedError.
    """
    if len(value) > VALUE_BYTES_MAX:
        raise ValueRefusedError(too_large(len(value)))
    header = json.dumps({"op": op, **params}).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(limit_s)
        try:
            connection.connect(str(run_directory() / "sandbox.sock"))
        except TimeoutError:
            raise
        except OSError as error:
            raise HostError("no_agent", _AGENT_GONE.format(error=error)) from error
        try:
            connection.sendall(_LENGTHS.pack(len(header), len(value)) + header)
            connection.sendall(value)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before all of it was read: the reason can be read
        try:
            header_bytes, value_bytes = _LENGTHS.unpack(_read(connection, _LENGTHS.size))
            answer = json.loads(_read(connection, header_bytes))
            data = _read(connection, value_bytes)
        except (EOFError, ConnectionError) as error:
            raise InterruptedCallError("interrupted", f"The agent went away during {op}.") from error
    if "error" in answer:
        refusal = answer["error"] if isinstance(answer["error"], dict) else {}
        code, message = str(refusal.get("code", "failed")), str(refusal.get("message", "The host gave no reason."))
        raise (InterruptedCallError if code == "interrupted" else HostError)(code, message)
    return Reply(result=answer["result"], value=data)


def too_large(byte_count: int | None) -> str:
    """The sentence for a value of so many bytes (None: more than may cross, it was not counted further)."""
    size = f"more than {VALUE_BYTES_MAX >> 20} MiB" if byte_count is None else f"{byte_count / 2**20:.1f} MiB"
    return (
        f"The value takes {size} when pickled, and at most {VALUE_BYTES_MAX >> 20} MiB cross between sandboxes. Return "
        f"less of it (a summary, a score), or let the parent take over the child's whole state with "
        f"`%%sandbox branch --keep best` or `%%sandbox try`."
    )


def _read(connection: socket.socket, byte_count: int) -> bytes:
    data = bytearray(byte_count)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise EOFError
        view = view[count:]
    return bytes(data)
