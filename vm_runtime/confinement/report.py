"""What confines a VMM on this host, as values: one step for each limit or namespace, with what is missing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ConfinementStep:
    """One part of the confinement. problem: None if it works here, else why the host does not allow it. fix: a
    command."""

    name: str
    problem: str | None = None
    fix: str | None = None
