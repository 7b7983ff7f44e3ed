"""Finds drivers by name: whatever installed package has an entry point `hypercell.drivers`, this one included.

Imports a driver only when it is asked for.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from vm_runtime.drivers.base import Driver
from vm_runtime.errors import DriverUnavailableError

GROUP = "hypercell.drivers"
DEFAULT_DRIVER = "qemu"


def driver_names() -> list[str]:
    """The names of all drivers that are installed."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def find_driver(name: str) -> type[Driver]:
    """The driver of that name. Errors: DriverUnavailableError."""
    for point in entry_points(group=GROUP, name=name):
        try:
            driver = point.load()
        except ImportError as error:
            raise DriverUnavailableError(f"The driver {name} ({point.value}) cannot be loaded: {error}") from error
        if not (isinstance(driver, type) and issubclass(driver, Driver)):
            raise DriverUnavailableError(f"{point.value} is no driver.")
        return driver
    installed = ", ".join(driver_names()) or "none (in a checkout: `make setup`)"
    raise DriverUnavailableError(f"There is no driver {name!r}; installed are: {installed}.")
