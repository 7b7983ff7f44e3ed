"""Takes the ELF out of a bzImage, in plain Python.

A VMM that boots through PVH wants the uncompressed vmlinux; distributions ship a bzImage. Layout: Linux,
Documentation/arch/x86/boot.rst (setup_sects at 0x1f1, 'HdrS' at 0x202, payload_offset and payload_length at 0x248).
"""

from __future__ import annotations

import lzma
import struct
import zlib

from vm_runtime.images.errors import BuildFailedError

_LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"
_LZ4_LEGACY_BLOCK_BYTES = 8 << 20
# An uncompressed vmlinux has 50 MB; more than this is not one.
MAX_VMLINUX_BYTES = 512 << 20


def extract_vmlinux(bzimage: bytes) -> bytes:
    """The ELF inside a bzImage. Errors: BuildFailedError (not a bzImage, or compressed in a way not known here)."""
    if len(bzimage) < 0x250 or bzimage[0x202:0x206] != b"HdrS":
        raise BuildFailedError("The file in Debian's kernel package is not a bzImage; report the package's version.")
    setup_sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = bzimage[start : start + length]
    try:
        elf = _decompress(payload)
    except (zlib.error, lzma.LZMAError, IndexError, ValueError) as error:
        raise BuildFailedError(f"The bzImage in Debian's kernel package is damaged ({error}); build again.") from error
    if elf[:4] != b"\x7fELF":
        raise BuildFailedError("The bzImage in Debian's kernel package holds no ELF; report the package's version.")
    return elf


def _decompress(payload: bytes) -> bytes:
    # The payload ends with the 4-byte size of what is in it, which the streaming decompressors leave alone.
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(payload, MAX_VMLINUX_BYTES)
    if payload.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload, MAX_VMLINUX_BYTES)
    if payload.startswith(_LZ4_LEGACY_MAGIC):
        return _unlz4_legacy(payload)
    raise BuildFailedError(
        f"The bzImage is compressed in a way that is not known here (it begins with {payload[:4].hex()}); "
        "gzip, xz and lz4 are."
    )


def _unlz4_legacy(payload: bytes) -> bytes:
    """LZ4's legacy frame (lz4_Frame_format.md): the magic number, then blocks of up to 8 MiB, each after its size."""
    output = bytearray()
    position = len(_LZ4_LEGACY_MAGIC)
    while position + 4 < len(payload):
        (size,) = struct.unpack_from("<I", payload, position)
        block = payload[position + 4 : position + 4 + size]
        if len(block) != size:
            raise ValueError("an LZ4 block is cut off")
        output += _unlz4_block(block)
        position += 4 + size
    return bytes(output)


def _unlz4_block(source: bytes) -> bytes:
    """One LZ4 block (lz4_Block_format.md). Blocks of the legacy frame do not refer to each other."""
    output = bytearray()
    position, end = 0, len(source)
    while position < end:
        token = source[position]
        position += 1
        literals = token >> 4
        if literals == 15:
            while (more := source[position]) == 255:
                literals += 255
                position += 1
            literals += more
            position += 1
        output += source[position : position + literals]
        position += literals
        if position >= end:
            break
        distance = source[position] | source[position + 1] << 8
        position += 2
        length = (token & 15) + 4
        if length == 19:
            while (more := source[position]) == 255:
                length += 255
                position += 1
            length += more
            position += 1
        start = len(output) - distance
        if distance == 0 or start < 0 or len(output) + length > _LZ4_LEGACY_BLOCK_BYTES:
            raise ValueError("an LZ4 match points outside its block")
        if distance >= length:
            output += output[start : start + length]
        else:  # The match overlaps what it writes: it repeats its first `distance` bytes.
            output += (bytes(output[start:]) * (length // distance + 1))[:length]
    return bytes(output)
