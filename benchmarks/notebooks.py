"""The notebooks whose state is saved, restored and forked, and how to see whether it came back. Only values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Notebook:
    """setup: cells that make the state. change: the cell after which it is saved. probe: an expression whose value
    says whether the state is there; evaluating it may change the state. damage: a cell after which it is not there."""

    title: str
    setup: tuple[str, ...]
    change: str
    probe: str
    damage: str


# 62 columns of a million doubles: 496 MB; one column is 8 MB, and so is what a change of it writes.
_COLUMNS = 62
FRAME_CELL = f"""
import numpy as np
import pandas as pd
df = pd.DataFrame(np.random.default_rng(7).random((1_000_000, {_COLUMNS})), copy=False)
"""
FRAME = Notebook(
    title="a data frame of 500 MB, changed in one column",
    setup=(FRAME_CELL,),
    change="df[7] = df[7] * 1.5",
    probe="float(df[7].sum())",
    damage="del df",
)

MODEL = Notebook(
    title="a trained scikit-learn model",
    setup=(
        """
import numpy as np
from sklearn.ensemble import RandomForestClassifier
X = np.random.default_rng(7).random((1000, 10))
y = (X.sum(axis=1) > 5).astype(int)
""",
    ),
    change="model = RandomForestClassifier(30).fit(X, y)",
    probe="[tree.tree_.node_count for tree in model.estimators_]",
    damage="del model, X, y",
)

FILE = Notebook(
    title="an open file",
    setup=("file = open('notes.txt', 'w+')\n_ = file.write('abc' * 1000)", "_ = file.seek(0)"),
    change="head = file.read(100)",
    probe="[file.tell(), file.read(5)]",
    damage="file.close()\ndel file",
)
GENERATOR = Notebook(
    title="a generator",
    setup=("def squares():\n    for number in range(1000):\n        yield number * number\n\nnumbers = squares()",),
    change="sum_ = next(numbers) + next(numbers)",
    probe="next(numbers)",
    damage="del numbers",
)
THREAD = Notebook(
    title="a running thread",
    setup=(
        """
import threading
import time
ticks = 0
def tick():
    global ticks
    while ticks >= 0:
        ticks += 1
        time.sleep(0.01)
thread = threading.Thread(target=tick, daemon=True)
thread.start()
""",
    ),
    change="while ticks < 50: time.sleep(0.01)",
    probe="[thread.is_alive(), ticks >= 50, (lambda before: (time.sleep(0.3), ticks > before)[1])(ticks)]",
    damage="ticks = -2\nthread.join()\ndel thread, ticks",
)
LAMBDA = Notebook(
    title="a lambda",
    setup=("factor = 3",),
    change="times = lambda number: number * factor",
    probe="times(14)",
    damage="del times, factor",
)
SQLITE = Notebook(
    title="a live SQLite connection",
    setup=(
        "import sqlite3, time\ndb = sqlite3.connect(':memory:')\n_ = db.execute('create table t (at real)')",
        "_ = db.execute('insert into t values (?)', (time.time(),))",
    ),
    change="_ = db.execute('insert into t values (?)', (time.time(),))",
    probe="db.execute('select count(*), sum(at) from t').fetchone()",
    damage="db.close()\ndel db",
)

RANDOM = Notebook(
    title="a random number that was drawn",
    setup=("import uuid",),
    change="token = uuid.uuid4().hex",
    probe="token",
    damage="del token",
)

LIVE: tuple[Notebook, ...] = (FILE, GENERATOR, THREAD, LAMBDA, SQLITE)

# 10 MB of memory written by one cell, in a buffer that is there before.
BUFFER_CELL = "import numpy as np\nbuffer = np.zeros(10_000_000, dtype=np.uint8)"
WRITE_CELL = "buffer += 1"


def together(notebooks: Sequence[Notebook]) -> list[str]:
    """All cells of several notebooks, one after the other."""
    return [cell for notebook in notebooks for cell in (*notebook.setup, notebook.change)]
