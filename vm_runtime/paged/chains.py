"""How long chains of layers and disks may become, and which part of one is merged next: functions of values.

Size-tiered, as log-structured stores do it: what is merged is the top of the chain, with each lower part that is not
much larger than all above it. So a large part is rewritten only when as much has come over it, and what is written once
is merged some six times in its life, however long that is (simulated: 2,000 parts of 0.4 to 5 MB, chains of at most 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vm_runtime.paged.ground import Ground
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
# What a person should hear of: no chain that was shortened has so many.
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


def may_need(ground: Ground) -> bool:
    """Whether there may be something to shorten; cheap."""
    return is_long_memory(ground) or has_many_disks(ground)


def is_long_memory(ground: Ground) -> bool:
    return len(ground.layers) >= LONG_CHAIN or ground.layer_bytes >= LARGE_LAYERS_BYTES


def has_many_disks(ground: Ground) -> bool:
    return len(ground.disks) >= MANY_DISKS


def is_crowded(ground: Ground, *, open_disks: int) -> bool:
    """Whether a snapshot should wait until the chain is shorter. open_disks: files that the VMM has open."""
    return max(len(ground.layers), len(ground.disks), open_disks) >= CROWDED


def check_room(ground: Ground, *, new_disks: int, open_disks: int, last: bool) -> None:
    """Before a pause: whether one more snapshot can be stored. new_disks: that it would add; last: its machine stops.

    Raises ChainTooLongError.
    """
    most = MAX_LAYERS if last else MAX_CHAIN
    for what, count in (
        ("memory layers", len(ground.layers) + 1),
        ("disks", len(ground.disks) + new_disks),
        ("open disks", 0 if last else open_disks + 1),
    ):
        if count > most:
            raise ChainTooLongError(what, count=count, most=most)


def rebased(ground: Ground, *, old: Ground, new: Ground) -> Ground | None:
    """The ground of a machine that lies on the old state or on snapshots over it, on the new one; None if it does not.

    Memory and disks each for themselves: one of them may have been replaced by an earlier shortening already.
    """
    result = ground
    count = len(old.layers)
    if ground.base == old.base and ground.layers[:count] == old.layers:
        result = replace(result, base=new.base, layers=(*new.layers, *ground.layers[count:]))
    if ground.disks[: len(old.disks)] == old.disks:
        result = replace(result, disks=(*new.disks, *ground.disks[len(old.disks) :]))
    return None if result == ground else result
