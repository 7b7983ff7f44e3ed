"""Checkpoints, time travel and the snapshots of the store, over HTTP."""

from __future__ import annotations

from gateway.endpoint import Call, Endpoint, Operation, Reply
from gateway.handlers.sandboxes import SANDBOX_ID, STATE_ERRORS
from gateway.sandbox_models import (
    CheckpointAnswer,
    GotoRequest,
    NewCheckpoint,
    SandboxAnswer,
    SnapshotAnswer,
    SnapshotsQuery,
)


async def list_checkpoints(call: Call) -> Reply:
    checkpoints = await call.gateway.service.checkpoints(call.path["sandbox_id"])
    return Reply(body=[CheckpointAnswer.of(checkpoint) for checkpoint in checkpoints])


async def create_checkpoint(call: Call) -> Reply:
    checkpoint = await call.gateway.service.checkpoint(call.path["sandbox_id"], name=call.body.name)
    return Reply(status=201, body=CheckpointAnswer.of(checkpoint))


async def goto_checkpoint(call: Call) -> Reply:
    return Reply(
        body=SandboxAnswer.of(await call.gateway.service.goto(call.path["sandbox_id"], call.body.target)),
    )


async def undo_cell(call: Call) -> Reply:
    return Reply(body=SandboxAnswer.of(await call.gateway.service.undo(call.path["sandbox_id"])))


async def list_snapshots(call: Call) -> Reply:
    snapshots = await call.gateway.service.snapshots(owner=call.query.owner)
    return Reply(body=[SnapshotAnswer.of(snapshot) for snapshot in snapshots])


async def delete_snapshot(call: Call) -> Reply:
    await call.gateway.service.delete_snapshot(call.path["snapshot_id"])
    return Reply(status=204)


ENDPOINTS = (
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/checkpoints",
        parameters=SANDBOX_ID,
        operations={
            "GET": Operation(
                name="listCheckpoints",
                summary="The sandbox's time line, oldest first.",
                run=list_checkpoints,
                reply=list[CheckpointAnswer],
                errors=(404,),
            ),
            "POST": Operation(
                name="createCheckpoint",
                summary="A checkpoint of the state it is in now. One with a name is kept until it is deleted.",
                run=create_checkpoint,
                body=NewCheckpoint,
                reply=CheckpointAnswer,
                status=201,
                errors=(400, *STATE_ERRORS),
            ),
        },
    ),
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/goto",
        parameters=SANDBOX_ID,
        operations={
            "POST": Operation(
                name="gotoCheckpoint",
                summary="Goes back, or forth, to a checkpoint. The state that is left becomes one, too.",
                run=goto_checkpoint,
                body=GotoRequest,
                reply=SandboxAnswer,
                errors=(400, *STATE_ERRORS),
            )
        },
    ),
    Endpoint(
        path="/api/sandboxes/{sandbox_id}/undo",
        parameters=SANDBOX_ID,
        operations={
            "POST": Operation(
                name="undoCell",
                summary="Goes back to before the last cell that ended.",
                run=undo_cell,
                reply=SandboxAnswer,
                errors=STATE_ERRORS,
            )
        },
    ),
    Endpoint(
        path="/api/snapshots",
        operations={
            "GET": Operation(
                name="listSnapshots",
                summary="Every snapshot in the store, oldest first: checkpoints, templates, imported ones.",
                run=list_snapshots,
                reply=list[SnapshotAnswer],
                query=SnapshotsQuery,
                errors=(400,),
            )
        },
    ),
    Endpoint(
        path="/api/snapshots/{snapshot_id}",
        parameters={"snapshot_id": "The snapshot's id."},
        operations={
            "DELETE": Operation(
                name="deleteSnapshot",
                summary="Removes a snapshot that no sandbox needs.",
                run=delete_snapshot,
                status=204,
                errors=(404, 409),
            )
        },
    ),
)
