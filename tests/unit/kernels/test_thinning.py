"""Which checkpoints go: the oldest when they are too many or take too much, and all with their sandbox."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from kernels.checkpoints import MAX_CHECKPOINTS, too_many
from kernels.models import Checkpoint
from kernels.snapshots import pin_name
from tests.unit.kernels.conftest import LIMIT_S, Service, TestDriver, started_service
from tests.unit.snapshots.small_snapshots import publish
from vm_runtime.snapshots.store import Pin

WRITTEN_BYTES = 2_000_000
BUDGET_BYTES = 16 << 20


@pytest.mark.parametrize(
    ("freed", "loose", "budget_bytes", "gone"),
    [
        ([0], 0, 0, 0),
        ([0, 10, 20, 30], 3, 30, 0),
        ([0, 10, 20, 30], 3, 29, 1),
        ([0, 10, 20, 30], 3, 10, 2),
        # The first two lie on parts that the third needs, too.
        ([0, 0, 0, 30], 3, 29, 3),
        # Two have a name: they count, and stay.
        ([0, 10, 20, 30], 1, 20, 1),
        ([0, 10, 20, 30], 1, 5, 1),
        ([0] * 251, 250, 0, 250 - MAX_CHECKPOINTS),
        ([*range(251)], 250, 30, 220),
    ],
)
def test_the_fewest_go_that_are_enough(freed: list[int], loose: int, budget_bytes: int, gone: int) -> None:
    assert too_many(freed, loose=loose, budget_bytes=budget_bytes) == gone


def _bytes(checkpoints: Sequence[Checkpoint]) -> int:
    return sum(checkpoint.bytes for checkpoint in checkpoints)


async def test_what_takes_disk_is_thinned_out_whatever_took_it(state_dir: Path, driver: TestDriver) -> None:
    async with started_service(state_dir, driver, checkpoint_budget_mib=BUDGET_BYTES >> 20) as kernels:
        sandbox_id = await kernels.new()
        taken = []
        for name in (None, "kept", None, None, None, None, None):
            await kernels.run(sandbox_id, f"import os; open('big', 'wb').write(os.urandom({WRITTEN_BYTES}))")
            taken.append(await kernels.checkpoints.checkpoint(sandbox_id, name=name))
        assert all(checkpoint.bytes > WRITTEN_BYTES for checkpoint in taken)
        deadline = time.monotonic() + LIMIT_S
        # The newest is what the sandbox is in, and not counted.
        while _bytes((left := await kernels.checkpoints.all(sandbox_id))[:-1]) > BUDGET_BYTES:
            assert time.monotonic() < deadline, left
            await asyncio.sleep(0.05)
        # Of the others as many stay as are within the budget.
        assert left == [taken[1], *taken[1 - len(left) :]]
        *_, last_gone = (checkpoint for checkpoint in taken if checkpoint not in left)
        assert _bytes([*left[:-1], last_gone]) > BUDGET_BYTES


async def test_what_others_need_stays_when_a_sandbox_with_many_checkpoints_is_deleted(service: Service) -> None:
    store = service._store
    ids = [publish(store, number, layers=[number], disks=[number]).id for number in range(300)]
    named = publish(store, 300, name="kept")
    for sandbox_id, snapshot_id in (("one", ids[-1]), ("child", ids[7])):
        service.add(sandbox_id, snapshot_id=snapshot_id)
        store.pin(pin_name(sandbox_id), Pin(snapshots=(snapshot_id,)))
    with store.begin() as draft:  # of a sandbox that is busy: nobody waits for it
        draft.path("layer").touch()
        await service.delete("one")
        assert {entry.id for entry in store.ls(sandbox_id="one")} == {ids[7], named.id}
        assert draft.path("layer").exists()
    assert store.gc().parts == 0, "nothing is left that nobody needs"
    await service.delete("child")
    assert [entry.id for entry in store.ls()] == [named.id]
