"""Finds where a session begins in a stream of bytes. Knows markers, not frames.

A marker is 16 random bytes, known before they come. Whatever lies before it was in flight when a snapshot was taken or
when a gateway died, and is skipped. It can be cut by any read, so the last 15 bytes are looked at again with the next.

The guest looks for markers all the time, inside frames too: after a restore, a new session begins in the middle of
whatever the old one was doing, and the guest sees no hang-up. Two markers are valid at once:

* the *next* marker, named by the last HELLO: the host uses it once it has seen (and stored) the WELCOME to that HELLO;
* the *used* marker, with which the current session began: a host that died before it had stored the next one knows
  only this. It may also come twice in a row, when a host dies between writing HELLO and reading WELCOME.

A host never writes a next marker before it has read the WELCOME to the HELLO which names it, so a guest knows every
marker by the time it comes.
"""

from __future__ import annotations

from vm_runtime.wire.greeting import MARKER_BYTES


class MarkerScanner:
    """Looks for the last of some markers in what has come. `accept` says which they are."""

    def __init__(self, *markers: bytes) -> None:
        self._markers: tuple[bytes, ...] = ()
        self._carry = b""
        self.found: bytes | None = None
        self.accept(*markers)

    def accept(self, *markers: bytes) -> None:
        """From now on look for these."""
        if any(len(marker) != MARKER_BYTES for marker in markers):
            raise ValueError(f"A marker has {MARKER_BYTES} bytes")
        self._markers = markers

    def feed(self, data: bytes) -> tuple[bool, bytes]:
        """(True, what follows the last marker in data), or (False, data).

        The marker is then in `found`. What lies before it belongs to a session that is over, and is dropped.
        """
        window = self._carry + data
        position, marker = max((window.rfind(marker), marker) for marker in self._markers)
        if position < 0:
            self._carry = window[-(MARKER_BYTES - 1) :]
            return False, data
        self.found = marker
        rest = window[position + MARKER_BYTES :]
        self._carry = rest[-(MARKER_BYTES - 1) :]
        return True, rest
