"""`hypercelld doctor`: what this host has, what it lacks, and the command that mends it.

What concerns machines is asked of the driver. Changes nothing; that an accelerator was tried out is remembered.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from gateway.version import VERSION
from kernels.capacity import RESERVE_MIB, START_COST_MIB, available_mib
from kernels.directories import default_state_dir, run_dir_of
from kernels.templates import stored_templates
from vm_runtime.drivers.base import Check, DriverSettings
from vm_runtime.drivers.find import DEFAULT_DRIVER, driver_names, find_driver
from vm_runtime.images.store import ImageStore
from vm_runtime.paged.chains import MAX_CHAIN, SETTLED_PARTS
from vm_runtime.snapshots.errors import SnapshotError
from vm_runtime.snapshots.manifest import PartKind
from vm_runtime.snapshots.store import SnapshotStore

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

# Ten idle kernels and the template they share; below this the host is for trying it out only.
COMFORTABLE_MEMORY_MIB = 2048
# An image while it is built, and its template.
COMFORTABLE_DISK_MIB = 5 * 1024
# Program, Debian package, and what it is for.
TOOLS = (
    ("mmdebstrap", "mmdebstrap", "building images"),
    ("mkfs.erofs", "erofs-utils", "building images"),
)
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Problem(_Part):
    """blocking: nothing runs without it. fix: the command that mends it, or None where none does."""

    what: str
    fix: str | None = None
    blocking: bool = False


class DriverPart(_Part):
    """installed: the names of all drivers."""

    name: str
    installed: list[str]
    checks: Sequence[Check]


class MemoryPart(_Part):
    available_mib: int


class DiskPart(_Part):
    path: str
    free_mib: int


class ToolPart(_Part):
    name: str
    path: str | None


class ImagePart(_Part):
    name: str
    digest: str
    size_mib: int


class TemplatePart(_Part):
    digest: str
    image: str
    memory_mib: int
    vcpus: int


class ChainsPart(_Part):
    """The longest chains that a restore of the newest snapshot of any sandbox has to open."""

    layers: int
    disks: int


class Report(_Part):
    """The document of `hypercelld doctor --json`. ok: kernels can run here (problems that do not block may be left)."""

    version: str
    ok: bool
    driver: DriverPart
    memory: MemoryPart
    disk: DiskPart
    user_namespaces: bool
    tools: list[ToolPart]
    images: list[ImagePart]
    templates: list[TemplatePart]
    chains: ChainsPart
    state_dir: str
    run_dir: str
    problems: list[Problem]


def register(subparsers: Subparsers) -> None:
    """Adds `doctor`."""
    parser = subparsers.add_parser("doctor", help="say what this host has, lacks, and how to mend it")
    parser.add_argument("--state-dir", type=Path, default=default_state_dir(), help="default: %(default)s")
    parser.add_argument(
        "--driver",
        default=DEFAULT_DRIVER,
        choices=driver_names(),
        help="what is to run the machines, default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """The command. Ends with 0 when kernels can run here, else with 1."""
    report = asyncio.run(examine(arguments.state_dir, driver=arguments.driver))
    if arguments.json:
        print(report.model_dump_json(indent=2))
    else:
        _print(report)
    return 0 if report.ok else 1


async def examine(state_dir: Path, *, driver: str) -> Report:
    """Looks at everything. Errors: DriverUnavailableError where there is no such driver."""
    problems: list[Problem] = []
    tools = _tools(problems)
    images, template_parts, chains = await asyncio.to_thread(_stored, state_dir, problems)
    memory, disk = _resources(state_dir, problems)
    driver_part = await _driver(driver, state_dir, problems)
    user_namespaces = _user_namespaces()
    if not user_namespaces and os.geteuid() != 0:
        problems.append(
            Problem(
                what="User namespaces are switched off, so machines cannot be confined without root.",
                fix="sudo sysctl -w kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000",
            )
        )
    return Report(
        version=VERSION,
        ok=not any(problem.blocking for problem in problems),
        driver=driver_part,
        memory=memory,
        disk=disk,
        user_namespaces=user_namespaces,
        tools=tools,
        images=images,
        templates=template_parts,
        chains=chains,
        state_dir=str(state_dir),
        run_dir=str(run_dir_of(state_dir)),
        problems=problems,
    )


def _tools(problems: list[Problem]) -> list[ToolPart]:
    path = f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}"
    tools = [ToolPart(name=name, path=shutil.which(name, path=path)) for name, _, _ in TOOLS]
    for tool, (name, package, purpose) in zip(tools, TOOLS, strict=True):
        if tool.path is None:
            what = f"{name} is not installed; it is needed for {purpose}."
            problems.append(Problem(what=what, fix=f"sudo apt-get install {package}"))
    return tools


def _stored(state_dir: Path, problems: list[Problem]) -> tuple[list[ImagePart], list[TemplatePart], ChainsPart]:
    store = ImageStore(state_dir / "images")
    images = [
        ImagePart(name=image.manifest.recipe.name, digest=image.files.digest, size_mib=image.size_bytes >> 20)
        for image in store.ls()
    ]
    problems.extend(
        Problem(what=text, fix=f"hypercelld image build --state-dir {state_dir}") for text in store.problems()
    )
    if not images:
        problems.append(
            Problem(
                what="There is no image yet; `serve` builds the default one, which takes some minutes.",
                fix=f"hypercelld image build --state-dir {state_dir}",
            )
        )
    templates: list[TemplatePart] = []
    if not (state_dir / "snapshots").exists():
        return images, templates, ChainsPart(layers=0, disks=0)
    with SnapshotStore(state_dir / "snapshots") as snapshots:
        for record, snapshot in stored_templates(state_dir / "templates", snapshots):
            if snapshot is None:
                what = f"The snapshot of the template {record.digest[:12]} is broken; it will be built anew."
                fix = f"rm {state_dir / 'templates' / record.digest}.json"
                problems.append(Problem(what=what, fix=fix))
                continue
            templates.append(
                TemplatePart(
                    digest=record.digest,
                    image=snapshot.image_digest,
                    memory_mib=snapshot.shape.memory_mib,
                    vcpus=snapshot.shape.vcpus,
                )
            )
        return images, templates, _chains(snapshots, problems)


def _chains(store: SnapshotStore, problems: list[Problem]) -> ChainsPart:
    newest = {entry.sandbox_id or entry.id: entry.id for entry in store.ls()}
    lengths: dict[str, tuple[int, int]] = {}
    for owner, snapshot_id in newest.items():
        with contextlib.suppress(SnapshotError):  # `snapshot verify` names those that are broken
            state = (store.flattened(snapshot_id) or store.get(snapshot_id)).state
            lengths[owner] = len(state.of_kind(PartKind.LAYER)), len(state.of_kind(PartKind.DISK))
    problems.extend(
        Problem(
            what=f"{owner} lies on {max(parts)} layers or disks that were not merged: it is slow to restore, beyond "
            f"{MAX_CHAIN} no checkpoints are taken. The gateway tries again; its log has the reason.",
        )
        for owner, parts in sorted(lengths.items())
        if max(parts) > SETTLED_PARTS
    )
    return ChainsPart(
        layers=max((layers for layers, _ in lengths.values()), default=0),
        disks=max((disks for _, disks in lengths.values()), default=0),
    )


def _resources(state_dir: Path, problems: list[Problem]) -> tuple[MemoryPart, DiskPart]:
    memory_mib = available_mib()
    if memory_mib < COMFORTABLE_MEMORY_MIB:
        what = f"{memory_mib} MiB of memory are available; {COMFORTABLE_MEMORY_MIB} are enough for some kernels."
        problems.append(Problem(what=what, blocking=memory_mib < RESERVE_MIB + START_COST_MIB))
    existing = next(path for path in (state_dir, *state_dir.parents) if path.exists())
    free_mib = shutil.disk_usage(existing).free >> 20
    if free_mib < COMFORTABLE_DISK_MIB:
        what = f"{existing} has {free_mib} MiB free; an image and its template need {COMFORTABLE_DISK_MIB}."
        problems.append(Problem(what=what, fix="hypercelld serve --state-dir /a/larger/disk"))
    return MemoryPart(available_mib=memory_mib), DiskPart(path=str(existing), free_mib=free_mib)


async def _driver(name: str, state_dir: Path, problems: list[Problem]) -> DriverPart:
    image = next(iter(ImageStore(state_dir / "images").current().values()), None)
    settings = DriverSettings(state_dir=state_dir, image=image.files if image else None)
    checks = await find_driver(name).checks(settings)
    problems.extend(
        Problem(what=check.problem, fix=check.fix, blocking=check.blocking)
        for check in checks
        if check.problem is not None
    )
    return DriverPart(name=name, installed=driver_names(), checks=checks)


def _user_namespaces() -> bool:
    """Whether a user without rights may make them (Debian's switch, and the limit that containers set to 0)."""
    for name in ("kernel/unprivileged_userns_clone", "user/max_user_namespaces"):
        try:
            if int(Path("/proc/sys", name).read_text()) == 0:
                return False
        except (OSError, ValueError):
            continue
    return Path("/proc/self/ns/user").exists()


def _print(report: Report) -> None:
    def line(name: str, text: str) -> None:
        print(f"{name:<20}{text}")

    line("hypercelld", report.version)
    line("driver", f"{report.driver.name} (installed: {', '.join(report.driver.installed)})")
    for check in report.driver.checks:
        line(f"  {check.name}", check.found)
    line("memory", f"{report.memory.available_mib} MiB available")
    line("disk", f"{report.disk.free_mib} MiB free in {report.disk.path}")
    line("user namespaces", "yes" if report.user_namespaces else "no")
    line("tools", ", ".join(tool.name for tool in report.tools if tool.path) or "none")
    line("images", ", ".join(f"{image.name} {image.digest[:12]}" for image in report.images) or "none")
    line("templates", ", ".join(template.digest[:12] for template in report.templates) or "none")
    chains = report.chains
    line("chains", f"at most {chains.layers} layers and {chains.disks} disks")
    line("state", report.state_dir)
    if report.problems:
        print("\nproblems")
    for problem in report.problems:
        print(f"  {'!' if problem.blocking else '-'} {problem.what}")
        if problem.fix:
            print(f"      {problem.fix}")
    if not report.ok:
        print("\nKernels cannot run here until the problems marked ! are mended.", file=sys.stderr)
