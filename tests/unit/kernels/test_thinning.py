"""How many checkpoints go so that the rest is within the budget."""

from __future__ import annotations

import pytest

from kernels.time_line import MAX_CHECKPOINTS, too_many


@pytest.mark.parametrize(
    ("freed", "loose", "budget_bytes", "gone"),
    [
        ([0], 0, 0, 0),
        ([0, 10, 20, 30], 3, 30, 0),
        ([0, 10, 20, 30], 3, 29, 1),
        ([0, 10, 20, 30], 3, 10, 2),
        # The first two lie on parts that the third needs, too.
        ([0, 0, 0, 30], 3, 29, 3),
        # Two have a name: they count, and stay.
        ([0, 10, 20, 30], 1, 20, 1),
        ([0, 10, 20, 30], 1, 5, 1),
        ([0] * 251, 250, 0, 250 - MAX_CHECKPOINTS),
        ([*range(251)], 250, 30, 220),
    ],
)
def test_the_fewest_go_that_are_enough(freed: list[int], loose: int, budget_bytes: int, gone: int) -> None:
    assert too_many(freed, loose=loose, budget_bytes=budget_bytes) == gone
