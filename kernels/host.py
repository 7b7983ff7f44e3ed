"""Opens a service on this host: picks the accelerator, starts the driver, and puts the service on top.

The only place that names a driver.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kernels.service import SandboxService
from kernels.settings import ServiceSettings
from kernels.templates import Progress
from vm_runtime.drivers.qemu.accelerator import Wish, choose
from vm_runtime.drivers.qemu.driver import QemuDriver
from vm_runtime.images.store import ImageStore


@asynccontextmanager
async def open_service(settings: ServiceSettings, *, say: Progress) -> AsyncIterator[SandboxService]:
    """A running service. say: is told which accelerator is used and why, and at the end what is put to sleep.

    Errors: DriverUnavailableError (no QEMU, or no accelerator as asked), KernelsError.
    """
    images = ImageStore(settings.state_dir / "images").ls()
    choice = await choose(
        Wish(settings.accelerator), state_dir=settings.state_dir, image=images[0].files if images else None
    )
    say(choice.why)
    driver = await QemuDriver.start(accelerator=choice.accelerator)
    try:
        async with SandboxService(settings, driver, say=say) as service:
            yield service
    finally:
        await driver.close()
