"""One HTTP operation as data, and the one Tornado handler that runs them all.

An operation is an async function (`Routes`); what is known of it makes the route, checks the request and appears in the
OpenAPI document. Host, token, body and errors are dealt with here and nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from pydantic import BaseModel, ValidationError
from tornado import httputil, web
from tornado.iostream import StreamClosedError

from gateway.auth import host_allowed, origin_allowed, token_from, token_matches
from gateway.errors import ApiError, api_error, phrase
from gateway.models import ErrorAnswer
from gateway.state import Gateway
from kernels.errors import KernelsError

log = logging.getLogger(__name__)

JSON = "application/json"
OCTETS = "application/octet-stream"
# How many mistakes of one request its answer lists.
MAX_PROBLEMS = 5
# How often the largest body that is taken fits into the largest one that is read before it is refused.
DRAINED_BODIES = 64
# What a browser may ask for from another origin.
CORS_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
CORS_HEADERS = "Authorization, Content-Type, X-XSRFToken, Cache-Control, Range, X-Content-Crc32"
CORS_MAX_AGE_S = 600
# As jupyter_server's API sends it (base/handlers.py, APIHandler).
CONTENT_SECURITY_POLICY = "frame-ancestors 'self'; report-uri /api/security/csp-report; default-src 'none'"


@dataclass(frozen=True, kw_only=True)
class Call:
    """A checked request. headers: of the answer, for the operation to set."""

    gateway: Gateway
    path: Mapping[str, str]
    request: httputil.HTTPServerRequest
    headers: dict[str, str] = field(default_factory=dict)


Run = Callable[..., Coroutine[Any, Any, Any]]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """name: the operationId.
    run: None where the endpoint's own handler does it.

    body, query: models of the request; no body, and null, count as `{}`.
    reply: type of a success, or None for no body.
    media: what a success is made of.
    headers: those of a success, described.
    errors: statuses that may be answered beside those every operation has.
    public: needs no token.
    request_media: what the body is made of where it is no JSON.
    ends_with_client: `run` is cancelled when the client goes.
    """

    name: str
    summary: str
    run: Run | None = None
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    reply: Any = None
    status: int = 200
    media: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    errors: Sequence[int] = ()
    public: bool = False
    request_media: str | None = None
    ends_with_client: bool = False


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A path with `{names}` in it and what may be done there. handler: an EndpointHandler of its own, for what cannot
    be answered in one piece."""

    path: str
    operations: dict[str, Operation] = field(default_factory=dict)
    handler: type[EndpointHandler] | None = None


class Routes:
    """The operations of one module. `@routes("GET /api/kernels/{kernel_id}", errors=(404,))` makes one of a function:
    its name is the operationId, its docstring the summary, its result the answer. It takes a `Call`, and what it needs
    of `body` and `query`; their types are the models of the request, that of the result the model of a success.
    """

    def __init__(self, *endpoints: Endpoint) -> None:
        self._endpoints = {endpoint.path: endpoint for endpoint in endpoints}

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(self._endpoints.values())

    def __call__(self, route: str, *, status: int | None = None, **options: Any) -> Callable[[Run], Run]:
        """route: method and path.
        status: of a success, else 200, or 204 for no body.
        options: see `Operation`.
        """
        method, path = route.split()

        def add(run: Run) -> Run:
            types = get_type_hints(run)
            reply = None if types["return"] is type(None) else types["return"]
            self._endpoints.setdefault(path, Endpoint(path=path)).operations[method] = Operation(
                name=re.sub(r"_(\w)", lambda found: found[1].upper(), run.__name__),
                summary=" ".join(str(run.__doc__).split()),
                run=run,
                body=types.get("body"),
                query=types.get("query"),
                reply=reply,
                status=status or (204 if reply is None else 200),
                **options,
            )
            return run

        return add


