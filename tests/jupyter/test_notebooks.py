"""Five notebooks, executed as people do: by nbclient through the gateway, by papermill through the provisioner."""

from __future__ import annotations

import base64
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.gateway.managers import GatewayKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

NAMES = ["data_frames", "plots", "long_loop", "an_error", "widgets"]

CELL_TIMEOUT_S = 300


def outputs_of(notebook: NotebookNode) -> list[list[NotebookNode]]:
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def text_of(outputs: list[NotebookNode], *, stream: str = "stdout") -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == stream)


def data_of(outputs: list[NotebookNode]) -> list[dict[str, Any]]:
    return [output.data for output in outputs if output.output_type in {"display_data", "execute_result"}]


def check_data_frames(notebook: NotebookNode) -> None:
    head, months, warmest, description = outputs_of(notebook)
    assert "<table" in data_of(head)[0]["text/html"]
    assert "2025-01-05" in data_of(head)[0]["text/plain"]
    assert data_of(months)[0]["text/html"].count("<tr") == 13
    assert text_of(warmest).startswith("warmest month:")
    assert "365" in data_of(description)[0]["text/plain"]


def check_plots(notebook: NotebookNode) -> None:
    lines, two, bars = outputs_of(notebook)
    for outputs in (lines, two):
        assert base64.b64decode(data_of(outputs)[0]["image/png"]).startswith(b"\x89PNG\r\n")
    assert data_of(bars)[0]["image/svg+xml"].rstrip().endswith("</svg>")


def check_long_loop(notebook: NotebookNode) -> None:
    fast, slow, progress, wide = outputs_of(notebook)
    assert text_of(fast).splitlines() == [f"line {i} of the loop" for i in range(5000)]
    assert text_of(slow).splitlines() == [f"step {i}" for i in range(10)]
    assert text_of(slow, stream="stderr").splitlines() == [f"aside {i}" for i in range(10)]
    assert data_of(progress)[0]["text/plain"] == "'100 %'"
    assert text_of(wide) == "x" * 1_000_000 + "\n"


def check_an_error(notebook: NotebookNode) -> None:
    _, error, after = outputs_of(notebook)
    assert error[-1].output_type == "error"
    assert error[-1].ename == "ZeroDivisionError"
    assert "divide" in "".join(error[-1].traceback)
    assert data_of(after)[0]["text/plain"] == "42"


def check_widgets(notebook: NotebookNode) -> None:
    comm_id = data_of(outputs_of(notebook)[1])[0]["text/plain"].strip("'")
    model = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"][comm_id]
    assert model["model_name"] == "IntSliderModel"
    assert model["state"]["value"] == 20


CHECKS = {
    "data_frames": check_data_frames,
    "plots": check_plots,
    "long_loop": check_long_loop,
    "an_error": check_an_error,
    "widgets": check_widgets,
}


class PatientKernelManager(GatewayKernelManager):
    """jupyter_server's (2.21), which fails an assertion where a kernel's first reply takes more than a second: it asks
    a provisioner, which a gateway's kernel does not have, whether it is alive."""

    async def _async_is_alive(self) -> bool:
        return bool(await self.is_alive())


@pytest.mark.parametrize("name", NAMES)
def test_nbclient_through_the_gateway(name: str, notebooks: Path, gateway_client: GatewayClient) -> None:
    notebook = nbformat.read(notebooks / f"{name}.ipynb", as_version=4)
    client = NotebookClient(
        notebook, kernel_manager_class=PatientKernelManager, timeout=CELL_TIMEOUT_S, startup_timeout=CELL_TIMEOUT_S
    )
    client.execute()
    CHECKS[name](notebook)


@pytest.mark.parametrize("name", NAMES)
def test_papermill_through_the_provisioner(name: str, notebooks: Path, kernel_name: str, tmp_path: Path) -> None:
    output = tmp_path / f"{name}.ipynb"
    # papermill reports every error, an expected one too, after it has run and saved the notebook.
    expected = (
        pytest.raises(PapermillExecutionError, match="ZeroDivisionError") if name == "an_error" else nullcontext()
    )
    with expected:
        papermill.execute_notebook(
            notebooks / f"{name}.ipynb",
            output,
            parameters={"with_buffers": True} if name == "widgets" else None,
            kernel_name=kernel_name,
            progress_bar=False,
            start_timeout=CELL_TIMEOUT_S,
            execution_timeout=CELL_TIMEOUT_S,
        )
    notebook = nbformat.read(output, as_version=4)
    if name == "widgets":
        # papermill has put a cell with our parameters behind the notebook's own.
        del notebook.cells[1]
        states = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
        buffers = [base64.b64decode(buffer["data"]) for state in states for buffer in state["buffers"]]
        assert buffers == [bytes(range(256)), b"\x00" * 100_000]
    CHECKS[name](notebook)
