"""Errors of the SDK; the name says whose fault it is.

HypercellError
+-- NoGatewayError            no gateway was found, or nothing answers where it should be
+-- GatewayRefusedError       the gateway answered with an error (carries its status and its words)
+-- MissingPackageError       a package that this function needs is not installed beside the SDK
+-- UnsupportedError          asked for something that a kernel in a machine cannot do
"""

from __future__ import annotations


class HypercellError(Exception):
    """Base of all errors of the SDK. `str(error)` is a sentence for people: what is wrong and what to do."""


class NoGatewayError(HypercellError):
    """No gateway was found, or nothing answers at its address."""


class GatewayRefusedError(HypercellError):
    """The gateway answered with an error.

    status: the HTTP status. code: the gateway's short word for the error, empty if it gave none.
    """

    def __init__(self, message: str, *, status: int, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class MissingPackageError(HypercellError):
    """A package that this function needs is not installed in this Python environment."""


class UnsupportedError(HypercellError):
    """Asked for something that a kernel inside a machine cannot do."""
