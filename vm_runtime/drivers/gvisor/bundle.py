"""What a machine is, in runsc's terms: its command line and its OCI bundle's config.json, as functions of values.

Knows no processes. OCI runtime specification 1.0; the annotations are gVisor's (runsc/boot/gofer_conf.go).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vm_runtime.spec import MachineSpec

# A change of anything here makes templates new: a state is restored into what it was made in, and runsc does not look.
BUNDLE_VERSION = 1
# Each machine has a directory of its own for runsc, so that a name is enough.
CONTAINER = "m"
CONFIG_FILE = "config.json"
EMPTY_DIRECTORY = "empty"
PID_FILE = "pid"
PANIC_FILE = "panic"
FIRST = Path(__file__).with_name("first.py")

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CAPABILITIES = (
    "CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID",
    "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_KILL", "CAP_LEASE", "CAP_MKNOD", "CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_ADMIN", "CAP_SYS_BOOT",
    "CAP_SYS_CHROOT", "CAP_SYS_NICE", "CAP_SYS_PTRACE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG",
)  # fmt: skip
_OPEN_FILES = (65_536, 1_048_576)


def arguments(program: Path, *, platform: str, directory: Path) -> list[str]:
    """The command that makes a machine's sandbox, without state. directory: the machine's own, see `write_bundle`."""
    return [
        str(program),
        f"--root={directory}",
        f"--platform={platform}",
        "--network=none",
        "--host-uds=none",
        "--overlay2=none",
        "--directfs=false",
        "--ignore-cgroups",  # we have put it into its groups
        f"--panic-log={directory / PANIC_FILE}",
        "create",
        f"--bundle={directory}",
        f"--pid-file={directory / PID_FILE}",
        CONTAINER,
    ]


def control_socket(directory: Path) -> Path:
    return directory / f"runsc-{CONTAINER}.sock"


def config(spec: MachineSpec, *, rootfs: Path, directory: Path) -> str:
    """config.json. rootfs: an uncompressed EROFS. All that is written lies in the machine's memory."""
    tmpfs = {"type": "tmpfs", "source": "tmpfs"}
    values = {
        "ociVersion": "1.0.0",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": ["/usr/bin/python3", "-I", "-S", "-c", FIRST.read_text()],
            "cwd": "/",
            "env": [f"PATH={_PATH}", "HOME=/root", "LANG=C.UTF-8"],
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted", "inheritable"), _CAPABILITIES),
            "rlimits": [_limit("RLIMIT_NOFILE", _OPEN_FILES)],
        },
        "root": {"path": str(directory / EMPTY_DIRECTORY), "readonly": False},
        "hostname": "sandbox",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/run", **tmpfs, "options": ["mode=0755"]},
            {"destination": "/dev/shm", **tmpfs, "options": ["mode=1777"]},
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")],
            "resources": {"memory": {"limit": spec.shape.memory_mib << 20}},
        },
        "annotations": {
            "dev.gvisor.spec.rootfs.source": str(rootfs),
            "dev.gvisor.spec.rootfs.type": "erofs",
            "dev.gvisor.spec.rootfs.overlay": "memory",
        },
    }
    return json.dumps(values, indent=1)


def _limit(name: str, limits: Sequence[int]) -> dict[str, str | int]:
    return {"type": name, "soft": limits[0], "hard": limits[1]}
