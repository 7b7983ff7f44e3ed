"""The warm pool: filled at any rate of starts, grown by demand, and without leaks. Its machines are values here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest

from kernels import pool as module
from kernels.pool import Pool
from kernels.templates import Template
from vm_runtime.snapshots.errors import SnapshotError
from vm_runtime.snapshots.manifest import Manifest

TEMPLATE = Template(digest="d", snapshot=cast(Manifest, None))


class FakeSpare:
    """looks: how often somebody looked whether it is dead."""

    def __init__(self) -> None:
        self.closed = False
        self.looks = 0
        self._dead = False

    @property
    def dead(self) -> bool:
        self.looks += 1
        return self._dead

    @dead.setter
    def dead(self, value: bool) -> None:
        self._dead = value

    async def close(self) -> None:
        self.closed = True


class Host:
    """What makes machines. errors: raised by the next ones."""

    def __init__(self) -> None:
        self.made: list[FakeSpare] = []
        self.room = True
        self.errors: list[Exception] = []
        self.may_make = asyncio.Event()
        self.may_make.set()

    async def make(self, template: Template) -> FakeSpare:
        await asyncio.sleep(0)
        await self.may_make.wait()
        if self.errors:
            raise self.errors.pop()
        self.made.append(FakeSpare())
        return self.made[-1]


@asynccontextmanager
async def filled(host: Host, *, size: int = 2, limit: int = 2) -> AsyncIterator[Pool[FakeSpare]]:
    pool = Pool(size=size, limit=limit, make=host.make, has_room=lambda: host.room)
    task = asyncio.create_task(pool.run())
    pool.keep(TEMPLATE)
    await until(lambda: pool.ready_count() == size)
    try:
        yield pool
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await pool.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110 (nothing tells)
            await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_INTERVAL_S", 0.01)
    monkeypatch.setattr(module, "RETRY_DELAY_S", 0.01)


async def test_steady_starts_find_a_warm_machine_each() -> None:
    host = Host()
    async with filled(host) as pool:
        given = []
        for _ in range(50):
            for _ in range(10):  # turns of the loop: no time at all
                await asyncio.sleep(0)
            given.append(pool.take(TEMPLATE))
    assert None not in given
    assert len(set(map(id, given))) == 50


async def test_what_was_missing_for_want_of_room_is_made_when_there_is_room() -> None:
    host = Host()
    async with filled(host) as pool:
        host.room = False
        assert pool.take(TEMPLATE) and pool.take(TEMPLATE)
        assert pool.take(TEMPLATE) is None
        host.room = True
        await until(lambda: pool.ready_count() == 2)


async def test_a_dead_machine_is_neither_given_out_nor_left() -> None:
    host = Host()
    async with filled(host) as pool:
        first, second = host.made
        first.dead = True
        assert pool.take(TEMPLATE) is second
        await until(lambda: first.closed and pool.ready_count() == 2)
        resting = host.made[-1]
        resting.dead = True
        await until(lambda: resting.closed and pool.ready_count() == 2)
    assert all(spare.closed for spare in host.made if spare is not second)
    assert not second.closed


async def test_what_is_made_while_the_pool_looks_at_the_others_is_kept() -> None:
    host = Host()
    async with filled(host) as pool:
        host.may_make.clear()
        assert pool.take(TEMPLATE) is host.made[0]
        resting, looks = host.made[1], host.made[1].looks
        await until(lambda: resting.looks > looks + 4)
        host.may_make.set()
        await until(lambda: pool.ready_count() == 2)
    assert len(host.made) == 3


@pytest.mark.parametrize("error", [SnapshotError("damaged"), OSError("full"), ZeroDivisionError()])
async def test_a_refill_that_fails_is_tried_again(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    host = Host()
    async with filled(host) as pool:
        host.errors = [error]
        pool.take(TEMPLATE)
        await until(lambda: pool.ready_count() == 2)
    assert "could not be refilled" in caplog.text


async def test_one_that_cannot_be_ended_does_not_end_the_pool(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    host = Host()
    async with filled(host, size=1, limit=1) as pool:
        monkeypatch.setattr(host.made[0], "close", fail)
        host.made[0].dead = True
        await until(lambda: "could not be ended" in caplog.text and pool.ready_count() == 1)


async def test_it_grows_while_starts_find_it_empty_and_shrinks_when_that_was_not_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = Host()
    async with filled(host, size=2, limit=4) as pool:
        taken = [pool.take(TEMPLATE) for _ in range(9)]
        assert sum(spare is not None for spare in taken) == 2
        await until(lambda: pool.ready_count() == 4)
        monkeypatch.setattr(module, "SHRINK_AFTER_S", 0.0)
        await until(lambda: pool.ready_count() == 2 and sum(spare.closed for spare in host.made) == 2)


async def test_a_pool_of_size_0_keeps_nothing() -> None:
    host = Host()
    async with filled(host, size=0, limit=4) as pool:
        assert pool.take(TEMPLATE) is None
        await asyncio.sleep(0.02)  # two looks: nothing happens
        assert host.made == []
