"""Values that cross between sandboxes: pickled, or as JSON where that fails. Only guests ever read them."""

from __future__ import annotations

import io
import json
import pickle
from typing import Any

from vm_runtime.guest.sandbox.errors import ValueRefusedError
from vm_runtime.guest.sandbox.host import VALUE_BYTES_MAX, too_large

_PICKLE = b"p"
_JSON = b"j"


class _LimitError(Exception):
    """More was written than may cross."""


class _BoundedBuffer(io.BytesIO):
    """Refuses early, so that a data frame of gigabytes is not pickled whole before it is refused."""

    def write(self, data: Any, /) -> int:
        if self.tell() + len(memoryview(data).cast("B")) > VALUE_BYTES_MAX:
            raise _LimitError
        return super().write(data)


def encode(value: object) -> bytes:
    """Raises ValueRefusedError with a sentence that says what to do instead."""
    buffer = _BoundedBuffer()
    buffer.write(_PICKLE)
    try:
        pickle.dump(value, buffer, protocol=pickle.HIGHEST_PROTOCOL)
        return buffer.getvalue()
    except _LimitError:
        size = _size(value)
        raise ValueRefusedError(too_large(size if size > VALUE_BYTES_MAX else None)) from None
    except Exception as error:  # whatever a __reduce__ may raise
        reason = str(error)
    try:
        data = _JSON + json.dumps(value).encode()
    except (TypeError, ValueError, RecursionError):
        raise ValueRefusedError(
            f"A value of type {type(value).__name__} cannot cross between sandboxes, since it can be neither pickled "
            f"({reason}) nor written as JSON. Return plain data made from it."
        ) from None
    if len(data) > VALUE_BYTES_MAX:
        raise ValueRefusedError(too_large(len(data)))
    return data


def decode(data: bytes) -> Any:
    """The value again. Raises ValueRefusedError, for one of a class that only the other sandbox has."""
    if not data:
        return None
    try:
        return pickle.loads(data[1:]) if data[:1] == _PICKLE else json.loads(data[1:])
    except Exception as error:  # unpickling runs the value's own code
        raise ValueRefusedError(
            f"The value cannot be read here: {error}. Define its class and import its module before the fork."
        ) from error


def _size(value: object) -> int:
    """About how large it is, where that is known at once (numpy, pandas, bytes)."""
    try:
        usage = value.memory_usage(deep=True) if hasattr(value, "memory_usage") else None
        if usage is not None:
            return int(usage.sum() if hasattr(usage, "sum") else usage)
        return int(getattr(value, "nbytes", 0)) or (len(value) if isinstance(value, bytes | bytearray | str) else 0)
    except Exception:  # only for a message
        return 0
