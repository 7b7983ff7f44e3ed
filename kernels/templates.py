"""Templates: an image booted once, its kernel started and warmed, then snapshotted; new kernels are restored from it.

A template is addressed by a digest of all that it depends on (image, machine shape, VMM identity, guest code), so a
change of any of them makes a new one and leaves the old to the sandboxes that still run on it.

    STATE/templates/<digest>/   manifest.json   ram (sparse)   device   disk.raw (sparse)
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from kernels.errors import MachineFailedError, TemplateError
from kernels.session import Greeting, GuestSession
from vm_runtime.drivers.base import Driver, MachinePlace
from vm_runtime.errors import VmRuntimeError
from vm_runtime.guest.archive import guest_archive, guest_digest
from vm_runtime.images.store import Image
from vm_runtime.snapshots.memory import freeze_memfd
from vm_runtime.spec import MachineShape, MachineSpec
from vm_runtime.wire.protocol import BOOT_MARKER

FORMAT_VERSION = 1
# A cold boot under emulation takes 20 to 30 s on an idle machine, several times that on a busy one.
BOOT_TIMEOUT_S = 300.0
# Warm-up imports pandas and matplotlib and draws a plot: 20 s emulated.
WARM_UP_TIMEOUT_S = 300.0

Progress = Callable[[str], None]


class TemplateManifest(BaseModel):
    """`manifest.json` of a template. marker: opens the first session of a machine restored from it (hex)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    digest: str
    image: str
    vmm: str
    guest: str
    memory_mib: int
    vcpus: int
    disk_mib: int
    marker: str
    ram_digest: str
    device_digest: str
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class Template:
    """A template on disk, complete and checked."""

    manifest: TemplateManifest
    directory: Path
    spec: MachineSpec

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def ram(self) -> Path:
        return self.directory / "ram"

    @property
    def device(self) -> Path:
        return self.directory / "device"

    @property
    def disk(self) -> Path:
        return self.directory / "disk.raw"


