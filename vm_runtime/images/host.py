"""What a build needs of this host, checked before it begins: programs, space, rights. And how it runs them."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from vm_runtime.images.errors import BuildHostError

# The default image: its root takes 0.7 GB, its Python packages 0.3 GB and their archive as much, its files 0.3 GB;
# the rest is for larger recipes.
NEEDED_SPACE_BYTES = 3 << 30
# Output kept for an error's message: apt's and pip's reasons stand in the last few lines, after some noise.
KEPT_LINES = 400
# A line of a tool's output that is longer than this ends the build.
MAX_LINE_BYTES = 4 << 20
# mmdebstrap's own cleaning (removing its root) takes a few seconds after a signal.
TERMINATE_GRACE_S = 20.0

_TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "mkfs.erofs": "erofs-utils",
    "tar": "tar",
    "unshare": "util-linux",
    "setpriv": "util-linux",
}
# Non-root users often lack these.
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def tool_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of the tools: ours (it may name proxies), with messages in English, which errors are found by."""
    path = f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}".lstrip(":")
    return {**os.environ, "PATH": path, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", **extra}


def check_host(store_directory: Path) -> None:
    """Errors: BuildHostError with a sentence that names what to install or change."""
    path = tool_environment({})["PATH"]
    tools = _TOOLS if os.geteuid() == 0 else {**_TOOLS, "newuidmap": "uidmap"}
    missing = {package for tool, package in tools.items() if shutil.which(tool, path=path) is None}
    if missing:
        raise BuildHostError(
            f"Building an image needs programs that are not installed; run: apt-get install {' '.join(sorted(missing))}"
        )
    if os.geteuid() != 0:
        _check_user_namespaces()
    # In a user namespace mmdebstrap unpacks in the temporary directory, as root beside the image.
    places = {store_directory} if os.geteuid() == 0 else {store_directory, Path(tempfile.gettempdir())}
    for place in places:
        free = shutil.disk_usage(place).free
        if free < NEEDED_SPACE_BYTES:
            raise BuildHostError(
                f"Building an image needs {NEEDED_SPACE_BYTES >> 30} GiB of free space in {place}, "
                f"which has {free / (1 << 30):.1f} GiB; free some or choose another place."
            )


def _check_user_namespaces() -> None:
    user = pwd.getpwuid(os.geteuid()).pw_name
    for path, option in ((Path("/etc/subuid"), "--add-subuids"), (Path("/etc/subgid"), "--add-subgids")):
        owners = [line.split(":")[0] for line in path.read_text().splitlines()] if path.is_file() else []
        if user not in owners and str(os.geteuid()) not in owners:
            raise BuildHostError(
                f"Building an image without root needs subordinate ids, and {path} gives {user} none; "
                f"run as root: usermod {option} 100000-165535 {user}"
            )


async def run_tool(
    arguments: Sequence[str | Path],
    *,
    environment: Mapping[str, str],
    on_line: Callable[[str], None] | None = None,
    death_signal: str = "KILL",
) -> tuple[int, str]:
    """Runs a tool to its end; returns its exit status and the last lines of its output (both streams).

    A cancelled call ends the tool and all that it started before it returns. death_signal: what the tool gets when this
    process is killed.
    """
    process = await asyncio.create_subprocess_exec(
        "setpriv", "--pdeathsig", death_signal, "--", *arguments,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env=environment, start_new_session=True, limit=MAX_LINE_BYTES,
    )  # fmt: skip
    kept: deque[str] = deque(maxlen=KEPT_LINES)
    assert process.stdout is not None
    try:
        async for raw in process.stdout:
            line = raw.decode(errors="replace").rstrip()
            kept.append(line)
            if on_line is not None:
                on_line(line)
        status = await process.wait()
    finally:
        if process.returncode is None:
            await _end_group(process)
    return status, "\n".join(kept)


async def _end_group(process: asyncio.subprocess.Process) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        with suppress(TimeoutError):
            # Its pipe is drained, since a tool that waits for us to read would never end.
            async with asyncio.timeout(TERMINATE_GRACE_S):
                await process.communicate()
    finally:
        if process.returncode is None:  # late, or nobody waits any more
            os.killpg(process.pid, signal.SIGKILL)
            await process.communicate()


async def find_pip() -> list[str]:
    """The command that runs pip, of any Python. Errors: BuildHostError."""
    system_python = shutil.which("python3", path=_SYSTEM_PATH)
    for python in (sys.executable, system_python):
        if python:
            status, _ = await run_tool([python, "-m", "pip", "--version"], environment=tool_environment({}))
            if status == 0:
                return [python, "-m", "pip"]
    raise BuildHostError("Building an image needs pip, which is not installed; run: apt-get install python3-pip")
