"""Makes the root file system: Python packages with pip from outside, Debian packages with mmdebstrap, then finish.sh.

As root mmdebstrap runs in mount and process namespaces of its own, so that nothing of it survives its end, whatever
ended it. As another user it makes a user namespace itself.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from vm_runtime.images.errors import (
    BuildFailedError,
    BuildHostError,
    ImageError,
    NetworkError,
    RecipeError,
    UnknownPackageError,
)
from vm_runtime.images.host import find_pip, run_tool, tool_environment
from vm_runtime.images.recipe import LoadedRecipe

FINISH = Path(__file__).parent / "finish.sh"
# python3: the guest code needs it. linux-image and busybox: vmlinux and the initramfs are made of them.
# usr-is-merged: stands in for usrmerge, which needs all of Perl (finish.sh removes it).
BASE_PACKAGES = ("python3", "linux-image-cloud-amd64", "busybox-static", "usr-is-merged")
PYTHON_VERSION = "3.11"  # bookworm's
# Wheels for bookworm's glibc (2.36) and everything older that PyPI still has.
_PLATFORMS = ("manylinux_2_34_x86_64", "manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64",
              "manylinux2014_x86_64")  # fmt: skip
_DIST_PACKAGES = f"usr/local/lib/python{PYTHON_VERSION}/dist-packages"
_MERGED = ("bin", "sbin", "lib", "lib64")  # symbolic links into /usr in Debian 12
_STEP_MARK = "hypercell-step: "
_NOT_NEEDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*")
# Fixed, so that the same packages give the same bytes.
_EPOCH = "1700000000"
_ERROR_LINES = 25

_NO_NETWORK = re.compile(
    r"Temporary failure (?:in name resolution|resolving)|Could not resolve|Failed to establish a new connection"
    r"|Could not connect|Network is unreachable|NameResolutionError|Connection timed out|ConnectTimeoutError"
    r"|Unable to connect to|Connection refused"
)
_UNKNOWN_DEBIAN = re.compile(
    r"Unable to locate package (\S+)|Version '[^']*' for '(\S+)' was not found"
    r"|Package '?(\S+?)'? has no installation candidate"
)
_UNKNOWN_PYTHON = re.compile(r"No matching distribution found for (\S+)")
_CONFLICT = re.compile(r"Cannot install (.+?) because these package versions have conflicting dependencies")


async def install_python_packages(loaded: LoadedRecipe, overlay: Path) -> tuple[str, ...]:
    """Puts the recipe's Python packages where they belong under `overlay`; returns `name version` of each.

    Errors: UnknownPackageError, RecipeError, NetworkError, BuildHostError, BuildFailedError.
    """
    target = overlay / _DIST_PACKAGES
    target.mkdir(parents=True)
    packages = loaded.recipe.python_packages
    if not packages:
        return ()
    arguments = [
        *await find_pip(), "install", "--no-input", "--no-compile", "--no-warn-conflicts", "--root-user-action=ignore",
        "--target", str(target), "--python-version", PYTHON_VERSION, "--implementation", "cp", "--only-binary=:all:",
        *(f"--platform={platform}" for platform in _PLATFORMS), *packages,
    ]  # fmt: skip
    status, output = await run_tool(arguments, environment=tool_environment({"PIP_PROGRESS_BAR": "off"}))
    if status != 0:
        raise pip_failure(loaded.origin, output)
    _move_scripts(target, overlay)
    found = importlib.metadata.distributions(path=[str(target)])
    return tuple(sorted(f"{distribution.name} {distribution.version}" for distribution in found))


async def install_debian_packages(
    loaded: LoadedRecipe, *, work: Path, overlay: Path, on_step: Callable[[str], None]
) -> Path:
    """Installs Debian with the overlay on top; returns a directory with rootfs.erofs, vmlinuz, modules/, busybox and
    the lists of packages. `on_step` receives the steps after the installation.

    Errors: UnknownPackageError, RecipeError (its warm-up fails), NetworkError, BuildHostError, BuildFailedError.
    """
    _write_build_files(loaded, overlay)
    archive = work / "overlay.tar"
    status, output = await run_tool(
        ["tar", "--create", "--file", archive, "--directory", overlay, "--sort=name", "--owner=0", "--group=0",
         "--numeric-owner", f"--mtime=@{_EPOCH}", "--mode=go-w", "."],
        environment=tool_environment({}),
    )  # fmt: skip
    if status != 0:
        raise failure("The archive of the recipe's files could not be written", output)
    result = work / "out"
    result.mkdir()

    def on_line(line: str) -> None:
        if line.startswith(_STEP_MARK):
            on_step(line.removeprefix(_STEP_MARK))

    packages = dict.fromkeys((*BASE_PACKAGES, *loaded.recipe.debian_packages))
    arguments = [
        "mmdebstrap", "--variant=apt", "--format=null", "--verbose", f"--include={','.join(packages)}",
        '--aptopt=Apt::Install-Recommends "false"', *(f"--dpkgopt=path-exclude={path}" for path in _NOT_NEEDED),
        f"--customize-hook=tar-in {_quoted(archive)} /", f"--customize-hook={FINISH.read_text()}",
        f"--customize-hook=sync-out /hypercell-build/out {_quoted(result)}", loaded.recipe.suite, "-",
    ]  # fmt: skip
    # initramfs-tools would pack an initramfs that nobody boots.
    environment = {"SOURCE_DATE_EPOCH": _EPOCH, "INITRD": "No"}
    if os.geteuid() == 0:
        arguments[1:1] = ["--mode=root"]
        arguments = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *arguments]
        environment["TMPDIR"] = str(work)
        # unshare ignores SIGTERM; killed, it takes its namespaces and all that runs and is mounted in them along.
        death_signal = "KILL"
    else:
        arguments[1:1] = ["--mode=unshare"]
        death_signal = "TERM"  # mmdebstrap removes its root then
    status, output = await run_tool(
        arguments, environment=tool_environment(environment), on_line=on_line, death_signal=death_signal
    )
    if status != 0:
        # mmdebstrap prints the hook that failed, which would push its reason out of the message.
        script = set(FINISH.read_text().splitlines())
        raise debian_failure(loaded.origin, "\n".join(line for line in output.splitlines() if line not in script))
    return result


def _write_build_files(loaded: LoadedRecipe, overlay: Path) -> None:
    """The recipe's files at their places, and what finish.sh needs in hypercell-build."""
    recipe = loaded.recipe
    for file, content in zip(recipe.files, loaded.contents, strict=True):
        parts = PurePosixPath(file.path).parts[1:]
        place = overlay.joinpath(*(("usr", *parts) if parts[0] in _MERGED else parts))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        place.chmod(int(file.mode, 8))
    build = overlay / "hypercell-build"
    build.mkdir()
    (build / "warmup.py").write_text(recipe.warmup)
    wanted = ("python3", *(package.partition("=")[0] for package in recipe.debian_packages))
    (build / "packages").write_text("".join(f"{package}\n" for package in wanted))
    (build / "remove").write_text("".join(f"{path}\n" for path in recipe.remove))
    (build / "uuid").write_text(f"{uuid.UUID(loaded.digest()[:32], version=4)}\n")
    exports = "".join(f"export {name}={_quoted(text)}\n" for name, text in sorted(recipe.environment.items()))
    script = build / "with-environment"
    script.write_text(f'#!/bin/sh\n{exports}exec "$@"\n')
    script.chmod(0o755)


