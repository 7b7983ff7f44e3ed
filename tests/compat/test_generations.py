"""The tables of generations say what the agents know: the frozen ones and the one of now; and the docs say the same."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from kernels.guest_calls import GuestCalls
from tests.gateways import ROOT
from tools.wire_tables import PAGE, updated
from vm_runtime.wire.generations import (
    CALLS,
    EVENTS,
    GENERATION,
    GUEST_STREAMS,
    HELLO_EXTRA,
    HOST_STREAMS,
    WELCOME_EXTRA,
    Entry,
)

# The functions that take a field out of a stream's parameters, and where they are used.
READERS = ("param", "whole_number", "path_text", "path")
MODULES = ("requests.py", "exec.py", "files.py")
# Where streams and events are named.
PAGES = ("wire", "architecture", "exec_and_files", "sandbox_calls", "guest", "gateway")
# Read without a name: the kernel's environment, and a file's path.
UNNAMED = {"env", "path"}


def names(entries: Sequence[Entry], generation: int) -> set[str]:
    return {name for entry in entries if entry.since <= generation for name in entry.names}


def fields(entries: Sequence[Entry], generation: int) -> set[str]:
    return {name for entry in entries for name, since in entry.fields(entry.takes) if since <= generation}


def fields_read(directory: Path) -> Iterator[str]:
    for module in MODULES:
        for node in ast.walk(ast.parse((directory / module).read_text())):
            if isinstance(node, ast.Call):
                function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                text = node.args[1] if len(node.args) > 1 else None
                if function in READERS and isinstance(text, ast.Constant) and isinstance(text.value, str):
                    yield text.value


@pytest.fixture(params=range(1, GENERATION + 1))
def agent(request: pytest.FixtureRequest, first_code: Path) -> tuple[Path, int]:
    """The directory of a `vm_runtime`, and its generation."""
    return {1: (first_code, 1)}.get(request.param, (ROOT, GENERATION))


def test_an_agent_knows_what_its_generation_has(agent: tuple[Path, int]) -> None:
    code, generation = agent
    program = (
        f"import sys; sys.path[:0] = [{str(code)!r}]; import json; from vm_runtime.guest.requests import HANDLERS; "
        "print(json.dumps(list(HANDLERS)))"
    )
    kinds = json.loads(subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, check=True).stdout)
    assert set(kinds) == names(HOST_STREAMS, generation)
    guest = code / "vm_runtime" / "guest"
    assert set(fields_read(guest)) | UNNAMED == fields(HOST_STREAMS, generation)
    texts = "\n".join(path.read_text() for path in guest.rglob("*.py"))
    assert set(re.findall(r'"event": "(kernel\.\w+)"', texts)) == names(EVENTS, generation)
    module = "\n".join(path.read_text() for path in (guest / "sandbox").glob("*.py"))
    assert set(re.findall(r'\bask\(\s*"(\w+)"', module)) <= names(CALLS, generation)
    assert set(re.findall(r'extra\.get\("(\w+)"\)', texts)) == names(HELLO_EXTRA, generation)
    agent_text = (guest / "agent.py").read_text()
    told = re.findall(r'\bextra(?:: [^=]*)? ?= ?\{"(\w+)"', agent_text) + re.findall(r'\bextra\["(\w+)"\]', agent_text)
    assert set(told) == names(WELCOME_EXTRA, generation)


def test_the_host_knows_all_calls() -> None:
    assert set(GuestCalls(*cast(Any, [None] * 5))._ops) == names(CALLS, GENERATION)


def test_the_newest_generation_has_brought_something() -> None:
    tables = (*HOST_STREAMS, *GUEST_STREAMS, *EVENTS, *CALLS, *HELLO_EXTRA, *WELCOME_EXTRA)
    since = [since for entry in tables for text in (entry.takes, entry.answers) for _, since in entry.fields(text)]
    assert max([*since, *(entry.since for entry in tables)]) == GENERATION


def test_the_page_is_printed_from_the_tables() -> None:
    page = PAGE.read_text()
    assert page == updated(page), "run `python tools/wire_tables.py`"


def test_docs_name_only_what_there_is() -> None:
    known = names((*HOST_STREAMS, *GUEST_STREAMS, *EVENTS), GENERATION)
    families = {name.partition(".")[0] for name in known if "." in name} - {"sandbox"}
    named = re.compile(rf"`((?:{'|'.join(families)})\.[a-z_.*]+)`")
    for page in PAGES:
        for name in named.findall((ROOT / "docs" / f"{page}.md").read_text()):
            assert name in known or name.endswith((".*", ".py")), f"{page}.md: {name}"
