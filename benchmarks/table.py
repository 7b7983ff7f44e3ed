"""A report as a Markdown table, and its place between two comments of README.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.messages import BenchmarkError
from benchmarks.results import Report, Row, Summary

BEGIN = "<!-- benchmarks:begin -->"
END = "<!-- benchmarks:end -->"


def markdown(report: Report, *, source: str) -> str:
    """The table with a line on where and when. source: the file that holds every sample."""
    lines = [
        "| measured | jupyter_kernel_gateway | Hypercell | ratio |",
        "|---|---|---|---|",
        *(_line(row) for row in report.rows),
        "",
        f"Median, in parentheses the quartiles, over as many samples as `{source}` holds; a ratio below 1 means that",
        f"Hypercell does better. Taken {report.taken_at[:10]} on {_host(report)}.",
        "What each line means: [benchmarks/README.md](benchmarks/README.md).",
    ]
    return "\n".join(lines)


def update_readme(readme: Path, text: str) -> None:
    """Puts `text` between the two comments. Errors: BenchmarkError where they are missing."""
    old = readme.read_text()
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BenchmarkError(f"{readme} has no {BEGIN} followed by {END}.")
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def _line(row: Row) -> str:
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return f"| {row.title} | {_cell(row.theirs, row.unit)} | {_cell(row.ours, row.unit)} | {ratio} |"


def _cell(samples: Sequence[float], unit: str) -> str:
    if not samples:
        return ""
    summary = Summary.of(samples)
    middle = f"{_number(summary.median)} {unit}"
    low, high = _number(summary.lower_quartile), _number(summary.upper_quartile)
    return middle if low == high else f"{middle} ({low} to {high})"


def _number(value: float) -> str:
    """Three significant digits at most, whole numbers from 100 on: more is noise."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _host(report: Report) -> str:
    return ", ".join(f"{name}: {value}" for name, value in report.host.items())
