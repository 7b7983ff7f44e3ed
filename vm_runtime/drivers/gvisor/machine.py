"""One running gVisor sandbox as a `Machine`: its pipes, its control socket and its end.

Does not start sandboxes (driver.py does) and knows no command line. A machine that is paused stands in two ways: gVisor
has stopped what runs in it, and its process is stopped, since an idle sandbox takes 3 % of a CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from vm_runtime.confinement.cgroups import Cgroup
from vm_runtime.confinement.process import Process, boot_id, start_time_ticks
from vm_runtime.drivers.base import MachinePlace
from vm_runtime.drivers.console import Tail, printable
from vm_runtime.drivers.gvisor.bundle import PANIC_FILE, control_socket
from vm_runtime.drivers.gvisor.control import Control
from vm_runtime.drivers.gvisor.death import Evidence, reason
from vm_runtime.drivers.gvisor.record import FILE_NAME, FORMAT_VERSION, MachineRecord
from vm_runtime.errors import MachineGoneError, VmmProtocolError
from vm_runtime.machine import Death, Machine, MemoryUsage
from vm_runtime.spec import MachineSpec
from vm_runtime.states import RunState, advance, require
from vm_runtime.wire.carriers import PipeCarrier

# Below the machine's run directory: what the guest reads the wire from, what it writes it to, and what it prints to.
IN_PIPE, OUT_PIPE, CONSOLE_PIPE = "in", "out", "console"
# runsc's own directory, which belongs to the machine's user.
RUNSC_DIRECTORY = "r"
# There while gVisor has stopped what runs in the machine, or is about to.
PAUSED_FILE = "paused"
_PANIC_BYTES = 4096
# The rest of a sandbox ends within a moment; a host with ten times the work that it has CPUs for takes seconds.
_END_LIMIT_S = 10.0
# A signal is delivered when a process next runs.
_STOP_LIMIT_S = 1.0
_PIPE_BYTES = 65536
_F_SETPIPE_SZ = 1031  # <linux/fcntl.h>
# As much as an unprivileged user may ask for (/proc/sys/fs/pipe-max-size): output of a cell that prints much.
_WIRE_BYTES = 1 << 20


class GvisorMachine(Machine):
    """Made by the driver, which hands over the process; everything ends with `kill()` or `detach()`."""

    def __init__(
        self, *, place: MachinePlace, spec: MachineSpec, process: Process, cgroup: Cgroup, state: RunState, console: int
    ) -> None:
        self.id = place.id
        self.spec = spec
        self.pid = process.pid
        self.place = place
        self._process = process
        self._cgroup = cgroup
        self._state = state
        self._console = _Console(console)
        self._control = Control(control_socket(place.run_dir / RUNSC_DIRECTORY))
        self._changing = asyncio.Lock()
        self._kill_requested = False
        self._death: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
        self._watcher = asyncio.create_task(self._watch(), name=f"end of {self.id}")

    # -- for the driver -------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Let it run what its image says. STARTING."""
        await self._whole(self._from_starting(self._control.start))

    async def restore(self, files: Callable[[], list[int]]) -> None:
        """Let it continue a state. STARTING. files: opens what `Control.restore` takes."""

        def restore() -> None:
            opened = files()
            try:
                self._control.restore(opened)
            finally:
                for fd in opened:
                    os.close(fd)

        await self._whole(self._from_starting(restore))

    async def save(self, files: Sequence[int]) -> None:
        """See `Control.save`. PAUSED."""
        await self._whole(self._save(files))

    async def _from_starting(self, call: Callable[[], None]) -> None:
        async with self._changing:
            require(self._state, RunState.STARTING)
            await self._ask(call)
            self._become(RunState.RUNNING)

    async def _save(self, files: Sequence[int]) -> None:
        async with self._changing:
            require(self._state, RunState.PAUSED)
            self._process.send_signal(signal.SIGCONT)
            try:
                await self._ask(self._control.save, files)
            finally:
                await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        """Stop the sandbox's process, and wait for it. Blocking."""
        self._process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + _STOP_LIMIT_S
        while not _stands(self.pid) and time.monotonic() < deadline:
            time.sleep(0.001)  # nothing tells when

    def write_record(self) -> None:
        """For a later `adopt`. Blocking."""
        MachineRecord(
            format=FORMAT_VERSION,
            pid=self.pid,
            start_time=start_time_ticks(self.pid) or 0,
            boot_id=boot_id(),
            memory_mib=self.spec.shape.memory_mib,
            vcpus=self.spec.shape.vcpus,
            disk_mib=self.spec.shape.disk_mib,
            image_digest=self.spec.image.digest,
            vmlinux=self.spec.image.vmlinux,
            initramfs=self.spec.image.initramfs,
            rootfs=self.spec.image.rootfs,
            cgroups=self._cgroup.directories,
        ).write(self.place.run_dir)

    @property
    def process(self) -> Process:
        return self._process

    # -- Machine --------------------------------------------------------------------------------------------------

    @property
    def state(self) -> RunState:
        return self._state

    async def open_wire(self) -> PipeCarrier:
        if self._state is RunState.DEAD:
            raise ConnectionResetError(f"Machine {self.id} has ended")
        reading = open_pipe(self.place.run_dir / OUT_PIPE, os.O_RDONLY)
        try:
            writing = open_pipe(self.place.run_dir / IN_PIPE, os.O_WRONLY)
        except BaseException:
            os.close(reading)
            raise
        return PipeCarrier(reading, writing)

    async def pause(self) -> None:
        await self._whole(self._pause())

    async def resume(self) -> None:
        await self._whole(self._resume())

    async def _pause(self) -> None:
        async with self._changing:
            require(self._state, RunState.RUNNING, RunState.PAUSED)
            if self._state is RunState.RUNNING:
                note = self.place.run_dir / PAUSED_FILE
                note.touch()
                try:
                    await self._ask(self._control.pause)
                except BaseException:
                    note.unlink(missing_ok=True)
                    raise
                await asyncio.to_thread(self._stop)
                self._become(RunState.PAUSED)

    async def _resume(self) -> None:
        async with self._changing:
            require(self._state, RunState.RUNNING, RunState.PAUSED)
            if self._state is RunState.PAUSED:
                self._process.send_signal(signal.SIGCONT)
                await self._ask(self._control.resume)
                (self.place.run_dir / PAUSED_FILE).unlink(missing_ok=True)
                self._become(RunState.RUNNING)

    def set_background(self, background: bool) -> None:
        self._cgroup.set_background(background)

    def memory_usage(self) -> MemoryUsage:
        require(self._state, RunState.STARTING, RunState.RUNNING, RunState.PAUSED)
        try:
            text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
            guest_bytes = _memory_file_bytes(self.pid)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise MachineGoneError(f"Machine {self.id} has just ended.") from error
        kib = {name: int(value) for name, value in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)}
        own_bytes = (kib["Anonymous"] + kib["Swap"]) << 10
        return MemoryUsage(unique_bytes=guest_bytes + own_bytes, shared_bytes=kib.get("Pss_File", 0) << 10)

    def serial_tail(self) -> str:
        return self._console.text()

    async def wait_dead(self) -> Death:
        return await asyncio.shield(self._death)

    async def kill(self) -> Death:
        if not self._death.done():
            self._kill_requested = True
            self._process.send_signal(signal.SIGKILL)
        death = await self.wait_dead()
        await asyncio.to_thread(remove_files, self.place, self._cgroup)
        return death

    async def detach(self) -> None:
        if not self._death.done():
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
            self._death.cancel()
            self._console.close()
            self._process.close()

    # -- inside ---------------------------------------------------------------------------------------------------

    async def _whole(self, change: Coroutine[Any, Any, None]) -> None:
        """Whoever is cancelled meanwhile: a change that has begun is finished, so that we know what it has led to."""
        await asyncio.shield(asyncio.create_task(change))

    async def _ask(self, call: Callable[..., None], *arguments: Any) -> None:
        """A call of the control socket. MachineGoneError if the sandbox has ended instead."""
        try:
            await asyncio.to_thread(call, *arguments)
        except VmmProtocolError as error:
            # One that broke its socket is about to be seen dead, with a better reason.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    raise MachineGoneError((await self.wait_dead()).reason) from error
            raise

    def _become(self, state: RunState) -> None:
        if self._state is RunState.DEAD:
            raise MachineGoneError(f"Machine {self.id} has just ended.")
        self._state = advance(self._state, state)

    async def _watch(self) -> None:
        ended = await self._process.wait()
        self._state = RunState.DEAD
        self._console.close()
        self._process.close()
        console = self.serial_tail()
        evidence = Evidence(
            requested=self._kill_requested,
            exit_status=ended.exit_status,
            signal=ended.signal,
            oom_kills=self._cgroup.oom_kills(),
            panic=_panic(self.place.run_dir / RUNSC_DIRECTORY / PANIC_FILE),
            console=console,
        )
        await asyncio.to_thread(remove_runtime_files, self.place, self._cgroup)
        self._death.set_result(
            Death(
                reason=reason(evidence),
                exit_status=ended.exit_status,
                signal=ended.signal,
                requested=self._kill_requested,
                serial_tail=console,
            )
        )


