"""The guest code as a small archive that is appended to an image's initramfs, so that a change of it rebuilds no image.

An initramfs may be several cpio archives one after the other (buffer-format.rst in vmlinux's
Documentation/driver-api/early-userspace).
Host side; the same sources give the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from vm_runtime.images.initramfs import CpioArchive

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


@functools.cache
def guest_archive() -> bytes:
    """The archive: a newc cpio with /hypercell/start and /hypercell/python. About 100 KB. Reads the sources once."""
    archive = CpioArchive()
    archive.directory("hypercell")
    archive.file("hypercell/start", START.encode(), mode=0o755)
    archive.directory("hypercell/python")
    archive.directory("hypercell/python/vm_runtime")
    source = Path(__file__).parent.parent
    archive.file("hypercell/python/vm_runtime/__init__.py", (source / "__init__.py").read_bytes())
    for package in _PACKAGES:
        archive.directory(f"hypercell/python/vm_runtime/{package}")
        for path in sorted((source / package).glob("*.py")):
            name = path.relative_to(source).as_posix()
            if name not in _HOST_ONLY:
                archive.file(f"hypercell/python/vm_runtime/{name}", path.read_bytes())
    return archive.finish()


@functools.cache
def guest_digest() -> str:
    """Names what is in the archive (SHA-256, hex): a template made with another one is out of date."""
    return hashlib.sha256(guest_archive()).hexdigest()
