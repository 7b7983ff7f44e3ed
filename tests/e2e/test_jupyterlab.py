"""What a person does in JupyterLab, in real Chromium: JupyterLab unmodified, and as `hypercell lab` starts it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Protocol

import pytest
from playwright.sync_api import Browser, expect

from tests.e2e.lab import CELL_TIMEOUT_MS, CHROMIUM, PAGE_TIMEOUT_MS, Lab, Notebook, running_browser, running_lab

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is missing (apt-get install chromium)")

TABLE = """
import pandas as pd
pd.DataFrame({"planet": ["Mercury", "Venus"], "moons": [0, 0]})
"""

PLOT = """
%matplotlib inline
import matplotlib.pyplot as plt
plt.plot([1, 4, 9, 16]); plt.title("squares"); plt.show()
"""

LARGE_OUTPUT = (
    "from IPython.display import HTML, display; display(HTML('<p id=large>' + 'x' * (12 * 1024 * 1024) + '</p>'))"
)


class RunningGateway(Protocol):
    url: str
    token: str


@pytest.fixture(scope="module", params=["gateway-url", "hypercell-lab"])
def lab(
    request: pytest.FixtureRequest, gateway: RunningGateway, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lab]:
    """JupyterLab as it is, told the gateway's URL; and as `hypercell lab` starts it."""
    if request.param == "gateway-url":
        command = [sys.executable, "-m", "jupyterlab", f"--gateway-url={gateway.url}"]
        environment = {"JUPYTER_GATEWAY_AUTH_TOKEN": gateway.token}
    else:
        command = [sys.executable, "-m", "hypercell.cli", "lab"]
        environment = {"HYPERCELL_URL": gateway.url, "HYPERCELL_TOKEN": gateway.token}
    directory = tmp_path_factory.mktemp(request.param)
    with running_lab(directory, command=command, environment=environment) as lab:
        yield lab


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def open_notebook(request: pytest.FixtureRequest, browser: Browser, lab: Lab) -> Iterator[object]:
    """A function from cells to an open notebook. A picture of each is kept, whether the test passes or fails."""
    opened: list[Notebook] = []

    def open_with_cells(*cells: str) -> Notebook:
        name = request.node.name.replace("[", "-").replace("]", "")
        notebook = Notebook.open(browser, lab, name, kernelspec="python3", cells=cells)
        opened.append(notebook)
        return notebook

    yield open_with_cells
    for notebook in opened:
        notebook.screenshot(notebook.name)
        notebook.close()


class OpenNotebook(Protocol):
    def __call__(self, *cells: str) -> Notebook: ...


def test_cells_show_text_a_table_and_a_plot(open_notebook: OpenNotebook) -> None:
    notebook = open_notebook("print('hello from', __import__('sys').platform)\n6 * 7", TABLE, PLOT)
    text = notebook.run_cell(0)
    expect(text.first).to_have_text("hello from linux\n")
    expect(text.last).to_contain_text("42")
    table = notebook.run_cell(1).locator("table.dataframe")
    expect(table.locator("th", has_text="planet")).to_be_visible()
    expect(table.locator("td", has_text="Venus")).to_be_visible()
    plot = notebook.run_cell(2).locator("img")
    expect(plot).to_be_visible(timeout=CELL_TIMEOUT_MS)
    assert plot.evaluate("image => image.naturalWidth") > 100


def test_a_running_cell_shows_its_output_at_once(open_notebook: OpenNotebook) -> None:
    notebook = open_notebook("import time\nfor i in range(1000):\n    print('step', i, flush=True); time.sleep(0.2)")
    notebook.start_cell(0)
    expect(notebook.output(0)).to_contain_text("step 3", timeout=CELL_TIMEOUT_MS)
    expect(notebook.prompt(0)).to_have_text("[*]:")
    notebook.press_toolbar_button("interrupt")
    notebook.wait_cell_done(0)


