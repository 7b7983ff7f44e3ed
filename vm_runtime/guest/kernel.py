"""The kernel process: ipykernel with lossless iopub, ipc sockets, and remote calls from the agent."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import inspect
import json
import logging
import os
import random
import secrets
import signal
import socket
import struct
import sys
import tempfile
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ipykernel
import zmq
from ipykernel import kernelapp
from ipykernel.compiler import XCachingCompiler
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp
from ipykernel.subshell_manager import UnknownSubshellError
from IPython.core.interactiveshell import InteractiveShell
from jupyter_client.jsonutil import json_clean, json_default
from jupyter_client.session import Session, new_id
from traitlets import Type
from traitlets.config import Config
from zmq.eventloop.zmqstream import ZMQStream

from vm_runtime.guest.cell_gate import CellGate
from vm_runtime.guest.cell_settings import CONTENT_KEY, CellSettingsError, cell_settings
from vm_runtime.guest.environment import adopt, needs_new_process
from vm_runtime.guest.iopub import LosslessIOPubThread, prepare_socket
from vm_runtime.guest.paths import CHANNEL_PORTS
from vm_runtime.guest.pending_requests import PendingRequests
from vm_runtime.guest.replies import ReplyStream, abort_for, answer_for
from vm_runtime.guest.replies import prepare_socket as prepare_reply_socket
from vm_runtime.guest.rpc_server import TRACEBACK_CHARS_MAX, RpcServer
from vm_runtime.guest.sandbox.notebook import load
from vm_runtime.guest.warm import warm_up
from vm_runtime.wire.payloads import encode_text

# What OpenSSL's generator asks for itself: the strength of its 256-bit state and half of that again as nonce.
SSL_SEED_BYTES = 48
# The state of NumPy's global generator; as many as its position says, the next number is drawn from new ones.
MT19937_WORDS = 624
# A thread that gets no turn for so long is in code that answers nobody; the request that it runs is known.
LOOK_LIMIT_S = 1.0

# The frames of the request that is being handled.
_request: ContextVar[Sequence[Any]] = ContextVar("request", default=())


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """directory: for the sockets; key: of the messages' HMAC; cwd: where it starts, else in `fallback_cwd`.
    is_restart: clients are sent `starting`, which would mean to a first one that its kernel was lost."""

    directory: str
    key: str
    cwd: str
    fallback_cwd: str
    is_restart: bool


class CellCompiler(XCachingCompiler):
    """Tells `inspect` to which module cells belong. Else it looks through all that are imported, several times for each
    line of a traceback, of which endless recursion has a thousand: 4 s, and 47 s emulated."""

    def get_code_name(self, raw_code: str, transformed_code: str, number: int) -> str:
        name: str = super().get_code_name(raw_code, transformed_code, number)
        inspect.modulesbyfile[name] = "__main__"
        return name


class HypercellKernel(IPythonKernel):
    """IPythonKernel that notifies the agent when it runs cells, and pauses between them for checkpoints."""

    compiler_class = Type(CellCompiler)
    rpc: RpcServer
    is_restart: bool

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cell_gate = CellGate(self._cells_change)
        self.ended_cell = 0  # the number of the last one that ended
        self.pending_requests = PendingRequests()

    def _publish_status(self, status: str, *args: Any, **kwargs: Any) -> None:
        if status != "starting" or self.is_restart:
            super()._publish_status(status, *args, **kwargs)

    async def shell_channel_thread_main(self, msg: Any) -> None:
        """A request comes in."""
        self.pending_requests.add(msg)
        await super().shell_channel_thread_main(msg)

    async def dispatch_shell(self, msg: Any, /, *args: Any, **kwargs: Any) -> None:
        """A request is handled."""
        token = _request.set(msg)
        self.pending_requests.take_up(msg)
        try:
            await super().dispatch_shell(msg, *args, **kwargs)
        finally:
            _request.reset(token)
            self.pending_requests.remove(msg)

    async def process_control(self, msg: Any) -> None:
        """A request on the control channel is handled."""
        self.pending_requests.add(msg)
        self.pending_requests.take_up(msg)
        try:
            await super().process_control(msg)
        finally:
            self.pending_requests.remove(msg)

    async def execute_request(self, stream: Any, ident: Any, parent: Any) -> None:
        """Run a cell. Only this counts as busy: idle limits must not be moved by completions or kernel_info."""
        cell = object()
        try:
            # Inside the try: an interrupt may come the moment the agent has been notified of the cell, or while it
            # waits. It waits with all of its thread, as for any cell.
            if self.cell_gate.begin(cell):
                with cell_settings(parent["content"]):
                    await super().execute_request(stream, ident, parent)
            else:
                self._send_abort_reply(stream, parent, ident)
        except (KeyboardInterrupt, CellSettingsError) as error:
            # Interrupted before the cell's code or after it: ipykernel would log it and never answer.
            name, text = type(error.__cause__ or error).__name__, str(error)
            content = {"ename": name, "evalue": text, "traceback": [f"{name}: {text}" if text else name]}
            self.send_response(self.iopub_socket, "error", content, ident=self._topic("error"))
            told = {"execution_count": self.execution_count, "user_expressions": {}, CONTENT_KEY: {}}
            reply = {"status": "error", **told, **content}
            if self.session is not None:
                self.session.send(stream, "execute_reply", reply, parent, ident=ident)
        finally:
            # Before its end is reported: no cell that has ended is a pending request.
            self.pending_requests.remove(_request.get())
            self.cell_gate.end(cell)

    @contextlib.contextmanager
    def _cancel_on_sigint(self, future: asyncio.Future[Any]) -> Iterator[None]:
        """While a cell awaits. ipykernel's handler does not wake the event loop, and code that runs for long between
        two awaits does not notice it."""
        loop = asyncio.get_running_loop()
        shell: Any = self.shell

        def interrupt(_number: int, frame: FrameType | None) -> None:
            error = _interruption(frame, shell.user_global_ns)
            if error is not None:
                raise error
            loop.call_soon_threadsafe(future.cancel)

        saved = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, saved)

    async def do_shutdown(self, restart: bool) -> Any:
        """A client's shutdown_request: the process ends once it is answered."""
        self.rpc.notify("shutdown")
        self.iopub_thread.outbox.release()
        return super().do_shutdown(restart)

    def finish_metadata(self, parent: Any, metadata: Any, reply_content: Any) -> Any:
        """Called right before a reply is sent. After a failed cell ipykernel aborts those behind it once its reply is
        sent, and with them what a program sends in answer to that reply, which comes sooner than an emulated kernel
        gets there. So it is done before."""
        header, content = parent["header"], parent["content"]
        # Not for one that asks a subshell which is not there: no cell has run then.
        failed = bool(_request.get()) and header["msg_type"] == "execute_request" and reply_content["status"] == "error"
        if failed and not content.get("silent", False) and content.get("stop_on_error", True):
            super()._abort_queues(header.get("subshell_id"))
        if CONTENT_KEY in content:
            reply_content[CONTENT_KEY] = {}
        return super().finish_metadata(parent, metadata, reply_content)

    def _abort_queues(self, subshell_id: str | None = None) -> None:
        """`finish_metadata` has done it."""

    def abort_requests(self) -> None:
        """Answer the cells that wait here to be run with "aborted", as after an error. From any thread.

        The dummy message behind them is ipykernel's own way to end that (`dispatch_shell`); what comes later is run.
        """
        stream, thread = self.shell_stream, self.shell_channel_thread
        assert stream is not None
        self._aborting = True
        subshells = thread.manager.list_subshell()
        for subshell in subshells:
            thread.manager.set_subshell_aborting(subshell, True)

        async def end_behind_them() -> None:
            stream.flush(zmq.POLLIN)
            async with thread.asyncio_lock:  # behind the handlers of those that were just read
                for subshell in (None, *subshells):
                    with contextlib.suppress(UnknownSubshellError):  # it has ended meanwhile
                        self._post_dummy_stop_aborting_message(subshell)

        thread.io_loop.add_callback(end_behind_them)

    def _cells_change(self, busy: bool, waits: bool) -> None:
        # While no cell runs, IPython's count is that of the next one.
        self.ended_cell = max(0, int(self.execution_count) - 1)
        state = "busy" if busy else "idle"
        self.rpc.notify("status", state=state, execution_count=self.ended_cell, next_waits=waits)


