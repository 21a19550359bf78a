"""The kinds of messages: one name for each frozen struct, known before the first frame arrives.

A room registers its messages when its ``messages.py`` is imported. The name is ``room.message`` and never changes its
meaning; a struct grows by fields with defaults. Unknown fields of a newer sender are ignored, an unknown kind is a
`FrameError` at the receiver.
"""

from __future__ import annotations

import re
from typing import Any, Final, TypeVar

import msgspec

from srengine import errors
from srengine.codec import scanner

_KIND: Final = re.compile(r"^[a-z][a-z0-9_]{0,63}\.[a-z][a-z0-9_]{0,63}$", re.ASCII)

Message = TypeVar("Message", bound=msgspec.Struct)

_kinds: dict[type[msgspec.Struct], str] = {}
_decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {}
_encoder: Final = msgspec.msgpack.Encoder()


def register(kind: str, message_type: type[Message]) -> type[Message]:
    """Make ``message_type`` known under ``kind`` and return it.

    The type is a frozen `msgspec.Struct` in map encoding without a tag. Raises `ValueError` for a kind or a type that
    is already known, and for a malformed kind: all of them mistakes of ours, found at import.
    """
    if _KIND.fullmatch(kind) is None:
        raise ValueError(f"{kind!r} is no kind: room.message, lower case")
    if kind in _decoders:
        raise ValueError(f"the kind {kind} is registered twice")
    if message_type in _kinds:
        raise ValueError(f"{message_type.__qualname__} is already registered as {_kinds[message_type]}")
    shape = message_type.__struct_config__
    if not shape.frozen or shape.array_like or shape.tag is not None:
        raise ValueError(f"{message_type.__qualname__} must be frozen, encoded as a map, without a tag")
    _decoders[kind] = msgspec.msgpack.Decoder(message_type)
    _kinds[message_type] = kind
    return message_type


def kind_of(message_type: type[msgspec.Struct]) -> str:
    """Return the kind of a registered type; `ValueError` for another one."""
    kind = _kinds.get(message_type)
    if kind is None:
        raise ValueError(f"{message_type.__qualname__} is no registered message")
    return kind


def kinds() -> list[str]:
    """Return every registered kind, sorted."""
    return sorted(_decoders)


def encode(message: msgspec.Struct) -> tuple[str, bytes]:
    """Return the kind and the bytes of a message; `ValueError` when its type is not registered."""
    kind = _kinds.get(type(message))
    return (kind if kind is not None else kind_of(type(message))), _encoder.encode(message)


def decode(kind: str, body: bytes | memoryview | msgspec.Raw) -> Any:
    """Return the message of ``kind`` in ``body``.

    Raises `FrameError` for an unknown kind and for bytes that are not exactly one such message within the bounds of
    `scanner`. Safe for bytes from anywhere.
    """
    scanner.check(body)
    return decode_scanned(kind, body)


def decode_scanned(kind: str, body: bytes | memoryview | msgspec.Raw) -> Any:
    """Return the message in bytes that `scanner.check` has seen already (a frame is scanned once, as a whole)."""
    decoder = _decoders.get(kind)
    if decoder is None:
        raise errors.FrameError(f"an unknown kind of message: {kind[:128]!r}", kind=kind[:128])
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError) as error:
        raise errors.FrameError(f"the bytes are no {kind}: {error}", kind=kind) from error
