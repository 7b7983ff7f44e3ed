"""What keeps checkpoints away is seen by users: in the sandbox's record, as events, and as an error over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gateway.errors import api_error
from kernels.errors import CheckpointLimitError
from kernels.events import EventBus
from kernels.index import Index, SandboxRecord
from kernels.models import EventKind, Sandbox, SandboxState
from kernels.registry import Registry

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    index = Index(tmp_path / "index.sqlite")
    yield index
    index.close()


def record() -> SandboxRecord:
    sandbox = Sandbox(
        id="s1", state=SandboxState.RUNNING, driver="qemu", template="python", parent_id=None, name=None, owner="me",
        created_at=NOW, last_activity=NOW, execution_state="idle", reason=None, memory_mib=1, vcpus=1, disk_mib=1,
    )  # fmt: skip
    return SandboxRecord(sandbox=sandbox, machine_id="m", key="k", marker="", env={}, cwd=None)


async def test_a_problem_is_kept_and_published_when_it_changes(index: Index) -> None:
    bus = EventBus()
    registry = Registry(index, bus)
    registry.add(record())
    async with bus.subscribe() as events:
        for problem in (None, "full", "full", "slow", None, None):
            registry.checkpoint_problem("s1", problem)
        registry.checkpoint_problem("unknown", "full")
        bus.close()
        seen = [(event.kind, event.data["reason"]) async for event in events]
    assert seen == [(EventKind.CHECKPOINT_PROBLEM, problem) for problem in ("full", "slow", None)]
    registry.checkpoint_problem("s1", "full")
    later = Registry(index, bus)
    later.load()
    assert later.record("s1").sandbox.checkpoint_problem == "full"


def test_a_refused_checkpoint_has_a_code_of_its_own() -> None:
    error = api_error(CheckpointLimitError("too many"))
    assert (error.status, error.code, error.message) == (503, "checkpoint_limit", "too many")
