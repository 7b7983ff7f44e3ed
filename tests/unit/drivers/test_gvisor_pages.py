"""Pages of gVisor's states: each kept once, and given back in their order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vm_runtime.drivers.gvisor import pages
from vm_runtime.drivers.gvisor.pages import MAX_FILES, NOTHING, PAGE, KnownPages, joined, known_pages, split
from vm_runtime.snapshots.errors import BrokenSnapshotError

# The contents of pages, by number; 0 is a page of zeros.
Contents = list[int]


def memory(contents: Sequence[int]) -> int:
    fd = os.memfd_create("pages")
    os.write(fd, b"".join(bytes([number % 256, number // 256, *bytes(6)]) * (PAGE // 8) for number in contents))
    return fd


class Chain:
    """States that lie over each other, as the driver keeps them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: list[Path] = []
        self.index: Path | None = None
        self.count = 0

    def known(self) -> KnownPages:
        return NOTHING if self.index is None else known_pages(self.index, files=len(self.files))

    def add(self, contents: Sequence[int]) -> int:
        """Answers how many pages were written."""
        self.count += 1
        index, new = self.directory / f"index-{self.count}", self.directory / f"new-{self.count}"
        fd = memory(contents)
        try:
            found = split(fd, self.known(), index=index, new=new)
        finally:
            os.close(fd)
        self.files = [self.files[number] for number in found.used] + ([new] if found.new_pages else [])
        self.index = index
        assert not found.new_pages or new.stat().st_size == found.new_pages * PAGE
        return found.new_pages

    def content(self) -> bytes:
        assert self.index is not None
        fd = joined(self.index, self.files)
        if fd is None:
            return self.files[0].read_bytes()
        try:
            return os.pread(fd, os.fstat(fd).st_size, 0)
        finally:
            os.close(fd)


@given(st.lists(st.lists(st.integers(0, 20), max_size=40), min_size=1, max_size=6))
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_lies_over_whatever_comes_back(
    tmp_path_factory: pytest.TempPathFactory, states: list[Contents]
) -> None:
    chain = Chain(tmp_path_factory.mktemp("chain"))
    for contents in states:
        chain.add(contents)
        fd = memory(contents)
        assert chain.content() == os.pread(fd, len(contents) * PAGE, 0)
        os.close(fd)


def test_only_what_is_new_is_written_also_when_it_has_moved(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    assert chain.add([1, 2, 3, 0, 4, 5]) == 6
    assert chain.add([9, 5, 4, 0, 0, 3, 2, 1]) == 1
    assert len(chain.files) == 2
    assert chain.add([1, 2, 3, 4, 5]) == 0
    assert len(chain.files) == 1


def test_a_state_that_lies_on_nothing_is_used_as_it_is(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    chain.add([1, 2, 2, 3, 0])
    assert chain.index is not None
    assert joined(chain.index, chain.files) is None


def test_what_is_mostly_new_lies_on_nothing(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    chain.add([1, 2, 3, 4])
    chain.add([1, 12, 13, 14])
    assert len(chain.files) == 1


def test_there_are_never_more_files_than_allowed(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    contents = list(range(1, 101))
    chain.add(contents)
    for number in range(2 * MAX_FILES):
        contents[number] = 1000 + number
        chain.add(contents)
        assert len(chain.files) <= MAX_FILES
    assert len(chain.content()) == 100 * PAGE


@pytest.mark.parametrize(
    "entry", [(b"", 3, 0), (b"", 0, 1), (b"", 0, pages.NO_FILE - 1)], ids=["no page", "no file", "no number"]
)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, entry: tuple[bytes, int, int]) -> None:
    chain = Chain(tmp_path)
    chain.add([1, 2, 3])
    assert chain.index is not None
    chain.index.write_bytes(pages._ENTRY.pack(*entry))
    with pytest.raises(BrokenSnapshotError, match="not there"):
        chain.content()
    chain.index.write_bytes(b"short")
    with pytest.raises(BrokenSnapshotError, match="no index"):
        chain.content()
