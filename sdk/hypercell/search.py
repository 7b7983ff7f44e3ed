"""Search trees and rollouts for blocking programs; hypercell/aio/search.py has the algorithms."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hypercell.aio import search as aio
from hypercell.aio.sandbox import AsyncSandbox
from hypercell.aio.search import DEFAULT_CONCURRENCY, Budget, Expand, Node, Rollout, SearchResult
from hypercell.blocking.portal import BlockingCall, iterate
from hypercell.blocking.sandbox import Sandbox
from hypercell.timeouts import takes_timeout

__all__ = ["Budget", "Node", "Rollout", "SearchResult", "beam_search", "best_first_search", "rollouts", "take"]


@takes_timeout
def beam_search(
    sandbox: Sandbox,
    *,
    expand: Expand,
    score: str,
    width: int = 3,
    budget: Budget | None = None,
    timeout_s: float | None = None,
    timeout: float | None = None,
    concurrency: int = DEFAULT_CONCURRENCY,
) -> SearchResult:
    """Level by level, going on with the `width` best states of each.

    sandbox: where it starts; it stays as it is. expand: from the steps so far to the next ones to try, each of them
    code. score: code that ends with a number, higher is better. budget: when it ends. timeout_s: for each step; what
    takes longer is dropped, as is what raises. concurrency: children that run at a time. `take(result)` gives the best
    sandbox.
    """
    return BlockingCall().run(
        aio.beam_search(
            sandbox._async,
            expand=expand,
            score=score,
            width=width,
            budget=budget,
            timeout_s=timeout_s,
            concurrency=concurrency,
        )
    )


@takes_timeout
def best_first_search(
    sandbox: Sandbox,
    *,
    expand: Expand,
    score: str,
    frontier: int = 16,
    budget: Budget | None = None,
    timeout_s: float | None = None,
    timeout: float | None = None,
    concurrency: int = DEFAULT_CONCURRENCY,
) -> SearchResult:
    """Always goes on from the best state that has not been expanded yet.

    frontier: so many states are held for later, the worst are dropped. Else as `beam_search`.
    """
    return BlockingCall().run(
        aio.best_first_search(
            sandbox._async,
            expand=expand,
            score=score,
            frontier=frontier,
            budget=budget,
            timeout_s=timeout_s,
            concurrency=concurrency,
        )
    )


def take(result: SearchResult) -> Sandbox:
    """The best state's sandbox, for `with`: it is killed at the end."""
    return Sandbox(result.best.sandbox)


@takes_timeout
def rollouts(
    sandbox: Sandbox,
    task: str | Callable[[Sandbox, int], Any],
    n: int,
    *,
    timeout_s: float | None = None,
    timeout: float | None = None,
    concurrency: int = DEFAULT_CONCURRENCY,
) -> Iterator[Rollout]:
    """n children of one sandbox, each with the same task; their results as they come. Each child is gone afterwards.

    task: code, in which `rollout_index` is the child's number (0 to n - 1), or a function that gets the child and its
    number, called in a thread of its own. timeout_s: for code. What fails is told in its `Rollout`.
    """
    if isinstance(task, str):
        return iterate(aio.rollouts(sandbox._async, task, n, timeout_s=timeout_s, concurrency=concurrency))
    return _in_threads(sandbox, task, n, concurrency=concurrency)


def _in_threads(
    sandbox: Sandbox, function: Callable[[Sandbox, int], Any], n: int, *, concurrency: int
) -> Iterator[Rollout]:
    # Not the loop's own threads (`asyncio.to_thread`): the uploads and downloads for which these functions wait need
    # those, and would never get one.
    threads = ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="hypercell-rollout")

    async def in_thread(child: AsyncSandbox, index: int) -> Any:
        return await asyncio.get_running_loop().run_in_executor(threads, function, Sandbox(child), index)

    try:
        yield from iterate(aio.rollouts(sandbox._async, in_thread, n, concurrency=concurrency))
    finally:
        # Functions that still run when the iteration is given up lose their child, and end by that.
        threads.shutdown(wait=False, cancel_futures=True)
