"""vmlinux out of a bzImage, and the initramfs: read back by other programs."""

from __future__ import annotations

import gzip
import lzma
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from vm_runtime.images.errors import BuildFailedError
from vm_runtime.images.initramfs import CpioArchive, module_order
from vm_runtime.images.vmlinux import extract_vmlinux

# Repetitive enough for long and overlapping matches, varied enough for long literals; more than one 8 MiB block.
ELF = b"\x7fELF" + b"".join(struct.pack("<I", n * n & 0xFFFFFFFF) + b"ab" * (n % 40) for n in range(220_000))


def bzimage(payload: bytes) -> bytes:
    header = bytearray(0x400)
    header[0x1F1] = 1
    header[0x202:0x206] = b"HdrS"
    payload += struct.pack("<I", len(ELF))
    struct.pack_into("<II", header, 0x248, 0, len(payload))
    return bytes(header) + payload


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_extracts_gzip_and_xz(compress: object) -> None:
    assert callable(compress)
    assert extract_vmlinux(bzimage(compress(ELF))) == ELF


@pytest.mark.skipif(shutil.which("lz4") is None, reason="needs the program lz4")
def test_extracts_what_the_lz4_program_packed() -> None:
    packed = subprocess.run(["lz4", "-l", "-9", "-c"], input=ELF, capture_output=True, check=True).stdout
    assert extract_vmlinux(bzimage(packed)) == ELF


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"no kernel", "not a bzImage"),
        (bzimage(b"\x28\xb5\x2f\xfd....."), "compressed in a way that is not known"),
        (bzimage(gzip.compress(b"text")), "holds no ELF"),
        (bzimage(b"\x02\x21\x4c\x18" + struct.pack("<I", 3) + b"\x0f\x00\x00"), "damaged"),
        (bzimage(b"\x02\x21\x4c\x18" + struct.pack("<I", 3)), "damaged|holds no ELF"),
    ],
)
def test_refuses_what_is_no_kernel(image: bytes, reason: str) -> None:
    with pytest.raises(BuildFailedError, match=reason):
        extract_vmlinux(image)


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs the program cpio")
def test_cpio_is_read_by_cpio_and_is_reproducible(tmp_path: Path) -> None:
    def archive() -> bytes:
        made = CpioArchive()
        made.directory("bin")
        made.file("bin/tool", b"content" * 100, mode=0o755)
        made.symlink("bin/link", "tool")
        return made.finish()

    data = archive()
    assert data == archive()
    assert len(data) % 512 == 0
    subprocess.run(["cpio", "--extract", "--quiet"], input=data, cwd=tmp_path, check=True)
    assert (tmp_path / "bin/link").readlink() == Path("tool")
    assert (tmp_path / "bin/tool").read_bytes() == b"content" * 100
    assert (tmp_path / "bin/tool").stat().st_mode & 0o777 == 0o755


def test_modules_come_after_those_they_need() -> None:
    modules_dep = "k/a.ko: k/b-x.ko k/c.ko\nk/b-x.ko: k/c.ko\nk/c.ko:\nk/d.ko:\n"
    assert module_order(modules_dep, [], ["a", "b_x", "d"]) == ["k/c.ko", "k/b-x.ko", "k/a.ko", "k/d.ko"]
    assert module_order(modules_dep, ["ext4"], ["ext4"]) == []
    with pytest.raises(BuildFailedError, match="no module nothing"):
        module_order(modules_dep, [], ["nothing"])
