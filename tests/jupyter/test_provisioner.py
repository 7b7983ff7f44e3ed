"""The provisioner under jupyter_client's real KernelManager and AsyncKernelManager."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import AsyncKernelManager, KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_code_cell, new_notebook

from hypercell.errors import NoGatewayError, UnsupportedError
from tests.gateways import GatewayAddress

TIMEOUT_S = 300


@contextmanager
def running_kernel(kernel_name: str, **launch: Any) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    manager = KernelManager(kernel_name=kernel_name)
    manager.start_kernel(**launch)
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=TIMEOUT_S)
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def value_of(client: BlockingKernelClient, expression: str) -> str:
    """The text of what the kernel says `expression` is."""
    reply = client.execute("", user_expressions={"value": expression}, reply=True, timeout=TIMEOUT_S)
    value = reply["content"]["user_expressions"]["value"]
    assert value["status"] == "ok", value
    text: str = value["data"]["text/plain"]
    return text


def reply_to(client: BlockingKernelClient, message_id: str) -> dict[str, Any]:
    """The reply to this request; those to earlier ones (`wait_for_ready` leaves some) are dropped."""
    while True:
        reply: dict[str, Any] = client.get_shell_msg(timeout=TIMEOUT_S)
        if reply["parent_header"]["msg_id"] == message_id:
            return reply


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kernel_ids(gateway: GatewayAddress) -> set[str]:
    request = urllib.request.Request(f"{gateway.url}/api/kernels", headers={"Authorization": f"token {gateway.token}"})
    with urllib.request.urlopen(request) as answer:
        return {model["id"] for model in json.load(answer)}


def test_a_kernel_starts_under_its_manager_s_id_and_is_gone_after_shutdown(
    kernel_name: str, gateway: GatewayAddress
) -> None:
    with running_kernel(kernel_name) as (manager, client):
        assert manager.is_alive()
        assert manager.transport == "ipc"
        assert manager.kernel_id in kernel_ids(gateway)
        assert value_of(client, "6 * 7") == "42"
        links = Path(manager.ip).parent
        assert links.stat().st_mode & 0o777 == 0o700
        client.stop_channels()
        manager.shutdown_kernel()
        assert not manager.is_alive()
        assert not manager.has_kernel
        assert manager.kernel_id not in kernel_ids(gateway)
        assert not links.exists()


@pytest.mark.parametrize("now", [False, True])
def test_a_restart_gives_a_new_process_in_the_same_machine(
    kernel_name: str, gateway: GatewayAddress, now: bool
) -> None:
    with running_kernel(kernel_name) as (manager, client):
        client.execute("value = 1; open('/tmp/kept', 'w').write('on disk')", reply=True, timeout=TIMEOUT_S)
        kernel_id = manager.kernel_id
        manager.restart_kernel(now=now)
        assert manager.is_alive()
        client.wait_for_ready(timeout=TIMEOUT_S)
        assert value_of(client, "'value' in globals()") == "False"
        assert value_of(client, "open('/tmp/kept').read()") == "'on disk'"
        assert kernel_id in kernel_ids(gateway)


@pytest.mark.parametrize("by_signal", [False, True])
def test_an_interrupt_ends_an_endless_loop(kernel_name: str, by_signal: bool) -> None:
    with running_kernel(kernel_name) as (manager, client):
        message_id = client.execute("print('looping', flush=True)\nwhile True: pass")
        while client.get_iopub_msg(timeout=TIMEOUT_S)["msg_type"] != "stream":
            pass
        if by_signal:
            manager.signal_kernel(signal.SIGINT)
        else:
            manager.interrupt_kernel()
        reply = reply_to(client, message_id)
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        assert value_of(client, "6 * 7") == "42"


def test_sigkill_ends_the_kernel_and_other_signals_are_refused(kernel_name: str, gateway: GatewayAddress) -> None:
    with running_kernel(kernel_name) as (manager, _):
        with pytest.raises(UnsupportedError, match="SIGUSR1 cannot be sent"):
            manager.signal_kernel(signal.SIGUSR1)
        assert manager.is_alive()
        manager.signal_kernel(signal.SIGKILL)
        assert not manager.is_alive()
        assert manager.kernel_id not in kernel_ids(gateway)


def test_a_kernel_deleted_behind_its_back_is_dead_and_a_restart_gives_another(
    kernel_name: str, gateway: GatewayAddress
) -> None:
    with running_kernel(kernel_name) as (manager, client):
        request = urllib.request.Request(
            f"{gateway.url}/api/kernels/{manager.kernel_id}",
            headers={"Authorization": f"token {gateway.token}"},
            method="DELETE",
        )
        urllib.request.urlopen(request).close()
        assert not manager.is_alive()
        manager.restart_kernel(now=True)
        assert manager.is_alive()
        client.stop_channels()
        client = manager.client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=TIMEOUT_S)
            assert value_of(client, "6 * 7") == "42"
        finally:
            client.stop_channels()


def test_a_kernel_that_ends_is_dead_until_it_is_restarted(kernel_name: str, gateway: GatewayAddress) -> None:
    with running_kernel(kernel_name) as (manager, client):
        client.execute("open('/tmp/kept', 'w').write('on disk')", reply=True, timeout=TIMEOUT_S)
        kernel_id = manager.kernel_id
        client.execute("import os; os._exit(3)")
        wait_until(lambda: not manager.is_alive())
        manager.restart_kernel(now=True)
        assert manager.is_alive()
        client.wait_for_ready(timeout=TIMEOUT_S)
        assert value_of(client, "open('/tmp/kept').read()") == "'on disk'"
        assert kernel_id in kernel_ids(gateway)


def test_nbclient_learns_that_its_kernel_has_died(kernel_name: str) -> None:
    notebook = new_notebook(cells=[new_code_cell("import os; os._exit(3)"), new_code_cell("1")])
    with pytest.raises(DeadKernelError):
        NotebookClient(notebook, kernel_name=kernel_name, timeout=TIMEOUT_S).execute()


def test_arguments_that_have_no_effect_are_named(kernel_name: str, caplog: pytest.LogCaptureFixture) -> None:
    with running_kernel(kernel_name, extra_arguments=["--IPKernelApp.matplotlib=inline"]) as (manager, _):
        assert manager.is_alive()
    assert "--IPKernelApp.matplotlib=inline" in caplog.text


def test_only_variables_meant_for_the_kernel_enter_the_machine(
    kernel_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_APPLICATION", "1")
    environment = {**os.environ, "FOR_THE_KERNEL": "2", "KERNEL_USERNAME": "grace"}
    with running_kernel(kernel_name, env=environment) as (_, client):
        names = value_of(client, "sorted(__import__('os').environ)")
    assert "KERNEL_USERNAME" in names
    assert "FOR_THE_KERNEL" in names
    assert "SECRET_OF_THE_APPLICATION" not in names
    assert "HYPERCELL_TOKEN" not in names


def test_input_is_answered(kernel_name: str) -> None:
    with running_kernel(kernel_name) as (_, client):
        message_id = client.execute("answer = input('name? ')", allow_stdin=True)
        assert client.get_stdin_msg(timeout=TIMEOUT_S)["content"]["prompt"] == "name? "
        client.input("Grace")
        reply_to(client, message_id)
        assert value_of(client, "answer") == "'Grace'"


async def test_asynchronous_manager(kernel_name: str, gateway: GatewayAddress) -> None:
    manager = AsyncKernelManager(kernel_name=kernel_name)
    await manager.start_kernel()
    client: AsyncKernelClient = manager.client()
    try:
        client.start_channels()
        await client.wait_for_ready(timeout=TIMEOUT_S)
        await manager.restart_kernel()
        await client.wait_for_ready(timeout=TIMEOUT_S)
        reply = await client.execute("1 / 0", reply=True, timeout=TIMEOUT_S)
        assert reply["content"]["ename"] == "ZeroDivisionError"
        assert await manager.is_alive()
    finally:
        client.stop_channels()
        await manager.shutdown_kernel()
    assert not await manager.is_alive()
    assert manager.kernel_id not in kernel_ids(gateway)


def test_an_application_that_forgets_its_kernel_takes_it_along(
    kernel_name: str, gateway: GatewayAddress, provisioner_environment: dict[str, str]
) -> None:
    program = (
        "from jupyter_client.manager import KernelManager\n"
        f"manager = KernelManager(kernel_name={kernel_name!r}); manager.start_kernel(); print(manager.kernel_id)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=provisioner_environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() not in kernel_ids(gateway)


def test_without_a_gateway_the_error_says_what_to_do(kernel_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERCELL_URL", "http://127.0.0.1:1")
    with pytest.raises(NoGatewayError, match="does not answer"):
        KernelManager(kernel_name=kernel_name).start_kernel()
