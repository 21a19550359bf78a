"""The routing around messages. An envelope is a msgpack array whose first element says which one it is.

::

    caller                                             callee
      | Ask(request 7, kind, body, sizes) --------------> |     a question; small attachments are in the same frame
      | <-------------- Answer(request 7, kind, body) --- |     or Failure(request 7, code, message)
      |                                                   |
      | Open(request 8, kind, body, credit 16) ---------> |     a stream of items
      | <------------ Data(request 8, 0, size, last) ---- |     one piece of an item; each takes one credit
      | <------------ Data(request 8, 1, size, last) ---- |
      | Credit(request 8, 4) ---------------------------> |     four more may come
      | <------------------------------ End(request 8) -- |     or Failure
      |                                                   |
      | Post(kind, body, total) ------------------------> |     said, not asked: no answer
      | <--------------------------------- Taken(total) - |     posts were taken in up to there

Attachments of an Ask or Answer that together exceed ``limits.PART_BYTES_MAX`` are not in its frame. The receiver
answers with Credit as soon as it has room for the whole, and they come as Data of the same request.

Request ids count up on each connection; one that was seen is never answered again. New fields are appended with
defaults; a receiver ignores what it does not know.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""A size or number that every language can hold."""
RequestId = Annotated[int, msgspec.Meta(ge=1, le=2**53)]

NOTHING: Final = msgspec.Raw(b"\xc0")


class Ask(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A question. ``sizes``: bytes of each attachment. ``timeout_ms``: how long the caller will wait, 0 when not
    said.
    """

    request: RequestId
    kind: str
    body: msgspec.Raw
    sizes: tuple[Count, ...] = ()
    timeout_ms: Count = 0


class Answer(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The answer to the Ask of the same request."""

    request: RequestId
    kind: str
    body: msgspec.Raw
    sizes: tuple[Count, ...] = ()


class Failure(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The request failed: a code of `srengine.errors`, a sentence, the facts."""

    request: RequestId
    code: str
    message: str
    details: dict[str, Any] = {}


class Open(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Ask for a stream; ``credit`` pieces may come before more is granted. ``proved``: its reader proves the items."""

    request: RequestId
    kind: str
    body: msgspec.Raw
    credit: Count
    proved: bool = False


class Data(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """One piece, ``size`` bytes of the frame's data. ``number`` counts from 0; ``last``: the item ends with this
    piece; ``proved``: no checksum of the frame covers it, because the stream was opened so.
    """

    request: RequestId
    number: Count
    size: Count
    last: bool
    proved: bool = False


class Credit(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """So many more pieces of this request may come."""

    request: RequestId
    pieces: Count


class End(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """The stream is complete."""

    request: RequestId


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """The caller has lost interest: end the stream, or drop attachments that are still on their way."""

    request: RequestId


class Post(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """A message that gets no answer. ``total``: bytes of all posts of this connection up to the end of this one.

    ``size``: 0 when the body is here; else ``body`` is nil and the body is so many bytes of the frame's data.
    """

    kind: str
    body: msgspec.Raw
    total: Count
    size: Count = 0


class Taken(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """The callee has taken in the post that ended at ``total``: what came before it is not on its way any more."""

    total: Count


Envelope = Ask | Answer | Failure | Open | Data | Credit | End | Cancel | Post | Taken
