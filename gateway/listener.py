"""Where the gateway listens: from before there is anything to serve until after the last kernel sleeps.

While there is no application, every request is answered with 503 and a sentence about what is being done. Knows neither
kernels nor settings but the address.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tornado import httputil, web
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from gateway.errors import StartError

# A request whose headers or body do not come in this time is not coming; uploads have their own.
REQUEST_TIMEOUT_S = 60.0
# Browsers keep idle connections for minutes; an attacker's cost nothing but a descriptor.
IDLE_CONNECTION_TIMEOUT_S = 600.0
MAX_HEADER_BYTES = 64 * 1024
# A start with a template at hand takes seconds.
RETRY_AFTER_S = 3


class Listener(httputil.HTTPServerConnectionDelegate):
    """Passes requests to `application` while there is one. url: where it listens, without a slash at the end.

    doing: "starting" or "stopping", while there is none; `set_progress(text)` has how far that is.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.application: web.Application | None = None
        self.doing = "starting"
        self._progress = ""
        self._closed = web.Application([(".*", _Closed, {"listener": self})], log_function=lambda handler: None)

    def set_progress(self, text: str) -> None:
        """What is being done, as a sentence."""
        self._progress = text

    def answer(self) -> dict[str, str]:
        """The body of a 503."""
        message = f"The gateway is {self.doing}; try again in some seconds. {self._progress}".strip()
        return {"reason": self.doing, "message": message, "code": self.doing}

    def start_request(self, server_conn: object, request_conn: httputil.HTTPConnection) -> httputil.HTTPMessageDelegate:
        return (self.application or self._closed).start_request(server_conn, request_conn)


class _Closed(web.RequestHandler):
    """503 to everything."""

    def initialize(self, listener: Listener) -> None:
        self._listener = listener

    def prepare(self) -> None:
        self.set_status(503)
        self.clear_header("Server")
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")
        self.set_header("Retry-After", str(RETRY_AFTER_S))
        self.finish(json.dumps(self._listener.answer()))


def make_server(delegate: httputil.HTTPServerConnectionDelegate) -> HTTPServer:
    """The HTTP server for an application or a listener; the caller gives it sockets and stops it."""
    return HTTPServer(
        delegate,
        xheaders=False,
        idle_connection_timeout=IDLE_CONNECTION_TIMEOUT_S,
        body_timeout=REQUEST_TIMEOUT_S,
        max_header_size=MAX_HEADER_BYTES,
    )


@asynccontextmanager
async def listening(*, host: str, port: int) -> AsyncIterator[Listener]:
    """Listens until the context ends, then closes every connection. Errors: StartError, at once, when it cannot."""
    try:
        sockets = bind_sockets(port, host)
    except OSError as error:
        raise StartError(
            f"Cannot listen at {host}:{port}: {error.strerror}. --port chooses another port (0 takes any free one)."
        ) from error
    listener = Listener(_url(host, sockets[0].getsockname()[1]))
    server = make_server(listener)
    server.add_sockets(sockets)
    try:
        yield listener
    finally:
        server.stop()
        await server.close_all_connections()


def _url(host: str, port: int) -> str:
    # What listens everywhere is reached on this machine through loopback.
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}"
