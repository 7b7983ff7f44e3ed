"""What the output of pip and mmdebstrap means to people (texts as these programs print them)."""

from __future__ import annotations

import pytest

from vm_runtime.images.errors import BuildFailedError, BuildHostError, NetworkError, RecipeError, UnknownPackageError
from vm_runtime.images.rootfs import debian_failure, pip_failure

PIP_OFFLINE = """WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('<...>: Failed to \
establish a new connection: [Errno -3] Temporary failure in name resolution')': /simple/nothing/
ERROR: Could not find a version that satisfies the requirement nothing==1 (from versions: none)
ERROR: No matching distribution found for nothing==1"""
PIP_UNKNOWN = """ERROR: Could not find a version that satisfies the requirement nothing==1 (from versions: none)
ERROR: No matching distribution found for nothing==1"""
APT_UNKNOWN = "Reading package lists...\nE: Unable to locate package nothing\nE: apt-get failed"
APT_OFFLINE = "W: Failed to fetch http://x/InRelease  Temporary failure resolving 'x'\nE: apt-get update failed"
WARMUP = "Traceback\nModuleNotFoundError: No module named 'x'\nhypercell-warmup-failed\nE: setup failed"


@pytest.mark.parametrize(
    ("error", "kind", "part"),
    [
        (pip_failure("r.toml", PIP_OFFLINE), NetworkError, "no network"),
        (pip_failure("r.toml", PIP_UNKNOWN), UnknownPackageError, "there is no nothing==1 for Python 3.11"),
        (pip_failure("r.toml", "OSError: [Errno 28] No space left on device"), BuildHostError, "disk is full"),
        (debian_failure("r.toml", APT_UNKNOWN), UnknownPackageError, "Debian bookworm has no nothing"),
        (debian_failure("r.toml", APT_OFFLINE), NetworkError, "no network"),
        (debian_failure("r.toml", WARMUP), RecipeError, "(ModuleNotFoundError: No module named 'x')"),
        (debian_failure("r.toml", "E: something else"), BuildFailedError, "E: something else"),
    ],
)
def test_failures_are_told_apart(error: Exception, kind: type[Exception], part: str) -> None:
    assert type(error) is kind
    assert part in str(error)
