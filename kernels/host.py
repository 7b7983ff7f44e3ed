"""Opens a service on this host: picks the accelerator, starts the driver, and puts the service on top.

The only place that names a driver.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kernels.service import SandboxService
from kernels.settings import ServiceSettings
from vm_runtime.drivers.qemu.accelerator import Wish, choose
from vm_runtime.drivers.qemu.driver import QemuDriver
from vm_runtime.images.store import ImageStore

log = logging.getLogger(__name__)


@asynccontextmanager
async def open_service(settings: ServiceSettings) -> AsyncIterator[SandboxService]:
    """A running service. Errors: DriverUnavailableError (no QEMU, or no accelerator as asked), KernelsError."""
    images = ImageStore(settings.state_dir / "images").ls()
    choice = await choose(
        Wish(settings.accelerator), state_dir=settings.state_dir, image=images[0].files if images else None
    )
    log.info("Accelerator: %s. %s", choice.accelerator, choice.why)
    driver = await QemuDriver.start(accelerator=choice.accelerator)
    try:
        async with SandboxService(settings, driver) as service:
            yield service
    finally:
        await driver.close()
