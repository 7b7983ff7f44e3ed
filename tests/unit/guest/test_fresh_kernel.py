"""A fresh kernel looks to its user as one of a local ipykernel: compared with one, and used as users do."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.session import Session

from tests.unit.guest.conftest import KEY, Host, client, run
from vm_runtime.guest.paths import CHANNEL_PORTS
from vm_runtime.wire.errors import OpenRejectedError

PROBE = Path(__file__).with_name("kernel_probe.py").read_text()
WARM_UP = "import numpy, matplotlib.pyplot"

# Differences that are meant, by the names that `kernel_probe` gives things.
MEANT = {
    r"environ JPY_PARENT_PID": "the plain kernel's manager sets it",
    r"environ PYDEVD_USE_FRAME_EVAL": "debugpy sets it when it is imported",
    r"sys\.(argv|orig_argv)|__main__\._i.*|__main__\.(In|_ih)": "name the connection file; hold this very probe",
    r"sys\.(std(out|err)|displayhook|excepthook|meta_path|path_hooks)": "objects of our own, or of this test's .venv",
    r"ipython (kernel|parent|compiler_class|enable_tip|display.*)": "our classes; no tips, which draw random numbers",
    r"ipython config": "the classes that are ours",
    r"ipython magics": "%sandbox and what belongs to it",
    r"threads": "one of ours beside ipykernel's",
    r"logger (?!root$).*": "of what the warm-up has imported, and of the application's class",
    r"process SigCgt": "the plain kernel's manager may be another Python",
}


@asynccontextmanager
async def plain_kernel(host: Host, **env: str) -> AsyncIterator[AsyncKernelClient]:
    """ipykernel as Jupyter starts it, with our kernels' environment."""
    manager = AsyncKernelManager()
    await manager.start_kernel(cwd=str(host.paths.home), env={**host.agent._kernel_manager.environment(), **env})
    jupyter = manager.client()
    jupyter.start_channels()
    try:
        await jupyter.wait_for_ready(timeout=60)
        yield jupyter
    finally:
        jupyter.stop_channels()
        await manager.shutdown_kernel(now=True)


async def probed(jupyter: AsyncKernelClient) -> dict[str, Any]:
    text, reply = await run(jupyter, PROBE)
    assert reply["status"] == "ok", reply
    found: dict[str, Any] = json.loads(text)
    return found


