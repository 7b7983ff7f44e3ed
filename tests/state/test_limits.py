"""What a sandbox uses up is its own loss and soon over: memory, processes, disk. A machine that hangs is shown so."""

from __future__ import annotations

import os
import signal

from tests.gateways import RunningGateway
from tests.state.sandboxes import Api, Notebook, eventually, value_of, vmm_of
from tests.unit.gateway.client import Message

# 880 MB: less than the machine has, which Linux would refuse, and more than there is.
TOO_MUCH = "import numpy; numpy.ones(110_000_000)"
FORK_BOMB = "import os\nwhile True: os.fork()"
# All of the disk but 8 MiB is taken without writing it, the rest is written.
FILL_DISK = """
import os, shutil
with open('/tmp/full', 'wb') as file:
    os.posix_fallocate(file.fileno(), 0, shutil.disk_usage('/tmp').free - (8 << 20))
    file.seek(0, os.SEEK_END)
    while True: file.write(bytes(1 << 20))
"""


async def told_of_restart(notebook: Notebook, code: str) -> str:
    """Runs a cell that ends its kernel; the reason that its client is given."""
    await notebook.client.execute(code)
    (*_, told) = await notebook.client.until("status", execution_state="restarting")
    reason: str = told["content"]["reason"]
    return reason


async def test_a_cell_that_needs_more_memory_than_there_is(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run("x = 'kept'; open('file', 'w').write('kept')")
        await api.do(sandbox_id, "checkpoints", status=201)
        reason = await told_of_restart(notebook, TOO_MUCH)
        assert reason.startswith("The kernel ran out of memory (1024 MiB)"), reason
        assert "memory_mib" in reason
        assert "KERNEL_MEMORY_MIB" in reason
        assert await notebook.value("open('file').read(), 'x' in globals()") == ("kept", False)
        await notebook.run("y = 1")  # as the first cell was: the first of its kernel
        await api.do(sandbox_id, "checkpoints", status=201)
        await api.do(sandbox_id, "undo")
        assert await notebook.value("x, 'y' in globals()") == ("kept", False)
        # A process that the kernel has started is no kernel.
        run = "import subprocess, sys; code = subprocess.run([sys.executable, '-c', %r]).returncode"
        await notebook.run(run % TOO_MUCH)
        assert await notebook.value("code, x") == (-signal.SIGKILL, "kept")
    await api.delete(sandbox_id)


async def test_a_command_that_needs_more_memory_than_there_is(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    await value_of(state_gateway, sandbox_id, "x = 1")
    ended = await api.do(sandbox_id, "exec", {"command": ["python3", "-c", TOO_MUCH]})
    assert (ended["signal"], ended["out_of_memory"]) == ("SIGKILL", True)
    ended = await api.do(sandbox_id, "exec", {"command": f"python3 -c '{TOO_MUCH}'; exit $?"})
    assert (ended["exit_code"], ended["out_of_memory"]) == (128 + signal.SIGKILL, True)
    ended = await api.do(sandbox_id, "exec", {"command": "kill -KILL $$"})
    assert (ended["signal"], ended["out_of_memory"]) == ("SIGKILL", False)
    assert await value_of(state_gateway, sandbox_id, "x") == 1
    await api.delete(sandbox_id)


async def test_processes_that_multiply(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        assert "ran out of memory" in await told_of_restart(notebook, FORK_BOMB)
        assert await notebook.value("1 + 1") == 2
        # Each in a session of its own, so that no signal to the kernel's group reaches them; ended from outside.
        await notebook.client.execute("import os\nwhile True:\n    if os.fork() == 0: os.setsid()")
        await notebook.client.until("execute_input")
        await api.call("POST", f"/api/kernels/{sandbox_id}/restart")
        assert await notebook.value("1 + 1") == 2
        processes = await api.do(sandbox_id, "exec", {"command": "cat /sys/fs/cgroup/user/kernel/pids.current"})
        assert int(processes["stdout"]) < 50
    await api.delete(sandbox_id)


async def test_a_full_disk_and_full_shared_memory(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        assert "No space left" in await notebook.error("with open('/dev/shm/x', 'wb') as f: f.write(bytes(500 << 20))")
        assert await notebook.value("__import__('os').remove('/dev/shm/x')") is None
        assert "No space left" in await notebook.error(FILL_DISK)
        assert await notebook.value("1 + 1") == 2
        await api.do(sandbox_id, "checkpoints", {"name": "full"}, status=201)
        await api.call("POST", f"/api/kernels/{sandbox_id}/restart")
        await notebook.run("import os; os.remove('/tmp/full')")
        await notebook.run("open('file', 'w').write('room')")
        await api.do(sandbox_id, "goto", {"target": "full"})
        assert await notebook.value("os.path.exists('/tmp/full')") is True
    await api.delete(sandbox_id)


async def test_a_machine_knows_its_own_name(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    name = f"sandbox-{sandbox_id.partition('-')[0]}"
    found = "import socket; socket.gethostname(), socket.gethostbyname(socket.gethostname())"
    assert await value_of(state_gateway, sandbox_id, found) == (name, "127.0.0.1")
    await api.delete(sandbox_id)


async def test_a_machine_that_does_not_answer(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    path = f"/api/kernels/{sandbox_id}"
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run("x = 'kept'; open('file', 'w').write('kept')")
        await api.do(sandbox_id, "checkpoints", status=201)
        os.kill(vmm_of(state_gateway, sandbox_id), signal.SIGSTOP)
        found = await until_responsive(api, sandbox_id, is_responsive=False)
        assert (found["state"], found["execution_state"]) == ("running", "unknown")
        kernel = await api.call("GET", path)
        assert (kernel["execution_state"], "has not answered since" in kernel["reason"]) == ("unknown", True)
        refused = await api.do(sandbox_id, "exec", {"command": "true"}, status=504)
        assert refused["code"] == "machine_unresponsive"
        await api.call("GET", f"/api/sandboxes/{sandbox_id}/files?path=.", status=504)
        await api.call("POST", f"{path}/interrupt", status=504)
        os.kill(vmm_of(state_gateway, sandbox_id), signal.SIGCONT)
        found = await until_responsive(api, sandbox_id, is_responsive=True)
        assert found["execution_state"] == "idle"
        assert await notebook.value("x") == "kept"
        # A restart ends it from outside.
        os.kill(vmm_of(state_gateway, sandbox_id), signal.SIGSTOP)
        await until_responsive(api, sandbox_id, is_responsive=False)
        await api.call("POST", f"{path}/restart")
        assert await notebook.value("'x' in globals(), open('file').read()") == (False, "kept")
        # So does its end, at any time.
        pid = vmm_of(state_gateway, sandbox_id)
        os.kill(pid, signal.SIGSTOP)
    await api.delete(sandbox_id)
    await eventually(lambda: not os.path.exists(f"/proc/{pid}"))  # noqa: PTH110


async def until_responsive(api: Api, sandbox_id: str, *, is_responsive: bool) -> Message:
    """Waits until a sandbox is shown as one whose machine answers, or as one whose machine does not."""
    return await api.until(sandbox_id, lambda found: (found["unresponsive_since"] is None) == is_responsive)
