"""`hypercell run`: a script or a notebook in a sandbox; a notebook's outputs are written back."""

from __future__ import annotations

import argparse
import ast
import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypercell.aio.sandbox import AsyncSandbox
from hypercell.cli.output import print_json, progress
from hypercell.cli.sandboxes import connect, create
from hypercell.errors import CodeTimeoutError, HypercellError, KernelDiedError
from hypercell.execution import Execution, ExecutionError, Result

EXIT_CODES = {"ok": 0, "error": 3, "timeout": 124}
# What is left of a status that a program chose.
EXIT_MASK = 0xFF
# A script may end with `exit(7)`, which in a kernel ends it, whatever the number.
PREPARATION = """\
import sys, warnings
sys.argv = {argv!r}
exit = quit = sys.exit
warnings.filterwarnings("ignore", "To exit: use", UserWarning)
del sys, warnings"""
# A sandbox of `run` is deleted so long after the command was last alive, so that one that was killed outright (SIGKILL,
# a power cut) leaves none for good. Long enough for a laptop that sleeps a while.
LEASE_S = 3600.0
# Two renewals may fail.
LEASE_RENEWAL_S = LEASE_S / 4
# What the kernel puts into tracebacks for terminals.
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What `--json` prints. status: ok, error or timeout. exit_code: what the command ends with. output: the notebook
    that was written.

    stdout, stderr, results: what a script gave; None for a notebook, which has them itself. skipped_characters: how
    much was printed that is not there, because it was too much to keep.
    """

    sandbox_id: str
    status: str
    exit_code: int
    error: ExecutionError | None
    cells: int
    output: str | None
    stdout: str | None
    stderr: str | None
    results: list[Result] | None
    skipped_characters: int


async def run(options: argparse.Namespace) -> int:
    path = Path(options.file)
    try:
        # Nothing else runs yet.
        content = sys.stdin.buffer.read() if options.file == "-" else path.read_bytes()  # noqa: ASYNC240
        text = content.decode()
    except OSError as error:
        raise HypercellError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise HypercellError(f"{path} cannot be read: it is not UTF-8 at byte {error.start}.") from error
    is_own = options.sandbox is None and not options.keep
    options.lifetime = LEASE_S if is_own else 0.0
    sandbox = await (create(options) if options.sandbox is None else connect(options, options.sandbox))
    try:
        async with _renewed(sandbox, is_wanted=is_own):
            if path.suffix == ".ipynb":
                report = await _run_notebook(sandbox, text, options)
            else:
                report = await _run_script(sandbox, text, options)
    finally:
        await (sandbox.kill() if is_own else sandbox.close())
    if options.json:
        print_json(report)
    elif options.keep:
        print(f"The sandbox goes on: {sandbox.id}", file=sys.stderr)
    return report.exit_code


@asynccontextmanager
async def _renewed(sandbox: AsyncSandbox, *, is_wanted: bool) -> AsyncIterator[None]:
    """Puts the sandbox's end off for as long as the block goes on."""

    async def renew() -> None:
        while True:
            await asyncio.sleep(LEASE_RENEWAL_S)
            # One that does not get through is tried again next time; whether the sandbox is there the code finds out.
            with suppress(HypercellError):
                await sandbox.set_timeout(LEASE_S)

    task = asyncio.create_task(renew()) if is_wanted else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _run_script(sandbox: AsyncSandbox, text: str, options: argparse.Namespace) -> RunReport:
    # In one message with the script's own code line numbers would be wrong.
    await sandbox.run_code(PREPARATION.format(argv=[options.file, *options.arguments]))
    show = not options.json
    status, execution = await _run_code(sandbox, text, options.timeout, show=show)
    exit_code = EXIT_CODES[status]
    if execution.error is not None and execution.error.name == "SystemExit":
        exit_code = await _chosen_exit(sandbox, execution)
        status = "error" if exit_code else "ok"
    elif show and execution.error is not None:
        text = execution.error.traceback or execution.error.name
        print(text if sys.stderr.isatty() else COLOURS.sub("", text), file=sys.stderr)
    return RunReport(
        sandbox_id=sandbox.id,
        status=status,
        exit_code=exit_code,
        error=execution.error if exit_code else None,
        cells=1,
        output=None,
        stdout=execution.stdout,
        stderr=execution.stderr,
        results=execution.results,
        skipped_characters=execution.skipped_characters,
    )


