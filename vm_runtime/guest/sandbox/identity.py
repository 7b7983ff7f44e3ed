"""Who this sandbox is: what the agent wrote last, so it is right after a fork, a wake and a take-over."""

from __future__ import annotations

import json
from dataclasses import dataclass

from vm_runtime.guest.sandbox.host import run_directory


@dataclass(frozen=True, kw_only=True)
class Identity:
    """index: which of its siblings this child is, from 0; None for a sandbox that no fork made."""

    id: str | None
    parent_id: str | None
    index: int | None
    name: str | None


def read() -> Identity:
    """The identity of now; all None outside of a sandbox."""
    try:
        found = json.loads((run_directory() / "identity.json").read_text())
    except (OSError, ValueError):
        found = {}
    index = str(found.get("index") or "")
    return Identity(
        id=found.get("sandbox_id"),
        parent_id=found.get("parent_id") or None,
        index=int(index) if index.isdigit() else None,
        name=found.get("name") or None,
    )
