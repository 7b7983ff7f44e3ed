"""Fixtures that every test may use: the shared gateway, and state directories for gateways of one's own."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateways import STATE, RunningGateway, copy_state, running_gateway


@pytest.fixture(scope="session")
def gateway() -> Iterator[RunningGateway]:
    """One gateway for all tests that only use it. Builds image and template on the very first run."""
    with running_gateway(STATE, "--pool-size", "1") as gateway:
        yield gateway


@pytest.fixture
def state_dir(gateway: RunningGateway) -> Iterator[Path]:
    """A state directory of one's own, image and template included: for tests that kill gateways or fill disks."""
    directory = copy_state(STATE.parent / f"own-{secrets.token_hex(4)}")
    yield directory
    shutil.rmtree(directory)
