"""State of all kinds in one kernel, as cells: what makes it, and what tells that it is all there.

None of it but the variables could be pickled.
"""

from __future__ import annotations

MAKE = """
import os, pathlib, signal, socket, sqlite3, subprocess, threading, time
numbers = {"a": [1, 2, 3]}
shout = lambda text: text.upper() + "!"
opened = open("/tmp/opened.txt", "w+")
opened.write("first line\\n")
pathlib.Path("plain.txt").write_text("on disk")
squares = (i * i for i in range(100))
assert [next(squares) for _ in range(3)] == [0, 1, 4]
ours, theirs = socket.socketpair()
ours.send(b"on its way")
child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
database = sqlite3.connect(":memory:")
database.execute("create table t (x)")
database.execute("insert into t values (42)")
ticks = 0
def tick():
    global ticks
    while True:
        ticks += 1
        time.sleep(0.02)
threading.Thread(target=tick, daemon=True).start()
rung = threading.Event()
threading.Timer(2.0, rung.set).start()
alarms = []
signal.signal(signal.SIGALRM, lambda *_: alarms.append(1))
signal.setitimer(signal.ITIMER_REAL, 2.0, 0.5)
parent_pid = os.getpid()
started_wall, started_mono = time.time(), time.monotonic()
"""

# Run once after the state came back: it uses up some of it.
CHECK = """
before = ticks
assert numbers == {"a": [1, 2, 3]} and shout("x") == "X!"
opened.write("second line\\n"); opened.seek(0)
assert opened.read() == "first line\\nsecond line\\n"
assert pathlib.Path("plain.txt").read_text() == "on disk"
assert next(squares) == 9
assert theirs.recv(100) == b"on its way"
theirs.send(b"back"); assert ours.recv(100) == b"back"
child.stdin.write(b"through\\n"); child.stdin.flush()
assert child.stdout.readline() == b"through\\n" and child.poll() is None
assert database.execute("select x from t").fetchone() == (42,)
assert os.getpid() == parent_pid
assert rung.wait(20), "the timer did not ring"
deadline = time.monotonic() + 20
while (ticks == before or not alarms) and time.monotonic() < deadline: time.sleep(0.05)
assert ticks > before, "the thread stands still"
assert alarms, "no alarm"
signal.setitimer(signal.ITIMER_REAL, 0)
assert subprocess.run(["echo", "new"], capture_output=True).stdout == b"new\\n"
time.time()
"""
