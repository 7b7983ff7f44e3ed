"""Fixtures that every test may use: the shared gateway, and state directories for gateways of one's own."""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests import leftovers
from tests.gateways import STATE, RunningGateway, copy_state, running_gateway

# How long an example takes is the host's business.
settings.register_profile("hypercell", deadline=None)
settings.load_profile("hypercell")


def pytest_sessionstart() -> None:
    # A shell's background job ignores it, and so would the programs that tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    leftovers.sweep()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Image and template are made before the first test begins, whose time limit they would exceed on a busy host."""
    functions = [item for item in session.items if isinstance(item, pytest.Function)]
    if not session.config.option.collectonly and any("gateway" in each.fixturenames for each in functions):
        try:
            with running_gateway(STATE, "--pool-size", "0"):
                pass
        except AssertionError as error:
            pytest.exit(str(error), returncode=1)


def pytest_sessionfinish() -> None:
    leftovers.forget()


@pytest.fixture(scope="session")
def gateway() -> Iterator[RunningGateway]:
    """One gateway for all tests that only use it."""
    with running_gateway(STATE, "--pool-size", "1") as gateway:
        for sandbox_id in _sandboxes(gateway):  # of a run that was killed
            _call(gateway, "DELETE", f"/api/sandboxes/{sandbox_id}")
        yield gateway


@pytest.fixture(autouse=True)
def no_sandbox_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Deletes what a test made on the shared gateway: an idle emulated machine takes 4 % of a CPU from later tests."""
    if "gateway" not in request.fixturenames:
        yield
        return
    gateway: RunningGateway = request.getfixturevalue("gateway")
    before = _sandboxes(gateway)  # those of fixtures with a wider scope
    yield
    for sandbox_id in _sandboxes(gateway) - before:
        try:
            _call(gateway, "DELETE", f"/api/sandboxes/{sandbox_id}")
        except urllib.error.HTTPError as error:
            if error.code != 404:  # it has just ended by itself
                raise


def _sandboxes(gateway: RunningGateway) -> set[str]:
    return {sandbox["id"] for sandbox in json.loads(_call(gateway, "GET", "/api/sandboxes"))}


def _call(gateway: RunningGateway, method: str, path: str) -> bytes:
    headers = {"Authorization": f"token {gateway.token}"}
    with urllib.request.urlopen(urllib.request.Request(gateway.url + path, method=method, headers=headers)) as answer:
        body: bytes = answer.read()
    return body


@pytest.fixture
def state_dir(gateway: RunningGateway) -> Iterator[Path]:
    """A state directory of one's own, image and template included: for tests that kill gateways or fill disks."""
    directory = copy_state(STATE.parent / f"own-{secrets.token_hex(4)}")
    yield directory
    shutil.rmtree(directory)
