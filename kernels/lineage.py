"""Who came from whom by forks, also through sandboxes that no longer exist: those stay known while descendants of
theirs live.

Pure: a tree of ids. Knows nothing of records or of disk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator


class Lineage:
    """`add` a sandbox when it is made, `remove` it when it ends. An unknown id has no family."""

    def __init__(self) -> None:
        self._parents: dict[str, str | None] = {}
        self._children: defaultdict[str, dict[str, None]] = defaultdict(dict)  # as ordered sets
        self._gone: set[str] = set()

    def add(self, sandbox_id: str, parent_id: str | None, *, gone: bool = False) -> None:
        """gone: it is known only for the sake of its descendants."""
        self._parents[sandbox_id] = parent_id
        if parent_id is not None:
            self._children[parent_id][sandbox_id] = None
        if gone:
            self._gone.add(sandbox_id)

    def remove(self, sandbox_id: str) -> list[str]:
        """What is forgotten now: it, and ancestors known only for its sake; nothing while it has descendants."""
        self._gone.add(sandbox_id)
        forgotten: list[str] = []
        last: str | None = sandbox_id
        while last in self._gone and last not in self._children:
            self._gone.remove(last)
            forgotten.append(last)
            parent_id = self._parents.pop(last)
            if parent_id is not None:
                self._children[parent_id].pop(last)
                if not self._children[parent_id]:
                    del self._children[parent_id]
            last = parent_id
        return forgotten

    def adopt(self, sandbox_id: str, parent_id: str) -> list[str]:
        """The children of `sandbox_id` become those of `parent_id`; answers them, those that no longer exist
        included."""
        children = list(self._children.pop(sandbox_id, {}))
        for child_id in children:
            self.add(child_id, parent_id)
        return children

    def children(self, sandbox_id: str) -> list[str]:
        """Those that are not gone, oldest first."""
        return [child_id for child_id in self._children.get(sandbox_id, ()) if child_id not in self._gone]

    def parent(self, sandbox_id: str) -> str | None:
        """The nearest ancestor that is not gone."""
        return next((ancestor for ancestor in self._ancestors(sandbox_id) if ancestor not in self._gone), None)

    def is_descendant(self, sandbox_id: str, ancestor_id: str) -> bool:
        return ancestor_id in self._ancestors(sandbox_id)

    def descendants(self, sandbox_id: str) -> list[str]:
        """Those that are not gone, parents before children."""
        found = [sandbox_id]
        for each in found:
            found += self._children.get(each, ())
        return [each for each in found[1:] if each not in self._gone]

    def family(self, sandbox_id: str) -> set[str]:
        """It and all that have an ancestor with it in common, those that no longer exist excepted."""
        root = sandbox_id
        for ancestor in self._ancestors(sandbox_id):
            root = ancestor
        return {each for each in (root, *self.descendants(root)) if each not in self._gone}

    def _ancestors(self, sandbox_id: str) -> Iterator[str]:
        """Nearest first, as far as they are known."""
        parent_id = self._parents.get(sandbox_id)
        while parent_id is not None and parent_id in self._parents:
            yield parent_id
            parent_id = self._parents[parent_id]
