"""Where things lie inside the guest, as one value, so that tests can run the same processes elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Paths:
    """run: a tmpfs directory of the agent; home: the kernel user's home; ports: the directory where vmlinux names the
    virtio ports; dev: their device nodes."""

    run: Path = Path("/run/hypercell")
    home: Path = Path("/home/user")
    ports: Path = Path("/sys/class/virtio-ports")
    dev: Path = Path("/dev")

    @property
    def identity(self) -> Path:
        """Who this sandbox is, as JSON: what the last HELLO had."""
        return self.run / "identity.json"

    @property
    def hosts(self) -> Path:
        """What lies at /etc/hosts."""
        return self.run / "hosts"

    @property
    def kernel_dir(self) -> Path:
        """Holds the kernel's ZMQ sockets k-1..k-5 and its connection file."""
        return self.run / "kernel"

    @property
    def host_calls(self) -> Path:
        """The socket through which any process in the guest calls the host."""
        return self.run / "sandbox.sock"

    def kernel_socket(self, port: int) -> Path:
        return self.kernel_dir / f"k-{port}"


# Jupyter's channels and the `port` each has in a connection file of transport ipc (its socket is `k-<port>`).
CHANNEL_PORTS = {"shell": 1, "iopub": 2, "stdin": 3, "control": 4, "hb": 5}
