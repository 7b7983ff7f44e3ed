"""Becomes JupyterLab, set up to get its kernels from the gateway. Changes those settings and nothing else."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from hypercell.errors import MissingPackageError
from hypercell.locate import Gateway

REQUEST_TIMEOUT_S = 300
CONNECTION_CLASS = "hypercell.jupyter.connection.HypercellWebSocketConnection"


def run_lab(gateway: Gateway, arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by JupyterLab of the same Python environment. `arguments` are JupyterLab's own.

    Raises MissingPackageError.
    """
    for module, package in (("jupyterlab", "jupyterlab"), ("jupyter_server", "hypercell-sdk[jupyter]")):
        if importlib.util.find_spec(module) is None:
            raise MissingPackageError(
                f"{package} is not installed beside Hypercell in {sys.prefix}. "
                f"Install it with: {sys.executable} -m pip install '{package}'"
            )
    command = [
        *(sys.executable, "-m", "jupyterlab"),
        f"--GatewayClient.url={gateway.url}",
        f"--ServerApp.kernel_websocket_connection_class={CONNECTION_CLASS}",
        # The notebook's path, by which the gateway finds the kernel that it was left with.
        "--GatewayClient.allowed_envs=JPY_SESSION_NAME",
        # A kernel of a new size waits until its template has been booted; the default of 42 s may be too short.
        f"--GatewayClient.request_timeout={REQUEST_TIMEOUT_S}",
        *arguments,
    ]
    # By environment, since everyone on this machine can read a command line.
    environment = {**os.environ, "JUPYTER_GATEWAY_AUTH_TOKEN": gateway.token}
    os.execve(sys.executable, command, environment)
