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
    """What this host allows, found out once. namespaces: CLONE_* flags. drop_user: each machine has a user of its own.
    devices: those that each process gets. errors: step -> why not."""

    namespaces: int
    drop_user: bool
    devices: tuple[str, ...]
    errors: dict[str, str]

    def steps(self) -> tuple[ConfinementStep, ...]:
        """For `doctor`: each step, and why it is not possible."""
        names = [*NAMESPACES, "own root", "own /proc", "unprivileged user"]
        if self.namespaces & CLONE_NEWUSER or "user namespace" in self.errors:
            names.insert(0, "user namespace")
        return tuple(
            ConfinementStep(name=name, problem=self.errors[name], fix=_USER_NAMESPACE_FIX)
            if name in self.errors
            else ConfinementStep(name=name)
            for name in names
        )

    def of(
        self,
        machine_id: str,
        *,
        read_only: tuple[str, ...],
        rlimits: tuple[tuple[int, int], ...],
        writable: tuple[str, ...] = (),
        as_root: bool = False,
    ) -> Confinement:
        """The confinement of one machine's process, as far as this host allows it. Parameters: as of `Confinement`."""
        return Confinement(
            uid=machine_uid(machine_id) if self.drop_user else None,
            new_root="own root" not in self.errors,
            new_proc="own /proc" not in self.errors,
            read_only=read_only,
            devices=self.devices,
            rlimits=rlimits,
            writable=writable,
            as_root=as_root,
        )


async def find_confinement(spawner: Spawner, *, devices: tuple[str, ...]) -> HostConfinement:
    """Try every namespace and a root of its own, in children that end at once."""
    is_root = os.geteuid() == 0
    answer = await spawner.probe(user_namespace=not is_root, devices=devices)
    errors = {str(name): f"{os.strerror(number)}." for name, number in answer["namespaces"] if number}
    namespaces = 0 if is_root else CLONE_NEWUSER
    namespaces |= sum(flag for name, flag in NAMESPACES.items() if name not in errors)
    if "user namespace" in errors:
        namespaces = 0
    if "mount namespace" in errors or answer["root_error"] is not None:
        errors["own root"] = str(answer["root_error"] or errors["mount namespace"])
    if not namespaces & CLONE_NEWPID or answer["proc_error"] is not None:
        errors["own /proc"] = str(answer["proc_error"] or "There is no pid namespace for it.")
    drop_user = is_root and _is_mapped(FIRST_UID + UID_COUNT)
    if is_root and not drop_user:
        errors["unprivileged user"] = "The user ids from 1,900,000,000 on are not mapped in this container."
    return HostConfinement(namespaces=namespaces, drop_user=drop_user, devices=devices, errors=errors)


def machine_uid(machine_id: str) -> int:
    """The user of one machine's VMM, so that a VMM that was broken into has no rights over another one. The next user
    after it is the machine's own, too (`Confinement.as_root`)."""
    return FIRST_UID + int.from_bytes(hashlib.sha256(machine_id.encode()).digest()[:8]) % UID_COUNT // 2 * 2


def _is_mapped(uid: int) -> bool:
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        inside, _, count = map(int, line.split())
        if inside <= uid < inside + count:
            return True
    return False
