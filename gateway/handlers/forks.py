"""Forks over HTTP: a sandbox becomes many, and its family tree."""

from __future__ import annotations

from gateway.endpoint import Call, Routes
from gateway.sandbox_models import ForkAnswer, ForkRequest, SandboxAnswer, TreeAnswer, child_answer

routes = Routes()


@routes(
    "POST /api/sandboxes/{sandbox_id}/fork",
    status=201,
    errors=(400, 403, 404, 409, 413, 502, 503, 504),
    ends_with_client=True,
)
async def fork_sandbox(call: Call, body: ForkRequest) -> ForkAnswer:
    """Children in the state that the sandbox is in, each with a machine of its own. One that fails is reported in its
    place and harms no other."""
    service, sandbox_id = call.gateway.service, call.path["sandbox_id"]
    service.registry.touch(sandbox_id)
    children = await service.forks.fork(
        sandbox_id,
        count=body.count,
        name=body.name,
        same_random=body.same_random,
        mid_cell=body.mid_cell,
    )
    return ForkAnswer(children=[child_answer(child) for child in children])


@routes("GET /api/sandboxes/{sandbox_id}/tree", errors=(404,))
async def get_tree(call: Call) -> TreeAnswer:
    """All relatives by fork that are still there."""
    family = call.gateway.service.forks.tree(call.path["sandbox_id"])
    return TreeAnswer(root=family[0].id, nodes=[SandboxAnswer.of(sandbox) for sandbox in family])
