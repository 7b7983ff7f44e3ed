"""What the kernels layer can be told, each with its limits and its description.

The gateway's settings extend these (`gateway/settings.py`), so each is declared once, here. Knows nothing of where the
values come from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_settings import NoDecode

from kernels.directories import default_state_dir, run_dir_of
from vm_runtime.drivers.find import DEFAULT_DRIVER


class ServiceSettings(BaseModel):
    """Settings of a `SandboxService`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    state_dir: Path = Field(
        default_factory=default_state_dir, description="Directory of images, templates, disks and the index."
    )

    pool_size: int = Field(2, ge=0, le=64, description="Warm machines kept ready per kernelspec.")
    pool_limit: int = Field(
        8, ge=0, le=64, description="To how many of them that grows while starts find none ready (50 MiB each)."
    )
    driver: str = Field(DEFAULT_DRIVER, description="What runs the machines; `hypercelld doctor` names what there is.")
    runsc: str = Field("runsc", description="gVisor's program for the driver gvisor: a name on the PATH, or a path.")
    accelerator: Literal["auto", "kvm", "tcg"] = Field(
        "auto", description="Accelerator of the machines; auto tries with a real boot what works."
    )
    max_sandboxes: int = Field(1000, ge=1, description="Most sandboxes at a time, live and sleeping ones together.")
    max_memory_mib: int = Field(8192, ge=64, description="Most memory that one request may ask for, in MiB.")
    max_vcpus: int = Field(4, ge=1, description="Most virtual CPUs that one request may ask for.")
    max_disk_mib: int = Field(65536, ge=64, description="Largest writable disk that one request may ask for, in MiB.")
    memory_mib: int | None = Field(
        None, ge=64, description="Memory of requests that name none; else as the recipe says."
    )
    vcpus: int | None = Field(
        None, ge=1, description="Virtual CPUs of requests that name none; else as the recipe says."
    )
    disk_mib: int | None = Field(None, ge=64, description="Disk of requests that name none; else as the recipe says.")
    restart_limit: int = Field(
        5, ge=0, description="Restarts of a crashing kernel within restart_window_s before it is left dead."
    )
    restart_window_s: float = Field(
        60.0, gt=0, description="Window in which crashes of a kernel are counted, in seconds."
    )

    idle_timeout_s: float = Field(
        3600.0, ge=0, description="Sandboxes sleep after so many seconds without activity; 0 is never."
    )
    idle_timeouts_s: Annotated[dict[str, Annotated[float, Field(ge=0)]], NoDecode] = Field(
        {}, description="The same for single kernelspecs: name=seconds, separated by commas."
    )
    delete_means_sleep: bool = Field(
        True,
        description="When a Jupyter client deletes a notebook's kernel, keep it asleep for the next who opens that "
        "notebook (the sandbox API's delete is always real).",
    )
    stop_means_sleep: bool = Field(
        True, description="When the gateway is stopped, put all sandboxes to sleep instead of ending them."
    )
    stop_limit_s: float = Field(
        60.0,
        ge=0,
        description="Seconds that putting them to sleep may take; what is late then goes on from its last checkpoint.",
    )
    checkpoints: str = Field(
        "cell",
        pattern=r"^(off|cell|timer:[1-9][0-9]{0,5})$",
        description="When checkpoints of a sandbox are taken by themselves: off, cell (after every one) or "
        "timer:<minutes>.",
    )
    checkpoint_budget_mib: int = Field(
        2048,
        ge=0,
        description="Disk that the checkpoints of one sandbox may take, in MiB: what removing them would free. "
        "The oldest go first.",
    )
    max_children: int = Field(64, ge=0, description="Most children by fork that one sandbox has at a time.")
    max_depth: int = Field(1000, ge=0, description="Most generations of forks of forks.")

    @field_validator("state_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("idle_timeouts_s", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            pairs = [part.partition("=") for part in value.split(",") if part.strip()]
            return {name.strip(): seconds.strip() for name, _, seconds in pairs}
        return value

    @property
    def run_dir(self) -> Path:
        """Where sockets and records of live machines lie."""
        return run_dir_of(self.state_dir)
