"""State that outlives everything, in JupyterLab in real Chromium: a killed gateway, a night, a slip, a closed lab."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, expect

from tests.e2e.lab import CELL_TIMEOUT_MS, CHROMIUM, PAGE_TIMEOUT_MS, Lab, Notebook, running_browser, running_lab
from tests.gateways import STATE, RunningGateway, copy_state, start_gateway

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is missing (apt-get install chromium)")

# A night, for tests.
IDLE_S = 4.0
LIMIT_S = 60.0
FLAGS = ("--pool-size", "1", "--idle-timeout-s", str(IDLE_S))


class Home:
    """A gateway of one's own, and how JupyterLab is started on it."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self.gateway = start_gateway(state_dir, *FLAGS)

    def lab_as_is(self, directory: Path) -> AbstractContextManager[Lab]:
        """JupyterLab as it is, with the flags that `hypercelld serve` prints."""
        command = [
            *(sys.executable, "-m", "jupyterlab", f"--gateway-url={self.gateway.url}"),
            "--GatewayClient.allowed_envs=JPY_SESSION_NAME",
        ]
        environment = {"JUPYTER_GATEWAY_AUTH_TOKEN": self.gateway.token}
        return running_lab(directory, command=command, environment=environment)

    def hypercell_lab(self, directory: Path) -> AbstractContextManager[Lab]:
        environment = {"HYPERCELL_URL": self.gateway.url, "HYPERCELL_TOKEN": self.gateway.token}
        return running_lab(directory, command=[sys.executable, "-m", "hypercell.cli", "lab"], environment=environment)

    def kill_and_restart_gateway(self) -> None:
        before = self.gateway
        before.kill()
        port = urlsplit(before.url).port
        assert port is not None
        self.gateway = start_gateway(self._state_dir, *FLAGS, token=before.token, port=port)

    def get(self, path: str) -> Any:
        headers = {"Authorization": f"token {self.gateway.token}"}
        request = urllib.request.Request(f"{self.gateway.url}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)

    def wait_all_asleep(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        while (states := {sandbox["state"] for sandbox in self.get("/api/sandboxes")}) != {"asleep"}:
            assert time.monotonic() < deadline, states
            time.sleep(0.2)

    def wait_checkpoint_of_newest(self) -> None:
        """Until the sandbox that was made last has a checkpoint: a moment, in which a person reads the output."""
        newest = max(self.get("/api/sandboxes"), key=lambda sandbox: str(sandbox["created_at"]))
        deadline = time.monotonic() + LIMIT_S
        while not self.get(f"/api/sandboxes/{newest['id']}/checkpoints"):
            assert time.monotonic() < deadline, newest
            time.sleep(0.2)


@pytest.fixture(scope="module")
def home(gateway: RunningGateway) -> Iterator[Home]:
    """gateway: sees to it that there is a template to copy."""
    state_dir = copy_state(STATE.parent / f"own-{secrets.token_hex(4)}")
    home = Home(state_dir)
    yield home
    home.gateway.stop()
    shutil.rmtree(state_dir)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def lab(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with home.hypercell_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


def open_notebook(browser: Browser, lab: Lab, name: str, *cells: str) -> Notebook:
    return Notebook.open(browser, lab, name, kernelspec="python3", cells=cells)


def test_a_killed_gateway_costs_no_variable(browser: Browser, lab: Lab, home: Home) -> None:
    notebook = open_notebook(browser, lab, "killed", "kept = [n * n for n in range(10)]\nlen(kept)", "sum(kept)")
    expect(notebook.run_cell(0)).to_contain_text("10")
    home.kill_and_restart_gateway()
    # `hypercell lab` keeps the cell until it is connected again; JupyterLab as it is loses what is sent before that.
    expect(notebook.run_cell(1)).to_contain_text("285")
    notebook.screenshot("state-gateway-killed")
    notebook.close()


def test_a_night_costs_no_variable(browser: Browser, lab: Lab, home: Home) -> None:
    notebook = open_notebook(browser, lab, "night", "kept = 'since yesterday'\nlen(kept)", "kept")
    expect(notebook.run_cell(0)).to_contain_text("15")
    home.wait_all_asleep()
    expect(notebook.run_cell(1)).to_contain_text("since yesterday")
    notebook.wait_idle()
    notebook.screenshot("state-night")
    notebook.close()


def test_undo_brings_back_what_was_deleted(browser: Browser, lab: Lab, home: Home) -> None:
    notebook = open_notebook(
        browser,
        lab,
        "undo",
        "import pandas as pd\ndf = pd.DataFrame({'moons': [0, 0, 1, 2]})\ndf['moons'].sum()",
        "del df",
        "%sandbox undo",
        "df['moons'].tolist()",
    )
    notebook.run_cell(0)
    home.wait_checkpoint_of_newest()
    notebook.run_cell(1)
    expect(notebook.run_cell(2)).to_contain_text("Went back")
    notebook.wait_idle()
    expect(notebook.run_cell(3)).to_contain_text("[0, 0, 1, 2]")
    notebook.screenshot("state-undo")
    notebook.close()


def test_a_notebook_that_is_opened_again_has_its_variables(browser: Browser, home: Home, tmp_path: Path) -> None:
    with home.lab_as_is(tmp_path) as first:
        notebook = open_notebook(browser, first, "reopened", "kept = 'from the first lab'\nlen(kept)", "kept")
        expect(notebook.run_cell(0)).to_contain_text("18")
        notebook.page.keyboard.press("Control+s")
        expect(notebook.page.locator(".lm-TabBar-tab.jp-mod-dirty")).to_have_count(0, timeout=PAGE_TIMEOUT_MS)
        notebook.close()
    # JupyterLab deletes its kernels when it ends; the gateway keeps those of notebooks asleep.
    with home.lab_as_is(tmp_path) as second:
        notebook = Notebook.open_file(browser, second, "reopened")
        expect(notebook.run_cell(1)).to_contain_text("from the first lab", timeout=CELL_TIMEOUT_MS)
        notebook.screenshot("state-reopened")
        notebook.close()
