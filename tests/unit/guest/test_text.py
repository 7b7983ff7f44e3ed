"""Text that has no UTF-8 leaves the kernel as jupyter_client reads that of a local one, and stops nothing."""

from __future__ import annotations

from typing import Any

from jupyter_client.asynchronous.client import AsyncKernelClient

from tests.unit.guest.conftest import Host, client, run
from tests.unit.guest.test_fresh_kernel import new_kernel, plain_kernel

# Each printed, raised, displayed, as a key, and in a forked child.
CELLS = (
    "print({0})",
    "import sys; sys.stderr.write({0})",
    "raise ValueError({0})",
    "from IPython.display import display; display({{'text/plain': {0}}}, raw=True, metadata={{{0}: 1}})",
    "from comm import create_comm; create_comm('t', data={{{0}: [{0}]}}).close()",
    "import multiprocessing as m; p = m.Process(target=print, args=({0},)); p.start(); p.join()",
    "class A:\n  def __repr__(self): return {0}\nA()",
    "input({0})",
)


async def shown(jupyter: AsyncKernelClient, code: str) -> list[Any]:
    found: list[Any] = []

    def output(message: dict[str, Any]) -> None:
        content = message["content"]
        if message["msg_type"] in ("stream", "display_data", "execute_result", "comm_open"):
            found.append([content.get(name) for name in ("text", "data", "metadata")])
        elif message["msg_type"] == "error":
            found.append([content["ename"], content["evalue"]])

    def answer(message: dict[str, Any]) -> None:
        found.append(message["content"]["prompt"])
        jupyter.input("")

    reply = await jupyter.execute_interactive(
        code, timeout=60, output_hook=output, stdin_hook=answer, allow_stdin=True, stop_on_error=False
    )
    return [*found, reply["content"]["status"], reply["content"].get("evalue")]


async def test_bytes_of_no_utf8_are_shown_as_those_of_a_local_kernel(host: Host) -> None:
    texts = (r"'a\udcff'", r"'\udcc3\udca9'", r"__import__('os').fsdecode(b'\xe9.txt')")
    cells = [cell.format(text) for cell in CELLS for text in texts]
    async with plain_kernel(host) as jupyter:
        plain = [await shown(jupyter, cell) for cell in cells]
    await new_kernel(host)
    async with client(host) as jupyter:
        ours = [await shown(jupyter, cell) for cell in cells]
    assert ours == plain
    assert "a\ufffd" in str(ours)


async def test_half_a_surrogate_pair_ends_neither_its_cell_nor_others(host: Host) -> None:
    await new_kernel(host)
    async with client(host) as jupyter:
        for cell in CELLS:
            found = await shown(jupyter, cell.format(r"'a\ud800b'"))
            assert "a\ufffdb" in str(found) or "a\\ud800b" in str(found), (cell, found)
        assert (await run(jupyter, "print('é😀')"))[0] == "é😀\n"
