"""What a build shows: one line for each step, also for what takes whole lines only."""

from __future__ import annotations

import pytest

from vm_runtime.images.progress import Steps, by_line


def test_a_line_begins_with_its_step_and_ends_with_it() -> None:
    texts: list[str] = []
    lines: list[str] = []
    write_line = by_line(lines.append)

    def progress(text: str) -> None:
        texts.append(text)
        write_line(text)

    with pytest.raises(RuntimeError), Steps(progress, 2) as steps:
        steps.begin("one")
        assert (texts, lines) == (["[1/2] one ... "], [])
        steps.begin("two")
        assert lines == ["[1/2] one ... 0 s"]
        raise RuntimeError
    assert lines == ["[1/2] one ... 0 s", "[2/2] two ... failed after 0 s"]
