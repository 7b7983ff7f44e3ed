"""The command `hypercell` as a person or a script uses it, against real sandboxes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from hypercell import Sandbox
from tests.gateways import RunningGateway, running_gateway

ROOT = Path(__file__).parents[2]
HYPERCELL = [sys.executable, "-m", "hypercell.cli"]


def hypercell(*arguments: object, stdin: str | None = None, status: int = 0) -> str:
    command = [*HYPERCELL, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=300)
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + (result.stderr if status else "")


def cell(source: str) -> dict[str, object]:
    return nbformat.v4.new_code_cell(source)  # type: ignore[no-any-return, no-untyped-call]


@pytest.fixture
def made(at_gateway: RunningGateway) -> Iterator[str]:
    sandbox_id = hypercell("new", "--name", "from-terminal", "-e", "WORD=w", "--lifetime", 3000).strip()
    yield sandbox_id
    hypercell("rm", sandbox_id)


def test_the_life_of_a_sandbox(made: str) -> None:
    listed = {one["id"]: one for one in json.loads(hypercell("ls", "--json"))}
    assert listed[made]["name"] == "from-terminal"
    assert made in hypercell("ls", "--ids").split()
    assert hypercell("exec", "from-terminal", "echo $WORD") == "w\n"
    children = json.loads(hypercell("fork", "-n", "2", "--name", "kid", made[:8], "--json"))
    drawn = hypercell("tree", made)
    for child in children:
        assert re.search(rf"^[├└]── {child['id']} kid running", drawn, re.MULTILINE)
    hypercell("rm", *(child["id"] for child in children))
    snapshot = hypercell("snapshot", made, "named").strip()
    assert snapshot in hypercell("checkpoints", made)
    hypercell("goto", made, "named")
    assert hypercell("sleep", made).strip() == made
    assert json.loads(hypercell("info", made, "--json"))["sandbox"]["state"] == "asleep"
    assert hypercell("wake", made).strip() == made


def test_exec(made: str) -> None:
    assert hypercell("exec", "-i", made, "cat", stdin="typed") == "typed"
    assert "oops" in hypercell("exec", made, "--", "sh", "-c", "echo oops >&2; exit 7", status=7)
    assert json.loads(hypercell("exec", "--json", made, "exit 5", status=5))["exit_status"] == 5
    hypercell("exec", "--timeout", "0.5", made, "sleep 60", status=124)
    hypercell("exec", made, "kill -9 $$", status=128 + 9)
    hypercell("exec", "-d", made, "echo begun; sleep 2; echo done")
    assert hypercell("logs", "-f", made) == "begun\ndone\n"
    assert "needs a terminal" in hypercell("exec", "-it", made, "bash", stdin="", status=1)


def test_cp(made: str, tmp_path: Path) -> None:
    (tmp_path / "tree/deep").mkdir(parents=True)
    (tmp_path / "tree/a").write_text("a")
    (tmp_path / "tree/deep/b").write_bytes(bytes(range(256)))
    hypercell("cp", "-r", tmp_path / "tree", f"{made}:")
    assert json.loads(hypercell("cp", "-r", f"{made}:tree", tmp_path / "back", "--json")) == {"files": 2, "bytes": 257}
    assert (tmp_path / "back/deep/b").read_bytes() == bytes(range(256))
    hypercell("cp", "-", f"{made}:from-stdin", stdin="piped")
    assert hypercell("cp", f"{made}:from-stdin", "-") == "piped"
    assert "-r copies it" in hypercell("cp", tmp_path / "tree", f"{made}:", status=1)
    assert "One side" in hypercell("cp", "a", "b", status=1)


def test_run_writes_a_notebook_s_outputs_back(made: str, tmp_path: Path) -> None:
    path = tmp_path / "n.ipynb"
    notebook = nbformat.v4.new_notebook(  # type: ignore[no-untyped-call]
        cells=[
            cell("print('hi'); value = 6"),
            nbformat.v4.new_markdown_cell("text"),  # type: ignore[no-untyped-call]
            cell("value * 7"),
            cell("1 / 0"),
            cell("'never'"),
        ]
    )
    path.write_text(nbformat.writes(notebook))  # type: ignore[no-untyped-call]
    assert "cell 3 failed: ZeroDivisionError" in hypercell("run", "--sandbox", made, path, status=3)
    written = nbformat.read(path, 4)  # type: ignore[no-untyped-call]
    nbformat.validate(written)
    outputs = [one.outputs for one in written.cells if one.cell_type == "code"]
    assert outputs[0][0].text == "hi\n"
    assert outputs[1][0].data["text/plain"] == "42"
    assert outputs[2][0].ename == "ZeroDivisionError"
    assert outputs[3] == []
    report = json.loads(hypercell("run", "--json", "--allow-errors", "-o", tmp_path / "o.ipynb", path, status=3))
    assert (report["status"], report["cells"]) == ("error", 4)
    assert report["sandbox_id"] not in {info.id for info in Sandbox.list()}


def test_run_of_a_script(made: str, tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text("import sys\nprint(sys.argv[1:])\nif 'fail' in sys.argv: raise ValueError('bad')\n")
    assert hypercell("run", "--sandbox", made, script, "a", "b") == "['a', 'b']\n"
    assert "line 3" in hypercell("run", "--sandbox", made, script, "fail", status=3)
    script.write_text("while True: pass")
    assert "was interrupted" in hypercell("run", "--sandbox", made, "--timeout", "1", script, status=124)
    assert "cannot be read" in hypercell("run", tmp_path / "none.py", status=1)


def test_ctrl_c_interrupts_the_code_and_leaves_no_sandbox(at_gateway: RunningGateway, tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text("print('on', flush=True)\nwhile True: pass")
    before = {info.id for info in Sandbox.list()}
    process = subprocess.Popen([*HYPERCELL, "run", script], stdout=subprocess.PIPE, text=True, env=os.environ)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert {info.id for info in Sandbox.list()} == before


def test_what_cannot_be_done_is_one_sentence(at_gateway: RunningGateway) -> None:
    assert hypercell("info", "nobody", status=1).startswith("hypercell: No sandbox has the name")
    assert "invalid choice" in hypercell("nonsense", status=2)
    began = time.monotonic()
    assert "does not answer" in hypercell("ls", "--url", "http://127.0.0.1:9", status=1)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    script = hypercell("completion", shell)
    assert "fork" in script and "same-random" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_transcript_is_as_the_page_shows_it(state_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "cli.md"
    command = [sys.executable, ROOT / "sdk" / "make_transcript.py", target]
    # A gateway of its own: `hypercell ls` shows every sandbox that there is.
    with running_gateway(state_dir, "--pool-size", "0") as own:
        environment = {**os.environ, "HYPERCELL_URL": own.url, "HYPERCELL_TOKEN": own.token}
        subprocess.run(command, check=True, capture_output=True, timeout=200, env=environment)
    assert target.read_text() == (ROOT / "docs" / "cli.md").read_text()
