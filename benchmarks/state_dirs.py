"""State directories for the benchmark's gateways: a cached one with everything built, and temporary ones that share it.

Files are hard-linked, never written: what a gateway makes in a borrowed directory, and what it removes there, stays
there. Knows the layout of images, templates and snapshots (docs/architecture.md), not what is measured.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from benchmarks.messages import BenchmarkError
from gateway.runtime_files import state_lock
from kernels.directories import run_dir_of
from kernels.service import SandboxService
from kernels.settings import ServiceSettings
from kernels.templates import TemplateRecord
from vm_runtime.drivers.base import Driver, DriverSettings
from vm_runtime.drivers.find import DEFAULT_DRIVER, find_driver
from vm_runtime.images.progress import by_line
from vm_runtime.images.recipe import DEFAULT_RECIPE, load_recipe
from vm_runtime.images.store import ImageStore
from vm_runtime.snapshots.manifest import Manifest
from vm_runtime.snapshots.store import Pin, SnapshotStore

Progress = Callable[[str], None]

SCIKIT_LEARN = "scikit-learn"
RECIPES = Path(__file__).parent / "recipes"
# Where `serve` keeps the accelerator that it found to work.
ACCELERATOR_FILE = "accelerator.json"


async def build_state_dir(cache_dir: Path, source_dir: Path, *, scikit_learn: bool, progress: Progress) -> Path:
    """`cache_dir/state` with images and templates of the present code: taken from `source_dir`, or built and kept."""
    state_dir = cache_dir / "state"
    state_dir.mkdir(parents=True, exist_ok=True)
    # Two benchmarks at once would take each other's template machines for strays.
    with state_lock(state_dir):
        await _build(state_dir, source_dir, scikit_learn=scikit_learn, progress=progress)
    return state_dir


async def _build(state_dir: Path, source_dir: Path, *, scikit_learn: bool, progress: Progress) -> None:
    await asyncio.to_thread(_share, source_dir, state_dir, (DEFAULT_RECIPE,))
    images = ImageStore(state_dir / "images")
    if DEFAULT_RECIPE not in images.current():
        progress("Building the default image (minutes, once) ...")
        await images.build(load_recipe(DEFAULT_RECIPE), by_line(progress))
    if scikit_learn and SCIKIT_LEARN not in images.current():
        progress("Building an image with scikit-learn (minutes, once) ...")
        await images.build(load_recipe(RECIPES / f"{SCIKIT_LEARN}.toml"), by_line(progress))
    async with (
        started_driver(state_dir) as driver,
        SandboxService(service_settings(state_dir), driver, progress=progress) as service,
    ):
        await service.prepare(progress=progress)


@contextmanager
def borrowed_state_dir(source_dir: Path, *, names: Collection[str] = (DEFAULT_RECIPE,)) -> Iterator[Path]:
    """A temporary state directory with these images of another, and their templates. names: of kernelspecs."""
    # Beside the other one: hard links do not leave a file system.
    with tempfile.TemporaryDirectory(prefix=".borrowed-", dir=source_dir.parent) as name:
        path = Path(name)
        _share(source_dir, path, names)
        try:
            yield path
        finally:
            shutil.rmtree(run_dir_of(path), ignore_errors=True)


def service_settings(state_dir: Path) -> ServiceSettings:
    """Of a service that does nothing by itself: no pool, no checkpoints, no sleep."""
    return ServiceSettings(
        state_dir=state_dir,
        pool_size=0,
        idle_timeout_s=0.0,
        stop_means_sleep=False,
        checkpoints="off",
    )


@asynccontextmanager
async def started_driver(state_dir: Path) -> AsyncIterator[Driver]:
    """The driver that `serve` would choose."""
    image = next(iter(ImageStore(state_dir / "images").current().values()), None)
    settings = DriverSettings(state_dir=state_dir, image=image.files if image is not None else None)
    driver = await find_driver(DEFAULT_DRIVER).start(settings, progress=lambda text: None)
    try:
        yield driver
    finally:
        await driver.close()


def template_snapshot(state_dir: Path, name: str = DEFAULT_RECIPE) -> Manifest:
    """The snapshot of the template that was built last for the newest image of that name. Errors: BenchmarkError."""
    image = ImageStore(state_dir / "images").current().get(name)
    found = [
        manifest
        for _, manifest in _templates(state_dir)
        if image is not None and manifest.image_digest == image.files.digest
    ]
    if not found:
        raise BenchmarkError(f"There is no template of {name} in {state_dir}; a gateway that starts builds one.")
    return max(found, key=lambda manifest: manifest.created_at)


def _templates(state_dir: Path) -> Iterator[tuple[TemplateRecord, Manifest]]:
    for path in (state_dir / "templates").glob("*.json"):
        record = TemplateRecord.model_validate_json(path.read_bytes())
        # One that was removed while we looked is none.
        with suppress(FileNotFoundError):
            text = (state_dir / "snapshots" / "manifests" / f"{record.snapshot}.json").read_bytes()
            yield record, Manifest.parse(text)


def _share(source_dir: Path, target_dir: Path, names: Collection[str]) -> None:
    """Links images and templates that the target does not have yet."""
    (target_dir / "images").mkdir(parents=True, exist_ok=True)
    (target_dir / "templates").mkdir(exist_ok=True)
    current = ImageStore(source_dir / "images").current()
    digests = {current[name].files.digest for name in names if name in current}
    for digest in digests:
        if not (target_dir / "images" / digest).exists():
            shutil.copytree(source_dir / "images" / digest, target_dir / "images" / digest, copy_function=_link_or_copy)
    recipes = source_dir / "images" / "recipes"
    if recipes.is_dir():
        shutil.copytree(recipes, target_dir / "images" / "recipes", dirs_exist_ok=True)
    with SnapshotStore(target_dir / "snapshots") as store:
        for record, manifest in _templates(source_dir):
            if manifest.image_digest in digests:
                for kind, part in manifest.parts():
                    relative = Path("snapshots", "parts", kind, part.digest)
                    _link_or_copy(source_dir / relative, target_dir / relative)
                relative = Path("snapshots", "manifests", f"{manifest.id}.json")
                _link_or_copy(source_dir / relative, target_dir / relative)
                store.pin(f"template-{record.digest[:16]}", Pin(snapshots=(manifest.id,)))
                (target_dir / "templates" / f"{record.digest}.json").write_text(record.model_dump_json())
    # Finding out whether KVM works takes a boot; the answer is the host's, not the directory's.
    if (source_dir / ACCELERATOR_FILE).exists():
        shutil.copy(source_dir / ACCELERATOR_FILE, target_dir)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    """A second name where the file system allows it. Files that are there already are the same: digests name them."""
    with suppress(FileExistsError):
        try:
            os.link(source, target)
        except OSError as error:
            if isinstance(error, FileExistsError):
                raise
            shutil.copy2(source, target)
