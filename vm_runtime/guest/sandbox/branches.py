"""A cell that runs in children: `%%sandbox branch`, side by side, and `%%sandbox try`, which may become the parent."""

from __future__ import annotations

import contextlib
import html
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from IPython.display import display

from vm_runtime.guest.sandbox import identity, notebook
from vm_runtime.guest.sandbox.children import Child, Children, link
from vm_runtime.guest.sandbox.errors import ChildError, ChildTimeoutError, SandboxError
from vm_runtime.guest.sandbox.forking import end, offer, split, wait
from vm_runtime.guest.sandbox.host import ask
from vm_runtime.guest.sandbox.recording import Output, replay, run_recorded
from vm_runtime.guest.sandbox.rendering import Column, Columns

# The variable that has a branch's number, as `sandbox.index` does.
BRANCH_VARIABLE = "branch"


@dataclass(frozen=True, kw_only=True)
class BranchResult:
    """What a child reports of its run. error: one line, None if the cell ran through. score: the value of --by, if
    asked for and found."""

    outputs: list[Output]
    seconds: float
    error: str | None
    score: float | None


@dataclass(frozen=True, kw_only=True)
class BranchOptions:
    """keep_best: take over the state of the branch with the highest `by`. limit_s: for all branches together."""

    n: int
    name: str | None = None
    same_random: bool = False
    by: str | None = None
    keep_best: bool = False
    limit_s: float | None = None


def branch(ip: Any, cell: str, options: BranchOptions) -> None:
    """Run the cell in n children; show the outputs in columns; with `keep_best` continue as the best of them."""
    children = split(options.n, name=options.name, same_random=options.same_random, ends_with_cell_failure=False)
    if children is None:
        _run_branch(ip, cell, options)
        return
    ours = children if isinstance(children, Children) else Children([children])
    results: dict[int, BranchResult | str] = {
        child.index: str(child.error) for child in ours if child.error is not None
    }
    handle = display(_columns(ours, results, None), display_id=True)
    try:
        _collect(ours, results, options.limit_s, lambda: handle.update(_columns(ours, results, None)))
        best = _best(ours, results) if options.keep_best else None
        handle.update(_columns(ours, results, best))
    except BaseException:
        _kill(ours)
        raise
    if not options.keep_best:
        return
    _kill([child for child in ours if child is not best])
    if best is None:
        raise SandboxError("No branch ran through with a value for --by, so none was kept; nothing has changed here.")
    _become(best)


def try_cell(ip: Any, cell: str) -> None:
    """Run the cell in a child, and continue as that child if it succeeds; else show the error, with nothing changed."""
    child = split(1, name="try", same_random=True, ends_with_cell_failure=False)
    if child is None:
        result = _run(ip, cell, by=None)
        if result.error is not None:
            end("ok", result)
        elif offer("ok", None):
            replay(ip, result.outputs)
            return
        notebook.end_cell()
    assert isinstance(child, Child)
    try:
        failed = child.result()
    except BaseException:
        _kill([child])
        raise
    if failed is None:
        _become(child)
        return
    replay(ip, failed.outputs)
    print("The cell failed, so nothing has changed here.")


def _run_branch(ip: Any, cell: str, options: BranchOptions) -> None:
    """In a child. Returns only if this state has become the parent's."""
    ip.user_ns[BRANCH_VARIABLE] = identity.read().index
    result = _run(ip, cell, by=options.by)
    if not options.keep_best:
        end("ok", result)
    elif offer("ok", result):
        return
    notebook.end_cell()


def _run(ip: Any, cell: str, *, by: str | None) -> BranchResult:
    recording = run_recorded(ip, cell)
    error, score = recording.error, None
    if error is None and by is not None:
        try:
            score = float(eval(compile(by, "--by", "eval"), ip.user_ns))
        except Exception as problem:  # the user's expression
            text = f"--by {by}: {type(problem).__name__}: {problem}\n"
            recording.add({"output_type": "stream", "name": "stderr", "text": text})
    line = None if error is None else f"{error['ename']}: {error['evalue']}"
    return BranchResult(outputs=recording.outputs, seconds=recording.seconds, error=line, score=score)


def _collect(
    children: Sequence[Child], results: dict[int, BranchResult | str], limit_s: float | None, changed: Any
) -> None:
    """Wait for all children, and show each that has ended. Those that take too long are ended."""
    deadline_s = None if limit_s is None else time.monotonic() + limit_s
    running = [child for child in children if child.index not in results]
    while running:
        left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
        try:
            child = wait(running, timeout=left_s)
        except ChildTimeoutError:
            for late in running:
                results[late.index] = f"took longer than {limit_s:g} s and was ended"
            _kill(running)
            changed()
            return
        running.remove(child)
        try:
            results[child.index] = child.result()
        except (ChildError, SandboxError) as error:
            results[child.index] = str(error)
        changed()


def _best(children: Sequence[Child], results: dict[int, BranchResult | str]) -> Child | None:
    def score(child: Child) -> float:
        result = results.get(child.index)
        found = result.score if isinstance(result, BranchResult) and result.error is None else None
        return -math.inf if found is None or math.isnan(found) else found

    best = max(children, key=score)
    return best if score(best) > -math.inf else None


def _become(child: Child) -> None:
    """Continue as the child. Where it works, this state ends here, and the child's finishes the cell."""
    notebook.flush()
    ask("become", id=child.id)


def _kill(children: Sequence[Child]) -> None:
    for child in children:
        with contextlib.suppress(SandboxError):  # it has ended by itself
            child.kill()


def _columns(children: Sequence[Child], results: dict[int, BranchResult | str], best: Child | None) -> Columns:
    columns = []
    for child in children:
        result = results.get(child.index)
        title = f"branch {child.index}"
        if result is None:
            columns.append(Column(title=title, note=f"{link(child.id or '', child.url)} runs …"))
        elif isinstance(result, str):
            columns.append(Column(title=title, note=html.escape(result)))
        else:
            note = f"{result.seconds:.2f} s"
            note += f" · {result.score:g}" if result.score is not None else ""
            note += " · failed" if result.error is not None else ""
            kept = child is best
            note += " · kept" if kept else ""
            columns.append(Column(title=title, note=note, outputs=result.outputs, kept=kept))
    return Columns(columns)
