"""Services on the fake driver: one without any machine, one with real agents and kernels as processes of this host."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.connect import KernelConnectionInfo

from kernels.index import SandboxRecord
from kernels.models import CreateSandbox, EventKind, Sandbox, SandboxState
from kernels.service import SandboxService
from kernels.settings import ServiceSettings
from tests.fake_driver.driver import FakeDriver
from tests.leftovers import note_made
from vm_runtime.drivers.base import DriverSettings
from vm_runtime.images.manifest import FILES, FORMAT_VERSION, MANIFEST, Manifest, file_digest, image_digest
from vm_runtime.images.recipe import Recipe
from vm_runtime.snapshots.manifest import State

TEMPLATE = "tiny"
LIMIT_S = 60.0


class Service(SandboxService):
    """With clients of its kernels."""

    def add(self, sandbox_id: str, parent_id: str | None = None, **fields: object) -> None:
        """A sandbox that sleeps."""
        now = datetime.now(UTC)
        sandbox = Sandbox(
            id=sandbox_id, state=SandboxState.ASLEEP, driver="fake", template="python3", parent_id=parent_id, name=None,
            owner="local", created_at=now, last_activity=now, execution_state="idle", reason=None, memory_mib=256,
            vcpus=1, disk_mib=64,
        )  # fmt: skip
        sandbox = dataclasses.replace(sandbox, **fields)  # type: ignore[arg-type]
        record = SandboxRecord(sandbox=sandbox, machine_id="", key="", marker="", env={}, cwd=None)
        self.registry.add(record)

    async def new(self, **fields: Any) -> str:
        """A sandbox with a kernel."""
        return (await self.create(CreateSandbox(template=TEMPLATE, **fields))).id

    @asynccontextmanager
    async def client(self, sandbox_id: str) -> AsyncIterator[AsyncKernelClient]:
        client = AsyncKernelClient()
        client.load_connection_info(cast(KernelConnectionInfo, dict(await self.connection_info(sandbox_id))))
        client.start_channels(hb=False)
        try:
            yield client
        finally:
            client.stop_channels()

    async def run(self, sandbox_id: str, code: str) -> str:
        """A cell; what it prints, and the name of its error."""
        texts: list[str] = []

        def output(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                texts.append(message["content"]["text"])

        async with self.client(sandbox_id) as client:
            async with asyncio.timeout(LIMIT_S):
                await client.wait_for_ready(timeout=LIMIT_S)
                reply = await client.execute_interactive(code, output_hook=output, timeout=LIMIT_S)
        return "".join(texts) + str(reply["content"].get("ename", ""))

    async def until(self, holds: Callable[[], bool]) -> None:
        """Waits for the event after which it is so."""
        async with asyncio.timeout(LIMIT_S), self.bus.subscribe() as events:
            while not holds():
                await anext(events)

    async def checkpointed(self, sandbox_id: str, count: int) -> list[str]:
        """The ids of its checkpoints, when there are so many."""
        async with asyncio.timeout(LIMIT_S), self.bus.subscribe() as events:
            while len(found := await self.checkpoints.all(sandbox_id)) < count:
                async for event in events:
                    if event.kind is EventKind.CHECKPOINT:
                        break
        return [each.id for each in found]


class TestDriver(FakeDriver):
    """refuses: why no state can be loaded now."""

    __test__ = False
    refuses: str | None = None

    def can_load(self, state: State) -> str | None:
        return self.refuses or super().can_load(state)


@asynccontextmanager
async def started_driver(state_dir: Path, *, without: str = "") -> AsyncIterator[TestDriver]:
    note_made(state_dir)
    settings = DriverSettings(state_dir=state_dir, options={"fake_without": without})
    driver = await TestDriver.start(settings, progress=lambda text: None)
    try:
        yield driver
    finally:
        await driver.close()
        shutil.rmtree(ServiceSettings(state_dir=state_dir).run_dir, ignore_errors=True)


@asynccontextmanager
async def started_service(state_dir: Path, driver: FakeDriver, **fields: Any) -> AsyncIterator[Service]:
    """As a gateway has it; ends its sandboxes at the end, unless told otherwise."""
    fields = {"pool_size": 0, "checkpoints": "off", "stop_means_sleep": False, **fields}
    async with Service(ServiceSettings(state_dir=state_dir, **fields), driver, progress=lambda text: None) as service:
        yield service


def make_image(state_dir: Path) -> None:
    """An image of which only the recipe counts."""
    directory = state_dir / "images" / "new"
    directory.mkdir(parents=True)
    for name in FILES:
        (directory / name).write_bytes(name.encode())
    files = {name: file_digest(directory / name) for name in FILES}
    manifest = Manifest(
        format=FORMAT_VERSION,
        digest=image_digest(files),
        recipe=Recipe(name=TEMPLATE, display_name="Tiny", memory_mib=256, disk_mib=64),
        recipe_digest="0" * 64,
        builder="test",
        files=files,
        debian_packages=(),
        python_packages=(),
        kernel_packages=(),
        created_at=datetime.now(UTC),
    )
    (directory / MANIFEST).write_text(manifest.model_dump_json())
    directory.rename(state_dir / "images" / manifest.digest)


@pytest.fixture(scope="session")
def prepared_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory with an image and its template, to be copied."""
    return prepared(tmp_path_factory.mktemp("prepared"))


def prepared(state_dir: Path) -> Path:
    """The directory, with an image and its template in it."""
    make_image(state_dir)

    async def prepare() -> None:
        async with started_driver(state_dir) as driver, started_service(state_dir, driver) as service:
            await service.prepare(progress=lambda text: None)

    asyncio.run(prepare())
    return state_dir


@pytest.fixture
def state_dir(tmp_path: Path, prepared_dir: Path) -> Path:
    """One of one's own with image and template."""
    return Path(shutil.copytree(prepared_dir, tmp_path / "state"))


@pytest.fixture
async def driver(state_dir: Path) -> AsyncIterator[TestDriver]:
    async with started_driver(state_dir) as driver:
        yield driver


@pytest.fixture
async def kernels(state_dir: Path, driver: TestDriver) -> AsyncIterator[Service]:
    """A service whose machines are processes of this host."""
    async with started_service(state_dir, driver) as service:
        yield service


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    """A service without any machine: records, locks and clocks need none."""
    async with started_driver(tmp_path) as driver, started_service(tmp_path, driver, stop_means_sleep=True) as service:
        yield service
