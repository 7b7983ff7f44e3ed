"""Runs a cell and records all that it would show, in order, as outputs of the notebook format (nbformat 4)."""

from __future__ import annotations

import base64
import io
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher

# Outputs travel to the parent as a value (at most 16 MiB), and all branches' come together in one notebook output.
RECORD_BYTES_MAX = 4 << 20

Output = dict[str, Any]


@dataclass(kw_only=True)
class Recording:
    """outputs: stream, display_data, execute_result and error entries. error: the error's entry, or None."""

    outputs: list[Output] = field(default_factory=list)
    seconds: float = 0.0
    error: Output | None = None
    size: int = 0
    clear_at_next: bool = False

    def add(self, output: Output) -> None:
        """Append, or note once that no more is kept."""
        if self.clear_at_next:
            self.clear_at_next = False
            self.outputs.clear()
        if self.size > RECORD_BYTES_MAX:
            return
        self.size += _size(output)
        if self.size > RECORD_BYTES_MAX:
            text = f"[more than {RECORD_BYTES_MAX >> 20} MiB of output: the rest is not shown]\n"
            output = {"output_type": "stream", "name": "stderr", "text": text}
        last = self.outputs[-1] if self.outputs else None
        is_more = last is not None and last["output_type"] == output["output_type"] == "stream"
        if is_more and last is not None and last["name"] == output["name"]:
            last["text"] += output["text"]
        else:
            self.outputs.append(output)

    def update(self, output: Output, display_id: str) -> None:
        """Replace what was displayed with that id."""
        for at, old in enumerate(self.outputs):
            if old.get("transient", {}).get("display_id") == display_id:
                self.outputs[at] = output

    def clear(self, *, wait: bool) -> None:
        """As IPython's clear_output."""
        if wait:
            self.clear_at_next = True
        else:
            self.outputs.clear()


class _Stream(io.TextIOBase):
    def __init__(self, recording: Recording, name: str) -> None:
        self._recording = recording
        self._name = name

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        if text:
            self._recording.add({"output_type": "stream", "name": self._name, "text": text})
        return len(text)


class _Publisher(DisplayPublisher):
    recording: Recording

    def publish(
        self,
        data: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
        source: object = None,
        *,
        transient: Mapping[str, Any] | None = None,
        update: bool = False,
        **_: object,
    ) -> None:
        output = _rich("display_data", data, metadata)
        output["transient"] = dict(transient or {})
        display_id = output["transient"].get("display_id")
        if update and display_id is not None:
            self.recording.update(output, display_id)
        else:
            self.recording.add(output)

    def clear_output(self, wait: bool = False) -> None:
        self.recording.clear(wait=wait)


class _Hook(DisplayHook):
    """IPython's own, with Out and `_`, but what it would print is recorded."""

    recording: Recording

    def write_output_prompt(self) -> None:
        pass

    def write_format_data(self, format_dict: Mapping[str, Any], md_dict: Mapping[str, Any] | None = None) -> None:
        self.recording.add(_rich("execute_result", format_dict, md_dict))

    def finish_displayhook(self) -> None:
        self._is_active = False


def run_recorded(ip: Any, cell: str) -> Recording:
    """Run a cell in the user's namespace. Nothing is shown; an interrupt is recorded as any other error."""
    recording = Recording()
    begin_s = time.perf_counter()
    with _recorded(ip, recording):
        ip.run_cell(cell, store_history=False)
    recording.seconds = time.perf_counter() - begin_s
    for output in recording.outputs:
        output.pop("transient", None)
    return recording


def replay(ip: Any, outputs: list[Output]) -> None:
    """Show recorded outputs, as if they were made here."""
    for output in outputs:
        match output["output_type"]:
            case "stream":
                stream = sys.stderr if output["name"] == "stderr" else sys.stdout
                stream.write(output["text"])
                stream.flush()
            case "error":
                print("\n".join(output["traceback"]), file=sys.stderr, flush=True)
            case _:
                ip.display_pub.publish(output["data"], output["metadata"])


@contextmanager
def _recorded(ip: Any, recording: Recording) -> Iterator[None]:
    publisher = _Publisher()
    publisher.recording = recording
    hook = _Hook(shell=ip)
    hook.recording = recording

    def show_traceback(etype: type, evalue: BaseException, stb: list[str]) -> None:
        error = {"output_type": "error", "ename": etype.__name__, "evalue": str(evalue), "traceback": list(stb)}
        recording.error = error
        recording.add(error)

    old = sys.stdout, sys.stderr, sys.displayhook, ip.display_pub, ip.displayhook
    sys.stdout, sys.stderr = _Stream(recording, "stdout"), _Stream(recording, "stderr")
    sys.displayhook, ip.display_pub, ip.displayhook = hook, publisher, hook
    ip._showtraceback = show_traceback  # an attribute of the object, before the class's method
    try:
        yield
    finally:
        del ip._showtraceback
        sys.stdout, sys.stderr, sys.displayhook, ip.display_pub, ip.displayhook = old


def _rich(kind: str, data: Mapping[str, Any], metadata: Mapping[str, Any] | None) -> Output:
    encoded = {
        mime: base64.b64encode(item).decode() if isinstance(item, bytes) else item for mime, item in data.items()
    }
    return {"output_type": kind, "data": encoded, "metadata": dict(metadata or {})}


def _size(output: Output) -> int:
    if output["output_type"] == "stream":
        return len(output["text"])
    if output["output_type"] == "error":
        return sum(map(len, output["traceback"]))
    return sum(len(item) if isinstance(item, str) else len(repr(item)) for item in output["data"].values())
