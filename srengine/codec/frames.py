"""A frame: several envelopes and their raw bytes, proved by checksums. One frame is one ZeroMQ message.

::

    part 0   header (32 bytes) | envelopes: one msgpack array of `envelopes.Envelope`
    part 1   data: the bytes that belong to the envelopes, in their order, nothing between (absent when there are none)

    header, little-endian
    0   4  b"srEf"
    4   2  frame format, 1
    6   2  zero
    8   4  bytes of the envelopes
    12  4  bytes of the data
    16  8  XXH3-64 of the data; 0 when the frame is one Data that its reader proves
    24  8  XXH3-64 of the envelopes, seeded with the XXH3-64 of bytes 0 to 24 of the header

Both checksums are verified before anything is believed. They find damage, not malice: authenticity is CURVE's
business. The items of a stream that is opened as *proved* carry a digest of their own, as snapshots do: hashing them
twice at both ends would cost a third of what bulk can carry.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import xxhash

from srengine import errors, limits
from srengine._native import frame
from srengine.codec import scanner
from srengine.codec.envelopes import Answer, Ask, Data, Envelope, Post

PROTOCOL_VERSION: Final = 1
"""Said at hello; raised with every change that an older release would misunderstand."""
PROTOCOL_VERSION_MIN: Final = 1
"""The oldest that this release still speaks."""
FRAME_FORMAT: Final = 1
MAGIC: Final = b"srEf"
_HEADER: Final = struct.Struct("<4sHHIIQQ")
HEADER_BYTES: Final = _HEADER.size
_CHECKED_BYTES: Final = HEADER_BYTES - 8

_ONE_DATA: Final = b"\x91\x96\x05"
"""How the envelopes of a bulk frame begin: one `Data` with exactly its own fields. Three numbers and two truth values:
there is nothing in it for the scanner to find that the typed decoder does not."""
_ONE_DATA_BYTES_MAX: Final = 32

_NO_DATA: Final = memoryview(b"")

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(list[Envelope])

Chunk = bytes | bytearray | memoryview


def pack(envelopes: Sequence[Envelope], chunks: Sequence[Chunk] = ()) -> list[Chunk]:
    """Return the parts of a frame. ``chunks`` are the data of the envelopes in order; a single one is not copied."""
    body = _encoder.encode(envelopes)
    if not chunks:
        return [frame.sealed(body, 0, 0)]
    data: Chunk = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    size = len(data)
    if not size:
        return [frame.sealed(body, 0, 0)]
    return [frame.sealed(body, size, 0 if is_proved(envelopes) else xxhash.xxh3_64_intdigest(data)), data]


def unpack(parts: Sequence[Any], *, data_bytes_max: int) -> tuple[list[Envelope], memoryview]:
    """Return the envelopes and the data of a frame; nothing is copied out of the data. ``parts``: buffers of any kind.

    ``data_bytes_max`` bounds part 1, as the receiving port does. Raises `FrameError`; `UnsupportedFeature` for another
    frame format, naming both.
    """
    count = len(parts)
    if not 1 <= count <= 2:
        raise errors.FrameError(f"a frame of {count} parts")
    first = bytes(parts[0])
    data = memoryview(parts[1]) if count == 2 else _NO_DATA
    data_bytes = data.nbytes
    data_checksum = frame.proved(first, data_bytes)
    if data_checksum < 0 or data_bytes > data_bytes_max:
        raise _refusal(first, data_bytes)
    body = first[HEADER_BYTES:]
    one_data = body.startswith(_ONE_DATA) and len(body) <= _ONE_DATA_BYTES_MAX
    if not one_data:
        # The list and the envelope around a message are two levels more than the message has.
        scanner.check(body, depth_max=limits.MESSAGE_DEPTH_MAX + 2)
    try:
        envelopes = _decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError) as error:
        raise errors.FrameError(f"a frame's envelopes cannot be read: {error}") from error
    if not 1 <= len(envelopes) <= limits.ENVELOPES_MAX:
        raise errors.FrameError(f"{len(envelopes)} envelopes in one frame")
    if len(envelopes) == 1:
        declared, proved = inline_bytes(envelopes[0]), is_proved(envelopes)
    else:
        declared, proved = sum(map(inline_bytes, envelopes)), False
    if (xxhash.xxh3_64_intdigest(data) if data_bytes and not proved else 0) != data_checksum:
        raise errors.FrameError("the checksum of a frame's data does not fit")
    if data_bytes != declared:
        raise errors.FrameError(f"a frame's {data_bytes} bytes of data are not what its envelopes declare")
    return envelopes, data


def _refusal(first: bytes, data_bytes: int) -> errors.FrameError | errors.UnsupportedFeature:
    """Return what is wrong with the head of a frame, or with its envelopes' checksum, or with the bytes of its data."""
    if len(first) < HEADER_BYTES or first[:4] != MAGIC:
        return errors.FrameError(f"{len(first)} bytes that are no frame of ours")
    _, form, zero, body_bytes, declared, _, checksum = _HEADER.unpack_from(first)
    if form != FRAME_FORMAT:
        return errors.UnsupportedFeature(
            f"the peer sends frame format {form}, this version reads {FRAME_FORMAT}", theirs=form, ours=FRAME_FORMAT
        )
    body = first[HEADER_BYTES:]
    right = xxhash.xxh3_64_intdigest(body, seed=xxhash.xxh3_64_intdigest(first[:_CHECKED_BYTES])) == checksum
    if not right and not zero and (body_bytes, declared) == (len(body), data_bytes):
        return errors.FrameError("the checksum of a frame's envelopes does not fit")
    return errors.FrameError(
        f"a frame declares {body_bytes} and {declared} bytes, and has {len(body)} and {data_bytes}"
    )


def is_proved(envelopes: Sequence[Envelope]) -> bool:
    """Return whether the frame's data are proved by who asked for them: one Data of a stream that was opened so."""
    return len(envelopes) == 1 and isinstance(envelopes[0], Data) and envelopes[0].proved


def inline_bytes(envelope: Envelope) -> int:
    """Return how many bytes of the frame's data belong to ``envelope``.

    Attachments travel in the frame of their envelope when together they are at most ``limits.PART_BYTES_MAX``; larger
    ones follow as `Data`.
    """
    # Not by patterns: this is asked of every envelope, and most are of the first kinds.
    if isinstance(envelope, Post):
        return envelope.size
    if isinstance(envelope, Ask) or isinstance(envelope, Answer):  # noqa: SIM101  (twice as fast)
        total = sum(envelope.sizes) if envelope.sizes else 0
        return total if total <= limits.PART_BYTES_MAX else 0
    return envelope.size if isinstance(envelope, Data) else 0
