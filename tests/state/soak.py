"""A soak: twenty sandboxes with random work, sleeps, forks, checkpoints and gateway kills, for as long as is asked.

    python -m tests.state.soak --minutes 60

Not part of `make test`. Each operation is checked against the model of test_chaos.py. The gateway is killed at random
in the first half, so that the second half shows one process for half of the time. Each minute a row of a Markdown
table: the gateway's memory, files, threads, processes, and the disk of its state directory. At the end all sandboxes
are deleted, and the last row is what remains.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from tests import leftovers
from tests.gateways import STATE, copy_state, running_gateway, start_gateway
from tests.state.sandboxes import processes_of, vmm_pids
from tests.state.test_chaos import Chaos, Model, account_for_files

WORKERS = 4
FLAGS = ("--pool-size", "0", "--idle-timeout-s", "90", "--max-sandboxes", "64")
COLUMNS = (
    "minute", "operations", "sandboxes", "awake", "RSS MiB", "descriptors", "threads", "processes", "snapshots",
    "disk MiB",
)  # fmt: skip


class Soak(Chaos):
    """`await run()`. Workers operate on sandboxes that no other worker has; a kill waits until all stand still."""

    flags = FLAGS

    def __init__(self, state_dir: Path, *, minutes: float, sandboxes: int) -> None:
        super().__init__(state_dir)
        self.max_sandboxes = sandboxes
        self._ends = time.monotonic() + 60 * minutes
        self._half = time.monotonic() + 30 * minutes
        self._taken: set[str] = set()
        self._done = 0
        self._started = time.monotonic()
        self._running = asyncio.Semaphore(WORKERS)

    async def run(self) -> None:
        self._print(*COLUMNS)
        self._print(*("---" for _ in COLUMNS))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(WORKERS):
                tasks.create_task(self._work())
            tasks.create_task(self._kill_now_and_then())
            tasks.create_task(self._watch())
        await self.check_all()
        for sandbox_id in list(self.models):
            await self.delete(sandbox_id)
        await self.no_orphans()
        self._row()

    async def _work(self) -> None:
        while time.monotonic() < self._ends:
            async with self._running:
                await self._operate()
            await asyncio.sleep(self.random.uniform(0, 0.5))  # a user who thinks, so that not all are always busy

    async def _operate(self) -> None:
        free = sorted(self.models.keys() - self._taken)
        if (len(self.models) < self.max_sandboxes and self.random.random() < 0.2) or not free:
            await self.create()
            self._done += 1
            return
        operations: dict[Callable[[str], Awaitable[None]], int] = {
            self.cell: 40, self.sleep: 4, self.wake: 2, self.checkpoint: 2, self.goto: 2, self.fork: 2, self.delete: 1,
        }  # fmt: skip
        if len(self.models) >= self.max_sandboxes:
            del operations[self.fork]
            operations[self.delete] = 4
        (operation,) = self.random.choices(list(operations), list(operations.values()))
        async with self._hold(self.random.choice(free)) as sandbox_id:
            self.log.append(f"{operation.__name__} {sandbox_id[:8]}")
            await operation(sandbox_id)
        self._done += 1

    @asynccontextmanager
    async def _hold(self, sandbox_id: str) -> AsyncIterator[str]:
        self._taken.add(sandbox_id)
        try:
            yield sandbox_id
        finally:
            self._taken.discard(sandbox_id)

    async def born(self, child_id: str, model: Model) -> None:
        async with self._hold(child_id):
            await super().born(child_id, model)

    async def _kill_now_and_then(self) -> None:
        while time.monotonic() < self._half:
            await self._sleep_until(min(self._half, time.monotonic() + self.random.uniform(60, 300)))
            for _ in range(WORKERS):
                await self._running.acquire()
            self.gateway.kill()
            self.gateway = start_gateway(self.state_dir, *self.flags)
            await self.check_all()
            for _ in range(WORKERS):
                self._running.release()

    async def _watch(self) -> None:
        while time.monotonic() < self._ends:
            self.traces.note()
            self._row()
            await self._sleep_until(min(self._ends, time.monotonic() + 60))

    @staticmethod
    async def _sleep_until(moment: float) -> None:
        await asyncio.sleep(max(0.0, moment - time.monotonic()))

    def _row(self) -> None:
        pid = self.gateway.process.pid
        process = Path(f"/proc/{pid}")
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        disk = sum(_blocks(path) for path in self.state_dir.rglob("*")) / 2**20
        self._print(
            f"{(time.monotonic() - self._started) / 60:.0f}", self._done, len(self.models),
            len(vmm_pids(self.gateway.run_dir)), f"{int(status['VmRSS'].split()[0]) / 1024:.0f}",
            len(list((process / "fd").iterdir())), status["Threads"].strip(), len(processes_of(self.state_dir)),
            len(list((self.state_dir / "snapshots/manifests").glob("*.json"))), f"{disk:.0f}",
        )  # fmt: skip

    @staticmethod
    def _print(*columns: object) -> None:
        print("| " + " | ".join(str(column) for column in columns) + " |", flush=True)


def _blocks(path: Path) -> int:
    """Bytes on disk of a file that has no other name: images and templates are shared by hard links."""
    with suppress(FileNotFoundError):
        found = path.lstat()
        return found.st_blocks * 512 if found.st_nlink == 1 else 0
    return 0


async def _soak(minutes: float, sandboxes: int) -> None:
    directory = copy_state(STATE.parent / f"soak-{secrets.token_hex(4)}")
    soak = Soak(directory, minutes=minutes, sandboxes=sandboxes)
    try:
        await soak.run()
        soak.gateway.stop()
        assert soak.traces.left(directory) == []
        account_for_files(directory)
        shutil.rmtree(directory)
    except BaseException:
        print("\n".join(soak.log[-40:]), file=sys.stderr)
        print(f"What it left is in {directory}", file=sys.stderr)
        leftovers.forget()
        raise
    finally:
        if soak.gateway.process.poll() is None:
            soak.gateway.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--sandboxes", type=int, default=20)
    options = parser.parse_args()
    with running_gateway(STATE, "--pool-size", "1"):
        pass  # image and template are there afterwards
    asyncio.run(_soak(options.minutes, options.sandboxes))
    leftovers.forget()


if __name__ == "__main__":
    main()
