"""A program that type checkers read; it is never run."""

from __future__ import annotations

import asyncio

from hypercell import AsyncSandbox, CommandResult, Execution, FileInfo, Result, Sandbox, SandboxInfo
from hypercell.search import Budget, SearchResult, beam_search, rollouts, take


def show(result: Result) -> None:
    html: str | None = result.html
    print(html)


def blocking() -> None:
    with Sandbox.create(template="python3", memory_mib=512, timeout=60, env={"A": "b"}) as sandbox:
        execution: Execution = sandbox.run_code("1", on_stdout=lambda text: print(text.upper()), on_result=show)
        error = execution.error
        if error is not None:
            print(error.name)
        done: CommandResult = sandbox.commands.run(["ls"], check=True, timeout=10)
        entries: list[FileInfo] = sandbox.files.list(".")
        children: list[Sandbox] = sandbox.fork(2)
        infos: list[SandboxInfo] = Sandbox.list()
        for piece in sandbox.files.stream("x"):
            print(len(piece))
        with sandbox.files.watch("x", user="root") as watch:
            for change in watch:
                print(change.event.upper(), change.old_path)
        for entry in sandbox.files.scan():
            print(entry.name.upper())
        with sandbox.commands.shell(cwd="~") as shell:
            kept: CommandResult = shell.run("pwd", timeout=1)
            print(kept.exit_code)
        found: SearchResult = beam_search(
            sandbox, expand=lambda steps: list(steps), score="1.0", budget=Budget(depth=1)
        )
        with take(found) as best:
            print(best.id, done.stdout, entries, children, infos)
        for rollout in rollouts(sandbox, "1", 2):
            print(rollout.value)


async def asynchronous() -> None:
    async with await AsyncSandbox.create() as sandbox:
        execution: Execution = await sandbox.run_code("1", timeout=2.5)
        print(execution.text)
        children: list[AsyncSandbox] = await sandbox.fork(2)
        async for event in sandbox.events():
            print(event.kind, children)
        async for piece in sandbox.files.stream("x", offset=1, length=2):
            print(piece.decode())
        async with await sandbox.files.watch() as watch, await sandbox.commands.shell() as shell:
            async for change in watch:
                print(change.event.upper(), (await shell.run("true")).ok)


if __name__ == "__main__":
    blocking()
    asyncio.run(asynchronous())
