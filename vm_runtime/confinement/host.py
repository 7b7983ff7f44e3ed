"""Finds out how far this host allows a process to be confined, and gives each machine a user of its own.

namespaces.py does the confining, in the process itself.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from vm_runtime.confinement.namespaces import CLONE_NEWPID, CLONE_NEWUSER, NAMESPACES, Confinement
from vm_runtime.confinement.process import Spawner
from vm_runtime.confinement.report import ConfinementStep

# Users for VMMs where the gateway is root. No distribution hands out ids this high; systemd's dynamic users and
# containers end below.
FIRST_UID = 1_900_000_000
UID_COUNT = 90_000_000

_USER_NAMESPACE_FIX = "sudo sysctl -w kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000"


@dataclass(frozen=True, kw_only=True)
class HostConfinement:
    """What this host allows, found out once. errors: step -> why not. devices: those that each process gets."""

    namespaces: int
    user_namespace: bool
    new_root: bool
    new_proc: bool
    drop_user: bool
    errors: dict[str, str]
    devices: tuple[str, ...]

    def steps(self) -> tuple[ConfinementStep, ...]:
        """For `doctor`: each step, and why it is not possible."""
        names = [*NAMESPACES, "own root", "own /proc", "unprivileged user"]
        if self.user_namespace or "user namespace" in self.errors:
            names.insert(0, "user namespace")
        found = [
            ConfinementStep(
                name=name, problem=self.errors.get(name), fix=_USER_NAMESPACE_FIX if name in self.errors else None
            )
            for name in names
        ]
        return tuple(found)

    def of(self, machine_id: str, *, read_only: tuple[str, ...], rlimits: tuple[tuple[int, int], ...]) -> Confinement:
        """The confinement of one machine's process, as far as this host allows it. Parameters: as of `Confinement`."""
        return Confinement(
            uid=machine_uid(machine_id) if self.drop_user else None,
            new_root=self.new_root,
            new_proc=self.new_proc,
            read_only=read_only,
            devices=self.devices,
            rlimits=rlimits,
        )


async def find_confinement(spawner: Spawner, *, devices: tuple[str, ...]) -> HostConfinement:
    """Try every namespace and a root of its own, in children that end at once."""
    user_namespace = os.geteuid() != 0
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
    return HostConfinement(
        namespaces=namespaces | (CLONE_NEWUSER if user_namespace and "user namespace" not in errors else 0),
        user_namespace=user_namespace and "user namespace" not in errors,
        new_root=new_root,
        new_proc=new_proc,
        drop_user=drop_user,
        errors=errors,
        devices=devices,
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
