"""What the server says about itself: version, status, health, metrics, its own description."""

from __future__ import annotations

from gateway.endpoint import Call, Endpoint, Operation, Reply
from gateway.metrics import CONTENT_TYPE
from gateway.models import HealthAnswer, StatusAnswer, VersionAnswer, timestamp
from gateway.version import VERSION


async def version(call: Call) -> Reply:
    return Reply(body=VersionAnswer(version=VERSION))


async def status(call: Call) -> Reply:
    gateway = call.gateway
    sandboxes = gateway.kernels()
    last_activity = max((sandbox.last_activity for sandbox in sandboxes), default=gateway.started)
    return Reply(
        body=StatusAnswer(
            started=timestamp(gateway.started),
            last_activity=timestamp(last_activity),
            connections=gateway.hub.total_connections(),
            kernels=len(sandboxes),
        )
    )


async def health(call: Call) -> Reply:
    return Reply(body=HealthAnswer(status="ok"))


async def metrics(call: Call) -> Reply:
    return Reply(body=call.gateway.metrics.render(), content_type=CONTENT_TYPE)


ENDPOINTS = (
    Endpoint(
        path="/api",
        operations={
            "GET": Operation(
                name="getVersion", summary="The server's version.", run=version, reply=VersionAnswer, public=True
            )
        },
    ),
    Endpoint(
        path="/api/status",
        operations={
            "GET": Operation(name="getStatus", summary="What the server is doing.", run=status, reply=StatusAnswer)
        },
    ),
    Endpoint(
        path="/healthz",
        operations={
            "GET": Operation(
                name="getHealth", summary="Answers while the server works.", run=health, reply=HealthAnswer, public=True
            )
        },
    ),
    Endpoint(
        path="/metrics",
        operations={
            "GET": Operation(
                name="getMetrics", summary="Numbers for Prometheus.", run=metrics, reply=str, media="text/plain"
            )
        },
    ),
)