def _move_scripts(target: Path, overlay: Path) -> None:
    """pip puts programs and data beside the modules, the former for the Python that ran pip."""
    for name in ("bin", "share", "etc"):
        if (target / name).is_dir():
            (target / name).rename(overlay / "usr/local" / name)
    programs = overlay / "usr/local/bin"
    for program in programs.iterdir() if programs.is_dir() else ():
        content = program.read_bytes()
        first, newline, rest = content.partition(b"\n")
        if first.startswith(b"#!") and b"python" in first:
            program.write_bytes(b"#!/usr/bin/python3" + newline + rest)


def pip_failure(origin: str, output: str) -> ImageError:
    """What pip's output means, as an error for people."""
    # Without a network pip also says that it found no such package, so that comes first.
    if _NO_NETWORK.search(output):
        return NetworkError(
            "The Python packages cannot be downloaded: there is no network; check the connection and try again."
        )
    if found := _UNKNOWN_PYTHON.search(output):
        return UnknownPackageError(
            f"The recipe {origin} is wrong: python_packages: there is no {found[1]} for Python {PYTHON_VERSION} "
            "on Linux as a wheel; correct its name or version."
        )
    if found := _CONFLICT.search(output):
        return RecipeError(
            f"The recipe {origin} is wrong: python_packages: {found[1]} do not go together; change one of the versions."
        )
    return failure("The Python packages could not be installed", output)


def debian_failure(origin: str, output: str) -> ImageError:
    """What mmdebstrap's output means, as an error for people."""
    # A whole line: the hook that says it may stand there too.
    if found := re.search(r"^hypercell-warmup-failed$", output, re.MULTILINE):
        before = output[: found.start()].rstrip().splitlines()
        return RecipeError(
            f"The recipe {origin} is wrong: warmup: it fails in the new image "
            f"({before[-1].strip() if before else 'no output'}); correct it or add the packages that it needs."
        )
    if found := _UNKNOWN_DEBIAN.search(output):
        name = next(group for group in found.groups() if group)
        return UnknownPackageError(
            f"The recipe {origin} is wrong: debian_packages: Debian bookworm has no {name}; "
            "correct its name or version."
        )
    if _NO_NETWORK.search(output):
        return NetworkError(
            "The Debian packages cannot be downloaded: there is no network; check the connection and try again."
        )
    return failure("The Debian packages could not be installed", output)


def failure(sentence: str, output: str) -> ImageError:
    """A failure that neither the recipe nor the network explains."""
    if "No space left on device" in output:
        return BuildHostError(f"{sentence}: the disk is full; free some space and try again.")
    return BuildFailedError(f"{sentence}.", log="\n".join(output.splitlines()[-_ERROR_LINES:]))


def _quoted(value: str | Path) -> str:
    """For the shell that mmdebstrap gives its hooks to."""
    return "'" + str(value).replace("'", "'\\''") + "'"
