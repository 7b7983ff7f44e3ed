"""What `hypercelld doctor` prints of QEMU: its version, the accelerator, the confinement, and the tools it needs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vm_runtime.drivers.base import Check, DriverSettings
from vm_runtime.drivers.qemu import disk_merge, ext4
from vm_runtime.drivers.qemu.accelerator import Wish, choose
from vm_runtime.drivers.qemu.program import PROGRAM, find_program
from vm_runtime.errors import DriverError

if TYPE_CHECKING:
    from vm_runtime.drivers.qemu.accelerator import Start

_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Program, Debian package, what it is for, and whether nothing runs without it.
_TOOLS = (
    (ext4.PROGRAM, ext4.PACKAGE, "the disks of templates", True),
    (disk_merge.PROGRAM, "qemu-utils", "keeping disks short", False),
)


async def examine(settings: DriverSettings, *, start: Start) -> Sequence[Check]:
    """See `Driver.checks`. Boots a guest under KVM once where that was never tried here. start: makes a driver."""
    checks = [_tool(*tool) for tool in _TOOLS]
    try:
        path, version = await find_program(PROGRAM)
    except DriverError as error:
        fix = "sudo apt-get install qemu-system-x86"
        return [Check(name="QEMU", found="missing", problem=str(error), fix=fix, blocking=True), *checks]
    checks.insert(0, Check(name="QEMU", found=f"{'.'.join(map(str, version))} ({path})"))
    try:
        choice = await choose(Wish.AUTO, state_dir=settings.state_dir, image=settings.image, start=start)
        driver = await start(choice.accelerator)
    except DriverError as error:
        return [*checks, Check(name="accelerator", found="none", problem=str(error), blocking=True)]
    undecided = "" if choice.decided else " (not decided yet)"
    checks.append(Check(name="accelerator", found=f"{choice.accelerator}{undecided}: {choice.why}"))
    try:
        steps = driver.confinement_steps()
    finally:
        await driver.close()
    works = [step.name for step in steps if step.problem is None]
    checks.append(Check(name="confinement", found=", ".join(works) or "none"))
    for step in steps:
        if step.problem is not None:
            checks.append(Check(name=step.name, found="missing", problem=f"{step.name}: {step.problem}", fix=step.fix))
    return checks


def _tool(name: str, package: str, purpose: str, blocking: bool) -> Check:
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}")
    if path is not None:
        return Check(name=name, found=path)
    problem = f"{name} is not installed; it is needed for {purpose}."
    return Check(name=name, found="missing", problem=problem, fix=f"sudo apt-get install {package}", blocking=blocking)
