"""Opens a service on this host: starts the driver and puts the service on top. Names no driver."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kernels.service import SandboxService
from kernels.settings import ServiceSettings
from kernels.templates import Progress
from vm_runtime.drivers.base import DriverSettings
from vm_runtime.drivers.find import find_driver
from vm_runtime.images.store import ImageStore


@asynccontextmanager
async def open_service(settings: ServiceSettings, *, say: Progress) -> AsyncIterator[SandboxService]:
    """A running service. say: is told what the driver found out about the host, and at the end what is put to sleep.

    Errors: DriverUnavailableError (no such driver, or it cannot work here), KernelsError.
    """
    images = await asyncio.to_thread(ImageStore(settings.state_dir / "images").ls)
    driver = await find_driver(settings.driver).start(
        DriverSettings(
            state_dir=settings.state_dir,
            image=images[0].files if images else None,
            options={"accelerator": settings.accelerator, "runsc": settings.runsc},
        ),
        say=say,
    )
    try:
        if not (isolation := driver.capabilities.isolation).ok:
            say(f"WARNING: {isolation.why_not}")
        async with SandboxService(settings, driver, say=say) as service:
            yield service
    finally:
        await driver.close()
