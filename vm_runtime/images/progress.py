"""What a build shows while it runs: a line for each step, whose first half comes when the step begins."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

# Takes text, which is a whole line when a step has ended.
Progress = Callable[[str], object]


def by_line(write_line: Callable[[str], object]) -> Progress:
    """For what takes whole lines, such as a log."""
    begun = ""

    def write(text: str) -> None:
        nonlocal begun
        *lines, begun = (begun + text).split("\n")
        for line in lines:
            write_line(line)

    return write


class Steps:
    """Numbers the steps of one build and measures them: `with Steps(...) as steps: steps.begin("Unpacking"); ...`.

    A step ends when the next one begins or the block is left.
    """

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._number = 0
        self._began = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        self._end("" if kind is None else "failed after ")

    def begin(self, text: str) -> None:
        self._end()
        self._number += 1
        self._began = time.monotonic()
        self._progress(f"[{self._number}/{self._total}] {text} ... ")

    def _end(self, how: str = "") -> None:
        if self._number:
            self._progress(f"{how}{time.monotonic() - self._began:.0f} s\n")
