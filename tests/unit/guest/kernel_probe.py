"""What a kernel looks like from inside, as JSON on standard output. Its text is run as the first cell of a kernel."""


def probe() -> dict[str, object]:
    """Name to value; what differs from process to process (ids, addresses) is left out."""
    import asyncio
    import builtins
    import gc
    import locale
    import logging
    import multiprocessing
    import os
    import re
    import resource
    import signal
    import sys
    import tempfile
    import threading
    import time
    import warnings
    from pathlib import Path
    from typing import Any

    import matplotlib.pyplot
    import numpy
    from IPython.core.getipython import get_ipython

    numpy.zeros(1)
    matplotlib.pyplot.get_backend()  # what these two change in Python and IPython belongs to every kernel that has them
    ip: Any = get_ipython()

    def shown(value: Any) -> str:
        if callable(value) and hasattr(value, "__qualname__"):
            return f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, (dict, set, frozenset)):
            return repr(sorted(map(repr, value)))
        if isinstance(value, (str, int, float, bytes, list, tuple, type(None))):
            return re.sub(r"0x[0-9a-f]+", "0x", repr(value))
        return f"{type(value).__module__}.{type(value).__qualname__}"

    found: dict[str, object] = {
        f"__main__.{name}": shown(value) for name, value in vars(sys.modules["__main__"]).items()
    }
    for name in dir(sys):
        if name not in ("modules", "path_importer_cache") and (
            name.endswith("hook") or not callable(getattr(sys, name))
        ):
            found[f"sys.{name}"] = shown(getattr(sys, name))
    found["sys flags"] = repr(sys.flags)
    found["sys limits"] = [sys.getrecursionlimit(), sys.getswitchinterval(), sys.gettrace(), sys.getprofile()]
    found["sys encodings"] = [sys.getfilesystemencoding(), sys.getfilesystemencodeerrors(), locale.getencoding()]
    for name in ("stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__"):
        stream = getattr(sys, name)
        details = [getattr(stream, each, None) for each in ("encoding", "errors", "closed", "name", "mode")]
        found[f"sys.{name} is"] = [*details, stream.isatty(), stream.writable(), hasattr(stream, "buffer")]
    found |= {f"environ {name}": value for name, value in os.environ.items()}
    found |= {f"signal {number}": shown(signal.getsignal(number)) for number in signal.valid_signals()}
    found["signal mask"] = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))
    found["timer"] = signal.getitimer(signal.ITIMER_REAL)
    found["warnings"] = sorted(
        repr((action, getattr(text, "pattern", text), kind, getattr(module, "pattern", module), line))
        for action, text, kind, module, line in warnings.filters
    )
    found["warnings are shown by"] = [shown(warnings.showwarning), shown(warnings.formatwarning)]
    for name, logger in [("root", logging.getLogger()), *sorted(logging.Logger.manager.loggerDict.items())]:
        if isinstance(logger, logging.Logger):
            details = [logger.level, len(logger.handlers), logger.propagate, logger.disabled]
            found[f"logger {name}"] = [*details, len(logger.filters)]
    found["logging"] = [logging.Logger.manager.disable, shown(logging.lastResort), logging.raiseExceptions]
    found |= {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")}
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    for name in (
        "NoNewPrivs",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "Seccomp",
        "SigBlk",
        "SigIgn",
        "SigCgt",
        "Umask",
    ):
        found[f"process {name}"] = status[name].strip()
    found["process"] = [os.nice(0), os.sched_getaffinity(0), os.getuid(), os.getgid(), os.getgroups()]
    found["process leads"] = [os.getpgrp() == os.getpid(), os.getsid(0) == os.getpid()]
    found["directory"] = str(Path.cwd())
    found["locale"] = [locale.setlocale(locale.LC_ALL), locale.localeconv()]
    found["time zone"] = [time.tzname, time.timezone]
    found["temporary directory"] = [tempfile.tempdir, tempfile.gettempdir()]
    found["gc"] = [gc.get_threshold(), gc.isenabled(), len(gc.callbacks), gc.get_debug(), len(gc.garbage)]
    found["threads"] = sorted(re.sub(r"Thread-\d+", "Thread", thread.name) for thread in threading.enumerate())
    found["threading"] = [shown(threading.excepthook), threading.stack_size()]
    loop = asyncio.get_event_loop()
    found["asyncio"] = [shown(asyncio.get_event_loop_policy()), shown(loop), loop.get_debug(), loop.is_running()]
    found |= {f"builtins.{name}": shown(value) for name, value in vars(builtins).items()}
    found["multiprocessing"] = [multiprocessing.get_start_method(), multiprocessing.current_process().name]
    found["ipython events"] = {name: [shown(each) for each in them] for name, them in ip.events.callbacks.items()}
    found["ipython magics"] = {kind: sorted(them) for kind, them in ip.magics_manager.lsmagic().items()}
    found["ipython hidden"] = sorted(ip.user_ns_hidden)
    for name in ip.trait_names():
        if name not in ("user_ns", "config", "parent", "kernel"):
            found[f"ipython {name}"] = shown(getattr(ip, name))
    found["ipython last"] = [shown(ip._last_traceback), shown(getattr(ip.InteractiveTB, "tb", None))]
    found["ipython extensions"] = sorted(ip.extension_manager.loaded)
    found["ipython config"] = {name: sorted(them) for name, them in ip.config.items()}
    return found


if __name__ == "__main__":
    import json

    print(json.dumps(probe(), default=str))
