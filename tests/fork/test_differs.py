"""What sixteen children of one parent must not share, one by one; and what `same_random` keeps equal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.fork.conftest import MAX_CHILDREN
from tests.gateways import RunningGateway
from tests.state.sandboxes import Api, value_of

# Used before the fork, so that every generator has a state to inherit.
PARENT = """
import os, platform, random, secrets, socket, ssl, tempfile, time, uuid
import numpy
random.seed(1); numpy.random.seed(1)
random.random(), numpy.random.random(), uuid.uuid4(), secrets.token_hex(), os.urandom(8), ssl.RAND_bytes(8);
"""

# What a child tells of each; all of them must differ.
DIFFERENT = {
    "sandbox id": "__import__('sandbox').id",
    "index": "__import__('sandbox').index",
    "hostname": "socket.gethostname()",
    "uname": "platform.node(), os.uname().nodename",
    "key": "get_ipython().kernel.session.key.hex()",
    "os.urandom": "os.urandom(16)",
    "getrandom": "os.getrandom(16)",
    "ssl": "ssl.RAND_bytes(16)",
    "uuid4": "str(uuid.uuid4())",
    "uuid1": "str(uuid.uuid1())",
    "secrets": "secrets.token_hex(16)",
    "SystemRandom": "random.SystemRandom().random()",
    "boot of a process": "__import__('subprocess').run(['python3', '-c', 'import random; print(random.random())'], "
    "capture_output=True).stdout",
    "random": "random.random()",
    "random.Random": "random.Random().random()",
    "numpy.random": "float(numpy.random.random())",
    "numpy.default_rng": "float(numpy.random.default_rng().random())",
    "tempfile": "tempfile.mktemp()",
}

EQUAL = {"random": "random.random()", "numpy.random": "float(numpy.random.random())"}


class Family:
    """What the parent and its children said to every question above; between which times of the host's clock."""

    def __init__(self, answers: dict[str, dict[str, Any]], asked: dict[str, tuple[float, float]]) -> None:
        self.answers = answers
        self.asked = asked


async def ask_all(gateway: RunningGateway, parent: str, children: list[str], questions: dict[str, str]) -> Family:
    code = "{" + ", ".join(f"{name!r}: ({code})" for name, code in questions.items()) + ", 'time': time.time()}"
    asked = {}

    async def one(sandbox_id: str) -> dict[str, Any]:
        before = time.time()
        answer: dict[str, Any] = await value_of(gateway, sandbox_id, code)
        asked[sandbox_id] = before, time.time()
        return answer

    # A few at a time: each is a machine that needs a CPU.
    answers: dict[str, dict[str, Any]] = {}
    everyone = [parent, *children]
    for start in range(0, len(everyone), 4):
        some = everyone[start : start + 4]
        answers |= zip(some, await asyncio.gather(*map(one, some)), strict=True)
    return Family(answers, asked)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def family(fork_gateway: RunningGateway) -> AsyncIterator[Family]:
    api = Api(fork_gateway)
    parent = await api.create()
    await value_of(fork_gateway, parent, PARENT)
    children = [each["id"] for each in (await api.do(parent, "fork", {"count": MAX_CHILDREN}))["children"]]
    yield await ask_all(fork_gateway, parent, children, DIFFERENT)
    await asyncio.gather(*(api.delete(each) for each in (*children, parent)))


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("what", DIFFERENT)
async def test_differs(family: Family, what: str) -> None:
    people = family.answers if what != "index" else {id_: family.answers[id_] for id_ in list(family.answers)[1:]}
    values = [answer[what] for answer in people.values()]
    assert len(values) >= MAX_CHILDREN
    assert len(set(values)) == len(values), values


@pytest.mark.asyncio(loop_scope="module")
async def test_the_clock_is_right_everywhere(family: Family) -> None:
    for sandbox_id, answer in family.answers.items():
        before, after = family.asked[sandbox_id]
        assert before - 0.5 < answer["time"] < after + 0.5, answer


@pytest.mark.asyncio(loop_scope="module")
async def test_each_is_who_the_gateway_says(family: Family) -> None:
    for sandbox_id, answer in family.answers.items():
        assert answer["sandbox id"] == sandbox_id
        assert answer["hostname"] == f"sandbox-{sandbox_id[:8]}"


async def test_same_random_keeps_user_level_generators_equal(fork_gateway: RunningGateway) -> None:
    api = Api(fork_gateway)
    parent = await api.create()
    await value_of(fork_gateway, parent, PARENT)
    forked = await api.do(parent, "fork", {"count": 3, "same_random": True})
    children = [each["id"] for each in forked["children"]]
    family = await ask_all(fork_gateway, parent, children, {**EQUAL, "urandom": "os.urandom(8)"})
    for what in EQUAL:
        assert len({answer[what] for answer in family.answers.values()}) == 1, what
    assert len({answer["urandom"] for answer in family.answers.values()}) == 4
    await asyncio.gather(*(api.delete(each) for each in (*children, parent)))
