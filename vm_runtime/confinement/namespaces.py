"""Confines a process, by the process itself, between clone and exec: namespaces, root, user, rlimits.

Runs in the spawner's children, standard library only, no threads. Knows no VMM and no asyncio.

The new root is a tmpfs with the system's programs and libraries (read-only), /proc of its own pid namespace and a few
device nodes. Nothing of the state directory is in it: files come as open descriptors.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import signal
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# <linux/sched.h>
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

NAMESPACES = {
    "mount namespace": CLONE_NEWNS,
    "pid namespace": CLONE_NEWPID,
    "network namespace": CLONE_NEWNET,
    "ipc namespace": CLONE_NEWIPC,
    "uts namespace": CLONE_NEWUTS,
}

# <sys/mount.h>, <linux/prctl.h>, asm/unistd_64.h
_MS_RDONLY = 0x1
_MS_NOSUID = 0x2
_MS_NODEV = 0x4
_MS_NOEXEC = 0x8
_MS_REMOUNT = 0x20
_MS_NOATIME = 0x400
_MS_NODIRATIME = 0x800
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_PRIVATE = 0x40000
_MS_RELATIME = 0x200000
_MNT_DETACH = 2
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_THP_DISABLE = 41
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)
_SYS_CLONE = 56
_SYS_PIVOT_ROOT = 155
_SYS_CLOSE_RANGE = 436
# The user without rights (nobody), as which some programs run what they have to confine themselves.
_NOBODY = 65534

# In a user namespace a bind mount must keep these flags of the original (mount_namespaces(7)).
_LOCKED_FLAGS = (
    (os.ST_NOSUID, _MS_NOSUID),
    (os.ST_NODEV, _MS_NODEV),
    (os.ST_NOEXEC, _MS_NOEXEC),
    (os.ST_NOATIME, _MS_NOATIME),
    (os.ST_NODIRATIME, _MS_NODIRATIME),
    (os.ST_RELATIME, _MS_RELATIME),
)

# Where the new root is put together. It exists everywhere, nothing that is bound lies below it, and the mount hides
# it from this process only.
_NEW_ROOT = "/sys"

# Room for directories and nodes; no data is ever written there.
_ROOT_TMPFS = "mode=0755,size=256k,nr_inodes=256"

_SYSTEM_DIRECTORIES = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store")
_SYSTEM_FILES = ("/etc/ld.so.cache",)
_DEVICES = ("/dev/null", "/dev/urandom")

# Where a program makes a root of its own, for what it confines itself.
_SCRATCH = "/tmp"

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True)
class Confinement:
    """How to confine. uid: the unprivileged user to become, None to stay (then a user namespace takes the rights away).
    new_root: whether the mount namespace gets a root of its own. read_only, writable: what else to show in it, files or
    directories; the latter must be directories. rlimits: soft and hard limit by resource number, lowered to what is
    allowed. as_root: become the root of a user namespace, which outside is the user `uid`, and whose nobody is the next
    user after it: for a program that makes namespaces itself. Needs a gateway that is root."""

    uid: int | None
    new_root: bool
    new_proc: bool
    read_only: Sequence[str]
    devices: Sequence[str]
    rlimits: Sequence[tuple[int, int]]
    writable: Sequence[str] = ()
    as_root: bool = False


def clone(flags: int) -> int:
    """fork(2) with new namespaces. Only for a process without threads, as Python is not told of it. Raises OSError."""
    pid = _libc.syscall(_SYS_CLONE, ctypes.c_ulong(flags | signal.SIGCHLD), None, None, None, None)
    if pid < 0:
        raise _error("clone")
    return int(pid)


def confine(confinement: Confinement) -> None:
    """Everything but descriptors and exec, in this process, for good. Raises OSError naming the step."""
    if confinement.new_root:
        _enter_new_root(confinement)
    for number, limit in confinement.rlimits:
        _, hard = resource.getrlimit(number)
        value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(number, (value, value))
    # A write beyond RLIMIT_FSIZE is to be an I/O error of the guest's disk, not the death of the machine.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    os.setsid()
    os.umask(0o077)
    if confinement.as_root:
        assert confinement.uid is not None
        _enter_user_namespace(confinement.uid)
    elif confinement.uid is not None:
        os.setgroups([])
        os.setresgid(confinement.uid, confinement.uid, confinement.uid)
        os.setresuid(confinement.uid, confinement.uid, confinement.uid)
    # A page that is written takes 4 KiB and not 2 MiB: sparse writes are what a clone does (measured: 28 of 59 MiB).
    _libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    _prctl("no_new_privs", _PR_SET_NO_NEW_PRIVS, 1)
    # The gateway reads guest pages with process_vm_readv, also one that is not the parent (Yama, scope 1).
    _prctl("dumpable", _PR_SET_DUMPABLE, 1)
    _libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)  # EINVAL where there is no Yama: nothing to open then


def arrange_descriptors(descriptors: list[int], *, status: int, stdio: list[int]) -> int:
    """Put `descriptors` at 3, 4, ..., and `stdio` at 0, 1 and 2; if that is one, it is stdout and stderr, and stdin is
    /dev/null. Close all others but the status pipe. Answers the status pipe's new number; it closes on exec."""
    first_free = 3 + len(descriptors)
    if len(stdio) == 1:
        stdio = [os.open("/dev/null", os.O_RDWR), stdio[0], stdio[0]]
    high = [_move_up(fd, first_free + 8) for fd in (*stdio, *descriptors, status)]
    for target, source in enumerate(high[:-1]):
        os.dup2(source, target, inheritable=True)
    os.dup2(high[-1], first_free, inheritable=False)
    if _libc.syscall(_SYS_CLOSE_RANGE, ctypes.c_uint(first_free + 1), ctypes.c_uint(0xFFFFFFFF), 0) != 0:
        os.closerange(first_free + 1, os.sysconf("SC_OPEN_MAX"))
    return first_free


