"""What a running machine lies on after the state under it got a shorter form; pure values."""

from __future__ import annotations

from vm_runtime.saving.flattening import Shortened, rebased
from vm_runtime.saving.values import Ground
from vm_runtime.snapshots.manifest import DiskPart, MemoryParts, Part

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
