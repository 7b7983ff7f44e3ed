"""What the snapshot store refuses or cannot do, as clients see it."""

from __future__ import annotations

import pytest

from gateway.errors import api_error
from kernels.errors import KernelsError
from kernels.snapshots import store_errors
from vm_runtime.snapshots.errors import (
    BrokenSnapshotError,
    SnapshotError,
    SnapshotInUseError,
    StoreFullError,
    StoreIndexError,
    UnknownSnapshotError,
)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UnknownSnapshotError("f" * 32), 404, "snapshot_not_found"),
        (SnapshotInUseError("f" * 32, users=["sandbox 1"]), 409, "snapshot_in_use"),
        (BrokenSnapshotError("The pin x cannot be read."), 500, "storage_failed"),
        (StoreFullError("No room left."), 500, "storage_failed"),
        (StoreIndexError("The index cannot be used."), 500, "storage_failed"),
    ],
)
def test_errors_of_the_store_have_a_status_and_say_what_is_wrong(error: SnapshotError, status: int, code: str) -> None:
    with pytest.raises(KernelsError) as raised, store_errors():
        raise error
    answer = api_error(raised.value)
    assert (answer.status, answer.code, answer.message) == (status, code, str(error))
