"""What running code gave: printed text, rich results, an error. Made from a kernel's messages, purely."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hypercell.errors import CodeError
from hypercell.kernel_messages import KernelMessage

# What an Execution keeps of each of stdout and stderr: as much as of a command, far more than anyone reads, and small
# against the memory of the program that runs code. An endless loop that prints must not fill that. Callbacks get
# everything.
MAX_KEPT_CHARACTERS = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Result:
    """A rich output: one thing in several formats.

    data: MIME type to content, as Jupyter has it (binary formats in base64). is_main: the value of the last line, as
    opposed to something displayed. The properties are the usual formats; None where it has none.
    """

    data: Mapping[str, Any]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    is_main: bool = False

    def _text(self, mime_type: str) -> str | None:
        value = self.data.get(mime_type)
        return None if value is None else "".join(value) if isinstance(value, list) else str(value)

    @property
    def text(self) -> str | None:
        """text/plain."""
        return self._text("text/plain")

    @property
    def html(self) -> str | None:
        """text/html."""
        return self._text("text/html")

    @property
    def markdown(self) -> str | None:
        """text/markdown."""
        return self._text("text/markdown")

    @property
    def latex(self) -> str | None:
        """text/latex."""
        return self._text("text/latex")

    @property
    def svg(self) -> str | None:
        """image/svg+xml."""
        return self._text("image/svg+xml")

    @property
    def png(self) -> str | None:
        """image/png, in base64."""
        return self._text("image/png")

    @property
    def jpeg(self) -> str | None:
        """image/jpeg, in base64."""
        return self._text("image/jpeg")

    @property
    def pdf(self) -> str | None:
        """application/pdf, in base64."""
        return self._text("application/pdf")

    @property
    def javascript(self) -> str | None:
        """application/javascript."""
        return self._text("application/javascript")

    @property
    def json(self) -> Any:
        """application/json, as Python values."""
        return self.data.get("application/json")

    @property
    def formats(self) -> list[str]:
        """The MIME types there are."""
        return list(self.data)

    def __str__(self) -> str:
        return self.text or f"<{', '.join(self.formats)}>"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return self.data, self.metadata


@dataclass(frozen=True, kw_only=True)
class ExecutionError:
    """An exception that the code raised. traceback: as a terminal shows it, with colour codes."""

    name: str
    value: str
    traceback: str


@dataclass(kw_only=True)
class Logs:
    """What the code printed, in pieces as they came."""

    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Execution:
    """What running code gave. execution_count: the number of the cell, None if it was never run.

    outputs: the same in the order in which it came, as a notebook's cell stores it (nbformat 4). skipped_characters:
    how much was printed that is in neither `logs` nor `outputs`: they hold the first 16 Mi characters each of stdout
    and stderr.
    """

    results: list[Result] = field(default_factory=list)
    logs: Logs = field(default_factory=Logs)
    error: ExecutionError | None = None
    execution_count: int | None = None
    outputs: list[dict[str, Any]] = field(default_factory=list, repr=False)
    skipped_characters: int = 0

    @property
    def text(self) -> str | None:
        """The value of the last line as text; None if it has none."""
        return next((result.text for result in reversed(self.results) if result.is_main), None)

    @property
    def stdout(self) -> str:
        """All that was printed (see `skipped_characters`)."""
        return "".join(self.logs.stdout)

    @property
    def stderr(self) -> str:
        """All that was printed to stderr (see `skipped_characters`)."""
        return "".join(self.logs.stderr)

    def raise_for_error(self) -> Execution:
        """This; raises CodeError if the code raised an exception."""
        if self.error is not None:
            raise CodeError(self.error)
        return self


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What one message added: at most one of these."""

    stdout: str | None = None
    stderr: str | None = None
    result: Result | None = None
    error: ExecutionError | None = None


_NOTHING = Heard()


