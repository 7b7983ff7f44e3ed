"""What programs see in a machine: a kernel as any other, a Linux with what people use, a clock that is right."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from tests.gateways import RunningGateway
from tests.state.sandboxes import Api, Notebook, value_of
from tests.unit.guest.test_fresh_kernel import PROBE, differences
from vm_runtime.images.recipe import load_recipe
from vm_runtime.images.store import ImageStore

# In a cell: what `kernel_probe` finds in a kernel that is started there as Jupyter starts one.
PLAIN = """
import json
from jupyter_client.manager import KernelManager
manager = KernelManager()
manager.start_kernel()
client = manager.client()
client.start_channels()
client.wait_for_ready(timeout=120)
texts = []
client.execute_interactive({probe!r}, timeout=200, output_hook=lambda m: texts.append(m["content"].get("text", "")))
client.stop_channels()
manager.shutdown_kernel(now=True)
print("".join(texts))
"""

LEFT_OPEN = """
import atexit, pathlib, sys, tempfile
file = open('open file', 'w')
file.write('hello')
atexit.register(lambda: pathlib.Path('exit handler').write_text('ran'))
"""


async def test_a_fresh_kernel_looks_as_one_that_is_started_beside_it(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        first = await notebook.run(PROBE)
        await api.call("POST", f"/api/kernels/{sandbox_id}/restart")
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        second = await notebook.run(PROBE)
        plain = await notebook.run(PLAIN.format(probe=PROBE))
    for ours in (first, second):
        assert differences(json.loads(plain), json.loads(ours)) == []
        assert json.loads(ours)["RLIMIT_NOFILE"] == [65_536, 1_048_576]
    await api.delete(sandbox_id)


async def test_the_clock_is_right_after_a_pause(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    await api.do(sandbox_id, "pause")
    await asyncio.sleep(8)  # the pause, longer than what the clock may be off
    await api.do(sandbox_id, "resume")
    before = time.time()
    now = await value_of(state_gateway, sandbox_id, "__import__('time').time()")
    assert before - 1 < now < time.time() + 1
    await api.delete(sandbox_id)


async def test_a_restart_ends_the_running_cell_and_writes_what_is_open(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run(LEFT_OPEN)
        cell = await notebook.client.execute("print('on'); import time; time.sleep(600)")
        await notebook.client.until("stream")
        await api.call("POST", f"/api/kernels/{sandbox_id}/restart")
        messages = await notebook.rest(cell)
        assert [each["content"]["ename"] for each in messages if each["header"]["msg_type"] == "error"] == [
            "KeyboardInterrupt"
        ]
    assert await value_of(state_gateway, sandbox_id, "[open(n).read() for n in ('open file', 'exit handler')]") == [
        "hello",
        "ran",
    ]
    await api.delete(sandbox_id)


async def test_a_client_that_shuts_its_kernel_down_is_answered_and_gets_a_new_one(
    state_gateway: RunningGateway, api: Api
) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run(LEFT_OPEN)
        request = await notebook.client.send("shutdown_request", {"restart": True}, channel="control")
        seen = await notebook.client.until("status", execution_state="restarting")
        replies = [each for each in seen if each["header"]["msg_type"] == "shutdown_reply"]
        assert {each["channel"] for each in replies} >= {"control"}
        assert all(each["parent_header"]["msg_id"] == request for each in replies)
        assert await notebook.value("'file' in globals(), open('open file').read()") == (False, "hello")
    await api.delete(sandbox_id)


@pytest.fixture
def new_image(state_gateway: RunningGateway) -> None:
    """Skips where the image was built from an older recipe."""
    (newest, *_) = (image.manifest for image in ImageStore(state_gateway.state_dir / "images").ls())
    if newest.recipe_digest != load_recipe(newest.recipe.name).digest():
        pytest.skip("the image is of an older recipe: `hypercelld image build --state-dir .state/test` makes a new one")


LINUX = """
import subprocess, zoneinfo, datetime
run = lambda *command: subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
run('python3', '-m', 'venv', '/tmp/v')
[
    run('python', '-c', 'print(1)'),
    run('/tmp/v/bin/python', '-c', 'import sys; print(sys.prefix)'),
    run('/tmp/v/bin/pip', '--version').split()[0],
    str(datetime.datetime(2026, 7, 1, tzinfo=zoneinfo.ZoneInfo('Asia/Tokyo')).utcoffset()),
    run('env', 'TZ=America/New_York', 'date', '-d', '@0', '+%H'),
    __import__('time').tzname,
]
"""


async def test_what_people_expect_of_a_linux(state_gateway: RunningGateway, api: Api, new_image: None) -> None:
    sandbox_id = await api.create(env={"TZ": "Europe/Berlin"})
    found = await value_of(state_gateway, sandbox_id, LINUX)
    assert found == ["1", "/tmp/v", "pip", "9:00:00", "19", ("CET", "CEST")]
    await api.delete(sandbox_id)


# What `pip install` of another version than the image's does, and of a package that adds to sys.path.
INSTALL = """
import pathlib, site
target = pathlib.Path(site.getusersitepackages())
(target / 'pandas').mkdir(parents=True)
(target / 'pandas' / '__init__.py').write_text("__version__ = 'newer'")
(target / 'linked.pth').write_text('/tmp/linked')
pathlib.Path('/tmp/linked').mkdir()
pathlib.Path('/tmp/linked/developed.py').write_text('x = 1')
"""


async def test_a_restart_finds_what_pip_has_installed(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    await value_of(state_gateway, sandbox_id, INSTALL)
    await api.call("POST", f"/api/kernels/{sandbox_id}/restart")
    code = "import pandas, developed; (pandas.__version__, developed.x)"
    assert await value_of(state_gateway, sandbox_id, code) == ("newer", 1)
    await api.delete(sandbox_id)
