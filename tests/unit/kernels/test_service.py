"""What the service keeps of sandboxes: nothing of those that never existed, nothing of those that are gone."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from kernels.errors import UnknownSandboxError
from tests.unit.kernels.conftest import Service


async def test_nothing_is_kept_of_ids_that_name_no_sandbox(service: Service) -> None:
    for _ in range(100):
        with pytest.raises(UnknownSandboxError):
            await service.lifecycle.sleep(str(uuid.uuid4()))
        with pytest.raises(UnknownSandboxError):
            await service.checkpoints.goto(str(uuid.uuid4()), "1")
    assert not service.machines._locks


async def test_who_waits_for_a_sandbox_that_is_deleted_comes_after_the_others(service: Service) -> None:
    """The lock stays one lock, also when the sandbox is forgotten while it is held."""
    service.add("a")
    order = []

    async def use(name: str) -> None:
        async with service.machines.lock("a"):
            order.append(f"{name} begins")
            await asyncio.sleep(0)
            order.append(f"{name} ends")

    async with asyncio.TaskGroup() as group, service.machines.lock("a"):
        group.create_task(use("second"))
        await asyncio.sleep(0)
        await service.lifecycle.forget("a")
        group.create_task(use("third"))
        await asyncio.sleep(0)
        order.append("first ends")
    assert order == ["first ends", "second begins", "second ends", "third begins", "third ends"]
    assert not service.machines._locks
