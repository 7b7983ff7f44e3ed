"""Every call of Jupyter's REST and WebSocket, on the gateway and through jupyter_server's own gateway client.

Behind `--gateway-url`, jupyter_server passes each of these calls through its GatewayKernelSpecManager,
GatewayMappingKernelManager, GatewaySessionManager and its WebSocket relay, or through ours.
"""

from __future__ import annotations

import re
import urllib.request
import uuid
from collections.abc import Iterator

import pytest

from tests.gateways import GatewayAddress
from tests.jupyter.relay_server import V1, Channels, Server, running_server

OUR_RELAY = "--ServerApp.kernel_websocket_connection_class=hypercell.jupyter.connection.HypercellWebSocketConnection"


@pytest.fixture(scope="module", params=["gateway", "jupyter_server", "our relay"])
def server(
    request: pytest.FixtureRequest, gateway: GatewayAddress, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    if request.param == "gateway":
        yield Server(url=gateway.url, token=gateway.token)
    else:
        options = [OUR_RELAY] if request.param == "our relay" else []
        with running_server(gateway, tmp_path_factory.mktemp("server"), *options) as server:
            yield server


@pytest.fixture
def kernel_id(server: Server) -> Iterator[str]:
    answer = server.call("POST", "/api/kernels", {"name": "python3"})
    assert answer.status == 201, answer.body
    yield answer.json()["id"]
    server.call("DELETE", f"/api/kernels/{answer.json()['id']}")


def test_version_and_status(server: Server) -> None:
    assert re.match(r"\d+\.\d+", server.call("GET", "/api").json()["version"])
    status = server.call("GET", "/api/status").json()
    assert {"started", "last_activity", "connections", "kernels"} <= status.keys()


def test_kernelspecs_and_their_logos(server: Server) -> None:
    listing = server.call("GET", "/api/kernelspecs").json()
    assert listing["default"] in listing["kernelspecs"]
    for name, kernelspec in listing["kernelspecs"].items():
        assert kernelspec["name"] == name
        assert {"argv", "display_name", "language"} <= kernelspec["spec"].keys()
        one = server.call("GET", f"/api/kernelspecs/{name}")
        assert one.status == 200
        assert one.json()["name"] == name
        for path in kernelspec["resources"].values():
            logo = server.call("GET", path)
            assert logo.status == 200
            assert logo.body
    assert server.call("GET", "/api/kernelspecs/no-such").status == 404


def test_a_kernel_s_life(server: Server) -> None:
    created = server.call("POST", "/api/kernels", {"name": "python3", "env": {"KERNEL_USERNAME": "grace"}})
    assert created.status == 201
    model = created.json()
    path = f"/api/kernels/{model['id']}"
    assert created.headers["Location"].endswith(path)
    for found in (model, server.call("GET", path).json(), *_listed(server, model["id"])):
        assert found["id"] == model["id"]
        assert found["name"] == "python3"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", found["last_activity"])
        assert isinstance(found["execution_state"], str)
        assert isinstance(found["connections"], int)
    assert server.call("POST", f"{path}/interrupt", {}).status == 204
    restarted = server.call("POST", f"{path}/restart", {})
    assert restarted.status == 200
    assert restarted.json()["id"] == model["id"]
    assert server.call("DELETE", path).status == 204
    assert server.call("GET", path).status == 404
    assert not _listed(server, model["id"])


def _listed(server: Server, kernel_id: str) -> list[dict[str, object]]:
    return [model for model in server.call("GET", "/api/kernels").json() if model["id"] == kernel_id]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/kernels/{id}"),
        ("DELETE", "/api/kernels/{id}"),
        ("POST", "/api/kernels/{id}/interrupt"),
        ("POST", "/api/kernels/{id}/restart"),
        ("GET", "/api/sessions/{id}"),
        ("GET", "/api/kernelspecs/{id}"),
        ("GET", "/kernelspecs/python3/{id}.png"),
    ],
)
def test_what_is_not_there_is_404_as_json(gateway: GatewayAddress, method: str, path: str) -> None:
    # Only on the gateway: jupyter_server itself answers some of these with 500.
    server = Server(url=gateway.url, token=gateway.token)
    answer = server.call(method, path.format(id=uuid.uuid4()), {} if method == "POST" else None)
    assert answer.status == 404
    assert {"reason", "message"} <= answer.json().keys()


def test_a_session_s_life(server: Server) -> None:
    request = {"path": "work/a.ipynb", "name": "a.ipynb", "type": "notebook", "kernel": {"name": "python3"}}
    created = server.call("POST", "/api/sessions", request)
    assert created.status == 201
    session = created.json()
    path = f"/api/sessions/{session['id']}"
    try:
        assert session["path"] == "work/a.ipynb"
        assert session["kernel"]["name"] == "python3"
        assert server.call("GET", path).json()["kernel"]["id"] == session["kernel"]["id"]
        assert session["id"] in [found["id"] for found in server.call("GET", "/api/sessions").json()]
        # The same path again is the same session.
        assert server.call("POST", "/api/sessions", request).json()["id"] == session["id"]
        renamed = server.call("PATCH", path, {"path": "work/b.ipynb"})
        assert renamed.status == 200
        assert renamed.json()["path"] == "work/b.ipynb"
    finally:
        assert server.call("DELETE", path).status == 204
    assert server.call("GET", path).status == 404
    assert server.call("GET", f"/api/kernels/{session['kernel']['id']}").status == 404


