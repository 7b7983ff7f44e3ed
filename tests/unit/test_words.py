"""docs/words.md has the word that each public class is named by."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("gateway", "kernels", "vm_runtime")


def _nouns() -> dict[str, str]:
    """The last word of each public class's name, with one class that has it."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found.setdefault(re.findall(r"[A-Z][a-z0-9]*", node.name)[-1].lower(), f"{path.name}: {node.name}")
    return found


_WORDS = set(re.findall(r"[a-z]+", (ROOT / "docs/words.md").read_text().lower()))


@pytest.mark.parametrize(("noun", "where"), _nouns().items())
def test_a_class_is_named_by_a_known_word(noun: str, where: str) -> None:
    singular = noun.removesuffix("s")
    assert {noun, singular, noun.removesuffix("ies") + "y", noun + "s"} & _WORDS, where