class Recorder:
    """Makes an `Execution` from messages, in their order."""

    def __init__(self) -> None:
        self.execution = Execution()
        # Where a display that is updated later stands.
        self._displays: dict[str, tuple[int, int]] = {}
        self._clear_at_next = False
        # Characters kept, by the stream's name.
        self._kept: dict[str, int] = {}

    def take(self, message: KernelMessage) -> Heard:
        """Adds one message."""
        content = message.content
        if message.msg_type in {"stream", "display_data", "execute_result"} and self._clear_at_next:
            self._clear()
        if message.msg_type == "stream":
            text = str(content["text"])
            name = "stderr" if content["name"] == "stderr" else "stdout"
            self._print(name, text)
            return Heard(stderr=text) if name == "stderr" else Heard(stdout=text)
        if message.msg_type in {"display_data", "execute_result"}:
            return Heard(result=self._add(content, is_main=message.msg_type == "execute_result"))
        if message.msg_type == "update_display_data":
            return self._update(content)
        if message.msg_type == "clear_output":
            self._clear_at_next = True
            if not content.get("wait"):
                self._clear()
        elif message.msg_type == "error":
            return self._error(content)
        elif message.msg_type == "execute_input":
            self.execution.execution_count = content.get("execution_count")
        elif message.msg_type == "execute_reply":
            return self._reply(content)
        return _NOTHING

    def _add(self, content: Mapping[str, Any], *, is_main: bool) -> Result:
        result = Result(data=content["data"], metadata=content.get("metadata", {}), is_main=is_main)
        display_id = (content.get("transient") or {}).get("display_id")
        if display_id is not None:
            self._displays[display_id] = (len(self.execution.results), len(self.execution.outputs))
        self.execution.results.append(result)
        output: dict[str, Any] = {
            "output_type": "display_data",
            "data": dict(result.data),
            "metadata": dict(result.metadata),
        }
        if is_main:
            output.update(output_type="execute_result", execution_count=content.get("execution_count"))
        self.execution.outputs.append(output)
        return result

    def _print(self, name: str, text: str) -> None:
        known = self._kept.get(name, 0)
        kept = text[: MAX_KEPT_CHARACTERS - known]
        self._kept[name] = known + len(kept)
        self.execution.skipped_characters += len(text) - len(kept)
        if not kept:
            return
        logs = self.execution.logs
        (logs.stderr if name == "stderr" else logs.stdout).append(kept)
        last = self.execution.outputs[-1] if self.execution.outputs else {}
        if last.get("output_type") == "stream" and last["name"] == name:
            last["text"].append(kept)
        else:
            self.execution.outputs.append({"output_type": "stream", "name": name, "text": [kept]})

    def _update(self, content: Mapping[str, Any]) -> Heard:
        found = self._displays.get((content.get("transient") or {}).get("display_id", ""))
        if found is None:
            return _NOTHING  # a display of an earlier execution
        place, output = found
        self.execution.outputs[output].update(data=content["data"], metadata=content.get("metadata", {}))
        is_main = self.execution.results[place].is_main
        result = Result(data=content["data"], metadata=content.get("metadata", {}), is_main=is_main)
        self.execution.results[place] = result
        return Heard(result=result)

    def _clear(self) -> None:
        self._clear_at_next = False
        self._displays.clear()
        self.execution.results.clear()
        self.execution.outputs.clear()
        self.execution.logs = Logs()
        self.execution.skipped_characters = 0
        self._kept.clear()

    def _error(self, content: Mapping[str, Any]) -> Heard:
        self.execution.error = ExecutionError(
            name=str(content["ename"]), value=str(content["evalue"]), traceback="\n".join(content["traceback"])
        )
        self.execution.outputs.append(
            {
                "output_type": "error",
                "ename": self.execution.error.name,
                "evalue": self.execution.error.value,
                "traceback": list(content["traceback"]),
            }
        )
        return Heard(error=self.execution.error)

    def _reply(self, content: Mapping[str, Any]) -> Heard:
        self.execution.execution_count = content.get("execution_count", self.execution.execution_count)
        if content.get("status") == "error" and self.execution.error is None:
            return self._error({"ename": "Error", "evalue": "", "traceback": [], **content})
        if content.get("status") == "aborted":
            return self._error({"ename": "Aborted", "evalue": "an earlier cell failed", "traceback": []})
        return _NOTHING
