"""Before there is anything to serve, and after."""

from __future__ import annotations

import gc
import json

import pytest
from tornado import web
from tornado.httpclient import AsyncHTTPClient, HTTPResponse

from gateway.errors import StartError
from gateway.listener import listening


class _Here(web.RequestHandler):
    def get(self) -> None:
        self.finish("here")


async def fetch(url: str, method: str = "GET") -> HTTPResponse:
    return await AsyncHTTPClient().fetch(url, method=method, raise_error=False, allow_nonstandard_methods=True)


async def test_what_is_being_done_is_told_until_there_is_an_application() -> None:
    async with listening(host="127.0.0.1", port=0) as listener:
        listener.set_progress("Booting the image once (0 s)")
        for method, path in (("GET", "/healthz"), ("POST", "/api/kernels"), ("GET", "/api/kernels/x/channels")):
            answer = await fetch(listener.url + path, method)
            assert (answer.code, answer.headers["Retry-After"]) == (503, "3")
            body = json.loads(answer.body)
            assert (body["reason"], body["code"]) == ("starting", "starting")
            assert "Booting the image once" in body["message"]
        listener.application = web.Application([("/healthz", _Here)])
        assert (await fetch(f"{listener.url}/healthz")).body == b"here"
        listener.application, listener.doing = None, "stopping"
        assert json.loads((await fetch(f"{listener.url}/healthz")).body)["code"] == "stopping"


# Tornado's bind_sockets leaves the socket that it could not bind to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_port_that_is_taken_is_told_at_once() -> None:
    async with listening(host="127.0.0.1", port=0) as listener:
        port = int(listener.url.rpartition(":")[2])
        with pytest.raises(StartError, match="--port chooses another"):
            async with listening(host="127.0.0.1", port=port):
                pass
    gc.collect()
