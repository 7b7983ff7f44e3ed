"""What the kernels layer needs to know, as one frozen value. The gateway fills it from its settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Settings of a `SandboxService`.

    state_dir, run_dir: see docs/architecture.md, "Where things lie".
    pool_size: warm machines kept ready per kernelspec. max_sandboxes: live and sleeping ones together.
    max_memory_mib, max_vcpus, max_disk_mib: the most that one request may ask for.
    memory_mib, vcpus, disk_mib: for requests that name none; None means as the recipe says.
    restart_limit: automatic restarts of a crashing kernel within `restart_window_s` before it is given up as dead.
    accelerator: "auto" (a real boot decides), "kvm" or "tcg".
    """

    state_dir: Path
    run_dir: Path
    pool_size: int = 1
    max_sandboxes: int = 1000
    max_memory_mib: int = 8192
    max_vcpus: int = 4
    max_disk_mib: int = 65536
    memory_mib: int | None = None
    vcpus: int | None = None
    disk_mib: int | None = None
    restart_limit: int = 5
    restart_window_s: float = 60.0
    accelerator: str = "auto"
