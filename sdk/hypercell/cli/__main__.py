"""`python -m hypercell.cli`."""

from __future__ import annotations

import sys

from hypercell.cli import main

if __name__ == "__main__":
    sys.exit(main())
