"""Restore alone: from the VMM's spawn until its vCPUs run, through the driver, without gateway or kernel."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

from benchmarks.messages import BenchmarkError
from benchmarks.peers import borrowed_state_dir
from benchmarks.results import Row
from benchmarks.setup import Setup
from kernels.templates import Template, TemplateManifest, TemplateStore
from kernels.warm import new_place
from vm_runtime.drivers.base import Driver, MachineState
from vm_runtime.drivers.qemu.arguments import Accelerator
from vm_runtime.drivers.qemu.driver import QemuDriver
from vm_runtime.images.store import ImageStore
from vm_runtime.snapshots.memory import BaseCache, BaseMemory


async def measure(setup: Setup) -> list[Row]:
    with borrowed_state_dir(setup.state_dir) as state_dir:
        templates = state_dir / "templates"
        manifest = newest_template(templates)
        driver = await QemuDriver.start(accelerator=accelerator_of(manifest))
        try:
            image = ImageStore(state_dir / "images").get(manifest.image)
            template = TemplateStore(templates, state_dir / "run", driver).load(manifest.digest, image)
            if template is None:
                raise BenchmarkError(f"The template {manifest.digest} has gone.")
            with ExitStack() as stack:
                base = await asyncio.to_thread(
                    BaseCache(seal=driver.capabilities.sealed_base).acquire,
                    template.ram,
                    digest=template.manifest.ram_digest,
                    size_bytes=template.spec.shape.memory_mib << 20,
                )
                stack.callback(base.close)
                times = [await _restore(driver, template, base, state_dir) for _ in range(setup.times(30, quick=8))]
        finally:
            await driver.close()
    return [Row(topic="restore", title="restore alone, spawn to running", unit="ms", ours=tuple(times[1:]))]


def newest_template(templates: Path) -> TemplateManifest:
    """The template that was built last: the one that the gateways of this run use. Errors: BenchmarkError."""
    manifests = [TemplateManifest.model_validate_json(path.read_bytes()) for path in templates.glob("*/manifest.json")]
    if not manifests:
        raise BenchmarkError(f"There is no template in {templates}; a gateway that starts builds one.")
    return max(manifests, key=lambda manifest: manifest.created_at)


def accelerator_of(manifest: TemplateManifest) -> Accelerator:
    """What the template's machines run on; its VMM identity has it as a word."""
    return next(accelerator for accelerator in Accelerator if accelerator in manifest.vmm.split())


async def _restore(driver: Driver, template: Template, base: BaseMemory, state_dir: Path) -> float:
    state = MachineState(base=base, layers=(), device=template.device, disk_chain=(template.disk,))
    place = new_place(state_dir, state_dir / "run")
    began = perf_counter()
    machine = await driver.restore(template.spec, state, place=place)
    took = perf_counter() - began
    await machine.kill()
    return 1000 * took
