"""Epochs: one winner for each, chained, and every break of the chain is found."""

from __future__ import annotations

import random

import msgspec
import pytest

from srengine import errors
from srengine.ha import epochs as e
from srengine.ha.journal import Command
from srengine.ha.verify import check_epoch_rows
from srengine.storage.report import VerifyReport
from tests.ha.agreed import bootstrap, node_id


def claim_of(node, number: int, **changed) -> Command:
    made = e.claim(node.store, node_id=node_id(number), name=f"n{number}", term=1)
    fence = msgspec.msgpack.decode(made.body, type=e.Fence)
    return Command(e.FENCE, msgspec.msgpack.encode(msgspec.structs.replace(fence, **changed)))


def test_epochs_begin_at_one_and_chain(node):
    """The first epoch is 1; each record names its predecessor, its owner, its term and its index."""
    assert e.newest_epoch(node.store) == (0, e.FIRST_DIGEST)
    node.must(bootstrap())
    node.fence(1, term=3)
    node.fence(2, term=5)
    first, second = e.read_epoch(node.store, 1), e.read_epoch(node.store, 2)
    assert (first.epoch, first.node_id, first.term, first.index, first.predecessor) == (1, node_id(1), 3, 2, 0)
    assert (second.epoch, second.name, second.term, second.index, second.predecessor) == (2, "n2", 5, 3, 1)
    assert second == e.chained(e.Fence(2, node_id(2), "n2", 5, 1, first.digest), 3)
    assert e.newest_epoch(node.store) == (2, second.digest)
    assert e.check_epochs(node.store) == 2
    assert e.read_epoch(node.store, 3) is None


def test_one_of_sixteen_contenders_wins(node):
    """B04: sixteen claims of the same epoch, in any order, a hundred times: exactly one wins each, epochs grow by
    one.
    """
    dice = random.Random(4)
    for round_number in range(1, 101):
        claims = [claim_of(node, number) for number in range(16)]
        dice.shuffle(claims)
        outcomes = [node.put(each).refusal for each in claims]
        assert outcomes[0] is None
        assert all(isinstance(refusal, errors.EpochTaken) for refusal in outcomes[1:])
        assert e.newest_epoch(node.store)[0] == round_number
    assert e.check_epochs(node.store) == 100


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"epoch": 3}, errors.EpochTaken),
        ({"epoch": 1}, errors.EpochTaken),
        ({"epoch": 0}, errors.EpochTaken),
        ({"predecessor": 0}, errors.EpochTaken),
        ({"predecessor_digest": bytes(16)}, errors.EpochTaken),
        ({"term": -1}, errors.InvalidValue),
        ({"term": 1 << 63}, errors.InvalidValue),
        ({"name": "no name"}, errors.InvalidValue),
    ],
)
def test_a_claim_that_does_not_follow_is_refused(node, changed, kind):
    """B02: KEYEXIST when the number is taken, skipped, or stands on another past; nothing is changed."""
    node.must(bootstrap())
    node.fence()
    node.refused(claim_of(node, 2, **changed), kind)
    assert e.newest_epoch(node.store)[0] == 1
    assert e.check_epochs(node.store) == 1


def put_row(store, key: bytes, value: bytes | None) -> None:
    with store.transaction() as transaction:
        if value is None:
            transaction.delete(e.EPOCH_TABLE, key)
        else:
            transaction.put(e.EPOCH_TABLE, key, value)


def record(store, epoch: int) -> e.EpochRecord:
    found = e.read_epoch(store, epoch)
    assert found is not None
    return found


def key(epoch: int) -> bytes:
    return epoch.to_bytes(8, "big")


def changed(store, epoch: int, /, **fields) -> None:
    put_row(store, key(epoch), msgspec.msgpack.encode(msgspec.structs.replace(record(store, epoch), **fields)))


BREAKS = {
    "the first is deleted": lambda store: put_row(store, key(1), None),
    "one is deleted": lambda store: put_row(store, key(3), None),
    "the last is deleted": lambda store: put_row(store, key(5), None),
    "the name is changed": lambda store: changed(store, 3, name="n7"),
    "the owner is changed": lambda store: changed(store, 5, node_id=node_id(7)),
    "the index is changed": lambda store: changed(store, 2, index=99),
    "the term is changed": lambda store: changed(store, 4, term=1),
    "the digest is changed": lambda store: changed(store, 5, digest=bytes(16)),
    "the number is changed": lambda store: changed(store, 4, epoch=40),
    "one stands in another's place": lambda store: put_row(store, key(4), store.get(e.EPOCH_TABLE, key(3))),
    "the last stands twice": lambda store: put_row(store, key(6), store.get(e.EPOCH_TABLE, key(5))),
    "one follows that nobody made": lambda store: put_row(
        store,
        key(6),
        msgspec.msgpack.encode(e.chained(e.Fence(6, node_id(1), "n1", 9, 5, record(store, 5).digest), 99)),
    ),
    "no msgpack": lambda store: put_row(store, key(2), b"\xff"),
    "a number that does not fit": lambda store: changed(store, 2, term=1 << 63),
    "a strange key": lambda store: put_row(store, b"x", b"y"),
}


@pytest.mark.parametrize("how", list(BREAKS))
def test_every_break_of_the_chain_is_found(node, how):
    """B05: a deleted, changed, duplicated or added record is found at start and by verify, which names it."""
    node.must(bootstrap())
    for number in range(1, 6):
        node.fence(number, term=number)
    assert e.check_epochs(node.store) == 5
    BREAKS[how](node.store)
    with pytest.raises(errors.CorruptionError, match="chain of epochs"):
        e.check_epochs(node.store)
    root = node.store.path.parent
    node.store.close()
    report = VerifyReport()
    check_epoch_rows(root / "meta", report)
    assert not report.clean
    assert {damage.kind for damage in report.damages} == {"epoch"}


def test_a_whole_chain_is_clean_offline(node):
    """B05: verify finds nothing in what nobody has touched."""
    root = node.store.path.parent
    node.must(bootstrap())
    for number in range(1, 4):
        node.fence(number)
    node.store.close()
    report = VerifyReport()
    check_epoch_rows(root / "meta", report)
    assert report.clean


def test_findings_are_bounded():
    """A table full of damage says so a hundred times, not a million."""
    rows = [(key(number), b"\xff") for number in range(1, 1000)]
    assert len(list(e.findings(rows, None))) == e.FINDINGS_MAX
