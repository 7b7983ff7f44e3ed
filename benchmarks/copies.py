"""Ways to a second kernel in the state of a first one, each timed, weighed, and asked what it has of that state."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.lab import Lab
from benchmarks.local_kernels import local_kernel
from benchmarks.messages import CellError
from benchmarks.notebooks import FRAME, LIVE, RANDOM, Notebook, together
from benchmarks.processes import memory_of
from benchmarks.raw_zmq import RawKernel

NOTEBOOKS: tuple[Notebook, ...] = (FRAME, *LIVE, RANDOM)
CLIENT = "a connection of its own for clients"
# What pickle is asked to carry over: all that the notebooks' cells made.
NAMES = (
    "df", "file", "head", "squares", "numbers", "sum_", "tick", "ticks", "thread", "factor", "times", "db", "token",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Copy:
    """ready_ms: from the call until the second kernel answered. standstill_ms: of the first one. unique_mib: memory
    that the second shares with no one. survived: by what was looked for, "yes" or what came instead."""

    ready_ms: float
    standstill_ms: float
    unique_mib: float
    survived: Mapping[str, str]


async def by_sandbox_fork(lab: Lab, template: str, *, settle: bool) -> Copy:
    """settle: only when the 500 MB have become a base in the background, which the children then share."""
    async with lab.sandbox(template) as (sandbox_id, kernel):
        await _run(kernel)
        # As after every cell by default.
        await lab.take(sandbox_id)
        if settle:
            await lab.settled()
        pause_ms = (await lab.split(sandbox_id, count=1)).pause_ms
        began = perf_counter()
        (child,) = await lab.children_of(sandbox_id, count=1)
        try:
            async with lab.connected(child.id) as copy:
                ready_ms = 1000 * (perf_counter() - began)
                memory = memory_of(lab.pid(child.id))
                return await _copy(copy.ask, kernel, ready_ms, pause_ms, memory.unique_mib)
        finally:
            await lab.delete(child.id)


async def by_sandbox_replay(lab: Lab, template: str) -> Copy:
    async with lab.sandbox(template) as (_, kernel):
        await _run(kernel)
        began = perf_counter()
        async with lab.sandbox(template) as (copy_id, copy):
            await _run(copy)
            ready_ms = 1000 * (perf_counter() - began)
            memory = memory_of(lab.pid(copy_id))
            return await _copy(copy.ask, kernel, ready_ms, 0.0, memory.unique_mib)


async def by_replay(python: Path, home: Path) -> Copy:
    async with local_kernel(python, home) as original:
        await _run(original.client)
        began = perf_counter()
        async with local_kernel(python, home) as copy:
            await _run(copy.client)
            ready_ms = 1000 * (perf_counter() - began)
            memory = memory_of(copy.pid)
            return await _copy(copy.client.ask, original.client, ready_ms, 0.0, memory.unique_mib)


async def by_pickle(python: Path, home: Path) -> Copy:
    """Variable by variable, since one that cannot be pickled fails a whole dictionary."""
    directory = home / "pickles"
    directory.mkdir()
    async with local_kernel(python, home) as original:
        await _run(original.client)
        began = perf_counter()
        await original.client.ask("0", after=_PICKLE.format(names=NAMES, directory=str(directory)))
        standstill_ms = 1000 * (perf_counter() - began)
        async with local_kernel(python, home) as copy:
            await copy.client.ask("0", after=_UNPICKLE.format(directory=str(directory)))
            ready_ms = 1000 * (perf_counter() - began)
            memory = memory_of(copy.pid)
            return await _copy(copy.client.ask, original.client, ready_ms, standstill_ms, memory.unique_mib)


_PICKLE = """
import pathlib, pickle
for _name in {names!r}:
    try:
        with (pathlib.Path({directory!r}) / _name).open("wb") as _target:
            pickle.dump(globals()[_name], _target, protocol=5)
    except Exception:
        (pathlib.Path({directory!r}) / _name).unlink()
"""
_UNPICKLE = """
import pathlib, pickle, time
for _path in sorted(pathlib.Path({directory!r}).iterdir()):
    try:
        with _path.open("rb") as _source:
            globals()[_path.name] = pickle.load(_source)
    except Exception:
        pass
"""


async def by_os_fork(python: Path, home: Path) -> Copy:
    """The child evaluates the probes itself, since no client can reach it, and stays until the kernel ends."""
    async with local_kernel(python, home) as original:
        await _run(original.client)
        probes = {notebook.title: notebook.probe for notebook in NOTEBOOKS}
        answer = await original.client.ask("_answer", after=_OS_FORK.format(probes=probes))
        memory = memory_of(int(answer["pid"]))

        async def ask(expression: str) -> Any:
            value, error = answer["values"][expression]
            if error is not None:
                raise CellError(error)
            return value

        copy = await _copy(
            ask, original.client, answer["ready_ms"], answer["standstill_ms"], memory.unique_mib, reachable=False
        )
        await original.client.ask("0", after="os.kill(_answer['pid'], 9); os.waitpid(_answer['pid'], 0)")
        return copy


_OS_FORK = """
import json, os, time
_began = time.perf_counter()
_ours, _theirs = os.pipe()
_pid = os.fork()
if _pid == 0:
    try:
        os.write(_theirs, b"1")
        _values = {{}}
        for _expression in {probes!r}.values():
            try:
                _values[_expression] = [eval(_expression, globals()), None]
            except Exception as _error:
                _values[_expression] = [None, f"{{type(_error).__name__}}: {{_error}}"]
        os.write(_theirs, json.dumps(_values).encode())
        os.close(_theirs)
        time.sleep(600)
    finally:
        os._exit(0)
_forked = time.perf_counter()
os.close(_theirs)
os.read(_ours, 1)
_answer = dict(pid=_pid, standstill_ms=1000 * (_forked - _began), ready_ms=1000 * (time.perf_counter() - _began))
with open(_ours, "rb") as _pipe:
    _answer["values"] = json.loads(_pipe.read())
"""


async def _run(kernel: RawKernel) -> None:
    for cell in together(NOTEBOOKS):
        await kernel.execute(cell)


async def _copy(
    ask: Callable[[str], Awaitable[Any]],
    original: RawKernel,
    ready_ms: float,
    standstill_ms: float,
    unique_mib: float,
    *,
    reachable: bool = True,
) -> Copy:
    """Asks the copy first, then the original: each goes on from the same state."""
    found = {notebook.title: await _answer(ask, notebook.probe) for notebook in NOTEBOOKS}
    expected = {notebook.title: await _answer(original.ask, notebook.probe) for notebook in NOTEBOOKS}
    survived = {title: _verdict(found[title], expected[title]) for title in found}
    return Copy(
        ready_ms=ready_ms,
        standstill_ms=standstill_ms,
        unique_mib=unique_mib,
        survived={**survived, CLIENT: "yes" if reachable else "no"},
    )


async def _answer(ask: Callable[[str], Awaitable[Any]], probe: str) -> tuple[Any, str]:
    try:
        return await ask(probe), ""
    except CellError as error:
        return None, str(error)


def _verdict(found: tuple[Any, str], expected: tuple[Any, str]) -> str:
    if found[1]:
        return f"no: {found[1].splitlines()[0][:70]}"
    return "yes" if found[0] == expected[0] else "no: another state"
