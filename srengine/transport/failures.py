"""Typed errors on the wire: a code, a sentence, plain facts; bounded both ways."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from srengine import errors, limits
from srengine.codec.envelopes import Failure

INTERNAL: Final = "INTERNAL"
"""Code of a handler's mistake. The caller sees `Error` with ``remote_code``; what happened is in the peer's log."""

_RESERVED: Final = frozenset({"self", "message", "remote_code", "code", "details", "exit_code", "retryable"})


def failure_of(request: int, error: errors.Error) -> Failure:
    """Return the envelope that carries ``error``."""
    details = {name: value for name, value in error.details.items() if _is_plain(value)}
    if len(msgspec.msgpack.encode(details)) > limits.FAILURE_BYTES_MAX:
        details = {}
    code = str(error.details.get("remote_code", error.code))
    return Failure(request, code[:64], error.message[: limits.FAILURE_BYTES_MAX // 4], details)


def error_of(failure: Failure) -> errors.Error:
    """Return the error that the peer named. Facts whose names would shadow something are left out."""
    details = {
        name: value
        for name, value in failure.details.items()
        if name.isidentifier() and name not in _RESERVED and name[0] != "_"
    }
    return errors.from_code(failure.code, failure.message, details)


def _is_plain(value: Any) -> bool:
    match value:
        case None | bool() | str():
            return True
        case int():
            return -(2**63) <= value < 2**64
        case float():
            return value == value and abs(value) != float("inf")  # noqa: PLR0124 (NaN)
        case list() | tuple():
            return all(_is_plain(item) for item in value)
        case dict():
            return all(isinstance(name, str) and _is_plain(item) for name, item in value.items())
        case _:
            return False
