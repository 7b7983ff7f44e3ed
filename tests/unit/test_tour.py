"""docs/tour.md names files and functions that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
_CODE = re.compile(r"`([^`]+)`")
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)?")


def _mentions() -> list[tuple[str, list[str]]]:
    """Each file of the page with the names that follow it before the next file or the end of the sentence."""
    found: list[tuple[str, list[str]]] = []
    for block in re.split(r"\n(?=\d+\. )|\n\n", (ROOT / "docs/tour.md").read_text()):
        current: list[str] | None = None
        for code in _CODE.findall(block):
            if code.endswith(".py"):
                current = []
                found.append((code, current))
            elif current is not None and _NAME.fullmatch(code):
                current.append(code)
    return found


def _defined(path: Path) -> set[str]:
    """Functions and classes of a module, `Class.method`, and what it imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, _FUNCTIONS)}
        if isinstance(node, (ast.ClassDef, *_FUNCTIONS)):
            names.add(node.name)
    return names


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Words of the page in the form of code that belong to no file before them.
_OTHER = {"KernelMessage", "cell", "Link", "become", "Then.STOP", "sandbox.fork"}


@pytest.mark.parametrize(("file", "names"), _mentions())
def test_what_the_tour_names_exists(file: str, names: list[str]) -> None:
    assert (ROOT / file).is_file()
    assert set(names) - _defined(ROOT / file) - _OTHER == set()


def test_the_tour_names_something() -> None:
    assert sum(len(names) for _, names in _mentions()) > 30
