"""Families of forks keep their root and their order whoever is deleted, and nothing stays of families that are gone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.lineage import Lineage
from tests.unit.kernels.conftest import Service


@pytest.mark.parametrize("restarted", [False, True])
def test_a_family_outlives_an_inner_node_and_its_root(service: Service, restarted: bool) -> None:
    for sandbox_id, parent_id in (("a", None), ("b", "a"), ("x", "a"), ("c", "b"), ("d", "b"), ("stranger", None)):
        service.add(sandbox_id, parent_id)
    registry = service.registry

    def seen_by(sandbox_id: str) -> list[tuple[str, str | None]]:
        return [(member.id, member.parent_id) for member in service.forks.tree(sandbox_id)]

    def remove(sandbox_id: str) -> None:
        registry.remove(sandbox_id)
        if restarted:
            registry.lineage = Lineage()
            registry.load()

    remove("b")
    for member in "axcd":
        assert seen_by(member) == [("a", None), ("x", "a"), ("c", "a"), ("d", "a")]
    assert registry.lineage.is_descendant("c", "a")
    assert registry.lineage.children("a") == ["x"]
    remove("a")
    for member in "xcd":
        assert seen_by(member) == [("x", None), ("c", None), ("d", None)]
    assert seen_by("stranger") == [("stranger", None)]
    remove("c")
    remove("x")
    assert seen_by("d") == [("d", None)]
    remove("d")
    assert service.registry._index.ancestors() == {}


async def test_a_sandbox_is_deleted_with_its_descendants_if_asked(service: Service) -> None:
    for sandbox_id, parent_id in (("a", None), ("b", "a"), ("c", "b"), ("d", "c"), ("x", "a")):
        service.add(sandbox_id, parent_id)
    await service.delete("c")
    await service.delete("b", descendants=True)
    assert [sandbox.id for sandbox in service.registry.sandboxes()] == ["a", "x"]


def test_who_becomes_its_child_has_the_childs_children(service: Service) -> None:
    for sandbox_id, parent_id in (("a", None), ("b", "a"), ("c", "b"), ("d", "c"), ("e", "b")):
        service.add(sandbox_id, parent_id)
    service.registry.remove("c")
    service.registry.adopt("b", "a")
    service.registry.remove("b")
    assert service.registry.lineage.children("a") == ["e"]
    assert [member.parent_id for member in service.forks.tree("d")] == [None, "a", "a"]
    assert service.get("e").parent_id == "a"


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=60))
def test_nothing_is_kept_of_those_without_descendants(steps: list[tuple[int, bool]]) -> None:
    lineage, alive = Lineage(), list[str]()
    for number, (choice, forks) in enumerate(steps):
        chosen = alive[choice % len(alive)] if alive else None
        if forks or chosen is None:
            lineage.add(f"{number}", chosen)
            alive.append(f"{number}")
        else:
            alive.remove(chosen)
            lineage.remove(chosen)
        known = set(lineage._parents)
        assert set(alive) <= known
        assert all(set(lineage.descendants(gone)) & set(alive) for gone in known - set(alive))
        assert all(member in lineage.family(member) for member in alive)
    for sandbox_id in alive:
        lineage.remove(sandbox_id)
    assert not lineage._parents and not lineage._children and not lineage._gone