def differences(plain: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    meant = re.compile("|".join(MEANT))
    names = [name for name in sorted(plain | ours) if not meant.fullmatch(name)]
    absent = "(absent)"
    return [
        f"{name}: {plain.get(name, absent)!r:.300} but here {ours.get(name, absent)!r:.300}"
        for name in names
        if plain.get(name, absent) != ours.get(name, absent)
    ]


async def test_a_fresh_kernel_looks_as_a_local_one(host: Host) -> None:
    async with plain_kernel(host) as jupyter:
        plain = await probed(jupyter)
    await host.call("template.prepare", warmup=WARM_UP)
    await host.call("kernel.start", key=KEY, env={}, cwd=None)
    async with client(host) as jupyter:
        first = await probed(jupyter)
        await host.call("kernel.restart")
        await jupyter.wait_for_ready(timeout=120)
        second = await probed(jupyter)
    assert differences(plain, first) == []
    assert differences(plain, second) == []


async def new_kernel(host: Host, *, warm: bool = True, **env: str) -> int:
    if warm:
        await host.call("template.prepare", warmup="")
    return int((await host.call("kernel.start", key=KEY, env=env, cwd=None))["pid"])


async def test_modules_beside_the_notebook_are_imported_and_shadow_nothing_of_ours(host: Host) -> None:
    for name in ("beside", "json", "zmq", "selectors", "IPython"):
        (host.paths.home / f"{name}.py").write_text("X = 5")
    await new_kernel(host)
    async with client(host) as jupyter:
        assert (await run(jupyter, "import beside, json; print(beside.X, hasattr(json, 'X'))"))[0] == "5 False\n"
        await host.call("kernel.restart")
        await jupyter.wait_for_ready(timeout=120)
        assert (await run(jupyter, "import beside, json; print(beside.X, hasattr(json, 'X'))"))[0] == "5 False\n"


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
async def test_a_process_pool_works_in_the_first_cell(host: Host, method: str) -> None:
    await new_kernel(host)
    code = f"import multiprocessing\nwith multiprocessing.get_context({method!r}).Pool(1) as p: print(p.map(abs, [-3]))"
    async with client(host) as jupyter:
        assert (await run(jupyter, code))[0] == "[3]\n"
        # Its semaphores are the host's here, and would outlast a kernel that is killed.
        await run(jupyter, "del p; import gc; _ = gc.collect()")


async def test_nothing_is_left_of_the_warm_up(host: Host) -> None:
    await new_kernel(host)
    async with client(host) as jupyter:
        text, reply = await run(jupyter, "print(repr(_), repr(__), Out, len(In))\n%tb")
        assert text.startswith("'' '' {} 2\n")
        assert "No traceback" in text
        assert reply["execution_count"] == 1


async def test_a_notebook_is_told_its_name(host: Host) -> None:
    await new_kernel(host, JPY_SESSION_NAME="work/a.ipynb")
    async with client(host) as jupyter:
        assert (await run(jupyter, "print(__session__)"))[0] == "work/a.ipynb\n"


async def test_copies_of_a_kernel_make_different_messages(host: Host) -> None:
    await new_kernel(host)
    seen = set()
    for key in ("second-key", "third-key"):
        await host.hello(restored=True, kernel_key=key, keep_random=True)
        async with client(host, key=key) as jupyter:
            reply = await jupyter.kernel_info(reply=True, timeout=60)
            seen.add(reply["header"]["session"])
            text, _ = await run(jupyter, "import ipykernel; print(ipykernel.get_connection_info(unpack=True)['key'])")
            assert text == f"{key.encode()!r}\n"
    assert len(seen) == 2


# What a running process adopts: value, and what shows it.
ADOPTED = {
    "TZ": ("Asia/Tokyo", "__import__('time').tzname[0]"),
    "LC_ALL": ("C", "__import__('locale').setlocale(0)"),
    "TMPDIR": ("/var/tmp", "__import__('tempfile').gettempdir()"),
    "PYTHONPATH": ("/opt/a:/opt/b", "sys.path[:2]"),
    "PYTHONWARNINGS": (
        "error::UserWarning,ignore",
        "sys.warnoptions, [str(f[:3]) for f in warnings.filters if not f[1]]",
    ),
    "PYTHONDONTWRITEBYTECODE": ("1", "sys.dont_write_bytecode"),
    "PYTHONUNBUFFERED": ("1", "__import__('os').environ['PYTHONUNBUFFERED']"),
    "MPLBACKEND": ("agg", "__import__('matplotlib.pyplot').get_backend()"),
}
# What none can.
NEEDS_NEW = {
    "PYTHONHASHSEED": ("0", "hash('hypercell')"),
    "PYTHONOPTIMIZE": ("1", "__debug__"),
    "HOME": ("/tmp", "__import__('site').getuserbase()"),
}


@pytest.mark.parametrize("variables", [ADOPTED, NEEDS_NEW], ids=["adopted", "needs_new"])
async def test_variables_have_the_effect_that_they_have_on_a_local_kernel(
    host: Host, variables: dict[str, tuple[str, str]]
) -> None:
    env = {name: value for name, (value, _) in variables.items()}
    code = "import sys, warnings, numpy, matplotlib.pyplot\n" + "\n".join(
        f"print({shows})" for _, shows in variables.values()
    )
    async with plain_kernel(host) as jupyter:
        without, _ = await run(jupyter, code)
    prepared = (await host.call("template.prepare", warmup=WARM_UP))["pid"]
    assert (await new_kernel(host, warm=False, **env) != prepared) == (variables is NEEDS_NEW)
    async with client(host) as jupyter:
        first, _ = await run(jupyter, code)
        await host.call("kernel.restart")
        await jupyter.wait_for_ready(timeout=120)
        second, _ = await run(jupyter, code)
    async with plain_kernel(host, **env) as jupyter:
        plain, _ = await run(jupyter, code)
    assert len(plain.splitlines()) == len(variables)
    assert plain == first == second
    same = [a for a, b in zip(plain.splitlines(), without.splitlines(), strict=False) if a == b]
    assert same == []  # each variable has an effect, and this shows it


async def test_a_kernel_in_the_place_of_the_templates_does_not_look_restarted(host: Host) -> None:
    await new_kernel(host, PYTHONHASHSEED="0")
    context = zmq.asyncio.Context()
    session = Session(key=KEY.encode())
    try:
        iopub = context.socket(zmq.SUB)
        iopub.subscribe(b"")
        iopub.connect(f"ipc://{host.paths.kernel_socket(CHANNEL_PORTS['iopub'])}")
        shell = context.socket(zmq.DEALER)
        shell.connect(f"ipc://{host.paths.kernel_socket(CHANNEL_PORTS['shell'])}")
        session.send(shell, "kernel_info_request", {})
        states: list[str] = []
        while "idle" not in states:
            async with asyncio.timeout(60):
                _, frames = session.feed_identities(await iopub.recv_multipart())
            states += [session.deserialize(frames)["content"].get("execution_state", "")]
    finally:
        context.destroy(linger=0)
    assert "starting" not in states


async def test_an_environment_that_breaks_a_kernel_breaks_only_that(host: Host) -> None:
    with pytest.raises(OpenRejectedError, match="ended while it started"):
        await new_kernel(host, PYTHONHOME="/no/such/place")
    await host.call("kernel.restart", env={"PYTHONHOME": ""})
    async with client(host) as jupyter:
        assert (await run(jupyter, "print(1)"))[0] == "1\n"


async def test_a_kernel_that_was_used_keeps_its_state_whatever_the_environment(host: Host) -> None:
    await new_kernel(host)
    async with client(host) as jupyter:
        await run(jupyter, "x = 1")
        await new_kernel(host, warm=False, PYTHONHASHSEED="0")
        assert (await run(jupyter, "import os; print(x, os.environ['PYTHONHASHSEED'])"))[0] == "1 0\n"


async def test_a_restart_finds_what_pip_has_installed_since(host: Host) -> None:
    package = host.paths.home / "packages"
    await host.call("template.prepare", warmup="import timeit, tabnanny, numpy")
    await new_kernel(host, warm=False, PYTHONPATH=str(package))
    package.mkdir()
    (package / "numpy").mkdir()
    (package / "numpy" / "__init__.py").write_text("__version__ = 'newer'")
    async with client(host) as jupyter:
        await host.call("kernel.restart")
        await jupyter.wait_for_ready(timeout=120)
        assert (await run(jupyter, "import numpy; print(numpy.__version__)"))[0] == "newer\n"
