"""What a driver cannot do is refused with its reason, and is no default; nothing asks which driver it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.errors import api_error
from kernels.capacity import RESERVE_MIB, START_COST_MIB, Capacity
from kernels.errors import CapacityError, UnsupportedError
from kernels.models import SandboxState
from tests.unit.kernels.conftest import Service, started_driver, started_service


async def test_what_needs_snapshots_is_refused_without_them(state_dir: Path) -> None:
    async with (
        started_driver(state_dir, without="snapshot") as driver,
        started_service(state_dir, driver, checkpoints="timer:5") as kernels,
    ):
        sandbox_id = await kernels.new()
        assert kernels.get(sandbox_id).checkpoints == "off"
        for refused in (
            kernels.checkpoints.checkpoint(sandbox_id, name="one"),
            kernels.lifecycle.sleep(sandbox_id),
            kernels.forks.fork(sandbox_id, count=1),
        ):
            with pytest.raises(Exception, match="was told to do without it"):
                await refused
        assert kernels.get(sandbox_id).state is SandboxState.RUNNING
        assert await kernels.run(sandbox_id, "print(1)") == "1\n"
        assert len(kernels.registry.sandboxes()) == 1


@pytest.mark.parametrize(("without", "policy"), [("", "cell"), ("checkpoint_each_cell", "off")])
async def test_a_checkpoint_after_each_cell_is_the_default_where_it_is_cheap(
    state_dir: Path, without: str, policy: str
) -> None:
    async with (
        started_driver(state_dir, without=without) as driver,
        started_service(state_dir, driver, checkpoints="cell") as kernels,
    ):
        assert kernels.get(await kernels.new()).checkpoints == policy
        assert kernels.get(await kernels.new(checkpoints="cell")).checkpoints == "cell"


async def test_kernelspecs_say_what_the_driver_cannot(kernels: Service) -> None:
    metadata = kernels.kernelspecs()["tiny"].spec["metadata"]["hypercell"]
    assert metadata["driver"] == "fake"
    assert metadata["cannot"].keys() == {"isolation", "keeps_memory", "clones_share_memory"}


def test_admission_counts_whole_machines_where_clones_share_nothing() -> None:
    free = RESERVE_MIB + START_COST_MIB
    with Capacity(9, available_mib=lambda: free).room(1024):
        pass
    with pytest.raises(CapacityError), Capacity(9, clones_share_memory=False, available_mib=lambda: free).room(1024):
        pass


def test_the_api_answers_409_with_the_reason_and_the_remedy() -> None:
    answer = api_error(UnsupportedError("It cannot.", fix="hypercelld serve --driver qemu"))
    assert (answer.status, answer.code) == (409, "not_supported")
    assert answer.message == "It cannot. Try: hypercelld serve --driver qemu"