def template_digest(image_digest: str, shape: MachineShape, vmm_identity: str) -> str:
    """The address of the template for these inputs and this version's guest code."""
    inputs = {
        "format": FORMAT_VERSION,
        "image": image_digest,
        "shape": [shape.memory_mib, shape.vcpus, shape.disk_mib],
        "vmm": vmm_identity,
        "guest": guest_digest(),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


class TemplateStore:
    """The templates of one state directory. `await ensure(...)` gives one, building it on first need.

    Builds are serialised: in this process by a lock, between processes by a file lock. An interrupted build leaves a
    `.building-*` directory that the next one removes.
    """

    def __init__(self, directory: Path, run_dir: Path, driver: Driver) -> None:
        self._directory = directory
        self._run_dir = run_dir
        self._driver = driver
        self._lock = asyncio.Lock()
        self._known: dict[str, Template] = {}

    def digest_for(self, image: Image, shape: MachineShape) -> str:
        return template_digest(image.files.digest, shape, self._driver.identity())

    def find(self, image: Image, shape: MachineShape) -> Template | None:
        """The template for this image and shape if it has been built."""
        return self.load(self.digest_for(image, shape), image)

    def load(self, digest: str, image: Image) -> Template | None:
        """The template with this digest, or None. Errors: TemplateError for one that is damaged."""
        if digest in self._known:
            return self._known[digest]
        directory = self._directory / digest
        if not (directory / "manifest.json").exists():
            return None
        try:
            manifest = TemplateManifest.model_validate_json((directory / "manifest.json").read_bytes())
        except ValidationError as error:
            raise TemplateError(f"{directory} is damaged; remove it and it is built anew: {error}") from error
        shape = MachineShape(memory_mib=manifest.memory_mib, vcpus=manifest.vcpus, disk_mib=manifest.disk_mib)
        template = Template(manifest=manifest, directory=directory, spec=MachineSpec(shape=shape, image=image.files))
        self._known[digest] = template
        return template

    async def ensure(self, image: Image, shape: MachineShape, *, progress: Progress) -> Template:
        """The template for this image and shape; built now (20 to 60 s emulated) if there is none."""
        found = self.find(image, shape)
        if found is not None:
            return found
        async with self._lock, self._file_lock():
            found = self.find(image, shape)
            if found is None:
                await self._build(image, shape, progress)
                found = self.find(image, shape)
            assert found is not None
            return found

    @asynccontextmanager
    async def _file_lock(self) -> AsyncIterator[None]:
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / ".lock").open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    # Another process builds; its lock is a kernel object without an event to wait for here.
                    await asyncio.sleep(0.5)
            yield

    async def _build(self, image: Image, shape: MachineShape, progress: Progress) -> None:
        for stale in self._directory.glob(".building-*"):
            shutil.rmtree(stale, ignore_errors=True)
        digest = self.digest_for(image, shape)
        work = self._directory / f".building-{digest[:12]}"
        work.mkdir()
        started = time.monotonic()

        def step(text: str) -> None:
            progress(f"{text} ({time.monotonic() - started:.0f} s)")

        try:
            manifest = await self._boot_and_freeze(image, shape, work, digest, step)
            (work / "manifest.json").write_text(manifest.model_dump_json(indent=2))
            await asyncio.to_thread(_sync_tree, work)
            work.rename(self._directory / digest)
            step(f"Template {digest[:12]} is ready")
        except (VmRuntimeError, MachineFailedError, OSError) as error:
            raise TemplateError(
                f"The template for image {image.files.digest[:12]} could not be built: {error}"
            ) from error
        finally:
            await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)

    async def _boot_and_freeze(
        self, image: Image, shape: MachineShape, work: Path, digest: str, step: Progress
    ) -> TemplateManifest:
        initramfs = work / "initramfs.cpio"
        initramfs.write_bytes(image.files.initramfs.read_bytes() + guest_archive())
        disk = work / "disk.raw"
        await _format_disk(disk, shape.disk_mib)
        machine_id = secrets.token_hex(6)
        place = MachinePlace(id=machine_id, run_dir=self._run_dir / "m" / machine_id, disk_dir=work)
        spec = MachineSpec(shape=shape, image=image.files)
        async with AsyncExitStack() as stack:
            step("Booting the image once")
            machine = await self._driver.boot(
                spec, place=place, initramfs=initramfs, disk=disk, timeout_s=BOOT_TIMEOUT_S
            )
            stack.push_async_callback(machine.kill)
            greeting = Greeting(
                marker=BOOT_MARKER.hex(), identity={"sandbox_id": "", "hostname": "template"}, key=None, restored=False
            )
            session = await GuestSession.open(machine.wire_path, greeting, timeout_s=BOOT_TIMEOUT_S)
            stack.push_async_callback(session.close)
            step("Warming up the kernel")
            recipe = image.manifest.recipe
            await session.call("template.prepare", {"warmup": recipe.warmup}, timeout_s=WARM_UP_TIMEOUT_S)
            await session.call(
                "kernel.start",
                {"env": dict(recipe.environment)},
                timeout_s=WARM_UP_TIMEOUT_S,
            )
            await session.close()
            step("Taking the snapshot")
            await machine.pause()
            await machine.device_state(work / "device")
            assert machine.memory_fd is not None, "a booted machine's RAM is a memfd"
            ram_digest = await asyncio.to_thread(freeze_memfd, machine.memory_fd, work / "ram")
        initramfs.unlink()
        return TemplateManifest(
            format=FORMAT_VERSION,
            digest=digest,
            image=image.files.digest,
            vmm=self._driver.identity(),
            guest=guest_digest(),
            memory_mib=shape.memory_mib,
            vcpus=shape.vcpus,
            disk_mib=shape.disk_mib,
            marker=session.next_marker,
            ram_digest=ram_digest,
            device_digest=hashlib.sha256((work / "device").read_bytes()).hexdigest(),
            created_at=datetime.now(UTC),
        )


async def _format_disk(path: Path, size_mib: int) -> None:
    """An empty sparse ext4 file system. Without a journal: the disk is only ever used together with the memory that
    it was frozen with, so there is nothing that a journal could repair."""
    with path.open("wb") as file:
        file.truncate(size_mib << 20)
    process = await asyncio.create_subprocess_exec(
        "mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1,root_owner=0:0", str(path),
        env={**os.environ, "PATH": os.environ.get("PATH", "") + ":/sbin:/usr/sbin"},
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    if process.returncode != 0:
        raise TemplateError(f"mke2fs failed ({process.returncode}): {output.decode(errors='replace').strip()}")


def _sync_tree(directory: Path) -> None:
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
