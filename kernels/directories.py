"""Where a service's directories lie by default (docs/architecture.md, "Where things lie"). Reads only environment."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

# The local gateway's own file, in the first of `well_known_directories` that is usable.
GATEWAY_FILE = "gateway.json"


def default_state_dir() -> Path:
    """`/var/lib/hypercell` for root, else `$XDG_STATE_HOME/hypercell`."""
    if os.geteuid() == 0:
        return Path("/var/lib/hypercell")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "hypercell"


def _runtime_root() -> Path:
    if os.geteuid() == 0:
        return Path("/run/hypercell")
    return well_known_file().parent


def run_dir_of(state_dir: Path) -> Path:
    """The runtime directory that belongs to a state directory; short, since a socket's path has at most 107 bytes."""
    return _runtime_root() / hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:8]


def well_known_file() -> Path:
    """Where the SDK looks for the local gateway of this user."""
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "hypercell" / GATEWAY_FILE
    if os.geteuid() == 0:
        return Path("/run/hypercell") / GATEWAY_FILE
    return Path(f"/tmp/hypercell-{os.geteuid()}") / GATEWAY_FILE
