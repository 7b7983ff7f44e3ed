"""Merging overlays with the real `qemu-img`, confined: the result shows what the chain showed, and no header is
followed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from vm_runtime.confinement.host import find_confinement
from vm_runtime.confinement.process import Spawner, SpawnRequest
from vm_runtime.drivers.qemu import disk_merge, qcow2
from vm_runtime.errors import DriverError
from vm_runtime.snapshots.errors import BrokenSnapshotError

pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-utils is not installed")

DISK_BYTES = 64 << 20

Merge = Callable[[Sequence[Path], Path], "asyncio.Future[None]"]


@pytest.fixture
async def merge() -> AsyncIterator[Merge]:
    spawner = Spawner()
    host = await find_confinement(spawner, devices=())

    def run(overlays: Sequence[Path], target: Path) -> asyncio.Future[None]:
        return asyncio.ensure_future(disk_merge.merge_overlays(overlays, target, spawner=spawner, host=host))

    try:
        yield run
    finally:
        await spawner.close()


def chain(paths: Sequence[Path]) -> str:
    """These overlays over a raw disk."""
    node: dict[str, object] = {"driver": "raw", "file": {"driver": "file", "filename": str(paths[0].parent / "raw")}}
    for path in paths:
        node = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "backing": node}
    return f"json:{json.dumps(node)}"


def write(directory: Path, *layers: Sequence[str]) -> list[Path]:
    """One overlay for each sequence of qemu-io commands."""
    raw = directory / "raw"
    raw.touch()
    os.truncate(raw, DISK_BYTES)
    subprocess.run(["qemu-io", "-f", "raw", "-c", "write -P 0xee 0 16M", raw], check=True, stdout=subprocess.DEVNULL)
    paths: list[Path] = []
    for number, commands in enumerate(layers):
        paths.append(directory / f"{number}.qcow2")
        qcow2.create_overlay(paths[-1], virtual_bytes=DISK_BYTES)
        words = [word for command in commands for word in ("-c", command)]
        subprocess.run(["qemu-io", "-d", "unmap", *words, chain(paths)], check=True, stdout=subprocess.DEVNULL)
    return paths


def same(one: Sequence[Path], two: Sequence[Path]) -> bool:
    return subprocess.run(["qemu-img", "compare", "-q", chain(one), chain(two)]).returncode == 0


async def test_the_merged_overlay_shows_what_the_chain_shows(tmp_path: Path, merge: Merge) -> None:
    paths = write(
        tmp_path,
        ["write -P 1 0 64k", "write -P 1 3M 1M"],
        ["write -P 2 64k 128k", "write -z 3M 64k", "write -P 2 40M 1k"],
        ["discard 1M 64k", "write -z 4M 128k", "write -P 3 100k 10k"],
    )
    merged = tmp_path / "merged"
    await merge(paths, merged)
    assert same(paths, [merged])
    assert merged.stat().st_mode & 0o777 == 0o600
    assert merged.stat().st_uid == os.geteuid()
    # Some of a chain: what is zero there hides what lies below.
    upper = tmp_path / "upper"
    await merge(paths[1:], upper)
    assert same(paths, [paths[0], upper])


async def test_a_chain_longer_than_a_batch_is_merged(
    tmp_path: Path, merge: Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_merge, "BATCH", 2)
    paths = write(tmp_path, *([f"write -P {number + 1} {number}M 64k", "write -P 9 0 64k"] for number in range(5)))
    await merge(paths, tmp_path / "merged")
    assert same(paths, [tmp_path / "merged"])


def set_backing(path: Path, name: bytes) -> None:
    """What QEMU's block-stream writes, and what a VMM that was broken into could."""
    with path.open("r+b") as file:
        file.seek(8)
        file.write(struct.pack(">QI", 0x200, len(name)))
        file.seek(0x200)
        file.write(name)


async def test_a_backing_name_in_a_header_is_not_followed(tmp_path: Path, merge: Merge) -> None:
    paths = write(tmp_path, ["write -P 1 0 64k"], ["write -P 2 1M 64k"])
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret " * (DISK_BYTES // 7))
    for path in paths:
        set_backing(path, os.fsencode(secret))
    merged = tmp_path / "merged"
    await merge(paths, merged)
    assert same(paths, [merged])
    assert b"secret" not in merged.read_bytes()
    assert merged.read_bytes()[8:20] == bytes(12)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, b"QFI\0"),  # another format
        (4, struct.pack(">I", 2)),  # another version
        (20, struct.pack(">I", 12)),  # other clusters
        (32, struct.pack(">I", 1)),  # encrypted
        (60, struct.pack(">I", 1)),  # internal snapshots
        (72, struct.pack(">Q", 4)),  # an external data file, by name
        (24, struct.pack(">Q", 1 << 60)),  # larger than anything
        (24, struct.pack(">Q", 128 << 20)),  # larger than its table, and than those below
        (3 * qcow2.CLUSTER_BYTES, struct.pack(">Q", 0x200)),  # a table between clusters
    ],
)
async def test_a_hostile_overlay_is_refused_and_leaves_nothing(
    tmp_path: Path, merge: Merge, offset: int, value: bytes
) -> None:
    paths = write(tmp_path, ["write -P 1 0 64k"], ["write -P 2 1M 64k"])
    with paths[0].open("r+b") as file:
        file.seek(offset)
        file.write(value)
    with pytest.raises(BrokenSnapshotError):
        await merge(paths, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("how", ["cancelled", "late"])
async def test_a_merge_that_hangs_is_ended_and_leaves_nothing(
    tmp_path: Path, merge: Merge, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    paths = write(tmp_path, ["write -P 1 0 64k"], ["write -P 2 1M 64k"])
    # In the walls there is no such script, so a system's program that waits for ever stands for it.
    monkeypatch.setattr(disk_merge, "PROGRAM", "tail")
    monkeypatch.setattr(disk_merge, "arguments", lambda count: ["-f", "/dev/null"])
    started = asyncio.Event()
    spawn = Spawner.spawn

    async def noted(self: Spawner, request: SpawnRequest) -> object:
        try:
            return await spawn(self, request)
        finally:
            started.set()

    monkeypatch.setattr(Spawner, "spawn", noted)
    if how == "late":
        monkeypatch.setattr(disk_merge, "_LIMIT_S", 0.2)
        with pytest.raises(DriverError, match="within 0 s"):
            await merge(paths, tmp_path / "merged")
    else:
        running = merge(paths, tmp_path / "merged")
        await started.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert not (tmp_path / "merged").exists()