def _interruption(frame: FrameType | None, names: dict[str, Any]) -> BaseException | None:
    """What to raise in the code that is interrupted, if it is the user's. KeyboardInterrupt would end the event loop,
    and so the kernel, unless the cell itself runs: IPython catches it then, but in other tasks nobody does."""
    runs_user_code = False
    while frame is not None:
        if frame.f_code is InteractiveShell.run_code.__code__:
            return None  # IPython's own part: it may be about to show another error
        if frame.f_globals is names:
            runs_user_code = True
            if frame.f_back is not None and frame.f_back.f_code is InteractiveShell.run_code.__code__:
                return KeyboardInterrupt()
        frame = frame.f_back
    return asyncio.CancelledError() if runs_user_code else None


class HypercellKernelApp(IPKernelApp):
    """IPKernelApp with the iopub thread and socket options of ours."""

    iopub_thread: LosslessIOPubThread

    def init_kernel(self) -> None:
        for router in (self.shell_socket, self.control_socket):
            prepare_reply_socket(router)
        # ipykernel makes its streams in one method with much else; only the class of two of them is ours.
        kernelapp.ZMQStream = _reply_stream  # type: ignore[attr-defined, assignment]  # it does not list what it imports
        try:
            super().init_kernel()
        finally:
            kernelapp.ZMQStream = ZMQStream  # type: ignore[attr-defined]
        self.iopub_thread.on_subscriber = self._client_came

    def _bind_socket(self, s: zmq.Socket[bytes], port: int) -> Any:
        # The gateway greets ahead of clients that are yet to come; libzmq would hang up after 30 s.
        s.setsockopt(zmq.HANDSHAKE_IVL, 0)
        return super()._bind_socket(s, port)

    def _client_came(self) -> None:
        for stream in (self.kernel.shell_stream, self.kernel.control_stream):
            stream.retry_later()

    def init_iopub(self, context: zmq.Context[Any]) -> None:
        xpub = context.socket(zmq.XPUB)
        xpub.linger = 1000
        prepare_socket(xpub)
        self.iopub_port = self._bind_socket(xpub, self.iopub_port)
        self.configure_tornado_logger()
        self.iopub_thread = LosslessIOPubThread(xpub, session=self.session)
        self.iopub_thread.start()
        self.iopub_socket = self.iopub_thread.background_socket


