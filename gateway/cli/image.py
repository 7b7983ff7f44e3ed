"""`hypercelld image build | ls | inspect | rm`: the images that kernelspecs are made of."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.directories import default_state_dir
from kernels.templates import remove_template, stored_templates
from vm_runtime.images.errors import ImageError
from vm_runtime.images.recipe import DEFAULT_RECIPE, load_recipe
from vm_runtime.images.store import SHORT_DIGEST_LENGTH, Image, ImageStore
from vm_runtime.snapshots.errors import BrokenSnapshotError, UnknownSnapshotError
from vm_runtime.snapshots.manifest import PartKind
from vm_runtime.snapshots.store import SnapshotStore

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

# A command: its answer as a JSON value, and as a text for people.
_Handler = Callable[[argparse.Namespace], Coroutine[Any, Any, tuple[object, str]]]

# What a shell reports for a program ended by SIGINT.
EXIT_INTERRUPTED = 130
EXIT_FAILED = 1


def register(subparsers: Subparsers) -> None:
    """Adds `image` to the main parser; each of its commands sets `func(arguments) -> exit status`."""
    parser = subparsers.add_parser("image", help="build, list, inspect and remove images")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    build = _command(commands, "build", "build the image of a recipe; does nothing if it has been built", _build)
    build.add_argument(
        "recipe", nargs="?", default=DEFAULT_RECIPE, metavar="RECIPE",
        help="path of a TOML file, or the name of a recipe that comes with Hypercell (default: %(default)s)",
    )  # fmt: skip
    _command(commands, "ls", "list images, newest first", _ls)
    inspect = _command(commands, "inspect", "check all files of an image and show what it is made of", _inspect)
    remove = _command(commands, "rm", "remove an image that no sandbox needs, and its templates", _rm)
    for command in (inspect, remove):
        command.add_argument(
            "image", metavar="IMAGE", help=f"name, or the first {SHORT_DIGEST_LENGTH} digits of the digest or more"
        )


def _command(commands: Subparsers, name: str, help_text: str, handler: _Handler) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help_text)
    command.add_argument("--state-dir", type=Path, default=default_state_dir(), help="default: %(default)s")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(func=lambda arguments: _run(handler, arguments))
    return command


def _run(handler: _Handler, arguments: argparse.Namespace) -> int:
    """Runs a command and prints what it answers; SIGTERM ends it as Ctrl-C does. Returns the exit status."""

    async def interruptible() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        value, text = await handler(arguments)
        if arguments.json:
            print(json.dumps(value, indent=2))
        elif text:
            print(text)

    try:
        asyncio.run(interruptible())
    except ImageError as error:
        print(f"hypercelld: {error}", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python must not complain when it flushes the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except PermissionError as error:
        print(
            f"hypercelld: {error.filename} is not accessible; choose another place with --state-dir.", file=sys.stderr
        )
        return EXIT_FAILED
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("hypercelld: interrupted; nothing was left behind.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _store(arguments: argparse.Namespace) -> ImageStore:
    return ImageStore(arguments.state_dir / "images")


async def _build(arguments: argparse.Namespace) -> tuple[object, str]:
    recipe = load_recipe(arguments.recipe)
    # Progress goes to stderr, so that stdout has nothing but the answer.
    image = await _store(arguments).build(recipe, lambda text: print(text, end="", file=sys.stderr, flush=True))
    name, digest = image.manifest.recipe.name, image.files.digest[:SHORT_DIGEST_LENGTH]
    return _summary(image), f"{name} {digest} ({image.size_bytes >> 20} MiB)"


async def _ls(arguments: argparse.Namespace) -> tuple[object, str]:
    store = _store(arguments)
    images = store.ls()
    for problem in store.problems():
        print(f"hypercelld: {problem}", file=sys.stderr)
    lines = [f"{'NAME':<20} {'DIGEST':<{SHORT_DIGEST_LENGTH}} {'SIZE':>9}  CREATED"] if images else []
    for image in images:
        manifest = image.manifest
        digest = manifest.digest[:SHORT_DIGEST_LENGTH]
        created = f"{manifest.created_at:%Y-%m-%d %H:%M} UTC"
        lines.append(f"{manifest.recipe.name:<20} {digest} {image.size_bytes >> 20:>5} MiB  {created}")
    return [_summary(image) for image in images], "\n".join(lines)


async def _inspect(arguments: argparse.Namespace) -> tuple[object, str]:
    store = _store(arguments)
    image = store.get(arguments.image)
    await store.verify(image)
    manifest = image.manifest
    recipe = manifest.recipe
    found = [
        ("name", f"{recipe.name} ({recipe.display_name})"),
        ("digest", f"{manifest.digest} (all files verified)"),
        ("path", str(image.files.rootfs.parent)),
        ("created", f"{manifest.created_at:%Y-%m-%d %H:%M:%S} UTC"),
        ("recipe", manifest.recipe_digest),
        ("machine", f"{recipe.memory_mib} MiB memory, {recipe.vcpus} vCPU, {recipe.disk_mib} MiB disk"),
        *(
            ("file", f"{name} {file.size_bytes} bytes, sha256 {file.sha256}")
            for name, file in sorted(manifest.files.items())
        ),
        *(("kernel", package) for package in manifest.kernel_packages),
        *(("python", package) for package in manifest.python_packages),
        *(("debian", package) for package in manifest.debian_packages),
    ]
    value = {**manifest.model_dump(mode="json"), "path": str(image.files.rootfs.parent)}
    return value, "\n".join(f"{title:<11} {text}" for title, text in found)


async def _rm(arguments: argparse.Namespace) -> tuple[object, str]:
    def used_by(digest: str) -> list[str]:
        return users_of(arguments.state_dir, digest)

    image = await _store(arguments).rm(arguments.image, used_by=used_by)
    await asyncio.to_thread(_remove_templates, arguments.state_dir, image.files.digest)
    return _summary(image), f"removed {image.manifest.recipe.name} {image.files.digest[:SHORT_DIGEST_LENGTH]}"


def users_of(state_dir: Path, image_digest: str) -> list[str]:
    """Who needs an image, below a state directory: snapshots of sandboxes, and machines that run. Its templates do not
    count: they are made again from an image, and go with it."""
    directory = state_dir / "snapshots"
    if not directory.exists():
        return []
    with SnapshotStore(directory) as store:
        snapshots = [entry.id for entry in store.ls() if entry.image_digest == image_digest]
        bases: set[str] = set()
        for snapshot_id in snapshots:
            with contextlib.suppress(BrokenSnapshotError, UnknownSnapshotError):  # no machine can be made from it
                bases |= {base.digest for base in store.get(snapshot_id).state.of_kind(PartKind.BASE)}
        running = [user for user, pin in store.pins().items() if user.startswith("machine-") and bases & set(pin.bases)]
        of_templates = {record.snapshot for record, _ in stored_templates(state_dir / "templates", store)}
        return [snapshot_id for snapshot_id in snapshots if snapshot_id not in of_templates] + running


def _remove_templates(state_dir: Path, image_digest: str) -> None:
    if not (state_dir / "snapshots").exists():
        return
    with SnapshotStore(state_dir / "snapshots") as store:
        for record, snapshot in stored_templates(state_dir / "templates", store):
            if snapshot is None or snapshot.image_digest == image_digest:
                remove_template(state_dir / "templates", store, record)


def _summary(image: Image) -> dict[str, object]:
    manifest = image.manifest
    return {
        "name": manifest.recipe.name,
        "digest": manifest.digest,
        "path": str(image.files.rootfs.parent),
        "size_bytes": image.size_bytes,
        "created_at": manifest.created_at.isoformat(),
    }
