"""Snapshots of a guest of four pages, and processes that are killed while they change a store."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vm_runtime.paged.backing import BackingChain
from vm_runtime.snapshots.layers import encode_index
from vm_runtime.snapshots.manifest import KernelInformation, Manifest, Part, PartKind, Shape, SnapshotContents
from vm_runtime.snapshots.memory import PAGE_SIZE
from vm_runtime.snapshots.store import Draft, Pin, SnapshotStore

PAGES = 4
SHAPE = Shape(memory_mib=1, vcpus=1, disk_mib=1)
# What a process changes files with; before each of them it may be killed.
_STEPS = {"open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}
KILLED = 9


def publish(
    store: SnapshotStore,
    number: int,
    *,
    sandbox_id: str | None = "one",
    base: int = 1,
    layers: Sequence[int] = (),
    disks: Sequence[int] = (),
    parents: Sequence[str] = (),
    flattened_from: str | None = None,
    name: str | None = None,
) -> Manifest:
    """A snapshot after cell `number`; equal numbers of bases, layers and disks are equal parts."""
    with store.begin() as draft:
        return draft.publish(
            SnapshotContents(
                created_at=datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC) + datetime.timedelta(seconds=number),
                owner="local",
                name=name,
                sandbox_id=sandbox_id,
                template="python3",
                image_digest="ab" * 32,
                parents=tuple(parents),
                flattened_from=flattened_from,
                shape=SHAPE,
                state=BackingChain(
                    base=_part(draft, PartKind.BASE, bytes([base]) * PAGE_SIZE + bytes((PAGES - 1) * PAGE_SIZE)),
                    layers=tuple(
                        _part(draft, PartKind.LAYER, encode_index(PAGES * PAGE_SIZE, [(0, 1)], []) + _page(layer))
                        for layer in layers
                    ),
                    disks=_chain(draft, disks),
                ).state(
                    driver="qemu",
                    format="qemu-pages-1",
                    needs={},
                    device=draft.add_bytes(PartKind.DEVICE, b"device %d" % number),
                ),
                kernel=KernelInformation(name="python3", language="python", state="idle", execution_count=number),
                wire_marker="cd" * 16,
            )
        )


def _page(number: int) -> bytes:
    return number.to_bytes(4, "big") * (PAGE_SIZE // 4)


def _chain(draft: Draft, disks: Sequence[int]) -> tuple[Part, ...]:
    return tuple(
        _part(draft, PartKind.DISK, b"QFI\xfb" + _page(disk) * (1 + disk % 3)) for disk in dict.fromkeys(disks)
    )


def _part(draft: Draft, kind: PartKind, content: bytes) -> Part:
    path = draft.path(f"{kind}-{os.urandom(4).hex()}")
    path.write_bytes(content)
    return draft.add(kind, path)


def kill_while(directory: Path, step: int, operation: str, *arguments: Any, **values: Any) -> bool:
    """Whether a process that does this with the store in `directory` was killed; it is before its step `step`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_run, args=(directory, step, operation, arguments, values))
    process.start()
    process.join()
    assert process.exitcode in (0, KILLED)
    return process.exitcode == KILLED


def _run(directory: Path, step: int, operation: str, arguments: Any, values: Any) -> None:
    steps = 0

    def kill(event: str, details: tuple[Any, ...]) -> None:
        nonlocal steps
        if event in _STEPS and str(details[0]).startswith(str(directory)):
            steps += 1
            if steps > step:
                os._exit(KILLED)

    sys.addaudithook(kill)
    with SnapshotStore(directory) as store:
        if operation == "publish":
            publish(store, *arguments, **values)
        elif operation == "pin":
            store.pin(arguments[0], Pin(**arguments[1]))
        else:
            getattr(store, operation)(*arguments)
