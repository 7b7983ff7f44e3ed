"""Make another process execute system calls, through ptrace; for those that nobody can make on its behalf.

userfaultfd(2) and mmap(2) act on the address space of their caller and do not survive execve(2), so the VMM must make
them. x86-64 only. The thread is stopped for half a millisecond and 0.1 for each call, or 0.01 for each of many; its
registers are put back as they were, and Linux restarts the system call it may have been in. If this process is killed
in that time, the other one crashes.

Knows nothing of memory or snapshots. Source: ptrace(2), `struct user_regs_struct` in <sys/user.h>.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import signal
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from vm_runtime.snapshots.errors import ProcessMemoryError

_PTRACE_CONT = 7
_PTRACE_SINGLESTEP = 9
_PTRACE_GETREGS = 12
_PTRACE_SETREGS = 13
_PTRACE_DETACH = 17
_PTRACE_SEIZE = 0x4206
_PTRACE_INTERRUPT = 0x4207
_WALL = 0x40000000
# What waitid reports for the stop that PTRACE_INTERRUPT asked for: SIGTRAP | PTRACE_EVENT_STOP << 8.
_INTERRUPTED = signal.SIGTRAP | 128 << 8

_SYSCALL_INSTRUCTION = b"\x0f\x05"
_NO_SYSCALL = 2**64 - 1
_NO_FILE = 2**64 - 1

# A thread stops within microseconds unless it sleeps uninterruptibly in a driver.
_STOP_TIMEOUT_S = 1.0
# Thousands of calls in a row, on a host with more to do.
_ROW_TIMEOUT_S = 10.0
_POLL_S = 0.0001
# Before it sleeps between its looks: a system call that was stepped into has often ended by then.
_EAGER_POLLS = 20

_NR_MMAP, _NR_MPROTECT, _NR_MUNMAP = 9, 10, 11  # x86-64

# The six arguments of one call of a row, and the code that makes the calls: from the table at r12, r13 of them, number
# r14, until one fails.
_ARGUMENTS = struct.Struct("<6Q")
_ROW_CODE = bytes.fromhex(
    "4d85ed"  # next: test r13, r13
    "7433"  # jz done
    "4c89f0"  # mov rax, r14
    "498b3c24"  # mov rdi, [r12]
    "498b742408"  # mov rsi, [r12 + 8]
    "498b542410"  # mov rdx, [r12 + 16]
    "4d8b542418"  # mov r10, [r12 + 24]
    "4d8b442420"  # mov r8, [r12 + 32]
    "4d8b4c2428"  # mov r9, [r12 + 40]
    "0f05"  # syscall
    "483d01f0ffff"  # cmp rax, -4095
    "7309"  # jae done (an error number)
    "4983c430"  # add r12, 48
    "49ffcd"  # dec r13
    "ebc8"  # jmp next
    "cc"  # done: int3
)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


_REGISTER_NAMES = (
    "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi "
    "orig_rax rip cs eflags rsp ss fs_base gs_base ds es fs gs"
)


class _Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in _REGISTER_NAMES.split()]


def can_inject() -> bool:
    """Whether this machine's registers are known here."""
    return platform.machine() == "x86_64" and ctypes.sizeof(ctypes.c_void_p) == 8


def call_in_process(pid: int, number: int, *arguments: int) -> int:
    """Result of a system call made by the main thread of a process; blocks this thread for about half a millisecond.

    Raises ProcessMemoryError if the process has ended, cannot be traced, is busy with a signal just now, or if the call
    fails.
    """
    with calls_in_process(pid) as thread:
        return thread.call(number, *arguments)


@contextlib.contextmanager
def calls_in_process(pid: int) -> Iterator[StoppedThread]:
    """Stop the main thread of a process, to make any number of system calls in it.

    Use it in the thread that entered it. Errors as of `call_in_process`, on entering and of each call; after the error
    of a call that began no other is possible.
    """
    site = _syscall_site(pid)
    with _tracing(pid):
        _ptrace(_PTRACE_SEIZE, pid)
    thread = StoppedThread(pid, site)
    try:
        with _tracing(pid):
            _ptrace(_PTRACE_INTERRUPT, pid)
            thread.stop()
        yield thread
    finally:
        thread.detach()


