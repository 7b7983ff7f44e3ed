"""The initramfs of an image: busybox, the drivers that Debian's vmlinux has as modules, and /init.

Its format is the newc cpio (Linux, Documentation/driver-api/early-userspace/buffer-format.rst), which may be
followed by further archives: that is how the guest code is appended. Everything in it has a fixed time and order, so
equal parts give equal bytes.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from vm_runtime.images.errors import BuildFailedError

# What the guest needs before it has a root: transport, disks, wire, entropy, file systems (ext4 is built in).
MODULES = ("virtio_mmio", "virtio_blk", "virtio_console", "virtio_rng", "erofs", "overlay")
DIRECTORIES = ("bin", "dev", "disk", "hypercell", "image", "modules", "newroot", "proc", "sys", "tmp")
APPLETS = (
    "sh", "[", "basename", "cat", "chmod", "chown", "chroot", "cp", "cut", "date", "dd", "df", "dirname", "dmesg",
    "echo", "env", "false", "find", "grep", "head", "hostname", "insmod", "ip", "ln", "ls", "mkdir", "mknod",
    "mount", "mv", "poweroff", "printf", "readlink", "reboot", "rm", "sed", "setsid", "sleep", "sort", "stat",
    "switch_root", "sync", "tail", "test", "touch", "tr", "true", "umount", "uname", "wc",
)  # fmt: skip
INIT = Path(__file__).parent / "init.sh"
# The next archive begins on a multiple of 4 bytes; 512 is what cpio itself pads to.
_PADDING_BYTES = 512


class CpioArchive:
    """Builds one newc archive in memory."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._inode = 0

    def directory(self, name: str) -> None:
        self._add(name, stat.S_IFDIR | 0o755, b"", links=2)

    def file(self, name: str, content: bytes, *, mode: int = 0o644) -> None:
        self._add(name, stat.S_IFREG | mode, content)

    def symlink(self, name: str, target: str) -> None:
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, *, major: int, minor: int) -> None:
        self._add(name, stat.S_IFCHR | 0o600, b"", device=(major, minor))

    def finish(self) -> bytes:
        """The archive with its end mark."""
        self._inode = -1
        self._add("TRAILER!!!", 0, b"")
        self._data += bytes(-len(self._data) % _PADDING_BYTES)
        return bytes(self._data)

    def _add(self, name: str, mode: int, content: bytes, *, links: int = 1, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device of the file system (2), device (2), length of name, checksum
        fields = (self._inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(path), 0)
        self._data += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        self._data += bytes(-len(self._data) % 4)
        self._data += content
        self._data += bytes(-len(self._data) % 4)


def build_initramfs(*, busybox: bytes, modules: Path) -> bytes:
    """modules: a `lib/modules/<version>` directory with its modules.dep. Errors: BuildFailedError (no such driver)."""
    archive = CpioArchive()
    for name in DIRECTORIES:
        archive.directory(name)
    # Opened by vmlinux for init before devtmpfs is mounted.
    archive.character_device("dev/console", major=5, minor=1)
    archive.file("bin/busybox", busybox, mode=0o755)
    for applet in APPLETS:
        archive.symlink(f"bin/{applet}", "busybox")
    order = module_order((modules / "modules.dep").read_text(), _builtin_names(modules), MODULES)
    for path in order:
        archive.file(f"modules/{PurePosixPath(path).name}", (modules / path).read_bytes())
    archive.file("modules/order", "".join(f"{PurePosixPath(path).name}\n" for path in order).encode())
    archive.file("init", INIT.read_bytes(), mode=0o755)
    return archive.finish()


def module_order(modules_dep: str, builtin: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Paths of the wanted modules and all they depend on, each after those it needs. Errors: BuildFailedError."""
    needs = {}
    for line in modules_dep.splitlines():
        path, _, dependencies = line.partition(":")
        needs[path] = dependencies.split()
    by_name = {_module_name(path): path for path in needs}
    built_in = set(builtin)
    order: dict[str, None] = {}

    def add(path: str) -> None:
        # modules.dep lists all direct and indirect needs, the one to load first at the end.
        for dependency in reversed(needs[path]):
            order.setdefault(dependency)
        order.setdefault(path)

    for name in wanted:
        if name in by_name:
            add(by_name[name])
        elif name not in built_in:
            raise BuildFailedError(f"Debian's kernel package has no module {name}; report the package's version.")
    return list(order)


def _builtin_names(modules: Path) -> Iterator[str]:
    for line in (modules / "modules.builtin").read_text().splitlines():
        yield _module_name(line)


def _module_name(path: str) -> str:
    return PurePosixPath(path).name.partition(".")[0].replace("-", "_")
