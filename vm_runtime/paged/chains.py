"""How long chains of layers and disks may become, and which part of one is merged next: functions of values.

Size-tiered, as log-structured stores do it: what is merged is the top of the chain, with each lower part that is not
much larger than all above it. So a large part is rewritten only when as much has come over it, and what is written once
is merged some six times in its life, however long that is (simulated: 2,000 parts of 0.4 to 5 MB, chains of at most 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vm_runtime.paged.backing import BackingChain
from vm_runtime.snapshots.errors import ChainTooLongError
from vm_runtime.snapshots.manifest import MAX_LAYERS

# A restore opens and indexes every layer, a fork too. Measured, layers of 1,700 runs: four 8 ms, seven 26 ms.
LONG_CHAIN = 6
# A VMM opens every overlay of its disk.
MANY_DISKS = 8
# A restore copies layers into the machine, 0.65 ms per MB and privately: so much costs some 30 ms.
LARGE_LAYERS_BYTES = 48 << 20
# A part of this many times the size of all above it is left alone.
_TIER_RATIO = 2
# What no chain has more of once it was shortened; beyond it the sizes do not count.
MAX_SETTLED = 16
# What a person should know of: no chain that was shortened has so many.
SETTLED_PARTS = 24
# A chain that flattening has not kept up with: the next snapshot waits for it.
CROWDED = 48
# The last parts of the longest chain are for falling asleep; before that, checkpoints and forks are refused.
MAX_CHAIN = MAX_LAYERS - 8


def merge_from(sizes: Sequence[int], *, most: int) -> int:
    """The index from which on the parts of a chain, lowest first, are to be merged into one; their count for none."""
    if len(sizes) < most:
        return len(sizes)
    start = len(sizes) - 1
    above = sizes[start]
    while start and (sizes[start - 1] <= _TIER_RATIO * above or len(sizes) - start < most // 2 or start > MAX_SETTLED):
        start -= 1
        above += sizes[start]
    return start


def may_need(backing: BackingChain) -> bool:
    """Whether there may be something to shorten; cheap."""
    return is_long_memory(backing) or has_many_disks(backing)


def is_long_memory(backing: BackingChain) -> bool:
    return len(backing.layers) >= LONG_CHAIN or backing.layer_bytes >= LARGE_LAYERS_BYTES


def has_many_disks(backing: BackingChain) -> bool:
    return len(backing.disks) >= MANY_DISKS


def is_crowded(backing: BackingChain, *, open_disks: int) -> bool:
    """Whether a snapshot should wait until the chain is shorter. open_disks: files that the VMM has open."""
    return max(len(backing.layers), len(backing.disks), open_disks) >= CROWDED


def check_room(backing: BackingChain, *, new_disks: int, open_disks: int, last: bool) -> None:
    """Before a pause: whether one more snapshot can be stored. new_disks: that it would add; last: its machine stops.

    Raises ChainTooLongError.
    """
    most = MAX_LAYERS if last else MAX_CHAIN
    for what, count in (
        ("memory layers", len(backing.layers) + 1),
        ("disks", len(backing.disks) + new_disks),
        ("open disks", 0 if last else open_disks + 1),
    ):
        if count > most:
            raise ChainTooLongError(what, count=count, most=most)


def rebased(backing: BackingChain, *, old: BackingChain, new: BackingChain) -> BackingChain | None:
    """The backing chain of a machine that lies on the old state or on snapshots over it, on the new one; None if it
    does not.

    Memory and disks each for themselves: one of them may have been replaced by an earlier shortening already.
    """
    result = backing
    count = len(old.layers)
    if backing.base == old.base and backing.layers[:count] == old.layers:
        result = replace(result, base=new.base, layers=(*new.layers, *backing.layers[count:]))
    if backing.disks[: len(old.disks)] == old.disks:
        result = replace(result, disks=(*new.disks, *backing.disks[len(old.disks) :]))
    return None if result == backing else result
