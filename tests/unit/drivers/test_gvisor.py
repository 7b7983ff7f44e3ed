"""What the gVisor driver makes of values, what a machine runs first, and the calls of a control socket."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vm_runtime.drivers.gvisor.bundle import FIRST, arguments, config
from vm_runtime.drivers.gvisor.control import Control
from vm_runtime.drivers.gvisor.death import Evidence, reason
from vm_runtime.drivers.gvisor.record import FORMAT_VERSION, MachineRecord
from vm_runtime.errors import VmmCommandError, VmmProtocolError
from vm_runtime.guest.archive import guest_archive
from vm_runtime.spec import ImageFiles, MachineShape, MachineSpec

IMAGE = ImageFiles(
    digest="0" * 64, vmlinux=Path("/i/vmlinux"), initramfs=Path("/i/initramfs"), rootfs=Path("/i/rootfs")
)
SPEC = MachineSpec(shape=MachineShape(memory_mib=512, vcpus=1, disk_mib=1024), image=IMAGE)
NOTHING = Evidence(requested=False, exit_status=None, signal=None, oom_kills=0, panic="", console="")


def test_a_bundle_has_the_image_and_no_network_and_no_terminal() -> None:
    values = json.loads(config(SPEC, rootfs=Path("/i/plain"), directory=Path("/run/m/r")))
    assert values["annotations"]["dev.gvisor.spec.rootfs.source"] == "/i/plain"
    assert values["process"]["args"][:4] == ["/usr/bin/python3", "-I", "-S", "-c"]
    assert values["process"]["terminal"] is False
    assert {"type": "network"} in values["linux"]["namespaces"]
    assert all(mount["type"] in ("proc", "sysfs", "tmpfs") for mount in values["mounts"])
    command = arguments(Path("/usr/bin/runsc"), platform="systrap", directory=Path("/run/m/r"))
    assert command[0] == "/usr/bin/runsc"
    assert {"--network=none", "--host-uds=none", "--root=/run/m/r"} <= set(command)


def test_what_runs_first_takes_the_guest_archive_from_the_host(tmp_path: Path) -> None:
    # Its last lines need a machine of their own; they begin where descriptor 0 becomes the wire.
    code = FIRST.read_text().replace("/run/", f"{tmp_path}/").partition("wire = ")[0]
    archive = guest_archive()
    subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        input=len(archive).to_bytes(4, "big") + archive,
        check=True,
        timeout=60,
    )
    found = tmp_path / "hypercell/python/vm_runtime/guest/agent.py"
    assert found.read_bytes() == Path("vm_runtime/guest/agent.py").resolve().read_bytes()


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        (replace(NOTHING, requested=True, signal=9), "on request"),
        (replace(NOTHING, oom_kills=1, signal=9), "more memory than its limit"),
        (replace(NOTHING, panic="panic: not\ngoroutine 1", exit_status=2), "gVisor gave up: panic: not"),
        (replace(NOTHING, signal=9), "signal SIGKILL"),
        (replace(NOTHING, exit_status=0), "powered itself off"),
        (replace(NOTHING, exit_status=3, console="one\ntwo\n"), "status 3: two"),
        (NOTHING, "nobody could see how"),
    ],
)
def test_reason_of_death(evidence: Evidence, words: str) -> None:
    assert words in reason(evidence)


def test_a_record_comes_back_as_it_was_and_others_are_not_believed(tmp_path: Path) -> None:
    record = MachineRecord(
        format=FORMAT_VERSION, pid=1, start_time=2, boot_id="b", memory_mib=512, vcpus=1, disk_mib=1024,
        image_digest="0" * 64, vmlinux=IMAGE.vmlinux, initramfs=IMAGE.initramfs, rootfs=IMAGE.rootfs, cgroups=(),
    )  # fmt: skip
    record.write(tmp_path)
    assert MachineRecord.read(tmp_path) == record
    assert record.spec == SPEC
    record.model_copy(update={"format": 99}).write(tmp_path)
    assert MachineRecord.read(tmp_path) is None
    assert MachineRecord.read(tmp_path / "nowhere") is None


class Peer:
    """A control socket that answers each call with the next of these, piece by piece."""

    def __init__(self, path: Path, answers: list[bytes]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.files = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(4)
        self._thread = threading.Thread(target=self._serve, args=(answers,))
        self._thread.start()

    def _serve(self, answers: list[bytes]) -> None:
        with self._listener:
            for answer in answers:
                connection, _ = self._listener.accept()
                with connection:
                    data, fds, _, _ = socket.recv_fds(connection, 65536, 8)
                    self.files += len(fds)
                    for fd in fds:
                        os.close(fd)
                    self.requests.append(json.loads(data))
                    connection.sendall(answer[:3])
                    connection.sendall(answer[3:])

    def join(self) -> None:
        self._thread.join()


def test_control_calls_carry_files_and_are_answered(tmp_path: Path) -> None:
    yes = b'{"success": true, "err": "", "result": {}}'
    peer = Peer(tmp_path / "s", [yes, yes, yes])
    control = Control(tmp_path / "s")
    with (tmp_path / "s.state").open("wb") as file:
        control.restore([file.fileno()] * 3)
    control.pause()
    peer.join()
    assert [request["method"] for request in peer.requests] == [
        "Network.CreateLinksAndRoutes",
        "containerManager.Restore",
        "containerManager.Pause",
    ]
    assert peer.files == 3


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b'{"success": false, "err": "no such thing"}', VmmCommandError),
        (b"", VmmProtocolError),
        (b"[1, 2]", VmmProtocolError),
        (b"x" * 100, VmmProtocolError),
    ],
    ids=["refused", "silent", "no object", "no JSON"],
)
def test_a_call_that_is_not_answered_well_is_an_error(tmp_path: Path, answer: bytes, error: type[Exception]) -> None:
    peer = Peer(tmp_path / "s", [answer])
    call: Callable[[], None] = Control(tmp_path / "s").resume
    with pytest.raises(error):
        call()
    peer.join()


def test_a_sandbox_that_is_gone_is_an_error_of_the_call(tmp_path: Path) -> None:
    with pytest.raises(VmmProtocolError, match=r"containerManager\.Pause"):
        Control(tmp_path / "s").pause()
