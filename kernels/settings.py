"""What the kernels layer needs to know, as one frozen value. The gateway fills it from its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kernels.models import CheckpointPolicy


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Settings of a `SandboxService`.

    state_dir, run_dir: see docs/architecture.md, "Where things lie".
    pool_size: warm machines kept ready per kernelspec; pool_limit: to how many that grows while starts find none ready.
    max_sandboxes: live and sleeping ones together.
    max_memory_mib, max_vcpus, max_disk_mib: the most that one request may ask for.
    memory_mib, vcpus, disk_mib: for requests that name none; None means as the recipe says.
    restart_limit: automatic restarts of a crashing kernel within `restart_window_s` before it is given up as dead.
    idle_timeout_s: sandboxes sleep after so long without activity, 0 never; idle_timeouts_s: by kernelspec.
    delete_means_sleep: a Jupyter client's
    delete keeps a notebook's sandbox asleep (the sandbox API's delete is always real). stop_means_sleep: a clean stop
    puts all to sleep instead of ending them, within `stop_limit_s`. checkpoints: policy of sandboxes that name none.
    checkpoint_budget_mib: disk that one sandbox's checkpoints may take; the oldest are thinned out first.
    max_children: live children of one sandbox; max_depth: generations of forks.
    accelerator: "auto" (a real boot decides), "kvm" or "tcg".
    """

    state_dir: Path
    run_dir: Path
    pool_size: int = 2
    pool_limit: int = 8
    max_sandboxes: int = 1000
    max_memory_mib: int = 8192
    max_vcpus: int = 4
    max_disk_mib: int = 65536
    memory_mib: int | None = None
    vcpus: int | None = None
    disk_mib: int | None = None
    restart_limit: int = 5
    restart_window_s: float = 60.0
    idle_timeout_s: float = 3600.0
    idle_timeouts_s: Mapping[str, float] = field(default_factory=dict)
    delete_means_sleep: bool = True
    stop_means_sleep: bool = True
    stop_limit_s: float = 60.0
    checkpoints: str = CheckpointPolicy.CELL
    checkpoint_budget_mib: int = 2048
    max_children: int = 64
    max_depth: int = 1000
    accelerator: str = "auto"
