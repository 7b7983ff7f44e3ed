"""The grammar of `%sandbox` and `%%sandbox`: subcommands, their options and their help. Pure: parses, does nothing."""

from __future__ import annotations

import argparse
import difflib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn


class UsageProblem(Exception):
    """The line cannot be understood; the message says why, and what would be."""


@dataclass(frozen=True, kw_only=True)
class Subcommand:
    """usage: what follows `%sandbox`; cell: whether it is a cell magic."""

    name: str
    usage: str
    summary: str
    cell: bool = False


SUBCOMMANDS = (
    Subcommand(name="fork", usage="fork [N] [--name NAME] [--same-random]", summary="N children that go on from here"),
    Subcommand(name="tree", usage="tree", summary="this sandbox's family, with links"),
    Subcommand(name="info", usage="info", summary="this sandbox"),
    Subcommand(name="snapshot", usage="snapshot NAME", summary="keep the state of now under a name"),
    Subcommand(name="restore", usage="restore NAME", summary="go back to a snapshot"),
    Subcommand(name="kill", usage="kill ID", summary="end a child"),
    Subcommand(name="sleep", usage="sleep", summary="stop until the next request"),
    Subcommand(name="checkpoints", usage="checkpoints", summary="the states to which one can go back"),
    Subcommand(name="goto", usage="goto TARGET", summary="go back to a checkpoint: its id, or a cell's number"),
    Subcommand(name="undo", usage="undo", summary="go back to before the last cell"),
    Subcommand(name="help", usage="help [SUBCOMMAND]", summary="this"),
    Subcommand(
        name="branch",
        usage="branch [-n N] [--keep best --by EXPR] [--timeout SECONDS] [--same-random]",
        summary="run the cell in N children (4), outputs side by side; `branch` is each one's number; with --keep best "
        "go on with the state of the one whose EXPR is highest",
        cell=True,
    ),
    Subcommand(name="try", usage="try", summary="run the cell; if it fails, nothing has happened", cell=True),
)

_BY_NAME = {subcommand.name: subcommand for subcommand in SUBCOMMANDS}


@dataclass(frozen=True, kw_only=True)
class MagicLine:
    """A parsed line. The fields that a subcommand has no use for have their defaults."""

    name: str
    argument: str | None = None
    n: int = 1
    label: str | None = None
    same_random: bool = False
    keep: str | None = None
    by: str | None = None
    limit_s: float | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageProblem(message)


def parse(line: str, *, cell: bool) -> MagicLine:
    """Parse what follows `%sandbox` or `%%sandbox`. Raises UsageProblem with a sentence for people."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UsageProblem(f"The line cannot be read: {error}.") from error
    name = words[0] if words else "help"
    subcommand = _BY_NAME.get(name)
    mark = "%%" if cell else "%"
    if subcommand is None:
        close = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0.5)
        hint = f"Did you mean `{name_with_mark(close[0])}`?" if close else "`%sandbox help` lists what there is."
        raise UsageProblem(f"There is no `{mark}sandbox {name}`. {hint}")
    if subcommand.cell != cell:
        where = "runs a whole cell: write it" if subcommand.cell else "stands alone on its line: write it"
        raise UsageProblem(f"`{name}` {where} as `{name_with_mark(subcommand.usage, cell=subcommand.cell)}`.")
    try:
        return _parsed(name, words[1:])
    except UsageProblem as error:
        usage = name_with_mark(subcommand.usage, cell=subcommand.cell)
        raise UsageProblem(f"{str(error).rstrip('.').capitalize()}. Usage: {usage}") from None


def name_with_mark(usage: str, *, cell: bool | None = None) -> str:
    """The magic as it is written: `%sandbox fork`, `%%sandbox branch`."""
    is_cell = _BY_NAME[usage.split()[0]].cell if cell is None else cell
    return f"{'%%' if is_cell else '%'}sandbox {usage}"


def help_text(name: str | None = None) -> str:
    """All subcommands, or one. Raises UsageProblem for one that there is not."""
    if name is not None and name not in _BY_NAME:
        raise UsageProblem(f"There is no `%sandbox {name}`. `%sandbox help` lists what there is.")
    chosen = SUBCOMMANDS if name is None else (_BY_NAME[name],)
    return "\n".join(f"{name_with_mark(each.usage)}\n    {each.summary}" for each in chosen)


def completions(text_until_cursor: str) -> list[str]:
    """What may follow: subcommands, then options. The words that the user has typed decide."""
    mark, _, rest = text_until_cursor.partition("sandbox")
    cell = mark.strip() == "%%"
    words = rest.split()
    if not words or (len(words) == 1 and not rest[-1].isspace()):
        return [each.name for each in SUBCOMMANDS if each.cell == cell]
    subcommand = _BY_NAME.get(words[0])
    if subcommand is None:
        return []
    if subcommand.name == "help":
        return [each.name for each in SUBCOMMANDS]
    if words[-1] == "--keep" and rest[-1].isspace():
        return ["best"]
    return [word.strip("[]") for word in subcommand.usage.split() if word.strip("[]").startswith("-")]


def _parsed(name: str, words: Sequence[str]) -> MagicLine:
    parser = _Parser(prog=f"%sandbox {name}", add_help=False, allow_abbrev=False)
    match name:
        case "fork":
            parser.add_argument("n", nargs="?", type=_count, default=1)
            parser.add_argument("--name", dest="label")
            parser.add_argument("--same-random", action="store_true")
        case "branch":
            parser.add_argument("-n", type=_count, default=4)
            parser.add_argument("--keep", choices=["best"])
            parser.add_argument("--by")
            parser.add_argument("--timeout", dest="limit_s", type=_seconds)
            parser.add_argument("--same-random", action="store_true")
        case "snapshot" | "restore" | "kill" | "goto":
            parser.add_argument("argument", metavar={"kill": "ID", "goto": "TARGET"}.get(name, "NAME"))
        case "help":
            parser.add_argument("argument", nargs="?")
    # argparse takes "-loss" for an option, unless it is in one word with its own.
    words = list(words)
    if "--by" in words[:-1]:
        at = words.index("--by")
        words[at : at + 2] = [f"--by={words[at + 1]}"]
    found = vars(parser.parse_args(words))
    if (found.get("keep") is None) != (found.get("by") is None):
        raise UsageProblem("--keep best and --by EXPR go together: EXPR says how good a branch is")
    return MagicLine(name=name, **found)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"the number of children is 1 or more, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"a time in seconds is a number above 0, not {text!r}")
    return seconds
