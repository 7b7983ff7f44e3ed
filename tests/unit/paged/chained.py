"""Snapshots as flattening finds them: many small layers and disks, without a machine that wrote them."""

from __future__ import annotations

import datetime
import os
import secrets

from vm_runtime.drivers.qemu import qcow2
from vm_runtime.paged.backing import BackingChain
from vm_runtime.snapshots.layers import encode_index
from vm_runtime.snapshots.manifest import Manifest, Part, PartKind, Shape, SnapshotContents
from vm_runtime.snapshots.memory import PAGE_SIZE, memory_digest
from vm_runtime.snapshots.store import Draft, SnapshotStore

MEMORY_BYTES = 1 << 20
DISK_BYTES = 64 << 20


def publish(store: SnapshotStore, *, layers: int, disks: int) -> Manifest:
    """A snapshot with as many small layers and disks, each with something of its own."""
    with store.begin() as draft:
        path = draft.path("base")
        path.write_bytes(secrets.token_bytes(MEMORY_BYTES))
        base = draft.add(PartKind.BASE, path, digest=memory_digest(path))
        backing = BackingChain(
            base=base,
            layers=tuple(
                draft.add_bytes(
                    PartKind.LAYER, encode_index(MEMORY_BYTES, [(number, 1)], []) + secrets.token_bytes(PAGE_SIZE)
                )
                for number in range(layers)
            ),
            disks=tuple(chain(draft, disks)),
        )
        contents = SnapshotContents(
            created_at=datetime.datetime.now(datetime.UTC),
            owner="someone",
            sandbox_id="s1",
            template="tiny",
            image_digest="0" * 64,
            shape=Shape(memory_mib=1, vcpus=1, disk_mib=64),
            state=backing.state(
                driver="qemu", format="f", needs={}, device=draft.add_bytes(PartKind.DEVICE, secrets.token_bytes(16))
            ),
            wire_marker="0" * 32,
        )
        return draft.publish(contents)


def chain(draft: Draft, count: int) -> list[Part]:
    disks: list[Part] = []
    for number in range(count):
        path = draft.path(f"disk-{number}")
        if number:
            # The host names of QEMU's compatible features, of which unknown ones are ignored, make each file another.
            qcow2.create_overlay(path, virtual_bytes=DISK_BYTES)
            with path.open("r+b") as file:
                file.seek(80)
                file.write(bytes([number]) * 8)
        else:
            path.touch()
            os.truncate(path, DISK_BYTES)
        disks.append(draft.add(PartKind.DISK, path))
    return disks
