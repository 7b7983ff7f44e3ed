"""What was measured, as values: samples, their summary, the ratio; and as JSON. Knows no gateway."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Median with quartiles and extremes of `count` samples."""

    count: int
    median: float
    lower_quartile: float
    upper_quartile: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        return cls(
            count=len(samples),
            median=median(samples),
            lower_quartile=percentile(samples, 25),
            upper_quartile=percentile(samples, 75),
            minimum=min(samples),
            maximum=max(samples),
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. ours, theirs: samples in `unit`, in the order they were taken; empty if not measured.

    topic: the module in benchmarks/topics that made it. compared: whether a ratio means something (lower is better).
    """

    topic: str
    title: str
    unit: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...] = ()
    compared: bool = True

    @property
    def ratio(self) -> float | None:
        """Ours by theirs, of the medians; below 1 we are better."""
        if not self.compared or not self.ours or not self.theirs or median(self.theirs) == 0:
            return None
        return median(self.ours) / median(self.theirs)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """samples: in the line's unit, in the order they were taken. text: what is said instead of numbers, or beside."""

    samples: tuple[float, ...] = ()
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a table with a column for each of several ways. cells: by the way's name.

    topic: which makes the table; heading: lines of the same one stand together. target: what the median must reach
    (lower is better), in the unit; missed targets are shown, never asserted.
    """

    topic: str
    heading: str
    title: str
    unit: str
    cells: Mapping[str, Cell]
    target: float | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole run. host: what it ran on, and versions. rows: of the gateways' table. lines: of the other tables."""

    taken_at: str
    quick: bool
    host: Mapping[str, str]
    rows: tuple[Row, ...]
    lines: tuple[Line, ...] = ()


def percentile(samples: Sequence[float], percent: float) -> float:
    """Interpolated between neighbours, as numpy does by default."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def to_json(report: Report) -> str:
    """With summaries and ratios beside the samples, for those who read it without this program."""
    rows = []
    for row in report.rows:
        value: dict[str, Any] = {**asdict(row), "ratio": row.ratio}
        for side in ("ours", "theirs"):
            samples: tuple[float, ...] = value[side]
            value[f"{side}_summary"] = asdict(Summary.of(samples)) if samples else None
        rows.append(value)
    lines = []
    for line in report.lines:
        value = asdict(line)
        for cell in value["cells"].values():
            cell["summary"] = asdict(Summary.of(cell["samples"])) if cell["samples"] else None
        lines.append(value)
    return json.dumps({"format": FORMAT_VERSION, **asdict(report), "rows": rows, "lines": lines}, indent=1) + "\n"


def from_json(path: Path) -> Report:
    """The inverse. Errors: ValueError for another format, OSError."""
    value = json.loads(path.read_text())
    if value.get("format") != FORMAT_VERSION:
        raise ValueError(f"{path} has format {value.get('format')}, this version reads {FORMAT_VERSION}.")
    rows = tuple(
        Row(
            topic=row["topic"],
            title=row["title"],
            unit=row["unit"],
            ours=tuple(row["ours"]),
            theirs=tuple(row["theirs"]),
            compared=row["compared"],
        )
        for row in value["rows"]
    )
    lines = tuple(
        Line(
            topic=line["topic"],
            heading=line["heading"],
            title=line["title"],
            unit=line["unit"],
            cells={
                name: Cell(samples=tuple(cell["samples"]), text=cell["text"]) for name, cell in line["cells"].items()
            },
            target=line["target"],
        )
        for line in value["lines"]
    )
    return Report(taken_at=value["taken_at"], quick=value["quick"], host=value["host"], rows=rows, lines=lines)
