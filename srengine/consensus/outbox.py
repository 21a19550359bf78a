"""What is to be sent to each node at the end of a turn: messages of all groups, in order, in few bundles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from srengine import limits
from srengine.consensus.entries import bytes_of
from srengine.consensus.messages import Append, Bundle, Message
from srengine.types import NodeId

BUNDLE_BYTES_TARGET: Final = limits.MIB
"""No further message joins a bundle that has grown to this."""

Outbox = dict[NodeId, list[Message]]


def message_bytes(message: Message) -> int:
    """Return what a message counts against bounds in bytes."""
    if isinstance(message, Append) and message.entries:
        return 256 + bytes_of(message.entries)
    return 256


def bundles(messages: list[Message], before: Sequence[Bundle] = ()) -> list[Bundle]:
    """Return the messages of one peer in as few bundles as their size allows.

    ``before``: those of another peer. Of one group alone all peers hear the same as a rule, and it is made once.
    """
    if len(messages) == 1:
        if before and len(before[0].messages) == 1 and before[0].messages[0] is messages[0]:
            return [before[0]]
        return [Bundle((messages[0],))]
    found: list[Bundle] = []
    start = size = 0
    for position, message in enumerate(messages):
        more = message_bytes(message)
        if position > start and size + more > BUNDLE_BYTES_TARGET:
            found.append(Bundle(tuple(messages[start:position])))
            start, size = position, 0
        size += more
    found.append(Bundle(tuple(messages[start:])))
    return found
