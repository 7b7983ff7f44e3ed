"""Pages say what is true: every Python block runs, and what is made from sources is current."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gateways import RunningGateway

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "sdk" / "README.md", *sorted((ROOT / "docs" / "sdk").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL), start=1)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_in_the_pages_runs(block: str, at_gateway: RunningGateway, tmp_path: Path) -> None:
    program = tmp_path / "block.py"
    program.write_text(block)
    command: list[str | Path] = [sys.executable, "-W", "error", program]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=400)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("maker", ["make_blocking.py", "make_reference.py"])
def test_what_is_made_from_sources_is_current(maker: str) -> None:
    command: list[str | Path] = [sys.executable, ROOT / "sdk" / maker, "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_every_page_and_method_is_linked() -> None:
    readme = (ROOT / "sdk" / "README.md").read_text()
    for page in (ROOT / "docs" / "sdk").glob("*.md"):
        assert f"docs/sdk/{page.name}" in readme
    for link in re.findall(r"\]\(\.\./(.+?)\)", readme):
        assert (ROOT / link).exists(), link
