"""The command `python -m benchmarks`: starts the gateways, runs the topics, writes JSON and the README's table."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.host import describe_host
from benchmarks.messages import BenchmarkError
from benchmarks.peers import ROOT, given, hypercell, jupyter_kernel_gateway
from benchmarks.results import Report, Row, from_json, to_json
from benchmarks.setup import Setup
from benchmarks.table import markdown, update_readme
from benchmarks.topics import burst, memory, output, restore, round_trip, start
from gateway.places import default_state_dir

TOPICS: dict[str, Callable[[Setup], Awaitable[list[Row]]]] = {
    "start": start.measure,
    "burst": burst.measure,
    "round_trip": round_trip.measure,
    "output": output.measure,
    "memory": memory.measure,
    "restore": restore.measure,
}
# Warm machines of the gateway "with a pool": what `hypercelld serve` keeps by default.
POOL_SIZE = 1
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


def main() -> int:
    """Exit status 0, 1 when a measurement could not be made, 130 after Ctrl-C."""
    options = _parser().parse_args()
    try:
        if options.table_of is not None:
            path = options.table_of
            report = from_json(path)
        else:
            report, path = asyncio.run(_measured(options))
        text = markdown(report, source=_shown(path))
        print(text)
        if options.update_readme:
            update_readme(README, text)
    except (BenchmarkError, OSError, ValueError) as error:
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
    parser.add_argument("--update-readme", action="store_true", help="put the table into README.md")
    parser.add_argument(
        "--table-of", type=Path, metavar="FILE", help="measure nothing, make the table of these results"
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=default_state_dir(),
        help="where image and template are taken from, or built if they are missing (%(default)s)",
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
    if options.update_readme and options.only:
        raise BenchmarkError("--update-readme needs a whole run: a table with some lines missing would replace it.")
    rows: list[Row] = []
    async with AsyncExitStack() as stack:
        setup = await _set_up(options, stack)
        for name in options.only or TOPICS:
            _say(f"{name} ...")
            rows += await TOPICS[name](setup)
    report = Report(
        taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
        quick=options.quick,
        host=describe_host(_vmm(options.state_dir)),
        rows=tuple(rows),
    )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}.json"
    path.write_text(to_json(report))
    return report, path


async def _set_up(options: argparse.Namespace, stack: AsyncExitStack) -> Setup:
    if options.url is not None:
        pooled, unpooled = await stack.enter_async_context(given(options.url, options.token)), None
    else:
        _say("Hypercell with a pool ... (builds image and template where they are missing)")
        pooled = await stack.enter_async_context(
            hypercell(name="hypercell, pool", source_dir=options.state_dir, pool_size=POOL_SIZE)
        )
        _say("Hypercell without a pool ...")
        unpooled = await stack.enter_async_context(
            hypercell(name="hypercell, no pool", source_dir=options.state_dir, pool_size=0)
        )
    _say("jupyter_kernel_gateway ...")
    baseline = await stack.enter_async_context(jupyter_kernel_gateway())
    return Setup(
        baseline=baseline,
        pooled=pooled,
        unpooled=unpooled,
        state_dir=options.state_dir,
        quick=options.quick,
        say=_say,
    )


def _vmm(state_dir: Path) -> str | None:
    try:
        return restore.newest_template(state_dir / "templates").vmm
    except BenchmarkError:
        return None


def _shown(path: Path) -> str:
    absolute = path.absolute()
    return str(absolute.relative_to(ROOT)) if absolute.is_relative_to(ROOT) else str(absolute)


def _say(text: str) -> None:
    print(f"benchmarks: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
