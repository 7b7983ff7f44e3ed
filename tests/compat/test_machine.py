"""A machine that was made before an upgrade, agent included, wakes after it and does what a machine does."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kernels import templates
from kernels.exec import CommandExited, CommandRequest
from kernels.models import CreateSandbox, Sandbox, SandboxState
from kernels.settings import ServiceSettings
from tests.compat.conftest import DIGESTS, archive_of
from tests.gateways import STATE, RunningGateway, copy_state
from tests.unit.kernels.conftest import Service
from vm_runtime.drivers.base import DriverSettings
from vm_runtime.drivers.find import find_driver

MAKE = """
numbers = iter(range(100))
assert [next(numbers), next(numbers)] == [0, 1]
file = open('/tmp/open', 'w+')
print(file.write('kept'))
"""
CHECK = "print(next(numbers), file.seek(0), file.read())"
FORK = """
import sandbox
kid = sandbox.fork()
if kid is None:
    sandbox.exit([next(numbers), sandbox.parent_id])
value, parent = kid.result(60)
print(value, parent == sandbox.id, next(numbers), sandbox.wait([kid]) is kid)
"""


@pytest.fixture
def images_dir(gateway: RunningGateway) -> Iterator[Path]:
    """A state directory of one's own, with the image that the shared gateway has built."""
    directory = copy_state(STATE.parent / f"compat-{secrets.token_hex(4)}")
    yield directory
    shutil.rmtree(directory)


@asynccontextmanager
async def opened(state_dir: Path) -> AsyncIterator[Service]:
    settings = ServiceSettings(state_dir=state_dir, pool_size=0, checkpoints="cell")
    driver = await find_driver("qemu").start(
        DriverSettings(state_dir=state_dir, image=None, options={"accelerator": "tcg"}), progress=print
    )
    try:
        async with Service(settings, driver, progress=print) as service:
            yield service
    finally:
        await driver.close()


@pytest.mark.timeout(1500)  # as a gateway's start: it makes the old agent's template
async def test_what_slept_before_an_upgrade_goes_on_after_it(images_dir: Path) -> None:
    with pytest.MonkeyPatch.context() as before:
        before.setattr(templates, "guest_archive", lambda: archive_of(1))
        before.setattr(templates, "guest_digest", lambda: DIGESTS[1])
        async with opened(images_dir) as kernels:
            sandbox_id = (await kernels.create(CreateSandbox(template="python3"))).id
            assert await kernels.run(sandbox_id, MAKE) == "4\n"
    async with opened(images_dir) as kernels:
        assert kernels.get(sandbox_id).state is SandboxState.ASLEEP
        assert await kernels.run(sandbox_id, CHECK) == "2 0 kept\n"
        assert kernels.machines.running(sandbox_id).session.generation == 1
        async with await (await kernels.commands(sandbox_id)).start(CommandRequest(command="exit 3")) as command:
            event = await command.next()
        assert isinstance(event, CommandExited) and event.exit_code == 3
        assert (await (await kernels.files(sandbox_id)).stat("/tmp/open")).size_bytes == 4
        (first, *_) = await kernels.checkpointed(sandbox_id, 2)
        await kernels.checkpoints.goto(sandbox_id, first)
        assert await kernels.run(sandbox_id, CHECK) == "2 0 kept\n"
        assert await kernels.run(sandbox_id, FORK) == "3 True 3 True\n"
        (child,) = await kernels.forks.fork(sandbox_id, count=1)
        assert isinstance(child, Sandbox)
        await kernels.lifecycle.sleep(sandbox_id)
        for each in (child.id, sandbox_id):
            assert await kernels.run(each, CHECK) == "4 0 kept\n"
        await kernels.restart(sandbox_id)
        assert (
            await kernels.run(sandbox_id, "print(open('/tmp/open').read(), 'numbers' in globals())") == "kept False\n"
        )
        for each in (child.id, sandbox_id):
            await kernels.delete(each)
