"""Flags before environment before file, and sentences for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.cli import main
from gateway.errors import StartError
from gateway.settings import GatewaySettings, load_settings
from kernels.directories import default_state_dir


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in GatewaySettings.model_fields:
        monkeypatch.delenv(f"HYPERCELL_{name.upper()}", raising=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text('port = 1\npool_size = 2\nmax_vcpus = 3\ncors_origins = ["https://a.example"]\n')
    return path


def test_flags_win_over_environment_over_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERCELL_PORT", "10")
    monkeypatch.setenv("HYPERCELL_POOL_SIZE", "11")
    settings = load_settings(config=config, flags={"port": "20"})
    assert (settings.port, settings.pool_size, settings.max_vcpus) == (20, 11, 3)
    assert settings.cors_origins == ("https://a.example",)


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERCELL_ALLOWED_HOSTS", "a.example, b.example")
    assert load_settings().allowed_hosts == ("a.example", "b.example")


def test_idle_times_by_kernelspec(config: Path) -> None:
    assert load_settings(flags={"idle_timeouts_s": "python3=600, r=0"}).idle_timeouts_s == {"python3": 600, "r": 0}
    config.write_text("idle_timeouts_s = {python3 = 60}")
    assert load_settings(config=config).idle_timeouts_s == {"python3": 60}
    with pytest.raises(StartError, match="idle_timeouts_s"):
        load_settings(flags={"idle_timeouts_s": "python3"})


def test_other_variables_are_not_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERCELL_URL", "http://localhost")
    load_settings()


def test_every_setting_is_described() -> None:
    assert [name for name, field in GatewaySettings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "lab.example.org"])
def test_beyond_loopback_takes_a_token(host: str) -> None:
    with pytest.raises(StartError, match="lets other machines in"):
        load_settings(flags={"host": host})
    assert load_settings(flags={"host": host, "token": "x"}).token == "x"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": "nine"}, "port: .*integer"),
        ({"port": 70000}, "port: .*65535"),
        ({"token": ""}, "token: a token has"),
        ({"token": "a b"}, "token: a token has"),
        ({"colour": "red"}, "no setting named colour"),
    ],
)
def test_mistakes_are_told(flags: dict[str, object], words: str) -> None:
    with pytest.raises(StartError, match=words):
        load_settings(flags=flags)


def test_a_broken_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    with pytest.raises(StartError, match="cannot be read"):
        load_settings(config=path)
    path.write_text("port = ")
    with pytest.raises(StartError, match="cannot be read"):
        load_settings(config=path)
    path.write_text("colour = 1")
    with pytest.raises(StartError, match="no setting named colour"):
        load_settings(config=path)


def test_the_help_names_every_default(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    told = capsys.readouterr().out
    assert "Undefined" not in told
    assert f"Default: {default_state_dir()}" in told
    assert "Default: True" in told
