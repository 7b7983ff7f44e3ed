"""Search trees over sandboxes: a node is a sandbox, its children are forks of it in which different code was run.

Nothing is replayed: a child has all that its parent had computed. A sandbox that was pruned is gone at once.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hypercell.aio.sandbox import AsyncSandbox
from hypercell.errors import ForkError, HypercellError
from hypercell.timeouts import takes_timeout

T = TypeVar("T")

# Children that run code at a time: a host has few processors, and forks wait for each other's memory anyway.
DEFAULT_CONCURRENCY = 8


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When a search ends, whichever comes first. nodes: steps tried. score: one that is good enough."""

    nodes: int = 100
    depth: int = 10
    seconds: float | None = None
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Node:
    """A state of the search. steps: the code that led here from the start, in order. score: higher is better.

    sandbox: it, as long as the search holds it, and afterwards for the best one.
    """

    steps: tuple[str, ...]
    score: float
    sandbox: AsyncSandbox = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """best: the best state; its sandbox is yours, to use and to kill. explored: every state that had a score.
    failures: steps whose code raised an exception or took too long, that have no score, or whose sandbox failed; with
    what was said."""

    best: Node
    explored: tuple[tuple[tuple[str, ...], float], ...]
    failures: tuple[tuple[tuple[str, ...], str], ...]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What one child gave. index: which one. value: what the function returned, or the code's last value as text.
    error: why there is none; also what a function raised."""

    index: int
    value: Any = None
    error: Exception | None = None


# The steps to try from a state: code for each. The steps so far are given.
Expand = Callable[[tuple[str, ...]], Sequence[str]]


async def _together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """As `gather`, but when one raises, the others have been cancelled and have ended before that is passed on: what
    they forked is known to the search then. (A TaskGroup would wrap the error in a group.)"""
    tasks = [asyncio.create_task(one) for one in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


class _Search:
    """What both kinds of search share: trying a step, counting, and forgetting sandboxes."""

    def __init__(self, score: str, *, budget: Budget, timeout_s: float | None, concurrency: int) -> None:
        self._score = score
        self._budget = budget
        self._timeout_s = timeout_s
        self._room = asyncio.Semaphore(concurrency)
        self._deadline = None if budget.seconds is None else asyncio.get_running_loop().time() + budget.seconds
        self._tried = 0
        self._explored: list[tuple[tuple[str, ...], float]] = []
        self._failures: list[tuple[tuple[str, ...], str]] = []
        # Those that must not outlive the search, whatever happens.
        self._alive: set[AsyncSandbox] = set()

    async def start(self, sandbox: AsyncSandbox) -> Node:
        """The root: a fork of the user's sandbox, which stays as it is."""
        (child,) = await self._fork(sandbox, 1)
        score = await self._measure(child)
        self._explored.append(((), score))
        return Node(steps=(), score=score, sandbox=child)

    async def expand(self, node: Node, steps: Sequence[str]) -> list[Node]:
        """A child for each step that ran without an exception and has a score."""
        room = self._budget.nodes - self._tried
        wanted = list(steps)[: max(room, 0)]
        self._tried += len(wanted)
        if not wanted:
            return []
        children = await self._fork(node.sandbox, len(wanted))
        for step in wanted[len(children) :]:
            self._failures.append(((*node.steps, step), "the child could not be made"))
        reached = await _together(self._try(node, step, child) for step, child in zip(wanted, children, strict=False))
        return [child for child in reached if child is not None]

    async def _try(self, node: Node, step: str, child: AsyncSandbox) -> Node | None:
        steps = (*node.steps, step)
        async with self._room:
            try:
                (await child.run_code(step, timeout_s=self._timeout_s)).raise_for_error()
                score = await self._measure(child)
            except HypercellError as error:
                # Its code's doing, or its machine's: either way the others can go on.
                self._failures.append((steps, str(error)))
                await self.drop(child)
                return None
        self._explored.append((steps, score))
        return Node(steps=steps, score=score, sandbox=child)

    async def _fork(self, sandbox: AsyncSandbox, n: int) -> list[AsyncSandbox]:
        """n children, or those that could be made. Raises ForkError if there are none."""
        try:
            children = await sandbox.fork(n)
        except ForkError as error:
            children = error.children
            if not children:
                raise
        self._alive.update(children)
        return children

    async def _measure(self, sandbox: AsyncSandbox) -> float:
        execution = (await sandbox.run_code(self._score, timeout_s=self._timeout_s)).raise_for_error()
        try:
            score = float(str(execution.text))
        except ValueError as error:
            raise HypercellError(
                f"The score's code must end with a number; it ended with {execution.text!r}. "
                "Turn numpy's numbers into `float(...)`."
            ) from error
        if math.isnan(score):
            raise HypercellError("The score is NaN, which is neither better nor worse than another.")
        return score

    def is_over(self, best: Node) -> bool:
        budget = self._budget
        return (
            self._tried >= budget.nodes
            or (budget.score is not None and best.score >= budget.score)
            or (self._deadline is not None and asyncio.get_running_loop().time() > self._deadline)
        )

    async def drop(self, sandbox: AsyncSandbox) -> None:
        # Discarded when it is done: cancelled in between, it is left to `finish`.
        with suppress(HypercellError):
            await sandbox.kill()
        self._alive.discard(sandbox)

    async def finish(self, *, keep: Node | None) -> None:
        """Ends every sandbox but that of `keep`."""
        if keep is not None:
            self._alive.discard(keep.sandbox)
        await asyncio.gather(*(self.drop(sandbox) for sandbox in list(self._alive)))

    def result(self, best: Node) -> SearchResult:
        return SearchResult(best=best, explored=tuple(self._explored), failures=tuple(self._failures))


