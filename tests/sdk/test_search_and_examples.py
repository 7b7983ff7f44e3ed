"""Search trees, rollouts and the programs in examples/, on real forks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from hypercell import AsyncSandbox, CodeError, HypercellError, NotFoundError, Sandbox
from hypercell.aio import search as aio_search
from hypercell.search import Budget, beam_search, best_first_search, rollouts, take
from tests.gateways import RunningGateway

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


def ids() -> set[str]:
    return {info.id for info in Sandbox.list()}


def test_beam_search_finds_the_best_and_leaves_nothing_else(sandbox: Sandbox) -> None:
    before = ids()
    sandbox.run_code("n = 1")
    result = beam_search(
        sandbox,
        expand=lambda steps: ["n += 1", "n *= 3", "1 / 0"],
        score="float(n)",
        width=1,
        budget=Budget(depth=2),
    )
    assert (result.best.steps, result.best.score) == (("n *= 3", "n *= 3"), 9.0)
    assert len(result.explored) == 5
    assert {steps[-1] for steps, _ in result.failures} == {"1 / 0"}
    with take(result) as best:
        assert best.run_code("n").text == "9"
        assert ids() - before == {best.id}
    assert sandbox.run_code("n").text == "1"
    assert not ids() - before


def test_best_first_search_ends_by_its_budget(sandbox: Sandbox) -> None:
    before = ids()
    sandbox.run_code("n = 1")
    result = best_first_search(
        sandbox, expand=lambda steps: ["n += 1", "n -= 1"], score="float(n)", frontier=1, budget=Budget(score=3.0)
    )
    assert result.best.steps == ("n += 1", "n += 1")
    take(result).kill()
    assert not ids() - before


def test_a_search_that_fails_leaves_nothing(sandbox: Sandbox) -> None:
    before = ids()
    with pytest.raises(CodeError):
        beam_search(sandbox, expand=lambda steps: ["1"], score="1 / 0")
    with pytest.raises(HypercellError, match="must end with a number"):
        beam_search(sandbox, expand=lambda steps: ["1"], score="'many'")
    assert not ids() - before


def test_a_state_without_a_score_is_a_failure(sandbox: Sandbox) -> None:
    before = ids()
    result = beam_search(
        sandbox,
        expand=lambda steps: ["mark = 1", "mark = float('nan')", "mark = 'none'"],
        score="globals().get('mark', 0)",
        budget=Budget(depth=1),
    )
    assert result.best.score == 1.0
    assert {steps[-1] for steps, _ in result.failures} == {"mark = float('nan')", "mark = 'none'"}
    assert any("NaN" in words for _, words in result.failures)
    take(result).kill()
    assert not ids() - before


def test_a_sandbox_that_cannot_be_forked_ends_the_search_and_its_siblings(sandbox: Sandbox) -> None:
    gateway = sandbox._async._transport.gateway
    headers = {"Authorization": f"token {gateway.token}"}
    before = ids()
    gone: list[str] = []

    def expand(steps: tuple[str, ...]) -> list[str]:
        if steps and not gone:
            with httpx.Client(base_url=gateway.url, headers=headers, trust_env=False) as client:
                mine = [one["id"] for one in client.get("/api/sandboxes").json() if one["id"] not in before]
                gone.append(mine[-1])
                client.delete(f"/api/sandboxes/{gone[0]}")
        return ["n += 1", "n += 2"]

    sandbox.run_code("n = 1")
    with pytest.raises(NotFoundError):
        beam_search(sandbox, expand=expand, score="n", width=2)
    assert gone and not ids() - before


def test_a_rollout_s_exception_is_its_own(sandbox: Sandbox) -> None:
    def play(child: Sandbox, index: int) -> float:
        child.files.write("from.txt", (b"x" for _ in range(10)))
        return 1 / index

    errors = {rollout.index: rollout.error for rollout in rollouts(sandbox, play, 3)}
    assert isinstance(errors[0], ZeroDivisionError)
    assert (errors[1], errors[2]) == (None, None)


def test_an_iterator_left_unfinished_does_not_hold_the_program(sandbox: Sandbox) -> None:
    program = f"""
from hypercell import Sandbox
sandbox = Sandbox.connect({sandbox.id!r})
sandbox.files.write("long", bytes(8 * 2**20))
pieces = sandbox.files.stream("long")
next(pieces)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


def test_rollouts_of_code_and_of_functions(sandbox: Sandbox) -> None:
    before = ids()
    sandbox.run_code("base = 10")
    results = {rollout.index: rollout for rollout in rollouts(sandbox, "base // rollout_index", 3)}
    assert (results[1].value, results[2].value) == ("10", "5")
    assert isinstance(results[0].error, CodeError)

    def play(child: Sandbox, index: int) -> int:
        return int(child.run_code(f"base + {index}").text or 0)

    assert {rollout.value for rollout in rollouts(sandbox, play, 2)} == {10, 11}
    assert not ids() - before


async def test_rollouts_that_are_given_up_leave_nothing(at_gateway: RunningGateway, sandbox: Sandbox) -> None:
    before = {info.id for info in await AsyncSandbox.list()}
    async with await AsyncSandbox.connect(sandbox.id) as same:
        results = aio_search.rollouts(same, "rollout_index", 3)
        first = await anext(results)
        assert first.error is None
        await results.aclose()
    assert not {info.id for info in await AsyncSandbox.list()} - before


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_run(example: Path, at_gateway: RunningGateway) -> None:
    before = ids()
    result = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout
    assert not ids() - before
