"""Jupyter's sessions, by jupyter_server's rules: one per path, deleting it deletes the kernel."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

from gateway.endpoint import Call, Routes
from gateway.errors import ApiError
from gateway.handlers.kernels import CREATE_ERRORS
from gateway.models import (
    KERNEL_ID,
    CreateSession,
    NotebookAnswer,
    PatchSession,
    SessionAnswer,
    SessionKernel,
    notebook_of,
)
from gateway.sessions import Session
from gateway.state import Gateway
from kernels.errors import UnknownSandboxError
from kernels.models import CreateSandbox, SandboxState

routes = Routes()


def _answer(gateway: Gateway, session: Session) -> SessionAnswer | None:
    """The session's model; None, and the session is forgotten, when its kernel no longer exists."""
    try:
        sandbox = gateway.kernel_sandbox(session.kernel_id)
    except UnknownSandboxError:
        gateway.sessions.remove(session.id)
        return None
    return SessionAnswer(
        id=session.id,
        path=session.path,
        name=session.name,
        type=session.type,
        kernel=gateway.kernel(sandbox),
        notebook=NotebookAnswer(path=session.path, name=session.name),
    )


def _find(call: Call) -> tuple[Session, SessionAnswer]:
    session = call.gateway.sessions.get(call.path["session_id"])
    answer = _answer(call.gateway, session) if session else None
    if session is None or answer is None:
        raise ApiError(404, "session_not_found", f"Session not found: {call.path['session_id']}")
    return session, answer


async def _kernel_for(gateway: Gateway, wanted: SessionKernel | None, *, path: str, notebook: str | None) -> str:
    """The id of the kernel that a session asks for, started or woken where it is not there. notebook: whose kernel may
    have been left behind; None: a new one in any case."""
    wanted = wanted or SessionKernel()
    if wanted.id is not None:
        with suppress(UnknownSandboxError):
            sandbox = gateway.kernel_sandbox(wanted.id)
            if sandbox.state is not SandboxState.CREATING:  # else the id is taken, which `create` refuses
                return sandbox.id
    request = CreateSandbox(
        template=wanted.name or gateway.default_template(),
        kernel_id=wanted.id if wanted.id and KERNEL_ID.match(wanted.id) else None,
        env={"JPY_SESSION_NAME": path},
        notebook=notebook,
    )
    return (await gateway.create(request)).id


def _notebook(session: Session) -> str | None:
    """The notebook that a session's kernel belongs to."""
    return notebook_of(session.path) if session.type == "notebook" else None


@routes("GET /api/sessions")
async def list_sessions(call: Call) -> list[SessionAnswer]:
    """All sessions."""
    answers = (_answer(call.gateway, session) for session in call.gateway.sessions.all())
    return [answer for answer in answers if answer is not None]


@routes(
    "POST /api/sessions",
    status=201,
    errors=CREATE_ERRORS,
    headers={"Location": "The session's path."},
    ends_with_client=True,
)
async def create_session(call: Call, body: CreateSession) -> SessionAnswer:
    """A session for a document, with a new kernel or a given one; or the session it has."""
    gateway = call.gateway
    # Two windows that open one notebook at the same moment must get one session.
    async with gateway.session_locks.setdefault(body.path, asyncio.Lock()):
        session = gateway.sessions.by_path(body.path)
        answer = _answer(gateway, session) if session else None
        if answer is None:
            notebook = notebook_of(body.path) if body.type == "notebook" else None
            kernel_id = await _kernel_for(gateway, body.kernel, path=body.path, notebook=notebook)
            session = gateway.sessions.add(path=body.path, name=body.name, type=body.type, kernel_id=kernel_id)
            answer = _answer(gateway, session)
    if answer is None:
        raise ApiError(502, "machine_failed", "The session's kernel was gone before the session was there.")
    call.headers["Location"] = f"/api/sessions/{answer.id}"
    return answer


@routes("GET /api/sessions/{session_id}", errors=(404,))
async def get_session(call: Call) -> SessionAnswer:
    """One session."""
    return _find(call)[1]


@routes("PATCH /api/sessions/{session_id}", errors=CREATE_ERRORS)
async def patch_session(call: Call, body: PatchSession) -> SessionAnswer:
    """Renames a session or changes its kernel; the old kernel ends."""
    gateway = call.gateway
    before, _ = _find(call)
    after = replace(
        before,
        path=before.path if body.path is None else body.path,
        name=before.name if body.name is None else body.name,
        type=before.type if body.type is None else body.type,
    )
    if body.kernel is not None and body.kernel.id is not None:
        try:
            after = replace(after, kernel_id=gateway.kernel_sandbox(body.kernel.id).id)
        except UnknownSandboxError as error:
            raise ApiError(400, "kernel_not_found", f"No such kernel: {body.kernel.id}") from error
    elif body.kernel is not None and body.kernel.name is not None:
        # The notebook's own kernel, which may sleep, is the one that this replaces.
        after = replace(after, kernel_id=await _kernel_for(gateway, body.kernel, path=after.path, notebook=None))
    gateway.sessions.put(after)
    with suppress(UnknownSandboxError):
        gateway.service.configure(after.kernel_id, notebook=_notebook(after))
    if after.kernel_id != before.kernel_id:
        # For good, also where a delete means sleep: who chose another kernel does not want this one back.
        with suppress(UnknownSandboxError):
            await gateway.service.delete(before.kernel_id)
    return _find(call)[1]


@routes("DELETE /api/sessions/{session_id}", errors=(404,))
async def delete_session(call: Call) -> None:
    """Ends a session and its kernel, as deleting the kernel does."""
    session, _ = _find(call)
    call.gateway.sessions.remove(session.id)
    with suppress(UnknownSandboxError):  # someone else was faster
        await call.gateway.release(session.kernel_id)
