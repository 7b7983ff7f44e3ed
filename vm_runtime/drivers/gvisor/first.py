"""What a machine runs first, as `python3 -I -S -c`: takes the guest archive from descriptor 0 and becomes its init.

The host sends four bytes, the archive's length, and the archive, a cpio of format newc (vm_runtime/guest/archive.py).
Then descriptors 0 and 1 are the wire; they are moved away, so that nothing else reads or prints there.
"""

import fcntl
import os
import sys

HEADER_BYTES, NAME, SIZE, NAME_SIZE = 110, 1, 6, 11  # of an entry, and which of its numbers are what (cpio(5))


def read(count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = os.read(0, count - len(data))
        if not more:
            sys.exit("The host has sent no guest archive.")
        data += more
    return data


def unpack(archive: bytes) -> None:
    position = 0
    while True:
        header = archive[position + 6 : position + HEADER_BYTES]
        numbers = [int(header[start : start + 8], 16) for start in range(0, len(header), 8)]
        name_at = position + HEADER_BYTES
        name = archive[name_at : name_at + numbers[NAME_SIZE] - 1].decode()
        content_at = -(-(name_at + numbers[NAME_SIZE]) // 4) * 4
        if name == "TRAILER!!!":
            return
        if numbers[NAME] & 0o040000:
            os.makedirs(f"/run/{name}", exist_ok=True)  # noqa: PTH103 - pathlib is imported for nothing else here
        else:
            with open(f"/run/{name}", "wb") as file:  # noqa: PTH123
                file.write(archive[content_at : content_at + numbers[SIZE]])
        position = -(-(content_at + numbers[SIZE]) // 4) * 4


unpack(read(int.from_bytes(read(4), "big")))
wire = (fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 100), fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 100))
null = os.open("/dev/null", os.O_RDONLY)
os.dup2(null, 0)
os.dup2(2, 1)
os.close(null)
sys.path.insert(0, "/run/hypercell/python")

from vm_runtime.guest.init import main  # noqa: E402 - it came just now

main(wire)
