"""What the command prints: JSON, tables, trees, and progress on stderr where someone is watching."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timezone
from typing import Any

from hypercell.values import SandboxInfo, SandboxTree

REFRESH_S = 0.2


def print_json(value: Any) -> None:
    """Dataclasses and lists of them, as one JSON value on stdout."""
    print(json.dumps(value, default=_plain, indent=2))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def age(moment: datetime) -> str:
    """How long ago: `42 s`, `5 min`, `3 h`, `2 d`."""
    seconds = max(0.0, (datetime.now(timezone.utc) - moment).total_seconds())
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def size(count: int) -> str:
    """Bytes for people: `1.5 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def print_tree(tree: SandboxTree, *, marked: str) -> None:
    """The family, children below their parents; `marked` is the one that was asked about."""

    def line(node: SandboxInfo) -> str:
        words = [node.id, node.name or "", node.state, f"({age(node.created_at)})"]
        return " ".join(word for word in words if word) + ("  <--" if node.id == marked else "")

    def draw(node: SandboxInfo, prefix: str) -> None:
        children = tree.children(node.id)
        for child in children:
            is_last = child is children[-1]
            print(prefix + ("└── " if is_last else "├── ") + line(child))
            draw(child, prefix + ("    " if is_last else "│   "))

    known = {node.id for node in tree.nodes}
    for top in tree.nodes:
        if top.id == tree.root or top.parent_id not in known:
            print(line(top))
            draw(top, "")


class Progress:
    """A line on stderr that changes: what is done and for how long. Silent where stderr is no terminal."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._is_shown = sys.stderr.isatty()
        self._began = time.monotonic()

    def show(self) -> None:
        if self._is_shown:
            sys.stderr.write(f"\r\x1b[K{self.text} ({time.monotonic() - self._began:.0f} s)")
            sys.stderr.flush()

    def clear(self) -> None:
        if self._is_shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


@asynccontextmanager
async def progress(text: str) -> AsyncIterator[Progress]:
    """Shows `text` and the time until the end of the block; its `text` may be changed."""
    shown = Progress(text)

    async def refresh() -> None:
        while True:
            shown.show()
            await asyncio.sleep(REFRESH_S)

    task = asyncio.create_task(refresh())
    try:
        yield shown
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        shown.clear()
