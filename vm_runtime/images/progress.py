"""What a build tells while it runs, and two listeners: a terminal and lines of a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, Self, TextIO


class Progress(Protocol):
    """Told about each step of a build, in order. Exactly one of `finished` and `failed` follows each `started`."""

    def started(self, label: str) -> None:
        """label: '[2/6] Installing Debian packages'."""

    def finished(self, label: str, elapsed_s: float) -> None: ...

    def failed(self, label: str, elapsed_s: float) -> None: ...

    def note(self, text: str) -> None:
        """Something that is not a step, such as waiting for another build."""


class LineProgress:
    """One line when a step has ended, through any function that takes a line (a logger's, for one)."""

    def __init__(self, write_line: Callable[[str], object]) -> None:
        self._write_line = write_line

    def started(self, label: str) -> None:
        pass

    def finished(self, label: str, elapsed_s: float) -> None:
        self._write_line(f"{label} ... {elapsed_s:.0f} s")

    def failed(self, label: str, elapsed_s: float) -> None:
        self._write_line(f"{label} ... failed after {elapsed_s:.0f} s")

    def note(self, text: str) -> None:
        self._write_line(text)


class TerminalProgress:
    """The same line for a person who waits: its first half appears when the step begins."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def started(self, label: str) -> None:
        self._write(f"{label} ... ")

    def finished(self, label: str, elapsed_s: float) -> None:
        self._write(f"{elapsed_s:.0f} s\n")

    def failed(self, label: str, elapsed_s: float) -> None:
        self._write(f"failed after {elapsed_s:.0f} s\n")

    def note(self, text: str) -> None:
        self._write(f"{text}\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class Steps:
    """Numbers the steps of one build and measures them: `with Steps(...) as steps: steps.begin("Unpacking"); ...`.

    A step ends when the next one begins or the block is left.
    """

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._number = 0
        self._label = ""
        self._began = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        self._end(failed=kind is not None)

    def begin(self, text: str) -> None:
        self._end(failed=False)
        self._number += 1
        self._label = f"[{self._number}/{self._total}] {text}"
        self._began = time.monotonic()
        self._progress.started(self._label)

    def _end(self, *, failed: bool) -> None:
        if self._label:
            tell = self._progress.failed if failed else self._progress.finished
            tell(self._label, time.monotonic() - self._began)
            self._label = ""
