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
from hypercell.execution import MAX_KEPT_CHARACTERS
from tests.gateways import RunningGateway, running_gateway

ROOT = Path(__file__).parents[2]
HYPERCELL = [sys.executable, "-m", "hypercell.cli"]


def hypercell(*arguments: object, stdin: str | None = None, status: int = 0) -> str:
    command = [*HYPERCELL, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=300)
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + (result.stderr if status else "")


def cell(source: str) -> dict[str, object]:
    return nbformat.v4.new_code_cell(source)  # type: ignore[no-any-return]


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
    assert hypercell("pause", made).strip() == made
    assert "resume" in hypercell("exec", made, "true", status=1)
    for action in ("resume", "interrupt", "restart"):
        assert hypercell(action, made).strip() == made
    assert json.loads(hypercell("info", made, "--json"))["metrics"]["guest"]["cpu_used_ms"] > 0
    assert re.search(rf"^{snapshot} +named .* {made} ", hypercell("snapshots"), re.MULTILINE)
    assert hypercell("exec", "-u", "root", made, "id -un; pwd") == "root\n/root\n"


def test_exec(made: str) -> None:
    assert hypercell("exec", "-i", made, "cat", stdin="typed") == "typed"
    assert "oops" in hypercell("exec", made, "--", "sh", "-c", "echo oops >&2; exit 7", status=7)
    assert json.loads(hypercell("exec", "--json", made, "exit 5", status=5))["exit_code"] == 5
    hypercell("exec", "--timeout", "0.5", made, "sleep 60", status=124)
    hypercell("exec", made, "kill -9 $$", status=128 + 9)
    hypercell("exec", "-d", made, "echo begun; sleep 2; echo done")
    assert hypercell("logs", "-f", made) == "begun\ndone\n"
    assert "needs a terminal" in hypercell("exec", "-it", made, "bash", stdin="", status=1)


def test_exec_passes_bytes_on_as_they_are(made: str) -> None:
    content = bytes(range(256)) * 4
    for options in (["-i"], ["-i", "--json"]):
        result = subprocess.run(
            [*HYPERCELL, "exec", *options, made, "cat > /tmp/f; cat /tmp/f; cat /tmp/f >&2"],
            input=content,
            capture_output=True,
            timeout=60,
        )
        assert result.returncode == 0
        if "--json" in options:
            assert json.loads(result.stdout)["stdout"] == content.decode(errors="replace")
        else:
            assert (result.stdout, result.stderr) == (content, content)


