"""fork, exit and wait: what fork(2), _exit(2) and wait(2) are for processes, for whole machines."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from vm_runtime.guest.sandbox import identity, notebook, values
from vm_runtime.guest.sandbox.children import Child, Children
from vm_runtime.guest.sandbox.errors import ChildTimeoutError, ForkError, HostError, InterruptedCallError, SandboxError
from vm_runtime.guest.sandbox.host import ask

# A child that has handed in its result is stopped by the host within moments, and must do no more: a loop that forks
# and catches everything would go on forking. If nobody stops it, its cell ends after this.
EXIT_LIMIT_S = 5.0

# An exception's own message, in the first line that the parent sees.
EVALUE_CHARACTERS_MAX = 2000

# The children that this process has made and `wait` has not returned yet.
_waiting_for: list[Child] = []


def fork(n: int = 1, *, name: str | None = None, same_random: bool = False) -> Child | Children | None:
    """Make n children of this sandbox, as it is now, in the middle of this line. Returns twice, like fork(2).

    In the parent: the child's handle, for n > 1 a list of them. In each child: None, and `sandbox.index` tells which it
    is. A child has all state (variables, threads, open files, the disk); what is written from now on is not shared.
    If the rest of the cell fails in a child, the child ends, and `result()` raises that error in the parent.

    name: for people. same_random: the generators of `random` and `numpy.random` continue equally everywhere.
    Raises ForkError if no child could be made; where some could, the others' handles have an `error`.
    """
    return split(n, name=name, same_random=same_random, ends_with_cell_failure=True)


def split(n: int, *, name: str | None, same_random: bool, ends_with_cell_failure: bool) -> Child | Children | None:
    """`fork`, where a child need not end when its cell fails."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"fork makes one child or more, not {n!r}.")
    notebook.flush()
    try:
        result = ask("fork", n=n, name=name, same_random=same_random).result
    except InterruptedCallError:
        raise
    except HostError as error:
        raise ForkError(error.code, str(error)) from None
    if "child" in result:
        _waiting_for.clear()
        notebook.become_child()
        if ends_with_cell_failure:
            notebook.at_failure(_fail)
        return None
    return _children(result, n, name)


def _children(result: Mapping[str, Any], n: int, name: str | None) -> Child | Children:
    children = Children(
        Child.from_json(entry, index=index, name=name) for index, entry in enumerate(result["children"])
    )
    made = [child for child in children if child.error is None]
    if not made:
        raise children[0].error if children and children[0].error else ForkError("failed", "No child was made.")
    _waiting_for.extend(made)
    return children[0] if n == 1 else children


def exit(value: object = None) -> NoReturn:
    """End this child with a result, which `child.result()` returns in the parent. Its machine ends at once.

    Nothing after this line runs, not even `finally`, as with os._exit. Raises ValueRefusedError for a value that cannot
    cross (see `values`), SandboxError where this is no child.
    """
    if identity.read().parent_id is None:
        raise SandboxError("sandbox.exit ends a child with a result, but this sandbox is nobody's child.")
    end("ok", value)
    notebook.end_cell()


def end(status: str, value: object) -> None:
    """Have the host end this child. value: for status "error" a dict with ename, evalue and traceback."""
    data = values.encode(value)
    notebook.flush()
    ask("exit", value=data, status=status)
    threading.Event().wait(EXIT_LIMIT_S)


def wait(children: Iterable[Child] | None = None, timeout: float | None = None) -> Child:
    """Wait until one of the children has ended, and return it. Without children: of all that were not returned yet.

    timeout: in seconds. Raises ChildTimeoutError, and SandboxError if there is no child to wait for.
    """
    candidates = list(_waiting_for) if children is None else list(children)
    for child in candidates:
        if child.error is not None:
            return child
    if not candidates:
        raise SandboxError("There is no child to wait for.")
    result = ask("wait", ids=[child.id for child in candidates], timeout_s=timeout).result
    for child in candidates:
        if child.id == result.get("id"):
            if child in _waiting_for:
                _waiting_for.remove(child)
            return child
    raise ChildTimeoutError(f"None of {len(candidates)} children has ended within {timeout} s.")


def offer(status: str, value: object) -> bool:
    """Hand in a result, and stay as the parent's possible future. True: this state is the parent's now.

    What follows a True runs in the parent's cell.
    """
    result = ask("offer", value=values.encode(value), status=status).result
    if not result.get("became"):
        return False
    notebook.become_parent()
    return True


def _fail(error: BaseException, text: str) -> None:
    if isinstance(error, SystemExit) and error.code in (None, 0):
        end("ok", None)
    else:
        end("error", failure(type(error).__name__, str(error), text))


def failure(ename: str, evalue: str, text: str) -> dict[str, str]:
    """What `Child.result` makes a ChildFailedError of."""
    return {"ename": ename, "evalue": evalue[:EVALUE_CHARACTERS_MAX], "traceback": text}