def _reply_stream(socket: Any, io_loop: Any = None) -> ZMQStream:
    return ReplyStream(socket, io_loop) if socket.type == zmq.ROUTER else ZMQStream(socket, io_loop)


def pack(value: Any) -> bytes:
    """A part of a message, as jupyter_client packs it; but text that has no UTF-8 is neither an error nor sent as it
    is, which no WebSocket would take."""
    dump = partial(json.dumps, default=json_default, ensure_ascii=False, allow_nan=False)
    try:
        return encode_text(dump(value))
    except (TypeError, ValueError):
        return encode_text(dump(json_clean(value)))


def run_kernel(settings: KernelSettings, rpc_socket: socket.socket) -> None:
    """Run a kernel in this process until it ends. The caller has set environment, signals and standard streams."""
    rpc = RpcServer(rpc_socket)
    inherited = frozenset(sys.modules)
    # As if it had been started by itself, which is what programs look for.
    directory = Path(settings.directory)
    connection_file = _write_connection_file(directory, settings.key)
    sys.argv = [str(Path(ipykernel.__file__).parents[1] / "ipykernel_launcher.py"), "-f", connection_file]
    sys.orig_argv = [sys.executable, "-m", "ipykernel_launcher", *sys.argv[1:]]
    try:
        app = _initialized_app(settings, rpc)
    except BaseException:
        rpc.notify("failed", reason=traceback.format_exc()[-TRACEBACK_CHARS_MAX:])
        raise
    reseed()
    rpc.handlers.update(_handlers(app, directory, inherited=inherited))
    rpc.start()
    rpc.notify("ready")
    app.start()


