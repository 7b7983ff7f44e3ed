"""The Tornado application: every endpoint, the WebSocket, and nothing else.

Knows how paths become handlers; what they do is in `handlers/`.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from tornado import web
from tornado.routing import Rule

from gateway.channels import ChannelsHandler
from gateway.command_socket import AttachSocket, ExecSocket
from gateway.endpoint import Call, Endpoint, EndpointHandler, NotFoundHandler, Routes
from gateway.handlers import checkpoints, events, files, forks, kernels, kernelspecs, sandboxes, server, sessions
from gateway.handlers import exec as commands
from gateway.openapi import openapi_document
from gateway.sandbox_socket import WebSocketMatches
from gateway.state import Gateway
from gateway.watch_socket import WatchSocket

log = logging.getLogger("gateway.access")


def all_endpoints() -> tuple[Endpoint, ...]:
    """Everything that speaks plain HTTP, the description of it included."""
    modules = (server, kernelspecs, kernels, sessions, events, sandboxes, forks, checkpoints, commands, files)
    described = [endpoint for module in modules for endpoint in module.routes]
    document: dict[str, Any] = {}
    description = Routes()

    @description("GET /api/openapi.json", public=True)
    async def get_description(call: Call) -> dict[str, Any]:
        """This document."""
        return document

    endpoints = (*described, *description)
    document.update(openapi_document(endpoints))
    return endpoints


def make_application(gateway: Gateway) -> web.Application:
    """The application that serves `gateway`."""
    rules: list[Any] = [(_pattern("/api/kernels/{kernel_id}/channels"), ChannelsHandler, {"gateway": gateway})]
    for path, socket in (
        ("/api/sandboxes/{sandbox_id}/exec", ExecSocket),
        ("/api/sandboxes/{sandbox_id}/commands/{command_id}/attach", AttachSocket),
        ("/api/sandboxes/{sandbox_id}/files/watch", WatchSocket),
    ):
        rules.append(Rule(WebSocketMatches(_pattern(path)), socket, {"gateway": gateway}))
    for endpoint in all_endpoints():
        # A slash at the end is the same resource, as in Jupyter.
        handler = endpoint.handler or EndpointHandler
        rules.append((_pattern(endpoint.path) + "/?", handler, {"gateway": gateway, "endpoint": endpoint}))
    return web.Application(
        rules,
        default_handler_class=NotFoundHandler,
        default_handler_args={"gateway": gateway},
        gateway=gateway,
        log_function=_log_request,
    )


def _pattern(path: str) -> str:
    """A route for a path with `{names}`, in whose places stand ids and names of files. Nothing quoted and no `..`: what
    is on the way may make another path of these."""
    return re.sub(r"\\{(\w+)\\}", r"(?P<\1>[A-Za-z0-9_-][A-Za-z0-9_.-]*)", re.escape(path))


def _log_request(handler: web.RequestHandler) -> None:
    # The path without its query: that may hold the token.
    request = handler.request
    log.debug("%s %s %s %.0f ms", handler.get_status(), request.method, request.path, 1000 * request.request_time())
