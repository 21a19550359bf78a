"""One record a line, as ``import`` reads and ``export`` writes it.

``{"key": "text", "value": "text"}``; bytes that are no UTF-8 stand in ``key_b64`` and ``value_b64`` (base64, RFC 4648).
Nothing else may be in the object: what would be lost silently is refused.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, Final

import msgspec

from srengine import errors, limits
from srengine.cli.output import bytes_field

_FIELDS: Final = ("key", "key_b64", "value", "value_b64")
LINE_BYTES_MAX: Final = 2 * limits.VALUE_BYTES_MAX + 64 * limits.KIB
"""Holds the largest value in base64, or in text with most characters escaped; longer lines are refused unread."""


def encode_line(key: bytes, value: bytes) -> bytes:
    """Return the line of one record, its end included."""
    fields: dict[str, Any] = {**bytes_field("key", key), **bytes_field("value", value)}
    return msgspec.json.encode(fields) + b"\n"


def decode_line(line: bytes) -> tuple[bytes, bytes]:
    r"""Return key and value of one line; `InvalidValue` says what is wrong with it.

    >>> decode_line(b'{"key": "a", "value_b64": "/w=="}')
    (b'a', b'\xff')
    """
    try:
        fields = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise errors.InvalidValue(f"no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise errors.InvalidValue("no JSON object")
    unknown = sorted(set(fields).difference(_FIELDS))
    if unknown:
        raise errors.InvalidValue(f"unknown field {unknown[0]!r}")
    key = _bytes_of(fields, "key")
    if not limits.KEY_BYTES_MIN <= len(key) <= limits.KEY_BYTES_MAX:
        raise errors.InvalidValue(f"a key of {len(key)} bytes; it has {limits.KEY_BYTES_MIN} to {limits.KEY_BYTES_MAX}")
    value = _bytes_of(fields, "value")
    if len(value) > limits.VALUE_BYTES_MAX:
        raise errors.InvalidValue(f"a value of {len(value)} bytes; at most {limits.VALUE_BYTES_MAX} are stored")
    return key, value


def _bytes_of(fields: dict[str, Any], name: str) -> bytes:
    coded = f"{name}_b64"
    if (name in fields) == (coded in fields):
        raise errors.InvalidValue(f"needs either {name!r} or {coded!r}")
    text = fields[name] if name in fields else fields[coded]
    if not isinstance(text, str):
        raise errors.InvalidValue(f"{name} is no text")
    try:
        return text.encode() if name in fields else base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise errors.InvalidValue(f"{name}: {error}") from error
