"""Messages of a turn: few bundles, and news that waits."""

from __future__ import annotations

from srengine import limits
from srengine.consensus.messages import Append, AppendReply, Bundle, ReadIndexReply
from srengine.consensus.outbox import Outbox, bundles
from tests.consensus.logs import NODES, entry

A, B, C = NODES


def append(round_, commit, entries=(), group="journal", term=1):
    return Append(group, term, A, 0, 0, commit, round_, tuple(entries))


def test_news_is_held_and_goes_with_the_next_append():
    """An Append that asks nothing new and brings no entry waits; the next one to the same node in its place is sent."""
    outbox = Outbox()
    first = append(1, 0, [entry(1)])
    outbox.post(B, first)
    assert outbox.take() == [(B, [first])]
    outbox.post(B, append(1, 1))
    assert outbox.news
    assert outbox.take() == []
    second = append(1, 1, [entry(2)])
    outbox.post(B, second)
    assert not outbox.news
    assert outbox.take() == [(B, [second])]
    outbox.release()
    assert outbox.take() == []


def test_news_is_sent_when_nothing_else_comes():
    """What is held back is sent when its time is over, the newest of each node and group, once."""
    outbox = Outbox()
    for target in (B, C):
        for group in ("journal", "tablet"):
            outbox.post(target, append(1, 0, [entry(1)], group))
            outbox.post(target, append(1, 1, group=group))
            outbox.post(target, append(1, 2, group=group))
    outbox.take()
    outbox.release()
    assert dict(outbox.take()) == {
        target: [append(1, 2, group="journal"), append(1, 2, group="tablet")] for target in (B, C)
    }
    assert not outbox.news


def test_a_heartbeat_is_never_held():
    """A new round asks for an answer, in a new term as well; the first Append to a node is one."""
    outbox = Outbox()
    beats = [append(1, 0), append(2, 0), append(2, 0, term=2), append(3, 1, term=2)]
    for beat in beats:
        outbox.post(B, beat)
    assert outbox.take() == [(B, beats)]
    assert not outbox.news


def test_an_answer_to_a_read_brings_the_news():
    """H10: who asked for an index to read at waits for the news that it is committed."""
    outbox = Outbox()
    outbox.post(B, append(1, 0))
    outbox.take()
    outbox.post(B, append(1, 5))
    answer = ReadIndexReply("journal", 1, A, 9, 5)
    outbox.post(C, answer)
    assert outbox.take() == [(C, [answer])]
    outbox.post(B, answer)
    assert outbox.take() == [(B, [append(1, 5), answer])]


def test_bundles_are_few_and_bounded():
    """Messages of one node share bundles, in order; a bundle ends when it has grown, a large message goes alone."""
    reply = AppendReply("journal", 1, B, True, 1, 1)
    assert bundles([reply]) == [Bundle((reply,))]
    assert bundles([reply] * 100) == [Bundle((reply,) * 100)]
    large = append(1, 0, [entry(1, data=bytes(limits.MIB))])
    assert bundles([reply, large, reply]) == [Bundle((reply,)), Bundle((large,)), Bundle((reply,))]
