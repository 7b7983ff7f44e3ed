"""A fake machine: the process tree of its agent, and how to find it again (`machine.json`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from pathlib import Path

from tests.fake_driver import tree
from vm_runtime.confinement.process import Process
from vm_runtime.drivers.base import MachinePaths
from vm_runtime.errors import MachineGoneError
from vm_runtime.machine import Death, Machine, MemoryUsage
from vm_runtime.records import Record
from vm_runtime.spec import ImageFiles, MachineShape, MachineSpec
from vm_runtime.states import RunState, advance, require
from vm_runtime.wire.carriers import SocketCarrier

WIRE_SOCKET = "wire.sock"
CONSOLE_FILE = "console"
# Directories of the agent below the machine's run directory, and of the user below its disk directory.
GUEST_DIRECTORY = "g"
HOME_DIRECTORY = "home"
CONSOLE_TAIL_BYTES = 16384


class FakeRecord(Record):
    """pid with start_time (ticks since boot) and boot_id name the process."""

    file_name = "machine.json"

    pid: int
    start_time: int
    boot_id: str
    memory_mib: int
    vcpus: int
    disk_mib: int
    image_digest: str
    vmlinux: Path
    initramfs: Path
    rootfs: Path

    @property
    def spec(self) -> MachineSpec:
        return MachineSpec(
            shape=MachineShape(memory_mib=self.memory_mib, vcpus=self.vcpus, disk_mib=self.disk_mib),
            image=ImageFiles(
                digest=self.image_digest, vmlinux=self.vmlinux, initramfs=self.initramfs, rootfs=self.rootfs
            ),
        )


class FakeMachine(Machine):
    """Made by the driver, which hands over the process. It runs from the beginning, unless it was found paused."""

    def __init__(self, *, paths: MachinePaths, spec: MachineSpec, process: Process, state: RunState) -> None:
        self.id = paths.id
        self.spec = spec
        self.pid = process.pid
        self.paths = paths
        self._process = process
        self._state = state
        self._kill_requested = False
        self._death: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
        self._watcher = asyncio.create_task(self._watch(), name=f"end of {self.id}")

    @property
    def state(self) -> RunState:
        return self._state

    async def open_wire(self) -> SocketCarrier:
        return await SocketCarrier.connect_unix(self.paths.run_dir / WIRE_SOCKET)

    async def pause(self) -> None:
        require(self._state, RunState.RUNNING, RunState.PAUSED)
        await asyncio.to_thread(tree.stop, self.pid)
        self._become(RunState.PAUSED)

    async def resume(self) -> None:
        require(self._state, RunState.RUNNING, RunState.PAUSED)
        await asyncio.to_thread(tree.resume, self.pid)
        self._become(RunState.RUNNING)

    def set_background(self, background: bool) -> None:
        """Nothing: its CPUs are not limited."""

    def memory_usage(self) -> MemoryUsage:
        require(self._state, RunState.RUNNING, RunState.PAUSED)
        own_bytes, shared_bytes = tree.memory_bytes(self.pid)
        return MemoryUsage(unique_bytes=own_bytes, shared_bytes=shared_bytes)

    def serial_tail(self) -> str:
        try:
            data = (self.paths.run_dir / CONSOLE_FILE).read_bytes()
        except FileNotFoundError:
            return ""
        text = data[-CONSOLE_TAIL_BYTES:].decode(errors="replace")
        return "".join(character for character in text if character.isprintable() or character == "\n")

    async def wait_dead(self) -> Death:
        return await asyncio.shield(self._death)

    async def kill(self) -> Death:
        if not self._death.done():
            self._kill_requested = True
            # A machine ends with all that runs in it: its agent must not report how the others ended before.
            self._process.send_signal(signal.SIGSTOP)
            # Where there is no pid namespace, what a cell has started would live on.
            for pid in await asyncio.to_thread(tree.pids, self.pid):
                if pid != self.pid:
                    await asyncio.to_thread(_kill, pid)
            self._process.send_signal(signal.SIGKILL)
        death = await self.wait_dead()
        await asyncio.to_thread(remove_files, self.paths)
        return death

    async def detach(self) -> None:
        if not self._death.done():
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
            self._death.cancel()
            self._process.close()

    def _become(self, state: RunState) -> None:
        if self._state is RunState.DEAD:
            raise MachineGoneError(f"Machine {self.id} has just ended.")
        if self._state is not state:
            self._state = advance(self._state, state)

    async def _watch(self) -> None:
        ended = await self._process.wait()
        self._state = RunState.DEAD
        self._process.close()
        if self._kill_requested:
            reason = "It was ended on request."
        elif ended.signal is not None:
            reason = f"Its process was ended by {signal.Signals(ended.signal).name}."
        elif ended.exit_status is not None:
            reason = f"Its process ended with status {ended.exit_status}."
        else:
            reason = "Its process ended; nobody could see how."
        self._death.set_result(
            Death(
                reason=reason,
                exit_status=ended.exit_status,
                signal=ended.signal,
                requested=self._kill_requested,
                serial_tail=self.serial_tail(),
            )
        )


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def remove_files(paths: MachinePaths) -> None:
    """Everything that a dead machine has left. Twice is harmless. Blocking."""
    FakeRecord.remove(paths.run_dir)
    for name in (WIRE_SOCKET, CONSOLE_FILE):
        (paths.run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(paths.run_dir / GUEST_DIRECTORY, ignore_errors=True)
    shutil.rmtree(paths.disk_dir / HOME_DIRECTORY, ignore_errors=True)
    for directory in (paths.run_dir, paths.disk_dir):
        with contextlib.suppress(OSError):  # somebody else's files may lie there
            directory.rmdir()
