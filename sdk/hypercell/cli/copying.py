"""`hypercell cp`: files and directories between this machine and sandboxes."""

from __future__ import annotations

import argparse
import asyncio
import os
import stat
import sys
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from hypercell.aio.sandbox import AsyncSandbox
from hypercell.cli.output import Progress, print_json, progress, size
from hypercell.cli.sandboxes import connect
from hypercell.errors import GatewayRefusedError, HypercellError, StateError
from hypercell.values import FileInfo

# What is left out is named up to so many times; the rest is counted.
MOST_NAMED = 10
# Without it nothing could be put into a directory that was copied.
OWNER_MAY_ALL = 0o700


async def cp(options: argparse.Namespace) -> int:
    source_name, source = _split(options.source)
    target_name, target = _split(options.target)
    if (source_name is None) == (target_name is None):
        raise HypercellError("One side is in a sandbox, written SANDBOX:PATH, and the other one here.")
    async with await connect(options, source_name or target_name or "") as sandbox:
        if source_name is None:
            copied = await _upload(sandbox, source, target, is_recursive=options.recursive)
        else:
            copied = await _download(sandbox, source, target, is_recursive=options.recursive)
    if options.json:
        print_json({"files": len(copied), "bytes": sum(copied)})
    return 0


def _split(text: str) -> tuple[str | None, str]:
    """SANDBOX:PATH, or a path here (one with a slash before its first colon, or none)."""
    name, colon, path = text.partition(":")
    if not colon or "/" in name:
        return None, text
    return name, path or "."


def _say_left_out(paths: Sequence[str]) -> None:
    """Pipes, sockets and devices have no content."""
    if paths:
        more = f" and {len(paths) - MOST_NAMED} more" if len(paths) > MOST_NAMED else ""
        named = ", ".join(paths[:MOST_NAMED])
        print(f"hypercell: special files are not copied: {named}{more}", file=sys.stderr)


async def _upload(sandbox: AsyncSandbox, source: str, target: str, *, is_recursive: bool) -> list[int]:
    if source == "-":
        return [await sandbox.files.write(target, sys.stdin.buffer)]
    local = Path(source)
    if not local.exists():  # noqa: ASYNC240 - one look
        raise HypercellError(f"{local} does not exist.")
    if local.is_dir() and not is_recursive:  # noqa: ASYNC240
        raise HypercellError(f"{local} is a directory; -r copies it with all that is in it.")
    base = PurePosixPath(target)
    if target.endswith("/") or await _is_directory(sandbox, target):
        base = base / local.resolve().name  # noqa: ASYNC240
    # Also a pipe, such as a shell's <(...): it is copied if it was named.
    tree = await asyncio.to_thread(_look_below, local) if local.is_dir() else _Tree(files=[local])  # noqa: ASYNC240
    copied = []
    async with progress("Copying") as shown:
        for directory in tree.directories:
            place = base / directory.relative_to(local).as_posix()
            mode = f"{_mode(directory) | OWNER_MAY_ALL:04o}"
            await sandbox.files.mkdir(str(place), mode=mode, exist_ok=True)
        for number, file in enumerate(tree.files, start=1):
            place = base if file is local else base / file.relative_to(local).as_posix()
            shown.text = f"Copying {number} of {len(tree.files)}: {file.name}, {size(file.stat().st_size)}"
            copied.append(await sandbox.files.upload(file, str(place), mode=f"{_mode(file):04o}"))
        for link in tree.links:
            await _link(sandbox, str(link.readlink()), str(base / link.relative_to(local).as_posix()))
    _say_left_out([str(path) for path in tree.left_out])
    return copied


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode) & 0o777


@dataclass(kw_only=True)
class _Tree:
    """What is below a directory here, and itself; every directory stands before what is in it."""

    directories: list[Path] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    links: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)


def _look_below(top: Path) -> _Tree:
    tree, waiting = _Tree(), [top]
    while waiting:
        directory = waiting.pop()
        tree.directories.append(directory)
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = directory / entry.name
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(path)
                elif entry.is_file(follow_symlinks=False):
                    tree.files.append(path)
                elif entry.is_symlink():
                    tree.links.append(path)
                else:
                    tree.left_out.append(path)
    return tree


