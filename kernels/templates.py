"""Templates: an image booted once, its kernel started and warmed, then snapshotted; new kernels are restored from it.

A template is addressed by a digest of all that it depends on (image, machine shape, VMM identity, guest code), so a
change of any of them makes a new one and leaves the old to the sandboxes that still need it. Its memory and disk are a
snapshot like any other, in the same store; `STATE/templates/<digest>.json` says which.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import logging
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kernels.errors import MachineFailedError, TemplateError
from kernels.session import Greeting, GuestSession
from vm_runtime.drivers.base import Driver, MachinePaths
from vm_runtime.errors import VmRuntimeError
from vm_runtime.guest.archive import guest_archive, guest_digest
from vm_runtime.images.store import Image
from vm_runtime.saving.saver import Saver
from vm_runtime.saving.values import AfterCapture, Description
from vm_runtime.snapshots.errors import SnapshotError, SnapshotInUseError, UnknownSnapshotError
from vm_runtime.snapshots.manifest import Manifest
from vm_runtime.snapshots.store import Pin, SnapshotStore
from vm_runtime.spec import MachineShape, MachineSpec
from vm_runtime.wire.protocol import BOOT_MARKER

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
# A cold boot under emulation takes 20 to 30 s on an idle machine, several times that on a busy one.
BOOT_TIMEOUT_S = 300.0
# Warm-up imports pandas and matplotlib and draws a plot: 20 s emulated.
WARM_UP_TIMEOUT_S = 300.0

Progress = Callable[[str], None]


class TemplateRecord(BaseModel):
    """`STATE/templates/<digest>.json`. snapshot: its id in the snapshot store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    digest: str
    snapshot: str


@dataclass(frozen=True, kw_only=True)
class Template:
    """A template that can be restored. digest: see `template_digest`."""

    digest: str
    snapshot: Manifest


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


def stored_templates(directory: Path, store: SnapshotStore) -> list[tuple[TemplateRecord, Manifest | None]]:
    """Every template's record, with its snapshot, or None where that is missing or broken. Unreadable records count as
    none. Blocking."""
    found: list[tuple[TemplateRecord, Manifest | None]] = []
    for path in sorted(directory.glob("*.json")):
        try:
            record = TemplateRecord.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            continue
        try:
            found.append((record, store.get(record.snapshot)))
        except SnapshotError:
            found.append((record, None))
    return found


def remove_template(directory: Path, store: SnapshotStore, record: TemplateRecord) -> None:
    """Removes a template. What sandboxes made from it need, they have pinned, and it stays. Blocking."""
    (directory / f"{record.digest}.json").unlink(missing_ok=True)
    store.unpin(_pin_name(record))
    with contextlib.suppress(UnknownSnapshotError, SnapshotInUseError):  # a sandbox may wake from the very same
        store.rm(record.snapshot)


def _pin_name(record: TemplateRecord) -> str:
    return f"template-{record.digest[:16]}"


