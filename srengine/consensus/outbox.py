"""What is to be sent to each node: messages in order, in few bundles, and news that can wait.

A leader that calls an entry committed tells its followers by an `Append` without entries. Nobody waits for that, and a
moment later the next entries or the next heartbeat say the same. So such a message is held back for a little while, and
dropped when a later `Append` to the same node has gone: under load, and for one write after another, it never costs a
frame, a turn of the follower, and an answer of its own. Messages may be lost and late anyway: nothing depends on it::

    commit 7 -> Append(commit 7)  held ....... Append(8, commit 7) sent: the held one is dropped
                                  held ....... nothing came: sent after `driver.NEWS_S`
                                  held ....... ReadIndexReply: its asker waits for the news, both are sent
"""

from __future__ import annotations

from typing import Final

from srengine import limits
from srengine.consensus.log import entry_bytes
from srengine.consensus.messages import Append, Bundle, Message, ReadIndexReply
from srengine.types import NodeId

BUNDLE_BYTES_TARGET: Final = limits.MIB
"""No further message joins a bundle that has grown to this."""


class Outbox:
    """Messages of all groups that leave at the end of the turn, and news that is held back."""

    def __init__(self) -> None:
        self.messages: dict[NodeId, list[Message]] = {}
        """To be sent; see `take`."""
        self.news: dict[tuple[NodeId, str], Append] = {}
        """Held back, at most one a node and group; see `release`."""
        self._rounds: dict[tuple[NodeId, str], tuple[int, int]] = {}
        """(term, round) of the last `Append` to a node in a group: another one that asks nothing new is news."""

    def post(self, target: NodeId, message: Message) -> None:
        """Have a message sent, or held back."""
        if isinstance(message, Append):
            key = (target, message.group)
            self.news.pop(key, None)
            asked = (message.term, message.round)
            if not message.entries and self._rounds.get(key) == asked:
                self.news[key] = message
                return
            self._rounds[key] = asked
        elif isinstance(message, ReadIndexReply):
            news = self.news.pop((target, message.group), None)
            if news is not None:
                self.messages.setdefault(target, []).append(news)
        self.messages.setdefault(target, []).append(message)

    def release(self) -> None:
        """Have everything sent that was held back."""
        news, self.news = self.news, {}
        for (target, _), message in news.items():
            self.messages.setdefault(target, []).append(message)

    def take(self) -> list[tuple[NodeId, list[Message]]]:
        """Return what is to be sent now, and forget it."""
        messages, self.messages = self.messages, {}
        return list(messages.items())


def message_bytes(message: Message) -> int:
    """Return what a message counts against bounds in bytes."""
    if isinstance(message, Append) and message.entries:
        return 256 + sum(map(entry_bytes, message.entries))
    return 256


def bundles(messages: list[Message]) -> list[Bundle]:
    """Return the messages of one peer in as few bundles as their size allows."""
    if len(messages) == 1:
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