def reseed(*, keep_random: bool = False) -> None:
    """New random numbers for a process that has twins.

    The global generators of `random` and `numpy.random`, unless they shall stay equal; generators that a user made are
    left alone. OpenSSL's always: its state makes TLS keys (man RAND_add). `os.urandom` is vmlinux's, reseeded there.
    """
    if not keep_random:
        random.seed()
        if numpy_random := sys.modules.get("numpy.random"):
            _reseed_numpy(numpy_random)
    # uuid1 of libuuid keeps its node and sequence where nobody can renew them; Python's own takes these.
    uuid._generate_time_safe = None  # type: ignore[attr-defined]
    uuid._last_timestamp = None  # type: ignore[attr-defined]
    uuid._node = secrets.randbits(48) | 1 << 40  # type: ignore[attr-defined]  # marked as random (RFC 4122, 4.5)
    tempfile._name_sequence = None  # type: ignore[attr-defined]
    if ssl := sys.modules.get("ssl"):
        ssl.RAND_add(os.urandom(SSL_SEED_BYTES), SSL_SEED_BYTES)


def _reseed_numpy(numpy_random: Any) -> None:
    """Every clone does this first, and `seed` runs so much new code that an emulated one would keep 2 MiB of it."""
    words = struct.unpack(f"{MT19937_WORDS}I", os.urandom(4 * MT19937_WORDS))
    try:
        numpy_random.set_state(("MT19937", words, MT19937_WORDS))
    except ValueError:  # the user has put another generator in its place
        numpy_random.seed()


def trim_memory() -> None:
    """Give unused heap back to vmlinux, so that it is in no snapshot."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _initialized_app(settings: KernelSettings, rpc: RpcServer) -> HypercellKernelApp:
    try:
        os.chdir(settings.cwd)
    except OSError:
        os.chdir(settings.fallback_cwd)
    config = Config()
    config.IPKernelApp.kernel_class = HypercellKernel
    config.IPKernelApp.outstream_class = "vm_runtime.guest.iopub.BoundedOutStream"
    config.IPKernelApp.log_level = logging.CRITICAL
    config.Session.packer = "vm_runtime.guest.kernel.pack"
    # The banner's tip is drawn with `random` at every kernel_info: a new client would change a seeded sequence.
    config.InteractiveShell.enable_tip = False
    HypercellKernel.rpc, HypercellKernel.is_restart = rpc, settings.is_restart
    app = HypercellKernelApp.instance(config=config)
    app.initialize(sys.argv[1:])
    _find_temporary_directory()
    load(app.shell)
    return app


def _write_connection_file(directory: Path, key: str) -> str:
    """For the kernel itself, `%connect_info` and clients in here. Returns its path."""
    path = directory / "kernel.json"
    ports = {f"{channel}_port": port for channel, port in CHANNEL_PORTS.items()}
    info = {"transport": "ipc", "ip": str(directory / "k"), "key": key, "signature_scheme": "hmac-sha256", **ports}
    path.write_text(json.dumps(info))
    path.chmod(0o600)
    return str(path)


def _find_temporary_directory() -> None:
    """ipykernel names one in each cell's file name: on a full disk, where none can be written to, no cell would run."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = "/tmp"


def _run_in(loop: Any, function: Callable[[], Any]) -> None:
    """Run `function` in the thread of a loop, and what it has made to run there at once; at most for a moment."""
    done = threading.Event()

    async def run() -> None:
        function()
        await asyncio.sleep(0)  # handlers that were started begin
        done.set()

    loop.add_callback(run)
    done.wait(LOOK_LIMIT_S)


