"""`hypercell new, ls, info, fork, tree, snapshot, sleep, wake, rm, logs`: the life of sandboxes."""

from __future__ import annotations

import argparse
import asyncio
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress

from hypercell.aio.commands import AsyncCommand, wait_raw
from hypercell.aio.sandbox import AsyncSandbox
from hypercell.cli.output import age, print_json, print_table, print_tree, progress, size
from hypercell.errors import HypercellError
from hypercell.values import FileInfo, SandboxInfo


async def find_id(options: argparse.Namespace, text: str) -> str:
    """The id of the sandbox with this id, beginning of an id, or name. Raises HypercellError unless there is one."""
    with suppress(ValueError):
        return str(uuid.UUID(text))
    known = await AsyncSandbox.list(url=options.url, token=options.token)
    found = [info.id for info in known if info.name == text] or [info.id for info in known if info.id.startswith(text)]
    if len(found) == 1:
        return found[0]
    how = "Several sandboxes have" if found else "No sandbox has"
    raise HypercellError(f"{how} the name, or an id that begins with, {text!r}. `hypercell ls` lists them.")


async def connect(options: argparse.Namespace, text: str) -> AsyncSandbox:
    """A connection to the sandbox that a person named."""
    return await AsyncSandbox.connect(await find_id(options, text), url=options.url, token=options.token)


async def create(options: argparse.Namespace) -> AsyncSandbox:
    """A new sandbox as the arguments say."""
    async with progress("Starting a sandbox"):
        return await AsyncSandbox.create(
            template=options.template,
            snapshot=options.snapshot,
            name=options.name,
            env=dict(options.env),
            memory_mib=options.memory_mib,
            vcpus=options.vcpus,
            disk_mib=options.disk_mib,
            timeout_s=options.lifetime or None,
            on_timeout=getattr(options, "on_timeout", "delete"),
            tags=dict(options.tags),
            url=options.url,
            token=options.token,
        )


async def new(options: argparse.Namespace) -> int:
    sandbox = await create(options)
    try:
        if options.json:
            print_json(await sandbox.info())
        else:
            print(sandbox.id)
    finally:
        await sandbox.close()
    return 0


async def ls(options: argparse.Namespace) -> int:
    if options.place is not None:
        return await list_files(options)
    tags = {name: value if equals else None for name, equals, value in (tag.partition("=") for tag in options.tags)}
    sandboxes = await AsyncSandbox.list(tags=tags, states=options.states, url=options.url, token=options.token)
    if options.json:
        print_json(sandboxes)
        return 0
    if options.ids:
        print("\n".join(one.id for one in sandboxes))
        return 0
    rows = [
        (one.id, one.name or "", one.state, one.execution_state, one.template, age(one.created_at))
        for one in sorted(sandboxes, key=lambda one: one.created_at)
    ]
    print_table(("ID", "NAME", "STATE", "KERNEL", "TEMPLATE", "AGE"), rows)
    return 0


async def list_files(options: argparse.Namespace) -> int:
    name, _, path = options.place.partition(":")
    async with await connect(options, name) as sandbox:
        entries = await sandbox.files.list(path or ".")
    if options.json:
        print_json(entries)
    else:
        print_table(("MODE", "SIZE", "NAME"), [(one.mode, size(one.size_bytes), _shown(one)) for one in entries])
    return 0


def _shown(entry: FileInfo) -> str:
    suffix = {"directory": "/", "link": f" -> {entry.target}"}.get(entry.kind, "")
    return entry.name + suffix


async def info(options: argparse.Namespace) -> int:
    async with await connect(options, options.sandbox) as sandbox:
        known = await sandbox.info()
        metrics = await sandbox.metrics()
    guest = metrics.guest
    if options.json:
        print_json({"sandbox": known, "metrics": metrics})
        return 0
    for name, value in (
        ("id", known.id),
        ("name", known.name),
        ("state", known.state + (f" ({known.reason})" if known.reason else "")),
        ("kernel", known.execution_state),
        ("template", known.template),
        ("parent", known.parent_id),
        ("created", f"{age(known.created_at)} ago"),
        ("last used", f"{age(known.last_activity)} ago"),
        ("tags", " ".join(f"{name}={value}" for name, value in known.tags.items())),
        ("size", f"{known.memory_mib} MiB memory, {known.vcpus} CPU, {known.disk_mib} MiB disk"),
        ("host memory", f"{size(metrics.memory_unique_bytes)} its own, {size(metrics.memory_shared_bytes)} shared"),
        ("cpu now", guest and f"{guest.cpu_percent} %, {guest.cpu_used_ms / 1000:.1f} s in all"),
        ("memory now", guest and f"{size(guest.memory_used_bytes)} of {size(guest.memory_total_bytes)}"),
        ("disk now", guest and f"{size(guest.disk_used_bytes)} of {size(guest.disk_total_bytes)}"),
    ):
        if value:
            print(f"{name:<12}{value}")
    return 0


async def fork(options: argparse.Namespace) -> int:
    async with await connect(options, options.sandbox) as sandbox:
        async with progress(f"Forking into {options.count}"):
            children = await sandbox.fork(options.count, name=options.name, same_random=options.same_random)
        infos = [await child.info() for child in children]
        await asyncio.gather(*(child.close() for child in children))
    _print_infos(options, infos)
    return 0


