"""What a machine of pages lies on: a base and layers of guest memory, and a chain of disk files. Pure data.

The same as the parts of a `State`, without the device state, which only a restore needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vm_runtime.snapshots.manifest import Part, PartKind, State, StatePart


@dataclass(frozen=True, kw_only=True)
class BackingChain:
    """base: of guest memory.
    layers: over it, lowest first.
    disks: lowest first; the first is a raw file, each other an overlay over the one before it.
    """

    base: Part
    layers: tuple[Part, ...] = ()
    disks: tuple[Part, ...] = ()

    @classmethod
    def of(cls, state: State) -> BackingChain:
        (base,) = state.of_kind(PartKind.BASE)
        return cls(base=base, layers=state.of_kind(PartKind.LAYER), disks=state.of_kind(PartKind.DISK))

    @property
    def memory_bytes(self) -> int:
        return self.base.size_bytes

    @property
    def layer_bytes(self) -> int:
        """Of all layers, as stored."""
        return sum(layer.size_bytes for layer in self.layers)

    def over(self, *, layer: Part | None = None, disks: tuple[Part, ...] = ()) -> BackingChain:
        """With one more layer and more disks over it."""
        layers = self.layers if layer is None else (*self.layers, layer)
        return replace(self, layers=layers, disks=(*self.disks, *disks))

    def state(self, *, driver: str, format: str, needs: Mapping[str, str], device: Part | None) -> State:
        """device: the state of CPUs and devices that belongs to it."""
        kinds = [(PartKind.BASE, self.base), *((PartKind.LAYER, layer) for layer in self.layers)]
        if device is not None:
            kinds.append((PartKind.DEVICE, device))
        kinds += [(PartKind.DISK, disk) for disk in self.disks]
        parts = tuple(StatePart(kind=kind, digest=part.digest, size_bytes=part.size_bytes) for kind, part in kinds)
        return State(driver=driver, format=format, needs=dict(needs), parts=parts)
