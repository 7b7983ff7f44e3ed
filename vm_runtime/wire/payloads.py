"""JSON payloads: written compactly, read as if by an enemy. Knows JSON and its limits, not what the objects mean."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from vm_runtime.wire.errors import LocalProtocolError, RemoteProtocolError
from vm_runtime.wire.frames import MAX_JSON_BYTES

# Deep enough for any parameter, shallow enough that nobody who walks the object recursively runs out of stack.
MAX_JSON_DEPTH = 32

# Reasons and messages are for people; one that is longer is cut by the sender and refused by the receiver.
MAX_TEXT_CHARACTERS = 4096

# What Python makes of a byte in text that is not UTF-8 (PEP 383) is left out here: it becomes that byte again.
_HALVES = re.compile("[\ud800-\udc7f\udd00-\udfff]")

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("number out of range")
    return value


def _deeper_than(value: object, limit: int) -> bool:
    level: list[object] = [value]
    for _ in range(limit + 1):
        deeper: list[object] = []
        for item in level:
            if isinstance(item, dict):
                deeper.extend(item.values())
            elif isinstance(item, list):
                deeper.extend(item)
        if not deeper:
            return False
        level = deeper
    return True


def encode_text(text: str) -> bytes:
    """As UTF-8, with U+FFFD for what has none: lone halves of surrogate pairs, and bytes of no UTF-8 in file names."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        data = _HALVES.sub("\ufffd", text).encode("utf-8", "surrogateescape")
        return data.decode("utf-8", "replace").encode()


def encode_json(value: Mapping[str, Any]) -> bytes:
    """A JSON object as UTF-8. LocalProtocolError where it is not JSON, too deep or longer than MAX_JSON_BYTES."""
    try:
        payload = encode_text(json.dumps(dict(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    except (TypeError, ValueError, RecursionError) as error:
        raise LocalProtocolError(f"Not a JSON object: {error}") from error
    if len(payload) > MAX_JSON_BYTES:
        raise LocalProtocolError(f"A JSON object of {len(payload)} bytes; the wire takes at most {MAX_JSON_BYTES}")
    if payload.count(b"{") + payload.count(b"[") > MAX_JSON_DEPTH and _deeper_than(value, MAX_JSON_DEPTH):
        raise LocalProtocolError(f"A JSON object nested more than {MAX_JSON_DEPTH} deep")
    return payload


def parse_json(payload: bytes) -> dict[str, Any]:
    """The JSON object in a payload; RemoteProtocolError for anything else."""
    try:
        value = json.loads(payload.decode(), parse_constant=_refuse_constant, parse_float=_finite_float)
        if b"\\u" in payload:  # an escaped half of a surrogate pair: no string that can be encoded again
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"Payload is not JSON: {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise RemoteProtocolError("Payload is not a JSON object")
    if payload.count(b"{") + payload.count(b"[") > MAX_JSON_DEPTH and _deeper_than(value, MAX_JSON_DEPTH):
        raise RemoteProtocolError(f"Payload is nested more than {MAX_JSON_DEPTH} deep")
    return value


def is_name(value: object) -> bool:
    """Whether this is a kind or a code: 1 to 64 of a-z 0-9 . _ - and no punctuation first."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def encode_coded(code: str, text_key: str, text: str) -> bytes:
    """The payload of REJECT (`message`), RESET and GOODBYE (`reason`). Long texts are cut."""
    if not is_name(code):
        raise LocalProtocolError(f"Not a code: {code!r}")
    # Four bytes per character at most, so a cut text always fits a payload.
    return encode_json({"code": code, text_key: text[:MAX_TEXT_CHARACTERS]})


def parse_coded(payload: bytes, text_key: str) -> tuple[str, str]:
    """(code, text) of REJECT, RESET or GOODBYE."""
    value = parse_json(payload)
    code, text = value.get("code"), value.get(text_key, "")
    if not isinstance(code, str) or not is_name(code):
        raise RemoteProtocolError("Payload has no valid code")
    if not isinstance(text, str) or len(text) > MAX_TEXT_CHARACTERS:
        raise RemoteProtocolError(f"Payload has no valid {text_key}")
    return code, text
