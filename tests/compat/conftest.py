"""Frozen agents, unpacked, and services of now whose machines run them."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from tests.gateways import ROOT
from tests.unit.kernels.conftest import TestDriver, driver, kernels, prepared, state_dir

# What the suites of tests/unit/kernels need; here their machines have an old agent.
__all__ = ["driver", "kernels", "state_dir"]

AGENTS = Path(__file__).parent / "agents"
# By generation: the archive's SHA-256.
DIGESTS = {1: "9c9f3d98bb162b65527c3559a5d27a7a7d93dce22faba5bdb9e773366f3ddbe7"}


def archive_of(generation: int) -> bytes:
    """The guest code of a generation, as it is appended to an initramfs."""
    data = (AGENTS / f"{generation}.cpio.zst").read_bytes()
    archive = zstandard.ZstdDecompressor().decompress(data, max_output_size=1 << 24)
    assert hashlib.sha256(archive).hexdigest() == DIGESTS[generation]
    return archive


@pytest.fixture(scope="package")
def first_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of generation 1's `vm_runtime`."""
    directory = tmp_path_factory.mktemp("agent")
    subprocess.run(["cpio", "-idm", "--quiet"], input=archive_of(1), cwd=directory, check=True)
    return directory / "hypercell" / "python"


@pytest.fixture(scope="package", autouse=True)
def first_agent(first_code: Path) -> Iterator[None]:
    """Fake machines have an agent of generation 1."""
    path = [str(first_code), str(ROOT)]
    with pytest.MonkeyPatch.context() as patch:
        program = f"import sys; sys.path[:0] = {path!r}; from tests.compat.guest import main; main()"
        patch.setattr(TestDriver, "program", program)
        yield


@pytest.fixture(scope="package")
def prepared_dir(first_agent: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As in tests/unit/kernels."""
    return prepared(tmp_path_factory.mktemp("prepared"))