def test_logs_show_all_that_is_kept_and_say_what_is_not(made: str) -> None:
    hypercell("exec", "-d", made, "seq 200000; echo last; sleep 600")
    deadline = time.monotonic() + 60
    while not json.loads(hypercell("exec", "--json", made, "pgrep -x sleep || true"))["stdout"]:
        assert time.monotonic() < deadline
    result = subprocess.run([*HYPERCELL, "logs", made], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.endswith("200000\nlast\n")
    found = re.search(r"(\d+) bytes of output before this are kept no more", result.stderr)
    assert found is not None
    everything = len("".join(f"{number}\n" for number in range(1, 200_001))) + len("last\n")
    assert int(found[1]) + len(result.stdout) == everything


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


def test_cp_of_a_tree_that_is_deep_and_wide(made: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    deep = tree.joinpath(*["d"] * 40)
    deep.mkdir(parents=True)
    (deep / "bottom").write_text("b")
    (tree / "empty").mkdir(mode=0o700)
    (tree / "tool").write_text("#!/bin/sh")
    (tree / "tool").chmod(0o750)
    (tmp_path / "secret").write_text("s")
    (tree / "out").symlink_to(tmp_path / "secret")
    (tree / "round").symlink_to(tree)
    os.mkfifo(tree / "pipe")
    for _ in range(2):  # what is there already is replaced
        done = subprocess.run([*HYPERCELL, "cp", "-r", tree, f"{made}:"], capture_output=True, text=True, check=True)
        assert done.stderr == f"hypercell: special files are not copied: {tree}/pipe\n"
    assert hypercell("exec", made, "readlink tree/out tree/round") == f"{tmp_path}/secret\n{tree}\n"
    # More than one answer holds. Links, which need not be read.
    many = "import os; [os.symlink('/etc/passwd', f'tree/w/{n}') for n in range(10_500)]"
    hypercell("exec", made, f'mkdir -p tree/w; ln -s / tree/r; python3 -c "{many}"')
    back = tmp_path / "back"
    done = subprocess.run(
        [*HYPERCELL, "cp", "-r", "--json", f"{made}:tree/d", back], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {"files": 1, "bytes": 1}
    assert back.joinpath(*["d"] * 39, "bottom").read_text() == "b"
    for _ in range(2):
        hypercell("cp", "-r", f"{made}:tree", back)
    assert sorted(one.name for one in (back / "tree").iterdir()) == ["d", "empty", "out", "r", "round", "tool", "w"]
    assert {str(one.readlink()) for one in (back / "tree/w").iterdir()} == {"/etc/passwd"}
    assert len(list((back / "tree/w").iterdir())) == len(Sandbox.connect(made).files.list("tree/w")) == 10_500
    assert (str((back / "tree/r").readlink()), str((back / "tree/out").readlink())) == ("/", f"{tmp_path}/secret")
    assert list((back / "tree/empty").iterdir()) == []
    assert (back / "tree/empty").stat().st_mode & 0o777 == 0o700
    assert (back / "tree/tool").stat().st_mode & 0o777 == 0o750
    # A link that is here leads no copy out of the target.
    (tmp_path / "elsewhere").mkdir()
    (back / "tree/w").rename(tmp_path / "w")
    (back / "tree/w").symlink_to(tmp_path / "elsewhere")
    assert "is a link" in hypercell("cp", "-r", f"{made}:tree", back, status=1)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_run_writes_a_notebook_s_outputs_back(made: str, tmp_path: Path) -> None:
    path = tmp_path / "n.ipynb"
    notebook = nbformat.v4.new_notebook(
        cells=[
            cell("print('hi'); value = 6"),
            nbformat.v4.new_markdown_cell("text"),
            cell("value * 7"),
            cell("1 / 0"),
            cell("'never'"),
        ]
    )
    path.write_text(nbformat.writes(notebook))
    assert "cell 3 failed: ZeroDivisionError" in hypercell("run", "--sandbox", made, path, status=3)
    written = nbformat.read(path, 4)
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
    for code, ends in (
        ("import sys; sys.exit(0)", 0),
        ("import sys; print('said'); sys.exit(7)", 7),
        ("raise SystemExit", 0),
        ("exit(256 + 9)", 9),
        ("import sys; sys.exit(True)", 1),
        ("import sys; sys.exit('7')", 1),
    ):
        script.write_text(code)
        done = subprocess.run([*HYPERCELL, "run", "--sandbox", made, script], capture_output=True, text=True)
        said = ("said\n" if "said" in code else "", "7\n" if "'7'" in code else "")
        assert (done.returncode, done.stdout, done.stderr) == (ends, *said)
    report = json.loads(hypercell("run", "--json", "--sandbox", made, "-", stdin="import sys; sys.exit(5)", status=5))
    assert (report["status"], report["exit_code"], report["error"]["name"]) == ("error", 5, "SystemExit")
    script.write_text("while True: pass")
    assert "was interrupted" in hypercell("run", "--sandbox", made, "--timeout", "1", script, status=124)
    assert "cannot be read" in hypercell("run", tmp_path / "none.py", status=1)
    script.write_text("import sys\nprint('out')\nprint('err', file=sys.stderr)\n6 * 7")
    report = json.loads(hypercell("run", "--json", "--sandbox", made, script))
    assert (report["stdout"], report["stderr"]) == ("out\n", "err\n")
    assert report["results"][0]["data"]["text/plain"] == "42"
    script.write_text(f"print('x' * {MAX_KEPT_CHARACTERS + 99})")
    report = json.loads(hypercell("run", "--json", "--sandbox", made, script))
    assert (len(report["stdout"]), report["skipped_characters"]) == (MAX_KEPT_CHARACTERS, 100)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts_the_code_and_leaves_no_sandbox(
    at_gateway: RunningGateway, tmp_path: Path, number: signal.Signals
) -> None:
    script = tmp_path / "s.py"
    script.write_text("print('on', flush=True)\nwhile True: pass")
    before = {info.id for info in Sandbox.list()}
    process = subprocess.Popen(
        [*HYPERCELL, "run", script],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
        # These tests may run below `nohup`, which has SIGHUP ignored; the command respects that.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "on\n"
            (new,) = [info for info in Sandbox.list() if info.id not in before]
            # Killed outright, it would leave one that has an end.
            assert new.max_lifetime_s is not None
            process.send_signal(number)
            assert process.wait(timeout=60) == 128 + number
        finally:
            process.kill()
    assert {info.id for info in Sandbox.list()} == before


def test_what_cannot_be_done_here_is_one_sentence(made: str, tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes("print('é')".encode("latin-1"))
    (tmp_path / "latin.ipynb").write_bytes(b"\xff")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory/secret").mkdir()
    hypercell("cp", "-", f"{made}:secret", stdin="s")
    for arguments, words in (
        (["run", tmp_path / "latin.py"], "not UTF-8 at byte 7"),
        (["run", tmp_path / "latin.ipynb"], "not UTF-8 at byte 0"),
        (["cp", f"{made}:secret", tmp_path / "none/here"], "none is no directory"),
        (["cp", f"{made}:secret", tmp_path / "directory"], "s a directory"),
    ):
        said = hypercell(*arguments, status=1)
        assert words in said
        assert said.startswith("hypercell: ") and said.count("\n") == 1


def test_what_cannot_be_done_is_one_sentence(at_gateway: RunningGateway) -> None:
    assert hypercell("info", "nobody", status=1).startswith("hypercell: No sandbox has the name")
    assert "invalid choice" in hypercell("nonsense", status=2)
    assert "does not answer" in hypercell("ls", "--url", "http://127.0.0.1:9", status=1)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    script = hypercell("completion", shell)
    assert "fork" in script and "same-random" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_transcript_is_as_the_page_shows_it(state_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "cli.md"
    command: list[str | Path] = [sys.executable, ROOT / "sdk" / "make_transcript.py", target]
    # A gateway of its own: `hypercell ls` shows every sandbox that there is.
    with running_gateway(state_dir, "--pool-size", "0") as own:
        environment = {**os.environ, "HYPERCELL_URL": own.url, "HYPERCELL_TOKEN": own.token}
        subprocess.run(command, check=True, capture_output=True, timeout=200, env=environment)
    assert target.read_text() == (ROOT / "docs" / "cli.md").read_text()
