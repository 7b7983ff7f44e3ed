"""Memory, CPU and process limits around one VMM by cgroups, version 2 or 1, as far as this host lets us write them.

Makes and removes the groups and reads why a VMM was killed; the spawner moves the process into them. Knows no VMM.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vm_runtime.confinement.report import ConfinementStep
from vm_runtime.files import opened

CONTROLLERS = ("memory", "cpu", "pids")
_PERIOD_US = 100_000
# By version: the file, and the weight of a group beside those of other machines. In the background it is a tenth: it
# is felt little, and gets on where the others never rest.
_WEIGHTS = {"cpu.weight": (100, 10), "cpu.shares": (1024, 102)}
# Measured: under 1 ms. A host that takes longer than this to end threads has other problems.
_BUSY_LIMIT_S = 2.0
_DELEGATE_HINT = "systemd-run --user --scope -p Delegate=yes hypercelld serve ..."


@dataclass(frozen=True, kw_only=True)
class Limits:
    """memory_bytes: of the VMM with its guest's RAM.
    cpus: how many it may use at once.
    processes: threads count.
    """

    memory_bytes: int
    cpus: float
    processes: int


@dataclass(frozen=True, kw_only=True)
class Cgroup:
    """The directories made for one machine: one in version 2, one per controller in version 1."""

    directories: tuple[Path, ...]

    @property
    def process_files(self) -> tuple[str, ...]:
        """Writing a pid into each of these moves the process."""
        return tuple(str(directory / "cgroup.procs") for directory in self.directories)

    def oom_kills(self) -> int:
        """How often the kernel killed a process of this group because of the memory limit."""
        for directory in self.directories:
            for name in ("memory.events", "memory.oom_control"):
                with contextlib.suppress(OSError):
                    for line in (directory / name).read_text().splitlines():
                        word, _, value = line.partition(" ")
                        if word == "oom_kill":
                            return int(value)
        return 0

    def set_background(self, background: bool) -> None:
        """Whether it yields the CPUs to the other groups. No effect where there is no group for CPU."""
        for directory in self.directories:
            for file, weights in _WEIGHTS.items():
                # Of a VMM that has just ended the group may go meanwhile, which open(2) and write(2) name variously.
                with contextlib.suppress(OSError), opened(directory / file, os.O_WRONLY) as fd:
                    os.write(fd, str(weights[background]).encode())

    def remove(self) -> None:
        """Remove the groups of a dead VMM; twice is harmless. Blocking.

        A process may leave its group a moment after it was seen dead (Linux unlinks a task when it has been switched
        out), and nothing reports when in version 1. A group that stays busy is left: it costs nothing but its name.
        """
        deadline = time.monotonic() + _BUSY_LIMIT_S
        for directory in self.directories:
            while True:
                try:
                    directory.rmdir()
                except FileNotFoundError:
                    pass
                except OSError as error:
                    if error.errno != errno.EBUSY:
                        raise
                    if time.monotonic() < deadline:
                        time.sleep(0.002)
                        continue
                break


@dataclass(frozen=True, kw_only=True)
class CgroupRoot:
    """Where groups can be made. parents: directory by controller; in version 2 all are the same."""

    version: int
    parents: Mapping[str, Path] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)

    def steps(self) -> tuple[ConfinementStep, ...]:
        return tuple(
            ConfinementStep(
                name=f"{controller} limit",
                problem=self.problems.get(controller),
                fix=_DELEGATE_HINT if controller in self.problems else None,
            )
            for controller in CONTROLLERS
        )

    def create(self, name: str, limits: Limits) -> Cgroup:
        """Groups for one machine with its limits set. Raises OSError; nothing is left of them then."""
        directories = tuple(dict.fromkeys(parent / name for parent in self.parents.values()))
        group = Cgroup(directories=directories)
        try:
            for directory in directories:
                directory.mkdir(exist_ok=True)
            for controller, parent in self.parents.items():
                for file, value in self._values(controller, limits):
                    (parent / name / file).write_text(value)
        except OSError:
            group.remove()
            raise
        return group

    def _values(self, controller: str, limits: Limits) -> list[tuple[str, str]]:
        quota = str(int(limits.cpus * _PERIOD_US))
        if controller == "memory":
            return [("memory.max" if self.version == 2 else "memory.limit_in_bytes", str(limits.memory_bytes))]
        if controller == "pids":
            return [("pids.max", str(limits.processes))]
        if self.version == 2:
            return [("cpu.max", f"{quota} {_PERIOD_US}")]
        return [("cpu.cfs_period_us", str(_PERIOD_US)), ("cpu.cfs_quota_us", quota)]


def find_root(*, mount: Path = Path("/sys/fs/cgroup"), group: str = "hypercell") -> CgroupRoot:
    """Make the parent groups and find out which controllers can be used below them. Never raises for what is not
    allowed."""
    if (mount / "cgroup.controllers").exists():
        return _find_version_2(mount, group)
    parents: dict[str, Path] = {}
    problems: dict[str, str] = {}
    for controller in CONTROLLERS:
        directory = mount / controller / group
        try:
            directory.mkdir(exist_ok=True)
            if not os.access(directory, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            parents[controller] = directory
        except OSError as error:
            problems[controller] = f"The cgroup {directory} cannot be made: {error.strerror}."
    return CgroupRoot(version=1, parents=parents, problems=problems)


def _find_version_2(mount: Path, group: str) -> CgroupRoot:
    above = mount if os.geteuid() == 0 else _own_group(mount)
    parent = above / group
    try:
        if above != mount:
            # Controllers can only be handed down by a group without processes of its own (cgroups(7)).
            (above / "gateway").mkdir(exist_ok=True)
            for pid in (above / "cgroup.procs").read_text().split():
                (above / "gateway" / "cgroup.procs").write_text(pid)
        parent.mkdir(exist_ok=True)
    except OSError as error:
        problem = f"The cgroup {parent} cannot be made: {error.strerror}."
        return CgroupRoot(version=2, problems=dict.fromkeys(CONTROLLERS, problem))
    parents: dict[str, Path] = {}
    problems: dict[str, str] = {}
    for controller in CONTROLLERS:
        try:
            for directory in (above, parent):
                (directory / "cgroup.subtree_control").write_text(f"+{controller}")
            parents[controller] = parent
        except OSError as error:
            problems[controller] = f"The controller {controller} is not available in {parent}: {error.strerror}."
    return CgroupRoot(version=2, parents=parents, problems=problems)


def _own_group(mount: Path) -> Path:
    line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    own = mount / line[3:].lstrip("/")
    return own.parent if own.name == "gateway" else own  # an earlier gateway in this scope has made it
