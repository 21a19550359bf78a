"""Messages of a turn: in few bundles."""

from __future__ import annotations

from srengine import limits
from srengine.consensus.messages import Append, AppendReply, Bundle
from srengine.consensus.outbox import bundles
from tests.consensus.logs import NODES, entry

A, B, _ = NODES


def append(round_, commit, entries=(), group="journal", term=1):
    return Append(group, term, A, 0, 0, commit, round_, tuple(entries))


def test_bundles_are_few_and_bounded():
    """Messages of one node share bundles, in order; a bundle ends when it has grown, a large message goes alone."""
    reply = AppendReply("journal", 1, B, True, 1, 1)
    assert bundles([reply]) == [Bundle((reply,))]
    assert bundles([reply] * 100) == [Bundle((reply,) * 100)]
    large = append(1, 0, [entry(1, data=bytes(limits.MIB))])
    assert bundles([reply, large, reply]) == [Bundle((reply,)), Bundle((large,)), Bundle((reply,))]
