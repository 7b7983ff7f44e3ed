"""The version of the installed server."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("hypercell")
except PackageNotFoundError:
    # Run from a source tree that was not installed.
    VERSION = "0+source"
