"""The sandbox API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from gateway.auth import is_loopback
from gateway.endpoint import Call, Endpoint, Operation, Reply
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
from kernels.models import Sandbox
from kernels.service import SandboxService

SANDBOX_ID = {"sandbox_id": "The sandbox's id."}
# Headers by which a proxy tells that the request came from elsewhere.
FORWARDING_HEADERS = ("Forwarded", "X-Forwarded-For", "X-Real-Ip")
# What anything that needs the sandbox's machine may end with.
STATE_ERRORS = (404, 409, 413, 502, 504)


async def list_sandboxes(call: Call) -> Reply:
    return Reply(body=[SandboxAnswer.of(sandbox) for sandbox in call.query.select(call.gateway.service.list())])


async def create_sandbox(call: Call) -> Reply:
    sandbox = await call.gateway.create(call.body.to_create(call.gateway.default_template()))
    return Reply(status=201, body=SandboxAnswer.of(sandbox), headers={"Location": f"/api/sandboxes/{sandbox.id}"})


async def get_sandbox(call: Call) -> Reply:
    return Reply(body=SandboxAnswer.of(call.gateway.service.get(call.path["sandbox_id"])))


async def change_sandbox(call: Call) -> Reply:
    service, body = call.gateway.service, call.body
    sandbox = service.get(call.path["sandbox_id"])
    changes = body.changes(age_s=service.age_s(sandbox.id))
    return Reply(body=SandboxAnswer.of(service.configure(sandbox.id, **changes)))


def _state_change(
    name: str, summary: str, change: Callable[[SandboxService, str], Awaitable[Sandbox]]
) -> dict[str, Operation]:
    """POST of what takes a sandbox from one state to another; one that is there already stays so."""

    async def run(call: Call) -> Reply:
        return Reply(body=SandboxAnswer.of(await change(call.gateway.service, call.path["sandbox_id"])))

    return {"POST": Operation(name=name, summary=summary, run=run, reply=SandboxAnswer, errors=STATE_ERRORS)}


async def get_usage(call: Call) -> Reply:
    return Reply(body=UsageAnswer.of(await call.gateway.service.usage(call.path["sandbox_id"])))


async def delete_sandbox(call: Call) -> Reply:
    await call.gateway.service.delete(call.path["sandbox_id"], descendants=call.query.descendants)
    return Reply(status=204)


async def get_connection(call: Call) -> Reply:
    headers = call.request.headers
    if not is_loopback(call.request.remote_ip or "") or any(name in headers for name in FORWARDING_HEADERS):
        raise ApiError(
            403, "not_local", "A connection file is of use on the gateway's own machine only, and is given only there."
        )
    service = call.gateway.service
    sandbox = service.get(call.path["sandbox_id"])
    await service.ready(sandbox.id)
    return Reply(body=ConnectionAnswer(**service.connection_info(sandbox.id), kernel_name=sandbox.template))


ENDPOINTS = (
    Endpoint(
        path="/api/sandboxes",
        operations={
            "GET": Operation(
                name="listSandboxes",
                summary="Sandboxes, oldest first: all, or a page of those that match.",
                run=list_sandboxes,
                query=SandboxesQuery,
                reply=list[SandboxAnswer],
                errors=(400,),
            ),
            "POST": Operation(
                name="createSandbox",
                summary="A new sandbox with a kernel in it.",
                run=create_sandbox,
                ends_with_client=True,
                body=NewSandbox,
                reply=SandboxAnswer,
                status=201,
                errors=CREATE_ERRORS,
                headers={"Location": "The sandbox's path."},
            ),
        },
    ),
    Endpoint(
        path="/api/sandboxes/{sandbox_id}",
        parameters=SANDBOX_ID,
        operations={
            "GET": Operation(
                name="getSandbox", summary="One sandbox.", run=get_sandbox, reply=SandboxAnswer, errors=(404,)
            ),
            "PATCH": Operation(
                name="changeSandbox",
                summary="Changes its name, its limits of time or when checkpoints are taken.",
                run=change_sandbox,
                body=SandboxChanges,
                reply=SandboxAnswer,
                errors=(400, 404, 413),
            ),
            "DELETE": Operation(
                name="deleteSandbox",
                summary="Ends a sandbox for good; its children by fork go on, unless it is asked to end them, too.",
                run=delete_sandbox,
                query=DeleteQuery,
                status=204,
                errors=(400, 404),
            ),
        },
    ),
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/sleep",
        parameters=SANDBOX_ID,
        operations=_state_change(
            "sleepSandbox",
            "Ends the machine and keeps its state on disk; a cell that runs goes on after the wake.",
            SandboxService.sleep,
        ),
    ),
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/wake",
        parameters=SANDBOX_ID,
        operations=_state_change("wakeSandbox", "Gives a sleeping sandbox a machine again.", SandboxService.wake),
    ),
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/pause",
        parameters=SANDBOX_ID,
        operations=_state_change("pauseSandbox", "Stops the CPUs; the state stays in memory.", SandboxService.pause),
    ),
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/resume",
        parameters=SANDBOX_ID,
        operations=_state_change("resumeSandbox", "Lets a paused sandbox go on.", SandboxService.resume),
    ),
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/metrics",
        parameters=SANDBOX_ID,
        operations={
            "GET": Operation(
                name="getSandboxUsage",
                summary="What its machine takes of the host's memory, and what runs in it of the machine.",
                run=get_usage,
                reply=UsageAnswer,
                errors=(404, 409, 502, 504),
            )
        },
    ),
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/connection",
        parameters=SANDBOX_ID,
        operations={
            "GET": Operation(
                name="getConnection",
                summary="The kernel's connection file, for clients on the gateway's own machine.",
                run=get_connection,
                reply=ConnectionAnswer,
                errors=(403, 404, 409, 502, 504),
            )
        },
    ),
)
