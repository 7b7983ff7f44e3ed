"""`python benchmarks/endurance.py`: as `python -m benchmarks --only endurance`; further options are passed on."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python looks for modules beside a file that it runs, not in the checkout.
    sys.path[0] = str(Path(__file__).parents[1])
    sys.argv[1:1] = ["--only", "endurance"]
    runpy.run_module("benchmarks", run_name="__main__")
