"""Prints the tables of vm_runtime/wire/generations.py into docs/wire.md: `python tools/wire_tables.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vm_runtime.wire import generations
from vm_runtime.wire.generations import Entry

PAGE = Path(__file__).parents[1] / "docs" / "wire.md"
BEGIN, END = "<!-- generations:begin -->", "<!-- generations:end -->"

# heading, table, column of `takes`, column of `answers` (None: it has none)
TABLES = (
    ("Streams that the host opens", generations.HOST_STREAMS, "takes", "answers"),
    ("Streams that the guest opens", generations.GUEST_STREAMS, "takes", None),
    ("Lines of `events`", generations.EVENTS, "fields", None),
    ("`op` of a `sandbox.call`", generations.CALLS, "arguments", None),
    ("`extra` of HELLO", generations.HELLO_EXTRA, "fields", None),
    ("`extra` of WELCOME", generations.WELCOME_EXTRA, None, None),
)


def markdown() -> str:
    """All tables."""
    return "\n\n".join(_table(*table) for table in TABLES)


def updated(page: str) -> str:
    """The page with these tables between its two comments."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{markdown()}\n{END}{after}"


def _table(heading: str, entries: Sequence[Entry], takes: str | None, answers: str | None) -> str:
    columns = [heading, "since", *filter(None, (takes, answers)), "does"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for entry in entries:
        cells = [", ".join(f"`{name}`" for name in entry.names), str(entry.since)]
        cells += [_fields(entry, entry.takes)] if takes else []
        cells += [_fields(entry, entry.answers)] if answers else []
        lines.append(f"| {' | '.join((*cells, entry.does))} |")
    return "\n".join(lines)


def _fields(entry: Entry, text: str) -> str:
    """`a`, `b` (2); the rest in words."""
    later = [f"`{name}`" + (f" ({since})" if since > entry.since else "") for name, since in entry.fields(text)]
    return "; ".join(filter(None, (", ".join(later), text.partition(";")[2].strip())))


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
