"""The images of a state directory: found, checked, built and removed.

STATE/images/<digest>/                     manifest.json rootfs.erofs vmlinux initramfs.cpio
STATE/images/recipes/<recipe digest>.json  which image that recipe gave, and by which builder
STATE/images/.building-<pid>-*             a build that runs, or one that was killed: removed by the next
STATE/images/.lock                         held by whoever builds or removes
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from vm_runtime.files import opened, sync, try_lock
from vm_runtime.images.build import build_files, builder_version
from vm_runtime.images.errors import BrokenImageError, BuildHostError, ImageInUseError, UnknownImageError
from vm_runtime.images.manifest import (
    FILES,
    FORMAT_VERSION,
    INITRAMFS,
    MANIFEST,
    ROOTFS,
    VMLINUX,
    Manifest,
    file_digest,
    image_digest,
)
from vm_runtime.images.progress import Progress
from vm_runtime.images.recipe import LoadedRecipe
from vm_runtime.spec import ImageFiles

# Enough to be unique among a handful of images, and what `ls` prints.
SHORT_DIGEST_LENGTH = 12
# flock has no way to wait that a cancelled task could leave.
_LOCK_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Image:
    """A complete image on disk."""

    files: ImageFiles
    manifest: Manifest

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.manifest.files.values())


class RecipeRecord(BaseModel):
    """`recipes/<recipe digest>.json`: lets a build that was done before do nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str
    builder: str