@takes_timeout
async def beam_search(
    sandbox: AsyncSandbox,
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
    code. score: code that ends with a number, higher is better. timeout_s: for each step; what takes longer is dropped,
    as is what raises. Raises CodeError if the score cannot be computed at the start.
    """
    budget = budget or Budget()
    search = _Search(score, budget=budget, timeout_s=timeout_s, concurrency=concurrency)
    best: Node | None = None
    try:
        best = await search.start(sandbox)
        level = [best]
        for _ in range(budget.depth):
            children: list[Node] = []
            wanted = [(node, expand(node.steps)) for node in level]
            for found in await _together(search.expand(node, steps) for node, steps in wanted):
                children.extend(found)
            ranked = sorted(children, key=lambda node: -node.score)
            if ranked and ranked[0].score > best.score:
                best = ranked[0]
            kept = ranked[:width]
            holding = {id(node) for node in (*kept, best)}
            await asyncio.gather(
                *(search.drop(node.sandbox) for node in (*level, *children) if id(node) not in holding)
            )
            level = kept
            if not level or search.is_over(best):
                break
    except BaseException:
        await search.finish(keep=None)
        raise
    await search.finish(keep=best)
    return search.result(best)


@takes_timeout
async def best_first_search(
    sandbox: AsyncSandbox,
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
    budget = budget or Budget()
    search = _Search(score, budget=budget, timeout_s=timeout_s, concurrency=concurrency)
    try:
        best = await search.start(sandbox)
        order = itertools.count()
        queue = [(-best.score, next(order), best)]
        while queue and not search.is_over(best):
            _, _, node = heapq.heappop(queue)
            if len(node.steps) >= budget.depth:
                continue
            for child in await search.expand(node, expand(node.steps)):
                heapq.heappush(queue, (-child.score, next(order), child))
                if child.score > best.score:
                    best = child
            dropped = [] if node is best else [node]
            queue.sort()
            dropped.extend(entry[2] for entry in queue[frontier:] if entry[2] is not best)
            del queue[frontier:]
            await asyncio.gather(*(search.drop(one.sandbox) for one in dropped))
    except BaseException:
        await search.finish(keep=None)
        raise
    await search.finish(keep=best)
    return search.result(best)


@takes_timeout
async def rollouts(
    sandbox: AsyncSandbox,
    task: str | Callable[[AsyncSandbox, int], Awaitable[Any]],
    n: int,
    *,
    timeout_s: float | None = None,
    timeout: float | None = None,
    concurrency: int = DEFAULT_CONCURRENCY,
) -> AsyncGenerator[Rollout, None]:
    """n children of one sandbox, each with the same task; their results as they come. Each child is gone afterwards.

    task: code, in which `rollout_index` is the child's number (0 to n - 1), or a function that gets the child and its
    number. timeout_s: for code. What fails is told in its `Rollout` and harms no other.
    """
    room = asyncio.Semaphore(concurrency)

    async def one(index: int) -> Rollout:
        async with room:
            try:
                (child,) = await sandbox.fork(1)
            except HypercellError as error:
                return Rollout(index=index, error=error)
            try:
                if isinstance(task, str):
                    code = f"rollout_index = {index}\n{task}"
                    execution = await child.run_code(code, timeout_s=timeout_s)
                    return Rollout(index=index, value=execution.raise_for_error().text)
                return Rollout(index=index, value=await task(child, index))
            except Exception as error:
                return Rollout(index=index, error=error)
            finally:
                with suppress(HypercellError):
                    await child.kill()

    tasks = [asyncio.create_task(one(index)) for index in range(n)]
    try:
        for coming in asyncio.as_completed(tasks):
            yield await coming
    finally:
        for running in tasks:
            running.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
