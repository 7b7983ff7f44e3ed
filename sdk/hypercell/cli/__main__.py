"""`python -m hypercell.cli`."""

from __future__ import annotations

import sys

from hypercell.cli import main

sys.exit(main())
