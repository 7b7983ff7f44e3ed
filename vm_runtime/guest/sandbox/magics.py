"""`%sandbox` and `%%sandbox` in IPython: what the module does, shown as HTML with a text for terminals."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from vm_runtime.guest.sandbox import identity, timeline
from vm_runtime.guest.sandbox.branches import BranchOptions, branch, try_cell
from vm_runtime.guest.sandbox.children import link
from vm_runtime.guest.sandbox.errors import SandboxError
from vm_runtime.guest.sandbox.forking import split
from vm_runtime.guest.sandbox.grammar import MagicLine, UsageProblem, completions, help_text, parse
from vm_runtime.guest.sandbox.host import ask

# A completion that asks the host must come while the user still looks for it.
COMPLETION_LIMIT_S = 1.0

# What of a sandbox `%sandbox info` shows, in this order; the rest is in `sandbox.info()`.
_INFO = (
    "name",
    "id",
    "state",
    "template",
    "parent_id",
    "driver",
    "memory_mib",
    "vcpus",
    "created_at",
    "url",
    "checkpoint_problem",
)


class MagicError(SandboxError):
    """Shown as one line: where in our code it was raised would help nobody."""

    def _render_traceback_(self) -> list[str]:
        return [f"sandbox: {self}"]


class Shown:
    """Something with a text and an HTML form."""

    def __init__(self, text: str, html_text: str) -> None:
        self._text = text
        self._html = html_text

    def __repr__(self) -> str:
        return self._text

    def _repr_html_(self) -> str:
        return self._html


def register(ip: Any) -> None:
    """Define the magics and their completions in an IPython shell."""

    def sandbox(line: str, cell: str | None = None) -> Any:
        return _run(ip, line, cell)

    sandbox.__doc__ = f"Fork this machine, look at its family, go back in its time.\n\n{help_text()}\n"
    ip.register_magic_function(sandbox, magic_kind="line_cell", magic_name="sandbox")
    for mark in ("%", "%%"):
        ip.set_hook("complete_command", _complete, str_key=f"{mark}sandbox")


def _run(ip: Any, line: str, cell: str | None) -> Any:
    try:
        command = parse(line, cell=cell is not None)
        return _line(command) if cell is None else _cell(ip, command, cell)
    except (SandboxError, UsageProblem) as error:
        raise MagicError(str(error)) from None


def _line(command: MagicLine) -> Any:
    argument = command.argument or ""
    match command.name:
        case "fork":
            return split(command.n, name=command.label, same_random=command.same_random, ends_with_cell_failure=False)
        case "tree":
            return tree_shown(timeline.tree(), identity.read().id)
        case "info":
            return info_shown(timeline.info())
        case "snapshot":
            result = timeline.snapshot(argument)
            if not result.get("restored"):
                print(f"Kept the state of now as {argument!r}; `%sandbox restore {argument}` goes back to it.")
        case "restore":
            timeline.restore(argument)
        case "kill":
            timeline.kill(argument)
            print(f"Ended {argument}.")
        case "sleep":
            timeline.sleep()
        case "checkpoints":
            return checkpoints_shown(timeline.checkpoints(), timeline.info().get("checkpoint_problem"))
        case "goto":
            timeline.goto(argument)
        case "undo":
            timeline.undo()
        case _:
            return Shown(help_text(command.argument), f"<pre>{html.escape(help_text(command.argument))}</pre>")
    return None


def _cell(ip: Any, command: MagicLine, cell: str) -> None:
    if command.name == "try":
        try_cell(ip, cell)
        return
    options = BranchOptions(
        n=command.n,
        same_random=command.same_random,
        by=command.by,
        keep_best=command.keep == "best",
        limit_s=command.limit_s,
    )
    branch(ip, cell, options)


def tree_shown(tree: Mapping[str, Any], own_id: str | None) -> Shown:
    """The family as an indented list; {"root": id, "nodes": [sandbox, ...]}."""
    by_parent: dict[str | None, list[Mapping[str, Any]]] = {}
    ids = {node["id"] for node in tree["nodes"]}
    for node in tree["nodes"]:
        parent = node.get("parent_id")
        by_parent.setdefault(parent if parent in ids else None, []).append(node)
    lines: list[str] = []
    rows: list[str] = []
    waiting = [(node, 0) for node in reversed(by_parent.get(None, []))]
    while waiting:  # no recursion: generations may be many
        node, depth = waiting.pop()
        sandbox_id, state, name = str(node["id"]), str(node.get("state", "")), str(node.get("name") or "")
        here = " ← here" if sandbox_id == own_id else ""
        lines.append(f"{'  ' * depth}{sandbox_id[:12]}  {state}{f'  {name}' if name else ''}{here}")
        text = f"{link(sandbox_id, node.get('url'))} {html.escape(state)} {html.escape(name)}{here}"
        rows.append(f'<div style="padding-left:{2 * depth}em">{f"<b>{text}</b>" if here else text}</div>')
        waiting += [(child, depth + 1) for child in reversed(by_parent.get(sandbox_id, []))]
    return Shown("\n".join(lines), "".join(rows))


def info_shown(info: Mapping[str, Any]) -> Shown:
    """One sandbox as a table of two columns."""
    fields = [(key, info[key]) for key in _INFO if info.get(key) is not None]
    width = max((len(key) for key, _ in fields), default=0)
    text = "\n".join(f"{key:<{width}}  {value}" for key, value in fields)
    return Shown(text, _table(("", ""), [(html.escape(key), html.escape(str(value))) for key, value in fields]))


def checkpoints_shown(checkpoints: Sequence[Mapping[str, Any]], problem: str | None = None) -> Shown:
    """Checkpoints as a table: id, the cell after which it was taken, name, time. problem: why there are not more."""
    if problem is not None:
        shown, text = checkpoints_shown(checkpoints), f"Checkpoints are missing: {problem}"
        return Shown(f"{shown!r}\n{text}", f"{shown._repr_html_()}<p>{html.escape(text)}</p>")
    if not checkpoints:
        none = "There are no checkpoints yet."
        return Shown(none, none)
    keys = ("id", "cell", "name", "created_at")
    cells = [["" if entry.get(key) is None else str(entry[key]) for key in keys] for entry in checkpoints]
    text = "\n".join("  ".join(row).rstrip() for row in [list(keys), *cells])
    return Shown(text, _table(keys, [[html.escape(value) for value in row] for row in cells]))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heading = f"<thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead>" if any(head) else ""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{heading}<tbody>{body}</tbody></table>"


def _complete(_shell: Any, event: Any) -> list[str]:
    words = event.text_until_cursor.split()
    if len(words) >= 2 and words[1] in ("restore", "goto", "kill"):
        return _known(words[1])
    return completions(event.text_until_cursor)


def _known(subcommand: str) -> list[str]:
    """Names and ids that the host knows; none if it does not answer at once."""
    try:
        if subcommand == "kill":
            nodes = ask("tree", limit_s=COMPLETION_LIMIT_S).result["nodes"]
            return [str(node["id"]) for node in nodes if node.get("parent_id")]
        entries = ask("checkpoints", limit_s=COMPLETION_LIMIT_S).result["checkpoints"]
    except (SandboxError, TimeoutError, KeyError):
        return []
    key = "name" if subcommand == "restore" else "id"
    return [str(entry[key]) for entry in entries if entry.get(key)]
