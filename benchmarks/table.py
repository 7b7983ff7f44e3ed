"""A report as Markdown tables, and their places between comments of README.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.messages import BenchmarkError
from benchmarks.results import Cell, Line, Report, Row, Summary

# The table of the gateways; the other topics' have the topic's name in it.
GATEWAYS = ""


def markdown(report: Report, *, source: str) -> dict[str, str]:
    """The tables by topic (GATEWAYS for the rows), each with a line on where and when. source: the file that holds
    every sample."""
    tables = {}
    if report.rows:
        tables[GATEWAYS] = [
            "| measured | jupyter_kernel_gateway | Hypercell | ratio |",
            "|---|---|---|---|",
            *(_line(row) for row in report.rows),
            "",
            f"Median, in parentheses the quartiles, over as many samples as `{source}` holds; a ratio below 1 means",
            f"that Hypercell does better. {_taken(report)}",
        ]
    for topic in dict.fromkeys(line.topic for line in report.lines):
        lines = [line for line in report.lines if line.topic == topic]
        tables[topic] = []
        for heading in dict.fromkeys(line.heading for line in lines):
            tables[topic] += [*_table(heading, [line for line in lines if line.heading == heading]), ""]
        tables[topic] += [
            f"Median, in parentheses the quartiles, over as many samples as `{source}` holds.",
            _taken(report),
        ]
    return {topic: "\n".join(lines) for topic, lines in tables.items()}


def update_readme(readme: Path, tables: Mapping[str, str]) -> None:
    """Puts each table between its two comments. Errors: BenchmarkError where they are missing."""
    text = readme.read_text()
    for topic, table in tables.items():
        name = f"benchmarks:{topic}" if topic else "benchmarks"
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end:
            raise BenchmarkError(f"{readme} has no {begin} followed by {end}.")
        text = f"{before}{begin}\n{table}\n{end}{after}"
    readme.write_text(text)


def _table(heading: str, lines: Sequence[Line]) -> list[str]:
    columns = list(dict.fromkeys(name for line in lines for name in line.cells))
    targets = any(line.target is not None for line in lines)
    names = [heading, *columns, *(["to reach"] if targets else [])]
    text = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for line in lines:
        cells = [line.title, *(_text(line.cells.get(name, Cell()), line.unit) for name in columns)]
        if targets:
            cells.append("" if line.target is None else f"{_number(line.target)} {line.unit}".strip())
        text.append(f"| {' | '.join(cells)} |")
    return text


def _text(cell: Cell, unit: str) -> str:
    # A bar would end the cell.
    return " ".join(filter(None, (_cell(cell.samples, unit), cell.text.replace("|", "/"))))


def _taken(report: Report) -> str:
    quick = " With few repetitions (`--quick`)." if report.quick else ""
    return (
        f"Taken {report.taken_at[:10]} on {_host(report)}.{quick}\n"
        "What each line means: [benchmarks/README.md](benchmarks/README.md)."
    )


def _line(row: Row) -> str:
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return f"| {row.title} | {_cell(row.theirs, row.unit)} | {_cell(row.ours, row.unit)} | {ratio} |"


def _cell(samples: Sequence[float], unit: str) -> str:
    if not samples:
        return ""
    summary = Summary.of(samples)
    middle = f"{_number(summary.median)} {unit}".strip()
    low, high = _number(summary.lower_quartile), _number(summary.upper_quartile)
    return middle if low == high else f"{middle} ({low} to {high})"


def _number(value: float) -> str:
    """Three significant digits at most, whole numbers from 100 on: more is noise."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _host(report: Report) -> str:
    return ", ".join(f"{name}: {value}" for name, value in report.host.items())
