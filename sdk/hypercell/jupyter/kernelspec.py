"""Installs, lists and removes the kernelspecs through which Jupyter applications find the provisioner.

Needs no running gateway: the kernelspec names a template, and the provisioner looks for the gateway when it is used.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpecManager

from hypercell.errors import HypercellError, UnsupportedError

# The entry point's name in pyproject.toml.
PROVISIONER_NAME = "hypercell-provisioner"

RESOURCES = Path(__file__).parent / "resources"


@dataclass(frozen=True, kw_only=True)
class InstalledKernelspec:
    """A kernelspec of ours: its name, its directory, and the template it starts (empty: the gateway's default)."""

    name: str
    directory: Path
    template: str


def kernel_json(*, display_name: str, template: str) -> dict[str, Any]:
    """The content of `kernel.json`. `argv` is run only by applications that know no provisioners; it says so."""
    return {
        "argv": ["hypercell", "kernel", "-f", "{connection_file}"],
        "display_name": display_name,
        "language": "python",
        # The provisioner has the gateway interrupt the kernel. A message on the control channel would do it, too, but
        # jupyter_console takes its `idle` for that of the cell, and then sees no more questions.
        "interrupt_mode": "signal",
        "metadata": {
            "debugger": True,
            "kernel_provisioner": {"provisioner_name": PROVISIONER_NAME, "config": {"template": template}},
        },
    }


def install(*, name: str, display_name: str, template: str, user: bool, prefix: str | None) -> Path:
    """Writes kernel.json and the logos; an older one of this name is replaced. Returns the directory.

    user: for this user; else prefix: below that directory; else for everyone. Raises HypercellError.
    """
    with tempfile.TemporaryDirectory() as directory:
        content = kernel_json(display_name=display_name, template=template)
        (Path(directory) / "kernel.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for logo in RESOURCES.iterdir():
            shutil.copy(logo, directory)
        try:
            return Path(KernelSpecManager().install_kernel_spec(directory, name, user=user, prefix=prefix))
        except PermissionError as error:
            raise HypercellError(f"{error.filename} cannot be written. Use --user or --sys-prefix.") from error
        except (OSError, ValueError) as error:
            raise HypercellError(str(error)) from error


def installed() -> list[InstalledKernelspec]:
    """All kernelspecs, wherever Jupyter looks, that use the provisioner."""
    found = []
    for name, directory in sorted(KernelSpecManager().find_kernel_specs().items()):
        try:
            content = json.loads((Path(directory) / "kernel.json").read_text(encoding="utf-8"))
            provisioner = content["metadata"]["kernel_provisioner"]
            ours = provisioner["provisioner_name"] == PROVISIONER_NAME
        except (OSError, ValueError, KeyError, TypeError):
            # Other people's kernelspecs, broken ones among them, are none of our business.
            continue
        if ours:
            template = str(provisioner.get("config", {}).get("template", ""))
            found.append(InstalledKernelspec(name=name, directory=Path(directory), template=template))
    return found


def remove(*, name: str) -> Path:
    """Removes a kernelspec of ours. Returns the directory it had. Raises HypercellError, UnsupportedError."""
    for kernelspec in installed():
        if kernelspec.name == name:
            try:
                shutil.rmtree(kernelspec.directory)
            except OSError as error:
                raise HypercellError(f"{kernelspec.directory} cannot be removed: {error.strerror}.") from error
            return kernelspec.directory
    if name in KernelSpecManager().find_kernel_specs():
        raise UnsupportedError(f"The kernelspec {name!r} is not Hypercell's; `jupyter kernelspec remove` removes it.")
    raise HypercellError(f"There is no kernelspec named {name!r}. `hypercell kernelspec list` shows those there are.")
