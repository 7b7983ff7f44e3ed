"""Make another process execute system calls, through ptrace; for those that nobody can make on its behalf.

userfaultfd(2) and mmap(2) act on the address space of their caller and do not survive execve(2), so the VMM must make
them. x86-64 only. The thread is stopped for half a millisecond and 0.1 for each call, its registers are put back as
they were, and Linux restarts the system call it may have been in. If this process is killed in that time, the other one
crashes.

Knows nothing of memory or snapshots. Source: ptrace(2), `struct user_regs_struct` in <sys/user.h>.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vm_runtime.snapshots.errors import ProcessMemoryError

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

# A thread stops within microseconds unless it sleeps uninterruptibly in a driver.
_STOP_TIMEOUT_S = 1.0
_POLL_S = 0.0001
# Before it sleeps between its looks: a system call that was stepped into has often ended by then.
_EAGER_POLLS = 20

# (number, *arguments) -> result
Call = Callable[..., int]

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

    Raises ProcessMemoryError if the process is gone, cannot be traced, is busy with a signal just now, or if the call
    fails.
    """
    with calls_in_process(pid) as call:
        return call(number, *arguments)


@contextlib.contextmanager
def calls_in_process(pid: int) -> Iterator[Call]:
    """Stop the main thread of a process, to make any number of system calls in it: some 0.1 milliseconds each.

    Use it in the thread that entered it. Errors as of `call_in_process`, on entering and of each call; after the error
    of a call that began no other is possible.
    """
    site = _syscall_site(pid)
    with _tracing(pid):
        _ptrace(_PTRACE_SEIZE, pid)
    calls = _StoppedThread(pid, site)
    try:
        with _tracing(pid):
            _ptrace(_PTRACE_INTERRUPT, pid)
            calls.stop()
        yield calls.call
    finally:
        calls.let_go()


class _StoppedThread:
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
        pid = self._pid
        if self._saved is None:
            raise ProcessMemoryError(f"Process {pid} was interrupted and can make no more calls.")
        wanted = _Registers.from_buffer_copy(bytes(self._saved))
        wanted.rip, wanted.rax, wanted.orig_rax = self._site, number, _NO_SYSCALL
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
            setattr(wanted, name, value)
        with _tracing(pid):
            _ptrace(_PTRACE_SETREGS, pid, data=ctypes.addressof(wanted))
            _ptrace(_PTRACE_SINGLESTEP, pid)
            stop = _wait_stopped(pid)
            after = _get_registers(pid)
        if stop != signal.SIGTRAP or after.rip != self._site + len(_SYSCALL_INSTRUCTION):
            self._restore()
            self._pending_signal = 0 if stop == signal.SIGTRAP or stop >> 8 else stop
            raise ProcessMemoryError(f"Process {pid} was interrupted by signal {stop & 0xFF} just now.")
        result = ctypes.c_longlong(after.rax).value
        if result < 0:
            raise ProcessMemoryError(f"System call {number} failed in process {pid}: {os.strerror(-result)}.")
        return result

    def let_go(self) -> None:
        """Never raises: a process that is gone has nothing to be restored."""
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


def _wait_stopped(pid: int) -> int:
    """The status of the next stop. Never collects an exit status, which belongs to whoever started the process."""
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    polls = 0
    while time.monotonic() < deadline:
        found = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | _WALL)
        if found is not None:
            return found.si_status
        polls += 1
        if polls > _EAGER_POLLS:
            time.sleep(_POLL_S)
    raise ProcessMemoryError(f"Process {pid} did not stop within {_STOP_TIMEOUT_S} s.")


def _ptrace(request: int, pid: int, *, data: int = 0) -> None:
    if _libc.ptrace(request, pid, None, data) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
