"""Reinforcement learning in small: rollouts from one state of an environment, to see which first action is best.

The environment (a walk on a grid with traps) is in the sandbox, in the middle of an episode. Each rollout is a fork of
it: no episode is played again from its start, and each fork draws its own random numbers.

    python examples/rollouts.py
"""

from __future__ import annotations

from collections import defaultdict

from hypercell import Sandbox
from hypercell.search import rollouts

ENVIRONMENT = """
import random

class Grid:
    size, goal, traps = 5, (4, 4), {(1, 2), (2, 3), (3, 1)}
    moves = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}

    def __init__(self):
        self.place, self.steps = (0, 0), 0

    def step(self, action):
        dx, dy = self.moves[action]
        x, y = self.place
        self.place = (min(max(x + dx, 0), self.size - 1), min(max(y + dy, 0), self.size - 1))
        self.steps += 1
        if self.place == self.goal:
            return 10.0, True
        return (-5.0, True) if self.place in self.traps else (-0.1, self.steps > 60)

def play(grid, first):
    "The reward of an episode that begins with this action and goes on at random."
    total, (reward, done) = 0.0, grid.step(first)
    while True:
        total += reward
        if done:
            return total
        reward, done = grid.step(random.choice(list(grid.moves)))

grid = Grid()
for action in ("right", "right", "right", "right", "down", "down", "down"):
    grid.step(action)
"""

ACTIONS = ("up", "down", "left", "right")
EACH = 2


def main() -> None:
    with Sandbox.create() as sandbox:
        sandbox.run_code(ENVIRONMENT).raise_for_error()
        returns: dict[str, list[float]] = defaultdict(list)
        task = f"_first = {ACTIONS!r}[rollout_index % {len(ACTIONS)}]\nplay(grid, _first)"
        for rollout in rollouts(sandbox, task, EACH * len(ACTIONS)):
            if rollout.error is None:
                returns[ACTIONS[rollout.index % len(ACTIONS)]].append(float(rollout.value))
        means = {action: sum(values) / len(values) for action, values in returns.items()}
        for action, mean in sorted(means.items(), key=lambda pair: -pair[1]):
            print(f"{action:6} {mean:6.2f}  from {len(returns[action])} rollouts")
        print("still at", sandbox.run_code("grid.place").text, "- the rollouts happened elsewhere")


if __name__ == "__main__":
    main()