class TemplateStore:
    """The templates of one state directory. `await ensure(...)` gives one, building it on first need.

    Builds are serialised: in this process by a lock, between processes by a file lock. An interrupted build leaves a
    `.building-*` directory that the next one removes.
    """

    def __init__(self, directory: Path, run_dir: Path, driver: Driver, store: SnapshotStore, saver: Saver) -> None:
        self._directory = directory
        self._run_dir = run_dir
        self._driver = driver
        self._store = store
        self._saver = saver
        self._lock = asyncio.Lock()
        self._known: dict[str, Template] = {}
        self._builds: dict[str, asyncio.Task[Template]] = {}

    def _digest(self, image: Image, shape: MachineShape) -> str:
        return template_digest(image.files.digest, shape, self._driver.identity())

    def _find(self, digest: str) -> Template | None:
        """The template if it has been built. A damaged one counts as not built."""
        if digest not in self._known:
            try:
                record = TemplateRecord.model_validate_json((self._directory / f"{digest}.json").read_bytes())
                self._known[digest] = Template(digest=digest, snapshot=self._store.get(record.snapshot))
            except (FileNotFoundError, ValidationError, SnapshotError):
                return None
        return self._known[digest]

    async def ensure(self, image: Image, shape: MachineShape, *, progress: Progress) -> Template:
        """The template for this image and shape; built now (20 to 60 s emulated) if there is none. TemplateError.

        A build continues when whoever asked for it gives up: the next who asks wants the same.
        """
        digest = self._digest(image, shape)
        if (found := self._find(digest)) is not None:
            return found
        build = self._builds.get(digest)
        if build is None:
            build = self._builds[digest] = asyncio.create_task(self._ensure(image, shape, progress))
            build.add_done_callback(lambda build: self._built(digest, build))
        return await asyncio.shield(build)

    def _built(self, digest: str, build: asyncio.Task[Template]) -> None:
        del self._builds[digest]
        if not build.cancelled() and (error := build.exception()) is not None:
            log.warning("%s", error)  # perhaps nobody waits for it any more

    async def close(self) -> None:
        """Gives up what is being built."""
        builds = list(self._builds.values())
        for build in builds:
            build.cancel()
        await asyncio.gather(*builds, return_exceptions=True)

    async def _ensure(self, image: Image, shape: MachineShape, progress: Progress) -> Template:
        async with self._lock, self._file_lock():
            return self._find(self._digest(image, shape)) or await self._build(image, shape, progress)

    async def remove_stale(self, images: Iterable[Image]) -> None:
        """Removes templates that no new kernel can be restored from: of another image, VMM, CPU model or agent."""
        current = {image.files.digest for image in images}
        async with self._lock, self._file_lock():
            for record, snapshot in await asyncio.to_thread(stored_templates, self._directory, self._store):
                if snapshot is not None and snapshot.image_digest in current:
                    shape = MachineShape(**snapshot.shape.model_dump())
                    if template_digest(snapshot.image_digest, shape, self._driver.identity()) == record.digest:
                        continue
                log.info("Template %s is out of date and removed", record.digest[:12])
                await asyncio.to_thread(remove_template, self._directory, self._store, record)

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

    async def _build(self, image: Image, shape: MachineShape, progress: Progress) -> Template:
        for stale in self._directory.glob(".building-*"):
            shutil.rmtree(stale, ignore_errors=True)
        digest = self._digest(image, shape)
        work = self._directory / f".building-{digest[:12]}"
        work.mkdir()
        started = time.monotonic()

        def step(text: str) -> None:
            progress(f"{text} ({time.monotonic() - started:.0f} s)")

        try:
            snapshot = await self._boot_and_save(image, shape, work, step)
            await asyncio.to_thread(self._publish, TemplateRecord(digest=digest, snapshot=snapshot.id))
            step(f"Template {digest[:12]} is ready")
            return Template(digest=digest, snapshot=snapshot)
        except (VmRuntimeError, SnapshotError, MachineFailedError, OSError) as error:
            name = image.manifest.recipe.name
            raise TemplateError(f"The template for {name} could not be built: {error}") from error
        finally:
            await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)

    def _publish(self, record: TemplateRecord) -> None:
        self._store.pin(_pin_name(record), Pin(snapshots=(record.snapshot,)))
        temporary = self._directory / f".{record.digest}.json"
        temporary.write_text(record.model_dump_json())
        temporary.replace(self._directory / f"{record.digest}.json")

    async def _boot_and_save(self, image: Image, shape: MachineShape, work: Path, step: Progress) -> Manifest:
        machine_id = secrets.token_hex(6)
        paths = MachinePaths(id=machine_id, run_dir=self._run_dir / "m" / machine_id, disk_dir=work)
        spec = MachineSpec(shape=shape, image=image.files)
        guest = await asyncio.to_thread(guest_archive)
        async with AsyncExitStack() as stack:
            step("Booting the image once")
            saved = await self._saver.boot(spec, paths=paths, guest=guest, timeout_s=BOOT_TIMEOUT_S)
            stack.push_async_callback(saved.kill)
            greeting = Greeting(
                marker=BOOT_MARKER.hex(), identity={"sandbox_id": "", "hostname": "template"}, key=None, restored=False
            )
            session = await GuestSession.open(saved.machine.open_wire, greeting, timeout_s=BOOT_TIMEOUT_S)
            stack.push_async_callback(session.close)
            step("Warming up the kernel")
            recipe = image.manifest.recipe
            prepare = {"warmup": recipe.warmup, "env": dict(recipe.environment)}
            await session.call("template.prepare", prepare, timeout_s=WARM_UP_TIMEOUT_S)
            await session.close()
            step("Taking the snapshot")
            description = Description(
                owner="template", name=None, sandbox_id=None, template=recipe.name, image_digest=image.files.digest,
                kernel=None, wire_marker=session.next_marker,
            )  # fmt: skip
            return (await saved.take(description, then=AfterCapture.STOP)).manifest
