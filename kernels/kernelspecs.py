"""An image as Jupyter's kernelspec. Knows nothing of machines."""

from __future__ import annotations

from pathlib import Path

from kernels.models import Kernelspec
from vm_runtime.drivers.base import Driver
from vm_runtime.images.store import Image

RESOURCES = Path(__file__).parent / "resources"


def kernelspec_of(image: Image, driver: Driver) -> Kernelspec:
    """The kernelspec named after the image's recipe. Its argv is never run: the gateway starts kernels. What the driver
    cannot do here is in its metadata, under `cannot`."""
    recipe = image.manifest.recipe
    return Kernelspec(
        name=recipe.name,
        spec={
            "argv": ["hypercell-kernel", "-f", "{connection_file}"],
            "env": {},
            "display_name": recipe.display_name,
            "language": recipe.language,
            "interrupt_mode": "message",
            "metadata": {
                "debugger": False,
                "hypercell": {
                    "image": image.files.digest,
                    "memory_mib": recipe.memory_mib,
                    "vcpus": recipe.vcpus,
                    "disk_mib": recipe.disk_mib,
                    "driver": driver.name,
                    "cannot": {
                        name: capability.why_not
                        for name, capability in vars(driver.capabilities).items()
                        if not capability.ok
                    },
                },
            },
        },
        resource_dir=RESOURCES,
    )
