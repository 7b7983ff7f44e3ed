"""Jupyter's kernelspecs, one per template, and the files of their logos."""

from __future__ import annotations

import asyncio
import mimetypes
from pathlib import Path

from gateway.endpoint import Call, Endpoint, Operation, Reply
from gateway.errors import ApiError
from gateway.models import KernelspecAnswer, KernelspecsAnswer
from kernels.models import Kernelspec


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


async def list_kernelspecs(call: Call) -> Reply:
    kernelspecs = call.gateway.service.kernelspecs()
    answers = {name: await _answer(kernelspec) for name, kernelspec in kernelspecs.items()}
    default = call.gateway.default_template() if kernelspecs else "python3"
    return Reply(body=KernelspecsAnswer(default=default, kernelspecs=answers))


async def get_kernelspec(call: Call) -> Reply:
    return Reply(body=await _answer(_find(call)))


async def get_resource(call: Call) -> Reply:
    directory, file = _find(call).resource_dir, call.path["file"]
    # Only names that the listing shows: nothing outside the directory can be among them.
    if file not in await asyncio.to_thread(_files, directory):
        raise ApiError(404, "resource_not_found", f"The kernelspec {call.path['name']} has no file {file}.")
    content = await asyncio.to_thread((directory / file).read_bytes)
    media, _ = mimetypes.guess_type(file)
    # Logos change with the server's version only; browsers ask for them on every page.
    headers = {"Cache-Control": "private, max-age=86400"}
    return Reply(body=content, content_type=media or "application/octet-stream", headers=headers)


ENDPOINTS = (
    Endpoint(
        path="/api/kernelspecs",
        operations={
            "GET": Operation(
                name="listKernelspecs",
                summary="All kernelspecs and the default one.",
                run=list_kernelspecs,
                reply=KernelspecsAnswer,
            )
        },
    ),
    Endpoint(
        path="/api/kernelspecs/{name}",
        parameters={"name": "The kernelspec's name."},
        operations={
            "GET": Operation(
                name="getKernelspec",
                summary="One kernelspec.",
                run=get_kernelspec,
                reply=KernelspecAnswer,
                errors=(404,),
            )
        },
    ),
    Endpoint(
        path="/kernelspecs/{name}/{file}",
        parameters={"name": "The kernelspec's name.", "file": "The file's name, as `resources` has it."},
        operations={
            "GET": Operation(
                name="getKernelspecResource",
                summary="A logo.",
                run=get_resource,
                reply=bytes,
                media="image/*",
                errors=(404,),
            )
        },
    ),
)
