"""jupyter_kernel_test on a kernel in a machine, through jupyter_client and the provisioner."""

from __future__ import annotations

from collections.abc import Iterator

import jupyter_kernel_test
import pytest
from jupyter_client.manager import KernelManager, start_new_kernel

from tests.jupyter.conftest import KERNELSPEC
from tests.jupyter.kernel_suite import PythonKernelSuite


class TestKernelThroughProvisioner(PythonKernelSuite):
    __test__ = True

    @classmethod
    def setUpClass(cls) -> None:
        """Replaced by the fixture, which can ask for the gateway."""

    @classmethod
    def tearDownClass(cls) -> None:
        """Replaced by the fixture."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def kernel(cls, provisioner_environment: dict[str, str]) -> Iterator[None]:
        cls.km, cls.kc = start_new_kernel(kernel_name=KERNELSPEC, startup_timeout=300)
        yield
        cls.kc.stop_channels()
        cls.km.shutdown_kernel()


class TestIopubWelcomeThroughProvisioner(jupyter_kernel_test.IopubWelcomeTests):
    support_iopub_welcome = True

    @classmethod
    def setUpClass(cls) -> None:
        """Replaced by the fixture."""

    @classmethod
    def tearDownClass(cls) -> None:
        """Replaced by the fixture."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def kernel(cls, provisioner_environment: dict[str, str]) -> Iterator[None]:
        cls.km = KernelManager(kernel_name=KERNELSPEC)
        cls.km.start_kernel()
        cls.kc = cls.km.client()
        yield
        cls.kc.stop_channels()
        cls.km.shutdown_kernel()
