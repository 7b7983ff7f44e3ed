"""`saved.json`, beside the driver's record: what a running machine lies on, for a gateway that adopts it.

Lies in the runtime directory, so it does not outlive a reboot, as the machine does not. Written after each snapshot,
before the driver gives up the files that the store has now.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from vm_runtime.records import Record
from vm_runtime.snapshots import format1
from vm_runtime.snapshots.manifest import Manifest, State


class SavedRecord(Record):
    """snapshot: the last one this machine was restored from or that was taken of it, whole, since it may have been
    removed from the store. state: what the next one lies on."""

    file_name = "saved.json"

    format: Literal[2] = 2
    snapshot: Manifest
    state: State

    @model_validator(mode="before")
    @classmethod
    def _read_format_1(cls, values: Any) -> Any:
        try:
            return format1.record(values) if isinstance(values, dict) and values.get("format") == 1 else values
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no record of format 1 ({error!r:.60})") from error


def remove_record(run_dir: Path) -> None:
    """Twice is harmless. The directory goes too, if nothing else is in it."""
    SavedRecord.remove(run_dir)
    if run_dir.is_dir() and not any(run_dir.iterdir()):
        run_dir.rmdir()
