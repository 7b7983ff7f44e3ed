"""Errors of machines and their drivers; the name says whose fault it is.

VmRuntimeError
+-- MachineError              this one machine's
|   +-- MachineStartError         it died or stalled before it ran; the reason and the end of its serial log
|   +-- MachineGoneError          it has no live VMM (any more)
|   +-- MachineStateError         the caller's: not possible in the state the machine is in
+-- DriverError               the host's
    +-- DriverUnavailableError    the VMM's program is missing, too old, or no accelerator works
    +-- SpawnError                a VMM process could not be started
    +-- VmmProtocolError          the VMM's control socket broke, or sent what it must not send
        +-- VmmCommandError           the VMM refused a command
"""

from __future__ import annotations


class VmRuntimeError(Exception):
    """Base of all errors of this package. `str(error)` is a sentence for people: what is wrong and what to do."""


class MachineError(VmRuntimeError):
    """Something is wrong with one machine; others are not affected."""


class MachineStartError(MachineError):
    """The machine died or stalled before its guest ran. `serial_tail`: the end of what the guest printed."""

    def __init__(self, message: str, *, serial_tail: str = "") -> None:
        super().__init__(f"{message}\n--- end of the serial log ---\n{serial_tail}" if serial_tail else message)
        self.serial_tail = serial_tail


class MachineGoneError(MachineError):
    """The machine has no live VMM; what its VMM left behind has been removed."""


class MachineStateError(MachineError):
    """The caller asked for something that the machine's state does not allow."""

    def __init__(self, *, found: str, wanted: str) -> None:
        super().__init__(f"The machine is {found}; this needs it to be {wanted}.")
        self.found = found
        self.wanted = wanted


class DriverError(VmRuntimeError):
    """The host cannot do what a driver needs; no machine is to blame."""


class DriverUnavailableError(DriverError):
    """The VMM's program is missing or too old, or no accelerator works; the message says what to install."""


class SpawnError(DriverError):
    """A VMM process could not be started; the message says at which step."""


class VmmProtocolError(DriverError):
    """The VMM's control socket broke or carried something unexpected."""


class VmmCommandError(VmmProtocolError):
    """The VMM refused a command. `error_class` is the VMM's own word for the kind of error."""

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"The VMM refused {command}: {description}")
        self.command = command
        self.error_class = error_class
        self.description = description
