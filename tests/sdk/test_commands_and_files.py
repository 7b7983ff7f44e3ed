"""Commands and files through the SDK, with what can go wrong in a guest."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hypercell import (
    AsyncSandbox,
    ClosedError,
    CommandFailedError,
    ConnectionLostError,
    DiskFullError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    Sandbox,
    SandboxEvent,
    StateError,
    TerminalSize,
)
from tests.gateways import RunningGateway

MIB = 1024 * 1024


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_command_and_how_it_ended(sandbox: Sandbox) -> None:
    heard: list[str] = []
    result = sandbox.commands.run(
        "echo $WORD; cat; echo oops >&2; exit 3", env={"WORD": "w"}, stdin="typed\n", on_stderr=heard.append
    )
    assert (result.stdout, result.stderr, result.exit_code, result.ok) == ("w\ntyped\n", "oops\n", 3, False)
    assert heard == ["oops\n"]
    with pytest.raises(CommandFailedError, match="status 3: oops"):
        sandbox.commands.run("echo oops >&2; exit 3", check=True)
    assert sandbox.commands.run(["printf", "%s", "a b"]).stdout == "a b"
    assert sandbox.commands.run("sleep 60", timeout_s=0.5).timed_out
    with pytest.raises(InvalidRequestError, match="no-such-program"):
        sandbox.commands.run(["no-such-program"])


def test_a_background_command(sandbox: Sandbox) -> None:
    command = sandbox.commands.start("read line; echo got $line; sleep 100", stdin=True)
    command.write("this\n")
    assert sandbox.commands.get(command.command_id).running
    assert command.command_id in {known.command_id for known in sandbox.commands.list()}
    command.close()
    again = sandbox.commands.attach(command.command_id)
    wait_until(lambda: sandbox.commands.get(command.command_id).output_bytes > 0)
    sandbox.commands.signal(command.command_id, "SIGTERM")
    result = again.wait()
    assert (result.stdout, result.signal) == ("got this\n", "SIGTERM")
    sandbox.commands.kill(command.command_id)
    with pytest.raises(NotFoundError):
        sandbox.commands.get(command.command_id)


def test_a_command_s_input_ends(sandbox: Sandbox) -> None:
    with sandbox.commands.start("wc -c", stdin=True) as command:
        command.write(b"12345")
        command.end_input()
        assert command.wait().stdout.strip() == "5"
        with pytest.raises(ConnectionLostError, match="has ended"):
            command.write(b"more")


def test_ctrl_c_in_a_callback_lets_the_command_be_followed_again(sandbox: Sandbox) -> None:
    heard: list[str] = []

    def stop_once(text: str) -> None:
        heard.append(text)
        if len(heard) == 1:
            raise KeyboardInterrupt

    with sandbox.commands.start("echo one; read line; echo two", stdin=True, on_stdout=stop_once) as command:
        with pytest.raises(KeyboardInterrupt):
            command.wait()
        command.write("go on\n")
        assert command.wait().stdout == "one\ntwo\n"
    assert heard == ["one\n", "two\n"]
    with pytest.raises(KeyboardInterrupt):
        heard.clear()
        sandbox.run_code("print('on', flush=True)\nwhile True: pass", on_stdout=stop_once)
    assert sandbox.run_code("'alive'", timeout_s=60).text == "'alive'"


def test_a_terminal(sandbox: Sandbox) -> None:
    said: list[str] = []

    def answer(text: str) -> None:
        said.append(text)
        if "20 70" in text:
            command.resize(TerminalSize(rows=10, columns=30))
            command.write("go on\n")

    line = "stty size; read line; stty size; exit 4"
    size = TerminalSize(rows=20, columns=70)
    command = sandbox.commands.start(line, terminal=size, background=False, on_stdout=answer)
    with command:
        result = command.wait()
    assert "".join(said) == result.stdout == "20 70\r\ngo on\r\n10 30\r\n"
    assert result.exit_code == 4


async def test_a_cancelled_command_is_ended(at_gateway: RunningGateway, sandbox: Sandbox) -> None:
    async with await AsyncSandbox.connect(sandbox.id) as same:
        began = asyncio.Event()
        running = asyncio.create_task(same.commands.run("echo on; sleep 600", on_stdout=lambda text: began.set()))
        await began.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        async with asyncio.timeout(60):
            while any(known.running for known in await same.commands.list()):  # noqa: ASYNC110 (nothing tells)
                await asyncio.sleep(0.1)


def test_files(sandbox: Sandbox) -> None:
    files = sandbox.files
    assert files.write("dir/deep/a.txt", "grüße", mode="0600") == 7
    assert files.read_text("dir/deep/a.txt") == "grüße"
    assert files.stat("dir/deep/a.txt").mode == "0600"
    assert [entry.name for entry in files.list("dir", depth=2)] == ["deep", "a.txt"]
    assert files.exists("dir/deep") and not files.exists("dir/no")
    files.mkdir("dir/other")
    files.mkdir("dir/other", exist_ok=True)
    with pytest.raises(StateError, match="exists"):
        files.mkdir("dir/other")
    for use in (lambda: files.write("/etc/passwd", ""), lambda: files.read("/root/x"), lambda: files.list("/root")):
        with pytest.raises(PermissionDeniedError):
            use()
    assert not files.exists("/root/x")
    with pytest.raises(PermissionDeniedError):
        files.remove(".", recursive=True)
    assert files.exists("dir/other")
    files.rename("dir/deep/a.txt", "dir/other/b.txt")
    assert files.read("dir/other/b.txt") == "grüße".encode()
    with pytest.raises(StateError):
        files.remove("dir")
    files.remove("dir", recursive=True)
    with pytest.raises(NotFoundError):
        files.read("dir/other/b.txt")
    with pytest.raises(StateError):
        files.read("/tmp")


def test_content_of_every_kind_arrives(sandbox: Sandbox, tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192
    assert sandbox.files.write("kinds", io.BytesIO(data)) == len(data)
    assert sandbox.files.read("kinds") == data
    assert sandbox.files.write("kinds", (data[i : i + 1000] for i in range(0, len(data), 1000))) == len(data)
    assert hashlib.sha256(b"".join(sandbox.files.stream("kinds"))).digest() == hashlib.sha256(data).digest()
    local = tmp_path / "local.bin"
    assert sandbox.files.download("kinds", local) == len(data)
    assert local.read_bytes() == data
    assert sandbox.files.upload(local, "again") == len(data)
    assert sandbox.commands.run("cmp kinds again", check=True).ok
    assert sandbox.files.write("empty", b"") == 0
    assert sandbox.files.read("empty") == b""


def test_a_source_that_fails_writes_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"x" * 1000
        raise ZeroDivisionError

    sandbox.files.write("whole", "old")
    with pytest.raises(ZeroDivisionError):
        sandbox.files.write("whole", broken())
    assert sandbox.files.read("whole") == b"old"
    with pytest.raises(NotFoundError):
        sandbox.files.download("no-such-file", tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told(at_gateway: RunningGateway) -> None:
    with Sandbox.create(checkpoints="off") as full:
        full.commands.run("mkdir filler")
        sizes = "1G 100M 10M 1M 64K"
        full.commands.run(f"for s in {sizes}; do i=0; while fallocate -l $s filler/$s-$i; do i=$((i+1)); done; done")
        zeros = bytes(MIB)
        with pytest.raises(DiskFullError):
            full.files.write("big", (zeros for _ in range(40)))
        assert not full.files.exists("big")
        execution = full.run_code("open('big', 'wb').write(bytes(40 * 2**20))")
        assert execution.error is not None and execution.error.name == "OSError"
        full.files.remove("filler", recursive=True)
        assert full.files.write("small", "fits") == 4


def test_parts_of_files_pages_and_links(sandbox: Sandbox) -> None:
    files = sandbox.files
    files.write("parts/f", "0123456789")
    ranges = ((0, 4), (4, None), (-3, None), (-3, 2), (0, 0), (8, 10), (10, None), (99, 1))
    assert [files.read("parts/f", offset=offset, length=length) for offset, length in ranges] == [
        b"0123456789"[
            offset : None if length is None else (len("0123456789") + offset if offset < 0 else offset) + length
        ]
        for offset, length in ranges
    ]
    assert files.write("parts/f", "ab", append=True) == 2
    assert files.write("~/parts/new", "ab", append=True) == 2
    assert (files.read_text("parts/f"), files.read_text("parts/new")) == ("0123456789ab", "ab")
    link = files.symlink("f", "parts/l")
    assert (link.kind, link.target, files.read_text("parts/l")) == ("link", "f", "0123456789ab")
    with pytest.raises(StateError):
        files.symlink("f", "parts/l")
    assert [entry.name for entry in files.scan("~/parts", page=1)] == ["f", "l", "new"]
    assert [entry.name for entry in files.list("parts")] == ["f", "l", "new"]


def test_root(sandbox: Sandbox) -> None:
    commands, files = sandbox.commands, sandbox.files
    assert commands.run("id -un; pwd; echo $HOME", user="root").stdout == "root\n/root\n/root\n"
    files.write("/etc/of-root", "x", user="root", mode="0600")
    with pytest.raises(PermissionDeniedError):
        files.read("/etc/of-root")
    assert files.read_text("/etc/of-root", user="root") == "x"
    assert files.stat("~", user="root").path == "/root"
    # What root writes to stays its owner's.
    files.write("mine", "x")
    files.write(files.stat("mine").path, "y", user="root")
    assert (files.read_text("mine"), files.stat("mine").uid != 0) == ("y", True)
    with pytest.raises(InvalidRequestError):
        commands.run("true", user="nobody")  # type: ignore[arg-type]


def test_a_shell_keeps_its_state(sandbox: Sandbox) -> None:
    with sandbox.commands.shell(cwd="/tmp", env={"GIVEN": "g"}) as shell:
        shell.run("cd /usr; export A='x y'; b=2; f() { echo f $1; }", check=True)
        assert shell.run("pwd; echo $A $b $GIVEN; f 1; unset A; cat", stdin="in").stdout == "/usr\nx y 2 g\nf 1\nin"
        assert shell.run("echo [$A]; exit 3").stdout == "[]\n"
        assert shell.run("false").exit_code == 1
        assert shell.run("sleep 60", timeout=0.5).timed_out
        (child,) = sandbox.fork()
        with child:
            assert child.commands.run("ls -A /tmp").stdout == sandbox.commands.run("ls -A /tmp").stdout
        assert shell.run("pwd").stdout == "/usr\n"
    assert ".hypercell-shell" not in sandbox.commands.run("ls -A /tmp").stdout


@pytest.mark.parametrize("line", ["{} &", "({} &)", "nohup {} &"])
def test_what_a_command_begins_goes_on(sandbox: Sandbox, line: str) -> None:
    server = "python3 -m http.server --bind 127.0.0.1 8123"
    assert sandbox.commands.run(line.format(server)).ok
    ask = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8123').status)"
    try:
        for _ in range(2):  # it logs each request on stderr
            wait_until(lambda: sandbox.run_code(ask).stdout == "200\n")
    finally:
        sandbox.commands.run("pkill -f http.server; while pgrep -f http.server; do sleep 0.1; done")


async def test_watching(at_gateway: RunningGateway, sandbox: Sandbox) -> None:
    async with await AsyncSandbox.connect(sandbox.id) as same:
        await same.files.mkdir("watched")
        async with await same.files.watch("watched") as changes:
            await same.commands.run("touch watched/new; mv watched/new watched/old", check=True)
            created, _, renamed = [await asyncio.wait_for(anext(changes), 60) for _ in range(3)]
        assert (created.event, Path(created.path).name) == ("created", "new")
        assert (renamed.event, Path(renamed.path).name) == ("renamed", "old")
        with pytest.raises(StopAsyncIteration):
            await anext(changes)


def test_what_follows_a_sandbox_is_ended_from_another_thread(sandbox: Sandbox) -> None:
    with ThreadPoolExecutor() as threads:
        watch = sandbox.files.watch(".")
        following = threads.submit(list, watch)
        watch.stop()
        assert following.result(60) == []

        # All that one object has open, not what another has.
        other = Sandbox.connect(sandbox.id)
        watching = threads.submit(list, other.files.watch("."))
        events = threads.submit(list, other.events())
        command = other.commands.start("echo on; sleep 600", background=False)
        said = threading.Event()
        following_it = threads.submit(other.commands.attach(command.command_id, on_stdout=lambda _: said.set()).wait)
        assert said.wait(60)
        code = threads.submit(other.run_code, "import time; time.sleep(600)", on_stdout=print)
        wait_until(lambda: sandbox.info().execution_state == "busy")
        mine = sandbox.files.watch(".")
        other.close()
        assert watching.result(60) == []
        assert all(isinstance(event, SandboxEvent) for event in events.result(60))
        for ended in (following_it, code):
            with pytest.raises(ClosedError):
                ended.result(60)
        wait_until(lambda: not any(one.running for one in sandbox.commands.list()))
        sandbox.interrupt()
        sandbox.files.write("seen", b"")
        assert next(mine).path.endswith(".part")
        mine.stop()
