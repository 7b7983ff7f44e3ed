"""`hypercelld snapshot`: look at, check, remove and carry snapshots, with or without a running gateway.

Thin: turns arguments into calls of vm_runtime.snapshots and answers into text or JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from kernels.directories import default_state_dir
from vm_runtime.snapshots.archive import export_snapshot, import_snapshot
from vm_runtime.snapshots.errors import SnapshotError
from vm_runtime.snapshots.store import Collected, SnapshotStore

_Command = Callable[[SnapshotStore, argparse.Namespace], int]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `snapshot` and its commands; each sets `func`, which takes the parsed arguments and answers the exit code."""
    parser = subparsers.add_parser("snapshot", help="look at, check, remove and carry snapshots")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: _Command, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--state-dir", type=Path, default=None, help="where the gateway keeps its state")
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
    state = arguments.state_dir or default_state_dir()
    try:
        with SnapshotStore(state / "snapshots") as store:
            return command(store, arguments)
    except (SnapshotError, OSError) as error:
        if arguments.json:
            _print_json({"error": str(error)})
        else:
            print(f"hypercelld snapshot: {error}", file=sys.stderr)
        return 1


def _ls(store: SnapshotStore, arguments: argparse.Namespace) -> int:
    entries = store.ls(sandbox_id=arguments.sandbox, owner=arguments.owner)
    pinned: dict[str, list[str]] = {}
    for user, pin in store.pins().items():
        for snapshot_id in pin.snapshots:
            pinned.setdefault(snapshot_id, []).append(user)
    if arguments.json:
        _print_json(
            [
                asdict(entry) | {"created_at": entry.created_at.isoformat(), "needed_by": pinned.get(entry.id, [])}
                for entry in entries
            ]
        )
        return 0
    print(f"{'ID':12}  {'CREATED':19}  {'MIB':>8}  {'LAYERS':>6}  {'TEMPLATE':14}  {'NAME':20}  NEEDED BY")
    for entry in entries:
        created = entry.created_at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        print(
            f"{entry.id[:12]}  {created}  {entry.added_bytes / (1 << 20):8.1f}  {entry.layers:6}  "
            f"{entry.template:14.14}  {entry.name or '':20.20}  {', '.join(pinned.get(entry.id, []))}"
        )
    return 0


def _inspect(store: SnapshotStore, arguments: argparse.Namespace) -> int:
    manifest = store.get(store.resolve(arguments.snapshot))
    print(json.dumps(manifest.model_dump(mode="json"), indent=None if arguments.json else 2, sort_keys=True))
    return 0


def _verify(store: SnapshotStore, arguments: argparse.Namespace) -> int:
    ids = [store.resolve(reference) for reference in arguments.snapshot] or sorted(store.ids())
    problems = {snapshot_id: store.verify(snapshot_id) for snapshot_id in ids}
    if arguments.json:
        _print_json(problems)
    else:
        for snapshot_id, found in problems.items():
            print(f"{snapshot_id}  {'ok' if not found else 'BROKEN'}", *found, sep="\n    ")
    return 1 if any(problems.values()) else 0


def _rm(store: SnapshotStore, arguments: argparse.Namespace) -> int:
    removed = []
    for snapshot_id in [store.resolve(reference) for reference in arguments.snapshot]:
        removed.append((snapshot_id, store.rm(snapshot_id)))
    if arguments.json:
        _print_json({snapshot_id: _collected_json(collected) for snapshot_id, collected in removed})
    else:
        for snapshot_id, collected in removed:
            print(f"{snapshot_id}  removed, {collected.freed_bytes / (1 << 20):.1f} MiB freed")
    return 0


def _gc(store: SnapshotStore, arguments: argparse.Namespace) -> int:
    collected = store.gc()
    if arguments.json:
        _print_json(_collected_json(collected))
    else:
        print(f"{collected.parts} parts and {collected.drafts} unfinished snapshots removed,", end=" ")
        print(f"{collected.freed_bytes / (1 << 20):.1f} MiB freed")
    return 0


def _export(store: SnapshotStore, arguments: argparse.Namespace) -> int:
    snapshot_id = store.resolve(arguments.snapshot)
    size_bytes = export_snapshot(store, snapshot_id, arguments.file)
    if arguments.json:
        _print_json({"id": snapshot_id, "file": str(arguments.file), "size_bytes": size_bytes})
    else:
        print(f"{snapshot_id}  written to {arguments.file}, {size_bytes / (1 << 20):.1f} MiB")
    return 0


def _import(store: SnapshotStore, arguments: argparse.Namespace) -> int:
    images = (arguments.state_dir or default_state_dir()) / "images"
    manifest = import_snapshot(store, arguments.file, has_image=lambda digest: (images / digest).is_dir())
    if arguments.json:
        _print_json(manifest.model_dump(mode="json"))
    else:
        print(f"{manifest.id}  imported")
    return 0


def _collected_json(collected: Collected) -> dict[str, int]:
    return {"parts": collected.parts, "drafts": collected.drafts, "freed_bytes": collected.freed_bytes}


def _print_json(value: object) -> None:
    print(json.dumps(value, sort_keys=True))
