"""`hypercelld snapshot`: every command, as text and as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.cli import snapshot
from vm_runtime.snapshots.manifest import Manifest, PartKind, SnapshotContents
from vm_runtime.snapshots.store import Pin, SnapshotStore


@pytest.fixture
def published(tmp_path: Path, fill: Callable[..., SnapshotContents]) -> Manifest:
    with SnapshotStore(tmp_path / "state" / "snapshots") as store, store.begin() as draft:
        return draft.publish(fill(draft, name="mine"))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    parser = argparse.ArgumentParser()
    snapshot.register(parser.add_subparsers())

    def run(*arguments: str, state: str = "state") -> int:
        parsed = parser.parse_args(["snapshot", *arguments, "--state-dir", str(tmp_path / state)])
        return int(parsed.func(parsed))

    return run


def test_the_commands_that_look(
    published: Manifest, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("ls") == 0
    assert published.id[:12] in capsys.readouterr().out
    assert run("ls", "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["id"], entry["name"], entry["needed_by"]) == (published.id, "mine", [])
    assert run("inspect", "mine") == 0
    assert json.loads(capsys.readouterr().out)["wire_marker"] == "cd" * 16
    assert run("verify", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {published.id: []}


def test_a_damaged_snapshot_makes_verify_fail(
    published: Manifest, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (device,) = published.state.of_kind(PartKind.DEVICE)
    (tmp_path / "state" / "snapshots" / "parts" / "device" / device.digest).write_bytes(b"dEvice")
    assert run("verify", published.id[:6]) == 1
    assert "BROKEN" in capsys.readouterr().out


def test_export_and_import(
    published: Manifest, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", "mine", str(tmp_path / "file")) == 0
    assert run("import", str(tmp_path / "file"), state="other") == 1
    assert "image" in capsys.readouterr().err
    (tmp_path / "other" / "images" / published.image_digest).mkdir(parents=True)
    assert run("import", str(tmp_path / "file"), "--json", state="other") == 0
    assert json.loads(capsys.readouterr().out)["id"] == published.id


def test_rm_and_gc(
    published: Manifest, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with SnapshotStore(tmp_path / "state" / "snapshots") as store:
        store.pin("sandbox-7", Pin(snapshots=(published.id,)))
        assert run("rm", "mine", "--json") == 1
        assert "sandbox-7" in json.loads(capsys.readouterr().out)["error"]
        store.unpin("sandbox-7")
    assert run("rm", "mine") == 0
    capsys.readouterr()
    assert run("gc", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"parts": 0, "drafts": 0, "freed_bytes": 0}


def test_an_unknown_snapshot_is_an_error_for_people(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", "nothing") == 1
    assert "There is no snapshot nothing" in capsys.readouterr().err