class JsonHandler(web.RequestHandler):
    """What all handlers share: headers, the checks before a request, and errors as JSON."""

    gateway: Gateway

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Content-Security-Policy", CONTENT_SECURITY_POLICY)
        self.set_header("Cache-Control", "no-store")
        origin = self.request.headers.get("Origin")
        cors_origins = self.settings["gateway"].settings.cors_origins
        if origin and cors_origins:
            self.set_header("Vary", "Origin")
            if origin_allowed(origin, host=None, cors_origins=cors_origins):
                self.set_header("Access-Control-Allow-Origin", origin)
                self.set_header("Access-Control-Expose-Headers", "Location")

    def compute_etag(self) -> None:
        """None: answers have what is the case now."""

    def check_host(self) -> None:
        """Errors: ApiError 403."""
        settings = self.gateway.settings
        host = self.request.headers.get("Host")
        if not host_allowed(host, listen_host=settings.host, allowed_hosts=settings.allowed_hosts):
            raise ApiError(
                403,
                "host_not_allowed",
                f"This gateway is not known as {str(host)[:80]!r}. Start it with --allowed-hosts to add that name.",
            )

    def has_token(self) -> bool:
        given = token_from(
            authorization=self.request.headers.get("Authorization"), query=self.get_query_argument("token", None)
        )
        return token_matches(given, self.gateway.token)

    def check_token(self) -> None:
        """Errors: ApiError 401."""
        if not self.has_token():
            raise ApiError(
                401,
                "unauthorized",
                "This needs the gateway's token: `Authorization: token <token>` or `?token=<token>`. "
                "`hypercelld serve` prints it.",
            )

    def parse_query(self, model: type[BaseModel]) -> Any:
        """The query's parameters (the token aside); the last of each name counts. Errors: ApiError 400."""
        # Not get_query_argument, which changes spaces and control characters: they may be part of a path.
        values = {
            name: self.decode_argument(found[-1], name)
            for name, found in self.request.query_arguments.items()
            if name != "token"
        }
        try:
            return model.model_validate(values)
        except ValidationError as error:
            raise invalid_request(error) from error

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs["exc_info"][1] if "exc_info" in kwargs else None
        match error:
            case ApiError() | KernelsError():
                answer = api_error(error)
            case web.HTTPError():
                answer = ApiError(status_code, phrase(status_code).lower().replace(" ", "_"), _message_of(error))
            case _:
                answer = ApiError(500, "internal_error", "The gateway failed; its log says how.")
        self.set_status(answer.status)
        self.set_header("Content-Type", JSON)
        if answer.status == 401:
            self.set_header("WWW-Authenticate", "Bearer")
        if answer.status == 405:
            self.set_header("Allow", self.allowed_methods())
        self.finish(ErrorAnswer.of(answer).model_dump_json())

    def allowed_methods(self) -> str:
        return "GET"

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        # A client that has left is nobody's failure.
        if isinstance(value, ApiError | KernelsError | web.HTTPError | StreamClosedError):
            log.debug("%s %s: %s", self.request.method, self.request.path, value)
        else:
            log.error("%s %s failed", self.request.method, self.request.path, exc_info=(typ, value, tb))

    def on_finish(self) -> None:
        # Clients choose the method: only those that exist become a time series.
        method = self.request.method if self.request.method in self.SUPPORTED_METHODS else "other"
        self.settings["gateway"].metrics.requests.labels(method, self.get_status()).inc()


def _message_of(error: web.HTTPError) -> str:
    if error.status_code == 405:
        return "This path does not know that method; the Allow header lists those it knows."
    return str(error.log_message or phrase(error.status_code))


