"""Which variables of an environment Python or a library reads once, and how a process that runs already adopts them.

Standard library only. Used by the agent, which decides whether a kernel can adopt them, and by the kernel, which does.
"""

from __future__ import annotations

import contextlib
import locale
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

# Read by the interpreter, by ld.so, malloc, BLAS and OpenMP, or by IPython, before a kernel runs any code: no process
# that has started can adopt them. man python3; ld.so(8); mallopt(3).
_READ_AT_START = re.compile(
    r"PYTHON\w+|LD_\w+|GLIBC_TUNABLES|MALLOC_\w+|(OPENBLAS|OMP|GOMP|MKL|KMP)_\w+|HOME|IPYTHONDIR|MPLCONFIGDIR"
)

# Of these, what has no effect in a kernel at all: its standard streams are ipykernel's. The last two are read at use.
_READ_LATER = frozenset(
    {
        "PYTHONUNBUFFERED",
        "PYTHONIOENCODING",
        "PYTHONINSPECT",
        "PYTHONNODEBUGRANGES",
        "PYTHONBREAKPOINT",
        "PYTHON_COLORS",
    }
)

# How many filters for warnings Python itself begins with (library/warnings, "Default Warning Filter").
DEFAULT_FILTERS = 5


def needs_new_process(old: Mapping[str, str], new: Mapping[str, str]) -> bool:
    """Whether a process with the environment `old` cannot adopt the variables in `new`."""
    return any(
        _READ_AT_START.fullmatch(name) and name not in _READ_LATER and name not in _ADOPTED
        for name, value in new.items()
        if old.get(name) != value
    )


def adopt(new: Mapping[str, str]) -> None:
    """Change this process's variables, and what Python and libraries made of their old values."""
    old = {name: os.environ.get(name, "") for name in new}
    os.environ.update(new)
    for name, apply in _ADOPTED.items():
        if name in new and new[name] != old[name]:
            apply(old[name], new[name])


def _set_time_zone(_old: str, _new: str) -> None:
    time.tzset()


def _set_locale(_old: str, _new: str) -> None:
    with contextlib.suppress(locale.Error):  # one that the image has not: as at Python's start, nothing changes
        locale.setlocale(locale.LC_CTYPE, "")


def _forget_temporary_directory(_old: str, _new: str) -> None:
    tempfile.tempdir = None


def _set_path(old: str, new: str) -> None:
    """As at Python's start: absolute, before all else, each once."""
    gone = set(_entries(old))
    rest = [entry for entry in sys.path if entry not in gone]
    sys.path[:] = [*_entries(new), *rest]


def _entries(value: str) -> list[str]:
    return list(dict.fromkeys(os.path.abspath(entry) for entry in value.split(os.pathsep) if entry))  # noqa: PTH100


def _set_warnings(old: str, new: str) -> None:
    """As at Python's start: above its own filters, below those that libraries have added."""
    olds, news = ([option for option in value.split(",") if option] for value in (old, new))
    sys.warnoptions[:] = [*news, *(option for option in sys.warnoptions if option not in olds)]
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    before = filters[:]
    gone, added = _filters_of(olds), _filters_of(news)
    filters[:] = [each for each in before if each not in gone]
    filters[-DEFAULT_FILTERS:-DEFAULT_FILTERS] = added
    warnings._filters_mutated()  # type: ignore[attr-defined]  # what each change through the module ends with


def _filters_of(options: list[str]) -> list[Any]:
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    filters.clear()
    warnings._processoptions(options)  # type: ignore[attr-defined]  # what reads the variable at Python's start
    return filters[:]


def _set_bytecode(_old: str, new: str) -> None:
    sys.dont_write_bytecode = bool(new)


def _set_backend(_old: str, new: str) -> None:
    matplotlib: Any = sys.modules.get("matplotlib")
    if matplotlib is not None and new:
        with contextlib.suppress(ImportError, ValueError):  # one that there is not: `import matplotlib` cannot fail now
            matplotlib.use(new)


_ADOPTED: Mapping[str, Callable[[str, str], None]] = {
    "TZ": _set_time_zone,
    "LANG": _set_locale,
    "LC_ALL": _set_locale,
    "LC_CTYPE": _set_locale,
    "TMPDIR": _forget_temporary_directory,
    "TEMP": _forget_temporary_directory,
    "TMP": _forget_temporary_directory,
    "PYTHONPATH": _set_path,
    "PYTHONWARNINGS": _set_warnings,
    "PYTHONDONTWRITEBYTECODE": _set_bytecode,
    "MPLBACKEND": _set_backend,
}
