"""The package itself: what it imports and exports, and that type checkers accept programs that use it."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import uuid
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import hypercell
from hypercell import AsyncCommands, AsyncFiles, AsyncSandbox
from hypercell.aio.kernel import AsyncKernel
from hypercell.aio.transport import Transport, refusal_in
from hypercell.chunks import HEADER, ChunkReader, ChunkWriter
from hypercell.errors import ContentBrokenError, HypercellError, NotFoundError, refused
from hypercell.execution import Execution, ExecutionError, Logs, Recorder
from hypercell.kernel_messages import KernelMessage, decode, encode_request
from hypercell.locate import Gateway
from hypercell.timeouts import takes_timeout
from hypercell.values import CommandResult, ForkFailure

PROGRAM = Path(__file__).parent / "typed_program.py"
SDK = Path(__file__).parents[2] / "sdk"
# sdk/pyproject.toml, requires-python
OLDEST = (3, 10)
CHECKPOINT = {"id": "c", "name": None, "created_at": "2026-11-30T06:00:00.000001Z"}


def test_the_classes_come_without_the_network_libraries() -> None:
    program = (
        "import sys; from hypercell import AsyncSandbox, Sandbox; print({'httpx', 'websockets'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "set()\n"


def _oldest_python() -> str | None:
    name = f"python{OLDEST[0]}.{OLDEST[1]}"
    of_pyenv = [str(found) for found in Path.home().glob(f".pyenv/versions/{OLDEST[0]}.{OLDEST[1]}.*/bin/{name}")]
    candidates = [*of_pyenv, *filter(None, [shutil.which(name)])]
    return next(
        (each for each in candidates if subprocess.run([each, "-V"], capture_output=True).returncode == 0), None
    )


@pytest.mark.skipif(_oldest_python() is None, reason=f"needs Python {OLDEST[0]}.{OLDEST[1]}")
def test_the_oldest_python_imports_every_module() -> None:
    """Without any package but this, so without what is imported only when it is used."""
    paths = [path.relative_to(SDK) for path in sorted((SDK / "hypercell").rglob("*.py")) if "jupyter" not in path.parts]
    modules = [".".join(path.with_suffix("").parts) for path in paths if path.name != "__init__.py"]
    program = f"import importlib, sys\nsys.path.insert(0, {str(SDK)!r})\n"
    program += f"for name in {modules}: importlib.import_module(name)\n"
    program += f"from hypercell.values import CheckpointInfo\nprint(CheckpointInfo.parse({CHECKPOINT}).created_at)"
    command = [_oldest_python() or "", "-I", "-c", program]
    assert subprocess.check_output(command, text=True) == "2026-11-30 06:00:00.000001+00:00\n"


def test_every_name_is_there() -> None:
    for name in hypercell._MODULE_OF:
        assert getattr(hypercell, name).__name__ == name
        assert name in dir(hypercell)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hypercell.no_such_name


def test_mypy_accepts_a_program() -> None:
    oldest = ["--python-version", f"{OLDEST[0]}.{OLDEST[1]}"]
    command: list[str | Path] = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", *oldest, PROGRAM]
    # An editable install is found by an import hook, which type checkers do not run.
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(SDK)})
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(
    importlib.util.find_spec("pyright") is None or not shutil.which("node"), reason="needs pyright, node"
)
def test_pyright_accepts_a_program(tmp_path: Path) -> None:
    settings = tmp_path / "pyrightconfig.json"
    value = {"include": [str(PROGRAM)], "extraPaths": [str(SDK)], "typeCheckingMode": "strict"}
    settings.write_text(json.dumps(value))
    command: list[str | Path] = [sys.executable, "-m", "pyright", "--project", settings, "--pythonpath", sys.executable]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_a_request_can_be_read_back() -> None:
    msg_id, frame = encode_request(channel="shell", msg_type="x_request", content={"a": "ü"}, session_id="s")
    message = decode(frame)
    assert (message.channel, message.msg_type, message.content) == ("shell", "x_request", {"a": "ü"})
    assert msg_id.encode() in frame
    for broken in (b"", b"\xff" * 16, frame[:40]):
        with pytest.raises(ValueError):
            decode(broken)


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_chunks_are_checked(step: int) -> None:
    writer = ChunkWriter()
    data = writer.chunk(b"hello ") + writer.chunk(b"world") + writer.end()
    reader = ChunkReader()
    read = b"".join(bytes(piece) for i in range(0, len(data), step) for piece in reader.feed(data[i : i + step]))
    reader.check_done()
    assert (read, reader.size_bytes) == (b"hello world", 11)
    cut = ChunkReader()
    cut.feed(data[:-1])
    with pytest.raises(ContentBrokenError, match="cut off"):
        cut.check_done()
    with pytest.raises(ContentBrokenError, match="changed"):
        ChunkReader().feed(HEADER.pack(1, zlib.crc32(b"a")) + b"b")


def said(msg_type: str, **content: object) -> KernelMessage:
    return KernelMessage(channel="iopub", msg_type=msg_type, parent_id="p", content=content)


def test_output_that_is_cleared_is_gone() -> None:
    recorder = Recorder()
    recorder.take(said("stream", name="stdout", text="old"))
    recorder.take(said("clear_output", wait=True))
    assert recorder.execution.stdout == "old"
    recorder.take(said("stream", name="stdout", text="new"))
    assert recorder.execution.stdout == "new"
    assert recorder.execution.outputs == [{"output_type": "stream", "name": "stdout", "text": ["new"]}]


def test_the_error_for_an_answer() -> None:
    assert type(refused("m", status=404)).__name__ == "NotFoundError"
    assert type(refused("m", status=403, code="limit_exceeded")).__name__ == "LimitError"
    assert type(refused("m", status=507, code="disk_full")).__name__ == "DiskFullError"
    assert type(refused("m", status=418)).__name__ == "GatewayRefusedError"


@pytest.mark.parametrize(
    ("reason", "code", "name"),
    [
        ("Bad Gateway", "machine_failed", "MachineFailedError"),
        ("Conflict", "wrong_state", "StateError"),
        ("Content Too Large", "too_large", "LimitError"),
        ("Request Entity Too Large", "too_large", "LimitError"),
        ("Not Found", "file_not_found", "NotFoundError"),
        ("Unknown", "new_word", "GatewayRefusedError"),
        ("Service Unavailable", "stopping", "ConnectionLostError"),
    ],
)
def test_the_error_for_a_websocket_s_message(reason: str, code: str, name: str) -> None:
    error = refusal_in({"type": "error", "reason": reason, "message": "m", "code": code})
    assert (type(error).__name__, getattr(error, "code", code)) == (name, code)


async def test_every_public_call_with_a_limit_takes_it_as_timeout_too() -> None:
    """`timeout` is `timeout_s`, and both are an error, before anything is sent; blocking and asynchronous."""
    modules = [
        importlib.import_module(name) for name in (*hypercell._MODULES, "hypercell.search", "hypercell.aio.search")
    ]
    owners = [*modules, *(getattr(hypercell, name) for name in hypercell._MODULE_OF)]
    limited = 0
    for owner in owners:
        for name, function in inspect.getmembers(owner, lambda it: inspect.isfunction(it) or inspect.ismethod(it)):
            if name.startswith("_") or "timeout_s" not in inspect.signature(function).parameters:
                continue
            limited += 1
            with pytest.raises(TypeError, match="give one of them"):
                made = function(timeout=1, timeout_s=1)
                assert inspect.iscoroutine(made), f"{name} takes both"
                await made
    assert limited == 2 * 6 + 3 * 2  # of sandboxes, commands and shells, asynchronous and blocking; searches

    @takes_timeout
    async def limit(*, timeout_s: float | None = 5, timeout: float | None = None) -> float | None:  # noqa: ASYNC109
        return timeout_s

    assert [await limit(), await limit(timeout=2), await limit(timeout=None), await limit(timeout_s=3)] == [
        5,
        2,
        None,
        3,
    ]


def _an_error(kind: type[HypercellError]) -> HypercellError:
    """One of this class, with everything that it can carry."""
    values: dict[str, Any] = {
        "message": "words",
        "status": 404,
        "code": "word",
        "interrupted": True,
        "execution": Execution(logs=Logs(stdout=["said"])),
        "error": ExecutionError(name="E", value="v", traceback="t"),
        "failures": [ForkFailure(code="c", message="m")],
        "children": [],
        "result": CommandResult(exit_code=3, signal=None, timed_out=False, stdout="", stderr="no\n"),
    }
    names = [name for name in inspect.signature(kind.__init__).parameters if name in values]
    return kind(**{name: values[name] for name in names}) if names else kind("words")


@pytest.mark.parametrize("name", hypercell._ERRORS.split())
def test_every_error_can_be_pickled(name: str) -> None:
    made = _an_error(getattr(hypercell, name))
    for again in (pickle.loads(pickle.dumps(made)), copy.copy(made)):
        assert (type(again), str(again), again.args, again.__dict__) == (
            type(made),
            str(made),
            made.args,
            made.__dict__,
        )


def test_an_error_passes_out_of_a_pool() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(NotFoundError, match="words") as raised:
            pool.submit(_raise, _an_error(NotFoundError)).result()
        assert raised.value.status == 404


def _raise(error: HypercellError) -> None:
    raise error


@pytest.mark.parametrize(
    "given", ["", ".", "..", "../../0", "a/b", "a%2Fb", "a?b", "a#b", "a b", "\r\n", "é", "x" * 200]
)
async def test_what_cannot_be_an_id_never_reaches_a_url(given: str) -> None:
    nowhere = Gateway(url="http://127.0.0.1:1")
    with pytest.raises(NotFoundError):
        await AsyncSandbox.connect(given, url=nowhere.url)
    with pytest.raises(NotFoundError):
        await AsyncSandbox.delete_snapshot(given, url=nowhere.url)
    async with Transport.leased(nowhere) as transport:
        commands = AsyncCommands(transport, str(uuid.uuid4()))
        for use in (commands.get, commands.kill, commands.attach, lambda known: commands.signal(known, "SIGINT")):
            with pytest.raises(NotFoundError):
                await use(given)
        for make in (AsyncCommands, AsyncFiles, AsyncKernel):
            with pytest.raises(NotFoundError):
                make(transport, given)