async def _link(sandbox: AsyncSandbox, target: str, path: str) -> None:
    """A link instead of a file or link that is there."""
    try:
        await sandbox.files.symlink(target, path)
    except StateError:
        if (await sandbox.files.stat(path, follow=False)).kind == "directory":
            raise
        await sandbox.files.remove(path)
        await sandbox.files.symlink(target, path)


async def _is_directory(sandbox: AsyncSandbox, path: str) -> bool:
    try:
        return (await sandbox.files.stat(path)).kind == "directory"
    except GatewayRefusedError as error:
        if error.code == "file_not_found":
            return False
        raise


async def _download(sandbox: AsyncSandbox, source: str, target: str, *, is_recursive: bool) -> list[int]:
    if target == "-":
        count = 0
        async with aclosing(sandbox.files.stream(source)) as pieces:
            async for piece in pieces:
                sys.stdout.buffer.write(piece)
                count += len(piece)
        sys.stdout.buffer.flush()
        return [count]
    found = await sandbox.files.stat(source)
    if found.kind == "directory" and not is_recursive:
        raise HypercellError(f"{source} is a directory; -r copies it with all that is in it.")
    local = Path(target)
    if local.is_dir():  # noqa: ASYNC240 - one look
        local = local / PurePosixPath(found.path).name
    if not local.parent.is_dir():
        raise HypercellError(f"{local.parent} is no directory.")
    mask = os.umask(0)
    os.umask(mask)
    async with progress(f"Copying {found.name}, {size(found.size_bytes)}") as shown:
        if found.kind != "directory":
            return [await _fetch(sandbox, found, local, mask)]
        return await _fetch_below(sandbox, found, local, mask, shown)


async def _fetch_below(sandbox: AsyncSandbox, top: FileInfo, local: Path, mask: int, shown: Progress) -> list[int]:
    """One directory after the other, because a listing has a limit of its depth."""
    copied, left_out, waiting = [], [], [(top, local)]
    while waiting:
        directory, here = waiting.pop()
        _make_directory_here(here, int(directory.mode, 8) & ~mask)
        async for entry in sandbox.files.scan(directory.path):
            place = _inside(here, directory.path, entry.path)
            if entry.kind == "directory":
                waiting.append((entry, place))
            elif entry.kind == "file":
                shown.text = f"Copying {entry.name}, {size(entry.size_bytes)}"
                copied.append(await _fetch(sandbox, entry, place, mask))
            elif entry.kind == "link" and entry.target is not None:
                # Where it leads is the user's to judge; nothing that is copied goes through it (`_make_directory_here`,
                # and a file takes the place of a link).
                if place.is_symlink() or place.is_file():
                    place.unlink()
                place.symlink_to(entry.target)
            else:
                left_out.append(entry.path)
    _say_left_out(left_out)
    return copied


async def _fetch(sandbox: AsyncSandbox, entry: FileInfo, place: Path, mask: int) -> int:
    count = await sandbox.files.download(entry.path, place)
    # As cp does it: the umask counts, and no file of another machine runs here with its owner's rights (setuid).
    await asyncio.to_thread(place.chmod, int(entry.mode, 8) & 0o777 & ~mask)
    return count


def _make_directory_here(place: Path, mode: int) -> None:
    """A new one, or one that is there; not a link to one, which may lead out of the target."""
    if place.is_symlink():
        raise HypercellError(f"{place} is a link, and a directory of the sandbox would be copied through it.")
    if not place.is_dir():
        place.mkdir()
        place.chmod(mode & 0o777 | OWNER_MAY_ALL)


def _inside(here: Path, directory: str, path: str) -> Path:
    """Where `path`, which is in `directory`, comes to. The sandbox chose these names, and may mean no good: nothing is
    written outside the target."""
    listed = PurePosixPath(path)
    if listed.parent != PurePosixPath(directory) or listed.name in {"", ".."}:
        raise HypercellError(f"The sandbox listed {path!r}, which is not in {directory!r}; no more is copied.")
    return here / listed.name
