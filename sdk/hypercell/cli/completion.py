"""`hypercell completion`: a completion script for a shell, made from the parser itself. Pure."""

from __future__ import annotations

import argparse

SHELLS = ("bash", "zsh", "fish")
# Subcommands whose first arguments are sandboxes, completed with what the gateway lists.
_OF_SANDBOXES = frozenset(
    {"checkpoints", "cp", "exec", "fork", "goto", "info", "logs", "ls", "rm", "sleep", "snapshot", "tree", "wake"}
)


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script that `shell` is to evaluate."""
    commands = _subcommands(parser)
    if shell == "fish":
        return _fish(commands)
    bash = _bash(commands)
    return f"autoload -U +X bashcompinit && bashcompinit\n{bash}" if shell == "zsh" else bash


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, tuple[str, list[str]]]:
    """Name to help and options."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            return {
                name: (helps[name], [option for one in sub._actions for option in one.option_strings])
                for name, sub in action.choices.items()
                if name in helps
            }
    return {}


def _bash(commands: dict[str, tuple[str, list[str]]]) -> str:
    cases = "\n".join(
        f'        {name}) options="{" ".join(options)}"{"; sandboxes=1" if name in _OF_SANDBOXES else ""} ;;'
        for name, (_, options) in commands.items()
    )
    return f"""\
_hypercell() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" options="" sandboxes=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{" ".join(commands)}" -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    if [[ "$word" == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$word"))
    elif [ -n "$sandboxes" ]; then
        COMPREPLY=($(compgen -W "$(hypercell ls --ids 2>/dev/null)" -- "$word") $(compgen -f -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}}
complete -F _hypercell hypercell
"""


def _fish(commands: dict[str, tuple[str, list[str]]]) -> str:
    lines = []
    for name, (about, options) in commands.items():
        quoted = about.replace("'", "\\'")
        lines.append(f"complete -c hypercell -n __fish_use_subcommand -a {name} -d '{quoted}'")
        seen = f"__fish_seen_subcommand_from {name}"
        lines.extend(
            f"complete -c hypercell -n '{seen}' -l {option.removeprefix('--')}"
            for option in options
            if option.startswith("--")
        )
        if name in _OF_SANDBOXES:
            lines.append(f"complete -c hypercell -n '{seen}' -a '(hypercell ls --ids 2>/dev/null)'")
    return "\n".join(lines) + "\n"
