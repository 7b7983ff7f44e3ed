"""A program of 57 bytes for a kernel that runs Linux's programs: sends back what it reads, and otherwise waits.

Made of bytes here, no assembler needed. It reads descriptor 0 and writes descriptor 1, for ever; at the end of what
there is to read it looks again every 10 ms.
"""

from __future__ import annotations

import struct

_LOAD_ADDRESS = 0x400000
_BUFFER_ADDRESS = 0x402000
_BUFFER_BYTES = 4096
_HEADERS_BYTES = 64 + 56
_PAUSE_NS = 10_000_000


def elf() -> bytes:
    """The program as a static 64-bit ELF executable."""
    pause = struct.pack("<qq", 0, _PAUSE_NS)
    code = b"".join(
        [
            # again:
            b"\x31\xc0",  # xor eax, eax                       read
            b"\x31\xff",  # xor edi, edi                       from 0
            b"\xbe" + struct.pack("<I", _BUFFER_ADDRESS),  # mov esi, buffer
            b"\xba" + struct.pack("<I", _BUFFER_BYTES),  # mov edx, size
            b"\x0f\x05",  # syscall
            b"\x85\xc0",  # test eax, eax
            b"\x7e\x15",  # jle pause
            b"\x89\xc2",  # mov edx, eax
            b"\xbf\x01\x00\x00\x00",  # mov edi, 1
            b"\xbe" + struct.pack("<I", _BUFFER_ADDRESS),  # mov esi, buffer
            b"\xb8\x01\x00\x00\x00",  # mov eax, 1                write
            b"\x0f\x05",  # syscall
            b"\xeb\xd7",  # jmp again
            # pause:
            b"\xbf" + struct.pack("<I", _LOAD_ADDRESS + _HEADERS_BYTES),  # mov edi, 10 ms
            b"\x31\xf6",  # xor esi, esi
            b"\xb8\x23\x00\x00\x00",  # mov eax, 35               nanosleep
            b"\x0f\x05",  # syscall
            b"\xeb\xc7",  # jmp again
        ]
    )
    entry = _LOAD_ADDRESS + _HEADERS_BYTES + len(pause)
    numbers = (2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", *numbers)
    size = _HEADERS_BYTES + len(pause) + len(code)
    in_memory = _BUFFER_ADDRESS + _BUFFER_BYTES - _LOAD_ADDRESS
    segment = struct.pack("<IIQQQQQQ", 1, 7, 0, _LOAD_ADDRESS, _LOAD_ADDRESS, size, in_memory, 4096)
    return header + segment + pause + code
