"""What many clones of one capture map, so that each of them has privately only what it writes itself.

Long runs of pages are mapped from where they lie already, in the layers and in the capture. The many short ones are
laid out once more, together with what surrounds them, in regions that are long enough to be mapped. Blocking; knows no
VMM.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from vm_runtime.snapshots.layers import CapturedPages, MemoryImage, Segment, overlay
from vm_runtime.snapshots.memory import PAGE_SIZE
from vm_runtime.snapshots.pages import PageBuffer, Run, count_pages, union
from vm_runtime.snapshots.sharing import Piece, SharedPages

# What surrounds a single page is copied once for all clones, and mapped by them: 32 KiB, so that some hundred regions
# hold what lies in some thousand runs.
_REGION_PAGES = 8


@contextlib.contextmanager
def open_family(parent: MemoryImage, captured: CapturedPages) -> Iterator[SharedPages]:
    """All in which a capture differs from its base. Costs a copy of the short runs and of what surrounds them."""
    layer_count = len(parent.layers)
    region_source = layer_count + len(captured.parts)
    upper = [segment._replace(source=segment.source + layer_count) for segment in captured.segments()]
    seen = overlay(parent.segments, upper)
    files = parent.files() | {number + layer_count: fd for number, fd in captured.files().items()}

    def is_long(segment: Segment) -> bool:
        # Without a file: zeros, and a capture that was too small to be copied ahead.
        return segment.pages >= _REGION_PAGES and segment.source in files

    runs = _regions_around((s for s in seen if not is_long(s)), parent.size_bytes // PAGE_SIZE)
    regions = _lay_out(runs, parent, captured)
    with parent.opened_pieces() as parent_pieces:
        addresses = {piece.source: piece.address - piece.position * PAGE_SIZE for piece in parent_pieces}
        for source, (_, buffer) in enumerate((*captured.parts, (None, regions)), start=layer_count):
            addresses[source] = buffer.address
        if (regions_file := regions.seal()) is not None:
            files[region_source] = regions_file
        pieces = [
            Piece(s.first, s.pages, addresses[s.source] + s.position * PAGE_SIZE, s.source, s.position)
            for s in overlay([s for s in seen if is_long(s)], _packed(runs, region_source))
        ]
        yield SharedPages(pieces=pieces, files=files)


def _regions_around(segments: Iterable[Segment], page_count: int) -> list[Run]:
    """Whole regions that hold all of these pages, joined where they are neighbours."""
    regions: list[Run] = []
    for segment in segments:
        first = segment.first - segment.first % _REGION_PAGES
        end = segment.first + segment.pages
        end = min(end + -end % _REGION_PAGES, page_count)
        regions.append((first, end - first))
    return union(regions)


def _packed(runs: Iterable[Run], source: int) -> list[Segment]:
    """Runs that lie one behind the other in a file."""
    position = 0
    segments: list[Segment] = []
    for first, pages in runs:
        segments.append(Segment(first, pages, source, position))
        position += pages
    return segments


def _lay_out(runs: Sequence[Run], parent: MemoryImage, captured: CapturedPages) -> PageBuffer:
    """The content of these runs, one behind the other."""
    regions = PageBuffer(count_pages(runs), shared=True)
    memory = memoryview(regions.memory)
    wanted = _packed(runs, 0)
    for segment in wanted:
        at = segment.position * PAGE_SIZE
        memory[at : at + segment.pages * PAGE_SIZE] = parent.read(segment.first, segment.pages)
    index = 0
    for upper in captured.segments():
        content = captured.content(upper)
        end = upper.first + upper.pages
        while index < len(wanted) and wanted[index].first + wanted[index].pages <= upper.first:
            index += 1
        at_run = index
        while at_run < len(wanted) and wanted[at_run].first < end:
            run = wanted[at_run]
            start, stop = max(run.first, upper.first), min(run.first + run.pages, end)
            target = (run.position + start - run.first) * PAGE_SIZE
            memory[target : target + (stop - start) * PAGE_SIZE] = content[
                (start - upper.first) * PAGE_SIZE : (stop - upper.first) * PAGE_SIZE
            ]
            at_run += 1
    return regions
