"""Room on the host is reserved before machines are started, and given back however their start ends."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from kernels.capacity import RESERVE_MIB, SPARE_RESERVE_MIB, START_COST_MIB, Capacity
from kernels.errors import CapacityError


def test_starts_at_the_same_time_do_not_count_on_the_same_memory() -> None:
    capacity = Capacity(10, available_mib=lambda: RESERVE_MIB + 3 * START_COST_MIB)
    with ExitStack() as stack:
        stack.enter_context(capacity.room(1024, count=2))
        stack.enter_context(capacity.room(1024))
        with pytest.raises(CapacityError, match=f"{RESERVE_MIB} MiB .* need {RESERVE_MIB + START_COST_MIB}"):
            stack.enter_context(capacity.room(1024))
    with capacity.room(1024, count=3):
        pass


def test_room_is_given_back_when_the_start_fails() -> None:
    capacity = Capacity(10, available_mib=lambda: RESERVE_MIB + START_COST_MIB)
    with pytest.raises(OSError, match="no VMM"), capacity.room(1024):
        raise OSError("no VMM")
    with capacity.room(1024):
        pass


def test_a_spare_machine_counts_what_is_reserved() -> None:
    capacity = Capacity(10, available_mib=lambda: SPARE_RESERVE_MIB + START_COST_MIB)
    assert capacity.has_room_for_spare()
    with capacity.room(1024):
        assert not capacity.has_room_for_spare()
