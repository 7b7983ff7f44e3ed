"""The guest's archive: readable by cpio, complete, and the same bytes each time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vm_runtime.guest.archive import CODE_DIRECTORY, START, guest_archive, guest_digest


def test_cpio_unpacks_it_and_the_code_imports(tmp_path: Path) -> None:
    subprocess.run(["cpio", "-id", "--quiet"], input=guest_archive(), cwd=tmp_path, check=True)
    assert (tmp_path / "hypercell/start").read_text() == START
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'hypercell/python')!r})\n"
    code += "import vm_runtime.guest.agent, vm_runtime.guest.init; assert 'ipykernel' not in sys.modules"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, cwd=tmp_path)


def test_it_is_the_same_each_time() -> None:
    first = guest_archive(), guest_digest()
    guest_archive.cache_clear()
    guest_digest.cache_clear()
    assert (guest_archive(), guest_digest()) == first
    assert CODE_DIRECTORY in START
