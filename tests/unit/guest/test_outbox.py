"""The outbox: room while someone listens, a bounded spool while nobody does."""

from __future__ import annotations

import threading

from vm_runtime.guest.outbox import MESSAGE_OVERHEAD_BYTES, QUEUE_BYTES_MAX, SPOOL_BYTES_MAX, Outbox


def message(topic: bytes, size: int = 0, *, parent: bytes = b"{}") -> list[bytes]:
    return [topic, b"<IDS|MSG>", b"signature", b"{}", parent, b"{}", b"x" * size]


def test_nothing_comes_out_while_nobody_listens() -> None:
    outbox = Outbox()
    outbox.put(message(b"status"))
    assert outbox.head() is None
    outbox.set_listening(True)
    assert outbox.head() == tuple(message(b"status"))


def test_the_spool_drops_old_streams_first_and_counts_them() -> None:
    outbox = Outbox()
    outbox.put(message(b"execute_result", 1000))
    for _ in range(20):
        outbox.put(message(b"stream.stdout", SPOOL_BYTES_MAX // 10, parent=b'{"msg_id": "m"}'))
    assert outbox.queued_bytes <= SPOOL_BYTES_MAX
    dropped = outbox.take_dropped()
    assert dropped is not None
    assert dropped.byte_count > SPOOL_BYTES_MAX // 2
    assert dropped.parent_header == b'{"msg_id": "m"}'
    assert outbox.take_dropped() is None
    outbox.set_listening(True)
    assert outbox.head() == tuple(message(b"execute_result", 1000))


def test_the_spool_is_bounded_without_streams_too() -> None:
    outbox = Outbox()
    for _ in range(SPOOL_BYTES_MAX // MESSAGE_OVERHEAD_BYTES):
        outbox.put(message(b"display_data"))
    assert outbox.queued_bytes <= SPOOL_BYTES_MAX
    assert outbox.take_dropped() is not None


def test_writers_wait_for_a_listener_and_are_freed_when_it_leaves() -> None:
    outbox = Outbox()
    outbox.set_listening(True)
    outbox.put(message(b"stream.stdout", QUEUE_BYTES_MAX))
    for free in (outbox.pop, lambda: outbox.set_listening(False), outbox.release):
        outbox.set_listening(True)
        if outbox.has_room():
            outbox.put(message(b"stream.stdout", QUEUE_BYTES_MAX))
        writer = threading.Thread(target=outbox.wait_for_room)
        writer.start()
        free()
        writer.join(timeout=10)
        assert not writer.is_alive()


def test_a_new_key_signs_what_is_queued() -> None:
    outbox = Outbox()
    outbox.put([*message(b"status", 3), b"buffer"])
    outbox.resign(lambda frames: b"new:" + frames[3])
    outbox.set_listening(True)
    head = outbox.head()
    assert head is not None
    assert head[2] == b"new:xxx"
    assert head[-1] == b"buffer"
