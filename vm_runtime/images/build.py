"""The steps of a build, from a recipe to the files of an image in a work directory."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from vm_runtime.images.host import check_host
from vm_runtime.images.initramfs import build_initramfs
from vm_runtime.images.manifest import (
    FILES,
    FORMAT_VERSION,
    INITRAMFS,
    ROOTFS,
    VMLINUX,
    FileDigest,
    Manifest,
    file_digest,
    image_digest,
)
from vm_runtime.images.progress import Progress, Steps
from vm_runtime.images.recipe import LoadedRecipe
from vm_runtime.images.rootfs import install_debian_packages, install_python_packages
from vm_runtime.images.vmlinux import extract_vmlinux

# The sources that decide what an image contains: a change in one of them makes earlier builds stale.
_DECIDING = ("init.sh", "finish.sh", "initramfs.py", "vmlinux.py", "rootfs.py")
# Download, install, warm up, compile, pack, boot files; one less without a warm-up.
_STEPS = 6


@cache
def builder_version() -> str:
    """Hex digest of the code that decides what an image contains."""
    sources = (Path(__file__).parent / name for name in _DECIDING)
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()[:16]


async def build_files(loaded: LoadedRecipe, work: Path, progress: Progress) -> Manifest:
    """Builds the image's files in `work`/image and returns its manifest. The caller removes `work`, whatever happens.

    Errors: RecipeError, BuildHostError, BuildFailedError and those below them.
    """
    check_host(work)
    image, overlay = work / "image", work / "overlay"
    image.mkdir()
    with Steps(progress, _STEPS if loaded.recipe.warmup else _STEPS - 1) as steps:
        steps.begin("Downloading Python packages")
        python_packages = await install_python_packages(loaded, overlay)
        steps.begin("Installing Debian packages")
        parts = await install_debian_packages(loaded, work=work, overlay=overlay, on_step=steps.begin)
        steps.begin("Making vmlinux and the initramfs")
        files = await asyncio.to_thread(_boot_files, parts, image)
    return Manifest(
        format=FORMAT_VERSION,
        digest=image_digest(files),
        recipe=loaded.recipe,
        recipe_digest=loaded.digest(),
        builder=builder_version(),
        files=files,
        debian_packages=_lines(parts / "debian-packages"),
        python_packages=python_packages,
        kernel_packages=_lines(parts / "kernel-packages"),
        created_at=datetime.now(UTC),
    )


def _boot_files(parts: Path, image: Path) -> dict[str, FileDigest]:
    (image / VMLINUX).write_bytes(extract_vmlinux((parts / "vmlinuz").read_bytes()))
    initramfs = build_initramfs(busybox=(parts / "busybox").read_bytes(), modules=parts / "modules")
    (image / INITRAMFS).write_bytes(initramfs)
    shutil.move(parts / "rootfs.erofs", image / ROOTFS)
    return {name: file_digest(image / name) for name in FILES}


def _lines(path: Path) -> tuple[str, ...]:
    return tuple(sorted(path.read_text().splitlines()))
