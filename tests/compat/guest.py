"""The process of a fake machine whose agent is a frozen one: run with that agent's `vm_runtime` on the path.

The agents of all generations behave alike behind the wire; what they are made of has other names.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import vm_runtime
from tests.fake_driver.guest import FakeAgent, Line
from tests.fake_driver.guest import main as fake_main
from vm_runtime.guest.agent import AgentSettings
from vm_runtime.wire.serving import serve


class FirstAgent(FakeAgent):
    """Of generation 1."""

    def __init__(self, settings: AgentSettings, *, marker_path: Path) -> None:
        paths = replace(settings.paths, code=Path(vm_runtime.__path__[0]).parent)  # type: ignore[call-arg]
        super().__init__(replace(settings, paths=paths), marker_path=marker_path)
        self._kernel_manager = self._keeper  # type: ignore[attr-defined]  # its name in that agent

    async def _welcome(self, hello: Any) -> Any:
        welcome = await super()._welcome(hello)  # type: ignore[misc]  # that agent has it
        self.note_marker(hello)
        return welcome

    async def serve(self, carrier: Line, *, marker: bytes) -> None:  # type: ignore[override]
        await serve(carrier, self._on_session, make_welcome=self._welcome, marker=marker)


def main() -> None:
    fake_main(FirstAgent)
