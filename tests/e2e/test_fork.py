"""Forks in notebooks: the examples, executed by nbclient and opened and run in JupyterLab in real Chromium."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import nbformat
import pytest
from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.gateway.managers import GatewayKernelManager
from nbclient import NotebookClient
from playwright.sync_api import Browser, Locator, expect

from tests.e2e.lab import CELL_TIMEOUT_MS, CHROMIUM, PAGE_TIMEOUT_MS, Lab, Notebook, running_browser, running_lab

EXAMPLES = Path(__file__).parents[2] / "examples" / "notebooks"
NAMES = ["fork", "branch", "tree"]

CELL_TIMEOUT_S = 300

needs_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is missing (apt-get install chromium)")


class RunningGateway(Protocol):
    url: str
    token: str


@pytest.fixture(scope="module")
def lab(gateway: RunningGateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab as it is, with the examples in its directory."""
    command = [sys.executable, "-m", "jupyterlab", f"--gateway-url={gateway.url}"]
    environment = {"JUPYTER_GATEWAY_AUTH_TOKEN": gateway.token}
    with running_lab(tmp_path_factory.mktemp("lab"), command=command, environment=environment) as lab:
        for name in NAMES:
            shutil.copy(EXAMPLES / f"{name}.ipynb", lab.directory)
        yield lab


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def gateway_client(gateway: RunningGateway) -> Iterator[None]:
    """jupyter_server's client of a gateway, set up as `jupyter lab --gateway-url` does it."""
    GatewayClient.clear_instance()
    GatewayClient.instance(url=gateway.url, auth_token=gateway.token)
    yield
    GatewayClient.clear_instance()


class PatientKernelManager(GatewayKernelManager):
    """jupyter_server's, with what its client asks for when a kernel takes over a second for its first reply."""

    async def _async_is_alive(self) -> bool:
        return bool(await self.is_alive())


def outputs_after(name: str) -> list[list[Any]]:
    """Executes an example; the outputs of its code cells. Any error of a cell fails."""
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    NotebookClient(
        notebook, kernel_manager_class=PatientKernelManager, timeout=CELL_TIMEOUT_S, startup_timeout=CELL_TIMEOUT_S
    ).execute()
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def run_all(browser: Browser, lab: Lab, name: str) -> Notebook:
    """Opens an example and runs its cells one after the other."""
    notebook = Notebook.open_file(browser, lab, name)
    for index in range(notebook.panel.locator(".jp-Notebook .jp-CodeCell").count()):
        notebook.run_cell(index)
    notebook.wait_idle()
    return notebook


def columns(output: Locator) -> Locator:
    """The frames of `%%sandbox branch`, once all branches have ended."""
    frames = output.locator('[style^="display:flex"] > div')
    expect(frames).to_have_count(4, timeout=CELL_TIMEOUT_MS)
    return frames


def test_nbclient_runs_the_forks(gateway_client: None) -> None:
    _, forks, links, failed, untouched, tried, total = outputs_after("fork")
    lines = "".join(output.text for output in forks).splitlines()
    whole = 1_000_000 * 999_999 // 2
    for index in range(3):
        assert lines[index].startswith(f"({index}, ")
        assert lines[index].endswith(f"'written before the fork', {whole - 1 - index})")
    assert lines[3].startswith("parent ") and lines[3].endswith(f" {whole}")
    assert len({re.findall(r"[\w-]+", line)[1] for line in lines}) == 4  # every machine has a host name of its own
    assert "what-if" in links[0].data["text/html"]
    assert "ZeroDivisionError" in "".join(output.get("text", "") for output in failed)
    assert untouched[0].data["text/plain"] == f"({whole}, True)"
    assert tried[0].data["text/plain"] == total[0].data["text/plain"] == str(whole)


def test_nbclient_runs_the_branches(gateway_client: None) -> None:
    _, branches, best, kept = outputs_after("branch")
    plots = re.findall(r'src="data:image/png;base64,([^"]+)"', branches[0].data["text/html"])
    assert len(plots) == len(set(plots)) == 4
    assert best[0].data["text/html"].count("· kept") == 1
    assert kept[0].data["text/plain"].startswith("(9, ")


def test_nbclient_runs_the_tree(gateway_client: None) -> None:
    children, _, tree, info, _, help_text = outputs_after("tree")
    assert children[0].data["text/html"].count("<button") == 2
    assert tree[0].data["text/html"].count("<button") == 5
    assert re.search(r"\n    \w+\S*  \w+  scout", tree[0].data["text/plain"]), "a child of a child"
    assert "running" in info[0].data["text/plain"]
    assert "--keep best" in help_text[0].data["text/plain"]


@needs_chromium
def test_a_click_on_a_fork_opens_a_notebook_on_it(browser: Browser, lab: Lab) -> None:
    notebook = run_all(browser, lab, "fork")
    notebook.screenshot("fork")
    notebook.cell(2).locator("button[data-commandlinker-command]").click()
    expect(notebook.page.locator(".lm-TabBar-tab.lm-mod-current", has_text="Untitled")).to_be_visible(
        timeout=PAGE_TIMEOUT_MS
    )
    notebook.wait_idle()
    notebook.type_in_cell(0, "sandbox.name, int(data.sum())")
    expect(notebook.run_cell(0)).to_contain_text("('what-if', 499999500000)")
    notebook.screenshot("fork-opened")
    notebook.close()


@needs_chromium
def test_branches_appear_side_by_side(browser: Browser, lab: Lab) -> None:
    notebook = run_all(browser, lab, "branch")
    notebook.page.keyboard.press("Control+b")  # the file browser away: room for four
    notebook.cell(1).locator(".jp-InputArea").scroll_into_view_if_needed()
    notebook.screenshot("branch")
    frames = columns(notebook.output(1))
    boxes = [frames.nth(index).bounding_box() for index in range(4)]
    assert len({box["y"] for box in boxes if box}) == 1, "side by side"
    plots = frames.locator("img")
    expect(plots).to_have_count(4)
    assert len({plots.nth(index).get_attribute("src") for index in range(4)}) == 4
    expect(columns(notebook.output(2)).filter(has_text="kept")).to_have_count(1)
    expect(notebook.output(3)).to_contain_text("(9, ")
    notebook.close()


@needs_chromium
def test_the_tree_shows_the_family(browser: Browser, lab: Lab) -> None:
    notebook = run_all(browser, lab, "tree")
    notebook.cell(1).locator(".jp-InputArea").scroll_into_view_if_needed()
    notebook.screenshot("tree")
    expect(notebook.output(2).locator("button")).to_have_count(5)
    expect(notebook.output(2)).to_contain_text("← here")
    expect(notebook.output(4)).to_contain_text("%sandbox fork [N]")
    notebook.close()
