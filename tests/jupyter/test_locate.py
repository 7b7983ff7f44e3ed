"""Where the SDK looks for the gateway, and what the command `hypercell` says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hypercell import cli
from hypercell.errors import NoGatewayError
from hypercell.locate import Gateway, local_gateway, locate

ELSEWHERE = {"HYPERCELL_URL": "http://elsewhere:1/", "HYPERCELL_TOKEN": "from environment"}


@pytest.fixture
def runtime(tmp_path: Path) -> dict[str, str]:
    """An environment in which the well-known file is the test's."""
    (tmp_path / "hypercell").mkdir()
    return {"XDG_RUNTIME_DIR": str(tmp_path)}


def write_gateway_file(runtime: dict[str, str], *, pid: int) -> Path:
    path = Path(runtime["XDG_RUNTIME_DIR"]) / "hypercell/gateway.json"
    path.write_text(json.dumps({"url": "http://127.0.0.1:2", "token": "from file", "pid": pid, "state_dir": "/"}))
    return path


def test_arguments_come_before_the_environment_and_the_environment_before_the_file(runtime: dict[str, str]) -> None:
    write_gateway_file(runtime, pid=os.getpid())
    everything = {**runtime, **ELSEWHERE}
    assert locate(url="http://here:3", token="given", environ=everything) == Gateway(url="http://here:3", token="given")
    assert locate(environ=everything) == Gateway(url="http://elsewhere:1", token="from environment")
    assert locate(environ=runtime) == Gateway(url="http://127.0.0.1:2", token="from file")
    for given in ({"token": "given", "environ": runtime}, {"environ": {**runtime, "HYPERCELL_TOKEN": "given"}}):
        assert locate(**given) == Gateway(url="http://127.0.0.1:2", token="given")


def test_a_file_left_by_a_dead_gateway_is_told_apart(runtime: dict[str, str]) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_gateway_file(runtime, pid=ended.pid)
    with pytest.raises(NoGatewayError, match=rf"process {ended.pid}\) has ended"):
        local_gateway(environ=runtime)


def test_a_broken_file_is_named(runtime: dict[str, str]) -> None:
    path = write_gateway_file(runtime, pid=1)
    path.write_text("{")
    with pytest.raises(NoGatewayError, match=str(path)):
        local_gateway(environ=runtime)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_file_of_another_user_is_refused(runtime: dict[str, str]) -> None:
    path = write_gateway_file(runtime, pid=os.getpid())
    os.chown(path, 65534, 65534)
    # Root's files are trusted by everyone, so only the reverse direction can be shown here.
    assert path.stat().st_uid == 65534
    with pytest.raises(NoGatewayError, match="belongs to another user"):
        local_gateway(environ=runtime)


def test_something_that_is_no_url_is_refused() -> None:
    with pytest.raises(NoGatewayError, match="HYPERCELL_URL says"):
        locate(environ={"HYPERCELL_URL": "localhost:8888"})


def test_the_token_is_not_shown() -> None:
    assert "secret" not in repr(Gateway(url="http://here", token="secret"))


def test_the_command_says_in_one_sentence_that_nothing_answers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPERCELL_URL", "nonsense")
    assert cli.main(["lab"]) == 1
    assert capsys.readouterr().err.startswith("hypercell: HYPERCELL_URL says the gateway is at 'nonsense'")


def test_kernelspecs_are_installed_listed_and_removed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share/jupyter"))
    install = ["kernelspec", "install", "--prefix", str(tmp_path), "--name", "small", "--template", "python-small"]
    assert cli.main(install) == 0
    directory = tmp_path / "share/jupyter/kernels/small"
    written = json.loads((directory / "kernel.json").read_text())
    assert written["metadata"]["kernel_provisioner"] == {
        "provisioner_name": "hypercell-provisioner",
        "config": {"template": "python-small"},
    }
    assert written["interrupt_mode"] == "signal"
    assert (directory / "logo-64x64.png").exists()
    capsys.readouterr()
    assert cli.main(["kernelspec", "list"]) == 0
    assert f"small\tpython-small\t{directory}\n" in capsys.readouterr().out
    assert cli.main(["kernelspec", "remove", "--name", "small"]) == 0
    assert not directory.exists()
    assert cli.main(["kernelspec", "remove", "--name", "small"]) == 1


def test_importing_the_sdk_loads_nothing_else() -> None:
    program = (
        "import sys; before = set(sys.modules); import hypercell; loaded = set(sys.modules) - before; "
        "print(sorted(name for name in loaded if name.partition('.')[0] not in sys.stdlib_module_names))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "['hypercell']\n"
