"""jupyter_kernel_test on a kernel in a machine, through the gateway and jupyter_server's own gateway client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from jupyter_core.utils import run_sync
from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.gateway.managers import GatewayKernelClient, GatewayKernelManager

from tests.jupyter.kernel_suite import PythonKernelSuite


class BlockingGatewayKernelClient(GatewayKernelClient):
    """The suite calls `get_shell_msg` as a plain function."""

    def get_shell_msg(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        reply: dict[str, Any] = run_sync(self.shell_channel.get_msg)(*args, **kwargs)
        return reply


class TestKernelThroughGateway(PythonKernelSuite):
    __test__ = True

    @classmethod
    def setUpClass(cls) -> None:
        """Replaced by the fixture, which can ask for the gateway."""

    @classmethod
    def tearDownClass(cls) -> None:
        """Replaced by the fixture."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def kernel(cls, gateway_client: GatewayClient) -> Iterator[None]:
        manager = GatewayKernelManager()
        run_sync(manager.start_kernel)(kernel_name="python3")
        client = BlockingGatewayKernelClient(kernel_id=manager.kernel_id)
        run_sync(client.start_channels)()
        run_sync(client.wait_for_ready)(timeout=300)
        cls.km, cls.kc = manager, client
        yield
        client.stop_channels()
        run_sync(manager.shutdown_kernel)()
