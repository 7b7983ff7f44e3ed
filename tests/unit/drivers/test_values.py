"""The driver's pure parts: states, reasons of death, empty overlays, the tiny guest, records, users."""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conformance import pvh
from vm_runtime.confinement.host import FIRST_UID, UID_COUNT, machine_uid
from vm_runtime.drivers.console import CONSOLE_TAIL_BYTES, MAX_QUOTE_CHARACTERS, Tail, printable
from vm_runtime.drivers.qemu import qcow2
from vm_runtime.drivers.qemu.death import Evidence, reason
from vm_runtime.drivers.qemu.record import MachineRecord
from vm_runtime.errors import MachineStateError
from vm_runtime.states import TRANSITIONS, RunState, advance, require

NOTHING = Evidence(
    requested=False,
    exit_status=None,
    signal=None,
    control_lost=None,
    oom_kills=0,
    shutdown_reason=None,
    guest_panicked=False,
    stderr="",
    serial="",
)


def test_every_state_ends_in_death_and_nothing_follows_it() -> None:
    assert set(TRANSITIONS) == set(RunState)
    assert TRANSITIONS[RunState.DEAD] == frozenset()
    assert all(RunState.DEAD in after for state, after in TRANSITIONS.items() if state is not RunState.DEAD)


def test_a_guard_says_what_it_found_and_what_it_wanted() -> None:
    with pytest.raises(MachineStateError, match="paused; this needs it to be running") as caught:
        require(RunState.PAUSED, RunState.RUNNING)
    assert (caught.value.found, caught.value.wanted) == ("paused", "running")
    with pytest.raises(MachineStateError):
        advance(RunState.DEAD, RunState.RUNNING)


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        (replace(NOTHING, requested=True, signal=9), "on request"),
        (replace(NOTHING, signal=9, oom_kills=1), "out of memory"),
        (replace(NOTHING, signal=9), "SIGKILL"),
        (replace(NOTHING, signal=9, control_lost="QMP broke"), "controlled any more: QMP broke"),
        (replace(NOTHING, signal=31, stderr="x\n"), "SIGSYS: x"),
        (replace(NOTHING, exit_status=1, stderr="qemu: warning: old\nqemu: no such disk\n"), "status 1: qemu: no such"),
        (replace(NOTHING, exit_status=1, stderr="qemu: no disk\nqemu: warning: old\n"), "no disk"),
        (replace(NOTHING, exit_status=0, shutdown_reason="guest-shutdown"), "powered itself off"),
        (replace(NOTHING, exit_status=0, shutdown_reason="guest-reset"), "rebooted or crashed"),
        (
            replace(
                NOTHING,
                shutdown_reason="guest-reset",
                serial="[1] Kernel panic - not syncing: Attempted to kill init!\r\n[2] CPU: 0",
            ),
            "Attempted to kill init!",
        ),
        (NOTHING, "nobody could see how"),
    ],
)
def test_reason_of_death(evidence: Evidence, words: str) -> None:
    assert words in reason(evidence)


@given(st.binary(max_size=2000), st.binary(max_size=2000), st.one_of(st.none(), st.integers(-5, 300)))
def test_no_output_of_a_guest_breaks_the_reason(serial: bytes, stderr: bytes, signal: int | None) -> None:
    text = reason(replace(NOTHING, serial=printable(serial), stderr=printable(stderr), signal=signal))
    assert text.isprintable()
    assert len(text) < MAX_QUOTE_CHARACTERS + 200


@given(st.lists(st.binary(max_size=40000), max_size=8))
def test_a_tail_is_the_end_of_all_that_came(chunks: list[bytes]) -> None:
    async_free = Tail()
    for chunk in chunks:
        async_free.add(chunk)
    assert async_free.data() == b"".join(chunks)[-CONSOLE_TAIL_BYTES:]


@pytest.mark.parametrize("size_mib", [1, 64, 1024, 512 * 1024, 9 * 1024 * 1024])
def test_qemu_img_finds_nothing_wrong_with_an_empty_overlay(tmp_path: Path, size_mib: int) -> None:
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img (qemu-utils) is not installed")
    path = tmp_path / "disk.qcow2"
    qcow2.create_overlay(path, virtual_bytes=size_mib << 20)
    subprocess.run(["qemu-img", "check", "-q", path], check=True)
    information = subprocess.run(["qemu-img", "info", path], check=True, capture_output=True, text=True).stdout
    assert f"({size_mib << 20} bytes)" in information
    assert "backing" not in information
    with pytest.raises(FileExistsError):
        qcow2.create_overlay(path, virtual_bytes=1 << 20)


def test_the_tiny_guest_is_an_elf_with_a_pvh_entry() -> None:
    elf = pvh.elf()
    assert elf[:5] == b"\x7fELF\x01"
    kind, offset, address, _, size, *_ = struct.unpack_from("<8I", elf, 52)
    assert (kind, address, offset + size) == (1, pvh.LOAD_ADDRESS, len(elf))
    note = struct.unpack_from("<8I", elf, 52 + 32)[1]
    assert struct.unpack_from("<III4sI", elf, note) == (4, 4, 18, b"Xen\0", pvh.LOAD_ADDRESS)
    assert len(elf) < 300


def test_a_record_comes_back_as_it_was_and_others_are_not_believed(tmp_path: Path) -> None:
    record = MachineRecord(
        id="m1",
        pid=1,
        start_time=2,
        boot_id="b",
        memory_mib=64,
        vcpus=1,
        disk_mib=64,
        image_digest="00",
        vmlinux=Path("/v"),
        initramfs=Path("/i"),
        rootfs=Path("/r"),
        memory_inode=3,
        memory_fd=None,
        disk_chain=(Path("/d"),),
        disk_node="disk0",
        overlay=Path("/d"),
        cgroups=(),
    )
    record.write(tmp_path)
    assert MachineRecord.read(tmp_path) == record
    record.model_copy(update={"format": 2}).write(tmp_path)
    assert MachineRecord.read(tmp_path) is None
    (tmp_path / "machine.json").write_text("{")
    assert MachineRecord.read(tmp_path) is None
    assert MachineRecord.read(tmp_path / "nowhere") is None


def test_each_machine_has_a_user_of_its_own() -> None:
    users = {machine_uid(f"m{number}") for number in range(200)}
    assert len(users) == 200
    assert all(FIRST_UID <= user < FIRST_UID + UID_COUNT for user in users)
