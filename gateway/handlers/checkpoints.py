"""Checkpoints, time travel and the snapshots of the store, over HTTP."""

from __future__ import annotations

from gateway.endpoint import Call, Routes
from gateway.handlers.sandboxes import STATE_ERRORS
from gateway.sandbox_models import (
    CheckpointAnswer,
    GotoRequest,
    NewCheckpoint,
    SandboxAnswer,
    SnapshotAnswer,
    SnapshotsQuery,
)

routes = Routes()


@routes("GET /api/sandboxes/{sandbox_id}/checkpoints", errors=(404,))
async def list_checkpoints(call: Call) -> list[CheckpointAnswer]:
    """The sandbox's time line, oldest first."""
    checkpoints = await call.gateway.service.checkpoints.all(call.path["sandbox_id"])
    return [CheckpointAnswer.of(checkpoint) for checkpoint in checkpoints]


@routes("POST /api/sandboxes/{sandbox_id}/checkpoints", status=201, errors=(400, *STATE_ERRORS))
async def create_checkpoint(call: Call, body: NewCheckpoint) -> CheckpointAnswer:
    """A checkpoint of the state it is in now. One with a name is kept until it is deleted."""
    service, sandbox_id = call.gateway.service, call.path["sandbox_id"]
    await service.ready(sandbox_id)
    checkpoint = await service.checkpoints.checkpoint(sandbox_id, name=body.name)
    return CheckpointAnswer.of(checkpoint)


@routes("POST /api/sandboxes/{sandbox_id}/goto", errors=(400, *STATE_ERRORS))
async def goto_checkpoint(call: Call, body: GotoRequest) -> SandboxAnswer:
    """Goes back, or forth, to a checkpoint. The state that is left becomes one, too."""
    return SandboxAnswer.of(await call.gateway.service.checkpoints.goto(call.path["sandbox_id"], body.target))


@routes("POST /api/sandboxes/{sandbox_id}/undo", errors=STATE_ERRORS)
async def undo_cell(call: Call) -> SandboxAnswer:
    """Goes back to before the last cell that ended."""
    return SandboxAnswer.of(await call.gateway.service.checkpoints.undo(call.path["sandbox_id"]))


@routes("GET /api/snapshots", errors=(400,))
async def list_snapshots(call: Call, query: SnapshotsQuery) -> list[SnapshotAnswer]:
    """Every snapshot in the store, oldest first: checkpoints, templates, imported ones."""
    snapshots = await call.gateway.service.snapshots.stored(owner=query.owner)
    return [SnapshotAnswer.of(snapshot) for snapshot in snapshots]


@routes("DELETE /api/snapshots/{snapshot_id}", errors=(404, 409))
async def delete_snapshot(call: Call) -> None:
    """Removes a snapshot that no sandbox needs."""
    await call.gateway.service.snapshots.remove(call.path["snapshot_id"])
