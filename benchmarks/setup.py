"""What a topic is given: the gateways to compare and how often; and taking samples of them in turns."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.peers import Peer

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """state_dir: where images and templates are. cache_dir: for what the benchmark itself builds once. quick: few
    repetitions. progress: prints a line of progress."""

    state_dir: Path
    cache_dir: Path
    quick: bool
    progress: Callable[[str], None]

    def times(self, full: int, *, quick: int) -> int:
        """How often to repeat."""
        return quick if self.quick else full


@dataclass(frozen=True, kw_only=True)
class Setup(Bench):
    """baseline: jupyter_kernel_gateway. pooled: Hypercell with its default pool, or the gateway that was given.
    unpooled: Hypercell without a pool, None beside a given gateway."""

    baseline: Peer
    pooled: Peer
    unpooled: Peer | None

    @property
    def peers(self) -> tuple[Peer, ...]:
        """All of them, in the order of their turns."""
        return tuple(peer for peer in (self.baseline, self.pooled, self.unpooled) if peer is not None)


async def in_turns(
    peers: Sequence[Peer], repetitions: int, sample: Callable[[Peer], Awaitable[T]]
) -> dict[str, list[T]]:
    """A B A B ...: the host's changing load hits all alike. Before each sample every pool is full. A first round, in
    which caches fill, is thrown away. The samples by the peer's name."""
    samples: dict[str, list[T]] = {peer.name: [] for peer in peers}
    for round_number in range(repetitions + 1):
        for peer in peers:
            for other in peers:
                await other.settle()
            value = await sample(peer)
            if round_number > 0:
                samples[peer.name].append(value)
    return samples