class _Console:
    """Reads what the guest prints, and keeps the last of it, so that whoever prints never waits for us."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._tail = Tail()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(fd, self._read)

    def _read(self) -> bool:
        try:
            data = os.read(self._fd, _PIPE_BYTES)
        except BlockingIOError:
            return False
        self._tail.add(data)
        if not data:
            self._loop.remove_reader(self._fd)
        return bool(data)

    def text(self) -> str:
        return printable(self._tail.data())

    def close(self) -> None:
        """After what is there has been read. Twice is harmless."""
        if self._fd >= 0:
            for _ in range(_WIRE_BYTES // _PIPE_BYTES):  # what a pipe holds at most
                if not self._read():
                    break
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1


def open_pipe(path: Path, flags: int) -> int:
    """An end of a named pipe, without waiting for the other one; there must be a reader if it is opened for writing."""
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    with contextlib.suppress(PermissionError):  # all that a user may have is taken: it is slower then
        fcntl.fcntl(fd, _F_SETPIPE_SZ, _WIRE_BYTES)
    return fd


def remove_runtime_files(place: MachinePlace, cgroup: Cgroup) -> None:
    """All that a dead sandbox has had. Twice is harmless. Blocking."""
    for name in (IN_PIPE, OUT_PIPE, CONSOLE_PIPE, PAUSED_FILE, FILE_NAME, f".{FILE_NAME}"):
        with contextlib.suppress(NotADirectoryError):
            (place.run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(place.run_dir / RUNSC_DIRECTORY, ignore_errors=True)
    _end_rest(cgroup)
    with contextlib.suppress(OSError):  # somebody else's files may lie there
        place.run_dir.rmdir()
    cgroup.remove()


def _end_rest(cgroup: Cgroup) -> None:
    """End what is left of a dead sandbox: a process for each of the guest's, which end a while after it. Blocking."""
    deadline = time.monotonic() + _END_LIMIT_S
    for file in map(Path, cgroup.process_files):
        while time.monotonic() < deadline:
            try:
                pids = [int(pid) for pid in file.read_text().split()]
            except FileNotFoundError:
                break
            if not pids:
                break
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)  # nothing tells when a group is empty (version 1)


def remove_files(place: MachinePlace, cgroup: Cgroup) -> None:
    """Everything of a dead machine. Twice is harmless. Blocking."""
    remove_runtime_files(place, cgroup)
    with contextlib.suppress(OSError):
        place.disk_dir.rmdir()


def _memory_file_bytes(pid: int) -> int:
    """What the guest has written: gVisor keeps its memory, and files that are not the image's, in one memory file."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if "memfd:runsc-memory" in os.readlink(fd):  # noqa: PTH115 - pathlib's keeps no text behind the name
                return fd.stat().st_blocks * 512
    return 0


def _stands(pid: int) -> bool:
    """Whether a process is stopped, or has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] in "TtZX"


def _panic(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return printable(file.read(_PANIC_BYTES)).strip()
    except OSError:
        return ""