@web.stream_request_body
class EndpointHandler(JsonHandler):
    """Runs the operations of one endpoint. One that has too large a body is answered, not cut off."""

    def initialize(self, gateway: Gateway, endpoint: Endpoint) -> None:
        self.gateway = gateway
        self.endpoint = endpoint
        self._body = bytearray()
        self._body_limit = gateway.settings.max_body_mib * 1024 * 1024
        self._cancellable: asyncio.Task[Any] | None = None
        self._client_gone = False

    def prepare(self) -> Awaitable[None] | None:
        self.check_request()
        return None

    def check_request(self) -> None:
        """All that can be checked before the body. Errors: ApiError, HTTPError 405."""
        connection = self.request.connection
        # Too large a body is still read up to here, so that clients which send before they listen get the 413.
        drained = DRAINED_BODIES * self._body_limit
        connection.set_max_body_size(drained)  # type: ignore[union-attr]
        self.check_host()
        method = self.request.method or ""
        if method == "OPTIONS":
            return
        operation = self._operation(method)
        if not operation.public:
            self.check_token()
        length = "0" if operation.request_media else self.request.headers.get("Content-Length", "0")
        if length.isascii() and length.isdigit() and int(length) > drained:
            # Answered at once; without this Tornado would hang up without an answer.
            connection.set_max_body_size(2**62)  # type: ignore[union-attr]
            raise self._too_large()

    def _operation(self, method: str) -> Operation:
        operation = self.endpoint.operations.get("GET" if method == "HEAD" else method)
        if operation is None:
            raise web.HTTPError(405)
        return operation

    def allowed_methods(self) -> str:
        methods = set(self.endpoint.operations) | {"OPTIONS"}
        if "GET" in methods:
            methods.add("HEAD")
        return ", ".join(sorted(methods))

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        if len(self._body) <= self._body_limit:
            self._body += chunk
        return None

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            "body_too_large",
            f"A request's body has at most {self.gateway.settings.max_body_mib} MiB (max_body_mib).",
        )

    async def _serve(self, **path: str) -> None:
        operation = self._operation(self.request.method or "")
        if len(self._body) > self._body_limit:
            raise self._too_large()
        given = {}
        if operation.query is not None:
            given["query"] = self.parse_query(operation.query)
        if operation.body is not None:
            given["body"] = self._parse(operation.body)
        call = Call(gateway=self.gateway, path=path, request=self.request)
        assert operation.run is not None
        if operation.ends_with_client:
            self._cancellable = asyncio.create_task(operation.run(call, **given))
            try:
                answer = await self._cancellable
            except asyncio.CancelledError:
                if self._client_gone:
                    self._auto_finish = False  # the client has disconnected
                    return
                raise
        else:
            answer = await operation.run(call, **given)
        self.set_status(operation.status)
        if operation.reply is None:
            self.clear_header("Content-Type")
            await self.finish()
            return
        self.set_header("Content-Type", operation.media)
        for name, value in call.headers.items():
            self.set_header(name, value)
        await self.finish(answer if isinstance(answer, bytes) else to_json(answer))

    def on_connection_close(self) -> None:
        self._client_gone = True
        if self._cancellable is not None:
            self._cancellable.cancel()
        super().on_connection_close()

    get = post = put = patch = delete = head = _serve

    async def options(self, **path: str) -> None:
        """CORS's preflight; without an allowed origin it only lists the methods."""
        self.set_header("Allow", self.allowed_methods())
        self.set_header("Access-Control-Allow-Methods", CORS_METHODS)
        self.set_header("Access-Control-Allow-Headers", CORS_HEADERS)
        self.set_header("Access-Control-Max-Age", str(CORS_MAX_AGE_S))
        self.set_status(204)
        await self.finish()

    def _parse(self, model: type[BaseModel]) -> BaseModel:
        text = bytes(self._body).strip()
        try:
            return model.model_validate_json(b"{}" if text in (b"", b"null") else text)
        except ValidationError as error:
            raise invalid_request(error) from error


def invalid_request(error: ValidationError) -> ApiError:
    """400 with a sentence per mistake."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    sentences = []
    for problem in problems[:MAX_PROBLEMS]:
        place = ".".join(str(part) for part in problem["loc"])[:120]
        message = str(problem["msg"]).removeprefix("Value error, ")
        sentences.append(f"{place}: {message}" if place else message)
    code = "invalid_json" if problems[0]["type"] == "json_invalid" else "invalid_request"
    return ApiError(400, code, "; ".join(sentences))


def to_json(body: Any) -> bytes:
    """A model, a list of models or a JSON value as JSON."""
    if isinstance(body, BaseModel):
        return body.model_dump_json().encode()
    if isinstance(body, list):
        return b"[" + b",".join(to_json(item) for item in body) + b"]"
    return json.dumps(body).encode()


class NotFoundHandler(JsonHandler):
    """Every path that is no endpoint."""

    def initialize(self, gateway: Gateway) -> None:
        self.gateway = gateway

    def prepare(self) -> None:
        self.check_host()
        raise ApiError(404, "not_found", "There is nothing at this path. GET /api/openapi.json lists what there is.")
