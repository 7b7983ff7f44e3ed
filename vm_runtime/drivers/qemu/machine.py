"""One running QEMU as a `Machine`: its control socket, its consoles, its memory and its end.

Does not start QEMU (driver.py does) and knows no command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vm_runtime.confinement.cgroups import Cgroup
from vm_runtime.confinement.process import Process
from vm_runtime.drivers.base import MachinePlace
from vm_runtime.drivers.console import Tail, printable
from vm_runtime.drivers.qemu import qcow2
from vm_runtime.drivers.qemu.arguments import DiskFile, lower_node, overlay_node
from vm_runtime.drivers.qemu.death import Evidence, reason
from vm_runtime.drivers.qemu.lending import may_lend
from vm_runtime.drivers.qemu.qmp import Qmp
from vm_runtime.drivers.qemu.record import MachineRecord
from vm_runtime.errors import MachineError, MachineGoneError, VmmCommandError, VmmProtocolError
from vm_runtime.files import closing, opened
from vm_runtime.machine import Death, MemoryUsage
from vm_runtime.paged.machine import MemoryMapping, PagedMachine
from vm_runtime.snapshots.pages import find_mapping
from vm_runtime.states import RunState, advance, require
from vm_runtime.wire.carriers import SocketCarrier

QMP_SOCKET = "qmp.sock"
WIRE_SOCKET = "wire.sock"
SERIAL_SOCKET = "serial.sock"

# A server takes one client, and notices that the earlier one has gone when its main loop runs.
_CONNECT_TIMEOUT_S = 10.0
# A VMM that ends by itself closes its control socket first; one that lives on without it is ended then.
_END_TIMEOUT_S = 2.0
# What the guest or VMM printed before it died is in the pipes already; reading it must not take longer than this.
_DRAIN_TIMEOUT_S = 0.5

# Numbers of descriptor sets, below 2**31: the command line's from 1 on; the overlay `disk7` has FIRST_OVERLAY_FDSET +
# 7; the files under the overlays, when they were replaced for the n-th time, _LOWER_FDSET + n * _LOWER_FDSETS and on.
ROOT_FDSET = 1
_DEVICE_STATE_FDSET = 10_000
_LENT_FDSET = 10_001
FIRST_OVERLAY_FDSET = 1 << 20
_LOWER_FDSET = 1 << 30
_LOWER_FDSETS = 512
# The name of the descriptor from which a clone loads its device state.
_DEVICE_FD_NAME = "device"


class QemuMachine(PagedMachine):
    """Made by the driver, which hands over process, sockets and memory; everything ends with `kill()` or `detach()`."""

    def __init__(
        self, *, place: MachinePlace, record: MachineRecord, process: Process, cgroup: Cgroup, memory_fd: int | None
    ) -> None:
        self.id = place.id
        self.spec = record.spec
        self.pid = record.pid
        self.place = place
        self._record = record
        self._process = process
        self._cgroup = cgroup
        self._memory_fd = memory_fd
        self._state = RunState.STARTING
        self._qmp: Qmp | None = None
        self._ran = asyncio.Event()
        self._serial = Tail()
        self._stderr = Tail()
        self._shutdown_reason: str | None = None
        self._guest_panicked = False
        self._kill_requested = False
        self._control_lost: str | None = None
        self._guard: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._death: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
        self._disk_lock = asyncio.Lock()
        self._removed_fdsets: set[int] = set()

    # -- made and let go by the driver ----------------------------------------------------------------------------

    def watch(self, *, stderr: socket.socket | None) -> None:
        """Begin to read the consoles and to wait for the end. First call; takes over the socket."""
        if stderr is not None:
            self._tasks.append(asyncio.create_task(_drain(stderr, self._stderr), name=f"stderr of {self.id}"))
        serial = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            serial.connect(str(self.place.run_dir / SERIAL_SOCKET))
        except (OSError, BlockingIOError):
            serial.close()  # it is dead already, which the watcher is about to see
        else:
            self._tasks.append(asyncio.create_task(_drain(serial, self._serial), name=f"serial of {self.id}"))
        self._watcher = asyncio.create_task(self._watch(), name=f"end of {self.id}")

    async def connect(self, *, timeout_s: float = _CONNECT_TIMEOUT_S) -> Qmp:
        """Open the control socket. MachineGoneError if the VMM died instead."""
        connecting = asyncio.create_task(
            Qmp.connect(self.place.run_dir / QMP_SOCKET, self._on_event, timeout_s=timeout_s)
        )
        try:
            await asyncio.wait([connecting, self._watcher], return_when=asyncio.FIRST_COMPLETED)
            if not connecting.done() or connecting.exception() is not None:
                if self._watcher.done():
                    death = await self.wait_dead()
                    raise MachineGoneError(death.reason)
                error = connecting.exception()
                if not isinstance(error, TimeoutError):
                    # A VMM that closed its socket is about to be seen dead, with a better reason.
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                            death = await self.wait_dead()
                            raise MachineGoneError(death.reason) from error
                raise MachineError(f"The control socket of machine {self.id} does not answer: {error!r}") from error
            self._qmp = connecting.result()
            self._guard = asyncio.create_task(self._end_without_control(self._qmp), name=f"control of {self.id}")
            return self._qmp
        finally:
            if not connecting.done():
                connecting.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await connecting

    def become(self, state: RunState) -> None:
        """Note the state the VMM was found or put in."""
        if self._state is not state:
            self._state = advance(self._state, state)
            if state is RunState.RUNNING:
                self._ran.set()

    def become_running_if_starting(self) -> None:
        """After `cont` was answered, whose event may come before or after."""
        if self._state is RunState.STARTING:
            self.become(RunState.RUNNING)

    def adopted(self, *, running: bool) -> None:
        """Note the state in which another process left it."""
        if self._state is RunState.STARTING:
            self.become(RunState.RUNNING if running else RunState.PAUSED)

    async def wait_serial(self, text: str, *, timeout_s: float) -> bool:
        """Wait until the guest has printed this; False if it died or the time is over. For probes of the host."""
        needle = text.encode()
        try:
            async with asyncio.timeout(timeout_s):
                while needle not in self._serial.data():
                    if self._death.done():
                        return False
                    await self._serial.wait_more(self._watcher)
        except TimeoutError:
            return False
        return True

    async def wait_running(self) -> None:
        """Wait until the VMM says that its vCPUs run, after an incoming device state. MachineGoneError if it died."""
        ran = asyncio.create_task(self._ran.wait())
        try:
            await asyncio.wait([ran, self._watcher], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ran.cancel()
        if not self._ran.is_set():
            raise MachineGoneError((await self.wait_dead()).reason)

    # -- Machine --------------------------------------------------------------------------------------------------

    @property
    def state(self) -> RunState:
        return self._state

    async def open_wire(self) -> SocketCarrier:
        return await SocketCarrier.connect_unix(self.place.run_dir / WIRE_SOCKET)

    @property
    def memory_fd(self) -> int | None:
        return self._memory_fd

    @property
    def disk_chain(self) -> tuple[Path, ...]:
        return self._record.disk_chain

    @property
    def disk_written(self) -> bool:
        # Every first write to a cluster makes the file longer; a stopped QEMU has written its tables out.
        written = self._record.disk_chain[-1].stat().st_size
        return written != qcow2.overlay_size(self.spec.shape.disk_mib << 20)

    async def pause(self) -> None:
        require(self._state, RunState.RUNNING, RunState.PAUSED)
        await self._execute("stop")
        self.become(RunState.PAUSED)

    async def resume(self) -> None:
        require(self._state, RunState.RUNNING, RunState.PAUSED)
        await self._execute("cont")
        self.become(RunState.RUNNING)
        removed, self._removed_fdsets = self._removed_fdsets, set()
        await self._remove_descriptors(removed)

    def set_background(self, background: bool) -> None:
        self._cgroup.set_background(background)

    async def device_state(self) -> int:
        require(self._state, RunState.PAUSED)
        # A memfd always has room: QEMU 7.2 leaks its descriptor when it cannot write.
        fd = os.memfd_create("hypercell-device", os.MFD_CLOEXEC)
        try:
            with opened(f"/proc/self/fd/{fd}", os.O_WRONLY) as write_only:  # as QEMU asks the set for it
                await self._execute("add-fd", {"fdset-id": _DEVICE_STATE_FDSET}, descriptors=(write_only,))
            try:
                # Works on every machine type although it is Xen's; live=false keeps the disks open for resume().
                arguments = {"filename": f"/dev/fdset/{_DEVICE_STATE_FDSET}", "live": False}
                await self._execute("xen-save-devices-state", arguments)
            finally:
                await self._remove_descriptors({_DEVICE_STATE_FDSET})
        except BaseException:
            os.close(fd)
            raise
        return fd

    def memory_mapping(self) -> MemoryMapping:
        require(self._state, RunState.STARTING, RunState.RUNNING, RunState.PAUSED)
        length = self.spec.shape.memory_mib << 20
        address = find_mapping(self.pid, inode=self._record.memory_inode, size_bytes=length)
        return MemoryMapping(address=address, length=length, private=self._record.memory_fd is None)

    async def freeze_disk(self, new_overlay: Path) -> Path:
        require(self._state, RunState.RUNNING, RunState.PAUSED)
        async with self._disk_lock:
            record = self._record
            node, fdset = _next_node(record)
            qcow2.create_overlay(new_overlay, virtual_bytes=self.spec.shape.disk_mib << 20)
            self._set_record(next_overlay=new_overlay)
            try:
                file = DiskFile(fdset=fdset, format="qcow2")
                await self.add_disk_descriptors(file, new_overlay, writable=True)
                await self._execute("blockdev-add", overlay_node(node, file))
                await self._execute("blockdev-snapshot", {"node": record.disk_node, "overlay": node})
            except BaseException:
                self._set_record(next_overlay=None)
                os.unlink(new_overlay)  # noqa: PTH108 - at once, so that no cancellation comes between
                raise
            self._set_record(
                disk_chain=(*record.disk_chain, new_overlay), disk_node=node, overlay=new_overlay, next_overlay=None
            )
            return record.disk_chain[-1]

    async def settle_disk(self) -> None:
        """Finish or undo a freeze of the disk in which an earlier gateway was killed. After `adopted`."""
        record = self._record
        new_overlay = record.next_overlay
        if new_overlay is None:
            return
        node, fdset = _next_node(record)
        if any(each.get("inserted", {}).get("node-name") == node for each in await self._execute("query-block")):
            self._set_record(
                disk_chain=(*record.disk_chain, new_overlay), disk_node=node, overlay=new_overlay, next_overlay=None
            )
            return
        await self._delete_node(node)
        await self._remove_descriptors({fdset})
        self._set_record(next_overlay=None)
        new_overlay.unlink(missing_ok=True)

    def _set_record(self, **changes: Any) -> None:
        self._record = self._record.model_copy(update=changes)
        self._record.write(self.place.run_dir)

    async def rebase_disk(self, lower: Sequence[Path], *, keep: int) -> None:
        require(self._state, RunState.RUNNING, RunState.PAUSED)
        async with self._disk_lock:
            record = self._record
            first = _number(record.disk_node) - keep + 1
            generation = record.disk_lower + 1
            self._set_record(disk_lower=generation)  # whatever comes of it, its names are not used again
            name, fdset = _lower_node(generation), _LOWER_FDSET + generation * _LOWER_FDSETS
            files = [
                DiskFile(fdset=fdset + number, format="qcow2" if number else "raw") for number in range(len(lower))
            ]
            try:
                for file, path in zip(files, lower, strict=True):
                    await self.add_disk_descriptors(file, path, writable=False)
                await self._execute("blockdev-add", lower_node(name, files))
                overlay = DiskFile(fdset=FIRST_OVERLAY_FDSET + first, format="qcow2")
                node = overlay_node(f"disk{first}", overlay, writable=keep == 1, backing=name)
                await self._execute("blockdev-reopen", {"options": [node]})
            except BaseException:
                with contextlib.suppress(MachineError, VmmProtocolError):  # of what has not come so far; or it died
                    await self._delete_node(name)
                    await self._remove_descriptors({file.fdset for file in files})
                raise
            self._set_record(disk_chain=(*lower, *record.disk_chain[-keep:]), disk_floor=first)
            for number in reversed(range(record.disk_floor, first)):
                await self._delete_node(f"disk{number}")
            # Also that of an attempt in which an earlier gateway was killed.
            for number in (generation - 1, generation - 2):
                await self._delete_node(_lower_node(number))
            overlays = {FIRST_OVERLAY_FDSET + number for number in range(first, first + keep)}
            used = {ROOT_FDSET, _LENT_FDSET, _DEVICE_STATE_FDSET, *overlays, *(file.fdset for file in files)}
            await self._remove_descriptors({each["fdset-id"] for each in await self._execute("query-fdsets")} - used)

    async def _delete_node(self, name: str) -> None:
        with contextlib.suppress(VmmCommandError):  # there is none
            await self._execute("blockdev-del", {"node-name": name})

    async def _remove_descriptors(self, fdsets: Iterable[int]) -> None:
        """QEMU closes what is removed only while the machine runs (monitor_fdset_cleanup); `resume` removes it."""
        if self._state is not RunState.RUNNING:
            self._removed_fdsets.update(fdsets)
            return
        for fdset in fdsets:
            with contextlib.suppress(VmmCommandError):  # a set is gone with its last descriptor
                await self._execute("remove-fd", {"fdset-id": fdset})

    async def load_state(self, device: Path) -> None:
        """Load the state of CPUs and devices into a VMM that waits for it; answers when it runs."""
        with opened(device) as fd:
            await self._execute("getfd", {"fdname": _DEVICE_FD_NAME}, descriptors=(fd,))
        await self._execute("migrate-incoming", {"uri": f"fd:{_DEVICE_FD_NAME}"})
        await self.wait_running()

    async def add_disk_descriptors(self, file: DiskFile, path: Path, *, writable: bool) -> None:
        """Let the VMM open a file that it cannot see, for reading and, if asked, for writing. BrokenSnapshotError."""
        for flags in (os.O_RDONLY, os.O_RDWR) if writable else (os.O_RDONLY,):
            with closing(open_disk(path, flags, format=file.format)) as fd:
                await self._execute("add-fd", {"fdset-id": file.fdset}, descriptors=(fd,))

    @contextlib.asynccontextmanager
    async def lend(self, files: Mapping[int, int]) -> AsyncIterator[Mapping[int, int]]:
        """See `PreparedMachine.lend`."""
        lent: dict[int, int] = {}
        try:
            for key, fd in files.items():
                if not may_lend(fd, self.pid):
                    continue
                answer = await self._execute("add-fd", {"fdset-id": _LENT_FDSET}, descriptors=(fd,))
                lent[key] = answer["fd"]
            yield lent
        finally:
            if lent and not self._death.done():
                with contextlib.suppress(MachineError, VmmProtocolError):  # its death, which is reported elsewhere
                    await self._remove_descriptors({_LENT_FDSET})

    def memory_usage(self) -> MemoryUsage:
        require(self._state, RunState.STARTING, RunState.RUNNING, RunState.PAUSED)
        try:
            text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError) as error:
            raise MachineGoneError(f"Machine {self.id} has just ended.") from error
        kib = {name: int(value) for name, value in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)}
        # Pages of files (programs, the base) are in the host's cache once, also those that only this VMM maps now.
        unique = kib["Anonymous"] + kib["Swap"] + (kib["Pss_Shmem"] if self._record.memory_fd is not None else 0)
        return MemoryUsage(unique_bytes=unique << 10, shared_bytes=max(0, kib["Rss"] + kib["Swap"] - unique) << 10)

    def serial_tail(self) -> str:
        return printable(self._serial.data())

    async def wait_dead(self) -> Death:
        return await asyncio.shield(self._death)

    async def kill(self) -> Death:
        if not self._death.done():
            self._kill_requested = True
            self._process.send_signal(signal.SIGKILL)
        death = await self.wait_dead()
        if self._memory_fd is not None:
            os.close(self._memory_fd)
            self._memory_fd = None
        await asyncio.to_thread(remove_leftovers, self.place, self._record)
        return death

    async def detach(self) -> None:
        if not self._death.done():
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
            await self._release()
            self._death.cancel()
            self._process.close()
        if self._memory_fd is not None:
            os.close(self._memory_fd)
            self._memory_fd = None

    # -- inside ---------------------------------------------------------------------------------------------------

    async def _execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, descriptors: Sequence[int] = ()
    ) -> Any:
        if self._qmp is None:
            raise MachineGoneError(f"Machine {self.id} has no control socket.")
        try:
            return await self._qmp.execute(command, arguments, descriptors=descriptors)
        except VmmProtocolError as error:
            if self._death.done():
                raise MachineGoneError((await self.wait_dead()).reason) from error
            raise

    def _on_event(self, name: str, data: Mapping[str, Any]) -> None:
        match name:
            case "SHUTDOWN":
                self._shutdown_reason = str(data.get("reason"))
            case "GUEST_PANICKED":
                self._guest_panicked = True
            case "RESUME" if self._state is not RunState.DEAD:
                self.become(RunState.RUNNING)
            case "STOP" if self._state is RunState.RUNNING:
                self.become(RunState.PAUSED)
            case _:
                pass

    async def _end_without_control(self, qmp: Qmp) -> None:
        """End a VMM that can be neither paused nor asked any more, so that the machine's owner learns of it."""
        error = await qmp.wait_lost()
        await asyncio.wait([self._watcher], timeout=_END_TIMEOUT_S)
        if not self._watcher.done():
            self._control_lost = str(error)
            self._process.send_signal(signal.SIGKILL)

    async def _watch(self) -> None:
        ended = await self._process.wait()
        self._state = RunState.DEAD
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_DRAIN_TIMEOUT_S)
        serial = self.serial_tail()
        evidence = Evidence(
            requested=self._kill_requested,
            exit_status=ended.exit_status,
            signal=ended.signal,
            control_lost=self._control_lost,
            oom_kills=self._cgroup.oom_kills(),
            shutdown_reason=self._shutdown_reason,
            guest_panicked=self._guest_panicked,
            stderr=printable(self._stderr.data()),
            serial=serial,
        )
        await self._release()
        self._process.close()
        await asyncio.to_thread(remove_runtime_files, self.place, self._cgroup)
        death = Death(
            reason=reason(evidence),
            exit_status=ended.exit_status,
            signal=ended.signal,
            requested=self._kill_requested,
            serial_tail=serial,
        )
        self._death.set_result(death)

    async def _release(self) -> None:
        tasks = [*self._tasks, *([self._guard] if self._guard is not None else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._qmp is not None:
            await self._qmp.close()


def remove_runtime_files(place: MachinePlace, cgroup: Cgroup) -> None:
    """What a dead VMM no longer needs: sockets, record, cgroups. Twice is harmless. Blocking."""
    for name in (QMP_SOCKET, WIRE_SOCKET, SERIAL_SOCKET):
        (place.run_dir / name).unlink(missing_ok=True)
    MachineRecord.remove(place.run_dir)
    with contextlib.suppress(OSError):  # somebody else's files may lie there
        place.run_dir.rmdir()
    cgroup.remove()


def remove_leftovers(place: MachinePlace, record: MachineRecord) -> None:
    """Everything of a dead machine, its overlay too. Frozen disk files belong to whoever froze them."""
    remove_runtime_files(place, Cgroup(directories=record.cgroups))
    if record.overlay is not None:
        record.overlay.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            place.disk_dir.rmdir()


def _next_node(record: MachineRecord) -> tuple[str, int]:
    """Name and descriptor set of the overlay after the one that is being written."""
    number = _number(record.disk_node) + 1
    return f"disk{number}", FIRST_OVERLAY_FDSET + number


def _number(overlay: str) -> int:
    return int(overlay.removeprefix("disk"))


def _lower_node(generation: int) -> str:
    return f"lower{generation}"


def open_disk(path: Path, flags: int, *, format: str) -> int:
    """A descriptor of a disk's file for a VMM. An overlay's header is looked at first: BrokenSnapshotError."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        if format == "qcow2":
            qcow2.virtual_bytes(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


async def _drain(connection: socket.socket, tail: Tail) -> None:
    """Read a console to its end, keeping the last of it, so that whoever writes never waits for us."""
    loop = asyncio.get_running_loop()
    connection.setblocking(False)
    with connection, contextlib.suppress(OSError):
        while data := await loop.sock_recv(connection, 65536):
            tail.add(data)
