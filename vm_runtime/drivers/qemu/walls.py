"""Finds out which walls around a VMM this host allows, and names the user behind them.

The walls themselves are put up in confinement.py, by the VMM's own process.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from vm_runtime.drivers.base import ConfinementStep
from vm_runtime.drivers.qemu.arguments import Accelerator
from vm_runtime.drivers.qemu.confinement import CLONE_NEWPID, CLONE_NEWUSER, NAMESPACES
from vm_runtime.drivers.qemu.process import Spawner

# Users for VMMs where the gateway is root. No distribution hands out ids this high; systemd's dynamic users and
# containers end below.
FIRST_UID = 1_900_000_000
UID_COUNT = 90_000_000

_USER_NAMESPACE_FIX = "sudo sysctl -w kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000"


@dataclass(frozen=True, kw_only=True)
class HostWalls:
    """What this host allows, found out once. errors: step -> why not."""

    namespaces: int
    user_namespace: bool
    new_root: bool
    new_proc: bool
    drop_user: bool
    errors: dict[str, str]

    def steps(self) -> tuple[ConfinementStep, ...]:
        """For `doctor`: each wall, and why it does not stand."""
        names = [*NAMESPACES, "own root", "own /proc", "unprivileged user"]
        if self.user_namespace or "user namespace" in self.errors:
            names.insert(0, "user namespace")
        found = [
            ConfinementStep(
                name=name, problem=self.errors.get(name), fix=_USER_NAMESPACE_FIX if name in self.errors else None
            )
            for name in names
        ]
        return (*found, ConfinementStep(name="seccomp"))


async def find_walls(spawner: Spawner, accelerator: Accelerator) -> HostWalls:
    """Try every namespace and a root of its own, in children that end at once."""
    user_namespace = os.geteuid() != 0
    devices = ("/dev/kvm",) if accelerator is Accelerator.KVM else ()
    answer = await spawner.probe(user_namespace=user_namespace, devices=devices)
    errors = {str(name): f"{os.strerror(number)}." for name, number in answer["namespaces"] if number}
    namespaces = sum(flag for name, flag in NAMESPACES.items() if name not in errors)
    if "user namespace" in errors:
        namespaces = 0
    new_root, new_proc = True, True
    if "mount namespace" in errors or answer["root_error"] is not None:
        new_root = False
        errors["own root"] = str(answer["root_error"] or errors["mount namespace"])
    if not namespaces & CLONE_NEWPID or answer["proc_error"] is not None:
        new_proc = False
        errors["own /proc"] = str(answer["proc_error"] or "There is no pid namespace for it.")
    drop_user = not user_namespace and _is_mapped(FIRST_UID + UID_COUNT)
    if not drop_user and not user_namespace:
        errors["unprivileged user"] = "The user ids from 1,900,000,000 on are not mapped in this container."
    return HostWalls(
        namespaces=namespaces | (CLONE_NEWUSER if user_namespace and "user namespace" not in errors else 0),
        user_namespace=user_namespace and "user namespace" not in errors,
        new_root=new_root,
        new_proc=new_proc,
        drop_user=drop_user,
        errors=errors,
    )


def machine_uid(machine_id: str) -> int:
    """The user of one machine's VMM, so that a VMM that was broken into has no rights over another one."""
    return FIRST_UID + int.from_bytes(hashlib.sha256(machine_id.encode()).digest()[:8]) % UID_COUNT


def _is_mapped(uid: int) -> bool:
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        inside, _, count = map(int, line.split())
        if inside <= uid < inside + count:
            return True
    return False
