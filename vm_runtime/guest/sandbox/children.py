"""Handles of children: their results, and how they look in a notebook."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vm_runtime.guest.sandbox import values
from vm_runtime.guest.sandbox.errors import (
    ChildCrashedError,
    ChildFailedError,
    ChildTimeoutError,
    ChildUnfinishedError,
    ForkError,
)
from vm_runtime.guest.sandbox.host import ask

_UNKNOWN: Any = object()

# A button that looks like the other links of its page.
_LINK = (
    "border:0;padding:0;background:none;cursor:pointer;color:var(--jp-content-link-color,#1976d2);"
    "text-decoration:underline"
)


@dataclass(eq=False, repr=False, kw_only=True)
class Child:
    """A child of this sandbox. id: its sandbox id; index: which of its siblings, from 0; url: opens it, or None.

    A child that could not be made has an `error` instead of an id.
    """

    id: str | None
    index: int
    url: str | None = None
    name: str | None = None
    error: ForkError | None = None
    _value: Any = field(default=_UNKNOWN, init=False)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], *, index: int, name: str | None = None) -> Child:
        """A child as the host names it in the answer to `fork`."""
        if "error" in entry:
            error = entry["error"]
            reason = ForkError(str(error.get("code", "failed")), str(error.get("message", "The host gave no reason.")))
            return cls(id=None, index=index, name=name, error=reason)
        return cls(
            id=str(entry["id"]),
            index=int(entry.get("index", index)),
            url=entry.get("url"),
            name=entry.get("name") or name,
        )

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the child's `sandbox.exit(value)`, and return the value. timeout: in seconds.

        Raises ChildFailedError with the child's traceback, ChildCrashedError, ChildUnfinishedError if its cell has
        ended without sandbox.exit, ChildTimeoutError, ForkError if the child could not be made.
        """
        if self._value is _UNKNOWN:
            self._value = values.decode(self._fetch(timeout))
        return self._value

    def kill(self) -> None:
        """End the child and its machine at once. Harmless if it has ended."""
        if self.id is not None:
            ask("kill", id=self.id)

    def _fetch(self, timeout: float | None) -> bytes:
        if self.error is not None:
            raise self.error
        reply = ask("result", id=self.id, timeout_s=timeout)
        state, message = str(reply.result.get("state")), reply.result.get("message")
        match state:
            case "exited" | "offered" if reply.result.get("status", "ok") == "ok":
                return reply.value
            case "exited" | "offered":
                failure = values.decode(reply.value) or {}
                what = f"{failure.get('ename', 'An error')}: {failure.get('evalue', '')}".rstrip(": ")
                raise ChildFailedError(f"{self} failed with {what}", str(failure.get("traceback", "")))
            case "running":
                raise ChildTimeoutError(f"{self} has not ended within {timeout} s; it still runs.")
            case "idle":
                hint = "It still runs: open it, or end it with .kill()."
                raise ChildUnfinishedError(f"{self} finished its cell without calling sandbox.exit(value). {hint}")
            case _:
                raise ChildCrashedError(str(message or f"{self} ended without a result ({state})."))

    def __str__(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        return f"Child {self.index}{name} ({self.id[:12]})" if self.id else f"Child {self.index}{name} (not made)"

    def __repr__(self) -> str:
        state = f"error={str(self.error)!r}" if self.error else f"id={self.id!r}"
        return f"<sandbox.Child index={self.index} {state}>"

    def _repr_html_(self) -> str:
        return table([self])


class Children(list[Child]):
    """What `fork(n)` returns for n > 1: a list that a notebook shows as a table."""

    def _repr_html_(self) -> str:
        return table(self)


def link(sandbox_id: str, url: str | None) -> str:
    """HTML that opens a notebook on a sandbox: at its url, or without one by a command of JupyterLab's.

    A button, since JupyterLab's sanitizer takes the command's attributes away from everything else.
    """
    label, title = f"<code>{html.escape(sandbox_id[:12])}</code>", html.escape(sandbox_id)
    if url and url.startswith(("http://", "https://", "/")):
        return f'<a href="{html.escape(url)}" target="_blank" rel="noopener" title="{title}">{label}</a>'
    arguments = html.escape(json.dumps({"kernelId": sandbox_id}))
    return (
        f'<button data-commandlinker-command="notebook:create-new" data-commandlinker-args="{arguments}" '
        f'title="{title}: open a notebook on it (in JupyterLab)" style="{_LINK}">{label}</button>'
    )


def table(children: Iterable[Child]) -> str:
    """The children as an HTML table."""
    rows = []
    for child in children:
        name = html.escape(child.name or "")
        what = link(child.id, child.url) if child.id else html.escape(str(child.error))
        rows.append(f"<tr><td>{child.index}</td><td>{what}</td><td>{name}</td></tr>")
    head = "<thead><tr><th>child</th><th>sandbox</th><th>name</th></tr></thead>"
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"
