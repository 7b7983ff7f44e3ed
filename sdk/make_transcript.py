"""Makes docs/cli.md by using the command `hypercell` as a person would, with the gateway that HYPERCELL_URL names.

    python sdk/make_transcript.py [PAGE]

Needs pexpect. Ids, ages and sizes differ from run to run and are replaced by ones that stay.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pexpect

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "cli.md"
TIMEOUT_S = 300
NOTEBOOK = """\
{"cells": [{"cell_type": "code", "id": "a", "metadata": {}, "execution_count": null, "outputs": [],
 "source": "total = sum(range(101)); total"}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
"""
HEAD = """\
# The command `hypercell`

Comes with the SDK. This page is made by `sdk/make_transcript.py`, which types all of it.

A sandbox is named by its id, the beginning of its id, or its name. `--json` prints JSON instead, with every subcommand;
`--url` and `--token` say where the gateway is, else `HYPERCELL_URL` and `HYPERCELL_TOKEN`, else the one that runs here
is used. Progress is shown on stderr if that is a terminal.

| exit status | |
|---|---|
| 0 | done |
| 1 | it could not be done; stderr says why in one sentence |
| 2 | wrong arguments |
| 3 | the code that `run` ran raised an exception |
| 124 | its time was up (`--timeout`) |
| 130, 129, 143 | Ctrl-C, SIGHUP, SIGTERM; it cleans up first |
| that of the command | `exec`; 128 + n if signal n ended it |
| that of the script | `run`, if it ended with `sys.exit` |

Completion: `eval "$(hypercell completion bash)"`, the same with `zsh`, `hypercell completion fish | source`.
"""
# What is done, and what is said about it. Keys are typed into `exec -it`.
STEPS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("A sandbox, and what is in it.", "hypercell new --name work --tag of=docs --lifetime 3600", ()),
    ("", "hypercell ls --tag of=docs", ()),
    ("", "hypercell exec work 'echo $HOME; nproc'", ()),
    ("Files, to and fro.", "hypercell cp notes.txt work:", ()),
    ("", "hypercell ls work:", ()),
    ("", "hypercell cp work:notes.txt -", ()),
    ("A shell with a terminal.", "hypercell exec -it work bash --norc", ("wc -l notes.txt", "exit")),
    ("A script, from a pipe, and how it ended.",
     "echo 'import sys; print(40 + 2); sys.exit(7)' | hypercell run --sandbox work -; echo $?", ()),
    ("A notebook, whose outputs are written back; the sandbox keeps its variables.",
     "hypercell run --sandbox work sums.ipynb", ()),
    ("", "grep text/plain sums.ipynb", ()),
    ("Work in the background, and its output.", "hypercell exec -d work 'echo begun; sleep 1; echo done'", ()),
    ("", "hypercell logs -f work", ()),
    ("One becomes three.", "hypercell fork -n 2 --name child work", ()),
    ("", "hypercell tree work", ()),
    ("A state with a name, and another sandbox that starts from it.", "hypercell snapshot work prepared", ()),
    ("", "hypercell new --snapshot prepared --name again", ()),
    ("Sleep frees memory; whatever uses a sandbox wakes it.", "hypercell sleep work", ()),
    ("", "hypercell exec work cat notes.txt", ()),
    ("A paused one stands still until it is resumed.", "hypercell pause work", ()),
    ("", "hypercell exec work true", ()),
    ("", "hypercell resume work", ()),
    ("Done.", "hypercell rm work again", ()),
    ("", "hypercell rm work", ()),
)  # fmt: skip


class Transcript:
    """Runs commands in a directory and writes down what a terminal would show."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ids: dict[str, str] = {}
        self.lines: list[str] = []
        self.made: list[str] = []

    def run(self, command: str, keys: tuple[str, ...]) -> None:
        self.lines.append(f"$ {command}")
        if keys:
            output = self._typed(command, keys)
        else:
            done = subprocess.run(
                command, shell=True, cwd=self._directory, capture_output=True, text=True, timeout=TIMEOUT_S
            )
            output = done.stdout + done.stderr
        self.made += re.findall(r"^[0-9a-f]{8}-[0-9a-f-]{27}$", output, re.MULTILINE)
        self.lines += self._stable(output).rstrip("\n").splitlines()

    def _typed(self, command: str, keys: tuple[str, ...]) -> str:
        """The whole session, as the terminal showed it."""
        child = pexpect.spawn(
            "/bin/sh", ["-c", command], cwd=self._directory, encoding="utf-8", timeout=TIMEOUT_S, dimensions=(24, 80)
        )
        shown = ""
        for key in keys:
            child.expect(r"[$#] ")
            shown += child.before + child.after
            child.sendline(key)
        child.expect(pexpect.EOF)
        child.close()
        return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", shown + child.before).replace("\r", "")

    def _stable(self, text: str) -> str:
        def stand_in(found: re.Match[str]) -> str:
            return self._ids.setdefault(found[0], f"{len(self._ids) + 1:x}" * 8 + "-0000-4000-8000-000000000000")

        text = re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", stand_in, text)
        text = re.sub(
            r"^\[?[0-9a-f]{12}\]?(?=$| )", lambda m: m[0].replace(m[0].strip("[]"), "c0ffee000000"), text, flags=re.M
        )
        text = re.sub(r"^[0-9a-f]{32}$", "5" * 32, text, flags=re.M)
        text = re.sub(r"\(\d+ s\)", "(5 s)", text)
        return re.sub(r"\d+ s$", "5 s", text, flags=re.M)


def page() -> str:
    parts = [HEAD]
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "notes.txt").write_text("one\ntwo\n")
        (Path(directory) / "sums.ipynb").write_text(NOTEBOOK)
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        transcript = Transcript(Path(directory))
        try:
            for about, command, keys in STEPS:
                if about:
                    parts.append(block(transcript))
                    parts.append(about)
                transcript.run(command, keys)
            parts.append(block(transcript))
        finally:
            for made in transcript.made:
                subprocess.run(["hypercell", "rm", made], capture_output=True, check=False)
    return "\n\n".join(part for part in parts if part) + "\n"


def block(transcript: Transcript) -> str:
    """What was said since the last one, indented as Markdown has it."""
    lines, transcript.lines = transcript.lines, []
    return "\n".join(f"    {line}".rstrip() for line in lines)


def main() -> int:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    target.write_text(page())
    print(f"made {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