def _move_up(fd: int, lowest: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD, lowest)


def _enter_new_root(confinement: Confinement) -> None:
    _mount("private mounts", None, "/", None, _MS_REC | _MS_PRIVATE, None)
    _mount("tmpfs for the root", "tmpfs", _NEW_ROOT, "tmpfs", _MS_NOSUID, _ROOT_TMPFS)
    for source in (*_SYSTEM_DIRECTORIES, *confinement.read_only):
        if os.path.islink(source):  # noqa: PTH114 - pathlib would be imported in every child for nothing
            os.symlink(os.readlink(source), _NEW_ROOT + source)  # noqa: PTH115, PTH211
        elif os.path.isdir(source):  # noqa: PTH112
            os.makedirs(_NEW_ROOT + source, mode=0o755, exist_ok=True)  # noqa: PTH103
            _bind_read_only(source)
        elif os.path.isfile(source):  # noqa: PTH113
            os.makedirs(_NEW_ROOT + os.path.dirname(source), mode=0o755, exist_ok=True)  # noqa: PTH103, PTH120
            Path(_NEW_ROOT + source).touch()
            _bind_read_only(source)
    os.mkdir(_NEW_ROOT + "/etc", mode=0o755)  # noqa: PTH102
    for source in confinement.writable:
        os.makedirs(_NEW_ROOT + source, mode=0o755, exist_ok=True)  # noqa: PTH103
        _mount(f"bind of {source}", source, _NEW_ROOT + source, None, _MS_BIND, None)
    if confinement.as_root:
        os.makedirs(_NEW_ROOT + _SCRATCH, mode=0o755, exist_ok=True)  # noqa: PTH103
    for source in _SYSTEM_FILES:
        if os.path.isfile(source):  # noqa: PTH113
            Path(_NEW_ROOT + source).touch()
            _bind_read_only(source)
    os.mkdir(_NEW_ROOT + "/dev", mode=0o755)  # noqa: PTH102
    for device in (*_DEVICES, *confinement.devices):
        _make_device(device)
    os.mkdir(_NEW_ROOT + "/proc", mode=0o555)  # noqa: PTH102
    if confinement.new_proc:
        _mount("/proc", "proc", _NEW_ROOT + "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, None)
    else:
        _mount("/proc of the host", "/proc", _NEW_ROOT + "/proc", None, _MS_BIND | _MS_REC, None)
    os.chdir(_NEW_ROOT)
    # The same place for old and new root needs no directory for the old one (pivot_root(2), NOTES).
    if _libc.syscall(_SYS_PIVOT_ROOT, b".", b".") != 0:
        raise _error("pivot_root")
    if _libc.umount2(b".", _MNT_DETACH) != 0:
        raise _error("umount of the old root")
    os.chdir("/")
    _mount("read-only root", None, "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID, None)


def _enter_user_namespace(uid: int) -> None:
    """Last, since what came before needs the rights that are lost here. A child that keeps them maps the users."""
    entered_read, entered_write = os.pipe()
    process = os.getpid()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(entered_write)
            if os.read(entered_read, 1):
                for name in ("uid_map", "gid_map"):
                    fd = os.open(f"/proc/{process}/{name}", os.O_WRONLY | os.O_CLOEXEC)
                    os.write(fd, f"0 {uid} 1\n{_NOBODY} {uid + 1} 1\n".encode())
                    os.close(fd)
                status = 0
        finally:
            os._exit(status)
    os.close(entered_read)
    try:
        if _libc.unshare(CLONE_NEWUSER) != 0:
            raise _error("user namespace")
        os.write(entered_write, b"x")
    finally:
        os.close(entered_write)
        _, status = os.waitpid(child, 0)
    if status != 0:
        raise OSError(f"The users {uid} and {uid + 1} could not be mapped")
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _make_device(path: str) -> None:
    """A node of its own, open to the VMM's user, who has no rights on the host's; else the host's node."""
    information = os.stat(path)  # noqa: PTH116
    target = _NEW_ROOT + path
    try:
        os.mknod(target, 0o666 | stat.S_IFCHR, information.st_rdev)
        os.chmod(target, 0o666)  # noqa: PTH101 - mknod's mode is cut by the umask
    except PermissionError:
        Path(target).touch()
        _mount(f"device {path}", path, target, None, _MS_BIND, None)


def _bind_read_only(source: str) -> None:
    target = _NEW_ROOT + source
    _mount(f"bind of {source}", source, target, None, _MS_BIND | _MS_REC, None)
    found = os.statvfs(target).f_flag
    keep = sum(mount_flag for flag, mount_flag in _LOCKED_FLAGS if found & flag)
    flags = _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | keep
    _mount(f"read-only bind of {source}", None, target, None, flags, None)


def _mount(step: str, source: str | None, target: str, kind: str | None, flags: int, data: str | None) -> None:
    arguments = [None if value is None else os.fsencode(value) for value in (source, target, kind)]
    options = None if data is None else data.encode()
    if _libc.mount(*arguments, ctypes.c_ulong(flags), options) != 0:
        raise _error(step)


def _prctl(step: str, option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise _error(step)


def _error(step: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{step}: {os.strerror(number)}")
