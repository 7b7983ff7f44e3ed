"""The OpenAPI document, made from the same operations that are served. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from gateway.endpoint import JSON, Endpoint, Operation
from gateway.errors import phrase
from gateway.models import ErrorAnswer
from gateway.version import VERSION

EVENT_STREAM = "text/event-stream"
REF = "#/components/schemas/{model}"
# Names in paths.
PARAMETERS = {
    "command_id": "The command's id.",
    "file": "The file's name, as `resources` has it.",
    "kernel_id": "The kernel's id.",
    "name": "The kernelspec's name.",
    "sandbox_id": "The sandbox's id.",
    "session_id": "The session's id.",
    "snapshot_id": "The snapshot's id.",
}


def openapi_document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """OpenAPI 3.1 of all endpoints."""
    types: list[tuple[str, JsonSchemaMode, TypeAdapter[Any]]] = [("error", "serialization", TypeAdapter(ErrorAnswer))]
    for endpoint in endpoints:
        for operation in endpoint.operations.values():
            if operation.body is not None:
                types.append((f"{operation.name}.body", "validation", TypeAdapter(operation.body)))
            if operation.reply is not None and operation.media == JSON:
                types.append((f"{operation.name}.reply", "serialization", TypeAdapter(operation.reply)))
    schemas, shared = TypeAdapter.json_schemas(types, ref_template=REF)
    by_name = {name: schema for (name, _), schema in schemas.items()}
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        item: dict[str, Any] = {}
        if names := re.findall(r"{(\w+)}", endpoint.path):
            item["parameters"] = [
                {
                    "name": name,
                    "in": "path",
                    "required": True,
                    "description": PARAMETERS[name],
                    "schema": {"type": "string", "minLength": 1},
                }
                for name in names
            ]
        for method, operation in endpoint.operations.items():
            # An answer without an end is nothing that OpenAPI 3.1 can describe, and programs that try all operations
            # would wait for it; docs/gateway.md describes these.
            if operation.media != EVENT_STREAM:
                item[method.lower()] = _operation(operation, by_name)
        if endpoint.operations.keys() & {method.upper() for method in item}:
            paths[endpoint.path] = item
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Hypercell gateway",
            "version": VERSION,
            "description": "Jupyter's REST API over kernels in microVMs, and the sandboxes they live in. Not "
            "described here: WebSockets, and the events below /api/sandboxes (docs/gateway.md).",
        },
        "paths": paths,
        "components": {
            "schemas": shared.get("$defs", {}),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "query": {"type": "apiKey", "in": "query", "name": "token"},
            },
        },
        "security": [{"bearer": []}, {"query": []}],
    }


def _operation(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    success: dict[str, Any] = {"description": phrase(operation.status)}
    if operation.reply is not None:
        is_json = operation.media == JSON
        schema = schemas[f"{operation.name}.reply"] if is_json else {"type": "string"}
        success["content"] = {operation.media: {"schema": schema}}
    if operation.headers:
        success["headers"] = {
            name: {"description": text, "schema": {"type": "string"}} for name, text in operation.headers.items()
        }
    # 503: while the gateway starts or stops (listener.py).
    errors = {403, 503, *operation.errors} | (set() if operation.public else {401})
    responses = {str(operation.status): success}
    for status in sorted(errors):
        responses[str(status)] = {"description": phrase(status), "content": {JSON: {"schema": schemas["error"]}}}
    result: dict[str, Any] = {"operationId": operation.name, "summary": operation.summary, "responses": responses}
    if operation.public:
        result["security"] = []
    if operation.query is not None:
        result["parameters"] = _query_parameters(operation.query)
    if operation.request_media is not None:
        binary = {"type": "string", "format": "binary"}
        result["requestBody"] = {"required": True, "content": {operation.request_media: {"schema": binary}}}
    if operation.body is not None:
        result["requestBody"] = {
            "required": _is_required(operation.body),
            "content": {JSON: {"schema": schemas[f"{operation.name}.body"]}},
        }
    return result


def _query_parameters(query: type[BaseModel]) -> list[dict[str, Any]]:
    """Of a model whose fields are plain values."""
    schema = query.model_json_schema()
    return [
        {"name": name, "in": "query", "required": name in schema.get("required", ()), "schema": value}
        for name, value in schema["properties"].items()
    ]


def _is_required(body: type[BaseModel]) -> bool:
    return any(field.is_required() for field in body.model_fields.values())
