"""The command `hypercelld`. Each subcommand is a module that registers itself here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from gateway import doctor
from gateway.cli import image, serve, snapshot
from gateway.version import VERSION


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="hypercelld", description="A Jupyter kernel gateway with a microVM for every kernel."
    )
    parser.add_argument("--version", action="version", version=f"hypercelld {VERSION}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (serve, doctor, image, snapshot):
        command.register(subparsers)
    parsed = parser.parse_args(arguments)
    status: int = parsed.func(parsed)
    return status
