"""How long chains may become, what of them is merged, and what a machine lies on then; pure values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm_runtime.saving.chains import MAX_CHAIN, MAX_SETTLED, Shortened, check_room, merge_from, rebased
from vm_runtime.saving.values import Ground
from vm_runtime.snapshots.errors import ChainTooLongError
from vm_runtime.snapshots.manifest import MAX_LAYERS, DiskPart, MemoryParts, Part

SIZE = 1 << 20


def part(name: str) -> Part:
    return Part(digest=name * 64, size_bytes=SIZE)


def ground(base: str, layers: str, disks: str) -> Ground:
    chain: list[DiskPart] = []
    for name in disks:
        below = chain[-1].digest if chain else None
        chain.append(DiskPart(digest=name * 64, size_bytes=SIZE, format="qcow2" if below else "raw", backing=below))
    memory = MemoryParts(size_bytes=SIZE, base=part(base), layers=tuple(part(name) for name in layers))
    return Ground(memory=memory, disks=tuple(chain))


SHORTENED = Shortened(old=ground("0", "123", "ab"), new=ground("9", "", "ae"))


def test_a_machine_on_the_state_or_above_it_gets_the_shorter_form() -> None:
    assert rebased(ground("0", "123", "ab"), SHORTENED) == ground("9", "", "ae")
    assert rebased(ground("0", "12345", "abc"), SHORTENED) == ground("9", "45", "aec")


def test_memory_and_disks_are_replaced_each_for_themselves() -> None:
    assert rebased(ground("0", "1234", "ac"), SHORTENED) == ground("9", "4", "ac")
    assert rebased(ground("8", "4", "abc"), SHORTENED) == ground("8", "4", "aec")


def test_other_machines_stay_where_they_are() -> None:
    for other in (ground("0", "12", "a"), ground("0", "21", "a"), ground("9", "123", "ac"), ground("0", "", "a")):
        assert rebased(other, SHORTENED) is None


def long_ground(layers: int, disks: int) -> Ground:
    names = [f"{number:064x}" for number in range(max(layers, disks))]
    memory = MemoryParts(
        size_bytes=SIZE,
        base=part("0"),
        layers=tuple(Part(digest=name, size_bytes=SIZE) for name in names[:layers]),
    )
    chain = [DiskPart(digest=name, size_bytes=SIZE, format="raw") for name in names[:disks]]
    return Ground(memory=memory, disks=tuple(chain))


@pytest.mark.parametrize(("layers", "disks"), [(MAX_CHAIN, 1), (1, MAX_CHAIN)])
def test_what_a_manifest_could_not_name_is_refused(layers: int, disks: int) -> None:
    with pytest.raises(ChainTooLongError, match=f"{MAX_CHAIN + 1} .* of at most {MAX_CHAIN}"):
        check_room(long_ground(layers, disks), new_disks=1, open_disks=3, last=False)
    check_room(long_ground(layers - 1, max(disks - 1, 1)), new_disks=1, open_disks=3, last=False)
    # There is room left to fall asleep.
    check_room(long_ground(layers, disks), new_disks=1, open_disks=MAX_LAYERS, last=True)
    with pytest.raises(ChainTooLongError):
        check_room(long_ground(1, 1), new_disks=1, open_disks=MAX_CHAIN, last=False)


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
