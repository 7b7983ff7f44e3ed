"""How a Python process starts in which a user's code will run: as a plain one, but with the image's packages."""

from __future__ import annotations

import sys
from pathlib import Path

# With -c the directory it starts in comes first in sys.path, as ''. It is taken out before anything is imported, since
# a file there may have a module's name; ipykernel puts it back. So is what the user has installed: a kernel is the
# image's ipykernel, whatever other version its user may want.
_START = """
import site, sys
path = [entry for entry in sys.path if entry]
sys.path[:] = [{code!r}, *(entry for entry in path if entry != site.getusersitepackages())]
from vm_runtime.guest.{module} import {function}
sys.path[:] = path
{function}()
"""


def python_command(module: str, function: str, *arguments: str) -> list[str]:
    """A command line that runs a function of a module of the guest's code; `arguments` are its sys.argv[1:]."""
    code = str(Path(__file__).parents[2])
    return [sys.executable, "-c", _START.format(code=code, module=module, function=function), *arguments]
