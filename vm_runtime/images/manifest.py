"""`manifest.json` of an image: what it is made of and the digests of its files. Format 1; see docs/images.md."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from vm_runtime.images.recipe import Recipe

FORMAT_VERSION = 1
ROOTFS = "rootfs.erofs"
VMLINUX = "vmlinux"
INITRAMFS = "initramfs.cpio"
FILES = (INITRAMFS, ROOTFS, VMLINUX)
MANIFEST = "manifest.json"


class FileDigest(BaseModel):
    """sha256: hex."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    size_bytes: int


class Manifest(BaseModel):
    """packages: Debian's and Python's in the root file system, `name version`.
    kernel_packages: those that vmlinux and the initramfs come from.
    builder: see build.builder_version.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    digest: str
    recipe: Recipe
    recipe_digest: str
    builder: str
    files: dict[str, FileDigest]
    debian_packages: tuple[str, ...]
    python_packages: tuple[str, ...]
    kernel_packages: tuple[str, ...]
    created_at: datetime


def image_digest(files: Mapping[str, FileDigest]) -> str:
    """Hex SHA-256 over `name sha256` lines of the files, sorted by name: names all of them at once."""
    lines = "".join(f"{name} {files[name].sha256}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_digest(path: Path) -> FileDigest:
    """Reads the whole file (0.1 to 0.5 s for 200 MB): call it in a thread."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(sha256=sha256, size_bytes=file.tell())
