"""The rate of this CPU's time stamp counter, which guests see as it is under emulation.

Linux cannot measure it in a microvm under TCG (there is no PIT to measure it against), so it is given. A wrong number
makes the guest's whole clock wrong: given 2.0 GHz on a CPU of 2.6 GHz, a second in the guest took 0.7 s.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import re
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

# Both clocks are read within a microsecond of each other: an error of some 20 ppm, two seconds a day.
MEASURE_S = 0.1
# rdtsc; shl rdx, 32; or rax, rdx; ret
_READ_TSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")


def tsc_khz() -> int:
    """Measured; where the host forbids executable memory (hardened kernels), what /proc/cpuinfo says. Blocking."""
    try:
        return _measured_khz()
    except OSError as error:
        log.info("The CPU's clock is taken from /proc/cpuinfo: %s", error)
        found = re.search(r"^cpu MHz\s*:\s*([0-9.]+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return round(float(found[1]) * 1000) if found else 2_000_000


def _measured_khz() -> int:
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as code:
        code.write(_READ_TSC)
        first = ctypes.c_char.from_buffer(code)
        read_tsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(first))
        try:
            start, start_ns = _both(read_tsc)
            time.sleep(MEASURE_S)
            end, end_ns = _both(read_tsc)
        finally:
            del read_tsc, first  # else the mapping could not be closed
    return round((end - start) * 1_000_000 / (end_ns - start_ns))


def _both(read_tsc: Callable[[], int]) -> tuple[int, int]:
    """The counter and the monotonic clock at the same moment: of several pairs the one read with the least delay."""
    pairs = []
    for _ in range(20):
        before = time.monotonic_ns()
        ticks = read_tsc()
        after = time.monotonic_ns()
        pairs.append((after - before, ticks, (before + after) // 2))
    _, ticks, at_ns = min(pairs)
    return ticks, at_ns
