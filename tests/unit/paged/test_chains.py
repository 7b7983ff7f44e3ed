"""How long chains may become, what of them is merged, and what a machine lies on then; pure values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm_runtime.paged.backing import BackingChain
from vm_runtime.paged.chains import MAX_CHAIN, MAX_SETTLED, check_room, merge_from, rebased
from vm_runtime.snapshots.errors import ChainTooLongError
from vm_runtime.snapshots.manifest import MAX_LAYERS, Part

SIZE = 1 << 20


def part(name: str) -> Part:
    return Part(digest=name * 64, size_bytes=SIZE)


def backing(base: str, layers: str, disks: str) -> BackingChain:
    return BackingChain(base=part(base), layers=tuple(map(part, layers)), disks=tuple(map(part, disks)))


OLD, NEW = backing("0", "123", "ab"), backing("9", "", "ae")


def test_a_machine_on_the_state_or_above_it_gets_the_shorter_form() -> None:
    assert rebased(backing("0", "123", "ab"), old=OLD, new=NEW) == backing("9", "", "ae")
    assert rebased(backing("0", "12345", "abc"), old=OLD, new=NEW) == backing("9", "45", "aec")


def test_memory_and_disks_are_replaced_each_for_themselves() -> None:
    assert rebased(backing("0", "1234", "ac"), old=OLD, new=NEW) == backing("9", "4", "ac")
    assert rebased(backing("8", "4", "abc"), old=OLD, new=NEW) == backing("8", "4", "aec")


def test_other_machines_stay_where_they_are() -> None:
    for other in (backing("0", "12", "a"), backing("0", "21", "a"), backing("9", "123", "ac"), backing("0", "", "a")):
        assert rebased(other, old=OLD, new=NEW) is None


def long_backing(layers: int, disks: int) -> BackingChain:
    parts = [Part(digest=f"{number:064x}", size_bytes=SIZE) for number in range(max(layers, disks))]
    return BackingChain(base=part("0"), layers=tuple(parts[:layers]), disks=tuple(parts[:disks]))


@pytest.mark.parametrize(("layers", "disks"), [(MAX_CHAIN, 1), (1, MAX_CHAIN)])
def test_what_a_manifest_could_not_name_is_refused(layers: int, disks: int) -> None:
    with pytest.raises(ChainTooLongError, match=f"{MAX_CHAIN + 1} .* of at most {MAX_CHAIN}"):
        check_room(long_backing(layers, disks), new_disks=1, open_disks=3, last=False)
    check_room(long_backing(layers - 1, max(disks - 1, 1)), new_disks=1, open_disks=3, last=False)
    # There is room left to fall asleep.
    check_room(long_backing(layers, disks), new_disks=1, open_disks=MAX_LAYERS, last=True)
    with pytest.raises(ChainTooLongError):
        check_room(long_backing(1, 1), new_disks=1, open_disks=MAX_CHAIN, last=False)


@given(st.lists(st.integers(1, 10_000), max_size=60))
def test_what_is_merged_leaves_a_short_chain(sizes: list[int]) -> None:
    start = merge_from(sizes, most=8)
    assert (start == len(sizes)) == (len(sizes) < 8)
    assert start <= MAX_SETTLED or start == len(sizes) < 8
    assert len(sizes) - start != 1


def test_a_long_life_is_a_short_chain_and_little_rewriting() -> None:
    """2,000 snapshots, each with something new: what all merging writes is a few times what was new."""
    sizes: list[int] = []
    written = 0
    for number in range(2000):
        sizes.append(1 + number % 7)
        start = merge_from(sizes, most=8)
        if start < len(sizes):
            written += sum(sizes[start:])
            sizes[start:] = [sum(sizes[start:])]
        assert len(sizes) < 8
    assert written < 8 * sum(sizes)