class StoppedThread:
    """From `calls_in_process`."""

    def __init__(self, pid: int, site: int) -> None:
        self._pid = pid
        self._site = site
        self._saved: _Registers | None = None
        self._pending_signal = 0

    def stop(self) -> None:
        stop = _wait_stopped(self._pid)
        if stop != _INTERRUPTED:
            self._pending_signal = stop & 0xFF
            raise ProcessMemoryError(f"Process {self._pid} is handling signal {self._pending_signal} just now.")
        self._saved = _get_registers(self._pid)

    def call(self, number: int, *arguments: int) -> int:
        """The result of a system call: 0.1 milliseconds."""
        registers = dict(zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False))
        end = self._site + len(_SYSCALL_INSTRUCTION)
        after = self._run(_PTRACE_SINGLESTEP, end, _STOP_TIMEOUT_S, rip=self._site, rax=number, **registers)
        return self._result(number, after)

    def call_each(self, number: int, calls: Sequence[tuple[int, ...]]) -> None:
        """The same system call with these arguments (six for each), one after the other: 0.01 milliseconds each. Those
        before one that fails are made."""
        if not calls:
            return
        code_bytes = -len(_ROW_CODE) % mmap.PAGESIZE + len(_ROW_CODE)
        table = b"".join(_ARGUMENTS.pack(*arguments) for arguments in calls)
        size = code_bytes + len(table)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        code = self.call(_NR_MMAP, 0, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, _NO_FILE, 0)
        with _tracing(self._pid), Path(f"/proc/{self._pid}/mem").open("r+b", buffering=0) as memory:
            os.pwrite(memory.fileno(), _ROW_CODE, code)
            os.pwrite(memory.fileno(), table, code + code_bytes)
        self.call(_NR_MPROTECT, code, size, mmap.PROT_READ | mmap.PROT_EXEC)
        after = self._run(
            _PTRACE_CONT, code + len(_ROW_CODE), _ROW_TIMEOUT_S,
            rip=code, r12=code + code_bytes, r13=len(calls), r14=number,
        )  # fmt: skip
        self.call(_NR_MUNMAP, code, size)
        if after.r13:
            self._result(number, after)

    def _run(self, request: int, end: int, timeout_s: float, **registers: int) -> _Registers:
        """The registers when it has stopped by itself with its instruction pointer at `end`."""
        pid = self._pid
        if self._saved is None:
            raise ProcessMemoryError(f"Process {pid} was interrupted and can make no more calls.")
        wanted = _Registers.from_buffer_copy(bytes(self._saved))
        wanted.orig_rax = _NO_SYSCALL
        for name, value in registers.items():
            setattr(wanted, name, value)
        with _tracing(pid):
            _ptrace(_PTRACE_SETREGS, pid, data=ctypes.addressof(wanted))
            _ptrace(request, pid)
            stop = _wait_stopped(pid, timeout_s)
            after = _get_registers(pid)
        if stop != signal.SIGTRAP or after.rip != end:
            self._restore()
            self._pending_signal = 0 if stop == signal.SIGTRAP or stop >> 8 else stop
            raise ProcessMemoryError(f"Process {pid} was interrupted by signal {stop & 0xFF} just now.")
        return after

    def _result(self, number: int, after: _Registers) -> int:
        result = ctypes.c_longlong(after.rax).value
        if result < 0:
            raise ProcessMemoryError(f"System call {number} failed in process {self._pid}: {os.strerror(-result)}.")
        return result

    def detach(self) -> None:
        """Never raises: a process that has ended has nothing to be restored."""
        with contextlib.suppress(OSError):
            self._restore()
        _libc.ptrace(_PTRACE_DETACH, self._pid, None, self._pending_signal)

    def _restore(self) -> None:
        saved, self._saved = self._saved, None
        if saved is not None:
            _ptrace(_PTRACE_SETREGS, self._pid, data=ctypes.addressof(saved))


@contextlib.contextmanager
def _tracing(pid: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ProcessMemoryError(f"Process {pid} cannot be traced: {error.strerror}.") from error


def _syscall_site(pid: int) -> int:
    """Address of a system call instruction in the process; the vDSO always has one."""
    try:
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            if line.endswith("[vdso]"):
                start, end = (int(part, 16) for part in line.split(None, 1)[0].split("-"))
                with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
                    position = os.pread(memory.fileno(), end - start, start).find(_SYSCALL_INSTRUCTION)
                if position >= 0:
                    return start + position
    except OSError as error:
        raise ProcessMemoryError(f"The memory of process {pid} cannot be read: {error.strerror}.") from error
    raise ProcessMemoryError(f"Process {pid} has no vDSO.")


def _get_registers(pid: int) -> _Registers:
    registers = _Registers()
    _ptrace(_PTRACE_GETREGS, pid, data=ctypes.addressof(registers))
    return registers


def _wait_stopped(pid: int, timeout_s: float = _STOP_TIMEOUT_S) -> int:
    """The status of the next stop. Never collects an exit status, which belongs to whoever started the process."""
    deadline = time.monotonic() + timeout_s
    polls = 0
    while time.monotonic() < deadline:
        found = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | _WALL)
        if found is not None:
            return found.si_status
        polls += 1
        if polls > _EAGER_POLLS:
            time.sleep(_POLL_S)
    raise ProcessMemoryError(f"Process {pid} did not stop within {timeout_s} s.")


def _ptrace(request: int, pid: int, *, data: int = 0) -> None:
    if _libc.ptrace(request, pid, None, data) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
