"""A service without any machine: records, locks and clocks need none."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from kernels.core import Core
from kernels.index import SandboxRecord
from kernels.models import Sandbox, SandboxState
from kernels.service import SandboxService
from kernels.settings import ServiceSettings
from vm_runtime.drivers.qemu.arguments import Accelerator
from vm_runtime.drivers.qemu.driver import QemuDriver


class Service(SandboxService):
    """With its inside in reach."""

    @property
    def core(self) -> Core:
        return self._core

    def add(self, sandbox_id: str, parent_id: str | None = None, **fields: object) -> None:
        """A sandbox that sleeps."""
        now = datetime.now(UTC)
        sandbox = Sandbox(
            id=sandbox_id, state=SandboxState.ASLEEP, driver="qemu", template="python3", parent_id=parent_id, name=None,
            owner="local", created_at=now, last_activity=now, execution_state="idle", reason=None, memory_mib=256,
            vcpus=1, disk_mib=64,
        )  # fmt: skip
        sandbox = dataclasses.replace(sandbox, **fields)  # type: ignore[arg-type]
        record = SandboxRecord(sandbox=sandbox, machine_id="", key="", marker="", env={}, cwd=None)
        self.core.registry.add(record)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    settings = ServiceSettings(state_dir=tmp_path, pool_size=0)
    driver = await QemuDriver.start(accelerator=Accelerator.TCG)
    try:
        async with Service(settings, driver) as service:
            yield service
    finally:
        await driver.close()
        shutil.rmtree(settings.run_dir, ignore_errors=True)
