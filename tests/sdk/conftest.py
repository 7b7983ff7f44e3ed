"""The gateway as the SDK finds it (by environment), and sandboxes to share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hypercell import Sandbox
from tests.gateways import RunningGateway


@pytest.fixture(scope="session", autouse=True)
def environment(request: pytest.FixtureRequest) -> Iterator[None]:
    """HYPERCELL_URL and HYPERCELL_TOKEN for tests that use the shared gateway, here and in programs they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HYPERCELL_URL", raising=False)
        patch.delenv("HYPERCELL_TOKEN", raising=False)
        yield


@pytest.fixture(scope="session")
def at_gateway(environment: None, gateway: RunningGateway) -> Iterator[RunningGateway]:
    """The shared gateway, which the SDK finds from now on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYPERCELL_URL", gateway.url)
        patch.setenv("HYPERCELL_TOKEN", gateway.token)
        yield gateway


@pytest.fixture(scope="module")
def sandbox(at_gateway: RunningGateway) -> Iterator[Sandbox]:
    """One sandbox for the tests of a module, which leave it usable."""
    with Sandbox.create(name="shared", checkpoints="off") as sandbox:
        yield sandbox
