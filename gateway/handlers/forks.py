"""Forks over HTTP: a sandbox becomes many, and its family tree."""

from __future__ import annotations

from gateway.endpoint import Call, Endpoint, Operation, Reply
from gateway.handlers.sandboxes import SANDBOX_ID
from gateway.sandbox_models import ForkAnswer, ForkRequest, SandboxAnswer, TreeAnswer, child_answer


async def fork_sandbox(call: Call) -> Reply:
    request: ForkRequest = call.body
    children = await call.gateway.service.fork(
        call.path["sandbox_id"],
        count=request.count,
        name=request.name,
        same_random=request.same_random,
        mid_cell=request.mid_cell,
    )
    return Reply(status=201, body=ForkAnswer(children=[child_answer(child) for child in children]))


async def get_tree(call: Call) -> Reply:
    family = call.gateway.service.tree(call.path["sandbox_id"])
    return Reply(body=TreeAnswer(root=family[0].id, nodes=[SandboxAnswer.of(sandbox) for sandbox in family]))


ENDPOINTS = (
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/fork",
        parameters=SANDBOX_ID,
        operations={
            "POST": Operation(
                name="forkSandbox",
                summary="Children in the state that the sandbox is in, each with a machine of its own. "
                "One that fails is told in its place and harms no other.",
                run=fork_sandbox,
                ends_with_client=True,
                body=ForkRequest,
                reply=ForkAnswer,
                status=201,
                errors=(400, 403, 404, 409, 413, 502, 503, 504),
            )
        },
    ),
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/tree",
        parameters=SANDBOX_ID,
        operations={
            "GET": Operation(
                name="getTree",
                summary="All relatives by fork that are still there.",
                run=get_tree,
                reply=TreeAnswer,
                errors=(404,),
            )
        },
    ),
)
