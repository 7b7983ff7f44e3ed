"""A guest of some eighty bytes: a PVH kernel that runs wherever a CPU executes, also in a KVM that hangs Linux.

Made of bytes here, no assembler needed. It knows nothing and can be told nothing. Starts in 32-bit protected mode
without paging (the PVH entry, Xen's docs/misc/pvh.markdown) and for ever

    * adds one to the 32-bit counter at COUNTER_ADDRESS, and after every 65,536 rounds
    * writes one byte into the next of PAGES_WRITTEN pages from PAGES_ADDRESS on, and
    * writes `BEAT` to COM1.
"""

from __future__ import annotations

import struct

LOAD_ADDRESS = 0x100000
COUNTER_ADDRESS = 0x200000
PAGES_ADDRESS = 0x400000
PAGES_WRITTEN = 64
BEAT = b"."

_COM1 = 0x3F8
# The sleep control register of microvm's ACPI device (QEMU: include/hw/i386/microvm.h, GED_MMIO_BASE_REGS).
_SLEEP_CONTROL = 0xFEA00200
_SLEEP_ENABLE = 0x20
_SLEEP_TYPE_S5 = 5 << 2
_ROUNDS_MASK = 0xFFFF
_XEN_ELFNOTE_PHYS32_ENTRY = 18


def _code() -> bytes:
    counter = struct.pack("<I", COUNTER_ADDRESS)
    return b"".join(
        [
            b"\x31\xdb",  # xor ebx, ebx                   page number
            # loop:
            b"\xff\x05" + counter,  # inc dword [COUNTER]
            b"\xa1" + counter,  # mov eax, [COUNTER]
            b"\xa9" + struct.pack("<I", _ROUNDS_MASK),  # test eax, MASK
            b"\x75\xee",  # jnz loop
            b"\x89\xd9",  # mov ecx, ebx
            b"\xc1\xe1\x0c",  # shl ecx, 12
            b"\x88\x99" + struct.pack("<I", PAGES_ADDRESS),  # mov [ecx + PAGES], bl
            b"\x43",  # inc ebx
            b"\x83\xe3" + struct.pack("<B", PAGES_WRITTEN - 1),  # and ebx, PAGES_WRITTEN - 1
            b"\x66\xba" + struct.pack("<H", _COM1),  # mov dx, COM1
            b"\xb0" + BEAT,  # mov al, BEAT
            b"\xee",  # out dx, al
            b"\xeb",  # jmp loop
        ]
    )


def elf() -> bytes:
    """The kernel as a 32-bit ELF executable with the PVH note that QEMU looks for."""
    code = _code()
    code += struct.pack("<b", 2 - (len(code) + 1))  # back to loop, which is at 2
    note = struct.pack("<III", 4, 4, _XEN_ELFNOTE_PHYS32_ENTRY) + b"Xen\0" + struct.pack("<I", LOAD_ADDRESS)
    headers = 52 + 2 * 32
    note_offset = headers
    code_offset = note_offset + len(note)
    header = b"\x7fELF" + bytes([1, 1, 1]) + bytes(9)
    header += struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, LOAD_ADDRESS, 52, 0, 0, 52, 32, 2, 0, 0, 0)
    load = struct.pack("<8I", 1, code_offset, LOAD_ADDRESS, LOAD_ADDRESS, len(code), len(code), 7, 1)
    notes = struct.pack("<8I", 4, note_offset, 0, 0, len(note), len(note), 4, 4)
    return header + load + notes + note + code


def exiting_elf() -> bytes:
    """The same kind of kernel, which powers the machine off at once."""
    power_off = struct.pack("<BBIB", 0xC6, 0x05, _SLEEP_CONTROL, _SLEEP_ENABLE | _SLEEP_TYPE_S5)  # mov byte [..], ..
    return elf_with(power_off + b"\xf4\xeb\xfd")  # hlt; jmp to it


def elf_with(code: bytes) -> bytes:
    """An ELF like that of `elf()` around other code, entered at its first byte."""
    whole = elf()
    prefix = whole[: len(whole) - (len(_code()) + 1)]
    sizes = struct.pack("<II", len(code), len(code))
    place = 52 + 16
    return prefix[:place] + sizes + prefix[place + 8 :] + code
