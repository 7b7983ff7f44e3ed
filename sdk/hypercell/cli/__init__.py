"""The command `hypercell`: its arguments and how it ends. What the subcommands do is in this package's other modules.

Heavy imports wait until a subcommand needs them. Exit statuses: 0 done; 1 it could not be done, and stderr says why in
one sentence; 2 wrong arguments; 3 the code that was run raised an exception; 124 its time was up; 128 + n if signal n
ended it (130 Ctrl-C, 129 SIGHUP, 143 SIGTERM), after it has cleaned up. `run` ends with the status that its script gave
to `sys.exit`. `exec` ends with the status of its command, and 128 + n if signal n ended that.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Coroutine, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from hypercell import __version__
from hypercell.errors import HypercellError, MissingPackageError, UnsupportedError
from hypercell.locate import locate

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXIT_OK = 0
EXIT_FAILED = 1
# As shells say it: the status of a command that a signal ended.
EXIT_OF_SIGNAL = 128
EXIT_INTERRUPTED = EXIT_OF_SIGNAL + signal.SIGINT

# They end the command as Ctrl-C does, which asyncio.run has: what is held is given back.
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

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
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read this (`head`) has seen enough; Python must not complain when it flushes at exit.
        sys.stderr.close()
        return EXIT_FAILED
    except OSError as error:
        what = error.strerror or str(error) or type(error).__name__
        print(f"hypercell: {what if error.filename is None else f'{error.filename}: {what}'}", file=sys.stderr)
        return EXIT_FAILED
    except UnicodeError as error:
        # A name or text that is not UTF-8, or that this terminal's encoding lacks.
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
    if options.command == "kernelspec":
        return _kernelspec(options)
    if options.command == "completion":
        from hypercell.cli.completion import script

        print(script(options.shell, _parser()), end="")
        return EXIT_OK
    module, function = options.run
    return asyncio.run(_cancelled_by_signals(getattr(import_module(f"hypercell.cli.{module}"), function)(options)))


async def _cancelled_by_signals(work: Coroutine[None, None, int]) -> int:
    """What `work` returns; if one of ENDING_SIGNALS comes, it is cancelled, and the status says which one it was."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    came: list[signal.Signals] = []

    def end(number: signal.Signals) -> None:
        # Whoever closes a terminal or stops a service sends several; another must not cancel the cleaning up.
        if not came:
            came.append(number)
            task.cancel()

    # `nohup` has SIGHUP ignored, and means it.
    handled = [number for number in ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in handled:
        loop.add_signal_handler(number, end, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not came:
            raise
        return EXIT_OF_SIGNAL + came[0]
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


def _kernelspec(options: argparse.Namespace) -> int:
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


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hypercell", description="Notebook kernels in microVMs: the client's side.")
    parser.add_argument("--version", action="version", version=f"hypercell {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_sandbox_commands(commands)
    _add_work_commands(commands)
    _add_jupyter_commands(commands)
    completion = commands.add_parser("completion", help="a completion script, for your shell's start-up file")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    _add_gateway(common)
    common.add_argument("--json", action="store_true", help="print JSON")
    return common


def _add_gateway(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="the gateway (default: HYPERCELL_URL, or the one running here)")
    parser.add_argument("--token", help="its token (default: HYPERCELL_TOKEN, which keeps it out of the process list)")


def _creation() -> argparse.ArgumentParser:
    creation = argparse.ArgumentParser(add_help=False)
    creation.add_argument("--template", help="the kernelspec to make it from (default: the gateway's)")
    creation.add_argument("--snapshot", help="start from this snapshot (id or name)")
    creation.add_argument("--name", help="its name, for people")
    creation.add_argument("--tag", type=_variable, action="append", default=[], metavar="NAME=VALUE", dest="tags")
    creation.add_argument("-e", "--env", type=_variable, action="append", default=[], metavar="NAME=VALUE")
    creation.add_argument("--memory-mib", type=int, metavar="MIB", help="memory (default: the template's)")
    creation.add_argument("--vcpus", type=int, metavar="N", help="processors (default: the template's)")
    creation.add_argument("--disk-mib", type=int, metavar="MIB", help="disk (default: the template's)")
    return creation


def _add_sandbox_commands(commands: Commands) -> None:
    common, creation = _common(), _creation()

    def add(
        name: str, about: str, *more: argparse.ArgumentParser, module: str = "sandboxes"
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about.capitalize() + ".", parents=[common, *more])
        sub.set_defaults(run=(module, name))
        return sub

    sandbox = "id, beginning of an id, or name"
    new = add("new", "make a sandbox and print its id", creation)
    new.add_argument(
        "--lifetime", type=float, default=0.0, metavar="S", help="delete it after so long (default: never)"
    )
    new.add_argument("--on-timeout", choices=("delete", "sleep"), default="delete", help="what to do then")
    ls = add("ls", "list sandboxes, or files in one")
    ls.add_argument("place", nargs="?", metavar="SANDBOX:PATH", help="a directory in a sandbox")
    ls.add_argument("--ids", action="store_true", help="print nothing but ids")
    ls.add_argument(
        "--tag", action="append", default=[], metavar="NAME[=VALUE]", dest="tags", help="only those with it"
    )
    ls.add_argument("--state", action="append", dest="states", help="only those in this state (running, asleep, ...)")
    for name, about in (
        ("info", "show all about a sandbox"),
        ("tree", "show a sandbox's family of forks"),
        ("checkpoints", "list the points of its past to which it can return"),
    ):
        add(name, about).add_argument("sandbox", help=sandbox)
    fork = add("fork", "make children that go on from this instant, and print their ids")
    fork.add_argument("sandbox", help=sandbox)
    fork.add_argument("-n", "--count", type=int, default=1, help="how many (default: 1)")
    fork.add_argument("--name", help="their name, for people")
    fork.add_argument("--same-random", action="store_true", help="they draw the same random numbers")
    snapshot = add("snapshot", "save its state under a name")
    snapshot.add_argument("sandbox", help=sandbox)
    snapshot.add_argument("name", nargs="?", help="for `new --snapshot` and `goto`")
    goto = add("goto", "put a sandbox back to a checkpoint")
    goto.add_argument("sandbox", help=sandbox)
    goto.add_argument("target", nargs="?", help="id, name or cell number (default: before the last cell)")
    add("snapshots", "list the snapshots from which sandboxes can be made")
    for name, about in (
        ("sleep", "save sandboxes and free their memory"),
        ("wake", "let sleeping sandboxes go on"),
        ("pause", "stop the processors of sandboxes; their memory stays"),
        ("resume", "let paused sandboxes go on"),
        ("interrupt", "raise KeyboardInterrupt in the code that runs in sandboxes"),
        ("restart", "give sandboxes new kernels: files stay, variables go"),
        ("rm", "end sandboxes for good"),
    ):
        sub = add(name, about)
        sub.add_argument("sandboxes", nargs="*", metavar="SANDBOX", help=sandbox)
        if name == "rm":
            sub.add_argument("--all", action="store_true", help="all of the gateway's sandboxes")
    logs = add("logs", "show the output of a background command")
    logs.add_argument("sandbox", help=sandbox)
    logs.add_argument("command_id", nargs="?", help="the command (default: the newest)")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the command ends")
    logs.add_argument("--events", action="store_true", help="instead: what happens to the sandbox from now on")


def _add_work_commands(commands: Commands) -> None:
    common, creation = _common(), _creation()
    run = commands.add_parser(
        "run",
        help="run a script or a notebook in a sandbox",
        description="Runs a script or a notebook in a sandbox of its own, which is removed afterwards (an hour later "
        "if this command was killed outright). A notebook's outputs are written back into it.",
        parents=[common, creation],
    )
    run.set_defaults(run=("running", "run"))
    run.add_argument("file", metavar="FILE.py|FILE.ipynb|-", help="`-` is a script on standard input")
    run.add_argument("arguments", nargs="*", help="the script's arguments (after `--` if they begin with a dash)")
    run.add_argument("--sandbox", help="run it in this one, which stays")
    run.add_argument("--keep", action="store_true", help="leave the sandbox running")
    run.add_argument("--timeout", type=float, metavar="S", help="interrupt a script or cell after so long")
    run.add_argument("--allow-errors", action="store_true", help="go on after a cell that failed")
    run.add_argument("-o", "--output", metavar="FILE.ipynb", help="write the notebook there instead")

    execute = commands.add_parser(
        "exec",
        help="run a command in a sandbox",
        description="Runs a command in a sandbox and ends with its status. One argument is a line for the shell, "
        "several are a program and its arguments.",
        parents=[common],
    )
    execute.set_defaults(run=("terminal", "run_command"))
    execute.add_argument("-i", "--interactive", action="store_true", help="pass standard input on")
    execute.add_argument("-t", "--tty", action="store_true", help="with a terminal; -it for a shell")
    execute.add_argument("-d", "--detach", action="store_true", help="in the background; `hypercell logs` shows it")
    execute.add_argument("-w", "--cwd", help="the directory to run it in")
    execute.add_argument("-u", "--user", choices=("user", "root"), default="user", help="whom it runs as")
    execute.add_argument("-e", "--env", type=_variable, action="append", default=[], metavar="NAME=VALUE")
    execute.add_argument("--timeout", type=float, metavar="S", help="end it after so long")
    execute.add_argument("sandbox", help="id, beginning of an id, or name")
    execute.add_argument("arguments", nargs=argparse.REMAINDER, metavar="COMMAND")

    cp = commands.add_parser(
        "cp",
        help="copy files between here and a sandbox",
        description="Copies a file, or with -r a directory, in which links stay links. One side is SANDBOX:PATH; `-` "
        "is standard input or output.",
        parents=[common],
    )
    cp.set_defaults(run=("copying", "cp"))
    cp.add_argument("-r", "--recursive", action="store_true", help="a directory and all in it")
    cp.add_argument("source")
    cp.add_argument("target")


def _add_jupyter_commands(commands: Commands) -> None:
    lab = commands.add_parser(
        "lab",
        help="start JupyterLab with kernels from the gateway",
        description="Starts JupyterLab with kernels from the gateway. All other arguments are passed to `jupyter lab`.",
        # `--no-browser` and the like are JupyterLab's; an abbreviation must not be taken for one of ours.
        allow_abbrev=False,
    )
    _add_gateway(lab)

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
