"""`hypercell cp`: files and directories between this machine and sandboxes."""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import aclosing
from pathlib import Path, PurePosixPath

from hypercell.aio.sandbox import AsyncSandbox
from hypercell.command.output import print_json, progress, size
from hypercell.command.sandboxes import connect
from hypercell.errors import GatewayRefusedError, HypercellError

# As deep as a listing goes; deeper trees are fetched in several.
LIST_DEPTH = 32


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


async def _upload(sandbox: AsyncSandbox, source: str, target: str, *, is_recursive: bool) -> list[int]:
    if source == "-":
        return [await sandbox.files.write(target, sys.stdin.buffer)]
    local = Path(source)
    if not local.exists():  # noqa: ASYNC240 - one look
        raise HypercellError(f"{local} does not exist.")
    files = [local] if local.is_file() else await asyncio.to_thread(_files_below, local)  # noqa: ASYNC240
    if local.is_dir() and not is_recursive:  # noqa: ASYNC240
        raise HypercellError(f"{local} is a directory; -r copies it with all that is in it.")
    base = PurePosixPath(target)
    if target.endswith("/") or await _is_directory(sandbox, target):
        base = base / local.resolve().name  # noqa: ASYNC240
    copied = []
    async with progress("Copying") as shown:
        for number, file in enumerate(files, start=1):
            place = base if file is local else base / file.relative_to(local).as_posix()
            shown.text = f"Copying {number} of {len(files)}: {file.name}, {size(file.stat().st_size)}"
            mode = f"{file.stat().st_mode & 0o777:04o}"
            copied.append(await sandbox.files.upload(file, str(place), mode=mode))
    return copied


def _files_below(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


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
    local = Path(target)
    if local.is_dir():  # noqa: ASYNC240 - one look
        local = local / PurePosixPath(found.path).name
    async with progress(f"Copying {found.name}, {size(found.size_bytes)}") as shown:
        if found.kind != "directory":
            return [await sandbox.files.download(source, local)]
        if not is_recursive:
            raise HypercellError(f"{source} is a directory; -r copies it with all that is in it.")
        copied = []
        for entry in await sandbox.files.list(found.path, depth=LIST_DEPTH):
            # The sandbox chose these names, and may mean no good: nothing is written outside the target.
            place = _below(local, found.path, entry.path)
            if entry.kind == "directory":
                place.mkdir(parents=True, exist_ok=True)
            elif entry.kind == "file":
                shown.text = f"Copying {entry.name}, {size(entry.size_bytes)}"
                place.parent.mkdir(parents=True, exist_ok=True)
                copied.append(await sandbox.files.download(entry.path, place))
        return copied


def _below(local: Path, root: str, path: str) -> Path:
    try:
        relative = PurePosixPath(path).relative_to(root)
    except ValueError as error:
        raise HypercellError(f"The sandbox listed {path!r}, which is not below {root!r}; nothing is copied.") from error
    if ".." in relative.parts:
        raise HypercellError(f"The sandbox listed {path!r}, which leads out of {root!r}; nothing is copied.")
    return local.joinpath(*relative.parts)