@pytest.mark.parametrize("subprotocol", [V1, None])
async def test_cells_over_the_websocket(server: Server, kernel_id: str, subprotocol: str | None) -> None:
    async with server.connect(kernel_id, subprotocol=subprotocol) as connection:
        channels = Channels(connection)
        assert (
            await channels.output_of("print('hello'); import sys; print('aside', file=sys.stderr)") == "hello\naside\n"
        )
        message_id = await channels.execute("answer = input('name? ')")
        asked = await channels.receive_for(message_id, "input_request")
        assert asked["content"]["prompt"] == "name? "
        await channels.send("stdin", "input_reply", {"value": "Grace"})
        assert (await channels.receive_for(message_id, "execute_reply"))["content"]["status"] == "ok"
        message_id = await channels.execute("print(answer, flush=True)\nwhile True: pass")
        assert (await channels.receive_for(message_id, "stream"))["content"]["text"] == "Grace\n"
        assert server.call("POST", f"/api/kernels/{kernel_id}/interrupt", {}).status == 204
        reply = await channels.receive_for(message_id, "execute_reply")
        assert reply["content"]["ename"] == "KeyboardInterrupt"


async def test_a_crash_is_told_and_the_kernel_comes_back(server: Server, kernel_id: str) -> None:
    async with server.connect(kernel_id, subprotocol=None) as connection:
        channels = Channels(connection)
        await channels.output_of("value = 1")
        await channels.execute("import os; os._exit(1)")
        while True:
            message = await channels.receive()
            if message["header"]["msg_type"] == "status" and message["content"]["execution_state"] == "restarting":
                break
        assert message["parent_header"] == {}
        assert await channels.output_of("print('value' in globals())") == "False\n"


async def test_binary_buffers_pass_in_both_directions(
    server: Server, kernel_id: str, request: pytest.FixtureRequest
) -> None:
    if "jupyter_server" in request.node.name:
        pytest.skip("jupyter_server's own relay cannot take binary messages; ours can")
    target = (
        "def opened(comm, message):\n"
        "    comm.on_msg(lambda message: comm.send({'echo': True}, buffers=[bytes(b) for b in message['buffers']]))\n"
        "get_ipython().kernel.comm_manager.register_target('echo', opened)"
    )
    async with server.connect(kernel_id, subprotocol=V1) as connection:
        channels = Channels(connection)
        await channels.output_of(target)
        comm_id = uuid.uuid4().hex
        await channels.send("shell", "comm_open", {"comm_id": comm_id, "target_name": "echo", "data": {}})
        buffers = [bytes(range(256)), b"", b"x" * 1_000_000]
        sent = await channels.send("shell", "comm_msg", {"comm_id": comm_id, "data": {}}, buffers=buffers)
        echo = await channels.receive_for(sent, "comm_msg")
        assert [bytes(buffer) for buffer in echo["buffers"]] == buffers


async def test_a_message_beyond_ten_mebibytes_passes(
    server: Server, kernel_id: str, request: pytest.FixtureRequest
) -> None:
    if "jupyter_server" in request.node.name:
        pytest.skip("jupyter_server's own relay ends at messages of 10 MiB; ours does not")
    async with server.connect(kernel_id, subprotocol=V1) as connection:
        channels = Channels(connection)
        message_id = await channels.execute(
            "from IPython.display import display; display({'text/plain': 'x' * (16 * 1024 * 1024)}, raw=True)"
        )
        displayed = await channels.receive_for(message_id, "display_data")
        assert len(displayed["content"]["data"]["text/plain"]) == 16 * 1024 * 1024


async def test_every_line_of_much_output_arrives(server: Server, kernel_id: str) -> None:
    async with server.connect(kernel_id, subprotocol=V1) as connection:
        output = await Channels(connection).output_of("for i in range(20_000): print('line', i)")
        assert output.splitlines() == [f"line {i}" for i in range(20_000)]


@pytest.mark.parametrize("form", ["token", "Bearer", "query", "none", "wrong"])
def test_the_token_in_its_three_forms(gateway: GatewayAddress, form: str) -> None:
    url = f"{gateway.url}/api/kernels"
    headers = {}
    if form == "query":
        url += f"?token={gateway.token}"
    elif form == "wrong":
        headers["Authorization"] = "token wrong"
    elif form != "none":
        headers["Authorization"] = f"{form} {gateway.token}"
    request = urllib.request.Request(url, headers=headers)
    if form in {"none", "wrong"}:
        with pytest.raises(urllib.error.HTTPError, match=r"40[13]") as raised:
            urllib.request.urlopen(request)
        raised.value.close()
    else:
        urllib.request.urlopen(request).close()
