"""What the host of now does with sandboxes, done with machines whose agent is of generation 1."""

from __future__ import annotations

from tests.unit.kernels.test_checkpoints import *  # noqa: F403
from tests.unit.kernels.test_forks import *  # noqa: F403
from tests.unit.kernels.test_lifecycle import *  # noqa: F403
from tests.unit.kernels.test_recovery import *  # noqa: F403
