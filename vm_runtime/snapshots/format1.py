"""Reads what earlier versions wrote: manifests and machine records of format 1, whose states were QEMU's only.

Pure functions of parsed JSON. A snapshot keeps the id and the text that it was published with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_QEMU_PAGES = "qemu-pages-1"


def state_of(vmm: Mapping[str, Any], memory: Mapping[str, Any], disks: Sequence[Any], device: Any) -> dict[str, Any]:
    """A `State` as JSON. Raises KeyError, TypeError for what is no format 1."""
    parts = [{"kind": "base", **memory["base"]}]
    parts += [{"kind": "layer", **layer} for layer in memory["layers"]]
    if device is not None:
        parts.append({"kind": "device", **device})
    below = None
    for disk in disks:
        if disk["backing"] != below:
            raise ValueError("the disks are not a chain")
        below = disk["digest"]
        parts.append({"kind": "disk", "digest": disk["digest"], "size_bytes": disk["size_bytes"]})
    if memory["base"]["size_bytes"] != memory["size_bytes"]:
        raise ValueError("the base has another size than guest memory")
    needs = {name: vmm[name] for name in ("version", "machine", "cpu_model", "accelerator")}
    return {"driver": vmm["driver"], "format": _QEMU_PAGES, "needs": needs, "parts": parts}


def contents(old: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest of format 1, or its contents without the id, as one of format 2."""
    new = dict(old)
    vmm, memory, device, disks = (new.pop(name) for name in ("vmm", "memory", "device", "disks"))
    new["format_version"] = 2
    new["state"] = state_of(vmm, memory, disks, device)
    return new


def record(old: Mapping[str, Any]) -> dict[str, Any]:
    """A `saved.json` of format 1 as one of format 2."""
    vmm = old["snapshot"]["vmm"]
    state = state_of(vmm, old["memory"], old["disks"], None)
    return {"format": 2, "snapshot": old["snapshot"], "state": state}


def text(old: Mapping[str, Any]) -> bytes:
    """The canonical JSON that a manifest of format 1 was published with."""
    return json.dumps(old, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
