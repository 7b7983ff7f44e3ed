"""`hypercelld serve`: listens, then sees to image, machines and templates, each with a line for the person who
waits."""

from __future__ import annotations

import argparse
import asyncio
import logging
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pydantic.fields import FieldInfo

from gateway.errors import StartError
from gateway.listener import listening
from gateway.runtime_files import gateway_files, state_lock
from gateway.serving import serving
from gateway.settings import GatewaySettings, load_settings
from gateway.state import Gateway
from kernels.errors import KernelsError
from kernels.host import open_service
from vm_runtime.errors import VmRuntimeError
from vm_runtime.images.errors import ImageError
from vm_runtime.images.progress import by_line
from vm_runtime.images.recipe import DEFAULT_RECIPE, load_recipe
from vm_runtime.images.store import ImageStore

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def register(subparsers: Subparsers) -> None:
    """Adds `serve`; every setting is a flag of it."""
    parser = subparsers.add_parser("serve", help="serve kernels until SIGTERM or Ctrl-C")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
    for name, field in GatewaySettings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        if field.annotation is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=None, help=_help(field))
        else:
            parser.add_argument(flag, default=None, metavar="VALUE", help=_help(field))
    parser.set_defaults(func=run)


def _help(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    text = str(field.description)
    if default in (None, (), {}):
        return text
    return f"{text} Default: {default}".replace("%", "%%")


def run(arguments: argparse.Namespace) -> int:
    """The command. Ends with 0 after a signal, with 1 and a sentence when it cannot start."""
    flags: dict[str, Any] = {
        name: value for name in GatewaySettings.model_fields if (value := getattr(arguments, name)) is not None
    }
    try:
        settings = load_settings(config=arguments.config, flags=flags)
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        asyncio.run(_until_signal(settings))
    except (StartError, KernelsError, VmRuntimeError, ImageError) as error:
        print(f"hypercelld: {error}", file=sys.stderr)
        return 1
    return 0


def show(text: str) -> None:
    """A line for the person who started the gateway."""
    print(text, flush=True)


async def _until_signal(settings: GatewaySettings) -> None:
    task = asyncio.current_task()
    assert task is not None
    stopping = False

    def stop() -> None:
        # Once: a second signal must not break off the cleaning up that the first one began.
        nonlocal stopping
        if not stopping:
            stopping = True
            show("Stopping.")
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        async with running(settings) as gateway:
            # As a URL, and as a shell reads it.
            show(f"Hypercell serves at {gateway.url}/?token={quote(gateway.token, safe='')}")
            show(
                f"  jupyter lab --gateway-url={gateway.url} "
                f"{shlex.quote(f'--GatewayClient.auth_token={gateway.token}')} "
                "--GatewayClient.allowed_envs=JPY_SESSION_NAME"
            )
            show("  hypercell lab")
            kernels = "sleep until the next start" if settings.stop_means_sleep else "end, too"
            show(f"Ctrl-C ends it; kernels {kernels}.")
            await asyncio.Event().wait()
    except asyncio.CancelledError:
        if not stopping:
            raise
    show("Stopped.")


@asynccontextmanager
async def running(settings: GatewaySettings) -> AsyncIterator[Gateway]:
    """The whole gateway, from nothing to serving, and back. Errors: StartError, KernelsError, VmRuntimeError,
    ImageError."""
    with state_lock(settings.state_dir), _removed_if_empty(settings.run_dir):
        async with listening(host=settings.host, port=settings.port) as listener:

            def progress(text: str) -> None:
                show(text)
                listener.set_progress(text)

            await _ensure_image(settings, progress)
            async with open_service(settings, progress=progress) as service:
                await service.prepare(progress=progress)
                async with serving(settings, service, listener) as gateway:
                    with gateway_files(
                        url=gateway.url, token=gateway.token, state_dir=settings.state_dir, run_dir=settings.run_dir
                    ):
                        yield gateway


@contextmanager
def _removed_if_empty(run_dir: Path) -> Iterator[None]:
    """At the end removes the runtime directory, unless machines that outlive this gateway have something there."""
    try:
        yield
    finally:
        for directory in (run_dir / "m", run_dir / "k", run_dir):
            with suppress(OSError):
                directory.rmdir()


async def _ensure_image(settings: GatewaySettings, progress: Callable[[str], None]) -> None:
    images = ImageStore(settings.state_dir / "images")
    if not images.current():
        progress("There is no image yet; building the default one (`hypercelld image build`) takes some minutes.")
        await images.build(load_recipe(DEFAULT_RECIPE), by_line(progress))
