"""One gateway for all fork tests, with small limits, and a parent for each module."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator

import pytest

from tests.gateways import STATE, RunningGateway, copy_state, running_gateway
from tests.state.sandboxes import Api

MAX_CHILDREN = 16
MAX_DEPTH = 4


@pytest.fixture(scope="package")
def fork_gateway(gateway: RunningGateway) -> Iterator[RunningGateway]:
    """Needs the shared gateway only for its template."""
    directory = copy_state(STATE.parent / f"fork-{secrets.token_hex(4)}")
    flags = ("--pool-size", "0", "--checkpoints", "off", "--no-stop-means-sleep")
    limits = ("--max-children", str(MAX_CHILDREN), "--max-depth", str(MAX_DEPTH))
    with running_gateway(directory, *flags, *limits) as running:
        yield running
        assert running.process.poll() is None, running.log.read_text()
    shutil.rmtree(directory)


@pytest.fixture
def api(fork_gateway: RunningGateway) -> Api:
    return Api(fork_gateway)
