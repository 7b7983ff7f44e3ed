"""One gateway per state directory, and files that name it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gateway.errors import StartError
from gateway.runtime_files import gateway_files, state_lock
from kernels.directories import well_known_file


@pytest.fixture(autouse=True)
def _runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))


def test_a_second_gateway_is_refused(tmp_path: Path) -> None:
    with state_lock(tmp_path / "state"), pytest.raises(StartError, match=rf"pid {os.getpid()}"):  # noqa: SIM117
        with state_lock(tmp_path / "state"):
            pass
    with state_lock(tmp_path / "state"):
        pass


def test_an_unusable_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="cannot be used"), state_lock(tmp_path / "file"):
        pass


def test_files_tell_where_it_is_and_go(tmp_path: Path) -> None:
    own = tmp_path / "run" / "gateway.json"
    with gateway_files(url="http://x", token="t", state_dir=tmp_path, run_dir=tmp_path / "run"):
        for path in (own, well_known_file()):
            assert path.stat().st_mode & 0o777 == 0o600
            assert json.loads(path.read_text()) == {
                "url": "http://x",
                "token": "t",
                "pid": os.getpid(),
                "state_dir": str(tmp_path),
            }
    assert not own.exists()
    assert not well_known_file().exists()


def test_another_living_gateway_keeps_the_well_known_file(tmp_path: Path) -> None:
    path = well_known_file()
    path.parent.mkdir(parents=True, mode=0o700)
    path.write_text(json.dumps({"pid": os.getppid()}))
    with gateway_files(url="http://x", token="t", state_dir=tmp_path, run_dir=tmp_path / "run"):
        assert json.loads(path.read_text())["pid"] == os.getppid()
    assert path.exists()


def test_a_dead_one_does_not(tmp_path: Path) -> None:
    path = well_known_file()
    path.parent.mkdir(parents=True, mode=0o700)
    path.write_text(json.dumps({"pid": 2**22 + 1}))
    with gateway_files(url="http://x", token="t", state_dir=tmp_path, run_dir=tmp_path / "run"):
        assert json.loads(path.read_text())["url"] == "http://x"
