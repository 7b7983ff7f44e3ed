"""What a run was taken on: the numbers mean nothing without it. Reads /proc and installed versions, names no host."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vm_runtime.snapshots.manifest import Manifest


def describe_host(vmm: str | None) -> dict[str, str]:
    """vmm: the identity of the VMM (a template's), None if unknown."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    facts = {
        "CPU": f"{len(os.sched_getaffinity(0))} x {model[1] if model else platform.machine()}",
        "memory": f"{round(int(memory[1]) / 2**20)} GiB" if memory else "unknown",
        "vmlinux": platform.release(),
        "Python": platform.python_version(),
        "jupyter_kernel_gateway": _version("jupyter-kernel-gateway"),
        "ipykernel": _version("ipykernel"),
        "hypercell": _version("hypercell"),
    }
    if vmm is not None:
        facts["VMM"] = vmm
    return facts


def vmm_sentence(snapshot: Manifest) -> str:
    """The VMM that a snapshot was taken with."""
    needs = snapshot.state.needs
    return f"{snapshot.state.driver} " + ", ".join(needs.values())


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