class ImageStore:
    """The images below one directory, which is made on the first build."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._recipes = directory / "recipes"

    def ls(self) -> list[Image]:
        """All usable images, newest first. Broken ones are left out; `problems` names them."""
        return self._scan()[0]

    def current(self) -> dict[str, Image]:
        """The newest image of each name: the one that new kernels use."""
        return {image.manifest.recipe.name: image for image in reversed(self.ls())}

    def problems(self) -> list[str]:
        """A sentence for each directory that is not a usable image."""
        return self._scan()[1]

    def get(self, name_or_digest: str) -> Image:
        """The newest image of that name, or the one whose digest begins so.

        Errors: UnknownImageError, BrokenImageError.
        """
        images, problems = self._scan()
        for image in images:
            if image.manifest.recipe.name == name_or_digest or image.files.digest == name_or_digest:
                return image
        if re.fullmatch(f"[0-9a-f]{{{SHORT_DIGEST_LENGTH},64}}", name_or_digest):
            for image in images:
                if image.files.digest.startswith(name_or_digest):
                    return image
            for problem in problems:
                if f"/{name_or_digest}" in problem:
                    raise BrokenImageError(problem)
        known = ", ".join(dict.fromkeys(image.manifest.recipe.name for image in images)) or "none"
        raise UnknownImageError(
            f"There is no image {name_or_digest!r} (there is: {known}); `hypercelld image build` makes one, "
            "`hypercelld image ls` shows those that exist."
        )

    async def verify(self, image: Image) -> None:
        """Reads all files and compares their digests (0.3 s for the default image). Errors: BrokenImageError."""
        await asyncio.to_thread(_verify, image)

    async def rm(self, name_or_digest: str, *, used_by: Callable[[str], Sequence[str]]) -> Image:
        """Removes an image. used_by: names what needs the image with a digest.

        Errors: UnknownImageError, BrokenImageError, ImageInUseError.
        """
        async with self._locked(None):
            image = self.get(name_or_digest)
            digest = image.files.digest
            if users := used_by(digest):
                raise ImageInUseError(
                    f"The image {digest[:SHORT_DIGEST_LENGTH]} is needed by {len(users)} snapshots and running "
                    f"machines ({', '.join(users[:3])}{', ...' if len(users) > 3 else ''}). Delete their sandboxes, or "
                    "`hypercelld snapshot rm`."
                )
            # Renamed first: an image that is half removed must not look like one.
            doomed = self._directory / f".building-{os.getpid()}-removed"
            (self._directory / digest).rename(doomed)
            await asyncio.to_thread(shutil.rmtree, doomed)
            # The record may already be that of a newer image of the same recipe.
            if self._record(image.manifest.recipe_digest).image == digest:
                (self._recipes / f"{image.manifest.recipe_digest}.json").unlink()
            return image

    async def build(self, recipe: LoadedRecipe, progress: Progress) -> Image:
        """The image of a recipe; does nothing where it has been built from the same by the same builder.

        Nothing is left behind if it fails or is cancelled. Errors: ImageError and all below it.
        """
        if done := self._built_before(recipe):
            return done
        await asyncio.to_thread(self._recipes.mkdir, parents=True, exist_ok=True)
        async with self._locked(progress):
            if done := self._built_before(recipe):
                return done
            # Whoever held the lock before us and left these is dead.
            for stale in self._directory.glob(".building-*"):
                await asyncio.to_thread(shutil.rmtree, stale)
            work = Path(tempfile.mkdtemp(prefix=f".building-{os.getpid()}-", dir=self._directory))
            try:
                manifest = await build_files(recipe, work, progress)
                await asyncio.to_thread(self._publish, work / "image", manifest)
            except OSError as error:
                raise BuildHostError(f"The image could not be built: {error}; free the way and try again.") from error
            finally:
                # Shielded: a second Ctrl-C must not stop the removal.
                await asyncio.shield(asyncio.to_thread(shutil.rmtree, work))
            return self.get(manifest.digest)

    def _built_before(self, recipe: LoadedRecipe) -> Image | None:
        record = self._record(recipe.digest())
        try:
            return self.get(record.image) if record.builder == builder_version() else None
        except (UnknownImageError, BrokenImageError):
            return None

    def _record(self, recipe_digest: str) -> RecipeRecord:
        """What is known of a recipe; a record without an image where that is nothing."""
        try:
            return RecipeRecord.model_validate_json((self._recipes / f"{recipe_digest}.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            return RecipeRecord(image="", builder="")

    def _publish(self, image: Path, manifest: Manifest) -> None:
        (image / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        for path in (*image.iterdir(), image):
            sync(path)
        place = self._directory / manifest.digest
        if place.exists():
            # Built again to the same bytes; what is there may be the reason (a broken copy), so the new one wins.
            place.rename(image.parent / "replaced")
        image.rename(place)
        sync(self._directory)
        record = RecipeRecord(image=manifest.digest, builder=manifest.builder)
        temporary = image.parent / "record.json"
        temporary.write_text(record.model_dump_json())
        sync(temporary)
        temporary.rename(self._recipes / f"{manifest.recipe_digest}.json")

    def _scan(self) -> tuple[list[Image], list[str]]:
        images: list[Image] = []
        problems: list[str] = []
        if self._directory.is_dir():
            for directory in sorted(self._directory.iterdir()):
                if directory.name.startswith(".") or directory == self._recipes:
                    continue
                try:
                    images.append(load_image(directory))
                except BrokenImageError as error:
                    problems.append(str(error))
        images.sort(key=lambda image: image.manifest.created_at, reverse=True)
        return images, problems

    @asynccontextmanager
    async def _locked(self, progress: Progress | None) -> AsyncIterator[None]:
        await asyncio.to_thread(self._directory.mkdir, parents=True, exist_ok=True)
        with opened(self._directory / ".lock", os.O_RDWR | os.O_CREAT) as descriptor:
            waiting = False
            while not try_lock(descriptor):
                if progress is not None and not waiting:
                    progress("Another build is running; waiting for its end.\n")
                waiting = True
                await asyncio.sleep(_LOCK_POLL_S)
            yield


def load_image(directory: Path) -> Image:
    """The image in a directory, its manifest checked but its files only by size. Errors: BrokenImageError."""

    def broken(what: str) -> BrokenImageError:
        return BrokenImageError(f"{directory} is not a usable image: {what}; remove it and build the image again.")

    try:
        manifest = Manifest.model_validate_json((directory / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        reason = (
            f"{error.error_count()} of its values are wrong"
            if isinstance(error, ValidationError)
            else str(error.strerror)
        )
        raise broken(f"{MANIFEST} cannot be read ({reason})") from error
    if manifest.format != FORMAT_VERSION:
        raise broken(f"its format is {manifest.format}, this version reads {FORMAT_VERSION}")
    if set(manifest.files) != set(FILES) or image_digest(manifest.files) != manifest.digest:
        raise broken(f"{MANIFEST} contradicts itself")
    if directory.name != manifest.digest:
        raise broken(f"{MANIFEST} is that of another image ({manifest.digest[:SHORT_DIGEST_LENGTH]})")
    for name, expected in manifest.files.items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected.size_bytes:
            raise broken(
                f"{name} is missing" if size is None else f"{name} has {size} bytes instead of {expected.size_bytes}"
            )
    files = ImageFiles(
        digest=manifest.digest, vmlinux=directory / VMLINUX, initramfs=directory / INITRAMFS, rootfs=directory / ROOTFS
    )
    return Image(files=files, manifest=manifest)


def _verify(image: Image) -> None:
    directory = image.files.rootfs.parent
    for name, expected in image.manifest.files.items():
        if file_digest(directory / name) != expected:
            raise BrokenImageError(
                f"{directory} is not a usable image: {name} has changed since it was built; "
                "remove it and build the image again."
            )
