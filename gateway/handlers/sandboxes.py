"""The sandbox API."""

from __future__ import annotations

from gateway.auth import is_loopback
from gateway.endpoint import Call, Endpoint, Operation, Reply
from gateway.errors import ApiError
from gateway.handlers.kernels import CREATE_ERRORS
from gateway.models import ConnectionAnswer, NewSandbox, SandboxAnswer

SANDBOX_ID = {"sandbox_id": "The sandbox's id."}
# Headers by which a proxy tells that the request came from elsewhere.
FORWARDING_HEADERS = ("Forwarded", "X-Forwarded-For", "X-Real-Ip")


async def list_sandboxes(call: Call) -> Reply:
    return Reply(body=[SandboxAnswer.of(sandbox) for sandbox in call.gateway.service.list()])


async def create_sandbox(call: Call) -> Reply:
    sandbox = await call.gateway.create(call.body.to_create(call.gateway.default_template()))
    return Reply(status=201, body=SandboxAnswer.of(sandbox), headers={"Location": f"/api/sandboxes/{sandbox.id}"})


async def get_sandbox(call: Call) -> Reply:
    return Reply(body=SandboxAnswer.of(call.gateway.service.get(call.path["sandbox_id"])))


async def delete_sandbox(call: Call) -> Reply:
    await call.gateway.service.delete(call.path["sandbox_id"])
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
                name="listSandboxes", summary="All sandboxes.", run=list_sandboxes, reply=list[SandboxAnswer]
            ),
            "POST": Operation(
                name="createSandbox",
                summary="A new sandbox with a kernel in it.",
                run=create_sandbox,
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
            "DELETE": Operation(
                name="deleteSandbox",
                summary="Ends a sandbox for good.",
                run=delete_sandbox,
                status=204,
                errors=(404,),
            ),
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
                errors=(403, 404, 409, 502),
            )
        },
    ),
)
