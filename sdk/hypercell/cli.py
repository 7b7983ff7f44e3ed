"""The command `hypercell`: JupyterLab on the gateway's kernels, and kernelspecs for other Jupyter applications.

Only parses arguments and prints; heavy imports wait until a subcommand needs them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hypercell import __version__
from hypercell.errors import HypercellError, MissingPackageError, UnsupportedError
from hypercell.locate import locate

EXIT_OK = 0
EXIT_FAILED = 1

DEFAULT_KERNELSPEC = "hypercell"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status. Errors are one sentence on stderr."""
    options, rest = _parser().parse_known_args(arguments)
    if rest and options.command != "lab":
        _parser().error(f"unknown arguments: {' '.join(rest)}")
    try:
        return _run(options, rest)
    except HypercellError as error:
        print(f"hypercell: {error}", file=sys.stderr)
        return EXIT_FAILED


def _run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if options.command == "lab":
        from hypercell.jupyter.lab import run_lab

        run_lab(locate(url=options.url, token=options.token), rest)
    if options.command == "kernel":
        raise UnsupportedError(
            "This application starts kernels without jupyter_client's provisioners, so it cannot use this kernelspec. "
            "Give it the gateway's URL as an existing Jupyter server instead."
        )
    try:
        from hypercell.jupyter import kernelspec
    except ImportError as error:
        raise MissingPackageError(
            f"{error.name} is missing. Install it with: {sys.executable} -m pip install 'hypercell-sdk[jupyter]'"
        ) from error
    if options.action == "install":
        directory = kernelspec.install(
            name=options.name,
            display_name=options.display_name,
            template=options.template,
            user=options.user,
            prefix=sys.prefix if options.sys_prefix else options.prefix,
        )
        print(f"Installed the kernelspec {options.name} in {directory}")
    elif options.action == "remove":
        print(f"Removed the kernelspec {options.name} from {kernelspec.remove(name=options.name)}")
    else:
        for found in kernelspec.installed():
            print(f"{found.name}\t{found.template or '(the default template)'}\t{found.directory}")
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hypercell", description="Notebook kernels in microVMs: the client's side.")
    parser.add_argument("--version", action="version", version=f"hypercell {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    lab = commands.add_parser(
        "lab",
        help="start JupyterLab with kernels from the gateway",
        description="Starts JupyterLab with kernels from the gateway. All other arguments are passed to `jupyter lab`.",
        # `--no-browser` and the like are JupyterLab's; an abbreviation must not be taken for one of ours.
        allow_abbrev=False,
    )
    lab.add_argument("--url", help="the gateway (default: HYPERCELL_URL, or the one running here)")
    lab.add_argument("--token", help="its token (default: HYPERCELL_TOKEN, which keeps it out of the process list)")

    kernelspec = commands.add_parser("kernelspec", help="kernelspecs for jupyter console, nbclient, papermill, ...")
    actions = kernelspec.add_subparsers(dest="action", required=True)
    install = actions.add_parser("install", help="install a kernelspec")
    where = install.add_mutually_exclusive_group()
    where.add_argument("--user", action="store_true", help="for this user only")
    where.add_argument("--prefix", help="below this directory (PREFIX/share/jupyter/kernels)")
    where.add_argument("--sys-prefix", action="store_true", help="in this Python environment")
    install.add_argument("--name", default=DEFAULT_KERNELSPEC, help="the kernelspec's name (default: %(default)s)")
    install.add_argument("--display-name", default="Python 3 (Hypercell)", help="its name for people")
    install.add_argument("--template", default="", help="the gateway's kernelspec to start (default: the gateway's)")
    remove = actions.add_parser("remove", help="remove a kernelspec")
    remove.add_argument("--name", default=DEFAULT_KERNELSPEC, help="the kernelspec's name (default: %(default)s)")
    actions.add_parser("list", help="list Hypercell's kernelspecs: name, template, directory")

    # Not for people: what the kernelspec's argv runs where no provisioner is known.
    kernel = commands.add_parser("kernel")
    kernel.add_argument("-f", dest="connection_file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
