"""The sandbox API."""

from __future__ import annotations

from gateway.auth import is_loopback
from gateway.endpoint import Call, Routes
from gateway.errors import ApiError
from gateway.handlers.kernels import CREATE_ERRORS
from gateway.sandbox_models import (
    ConnectionAnswer,
    DeleteQuery,
    NewSandbox,
    SandboxAnswer,
    SandboxChanges,
    SandboxesQuery,
    UsageAnswer,
)

routes = Routes()

# Headers that a proxy adds to a request that came from elsewhere.
FORWARDING_HEADERS = ("Forwarded", "X-Forwarded-For", "X-Real-Ip")
# What anything that needs the sandbox's machine may end with.
STATE_ERRORS = (404, 409, 413, 502, 504)


@routes("GET /api/sandboxes", errors=(400,))
async def list_sandboxes(call: Call, query: SandboxesQuery) -> list[SandboxAnswer]:
    """Sandboxes, oldest first: all, or a page of those that match."""
    return [SandboxAnswer.of(sandbox) for sandbox in query.select(call.gateway.service.registry.sandboxes())]


@routes(
    "POST /api/sandboxes",
    status=201,
    errors=CREATE_ERRORS,
    headers={"Location": "The sandbox's path."},
    ends_with_client=True,
)
async def create_sandbox(call: Call, body: NewSandbox) -> SandboxAnswer:
    """A new sandbox with a kernel in it."""
    sandbox = await call.gateway.create(body.to_create(call.gateway.default_template()))
    call.headers["Location"] = f"/api/sandboxes/{sandbox.id}"
    return SandboxAnswer.of(sandbox)


@routes("GET /api/sandboxes/{sandbox_id}", errors=(404,))
async def get_sandbox(call: Call) -> SandboxAnswer:
    """One sandbox."""
    return SandboxAnswer.of(call.gateway.service.registry.get(call.path["sandbox_id"]))


@routes("PATCH /api/sandboxes/{sandbox_id}", errors=(400, 404, 413))
async def change_sandbox(call: Call, body: SandboxChanges) -> SandboxAnswer:
    """Changes its name, its limits of time or when checkpoints are taken."""
    service = call.gateway.service
    sandbox = service.registry.get(call.path["sandbox_id"])
    changes = body.changes(age_s=service.registry.age_s(sandbox.id))
    return SandboxAnswer.of(service.configure(sandbox.id, **changes))


@routes("POST /api/sandboxes/{sandbox_id}/sleep", errors=STATE_ERRORS)
async def sleep_sandbox(call: Call) -> SandboxAnswer:
    """Ends the machine and keeps its state on disk; a cell that runs continues after the wake."""
    return SandboxAnswer.of(await call.gateway.service.lifecycle.sleep(call.path["sandbox_id"]))


@routes("POST /api/sandboxes/{sandbox_id}/wake", errors=STATE_ERRORS)
async def wake_sandbox(call: Call) -> SandboxAnswer:
    """Gives a sleeping sandbox a machine again."""
    return SandboxAnswer.of(await call.gateway.service.lifecycle.wake(call.path["sandbox_id"]))


@routes("POST /api/sandboxes/{sandbox_id}/pause", errors=STATE_ERRORS)
async def pause_sandbox(call: Call) -> SandboxAnswer:
    """Stops the CPUs; the state stays in memory."""
    return SandboxAnswer.of(await call.gateway.service.lifecycle.pause(call.path["sandbox_id"]))


@routes("POST /api/sandboxes/{sandbox_id}/resume", errors=STATE_ERRORS)
async def resume_sandbox(call: Call) -> SandboxAnswer:
    """Resumes a paused sandbox."""
    return SandboxAnswer.of(await call.gateway.service.lifecycle.resume(call.path["sandbox_id"]))


@routes("GET /api/sandboxes/{sandbox_id}/metrics", errors=(404, 409, 502, 504))
async def get_sandbox_usage(call: Call) -> UsageAnswer:
    """What its machine takes of the host's memory, and what runs in it of the machine."""
    return UsageAnswer.of(await call.gateway.service.usage(call.path["sandbox_id"]))


@routes("DELETE /api/sandboxes/{sandbox_id}", errors=(400, 404))
async def delete_sandbox(call: Call, query: DeleteQuery) -> None:
    """Ends a sandbox for good; its children by fork run on, unless it is asked to end them, too."""
    await call.gateway.service.delete(call.path["sandbox_id"], descendants=query.descendants)


@routes("GET /api/sandboxes/{sandbox_id}/connection", errors=(403, 404, 409, 502, 504))
async def get_connection(call: Call) -> ConnectionAnswer:
    """The kernel's connection file, for clients on the gateway's own machine."""
    headers = call.request.headers
    if not is_loopback(call.request.remote_ip or "") or any(name in headers for name in FORWARDING_HEADERS):
        raise ApiError(
            403, "not_local", "A connection file is of use on the gateway's own machine only, and is given only there."
        )
    service = call.gateway.service
    sandbox = service.registry.get(call.path["sandbox_id"])
    await service.ready(sandbox.id)
    return ConnectionAnswer(**await service.connection_info(sandbox.id), kernel_name=sandbox.template)
