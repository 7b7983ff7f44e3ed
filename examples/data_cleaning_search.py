"""Which cleaning steps, in which order, give the best model? A tree search: every step is tried in a fork of the state
that the steps before it led to, so that nothing is loaded or computed twice.

    python examples/data_cleaning_search.py
"""

from __future__ import annotations

from hypercell import Sandbox
from hypercell.search import Budget, beam_search, take

LOAD = """
import numpy as np, pandas as pd
rng = np.random.default_rng(0)
n = 2000
rooms = rng.integers(1, 8, n).astype(float)
area = rooms * 22 + rng.normal(0, 6, n)
price = area * 3.1 + rooms * 9 + rng.normal(0, 12, n)
frame = pd.DataFrame({"rooms": rooms, "area": area, "price": price})
frame.loc[rng.choice(n, 150, replace=False), "area"] = np.nan          # missing
frame.loc[rng.choice(n, 60, replace=False), "price"] *= 40             # a wrong unit
frame = pd.concat([frame, frame.sample(300, random_state=1)])           # twice
"""

# Minus the error of a straight line, found on one half of the rows and measured on the other; lost rows cost.
SCORE = """
_ = frame.dropna()
_x = np.column_stack([_[["rooms", "area"]].to_numpy(), np.ones(len(_))])
_y, _half = _["price"].to_numpy(), len(_) // 2
_w = np.linalg.lstsq(_x[:_half], _y[:_half], rcond=None)[0]
float(-np.sqrt(np.mean((_x[_half:] @ _w - _y[_half:]) ** 2)) - 0.01 * abs(2000 - len(_)))
"""

STEPS = (
    "frame = frame.drop_duplicates()",
    "frame['area'] = frame['area'].fillna(frame['area'].median())",
    "frame['area'] = frame['area'].fillna(frame['rooms'] * 22)",
    "frame = frame[frame['price'] < frame['price'].quantile(0.95)]",
    "frame['price'] = np.where(frame['price'] > 2500, frame['price'] / 40, frame['price'])",
)


def expand(steps: tuple[str, ...]) -> list[str]:
    """Every step that has not been taken yet."""
    return [step for step in STEPS if step not in steps]


def main() -> None:
    with Sandbox.create() as sandbox:
        sandbox.run_code(LOAD).raise_for_error()
        result = beam_search(sandbox, expand=expand, score=SCORE, width=2, budget=Budget(nodes=12, depth=2))
        print(f"{len(result.explored)} states, the best has the score {result.best.score:.2f}:")
        for step in result.best.steps:
            print("   ", step)
        with take(result) as best:
            print("It goes on from there:", best.run_code("len(frame)").text, "rows")


if __name__ == "__main__":
    main()
