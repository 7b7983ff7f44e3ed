"""Limits on what a guest takes to answer: they end what waits, and stand still while its machine is paused."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from kernels.deadlines import Deadlines
from kernels.errors import MachineUnresponsiveError


async def test_what_is_not_answered_ends() -> None:
    with pytest.raises(MachineUnresponsiveError, match=r"did not answer kernel\.hold within"):
        async with Deadlines().within(0.01, "kernel.hold"):
            await asyncio.Event().wait()


async def test_a_pause_does_not_count_and_limits_begin_anew_after_it() -> None:
    deadlines, answered = Deadlines(), asyncio.Event()
    deadlines.pause()

    async def ask() -> None:
        async with deadlines.within(0.01, "files.read"):
            await answered.wait()

    before = asyncio.create_task(ask())
    assert not (await asyncio.wait([before], timeout=0.1))[0]
    deadlines.resume()
    with pytest.raises(MachineUnresponsiveError):
        await before
    deadlines.pause()
    again = asyncio.create_task(ask())
    await asyncio.sleep(0)
    answered.set()
    await again


async def test_nothing_is_asked_of_a_machine_that_is_known_not_to_answer() -> None:
    deadlines = Deadlines()
    deadlines.unresponsive_since = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    with pytest.raises(MachineUnresponsiveError, match="since 03:04:05"):
        async with deadlines.within(None, "exec.start"):
            raise AssertionError
    deadlines.unresponsive_since = None
    async with deadlines.within(None, "exec.start"):
        pass


async def test_a_time_limit_of_the_caller_s_own_stays_one() -> None:
    with pytest.raises(TimeoutError):
        async with Deadlines().within(60, "kernel.hold"):
            raise TimeoutError
