"""Random operations on a few sandboxes, with `kill -9` of the gateway in between: no committed state is lost, nothing
is orphaned, and every file in the store is accounted for.

The seed is printed; HYPERCELL_CHAOS_SEED and HYPERCELL_CHAOS_OPS set it and the number of operations.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.gateways import RunningGateway, start_gateway
from tests.state.sandboxes import Api, Traces, eventually, processes_of, value_of, vmm_pids
from vm_runtime.snapshots.manifest import PartKind
from vm_runtime.snapshots.store import SnapshotStore

OPERATIONS = int(os.environ.get("HYPERCELL_CHAOS_OPS", "100"))
SEED = int(os.environ.get("HYPERCELL_CHAOS_SEED", random.SystemRandom().randrange(2**32)))
MAX_SANDBOXES = 4
FLAGS = ("--pool-size", "0", "--checkpoints", "off")

# A cell that counts in memory and on disk; both must agree ever after.
COUNT = "n += 1; _ = open('/tmp/n', 'w').write(str(n)); data = os.urandom(200_000); n"
LOOK = "n, int(open('/tmp/n').read()), len(data)"


@dataclass
class Model:
    """What a sandbox must be: its counter, and that of each of its named checkpoints. unsure: an operation was under
    way when the gateway was killed; the counter, or the counter before that operation, are both right."""

    n: int = 0
    named: dict[str, int] = field(default_factory=dict)
    unsure: set[int] = field(default_factory=set)


class Chaos:
    flags: tuple[str, ...] = FLAGS
    max_sandboxes = MAX_SANDBOXES

    def __init__(self, state_dir: Path) -> None:
        self.random = random.Random(SEED)
        self.state_dir = state_dir
        self.gateway: RunningGateway = start_gateway(state_dir, *self.flags)
        self.traces = Traces(self.gateway.run_dir)
        self.models: dict[str, Model] = {}
        self.log: list[str] = []

    @property
    def api(self) -> Api:
        return Api(self.gateway)

    async def step(self, number: int) -> None:
        self.traces.note()
        if not self.models:
            await self.create()
            return
        sandbox_id = self.random.choice(sorted(self.models))
        operations: dict[Callable[[str], Awaitable[None]], int] = {
            self.cell: 8, self.sleep: 4, self.wake: 2, self.checkpoint: 3, self.goto: 2, self.fork: 2, self.delete: 1,
        }  # fmt: skip
        if len(self.models) >= self.max_sandboxes:
            del operations[self.fork]
            operations[self.delete] = 4
        (operation,) = self.random.choices(list(operations), list(operations.values()))
        killed = self.random.random() < 0.12
        self.log.append(f"{number}: {operation.__name__} {sandbox_id[:8]}{' killed' if killed else ''}")
        if not killed:
            await operation(sandbox_id)
            return
        before = self.models[sandbox_id].n
        doing = asyncio.ensure_future(operation(sandbox_id))
        await asyncio.sleep(self.random.uniform(0, 0.4))
        self.gateway.kill()
        with contextlib.suppress(Exception):
            await doing
        await self.recover(sandbox_id, before)

    async def recover(self, sandbox_id: str, before: int) -> None:
        """A new gateway. The operation that was under way has happened or not; whichever, it is whole."""
        self.gateway = start_gateway(self.state_dir, *self.flags)
        listed = {each["id"]: each for each in await self.api.call("GET", "/api/sandboxes")}
        self.log.append(f"   found {[(id_[:8], each['state']) for id_, each in listed.items()]}")
        missing = self.models.keys() - listed.keys()
        assert missing <= {sandbox_id}, "a sandbox that nobody touched is gone"
        for lost in missing:
            assert self.log[-2].split()[1] == "delete", "gone without being deleted"
            del self.models[lost]
        for new in listed.keys() - self.models.keys():
            # Forked or made when nobody could be told: it is whole, and the next test of it says so.
            parent = listed[new]["parent_id"]
            assert parent == sandbox_id, listed[new]
            self.models[new] = Model(n=before)
        if sandbox_id in self.models:
            model = self.models[sandbox_id]
            goal = set(model.named.values()) if "goto" in self.log[-2] else {before, before + 1}
            model.unsure = {before, model.n, *goal}
        await self.check_all()

    async def check_all(self) -> None:
        for sandbox_id in sorted(self.models):
            await self.check(sandbox_id)

    async def check(self, sandbox_id: str) -> None:
        model = self.models[sandbox_id]
        n, on_disk, size = await value_of(self.gateway, sandbox_id, LOOK)
        assert n in (model.unsure or {model.n}), f"{sandbox_id}: {n}, expected {model}"
        assert (on_disk, size) == (n, 200_000)
        model.n, model.unsure = n, set()

    # The operations. A model changes when its operation has been answered.

    async def create(self) -> None:
        sandbox_id = await self.api.create(checkpoints=self.random.choice(("off", "cell")))
        await value_of(
            self.gateway, sandbox_id, "import os; n = 0; _ = open('/tmp/n', 'w').write('0'); data = bytes(200_000)"
        )
        self.models[sandbox_id] = Model()

    async def cell(self, sandbox_id: str) -> None:
        model = self.models[sandbox_id]
        n = await value_of(self.gateway, sandbox_id, COUNT)
        assert n == model.n + 1, (sandbox_id, n, model)
        model.n = n

    async def sleep(self, sandbox_id: str) -> None:
        assert (await self.api.do(sandbox_id, "sleep"))["state"] == "asleep"

    async def wake(self, sandbox_id: str) -> None:
        assert (await self.api.do(sandbox_id, "wake"))["state"] == "running"
        await self.check(sandbox_id)

    async def checkpoint(self, sandbox_id: str) -> None:
        name = f"c{len(self.models[sandbox_id].named)}"
        await self.api.do(sandbox_id, "checkpoints", {"name": name}, status=201)
        self.models[sandbox_id].named[name] = self.models[sandbox_id].n

    async def goto(self, sandbox_id: str) -> None:
        model = self.models[sandbox_id]
        if model.named:
            name = self.random.choice(sorted(model.named))
            await self.api.do(sandbox_id, "goto", {"target": name})
            model.n = model.named[name]
            await self.check(sandbox_id)

    async def fork(self, sandbox_id: str) -> None:
        n = self.models[sandbox_id].n
        (child,) = (await self.api.do(sandbox_id, "fork"))["children"]
        assert "error" not in child, child
        await self.born(child["id"], Model(n=n))

    async def born(self, child_id: str, model: Model) -> None:
        self.models[child_id] = model
        await self.check(child_id)

    async def delete(self, sandbox_id: str) -> None:
        await self.api.delete(sandbox_id)
        del self.models[sandbox_id]

    # What must be so at the end

    async def no_orphans(self) -> None:
        """Every machine, endpoint directory and pin belongs to a sandbox that is listed."""
        listed = {each["id"]: each["state"] for each in await self.api.call("GET", "/api/sandboxes")}
        assert listed.keys() == self.models.keys()
        running = [id_ for id_, state in listed.items() if state == "running"]
        run_dir = self.gateway.run_dir
        with contextlib.suppress(AssertionError):
            await eventually(lambda: len(list((run_dir / "m").iterdir())) == len(running))
        machines = {path.name: sorted(each.name for each in path.iterdir()) for path in (run_dir / "m").iterdir()}
        assert len(machines) == len(running), (machines, vmm_pids(run_dir), listed)
        assert len(vmm_pids(run_dir)) == len(running)
        endpoints = {path.name for path in (run_dir / "k").glob("*")}
        assert endpoints <= {id_.replace("-", "")[:12] for id_ in listed}
        assert len(list((self.state_dir / "machines").iterdir())) == len(running)
        gateway = self.gateway.process.pid
        ours = set(processes_of(self.state_dir)) - {gateway}
        assert set(vmm_pids(run_dir).values()) <= ours
        assert len(ours) <= len(running) + 1, "VMMs, and the spawner perhaps"


def account_for_files(state_dir: Path) -> None:
    """After a collection: parts that a manifest or pin names, manifests of sandboxes, no drafts. And all is intact."""
    with SnapshotStore(state_dir / "snapshots") as store:
        store.gc()
        assert not list((store.directory / "drafts").iterdir())
        needed = {(kind, digest) for pin in store.pins().values() for kind, digest in pin.parts()}
        for snapshot_id in store.ids():
            needed |= {(kind, part.digest) for kind, part in store.get(snapshot_id).parts()}
            assert store.verify(snapshot_id) == []
        found = {(kind, path.name) for kind in PartKind for path in (store.directory / "parts" / kind).iterdir()}
        assert found == needed
        assert not [user for user in store.pin_users() if user.startswith("machine-")], "pins of machines that ended"
        strange = [path for path in store.directory.rglob(".*") if path.is_file()]
        assert not strange, "half-written files"


@pytest.mark.timeout(600)
async def test_chaos(state_dir: Path) -> None:
    print(f"HYPERCELL_CHAOS_SEED={SEED} HYPERCELL_CHAOS_OPS={OPERATIONS}")
    chaos = Chaos(state_dir)
    try:
        for _ in range(2):
            await chaos.create()
        for number in range(OPERATIONS):
            await chaos.step(number)
        await chaos.check_all()
        await chaos.no_orphans()
        ids = set(chaos.models)
        chaos.gateway.stop()
        assert chaos.traces.left(state_dir) == []
        account_for_files(state_dir)
        # One last time from what is on disk; then a real end leaves nothing but templates.
        chaos.gateway = start_gateway(state_dir, *FLAGS)
        await chaos.check_all()
        for sandbox_id in ids:
            await chaos.api.delete(sandbox_id)
        chaos.gateway.stop()
        account_for_files(state_dir)
        assert all(path.name.startswith("template-") for path in (state_dir / "snapshots/pins").iterdir())
    except BaseException:
        print("\n".join(chaos.log))
        raise
    finally:
        if chaos.gateway.process.poll() is None:
            chaos.gateway.stop()