async def _chosen_exit(sandbox: AsyncSandbox, execution: Execution) -> int:
    """The status that a script chose with `sys.exit`, as Python has it: what is no number is printed, and is 1."""
    asked = await sandbox.run_code("__import__('sys').last_value.code")
    try:
        chosen = None if asked.text is None else ast.literal_eval(asked.text)
    except (ValueError, SyntaxError):
        chosen = execution.error and execution.error.value
    if isinstance(chosen, int | None):
        return (chosen or 0) & EXIT_MASK
    print(chosen, file=sys.stderr)
    return 1


async def _run_code(sandbox: AsyncSandbox, code: str, timeout_s: float | None, *, show: bool) -> tuple[str, Execution]:
    def stdout(text: str) -> None:
        print(text, end="", flush=True)

    def stderr(text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)

    def result(found: Result) -> None:
        print(found, flush=True)

    try:
        execution = await sandbox.run_code(
            code,
            timeout_s=timeout_s,
            on_stdout=stdout if show else None,
            on_stderr=stderr if show else None,
            on_result=result if show else None,
        )
    except CodeTimeoutError as error:
        print(f"hypercell: {error}", file=sys.stderr)
        return "timeout", error.execution or Execution()
    except KernelDiedError as error:
        print(f"hypercell: {error}", file=sys.stderr)
        return "error", error.execution or Execution()
    return ("ok" if execution.error is None else "error"), execution


async def _run_notebook(sandbox: AsyncSandbox, text: str, options: argparse.Namespace) -> RunReport:
    notebook = _parsed(text, options.file)
    target = Path(options.output or options.file)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        cell["outputs"], cell["execution_count"] = [], None
    status, error, count, skipped = "ok", None, 0, 0
    try:
        for number, cell in enumerate(cells, start=1):
            async with progress(f"Cell {number} of {len(cells)}"):
                state, execution = await _run_code(sandbox, "".join(cell["source"]), options.timeout, show=False)
            cell["outputs"], cell["execution_count"] = execution.outputs, execution.execution_count
            count = number
            if execution.skipped_characters:
                skipped += execution.skipped_characters
                note = f"hypercell: {execution.skipped_characters} more characters were printed and are left out\n"
                cell["outputs"].append({"output_type": "stream", "name": "stderr", "text": [note]})
            if state != "ok" and status == "ok":
                status, error = state, execution.error
                if not options.json:
                    told = f"{error.name}: {error.value}" if error else "it has no end of its own"
                    print(f"hypercell: cell {number} failed: {told}", file=sys.stderr)
            if state != "ok" and not options.allow_errors:
                break
    finally:
        # Also after Ctrl-C: what ran is worth keeping.
        _write(target, notebook)
    if not options.json:
        print(f"{count} of {len(cells)} cells ran; the outputs are in {target}", file=sys.stderr)
    return RunReport(
        sandbox_id=sandbox.id,
        status=status,
        exit_code=EXIT_CODES[status],
        error=error,
        cells=count,
        output=str(target),
        stdout=None,
        stderr=None,
        results=None,
        skipped_characters=skipped,
    )


def _parsed(text: str, name: str) -> dict[str, Any]:
    try:
        notebook = json.loads(text)
        if notebook["nbformat"] != 4:
            raise HypercellError(f"{name} has the format {notebook['nbformat']}; `jupyter nbconvert` makes it 4.")
        if not all(isinstance(cell["source"], str | list) for cell in notebook["cells"]):
            raise TypeError("a cell has no source")
    except (ValueError, KeyError, TypeError) as error:
        raise HypercellError(f"{name} is no notebook: {error}") from error
    return dict(notebook)


def _write(target: Path, notebook: dict[str, Any]) -> None:
    """Whole or not at all."""
    part = target.with_name(f".{target.name}.part")
    part.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(target)
