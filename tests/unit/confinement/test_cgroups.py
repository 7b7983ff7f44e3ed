"""A machine in the background has a tenth of the CPU weight of others, in either version of cgroups."""

from __future__ import annotations

from pathlib import Path

import pytest

from vm_runtime.confinement.cgroups import Cgroup


@pytest.mark.parametrize(("file", "usual", "background"), [("cpu.weight", "100", "10"), ("cpu.shares", "1024", "102")])
def test_what_is_in_the_background_yields(tmp_path: Path, file: str, usual: str, background: str) -> None:
    memory, cpu = tmp_path / "memory", tmp_path / "cpu"
    for directory in (memory, cpu):
        directory.mkdir()
    (cpu / file).touch()
    group = Cgroup(directories=(memory, cpu, tmp_path / "gone"))
    group.set_background(True)
    assert (cpu / file).read_text() == background
    (cpu / file).write_text("")
    group.set_background(False)
    assert (cpu / file).read_text() == usual
    assert list(memory.iterdir()) == []
