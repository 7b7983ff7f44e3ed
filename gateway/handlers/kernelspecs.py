"""Jupyter's kernelspecs, one per template, and the files of their logos."""

from __future__ import annotations

import asyncio
import mimetypes
from pathlib import Path

from gateway.endpoint import OCTETS, Call, Routes
from gateway.errors import ApiError
from gateway.models import KernelspecAnswer, KernelspecsAnswer
from kernels.models import Kernelspec

routes = Routes()


def _files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_file()) if directory.is_dir() else []


async def _answer(kernelspec: Kernelspec) -> KernelspecAnswer:
    return KernelspecAnswer.of_kernelspec(kernelspec, await asyncio.to_thread(_files, kernelspec.resource_dir))


def _find(call: Call) -> Kernelspec:
    name = call.path["name"]
    kernelspec = call.gateway.service.kernelspecs().get(name)
    if kernelspec is None:
        raise ApiError(404, "kernelspec_not_found", f"Kernel spec {name} not found")
    return kernelspec


@routes("GET /api/kernelspecs")
async def list_kernelspecs(call: Call) -> KernelspecsAnswer:
    """All kernelspecs and the default one."""
    kernelspecs = call.gateway.service.kernelspecs()
    answers = {name: await _answer(kernelspec) for name, kernelspec in kernelspecs.items()}
    default = call.gateway.default_template() if kernelspecs else "python3"
    return KernelspecsAnswer(default=default, kernelspecs=answers)


@routes("GET /api/kernelspecs/{name}", errors=(404,))
async def get_kernelspec(call: Call) -> KernelspecAnswer:
    """One kernelspec."""
    return await _answer(_find(call))


@routes("GET /kernelspecs/{name}/{file}", media="image/*", errors=(404,))
async def get_kernelspec_resource(call: Call) -> bytes:
    """A logo."""
    directory, file = _find(call).resource_dir, call.path["file"]
    # Only names that the listing shows: nothing outside the directory can be among them.
    if file not in await asyncio.to_thread(_files, directory):
        raise ApiError(404, "resource_not_found", f"The kernelspec {call.path['name']} has no file {file}.")
    content = await asyncio.to_thread((directory / file).read_bytes)
    media, _ = mimetypes.guess_type(file)
    # Logos change with the server's version only; browsers ask for them on every page.
    call.headers.update({"Content-Type": media or OCTETS, "Cache-Control": "private, max-age=86400"})
    return content
