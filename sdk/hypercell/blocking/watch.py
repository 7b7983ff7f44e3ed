"""Changes of files in a sandbox, as they happen. Frames: docs/exec_and_files.md.

Made by sdk/make_blocking.py from aio/watch.py: change that.
"""

from __future__ import annotations

from hypercell.aio.watch import AsyncWatch
from hypercell.blocking.portal import (
    BlockingCall,
    Wrapper,
    following,
    register,
)
from hypercell.values import FileChange


class Watch(Wrapper):
    """The changes below a path, from its making on. Iterate over it: the iteration ends when the path is gone, or the
    watch is stopped, here or from another task or thread. `with` stops it.
    """

    _async: AsyncWatch

    def __iter__(self) -> Watch:
        return self

    def __next__(self) -> FileChange:
        """The next change. Raises ConnectionLostError; changes may have been missed then."""
        return following(self._async)

    def stop(self) -> None:
        """Ends it, and an iteration that waits for a change. Twice is harmless."""
        BlockingCall().run(self._async.stop())

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exc_info: object) -> None:
        BlockingCall().run(self._async.__aexit__(*exc_info))


register(AsyncWatch, Watch)
