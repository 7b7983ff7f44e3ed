"""Files in a sandbox over HTTP: list, stat, make directories, rename, remove. Content is in gateway/file_content.py."""

from __future__ import annotations

from gateway.endpoint import Call, Endpoint, Operation, Reply
from gateway.file_content import CHUNKS, OCTETS, ContentHandler
from gateway.file_models import (
    FileAnswer,
    ListingAnswer,
    ListQuery,
    MkdirRequest,
    PathQuery,
    PathRequest,
    RemoveQuery,
    RenameRequest,
    StatQuery,
    SymlinkRequest,
    UserQuery,
    WriteQuery,
    WrittenAnswer,
    mode_number,
)
from gateway.handlers.sandboxes import SANDBOX_ID
from kernels.files import SandboxFiles

# What the guest or its machine may answer (gateway/errors.py).
FILE_ERRORS = (400, 404, 409, 501, 502, 503, 504, 507)


async def _files(call: Call) -> SandboxFiles:
    given: UserQuery | PathRequest = call.query or call.body
    return (await call.gateway.service.files(call.path["sandbox_id"])).as_user(given.user)


async def list_files(call: Call) -> Reply:
    query: ListQuery = call.query
    files = await _files(call)
    listing = await files.list(query.path, depth=query.depth, limit=query.limit, after=query.after)
    return Reply(body=ListingAnswer.of(listing))


async def stat_file(call: Call) -> Reply:
    query: StatQuery = call.query
    files = await _files(call)
    return Reply(body=FileAnswer.of(await files.stat(query.path, follow=query.follow)))


async def make_directory(call: Call) -> Reply:
    request: MkdirRequest = call.body
    files = await _files(call)
    made = await files.mkdir(
        request.path, mode=mode_number(request.mode), parents=request.parents, exist_ok=request.exist_ok
    )
    return Reply(status=201, body=FileAnswer.of(made))


async def rename_file(call: Call) -> Reply:
    request: RenameRequest = call.body
    files = await _files(call)
    return Reply(body=FileAnswer.of(await files.rename(request.old_path, request.new_path)))


async def make_symlink(call: Call) -> Reply:
    request: SymlinkRequest = call.body
    files = await _files(call)
    return Reply(status=201, body=FileAnswer.of(await files.symlink(request.path, request.target)))


async def remove_file(call: Call) -> Reply:
    query: RemoveQuery = call.query
    files = await _files(call)
    await files.remove(query.path, recursive=query.recursive)
    return Reply(status=204)


ENDPOINTS = (
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/files",
        parameters=SANDBOX_ID,
        operations={
            "GET": Operation(
                name="listFiles",
                summary="What is in a directory, or a page of it.",
                run=list_files,
                query=ListQuery,
                reply=ListingAnswer,
                errors=FILE_ERRORS,
            )
        },
    ),
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/files/stat",
        parameters=SANDBOX_ID,
        operations={
            "GET": Operation(
                name="statFile",
                summary="One file, directory or link.",
                run=stat_file,
                query=StatQuery,
                reply=FileAnswer,
                errors=FILE_ERRORS,
            )
        },
    ),
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/files/mkdir",
        parameters=SANDBOX_ID,
        operations={
            "POST": Operation(
                name="makeDirectory",
                summary="A new directory.",
                run=make_directory,
                body=MkdirRequest,
                reply=FileAnswer,
                status=201,
                errors=FILE_ERRORS,
            )
        },
    ),
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/files/rename",
        parameters=SANDBOX_ID,
        operations={
            "POST": Operation(
                name="renameFile",
                summary="Renames or moves a file or directory; a file of the new name is replaced.",
                run=rename_file,
                body=RenameRequest,
                reply=FileAnswer,
                errors=FILE_ERRORS,
            )
        },
    ),
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/files/symlink",
        parameters=SANDBOX_ID,
        operations={
            "POST": Operation(
                name="makeSymlink",
                summary="A new link.",
                run=make_symlink,
                body=SymlinkRequest,
                reply=FileAnswer,
                status=201,
                errors=FILE_ERRORS,
            )
        },
    ),
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/files/content",
        parameters=SANDBOX_ID,
        handler=ContentHandler,
        operations={
            "GET": Operation(
                name="readFile",
                summary=f"A file's content, or a range of it. `Accept: {CHUNKS}` gets it with checksums.",
                run=None,
                query=PathQuery,
                reply=bytes,
                media=OCTETS,
                errors=(*FILE_ERRORS, 416),
            ),
            "PUT": Operation(
                name="writeFile",
                summary="Writes a file whole or not at all; one that is there is replaced, or appended to. "
                f"`Content-Type: {CHUNKS}` brings checksums with it.",
                run=None,
                query=WriteQuery,
                request_media=OCTETS,
                reply=WrittenAnswer,
                errors=FILE_ERRORS,
            ),
            "DELETE": Operation(
                name="removeFile",
                summary="Removes a file, a link or a directory.",
                run=remove_file,
                query=RemoveQuery,
                status=204,
                errors=FILE_ERRORS,
            ),
        },
    ),
)
