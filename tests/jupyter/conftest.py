"""The gateway as Jupyter's programs are told of it: by environment, kernelspec, or jupyter_server's client."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import websocket
from jupyter_server.gateway.gateway_client import GatewayClient

from hypercell.jupyter import kernelspec
from tests.gateways import GatewayAddress

KERNELSPEC = "hypercell-test"


@pytest.fixture(scope="session")
def provisioner_environment(
    gateway: GatewayAddress, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """The variables with which a Jupyter application finds the kernelspec and the gateway. Also set in this process."""
    prefix = tmp_path_factory.mktemp("prefix")
    variables = {
        "JUPYTER_PATH": str(prefix / "share/jupyter"),
        "JUPYTER_RUNTIME_DIR": str(prefix / "runtime"),
        "HYPERCELL_URL": gateway.url,
        "HYPERCELL_TOKEN": gateway.token,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        kernelspec.install(
            name=KERNELSPEC, display_name="Hypercell (test)", template="", user=False, prefix=str(prefix)
        )
        yield {**os.environ, **variables}


@pytest.fixture
def kernel_name(provisioner_environment: dict[str, str]) -> str:
    """The name of an installed kernelspec that uses the provisioner."""
    return KERNELSPEC


@pytest.fixture(scope="class")
def gateway_client(gateway: GatewayAddress) -> Iterator[GatewayClient]:
    """jupyter_server's client of a gateway, set up as `jupyter lab --gateway-url` does it."""
    GatewayClient.clear_instance()
    client = GatewayClient.instance(url=gateway.url, auth_token=gateway.token)
    with pytest.MonkeyPatch.context() as patch:
        # GatewayKernelClient opens its WebSocket without the token (jupyter_server 2.21).
        connect = websocket.create_connection
        header = [f"Authorization: token {gateway.token}"]
        patch.setattr(websocket, "create_connection", lambda url, **options: connect(url, header=header, **options))
        yield client
    GatewayClient.clear_instance()


@pytest.fixture(scope="session")
def notebooks() -> Path:
    return Path(__file__).parents[1] / "notebooks"
