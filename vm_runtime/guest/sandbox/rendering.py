"""Recorded outputs as HTML and as text: several cells' side by side, each output where it belongs."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# The richest first, as JupyterLab ranks them; scripts are not among them.
_IMAGES = ("image/svg+xml", "image/png", "image/jpeg", "image/gif", "image/webp")

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")

# A column narrower than this wraps below the others.
COLUMN_CHARACTERS = 26

_FRAME = "flex:1 1 {width}ch;min-width:0;border:1px solid #8884;border-radius:6px;padding:8px;overflow:auto"
_KEPT = ";border-color:#2e7d32;border-width:2px"
_PRE = "margin:0;white-space:pre-wrap;overflow-wrap:anywhere"
_STDERR = _PRE + ";background:#f4433622"


@dataclass(kw_only=True)
class Column:
    """One cell's outputs. note: HTML after the title (a state, a score); kept: it is the one that was chosen."""

    title: str
    note: str = ""
    outputs: Sequence[Mapping[str, Any]] = field(default_factory=list)
    kept: bool = False


class Columns:
    """What a notebook shows side by side, with a text for terminals."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = columns

    def __repr__(self) -> str:
        return "\n".join(_text(column) for column in self.columns)

    def _repr_html_(self) -> str:
        frames = "".join(_frame(column) for column in self.columns)
        return f'<div style="display:flex;flex-wrap:wrap;gap:8px">{frames}</div>'


def output_html(output: Mapping[str, Any]) -> str:
    """One output: images as data URIs, HTML as it is, everything else as text."""
    match output["output_type"]:
        case "stream":
            style = _STDERR if output["name"] == "stderr" else _PRE
            return f'<pre style="{style}">{_escape(output["text"])}</pre>'
        case "error":
            return f'<pre style="{_STDERR}">{_escape(chr(10).join(output["traceback"]))}</pre>'
    data = output["data"]
    if isinstance(text := data.get("text/html"), str):
        return f"<div>{text}</div>"
    for mime in _IMAGES:
        if isinstance(image := data.get(mime), str):
            return _image(mime, image, output.get("metadata", {}).get(mime, {}))
    for mime in ("text/latex", "text/markdown"):
        if isinstance(text := data.get(mime), str):
            return f"<div>{html.escape(text)}</div>"  # JupyterLab typesets $...$ in HTML
    return f'<pre style="{_PRE}">{_escape(str(data.get("text/plain", "")))}</pre>'


def output_text(output: Mapping[str, Any]) -> str:
    """One output as plain text."""
    match output["output_type"]:
        case "stream":
            return str(output["text"]).rstrip("\n")
        case "error":
            return _ANSI.sub("", "\n".join(output["traceback"]))
    return str(output["data"].get("text/plain", "[an output without text]"))


def _frame(column: Column) -> str:
    body = "".join(output_html(output) for output in column.outputs)
    style = _FRAME.format(width=COLUMN_CHARACTERS) + (_KEPT if column.kept else "")
    return f'<div style="{style}"><div><b>{html.escape(column.title)}</b> {column.note}</div>{body}</div>'


def _text(column: Column) -> str:
    note = html.unescape(re.sub(r"<[^>]*>", "", column.note))
    head = f"── {column.title} {note}".rstrip() + (" ── kept" if column.kept else "")
    return "\n".join([head, *(output_text(output) for output in column.outputs)])


def _image(mime: str, image: str, metadata: Any) -> str:
    if mime == "image/svg+xml":
        return f"<div>{image}</div>"
    size = ""
    for name in ("width", "height"):
        value = metadata.get(name) if isinstance(metadata, dict) else None
        if isinstance(value, int | float):
            size += f' {name}="{value}"'
    data = "".join(image.split())
    return f'<img src="data:{mime};base64,{html.escape(data)}"{size} style="max-width:100%">'


def _escape(text: str) -> str:
    return html.escape(_ANSI.sub("", text))