def _handlers(app: HypercellKernelApp, directory: Path, *, inherited: frozenset[str]) -> dict[str, Any]:
    """What the agent may ask for; later hooks (resume, fork) are added here. inherited: modules of the zygote."""
    session: Session = app.session
    names: dict[str, Any] = app.kernel.shell.user_ns
    initial = set(names)

    def renew(request: dict[str, Any]) -> None:
        """A new HMAC key (None keeps the old one); after a restore new random numbers, and what waited runs or not.
        quiet: clients of before are about to be back, so that each misses nothing (`quiesce`)."""
        if request["key"] is not None:
            # One Session signs everything in the process (kernel, displayhook, streams, comms, subshells).
            session.key = request["key"].encode()
            session.digest_history = set()
            app.iopub_thread.outbox.resign(session.sign)
            for stream in (app.kernel.shell_stream, app.kernel.control_stream):
                stream.resign(session.sign)
            _write_connection_file(directory, request["key"])
        set_quiet(request["quiet"])
        if request["restored"]:
            session.session = new_id()  # part of each message's id, of which no other copy may make the same
            app.kernel.ident = str(uuid.uuid4())
            reseed(keep_random=request["keep_random"])
        drop = request["drop_requests"] and bool(app.kernel.pending_requests)
        if drop:  # else 2 MiB of the kernel's memory would be written to for nothing, in every clone
            app.kernel.abort_requests()
        app.kernel.cell_gate.greeted(drop=drop)

    def configure(request: dict[str, Any]) -> dict[str, Any]:
        """Environment and directory of a kernel that was started before anyone knew for whom. Not adopted: another
        process is needed, and none of a user's state would be lost with this one."""
        if needs_new_process(os.environ, request["env"]) and app.kernel.execution_count == 1 and set(names) == initial:
            return {"adopted": False}
        adopt(request["env"])
        if notebook := os.environ.get("JPY_SESSION_NAME"):
            names["__session__"] = notebook  # as IPythonKernel does at its start
        if request["cwd"] is not None:
            with contextlib.suppress(OSError):  # as at a start: it stays where it is
                os.chdir(request["cwd"])
        return {"adopted": True}

    def warm(request: dict[str, Any]) -> dict[str, Any]:
        app.kernel.cell_gate.release(waits=False)  # its cells are none that a host would keep
        error = warm_up(app, request["code"])
        app.kernel.cell_gate.release(waits=True)
        trim_memory()
        gc.freeze()  # see the zygote's: here it is the kernel's own objects
        # `sandbox` is given to each kernel; to import it is for other processes, and changes sys.path.
        return {"error": error, "modules": [name for name in sys.modules if name not in inherited | {"sandbox"}]}

    def answer(request: dict[str, Any]) -> None:
        if request["reply_to"] is not None:
            answer_for(app, reply_to=request["reply_to"], text=request["text"])
        for reply_to in request["aborted"]:
            abort_for(app, reply_to=reply_to)

    def hold(request: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint is about to be taken: no cell begins, unless one runs."""
        held = app.kernel.cell_gate.hold(request["hold_s"])
        answer = {"held": held, "execution_count": app.kernel.ended_cell}
        return {**answer, "unanswered": app.kernel.pending_requests.list()} if request["unanswered"] else answer

    def release(request: dict[str, Any]) -> None:
        app.kernel.cell_gate.release(waits=request["waits"])

    def shut_down(request: dict[str, Any]) -> None:
        """Leave the main loop; what follows is Python's own end of a program. Cells that wait are not run."""
        app.kernel.cell_gate.greeted(drop=True)
        app.iopub_thread.outbox.release()
        app.kernel.io_loop.add_callback(app.kernel.io_loop.stop)

    def set_quiet(quiet: bool) -> None:
        for stream in (app.kernel.shell_stream, app.kernel.control_stream):
            stream.set_quiet(quiet)
        app.iopub_thread.set_quiet(quiet)

    def quiesce(request: dict[str, Any]) -> dict[str, Any]:
        """The host is about to leave this machine (`quiet`: what clients are to get is kept), or all of its clients are
        back. What the sockets have is looked at first, so that no request is missing among the unanswered, and no
        subscriber among those that output is for."""
        kernel, thread = app.kernel, app.iopub_thread
        _run_in(app.shell_channel_thread.io_loop, lambda: kernel.shell_stream.flush(zmq.POLLIN))
        _run_in(app.control_thread.io_loop, lambda: kernel.control_stream.flush(zmq.POLLIN))
        cells = kernel.pending_requests.list()  # before: better one that is just being answered than none of its kind
        if request["quiet"]:
            set_quiet(True)
        _run_in(thread.io_loop, thread.take_subscriptions)
        if not request["quiet"]:
            set_quiet(False)
        return {"unanswered": len(kernel.pending_requests), "cells": cells}

    return {
        "renew": renew, "configure": configure, "warm": warm, "answer": answer, "hold": hold, "release": release,
        "shut_down": shut_down,
        "quiesce": quiesce,
    }  # fmt: skip
