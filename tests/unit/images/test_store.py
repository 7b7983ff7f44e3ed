"""The store: finds whole images, names broken ones, removes only what nobody needs, cleans up after builds."""

from __future__ import annotations

import asyncio
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gateway.cli import main
from gateway.cli.image import users_of
from vm_runtime.images.build import builder_version
from vm_runtime.images.errors import BrokenImageError, ImageInUseError, UnknownImageError
from vm_runtime.images.manifest import FILES, FORMAT_VERSION, MANIFEST, Manifest, file_digest, image_digest
from vm_runtime.images.recipe import LoadedRecipe, Recipe
from vm_runtime.images.store import ImageStore, RecipeRecord


def make_image(directory: Path, *, name: str = "python3", content: str = "x", age_s: float = 0) -> Manifest:
    """A whole image whose files are not bootable."""
    loaded = LoadedRecipe(recipe=Recipe(name=name, display_name=name), contents=(), origin="test")
    work = directory / "work"
    work.mkdir(parents=True)
    for file in FILES:
        (work / file).write_text(f"{file} {content}")
    files = {file: file_digest(work / file) for file in FILES}
    manifest = Manifest(
        format=FORMAT_VERSION, digest=image_digest(files), recipe=loaded.recipe, recipe_digest=loaded.digest(),
        builder=builder_version(), files=files, debian_packages=(), python_packages=(), kernel_packages=(),
        created_at=datetime.now(UTC) - timedelta(seconds=age_s),
    )  # fmt: skip
    (work / MANIFEST).write_text(manifest.model_dump_json())
    work.rename(directory / manifest.digest)
    (directory / "recipes").mkdir(exist_ok=True)
    record = RecipeRecord(image=manifest.digest, builder=manifest.builder)
    (directory / "recipes" / f"{manifest.recipe_digest}.json").write_text(record.model_dump_json())
    return manifest


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_lists_newest_first_and_finds_by_name_and_digest(tmp_path: Path) -> None:
    old = make_image(tmp_path, content="old", age_s=60)
    new = make_image(tmp_path, content="new")
    other = make_image(tmp_path, name="other", age_s=30)
    store = ImageStore(tmp_path)
    assert [image.manifest.digest for image in store.ls()] == [new.digest, other.digest, old.digest]
    assert store.current().keys() == {"python3", "other"}
    assert store.current()["python3"].manifest.digest == new.digest
    assert store.get("python3").files.digest == new.digest
    assert store.get(old.digest[:12]).files.rootfs == tmp_path / old.digest / "rootfs.erofs"
    with pytest.raises(UnknownImageError, match=r"there is: python3, other"):
        store.get("nothing")


def test_an_absent_directory_has_no_images(tmp_path: Path) -> None:
    assert ImageStore(tmp_path / "none").ls() == []


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda image: (image / "vmlinux").unlink(), "vmlinux is missing"),
        (lambda image: (image / "vmlinux").write_text("longer than it was"), "instead of"),
        (lambda image: (image / MANIFEST).write_text("{"), "cannot be read"),
        (lambda image: (image / MANIFEST).unlink(), "No such file"),
        (lambda image: image.rename(image.with_name("f" * 64)), "that of another image"),
        (lambda image: edit(image, format=99), "format is 99"),
        (lambda image: edit(image, digest="0" * 64), "contradicts itself"),
    ],
)
def test_broken_images_are_named_and_not_used(tmp_path: Path, damage: object, reason: str) -> None:
    good = make_image(tmp_path, name="good")
    image = tmp_path / make_image(tmp_path, content="y").digest
    assert callable(damage)
    damage(image)
    store = ImageStore(tmp_path)
    assert [found.manifest.digest for found in store.ls()] == [good.digest]
    (problem,) = store.problems()
    assert reason in problem
    assert "build the image again" in problem


def edit(image: Path, **values: object) -> None:
    manifest = json.loads((image / MANIFEST).read_text())
    (image / MANIFEST).write_text(json.dumps({**manifest, **values}))


async def test_verify_notices_a_changed_byte(tmp_path: Path) -> None:
    manifest = make_image(tmp_path)
    store = ImageStore(tmp_path)
    image = store.get("python3")
    await store.verify(image)
    rootfs = tmp_path / manifest.digest / "rootfs.erofs"
    rootfs.write_text(rootfs.read_text().upper())
    with pytest.raises(BrokenImageError, match=r"rootfs\.erofs has changed"):
        await store.verify(image)


async def test_removes_only_what_nothing_needs(tmp_path: Path) -> None:
    make_image(tmp_path)
    store = ImageStore(tmp_path)
    with pytest.raises(ImageInUseError, match=r"needed by 4 snapshots and running machines \(a, b, c, \.\.\.\)"):
        await store.rm("python3", used_by=lambda digest: ["a", "b", "c", "d"])
    assert store.ls()
    await store.rm("python3", used_by=lambda digest: users_of(tmp_path, digest))
    assert store.ls() == []
    assert names_in(tmp_path) == {".lock", "recipes"}
    assert names_in(tmp_path / "recipes") == set()


async def test_removing_an_older_image_keeps_the_record_of_the_newer(tmp_path: Path) -> None:
    old = make_image(tmp_path, content="old", age_s=60)
    new = make_image(tmp_path, content="new")
    store = ImageStore(tmp_path)
    await store.rm(old.digest, used_by=lambda digest: ())
    loaded = LoadedRecipe(recipe=new.recipe, contents=(), origin="test")
    assert (await store.build(loaded, print)).files.digest == new.digest


async def test_a_build_that_was_done_does_nothing(tmp_path: Path) -> None:
    manifest = make_image(tmp_path)
    lines: list[str] = []
    loaded = LoadedRecipe(recipe=manifest.recipe, contents=(), origin="test")
    image = await ImageStore(tmp_path).build(loaded, lines.append)
    assert image.manifest.digest == manifest.digest
    assert lines == []


async def test_a_cancelled_build_leaves_nothing_and_a_killed_one_is_cleaned_up(tmp_path: Path) -> None:
    stale = tmp_path / ".building-1-dead"
    stale.mkdir()
    (stale / "file").touch()
    began = asyncio.Event()

    recipe = Recipe(name="r", display_name="R", python_packages=("ipykernel==7.4.0",))
    loaded = LoadedRecipe(recipe=recipe, contents=(), origin="test")
    build = asyncio.create_task(ImageStore(tmp_path).build(loaded, lambda text: began.set()))
    waiter = asyncio.create_task(began.wait())
    await asyncio.wait({build, waiter}, return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    if build.done() and (error := build.exception()) is not None:
        pytest.skip(f"this host cannot build images: {error}")
    build.cancel()
    with pytest.raises(asyncio.CancelledError):
        await build
    assert names_in(tmp_path) == {".lock", "recipes"}


def test_commands_print_json_and_one_sentence_for_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = make_image(tmp_path / "images")
    place = ["--state-dir", str(tmp_path)]
    assert main(["image", "ls", "--json", *place]) == 0
    assert json.loads(capsys.readouterr().out)[0]["digest"] == manifest.digest
    assert main(["image", "inspect", "--json", *place, "python3"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["name"] == "python3"
    assert main(["image", "rm", *place, "nothing"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "There is no image 'nothing'" in error
    assert main(["image", "build", *place, os.devnull]) == 1
    assert "'name' is missing" in capsys.readouterr().err