def test_tab_completes_what_only_the_kernel_knows(open_notebook: OpenNotebook) -> None:
    notebook = open_notebook("word = 'abc'", "")
    notebook.run_cell(0)
    notebook.type_in_cell(1, "word.is")
    # JupyterLab takes Tab for indentation until it has seen that the cursor is behind a word.
    notebook.cell(1).locator(".jp-mod-completer-enabled").wait_for(timeout=PAGE_TIMEOUT_MS)
    notebook.page.keyboard.press("Tab")
    completer = notebook.page.locator(".jp-Completer:visible")
    expect(completer.locator(".jp-Completer-item", has_text="isidentifier")).to_be_visible(timeout=CELL_TIMEOUT_MS)
    notebook.page.keyboard.type("identifier")
    expect(completer.locator(".jp-Completer-item.jp-mod-active")).to_contain_text("isidentifier")
    notebook.page.keyboard.press("Enter")
    expect(notebook.cell(1).locator(".cm-content")).to_have_text("word.isidentifier")


def test_interrupts_an_endless_loop(open_notebook: OpenNotebook) -> None:
    notebook = open_notebook("kept = 'still here'\nprint('looping')\nwhile True: pass", "kept")
    notebook.start_cell(0)
    expect(notebook.output(0).last).to_contain_text("looping", timeout=CELL_TIMEOUT_MS)
    notebook.press_toolbar_button("interrupt")
    notebook.wait_cell_done(0)
    expect(notebook.output(0).last).to_contain_text("KeyboardInterrupt")
    expect(notebook.run_cell(1)).to_contain_text("still here")


def test_answers_input(open_notebook: OpenNotebook) -> None:
    notebook = open_notebook("name = input('Who are you? ')\nprint('Hello', name)")
    notebook.start_cell(0)
    field = notebook.cell(0).locator(".jp-Stdin-input")
    field.wait_for(timeout=CELL_TIMEOUT_MS)
    expect(notebook.cell(0).locator(".jp-Stdin-prompt")).to_have_text("Who are you? ")
    field.fill("Grace")
    field.press("Enter")
    notebook.wait_cell_done(0)
    expect(notebook.output(0).last).to_contain_text("Hello Grace")


def test_restarts_the_kernel(open_notebook: OpenNotebook) -> None:
    notebook = open_notebook(
        "value = 1\nopen('/tmp/kept', 'w').write('on disk')", "'value' in globals(), open('/tmp/kept').read()"
    )
    notebook.run_cell(0)
    notebook.press_toolbar_button("restart")
    notebook.accept_dialog()
    notebook.wait_idle()
    # A new process, and the machine with its files is the same.
    expect(notebook.run_cell(1)).to_contain_text("(False, 'on disk')")


def test_survives_a_crash_of_the_kernel(open_notebook: OpenNotebook) -> None:
    notebook = open_notebook("import os\nos._exit(1)", "'os' in globals(), 'alive again'")
    notebook.start_cell(0)
    notebook.accept_dialog(title="Kernel Restarting")
    notebook.wait_idle()
    expect(notebook.run_cell(1)).to_contain_text("(False, 'alive again')")


def test_a_page_reload_finds_the_kernel_again(open_notebook: OpenNotebook) -> None:
    notebook = open_notebook("kept = 'across the reload'", "kept")
    notebook.run_cell(0)
    notebook.page.keyboard.press("Control+s")
    expect(notebook.page.locator(".lm-TabBar-tab.jp-mod-dirty")).to_have_count(0, timeout=PAGE_TIMEOUT_MS)
    notebook.page.reload()
    notebook.panel.wait_for(timeout=PAGE_TIMEOUT_MS)
    notebook.wait_idle()
    expect(notebook.run_cell(1)).to_contain_text("across the reload")


def test_an_output_beyond_ten_mebibytes_arrives(open_notebook: OpenNotebook, request: pytest.FixtureRequest) -> None:
    if "gateway-url" in request.node.name:
        pytest.skip("jupyter_server's own relay ends at messages of 10 MiB; `hypercell lab` is what lifts this")
    notebook = open_notebook(LARGE_OUTPUT)
    output = notebook.run_cell(0).locator("#large")
    assert output.evaluate("element => element.textContent.length", timeout=CELL_TIMEOUT_MS) == 12 * 1024 * 1024
