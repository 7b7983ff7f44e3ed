"""Gives any Jupyter application of this user a kernel in a machine: a jupyter_client kernel provisioner.

Asks the local gateway for a kernel and hands out its `ipc://` endpoints; messages never pass through HTTP.

    application's word                  what happens here
    launch_kernel, first                POST /api/kernels, then GET /api/sandboxes/{id}/connection
    launch_kernel, again (a restart)    POST /api/kernels/{id}/restart: same machine, same files, new kernel process
    kill, terminate, shutdown           the kernel counts as ended at once
    cleanup(restart=False)              DELETE /api/kernels/{id}, which stops it gracefully
    cleanup(restart=True)               nothing: the machine is kept for the launch that follows
    poll, every 3 s                     GET /api/kernels/{id}; a kernel that has crashed is dead, though the gateway
                                        has started another in its place, until the next launch takes that one

jupyter_client removes a kernel's `ipc` sockets itself when it restarts or ends it. The sockets belong to the gateway,
so what is handed out is a directory of links to them.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jupyter_client.connect import KernelConnectionInfo, port_names
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase
from traitlets import Unicode

from hypercell.client import START_TIMEOUT_S, request, request_async
from hypercell.errors import GatewayRefusedError, HypercellError, NoGatewayError, UnsupportedError
from hypercell.identifiers import in_path
from hypercell.locate import Gateway, locate

# What `poll` and `wait` answer, as subprocess.Popen would: negative is the signal that ended the process.
EXIT_OF_A_STOPPED_KERNEL = 0
EXIT_OF_A_LOST_KERNEL = 1

# An application that is exiting waits no longer than this to have its kernel's machine removed.
EXIT_TIMEOUT_S = 5.0

WAIT_INTERVAL_S = 0.1

HTTP_NOT_FOUND = 404


class HypercellProvisioner(KernelProvisionerBase):
    """One kernel in a machine of the local gateway, as jupyter_client's KernelManager sees it."""

    template = Unicode(
        "",
        config=True,
        help="The gateway's kernelspec that the kernel is made from; empty for the gateway's default.",
    )

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._gateway: Gateway | None = None
        self._sandbox_id: str | None = None
        self._links: Path | None = None
        # How many crashes the gateway counted when the kernel was launched.
        self._crashes: int | None = None
        # None while the kernel runs, then its exit status; has_process stays true until `wait` has collected it.
        self._exit_code: int | None = EXIT_OF_A_STOPPED_KERNEL
        self._collected = True

    @property
    def has_process(self) -> bool:
        """Whether there is a kernel whose end has not been collected by `wait`."""
        return not self._collected

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Keeps of the environment what was meant for this kernel; the application's own stays outside the machine."""
        launch: dict[str, Any] = await super().pre_launch(**kwargs)
        if extra_arguments := launch.pop("extra_arguments", None):
            self.log.warning("The kernel is restored, not started: it takes no arguments (%s)", extra_arguments)
        launch["env"] = _kernel_environment(launch["env"], launch.get("cwd"), self.kernel_spec.env)
        launch.setdefault("cmd", self.kernel_spec.argv)
        return launch

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Starts a kernel, or starts it anew in the machine it had. Returns the connection info to use.

        `cmd` is not run: which program the kernel is, is the template's matter.
        """
        if self._sandbox_id is not None:
            await self._restart()
        if self._sandbox_id is None:
            await self._create(kwargs.get("env", {}))
            if not kwargs.get("independent", False):
                # As a local kernel ends with the application that forgot to stop it.
                atexit.register(self._delete_at_exit)
        try:
            self.connection_info = await self._connection_info()
        except BaseException:
            await self.cleanup(restart=False)
            raise
        self._exit_code, self._collected = None, False
        return self.connection_info

    async def poll(self) -> int | None:
        """None while the kernel runs. A gateway that cannot be asked is no dead kernel: machines outlive it."""
        if self._exit_code is None:
            try:
                model = await self._ask("GET", self._path)
            except NoGatewayError as error:
                self.log.debug("Kernel %s is taken to be alive: %s", self._sandbox_id, error)
            except GatewayRefusedError as error:
                if error.status == HTTP_NOT_FOUND:
                    self._forget()
                    self._exit_code = EXIT_OF_A_LOST_KERNEL
            else:
                if model["execution_state"] == "dead" or self._has_crashed(model):
                    reason = model.get("reason") or "it ended without being asked to"
                    self.log.error("Kernel %s is dead: %s", self._sandbox_id, reason)
                    self._exit_code = EXIT_OF_A_LOST_KERNEL
        return self._exit_code

    def _has_crashed(self, model: Mapping[str, Any]) -> bool:
        """Whether the kernel that was launched is not the one that runs."""
        if self._crashes is None:
            self._crashes = model.get("crashes")
        return bool(model.get("crashes") != self._crashes)

    async def wait(self) -> int | None:
        """Waits for the kernel's end and collects it. Callers set their own limit."""
        while await self.poll() is None:  # noqa: ASYNC110 - the end happens elsewhere; asking is all there is
            await asyncio.sleep(WAIT_INTERVAL_S)
        self._collected = True
        return self._exit_code

    async def send_signal(self, signum: int) -> None:
        """SIGINT interrupts, SIGTERM and SIGKILL end the kernel and its machine; no other signal reaches a machine.

        Raises UnsupportedError for those.
        """
        if self._exit_code is not None:
            return
        if signum == signal.SIGINT:
            await self._ask("POST", f"{self._path}/interrupt", body={})
        elif signum in {signal.SIGTERM, signal.SIGKILL}:
            await self._delete()
            self._exit_code = -signum
        elif signum != 0:
            raise UnsupportedError(
                f"{signal.Signals(signum).name} cannot be sent to a kernel in a machine. "
                "SIGINT, SIGTERM and SIGKILL can."
            )

    async def kill(self, restart: bool = False) -> None:
        """Counts the kernel as killed; `cleanup` or the next launch, one of which follows, removes or replaces it."""
        self._end(-signal.SIGKILL)

    async def terminate(self, restart: bool = False) -> None:
        """As `kill`."""
        self._end(-signal.SIGTERM)

    async def shutdown_requested(self, restart: bool = False) -> None:
        """The kernel has been sent a shutdown request; what is left to do is the gateway's part."""
        self._end(EXIT_OF_A_STOPPED_KERNEL)

    async def cleanup(self, restart: bool = False) -> None:
        """Removes the machine, unless it is to be used again. Doing it twice is harmless."""
        if not restart:
            await self._delete()
            self._remove_links()
            self._end(EXIT_OF_A_STOPPED_KERNEL)
            self._collected = True

    async def get_provisioner_info(self) -> dict[str, Any]:
        """What another process of this user needs to take over the kernel."""
        info: dict[str, Any] = await super().get_provisioner_info()
        return {**info, "sandbox_id": self._sandbox_id, "crashes": self._crashes}

    async def load_provisioner_info(self, provisioner_info: dict[str, Any]) -> None:
        """Takes over a kernel from `get_provisioner_info` of another process."""
        await super().load_provisioner_info(provisioner_info)
        self._sandbox_id = provisioner_info["sandbox_id"]
        self._crashes = provisioner_info.get("crashes")
        self._gateway = locate()
        if self._sandbox_id is not None:
            self._exit_code, self._collected = None, False

    def _end(self, exit_code: int) -> None:
        if self._exit_code is None:
            self._exit_code = exit_code

    @property
    def _path(self) -> str:
        return f"/api/kernels/{in_path(self._sandbox_id, 'sandbox')}"

    async def _ask(
        self, method: str, path: str, *, body: dict[str, Any] | None = None, timeout_s: float | None = None
    ) -> Any:
        if self._gateway is None:
            self._gateway = locate()
        if timeout_s is None:
            return await request_async(self._gateway, method, path, body=body)
        return await request_async(self._gateway, method, path, body=body, timeout_s=timeout_s)

    async def _create(self, env: dict[str, str]) -> None:
        # Looked up for each new kernel: the gateway may have been restarted with another port or token.
        self._gateway = locate()
        # The same id on both sides, so that the gateway's list shows the kernel that the application's log names.
        body: dict[str, Any] = {"kernel_id": self.kernel_id, "env": env}
        if self.template:
            body["name"] = self.template
        model = await self._ask("POST", "/api/kernels", body=body, timeout_s=START_TIMEOUT_S)
        self._sandbox_id = str(model["id"])
        self._crashes = model.get("crashes")

    async def _restart(self) -> None:
        try:
            model = await self._ask("GET", self._path)
            # What has lost its machine and was not used since is in the state of its last checkpoint.
            if not (self._has_crashed(model) and model.get("reason") and model["execution_state"] != "dead"):
                model = await self._ask("POST", f"{self._path}/restart", body={}, timeout_s=START_TIMEOUT_S)
            self._crashes = model.get("crashes")
        except GatewayRefusedError as error:
            # The machine is dead or gone, and its files with it: a new one is all that can be had.
            self.log.warning("Kernel %s gets a new machine: %s", self._sandbox_id, error)
            await self._delete()

    async def _connection_info(self) -> KernelConnectionInfo:
        try:
            info = await self._ask(
                "GET", f"/api/sandboxes/{in_path(self._sandbox_id, 'sandbox')}/connection", timeout_s=START_TIMEOUT_S
            )
        except GatewayRefusedError as error:
            raise HypercellError(
                f"{error} Only applications on the gateway's own machine can use its kernels through jupyter_client; "
                "from elsewhere use `hypercell lab`, or the gateway's URL in `jupyter lab --gateway-url`."
            ) from error
        links = self._links_to(info)
        # No field that jupyter_client does not know: it compares this with what it wrote itself.
        return {
            "transport": "ipc",
            "ip": str(links),
            "key": str(info["key"]).encode(),  # type: ignore[typeddict-item] # declared str, compared as bytes
            "signature_scheme": str(info["signature_scheme"]),
            "shell_port": int(info["shell_port"]),
            "iopub_port": int(info["iopub_port"]),
            "stdin_port": int(info["stdin_port"]),
            "control_port": int(info["control_port"]),
            "hb_port": int(info["hb_port"]),
        }

    def _links_to(self, info: dict[str, Any]) -> Path:
        """Links to the sockets of `info`; returns their common prefix, the same one for the life of this object."""
        if self._links is None:
            # mkdtemp gives it mode 0700. Short, as a UNIX socket's path may have 107 bytes.
            self._links = Path(tempfile.mkdtemp(prefix="hypercell-k-", dir=os.environ.get("XDG_RUNTIME_DIR")))
        prefix = self._links / "k"
        for name in port_names:
            link = Path(f"{prefix}-{info[name]}")
            link.unlink(missing_ok=True)
            link.symlink_to(f"{info['ip']}-{info[name]}")
        return prefix

    async def _delete(self) -> None:
        if self._sandbox_id is not None:
            try:
                await self._ask("DELETE", self._path)
            except GatewayRefusedError as error:
                if error.status != HTTP_NOT_FOUND:
                    raise
            except NoGatewayError as error:
                self.log.warning("Kernel %s may still run: %s", self._sandbox_id, error)
        self._forget()

    def _delete_at_exit(self) -> None:
        if self._sandbox_id is not None and self._gateway is not None:
            try:
                request(self._gateway, "DELETE", self._path, timeout_s=EXIT_TIMEOUT_S)
            except HypercellError as error:
                self.log.warning("Kernel %s may still run: %s", self._sandbox_id, error)
        self._forget()
        self._remove_links()

    def _forget(self) -> None:
        """The machine is gone. The links' place stays as it is, since clients will look there for the next one."""
        self._sandbox_id = None
        atexit.unregister(self._delete_at_exit)

    def _remove_links(self) -> None:
        if self._links is not None:
            shutil.rmtree(self._links, ignore_errors=True)
            self._links = None


def _kernel_environment(env: dict[str, str], cwd: Any, kernelspec_env: dict[str, str]) -> dict[str, str]:
    """What of `env` goes into the machine: what was added for this kernel, and what kernels are told anyway.

    jupyter_client passes the application's whole environment. Its PATH or HOME are wrong in a machine, and its secrets
    have no business there. KERNEL_WORKING_DIR is how jupyter_server's gateway client says `cwd`, too.
    """
    chosen = {
        name: value
        for name, value in env.items()
        if os.environ.get(name) != value
        or name in kernelspec_env
        or name.startswith("KERNEL_")
        or name == "JPY_SESSION_NAME"
    }
    if cwd is not None:
        chosen.setdefault("KERNEL_WORKING_DIR", str(cwd))
    return chosen
