"""The bounded look at msgpack before anything is built from it.

msgspec builds values of the wanted type and skips what it does not know; left alone it would let the last of two equal
map keys win, accept NaN, follow unknown fields as deep as the interpreter's stack, and believe a declared count.
`check` walks the bytes once, without recursion and without building anything, and refuses (`FrameError`):

* depth above `limits.MESSAGE_DEPTH_MAX` (``scan depth`` counts arrays and maps around a value);
* a string, array or map that declares more than what is left;
* a map with two equal keys, or with a key that is no string;
* NaN and infinities: no message means anything by them, and NaN is not equal to itself;
* text that is not UTF-8, extension types, the byte 0xc1, and bytes behind the end.

Cost: memory is bounded by the depth and by the keys of the open maps, time is linear in the bytes. What is plain, which
is nearly everything, is recognised by a kernel (ext/scan.pyx, 20 times as fast); it refuses nothing itself.
"""

from __future__ import annotations

import math
import struct
from typing import Final

import msgspec

from srengine import errors, limits
from srengine._native import scan

_FLOAT32: Final = struct.Struct(">f")
_FLOAT64: Final = struct.Struct(">d")

# What follows a first byte >= 0xc0: (meaning, size). "skip": size bytes of scalar; the others: size bytes of length or
# count.
_LONG: Final[dict[int, tuple[str, int]]] = {
    0xC0: ("skip", 0),
    0xC2: ("skip", 0),
    0xC3: ("skip", 0),
    0xC4: ("bytes", 1),
    0xC5: ("bytes", 2),
    0xC6: ("bytes", 4),
    0xCA: ("float", 4),
    0xCB: ("float", 8),
    0xCC: ("skip", 1),
    0xCD: ("skip", 2),
    0xCE: ("skip", 4),
    0xCF: ("skip", 8),
    0xD0: ("skip", 1),
    0xD1: ("skip", 2),
    0xD2: ("skip", 4),
    0xD3: ("skip", 8),
    0xD9: ("text", 1),
    0xDA: ("text", 2),
    0xDB: ("text", 4),
    0xDC: ("array", 2),
    0xDD: ("array", 4),
    0xDE: ("map", 2),
    0xDF: ("map", 4),
}


def _refuse(what: str, offset: int) -> errors.FrameError:
    return errors.FrameError(f"{what} at byte {offset}", offset=offset)


def _head(data: bytes, offset: int) -> tuple[str, int, int]:
    """Return (meaning, size or count, offset of what follows) of the value that starts at ``offset``."""
    first = data[offset]
    if first < 0x80 or first >= 0xE0:
        return "skip", 0, offset + 1
    if first < 0x90:
        return "map", first & 0x0F, offset + 1
    if first < 0xA0:
        return "array", first & 0x0F, offset + 1
    if first < 0xC0:
        return "text", first & 0x1F, offset + 1
    known = _LONG.get(first)
    if known is None:
        raise _refuse(f"the byte {first:#x} starts no value of ours", offset)
    meaning, size = known
    if meaning in {"skip", "float"}:
        return meaning, size, offset + 1
    start = offset + 1 + size
    if start > len(data):
        raise _refuse("a length that ends behind the bytes", offset)
    return meaning, int.from_bytes(data[offset + 1 : start], "big"), start


def check(buffer: bytes | memoryview | msgspec.Raw, *, depth_max: int = limits.MESSAGE_DEPTH_MAX) -> None:
    """Raise `FrameError` unless ``buffer`` is exactly one msgpack value within the bounds of this module."""
    if not scan.is_plain(buffer, depth_max):
        look_closely(bytes(buffer), depth_max)


def look_closely(data: bytes, depth_max: int) -> None:
    """Decide about bytes that are not plain, and say what is wrong with them."""
    end = len(data)
    offset = 0
    # One entry for each open array or map: values still to come. For a map both keys and values count, and `keys` holds
    # the keys seen; a key is next when the number to come is even.
    left: list[int] = [1]
    keys: list[set[bytes] | None] = [None]
    while left:
        if left[-1] == 0:
            left.pop()
            keys.pop()
            continue
        if offset >= end:
            raise _refuse("a message that ends too early", offset)
        seen = keys[-1]
        key_next = seen is not None and left[-1] % 2 == 0
        left[-1] -= 1
        start = offset
        meaning, size, offset = _head(data, offset)
        if meaning in {"array", "map"}:
            if key_next:
                raise _refuse("a map key that is no text", start)
            count = size * 2 if meaning == "map" else size
            if count > end - offset:
                raise _refuse(f"{size} values declared where {end - offset} bytes are left", start)
            if len(left) > depth_max:
                raise _refuse(f"values nested deeper than {depth_max}", start)
            left.append(count)
            keys.append(set() if meaning == "map" else None)
            continue
        after = offset + size
        if after > end:
            raise _refuse(f"{size} bytes declared where {end - offset} are left", start)
        if meaning == "text":
            _check_text(data[offset:after], seen if key_next else None, start)
        elif key_next:
            raise _refuse("a map key that is no text", start)
        elif meaning == "float":
            (value,) = (_FLOAT32 if size == 4 else _FLOAT64).unpack_from(data, offset)
            if not math.isfinite(value):
                raise _refuse(f"the number {value}", start)
        offset = after
    if offset != end:
        raise _refuse(f"{end - offset} bytes behind the message", offset)


def _check_text(text: bytes, keys: set[bytes] | None, start: int) -> None:
    if not text.isascii():
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise _refuse("text that is not UTF-8", start) from error
    if keys is not None:
        if text in keys:
            raise _refuse(f"the map key {text[:64]!r} twice", start)
        keys.add(text)
