"""`hypercelld snapshot`: look at, check, remove and carry snapshots, with or without a running gateway.

Thin: turns arguments into calls of vm_runtime.snapshots and answers into text or JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from kernels.directories import default_state_dir
from vm_runtime.snapshots.archive import export_snapshot, import_snapshot
from vm_runtime.snapshots.errors import SnapshotError
from vm_runtime.snapshots.store import SnapshotStore


@dataclass(frozen=True)
class Output:
    """What a command prints: a JSON value, or a text for people."""

    value: object
    text: str
    exit_code: int = 0


_Command = Callable[[SnapshotStore, argparse.Namespace], Output]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `snapshot` and its commands; each sets `func`, which takes the parsed arguments and answers the exit code."""
    parser = subparsers.add_parser("snapshot", help="look at, check, remove and carry snapshots")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: _Command, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--state-dir", type=Path, default=default_state_dir(), help="default: %(default)s")
        added.add_argument("--json", action="store_true", help="print JSON")
        added.set_defaults(func=lambda arguments: _run(command, arguments))
        return added

    ls = add("ls", _ls, "list snapshots, oldest first")
    ls.add_argument("--sandbox", help="only those of the sandbox with this id")
    ls.add_argument("--owner", help="only those of this owner")
    add("inspect", _inspect, "show a snapshot's manifest").add_argument("snapshot", help="id, its beginning, or name")
    verify = add("verify", _verify, "read every part of snapshots and compare it with its digest")
    verify.add_argument("snapshot", nargs="*", help="id, its beginning, or name; all of them if none is given")
    rm = add("rm", _rm, "remove snapshots and what only they needed")
    rm.add_argument("snapshot", nargs="+", help="id, its beginning, or name")
    add("gc", _gc, "remove files that no snapshot and no sandbox needs")
    export = add("export", _export, "write a snapshot to one file")
    export.add_argument("snapshot", help="id, its beginning, or name")
    export.add_argument("file", type=Path, help="a new file")
    import_ = add("import", _import, "read a snapshot that was exported, here or elsewhere")
    import_.add_argument("file", type=Path, help="what `export` has written")


def _run(command: _Command, arguments: argparse.Namespace) -> int:
    try:
        with SnapshotStore(arguments.state_dir / "snapshots") as store:
            answer = command(store, arguments)
    except (SnapshotError, OSError) as error:
        answer = Output({"error": str(error)}, "", exit_code=1)
        if not arguments.json:
            print(f"hypercelld snapshot: {error}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(answer.value, sort_keys=True))
    elif answer.text:
        print(answer.text)
    return answer.exit_code


def _ls(store: SnapshotStore, arguments: argparse.Namespace) -> Output:
    entries = store.ls(sandbox_id=arguments.sandbox, owner=arguments.owner)
    pinned: dict[str, list[str]] = {}
    for user, pin in store.pins().items():
        for snapshot_id in pin.snapshots:
            pinned.setdefault(snapshot_id, []).append(user)
    lines = [f"{'ID':12}  {'CREATED':19}  {'MIB':>8}  {'LAYERS':>6}  {'TEMPLATE':14}  {'NAME':20}  NEEDED BY"]
    values = []
    for entry in entries:
        needed_by = pinned.get(entry.id, [])
        values.append(asdict(entry) | {"created_at": entry.created_at.isoformat(), "needed_by": needed_by})
        lines.append(
            f"{entry.id[:12]}  {entry.created_at.astimezone():%Y-%m-%d %H:%M:%S}  {_mib(entry.added_bytes):8.1f}  "
            f"{entry.layers:6}  {entry.template:14.14}  {entry.name or '':20.20}  {', '.join(needed_by)}"
        )
    return Output(values, "\n".join(lines))


def _inspect(store: SnapshotStore, arguments: argparse.Namespace) -> Output:
    value = store.get(store.resolve(arguments.snapshot)).model_dump(mode="json")
    return Output(value, json.dumps(value, indent=2, sort_keys=True))


def _verify(store: SnapshotStore, arguments: argparse.Namespace) -> Output:
    ids = [store.resolve(reference) for reference in arguments.snapshot] or sorted(store.ids())
    problems = {snapshot_id: store.verify(snapshot_id) for snapshot_id in ids}
    lines = [
        "\n    ".join([f"{snapshot_id}  {'ok' if not found else 'BROKEN'}", *found])
        for snapshot_id, found in problems.items()
    ]
    return Output(problems, "\n".join(lines), exit_code=1 if any(problems.values()) else 0)


def _rm(store: SnapshotStore, arguments: argparse.Namespace) -> Output:
    ids = [store.resolve(reference) for reference in arguments.snapshot]
    removed = {snapshot_id: store.rm(snapshot_id) for snapshot_id in ids}
    lines = [f"{id_}  removed, {_mib(collected.freed_bytes):.1f} MiB freed" for id_, collected in removed.items()]
    return Output({id_: asdict(collected) for id_, collected in removed.items()}, "\n".join(lines))


def _gc(store: SnapshotStore, arguments: argparse.Namespace) -> Output:
    collected = store.gc()
    text = f"{collected.parts} parts and {collected.drafts} unfinished snapshots removed"
    return Output(asdict(collected), f"{text}, {_mib(collected.freed_bytes):.1f} MiB freed")


def _export(store: SnapshotStore, arguments: argparse.Namespace) -> Output:
    snapshot_id = store.resolve(arguments.snapshot)
    size_bytes = export_snapshot(store, snapshot_id, arguments.file)
    value = {"id": snapshot_id, "file": str(arguments.file), "size_bytes": size_bytes}
    return Output(value, f"{snapshot_id}  written to {arguments.file}, {_mib(size_bytes):.1f} MiB")


def _import(store: SnapshotStore, arguments: argparse.Namespace) -> Output:
    images = arguments.state_dir / "images"
    manifest = import_snapshot(store, arguments.file, has_image=lambda digest: (images / digest).is_dir())
    return Output(manifest.model_dump(mode="json"), f"{manifest.id}  imported")


def _mib(size_bytes: int) -> float:
    return size_bytes / (1 << 20)
