"""What comes from a guest's agent, as values and errors of this layer. All of it is hostile until checked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kernels.deadlines import CALL_TIMEOUT_S, Deadlines
from kernels.errors import LEFT, GuestRefusedError, MachineFailedError, MachineLeftError
from vm_runtime.wire.chunks import ChunkError
from vm_runtime.wire.command_frames import CommandFrameError
from vm_runtime.wire.errors import LinkClosedError, OpenRejectedError, StreamResetError
from vm_runtime.wire.payloads import encode_text
from vm_runtime.wire.stream import Stream

# A list of 10,000 files, or of all commands, with room to spare.
MAX_ANSWER_BYTES = 16 * 1024 * 1024
# Above this, JSON is parsed in a thread: it takes 10 ms per MB.
LARGE_ANSWER_BYTES = 128 * 1024
# A sentence for people.
MAX_MESSAGE_CHARACTERS = 5000


@contextmanager
def guest_errors() -> Iterator[None]:
    """Errors of a stream to the agent as this layer's: GuestRefusedError, MachineFailedError, MachineLeftError."""
    try:
        yield
    except (OpenRejectedError, StreamResetError) as error:
        raise GuestRefusedError(error.code, error.reason[:MAX_MESSAGE_CHARACTERS]) from error
    except LinkClosedError as error:
        if error.code in LEFT:
            raise MachineLeftError(error.code) from error
        raise MachineFailedError(f"The connection to the sandbox's machine ended: {error}") from error
    except (ChunkError, CommandFrameError) as error:
        raise MachineFailedError(f"What the guest sent is broken: {error}") from error


@asynccontextmanager
async def asking(deadlines: Deadlines, what: str) -> AsyncIterator[None]:
    """The same where all within is a question and its answer, for which a guest has CALL_TIMEOUT_S."""
    async with deadlines.within(CALL_TIMEOUT_S, what):
        with guest_errors():
            yield


async def read_json(stream: Stream) -> Any:
    """All that the guest still sends, as JSON. Errors: MachineFailedError."""
    data = bytearray()
    while more := await stream.read():
        data += more
        if len(data) > MAX_ANSWER_BYTES:
            raise MachineFailedError(f"The guest answered more than {MAX_ANSWER_BYTES} bytes.")
    return await asyncio.to_thread(parse_json, data) if len(data) > LARGE_ANSWER_BYTES else parse_json(data)


def parse_json(data: bytes | bytearray) -> Any:
    """Errors: MachineFailedError."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MachineFailedError("The guest answered what is no JSON.") from error


def _clamped(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return float(min(max(value, 0), 253402300799)) if value == value else 0.0


# An int from 0 to 2**63 - 1.
Count = Annotated[int, Field(ge=0, lt=2**63)]
Mode = Annotated[Count, AfterValidator(lambda mode: mode & 0o7777)]
# A str that can be encoded.
Text = Annotated[str, BeforeValidator(lambda value: encode_text(value).decode() if isinstance(value, str) else value)]
# Seconds since 1970, in years that people have (a guest's clock and files may say anything).
Moment = Annotated[float, BeforeValidator(_clamped)]


class GuestValue(BaseModel):
    """A value as a guest sends it. Fields that are not known here, of a newer agent, are left out."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", populate_by_name=True)

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Errors: MachineFailedError."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            where = ".".join(map(str, error.errors(include_input=False, include_url=False)[0]["loc"]))
            raise MachineFailedError(f"The guest answered without a {where or 'value'} that could be one.") from error
