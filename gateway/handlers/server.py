"""What the server reports about itself: version, status, health, metrics, its own description."""

from __future__ import annotations

from gateway.endpoint import Call, Routes
from gateway.metrics import CONTENT_TYPE
from gateway.models import HealthAnswer, StatusAnswer, VersionAnswer, timestamp
from gateway.version import VERSION

routes = Routes()


@routes("GET /api", public=True)
async def get_version(call: Call) -> VersionAnswer:
    """The server's version."""
    return VersionAnswer(version=VERSION)


@routes("GET /api/status")
async def get_status(call: Call) -> StatusAnswer:
    """What the server is doing."""
    gateway = call.gateway
    sandboxes = gateway.kernels()
    last_activity = max((sandbox.last_activity for sandbox in sandboxes), default=gateway.started)
    return StatusAnswer(
        started=timestamp(gateway.started),
        last_activity=timestamp(last_activity),
        connections=gateway.clients.total_connections(),
        kernels=len(sandboxes),
    )


@routes("GET /healthz", public=True)
async def get_health(call: Call) -> HealthAnswer:
    """Answers while the server works."""
    return HealthAnswer(status="ok")


@routes("GET /metrics", media="text/plain")
async def get_metrics(call: Call) -> bytes:
    """Numbers for Prometheus."""
    call.headers["Content-Type"] = CONTENT_TYPE
    return call.gateway.metrics.render()
