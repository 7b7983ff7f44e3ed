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


@dataclass(frozen=True, kw_only=True)
class ConfinementReport:
    """All steps; `hypercelld doctor` prints them."""

    steps: tuple[ConfinementStep, ...]

    @property
    def missing(self) -> tuple[ConfinementStep, ...]:
        return tuple(step for step in self.steps if step.problem is not None)