def _print_infos(options: argparse.Namespace, infos: Sequence[SandboxInfo]) -> None:
    if options.json:
        print_json(list(infos))
    else:
        for one in infos:
            print(one.id)


async def tree(options: argparse.Namespace) -> int:
    async with await connect(options, options.sandbox) as sandbox:
        family = await sandbox.tree()
    if options.json:
        print_json(family)
    else:
        print_tree(family, marked=sandbox.id)
    return 0


async def snapshot(options: argparse.Namespace) -> int:
    async with await connect(options, options.sandbox) as sandbox, progress("Saving"):
        made = await sandbox.create_snapshot(options.name)
    if options.json:
        print_json(made)
    else:
        print(made.id)
    return 0


async def checkpoints(options: argparse.Namespace) -> int:
    async with await connect(options, options.sandbox) as sandbox:
        known = await sandbox.checkpoints()
    if options.json:
        print_json(known)
    else:
        rows = [
            (one.id, one.name or "", "" if one.cell is None else str(one.cell), size(one.bytes), age(one.created_at))
            for one in known
        ]
        print_table(("ID", "NAME", "CELL", "SIZE", "AGE"), rows)
    return 0


async def snapshots(options: argparse.Namespace) -> int:
    known = await AsyncSandbox.snapshots(url=options.url, token=options.token)
    if options.json:
        print_json(known)
    else:
        rows = [
            (one.id, one.name or "", one.template, one.sandbox_id or "", size(one.bytes), age(one.created_at))
            for one in known
        ]
        print_table(("ID", "NAME", "TEMPLATE", "SANDBOX", "SIZE", "AGE"), rows)
    return 0


async def goto(options: argparse.Namespace) -> int:
    async with await connect(options, options.sandbox) as sandbox, progress("Going there"):
        info = await (sandbox.undo() if options.target is None else sandbox.goto(options.target))
    _print_infos(options, [info])
    return 0


async def sleep(options: argparse.Namespace) -> int:
    return await _each(options, "sleep")


async def wake(options: argparse.Namespace) -> int:
    return await _each(options, "wake")


async def pause(options: argparse.Namespace) -> int:
    return await _each(options, "pause")


async def resume(options: argparse.Namespace) -> int:
    return await _each(options, "resume")


async def interrupt(options: argparse.Namespace) -> int:
    return await _each(options, "interrupt")


async def restart(options: argparse.Namespace) -> int:
    return await _each(options, "restart")


async def rm(options: argparse.Namespace) -> int:
    return await _each(options, "kill")


async def _each(options: argparse.Namespace, action: str) -> int:
    """The same for every sandbox; one that fails is told and stops no other."""
    done, status = [], 0
    names = options.sandboxes
    if getattr(options, "all", False):
        names = [info.id for info in await AsyncSandbox.list(url=options.url, token=options.token)]
    for name in names:
        try:
            async with await connect(options, name) as sandbox, progress(f"{action} {name}"):
                await getattr(sandbox, action)()
                done.append(sandbox.id)
        except HypercellError as error:
            print(f"hypercell: {name}: {error}", file=sys.stderr)
            status = 1
    if options.json:
        print_json(done)
    elif done:
        print("\n".join(done))
    return status


async def logs(options: argparse.Namespace) -> int:
    """Events of a sandbox, or the output of a background command: what is kept, and with `--follow` what comes."""
    async with await connect(options, options.sandbox) as sandbox:
        if options.events:
            async for event in sandbox.events():
                if options.json:
                    print_json(event)
                else:
                    print(event.kind, dict(event.data), flush=True)
            return 0
        command_id = options.command_id
        if command_id is None:
            known = [one for one in await sandbox.commands.list() if one.background]
            if not known:
                raise HypercellError("No background command has run in this sandbox; `hypercell exec -d` starts one.")
            command_id = max(known, key=lambda one: one.started_at).command_id
        running = await sandbox.commands.get(command_id)
        print(f"[{running.command_id}] {running.command}", file=sys.stderr)

        async with await sandbox.commands.attach(command_id) as command:
            await _show_output(command, None if options.follow else running.output_bytes)
    return 0


async def _show_output(command: AsyncCommand, up_to: int | None) -> None:
    """The command's output to its end, or `up_to` so many bytes: what it had said when it was looked at."""
    shown = _Shown(up_to)
    following = asyncio.create_task(wait_raw(command, shown))
    reached = asyncio.create_task(shown.reached.wait())
    try:
        await asyncio.wait({following, reached}, return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()
    finally:
        following.cancel()
        reached.cancel()
        await asyncio.gather(following, reached, return_exceptions=True)


class _Shown:
    """Passes bytes on to stdout and counts them. reached: there have been `up_to`, with those that are kept no more."""

    def __init__(self, up_to: int | None) -> None:
        self._up_to = up_to
        self._count = 0
        self.reached = asyncio.Event()
        self._counted(0)

    def write(self, data: bytes, *, is_stdout: bool) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        self._counted(len(data))

    def skip(self, count: int) -> None:
        print(f"hypercell: {count} bytes of output before this are kept no more", file=sys.stderr)
        self._counted(count)

    def _counted(self, count: int) -> None:
        self._count += count
        if self._up_to is not None and self._count >= self._up_to:
            self.reached.set()
