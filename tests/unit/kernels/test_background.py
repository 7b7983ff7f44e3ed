"""Work that nobody awaits: its errors are logged, and it ends with its owner."""

from __future__ import annotations

import asyncio
import logging

import pytest

from kernels.background import Background, all_logged


async def test_what_fails_is_logged_and_ends_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    background, failed, ended = Background(), asyncio.Event(), asyncio.Event()

    async def fail() -> None:
        failed.set()
        raise ValueError("lost")

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    background.spawn(wait())
    background.spawn(fail())
    await failed.wait()
    assert not ended.is_set()
    await background.end()
    assert ended.is_set()
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["lost"]
    # One that is ended before its first step leaves no coroutine behind.
    background.spawn(fail())
    await background.end()
    await background.end()


async def test_all_come_to_their_ends_though_one_fails(caplog: pytest.LogCaptureFixture) -> None:
    done = []

    async def work(number: int) -> None:
        await asyncio.sleep(0)
        if number == 0:
            raise ValueError("lost")
        await asyncio.sleep(0)
        done.append(number)

    with caplog.at_level(logging.ERROR):
        await all_logged(work(number) for number in range(3))
    assert done == [1, 2]
    assert len(caplog.records) == 1
