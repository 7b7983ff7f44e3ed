"""The command `python -m benchmarks`: starts the gateways, runs the topics, writes JSON and the README's tables."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.host import describe_host, vmm_sentence
from benchmarks.messages import BenchmarkError
from benchmarks.peers import ROOT, given, hypercell, jupyter_kernel_gateway
from benchmarks.results import Line, Report, Row, from_json, to_json
from benchmarks.setup import Bench, Setup
from benchmarks.state_dirs import build_state_dir, template_snapshot
from benchmarks.table import markdown, update_readme
from benchmarks.topics import (
    arrivals,
    burst,
    endurance,
    fork,
    memory,
    output,
    removal,
    restore,
    round_trip,
    sdk,
    start,
    state,
)
from gateway.errors import GatewayError
from kernels.directories import default_state_dir
from kernels.errors import KernelsError
from vm_runtime.errors import VmRuntimeError

# Those that compare gateways, and are one table.
GATEWAY_TOPICS: dict[str, Callable[[Setup], Awaitable[list[Row]]]] = {
    "start": start.measure,
    "arrivals": arrivals.measure,
    "burst": burst.measure,
    "round_trip": round_trip.measure,
    "output": output.measure,
    "memory": memory.measure,
    "restore": restore.measure,
}
# Those that have nothing to do with gateways; each has a table of its own.
OWN_TOPICS: dict[str, Callable[[Bench], AsyncGenerator[list[Line], None]]] = {
    "state": state.measure,
    "endurance": endurance.measure,
    "fork": fork.measure,
    "sdk": sdk.measure,
    "removal": removal.measure,
}
WITHOUT_MACHINES = {"removal"}
TOPICS = (*GATEWAY_TOPICS, *OWN_TOPICS)
# Warm machines of the gateway "with a pool": what `hypercelld serve` keeps by default.
POOL_SIZE = 2
CACHE = ROOT / "benchmarks" / "cache"
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 when a measurement could not be made, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        if options.table_of is not None:
            path = options.table_of
            report = from_json(path)
        else:
            report, path = asyncio.run(_measured(options))
        tables = markdown(report, source=_shown(path))
        print("\n\n".join(tables.values()))
        if options.update_readme:
            update_readme(README, tables)
    except (BenchmarkError, GatewayError, KernelsError, VmRuntimeError, OSError, ValueError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("benchmarks: interrupted; everything it had started has ended", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few repetitions: minutes instead of half an hour")
    parser.add_argument("--only", action="append", choices=TOPICS, metavar="NAME", help=f"one of {', '.join(TOPICS)}")
    parser.add_argument("--update-readme", action="store_true", help="put the tables into README.md")
    parser.add_argument(
        "--table-of", type=Path, metavar="FILE", help="measure nothing, make the tables of these results"
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=default_state_dir(),
        help="where image and template are taken from, or built if they are missing (%(default)s)",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=CACHE,
        help="where what is built for the benchmark is kept: state, an image, a virtual environment (%(default)s)",
    )
    parser.add_argument("--url", help="measure this running Hypercell gateway instead of starting two")
    parser.add_argument("--token", default=os.environ.get("HYPERCELL_TOKEN", ""), help="its token (HYPERCELL_TOKEN)")
    return parser


async def _measured(options: argparse.Namespace) -> tuple[Report, Path]:
    """Runs the topics and writes the results' file. On SIGINT and SIGTERM all is cancelled, and so cleaned up."""
    task = asyncio.current_task()
    assert task is not None
    stopping = False

    def stop() -> None:
        # Once: a second signal must not break off the cleaning up that the first one began.
        nonlocal stopping
        if not stopping:
            stopping = True
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    names = options.only or TOPICS
    compared = [name for name in GATEWAY_TOPICS if name in names]
    if options.update_readme and compared and len(compared) < len(GATEWAY_TOPICS):
        raise BenchmarkError("--update-readme needs all topics of a table: one with lines missing would replace it.")
    rows: list[Row] = []
    lines: list[Line] = []
    state_dir: Path | None = None
    if set(names) - WITHOUT_MACHINES:
        state_dir = await build_state_dir(
            options.cache_dir, options.state_dir, scikit_learn="state" in names, progress=_progress
        )
    bench = Bench(
        state_dir=state_dir or options.state_dir, cache_dir=options.cache_dir, quick=options.quick, progress=_progress
    )
    try:
        async with AsyncExitStack() as stack:
            setup = await _set_up(options, bench, stack) if compared else None
            for name in compared:
                assert setup is not None
                _progress(f"{name} ...")
                rows += await GATEWAY_TOPICS[name](setup)
        for name in OWN_TOPICS:
            if name in names:
                _progress(f"{name} ...")
                async with aclosing(OWN_TOPICS[name](bench)) as found:
                    async for some in found:
                        lines += some
    except BaseException:
        if rows or lines:
            _progress(f"What was measured until then: {_write(_report(options, state_dir, rows, lines))}")
        raise
    report = _report(options, state_dir, rows, lines)
    return report, _write(report)


def _report(options: argparse.Namespace, state_dir: Path | None, rows: Sequence[Row], lines: Sequence[Line]) -> Report:
    """state_dir: None if nothing was measured with machines."""
    return Report(
        taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
        quick=options.quick,
        host=describe_host(vmm_sentence(template_snapshot(state_dir)) if state_dir is not None else None),
        rows=tuple(rows),
        lines=tuple(lines),
    )


def _write(report: Report) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}.json"
    path.write_text(to_json(report))
    return path


async def _set_up(options: argparse.Namespace, bench: Bench, stack: AsyncExitStack) -> Setup:
    unpooled = None
    if options.url is not None:
        pooled = await stack.enter_async_context(given(options.url, options.token))
    else:
        _progress("Hypercell with a pool ...")
        pooled = await stack.enter_async_context(
            hypercell(name="hypercell, pool", source_dir=bench.state_dir, pool_size=POOL_SIZE)
        )
        _progress("Hypercell without a pool ...")
        unpooled = await stack.enter_async_context(
            hypercell(name="hypercell, no pool", source_dir=bench.state_dir, pool_size=0)
        )
    _progress("jupyter_kernel_gateway ...")
    baseline = await stack.enter_async_context(jupyter_kernel_gateway())
    return Setup(
        state_dir=bench.state_dir,
        cache_dir=bench.cache_dir,
        quick=bench.quick,
        progress=bench.progress,
        baseline=baseline,
        pooled=pooled,
        unpooled=unpooled,
    )


def _shown(path: Path) -> str:
    absolute = path.absolute()
    return str(absolute.relative_to(ROOT)) if absolute.is_relative_to(ROOT) else str(absolute)


def _progress(text: str) -> None:
    print(f"benchmarks: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
