"""What the two ends send in frames: each stream kind, call, event and greeting's extra, and since which generation.

A restored snapshot is an old agent, so a host meets agents of every generation that ever was; an agent meets no host
that is older than itself. The generation is in both greetings, and who names none is of generation 1. A host does not
open a stream of a kind that came later than its agent (`kernels/session.py`); fields that came later are left out, or
ignored, by the other end. What is new belongs here, with GENERATION; when a generation has been released, the next one
begins, and its guest code is frozen in tests/compat. docs/wire.md is printed from these tables (tools/wire_tables.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# Of this code.
GENERATION = 2

_FIELD = re.compile(r"(\w+)(?:@(\d+))?")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """names: those of one row, which are alike.
    takes, answers: fields, separated by commas; `field@2` came with generation 2; what is no field stands after a
        semicolon.
    does: a line for people.
    """

    names: tuple[str, ...]
    since: int = 1
    takes: str = ""
    answers: str = ""
    does: str

    def fields(self, text: str) -> Iterator[tuple[str, int]]:
        """(field, since) of `takes` or `answers`."""
        for name, since in _FIELD.findall(text.partition(";")[0]):
            yield name, max(self.since, int(since or 1))


def _entry(names: str, does: str, *, since: int = 1, takes: str = "", answers: str = "") -> Entry:
    return Entry(names=tuple(names.split()), since=since, takes=takes, answers=answers, does=does)


_FILES = (
    _entry(
        "files.read", "A file's content; a negative offset counts from the end.",
        takes="path, offset, length", answers="size_bytes, offset, length, mode, modified_at; chunks",
    ),
    _entry(
        "files.write", "A file's content, which takes its place when it is whole.",
        takes="path, mode, parents; chunks", answers="; JSON of size_bytes, crc32",
    ),
    _entry(
        "files.append", "The same after what the file has.", since=2,
        takes="path, mode, parents; chunks", answers="; JSON of size_bytes, crc32",
    ),
    _entry(
        "files.list", "What is in a directory.",
        takes="path, depth, limit@2, after@2", answers="; JSON of path, entries, truncated, next (2)",
    ),
    _entry("files.stat", "One entry.", takes="path, follow", answers="; an entry"),
    _entry("files.remove", "Removes a file, a link or a directory.", takes="path, recursive"),
    _entry("files.rename", "As rename(2).", takes="old_path, new_path", answers="; an entry"),
    _entry("files.mkdir", "A directory.", takes="path, mode, parents, exist_ok@2", answers="; an entry"),
    _entry("files.symlink", "A symbolic link.", since=2, takes="path, target", answers="; an entry"),
    _entry("files.watch", "Changes, as they happen.", takes="path, recursive", answers="; JSON lines"),
)  # fmt: skip

# Streams that the host opens. What needs no data is a call: its answer is ACCEPT's result.
HOST_STREAMS = (
    _entry(
        "kernel.start", "Starts the kernel; one that runs adopts env and cwd, or is replaced.",
        takes="key, env, cwd", answers="pid, replaces@2",
    ),
    _entry("kernel.restart", "A new kernel on the same sockets, with the same key.", takes="env", answers="pid"),
    _entry("kernel.stop", "Ends the kernel.", takes="grace_s"),
    _entry("kernel.interrupt", "SIGINT to the kernel's process group."),
    _entry(
        "kernel.hold", "Lets no cell begin until kernel.release, at most for limit_s; held is false where one runs.",
        takes="limit_s, unanswered", answers="held, execution_count, unanswered",
    ),
    _entry("kernel.release", "Cells begin; waits: whether the kernel pauses after each from now on.", takes="waits"),
    _entry(
        "kernel.quiesce", "What is not answered; quiet: output and replies are kept from now on, else sent again.",
        since=2, takes="quiet", answers="unanswered, cells",
    ),
    _entry(
        "kernel.channel", "To one of the kernel's ZMQ sockets: shell, iopub, stdin, control or hb.",
        takes="channel", answers="; bytes, both ways",
    ),
    _entry("sandbox.identify", "Who this machine is from now on.", takes="identity, wall_clock_ns"),
    _entry("machine.clock", "What time it is.", takes="wall_clock_ns"),
    _entry(
        "machine.usage", "What runs in the machine takes of it.", since=2,
        answers="cpu_percent, cpu_used_ms, memory_total_bytes, memory_used_bytes, disk_total_bytes, disk_used_bytes",
    ),
    _entry("machine.poweroff", "Powers off when the host has ended the stream."),
    _entry(
        "template.prepare", "Warms up zygote and first kernel, and settles the machine for a template's snapshot.",
        takes="warmup, env@2", answers="pid",
    ),
    _entry("tunnel", "To a TCP port of 127.0.0.1.", takes="port", answers="; bytes, both ways"),
    _entry(
        "exec.start", "Starts a command and follows it; a reset by the host gives it up.",
        takes="command, cwd, env, tty, stdin, background, timeout_s; as JSON, then standard input",
        answers="; command frames",
    ),
    _entry("root.exec.start", "The same as root.", since=2, takes="; as above", answers="; command frames"),
    _entry(
        "exec.attach", "Follows a command that runs: what is kept of its output, then what comes.",
        takes="command_id, stdin; standard input", answers="; as in the list, then command frames",
    ),
    _entry("exec.list", "Commands that run, and background ones that have ended.", answers="; JSON"),
    _entry("exec.signal", "A signal to a command.", takes="command_id, signal"),
    _entry("exec.resize", "The size of a command's terminal.", takes="command_id, rows, columns"),
    _entry("exec.kill", "Ends a command and forgets it.", takes="command_id", answers="; as in the list"),
    *_FILES,
    _entry(
        " ".join(f"root.{name}" for entry in _FILES for name in entry.names), "The same with root's rights.", since=2,
        takes="; as above", answers="; as above",
    ),
)  # fmt: skip

# Streams that the guest opens.
GUEST_STREAMS = (
    _entry("events", "One per session: what happens to the kernel, as JSON lines."),
    _entry("sandbox.call", "A call of the module `sandbox` (docs/sandbox_calls.md).", takes="op, call_id; a value"),
)

# Lines of `events`.
EVENTS = (
    _entry("kernel.status", "starting, busy or idle.", takes="state, execution_count, next_waits"),
    _entry(
        "kernel.exited", "The kernel's process ended.", takes="pid, exit_status, signal, shut_down@2, out_of_memory@2"
    ),
)

# The `op` of a `sandbox.call`.
CALLS = (
    _entry("info", "The sandbox itself."),
    _entry("tree", "Its family."),
    _entry("checkpoints", "Its time line."),
    _entry("fork", "Children in this state.", takes="n, name, same_random"),
    _entry("exit offer", "The end of a child, or its state for its parent to go on in.", takes="status; a value"),
    _entry("result", "How a child ended.", takes="id, timeout_s"),
    _entry("wait", "The first of these children that ends.", takes="ids, timeout_s"),
    _entry("become", "Goes on in the state of a child that waits in its offer.", takes="id"),
    _entry("kill", "Ends a descendant.", takes="id"),
    _entry("snapshot", "A checkpoint by name.", takes="name"),
    _entry("restore", "Back to a checkpoint by name.", takes="name, reply_to"),
    _entry("goto", "Back to a checkpoint by id or cell.", takes="target, reply_to"),
    _entry("undo", "Back to before the last cell.", takes="reply_to"),
    _entry("sleep", "Until something wakes it."),
)

# `extra` of HELLO and of WELCOME.
HELLO_EXTRA = (
    _entry("calls", "Answers to calls that were pending in the snapshot, by call id."),
    _entry("drop_requests", "Cells that wait in the kernel are aborted."),
    _entry("quiet", "Output and replies are kept until kernel.quiesce.", since=2),
    _entry("answer", "To the cell that asked to go back.", takes="reply_to, text"),
    _entry("aborted", "Requests of the state that was left, which are not run."),
)
WELCOME_EXTRA = (
    _entry("problems", "What could not be renewed: sentences."),
    _entry("kernel_exited", "How the last kernel ended, as in `events`, where none runs.", since=2),
)

_SINCE = {name: entry.since for entry in HOST_STREAMS for name in entry.names}


def host_stream_since(kind: str) -> int:
    """The generation whose agents know streams of this kind. One that is not in the table is left to the agent, which
    refuses what it does not know (tests/compat finds what an agent knows and the table lacks)."""
    return _SINCE.get(kind, 1)
