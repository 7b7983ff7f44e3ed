"""A hyper-parameter sweep from one loaded data set: the data is loaded and prepared once, then forked for each value.

python examples/parameter_sweep.py
"""

from __future__ import annotations

import asyncio

from hypercell import AsyncSandbox

LOAD = """
import numpy as np
rng = np.random.default_rng(7)
x = rng.uniform(-1, 1, 400)
y = np.sin(4 * x) + rng.normal(0, 0.3, x.size)
powers = np.vander(x, 16)
train, test = slice(0, 200), slice(200, None)
"""

TRAIN = """
gram = powers[train].T @ powers[train] + {ridge} * np.eye(powers.shape[1])
weights = np.linalg.solve(gram, powers[train].T @ y[train])
float(np.sqrt(np.mean((powers[test] @ weights - y[test]) ** 2)))
"""

RIDGES = (1e-6, 1e-3, 1e-1, 10.0)


async def measure(child: AsyncSandbox, ridge: float) -> float:
    """The error with this parameter; the child is gone afterwards."""
    async with child:
        execution = await child.run_code(TRAIN.format(ridge=ridge))
        return float(execution.raise_for_error().text or "nan")


async def main() -> None:
    async with await AsyncSandbox.create() as sandbox:
        (await sandbox.run_code(LOAD)).raise_for_error()
        children = await sandbox.fork(len(RIDGES))
        errors = await asyncio.gather(*(measure(*pair) for pair in zip(children, RIDGES, strict=True)))
        for ridge, error in zip(RIDGES, errors, strict=True):
            print(f"ridge {ridge:<8g} error {error:.4f}")
        best = RIDGES[errors.index(min(errors))]
        print(f"best: {best:g}")
        await sandbox.run_code(TRAIN.format(ridge=best))
        shape = await sandbox.run_code("weights.shape")
        print("weights", shape.text, "are in the sandbox that loaded the data")


if __name__ == "__main__":
    asyncio.run(main())
