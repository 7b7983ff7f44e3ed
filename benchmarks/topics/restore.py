"""Restore alone: from the call until the vCPUs of a machine of the template run, without gateway or kernel."""

from __future__ import annotations

from benchmarks.lab import open_lab
from benchmarks.results import Row
from benchmarks.setup import Setup
from benchmarks.state_dirs import template_snapshot
from vm_runtime.images.recipe import DEFAULT_RECIPE


async def measure(setup: Setup) -> list[Row]:
    snapshot = template_snapshot(setup.state_dir)
    async with open_lab(setup.state_dir, names=(DEFAULT_RECIPE,)) as lab:
        times = [await lab.restore_ms(snapshot) for _ in range(setup.times(30, quick=8))]
    return [Row(topic="restore", title="restore alone, spawn to running", unit="ms", ours=tuple(times[1:]))]
