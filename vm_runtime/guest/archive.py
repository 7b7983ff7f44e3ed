"""The guest code as a small archive that is appended to an image's initramfs, so that a change of it rebuilds no image.

An initramfs may be several cpio archives one after the other (buffer-format.rst in vmlinux's
Documentation/driver-api/early-userspace).
Host side; the same sources give the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# vmlinux pads between archives itself only at multiples of 4; the first archive's length is rounded up by its owner.
ALIGNMENT = 4

CODE_DIRECTORY = "/run/hypercell/python"

INIT_COMMAND = (
    "/usr/bin/python3",
    "-I",
    "-S",
    "-c",
    f"import sys; sys.path.insert(0, '{CODE_DIRECTORY}'); from vm_runtime.guest.init import main; main()",
)

# Runs in busybox, from /init of the image, with the mounted new root as its argument.
START = f"""#!/bin/busybox sh
# Takes the guest code into memory, hands the new root what /init has mounted, and becomes its init.
set -e
root="$1"
busybox mount -t tmpfs -o mode=0755,nosuid,nodev tmpfs "$root/run"
busybox mkdir -p "$root/run/hypercell"
busybox cp -r /hypercell/python "$root{CODE_DIRECTORY}"
for directory in proc sys dev; do
    busybox mount --move "/$directory" "$root/$directory"
done
exec busybox switch_root "$root" {" ".join(INIT_COMMAND[:-1])} "{INIT_COMMAND[-1]}"
"""

# The packages of vm_runtime that the guest needs, and what of `guest` is for the host alone.
_PACKAGES = ("wire", "guest", "guest/sandbox", "guest/sandbox/path")
_HOST_ONLY = frozenset({"guest/archive.py"})


@dataclass(frozen=True)
class _Entry:
    name: str
    mode: int
    data: bytes = b""


@functools.cache
def guest_archive() -> bytes:
    """The archive: a newc cpio with /hypercell/start and /hypercell/python. About 100 KB. Reads the sources once."""
    return _cpio(_entries())


@functools.cache
def guest_digest() -> str:
    """Names what is in the archive (SHA-256, hex): a template made with another one is out of date."""
    return hashlib.sha256(guest_archive()).hexdigest()


def _entries() -> Iterable[_Entry]:
    directory = stat.S_IFDIR | 0o755
    yield _Entry("hypercell", directory)
    yield _Entry("hypercell/start", stat.S_IFREG | 0o755, START.encode())
    yield _Entry("hypercell/python", directory)
    yield _Entry("hypercell/python/vm_runtime", directory)
    source = Path(__file__).parent.parent
    yield _file(source / "__init__.py", source)
    for package in _PACKAGES:
        yield _Entry(f"hypercell/python/vm_runtime/{package}", directory)
        for path in sorted((source / package).glob("*.py")):
            if path.relative_to(source).as_posix() not in _HOST_ONLY:
                yield _file(path, source)


def _file(path: Path, source: Path) -> _Entry:
    name = f"hypercell/python/vm_runtime/{path.relative_to(source).as_posix()}"
    return _Entry(name, stat.S_IFREG | 0o644, path.read_bytes())


def _cpio(entries: Iterable[_Entry]) -> bytes:
    """A cpio of format newc (man 5 cpio): owner root, time 0, inodes counted: equal entries give equal bytes."""
    out = bytearray()
    for inode, entry in enumerate((*entries, _Entry("TRAILER!!!", 0)), start=1):
        name = entry.name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        numbers = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
        out += b"070701" + b"".join(b"%08X" % number for number in numbers) + name
        out += bytes(-len(out) % ALIGNMENT)
        out += entry.data
        out += bytes(-len(out) % ALIGNMENT)
    return bytes(out)
