"""Commands, files and calls of the module `sandbox`, with the agent of generation 1."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from kernels.errors import GuestRefusedError
from kernels.exec import CommandExited, CommandOutput, CommandRequest
from kernels.models import Sandbox
from tests.unit.kernels.conftest import Service


async def test_it_is_the_old_agent(kernels: Service) -> None:
    sandbox_id = await kernels.new()
    assert kernels.machines.running(sandbox_id).session.generation == 1
    code = "import vm_runtime.guest as guest; print('/hypercell/python/' in guest.__file__)"
    assert await kernels.run(sandbox_id, code) == "True\n"


async def test_commands(kernels: Service) -> None:
    commands = await kernels.commands(await kernels.new())
    output = b""
    request = CommandRequest(command="cat; echo $COLOUR; exit 3", env={"COLOUR": "red"}, stdin=True)
    async with await commands.start(request) as cat:
        await cat.write(b"in\n")
        cat.end_input()
        while not isinstance(event := await cat.next(), CommandExited):
            assert isinstance(event, CommandOutput)
            output += event.data
    assert (output, event.exit_code, event.signal) == (b"in\nred\n", 3, None)
    async with await commands.start(CommandRequest(command=("sleep", "600"))) as sleeping:
        (found,) = [each for each in await commands.list() if each.running]
        assert found.command_id == sleeping.command_id
        await commands.signal(found.command_id, 2)
        while not isinstance(event := await sleeping.next(), CommandExited):
            pass
    assert event.signal == 2
    assert not any(each.running for each in await commands.list())


async def test_files(kernels: Service) -> None:
    files = await kernels.files(await kernels.new())
    await files.mkdir("made/deep", parents=True)
    content = bytes(range(256)) * 1000
    async with await files.write("made/data") as upload:
        await upload.write(content)
        assert (await upload.commit()).size_bytes == len(content)
    async with await files.read("made/data", offset=10, length=1000) as download:
        assert b"".join([bytes(part) async for part in download.content()]) == content[10:1010]
    assert {(each.name, each.kind) for each in (await files.list("made")).entries} == {
        ("data", "file"),
        ("deep", "directory"),
    }
    async with await files.watch("made") as watch:
        changes = watch.changes()
        await files.rename("made/data", "made/moved")
        async with asyncio.timeout(60):
            await anext(changes)
    assert (await files.stat("made/moved")).size_bytes == len(content)
    await files.remove("made", recursive=True)
    assert "made" not in [each.name for each in (await files.list(".")).entries]


async def test_what_is_newer_is_refused_here_and_says_why(kernels: Service) -> None:
    sandbox_id = await kernels.new()
    files, commands = await kernels.files(sandbox_id), await kernels.commands(sandbox_id)
    newer: list[tuple[str, Callable[[], Awaitable[object]]]] = [
        ("files.append", lambda: files.write("a", append=True)),
        ("files.symlink", lambda: files.symlink("a", "b")),
        ("root.files.stat", lambda: files.as_user("root").stat("/")),
        ("root.exec.start", lambda: commands.start(CommandRequest(command="id", as_root=True))),
    ]
    for kind, use in newer:
        with pytest.raises(
            GuestRefusedError, match=f"agent is of generation 1, and {kind} came with generation 2"
        ) as why:
            await use()
        assert why.value.code == "unknown_kind"
    assert (await kernels.usage(sandbox_id)).guest is None


async def test_calls_of_the_module_sandbox(kernels: Service) -> None:
    sandbox_id = await kernels.new(name="box")
    (child,) = await kernels.forks.fork(sandbox_id, count=1)
    assert isinstance(child, Sandbox)
    code = f"""
import sandbox
print(sandbox.info()["name"], len(sandbox.tree()["nodes"]))
print(sandbox.snapshot("by name")["name"], sandbox.checkpoints()[-1]["name"])
sandbox.kill({child.id!r})
print(len(sandbox.tree()["nodes"]))
"""
    assert await kernels.run(sandbox_id, code) == "box 2\nby name by name\n1\n"
