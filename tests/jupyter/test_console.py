"""`jupyter console` in a terminal, on a kernel in a machine."""

from __future__ import annotations

import sys

import pexpect
import pytest

TIMEOUT_S = 120


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of forkpty:DeprecationWarning")
def test_console_runs_interrupts_asks_and_ends(kernel_name: str, provisioner_environment: dict[str, str]) -> None:
    console = pexpect.spawn(
        sys.executable,
        ["-m", "jupyter_console", "--kernel", kernel_name, "--simple-prompt"],
        env={**provisioner_environment, "TERM": "dumb"},
        encoding="utf-8",
        timeout=TIMEOUT_S,
        # The simple prompt does not need a wide terminal, but a line that wraps would break the patterns.
        dimensions=(40, 200),
    )
    try:
        console.expect(r"In \[1\]: ")
        console.sendline("print('hello from', __import__('sys').platform)")
        console.expect("hello from linux")
        console.expect(r"In \[2\]: ")
        console.sendline("6 * 7")
        console.expect(r"Out\[2\]: 42")
        console.expect(r"In \[3\]: ")
        console.sendline("print('looping'); exec('while True: pass')")
        console.expect("looping\r\n")
        console.sendintr()
        console.expect("KeyboardInterrupt")
        console.expect(r"In \[4\]: ")
        console.sendline("name = input('na' + 'me? ')")
        console.expect(r"name\? ")
        console.sendline("Grace")
        console.expect(r"In \[5\]: ")
        console.sendline("print('hello', name)")
        console.expect("hello Grace")
        console.sendline("exit")
        console.expect(pexpect.EOF)
    finally:
        console.close(force=True)
    assert console.exitstatus == 0
