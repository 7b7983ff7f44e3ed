"""A real JupyterLab and the few things that a person does in it, for tests in a browser. Knows no gateway's inside."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

SCREENSHOTS = Path(__file__).parents[2] / "artifacts" / "screenshots"

START_TIMEOUT_S = 60.0
# An emulated machine needs some ten seconds for its first plot; this is what a loaded CI host may add to it.
CELL_TIMEOUT_MS = 120_000
# For what the browser does by itself.
PAGE_TIMEOUT_MS = 60_000

LAB_TOKEN = "token-of-this-lab"


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A running JupyterLab server: its URL and the directory that it shows."""

    url: str
    directory: Path


@contextmanager
def running_lab(directory: Path, *, command: Sequence[str], environment: dict[str, str]) -> Iterator[Lab]:
    """Runs `command` (JupyterLab, or what starts it) with configuration and data of its own below `directory`.

    environment: in addition to the current one. The notebooks lie in `directory/notebooks`; a second JupyterLab in the
    same directory finds those of the first.
    """
    notebooks = directory / "notebooks"
    notebooks.mkdir(parents=True, exist_ok=True)
    # Whether to fetch news is a question that JupyterLab asks in a window above the notebook.
    notification = directory / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    notification.parent.mkdir(parents=True, exist_ok=True)
    notification.write_text('{"fetchNews": "false"}')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [
        *command,
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={notebooks}",
        f"--IdentityProvider.token={LAB_TOKEN}",
        # Nothing from outside: no update check, no list of extensions.
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
    ]
    own_environment = {
        **os.environ,
        **environment,
        "HOME": str(directory),
        "JUPYTER_CONFIG_DIR": str(directory / "config"),
        "JUPYTER_DATA_DIR": str(directory / "data"),
        "JUPYTER_RUNTIME_DIR": str(directory / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(directory / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(directory / "workspaces"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    log_path = directory / "lab.log"
    with log_path.open("wb") as log:
        server = subprocess.Popen(arguments, env=own_environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_serving(url, server, log_path)
        yield Lab(url=url, directory=notebooks)
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until_serving(url: str, server: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(f"{url}/api/status?token={LAB_TOKEN}", timeout=5).close()
            return
        except (urllib.error.URLError, OSError) as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"JupyterLab does not serve ({error}):\n{log_path.read_text()}") from error
        time.sleep(0.1)


@contextmanager
def running_browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        expect.set_options(timeout=PAGE_TIMEOUT_MS)  # instead of 5 s, which a busy host exceeds
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


class Notebook:
    """One notebook, open in one page."""

    def __init__(self, page: Page, name: str) -> None:
        self.page = page
        self.name = name
        self.panel = page.locator(".jp-NotebookPanel:visible")

    @classmethod
    def open(cls, browser: Browser, lab: Lab, name: str, *, kernelspec: str, cells: Sequence[str] = ("",)) -> Notebook:
        """Writes a notebook with these cells, opens it by its path and waits until its kernel is idle."""
        content = {
            "cells": [
                {
                    "cell_type": "code",
                    "id": f"cell-{number}",
                    "execution_count": None,
                    "metadata": {},
                    "outputs": [],
                    "source": source,
                }
                for number, source in enumerate(cells)
            ],
            "metadata": {"kernelspec": {"name": kernelspec, "display_name": kernelspec, "language": "python"}},
            "nbformat": 4,
            "nbformat_minor": 5,
        }
        (lab.directory / f"{name}.ipynb").write_text(json.dumps(content))
        return cls.open_file(browser, lab, name)

    @classmethod
    def open_file(cls, browser: Browser, lab: Lab, name: str) -> Notebook:
        """Opens the notebook that lies in the lab's directory as `name.ipynb`, and waits until its kernel is idle."""
        page = browser.new_page(viewport={"width": 1280, "height": 1400})
        page.goto(f"{lab.url}/lab/workspaces/{name}/tree/{name}.ipynb?token={LAB_TOKEN}")
        notebook = cls(page, name)
        notebook.panel.wait_for(timeout=PAGE_TIMEOUT_MS)
        notebook.wait_idle()
        return notebook

    def wait_idle(self) -> None:
        """Waits until the kernel is connected and idle. (The toolbar's circle says idle before there is a kernel.)"""
        self.wait_kernel_status("Idle", timeout_ms=CELL_TIMEOUT_MS)

    def wait_kernel_status(self, status: str, *, timeout_ms: int = PAGE_TIMEOUT_MS) -> None:
        expect(self.page.locator("#jp-main-statusbar")).to_contain_text(f"| {status}", timeout=timeout_ms)

    def cell(self, index: int) -> Locator:
        return self.panel.locator(".jp-Notebook .jp-CodeCell").nth(index)

    def output(self, index: int) -> Locator:
        return self.cell(index).locator(".jp-OutputArea-output")

    def start_cell(self, index: int) -> None:
        """Runs a cell without waiting for its end."""
        self.cell(index).locator(".cm-content").click()
        self.page.keyboard.press("Shift+Enter")

    def wait_cell_done(self, index: int, *, timeout_ms: int = CELL_TIMEOUT_MS) -> None:
        """Waits until the cell shows the number of its execution."""
        expect(self.prompt(index)).to_have_text(re.compile(r"^\[\d+\]:$"), timeout=timeout_ms)

    def prompt(self, index: int) -> Locator:
        return self.cell(index).locator(".jp-InputArea-prompt")

    def run_cell(self, index: int) -> Locator:
        """Runs a cell to its end; returns its outputs."""
        self.start_cell(index)
        self.wait_cell_done(index)
        return self.output(index)

    def type_in_cell(self, index: int, text: str) -> None:
        self.cell(index).locator(".cm-content").click()
        self.page.keyboard.type(text)

    def press_toolbar_button(self, name: str) -> None:
        self.panel.locator(f'[data-jp-item-name="{name}"]').click()

    def accept_dialog(self, *, title: str | None = None) -> None:
        dialog = self.page.locator(".jp-Dialog")
        if title is not None:
            expect(dialog.locator(".jp-Dialog-header")).to_contain_text(title, timeout=PAGE_TIMEOUT_MS)
        dialog.locator(".jp-mod-accept").click()
        expect(dialog).to_have_count(0)

    def screenshot(self, name: str) -> Path:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.page.screenshot(path=path)
        return path

    def close(self) -> None:
        self.page.close()
