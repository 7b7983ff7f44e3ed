"""The private names of other packages that the guest's code uses or overrides: each still exists, and each is listed.

They are what an upgrade of ipykernel, IPython, pyzmq or Python may take away.
"""

from __future__ import annotations

import ast
import inspect
import tempfile
import uuid
import warnings
from pathlib import Path

import ipykernel.kernelapp
from ipykernel.iostream import IOPubThread, OutStream
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp
from ipykernel.zmqshell import ZMQInteractiveShell
from zmq.eventloop.zmqstream import ZMQStream

import vm_runtime.guest
from vm_runtime.guest import iopub, kernel, replies

USED: dict[object, set[str]] = {
    IPythonKernel: {
        "_abort_queues",
        "_aborting",
        "_allow_stdin",
        "_cancel_on_sigint",
        "_get_shell_context_var",
        "_post_dummy_stop_aborting_message",
        "_publish_status",
        "_send_abort_reply",
        "_shell_parent_ident",
        "_topic",
    },
    IPKernelApp: {"_bind_socket"},
    ipykernel.kernelapp: {"ZMQStream"},  # not private, but put in its place
    IOPubThread: {
        "_handle_pipe_msg",
        "_handle_subscription",
        "_is_master_process",
        "_pipe_flag",
        "_pipe_in",
    },
    OutStream: {
        "_buffer_lock",
        "_buffers",
        "_exc",
        "_fid",
        "_flush",
        "_flush_buffers",
        "_flush_pending",
        "_io_loop",
        "_is_master_process",
        "_schedule_flush",
        "_should_watch",
        "_watch_pipe_fd",
    },
    ZMQStream: {"_handle_recv", "_rebuild_io_state"},
    ZMQInteractiveShell: {"_last_traceback", "_showtraceback"},
    inspect: {"modulesbyfile"},  # documented nowhere
    tempfile: {"_name_sequence"},
    uuid: {"_generate_time_safe", "_last_timestamp", "_node"},
    warnings: {"_filters_mutated", "_processoptions"},
}
# The standard library's, of the kind that its documentation names, and os._exit.
DOCUMENTED = {"_asdict", "_exit", "_replace"}

SUBCLASSES = (
    kernel.HypercellKernel,
    kernel.HypercellKernelApp,
    iopub.LosslessIOPubThread,
    iopub.BoundedOutStream,
    replies.ReplyStream,
)


def test_each_exists() -> None:
    for owner, names in USED.items():
        for name in names:
            defined = hasattr(owner, name) or any(
                f"self.{name}" in inspect.getsource(each)
                for each in inspect.getmro(owner)[:-1]  # type: ignore[arg-type]
            )
            assert defined, f"{owner} has no {name} any more"


def test_all_are_listed() -> None:
    listed = set().union(*USED.values()) | DOCUMENTED
    for path in Path(vm_runtime.guest.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        stored = [
            node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        ]
        own = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        } | {node.attr for node in stored if isinstance(node.value, ast.Name) and node.value.id == "self"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                assert node.attr in own | listed, f"{path.name}:{node.lineno}: {node.attr} is not in this list"


def test_overridden_ones_are_listed() -> None:
    listed = set().union(*USED.values())
    for subclass in SUBCLASSES:
        bases = [base for base in subclass.__mro__ if not base.__module__.startswith("vm_runtime")]
        for node in ast.walk(ast.parse(inspect.getsource(subclass))):
            name = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""
            if name.startswith("_") and not name.startswith("__") and any(name in vars(base) for base in bases):
                assert name in listed, f"{subclass.__name__}.{name} is not in this list"
