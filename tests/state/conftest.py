"""A gateway for each module of these tests, on a state directory of its own."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateways import STATE, RunningGateway, copy_state, running_gateway
from tests.state.sandboxes import Api

# Cells are checkpointed where a test asks for it.
QUIET = ("--checkpoints", "off")


@pytest.fixture(scope="module")
def module_state_dir(gateway: RunningGateway) -> Iterator[Path]:
    """Needs the shared gateway only for its template."""
    directory = copy_state(STATE.parent / f"state-{secrets.token_hex(4)}")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def state_gateway(module_state_dir: Path) -> Iterator[RunningGateway]:
    with running_gateway(module_state_dir, "--pool-size", "0", *QUIET) as gateway:
        yield gateway
        assert gateway.process.poll() is None, gateway.log.read_text()


@pytest.fixture
def api(state_gateway: RunningGateway) -> Api:
    return Api(state_gateway)
