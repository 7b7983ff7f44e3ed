"""Chooses KVM or TCG by booting a real guest under KVM with a time limit, once per host and QEMU version.

/dev/kvm existing, opening and creating VMs proves nothing: on some cloud machines an unmodified Linux guest then hangs.
So the image's own vmlinux is booted until it starts its first program. The answer is kept in `STATE/accelerator.json`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import secrets
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vm_runtime.drivers.base import MachinePaths
from vm_runtime.drivers.qemu.arguments import Accelerator
from vm_runtime.drivers.qemu.program import PROGRAM, find_program
from vm_runtime.errors import DriverUnavailableError, VmRuntimeError
from vm_runtime.records import Record
from vm_runtime.spec import ImageFiles, MachineShape, MachineSpec

if TYPE_CHECKING:
    from vm_runtime.drivers.qemu.driver import QemuDriver

    Start = Callable[[Accelerator], Awaitable[QemuDriver]]

KVM_DEVICE = Path("/dev/kvm")

# A guest under working KVM starts its first program in about a second; a hanging one never does.
PROBE_LIMIT_S = 8.0
# Linux prints this on its console just before it starts the first program.
_FIRST_PROGRAM = "Run /init"
_PROBE_SHAPE = MachineShape(memory_mib=256, vcpus=1, disk_mib=16)


class Wish(StrEnum):
    """What the operator asked for. AUTO: a real boot decides."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """accelerator: to use.
    why: a sentence.
    decided: False where the question is open, as there is no image to boot.
    """

    accelerator: Accelerator
    why: str
    decided: bool


class _Remembered(Record):
    """What was found out, and of which host, with which kernel and QEMU."""

    file_name = "accelerator.json"

    format: Literal[1] = 1
    machine: str
    kernel: str
    qemu: str
    accelerator: Accelerator
    why: str


async def choose(wish: Wish, *, state_dir: Path, image: ImageFiles | None, start: Start) -> Choice:
    """The accelerator for this host. Boots a guest for at most PROBE_LIMIT_S if that was never done here.

    image: None while none was built; then the answer is TCG and not decided, so ask again later. start: makes a driver
    for the attempt.
    Errors: DriverUnavailableError: no QEMU, or KVM was asked for and does not work.
    """
    path, version = await find_program(PROGRAM)
    if wish is Wish.TCG:
        return Choice(accelerator=Accelerator.TCG, why="Emulation (TCG) was asked for.", decided=True)
    problem = await asyncio.to_thread(_device_problem)
    if problem is None:
        if image is None:
            why = "/dev/kvm opens, but whether Linux runs in it is unknown until there is an image to boot."
            return Choice(accelerator=Accelerator.TCG, why=why, decided=False)
        qemu = f"{path} {'.'.join(map(str, version))}"
        remembered = await asyncio.to_thread(_read, state_dir, qemu)
        # Who insists on KVM has perhaps just repaired it.
        if remembered is None or (wish is Wish.KVM and remembered.accelerator is not Accelerator.KVM):
            remembered, is_certain = await _boot_under_kvm(image, qemu, start)
            if is_certain:
                await asyncio.to_thread(_write, state_dir, remembered)
        if remembered.accelerator is Accelerator.KVM:
            return Choice(accelerator=Accelerator.KVM, why=remembered.why, decided=True)
        problem = remembered.why
    if wish is Wish.KVM:
        raise DriverUnavailableError(f"KVM was asked for but does not work here. {problem}")
    return Choice(accelerator=Accelerator.TCG, why=f"Emulation (TCG), since KVM does not work: {problem}", decided=True)


def _device_problem() -> str | None:
    if not KVM_DEVICE.exists():
        return (
            "There is no /dev/kvm. On your own hardware: switch on virtualisation in the firmware, sudo modprobe kvm."
        )
    try:
        os.close(os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm does not open: {error.strerror}. Try: sudo usermod -aG kvm $USER, then log in again."
    return None


async def _boot_under_kvm(image: ImageFiles, qemu: str, start: Start) -> tuple[_Remembered, bool]:
    """The answer, and whether it is one: a VMM that did not even start shows nothing about KVM."""
    is_certain = True
    started = time.monotonic()
    accelerator, outcome = Accelerator.TCG, ""
    with tempfile.TemporaryDirectory(prefix="hypercell-probe-") as name:
        paths = MachinePaths(id=f"probe-{secrets.token_hex(4)}", run_dir=Path(name, "run"), disk_dir=Path(name, "disk"))
        spec = MachineSpec(shape=_PROBE_SHAPE, image=image)
        driver = await start(Accelerator.KVM)
        try:
            machine = await driver.boot_kernel(spec, paths=paths, guest=b"", timeout_s=PROBE_LIMIT_S, quiet=False)
            try:
                if await machine.wait_serial(_FIRST_PROGRAM, timeout_s=PROBE_LIMIT_S):
                    accelerator = Accelerator.KVM
                    outcome = f"Linux started its first program in KVM after {time.monotonic() - started:.1f} s."
                elif machine.is_dead:
                    outcome = f"Linux ended in KVM. {(await machine.wait_dead()).reason}"
                else:
                    outcome = f"/dev/kvm opens, but Linux did not start in it within {PROBE_LIMIT_S:.0f} s."
            finally:
                await machine.kill()
        except VmRuntimeError as error:
            is_certain = False
            outcome = f"No guest starts in KVM. {error}"
        finally:
            await driver.close()
    remembered = _Remembered(
        machine=_machine_id(),
        kernel=platform.release(),
        qemu=qemu,
        accelerator=accelerator,
        why=outcome,
    )
    return remembered, is_certain


def _machine_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/etc/machine-id").read_text().strip()
    return platform.node()


def _read(state_dir: Path, qemu: str) -> _Remembered | None:
    """What was found out earlier, if host, its kernel and QEMU are still the same."""
    found = _Remembered.read(state_dir)
    same = (_machine_id(), platform.release(), qemu)
    return found if found is not None and (found.machine, found.kernel, found.qemu) == same else None


def _write(state_dir: Path, remembered: _Remembered) -> None:
    state_dir.mkdir(parents=True, exist_ok=True)
    remembered.write(state_dir)
