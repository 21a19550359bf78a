"""Many tablets in one comparison: which differ, and where, by one table over the leaves of all of them."""

from __future__ import annotations

import random
import shutil

import pytest
import xxhash

from srengine import errors, limits
from srengine.codec import registry
from srengine.storage.tablet import Tablet
from srengine.sync import exchange_shared_machine, exchange_shared_messages
from srengine.sync.exchange_shared_machine import SharedInitiator, SharedResponder
from srengine.sync.exchange_shared_messages import SharedCells, SharedCompare, SharedDiffers, SharedSketch
from tests.exchanges import TabletSide, drive

RECORDS = 6000


@pytest.fixture
def groups(tmp_path):
    """A function that makes ``count`` tablets twice: two equal dictionaries {name: tablet}."""
    opened = []

    def build(count):
        result = [{}, {}]
        for number in range(count):
            name = f"{number:032x}"
            paths = [tmp_path / f"{len(opened)}-{side}" for side in range(2)]
            paths[0].mkdir()
            seed = number.to_bytes(8, "little")
            made = Tablet.create(paths[0], name, lineage="ab" * 16, seed=seed, map_bytes=1 << 24)
            made.put_many([(b"%05d" % key, b"") for key in range(RECORDS)])
            made.close()
            shutil.copytree(paths[0], paths[1])
            for side, path in enumerate(paths):
                result[side][name] = Tablet.open(path, name, map_bytes=1 << 24)
                opened.append(result[side][name])
        return result

    yield build
    for tablet in opened:
        tablet.close()


def sides(group):
    return {name: TabletSide(tablet) for name, tablet in group.items()}


def compare(here, there, seed=1, change=None):
    """Compare two groups; the outcome."""
    initiator = SharedInitiator(sides(here), random.Random(seed))
    responder = SharedResponder(sides(there))
    initiator.start()
    while True:
        effects = initiator.drain()
        if effects.outcome is not None:
            return effects.outcome
        reply = responder.step(effects.send)
        initiator.step(reply if change is None else change(reply))


def finish(outcome, here, there):
    """Run the exchange of each tablet that differs; {name: outcome}."""
    return {name: drive(here[name], there[name], initiator=initiator) for name, initiator in outcome.exchanges.items()}


def assert_equal(here, there):
    for name in here:
        assert (here[name].root, here[name].count, here[name].sequence) == (
            there[name].root,
            there[name].count,
            there[name].sequence,
        )


def test_equal_tablets_cost_thirty_two_bytes_each(groups):
    """K11: tablets that are equal are known to be by one message of 32 bytes each, and a byte in answer."""
    here, there = groups(8)
    outcome = compare(here, there)
    assert outcome.equal == sorted(here)
    assert outcome.exchanges == {}
    assert (outcome.figures.bytes, outcome.figures.rounds) == (8 * 32 + 1, 1)


def test_one_record_of_one_tablet_is_named_by_the_prefix(groups):
    """K11: one differing record in one of many tablets: six cells tell which, in one round trip."""
    here, there = groups(6)
    name = sorted(here)[3]
    there[name].put(b"00777", b"new")
    outcome = compare(here, there)
    assert list(outcome.exchanges) == [name]
    assert outcome.figures.rounds == 1
    assert outcome.figures.bytes == 6 * 32 + 1 + 10 + 180 + 192
    found = finish(outcome, here, there)
    assert found[name].report == [b"00777"]
    assert found[name].figures.rounds == 1
    assert_equal(here, there)


def test_differences_spread_over_tablets_share_one_table(groups):
    """K11: what differs in many tablets is located in two round trips by one table, whatever it is, and repaired; now
    and then the table does not decode (digests hold the clock, so no two runs are alike), and each goes on by itself.
    """
    shared = [spread_over_tablets(groups, run) for run in range(12)]
    assert shared.count(True) >= 10, shared


def spread_over_tablets(groups, run):
    """Make four of five tablets differ, and equal again; return whether one table located everything."""
    here, there = groups(5)
    rng = random.Random(run)
    truth = {}
    for name in rng.sample(sorted(here), 4):
        keys = rng.sample([b"%05d" % key for key in range(RECORDS)], 3)
        fresh = b"%05d!" % rng.randrange(RECORDS)
        boundary = next(
            key for key in (b"%05d?%d" % (rng.randrange(RECORDS), n) for n in range(10_000)) if is_boundary(name, key)
        )
        here[name].put(keys[0], b"here")
        there[name].put_many([(keys[1], b"there"), (boundary, b"a leaf begins")])
        there[name].delete(keys[2])
        (here if rng.random() < 0.5 else there)[name].put(fresh, b"one side")
        truth[name] = sorted({*keys, fresh, boundary})
    outcome = compare(here, there, run)
    assert outcome.equal == sorted(set(here) - set(truth))
    assert sorted(outcome.exchanges) == sorted(truth)
    assert outcome.figures.rounds == 2
    found = finish(outcome, here, there)
    assert_equal(here, there)
    for name, keys in truth.items():
        assert set(keys) <= set(found[name].report)
        assert found[name].unproven == 0
    modes = {one.figures.mode for one in found.values()}
    assert modes in ({"shared"}, {"leaf"}), modes
    assert sum(len(one.report) for one in found.values()) <= sum(map(len, truth.values())) + 1
    # One table for all: four comparisons by themselves take 1 300 bytes each.
    assert outcome.figures.bytes < 0.7 * 4 * 1300
    return modes == {"shared"}


def is_boundary(name, key):
    return xxhash.xxh3_64_intdigest(key, seed=int(name, 16)) & 31 == 0


def test_a_table_that_is_too_small_leaves_each_tablet_to_itself(groups, monkeypatch):
    """K11: when the shared table cannot be read, each tablet that differs is compared by itself; the reason is said."""
    monkeypatch.setattr(exchange_shared_machine, "upper", lambda records: 1.0)
    here, there = groups(3)
    for name in here:
        there[name].put_many([(b"%05d" % (31 * key), b"x") for key in range(40)])
    monkeypatch.setattr(exchange_shared_machine, "LEAF_MODE_SHARE", 1.0)
    outcome = compare(here, there)
    assert outcome.figures.reasons == ["the sketch could not be read"]
    found = finish(outcome, here, there)
    assert all(one.report == [b"%05d" % (31 * key) for key in range(40)] for one in found.values())
    assert_equal(here, there)


def test_much_that_differs_leaves_each_tablet_to_itself(groups):
    """K11: above a sixteenth of the leaves no shared table is tried."""
    here, there = groups(2)
    for name in here:
        there[name].put_many([(b"%05d" % (7 * key), b"x") for key in range(100)])
    outcome = compare(here, there)
    assert outcome.figures.reasons == ["too much differs for one table over leaves"]
    assert outcome.figures.rounds == 1
    finish(outcome, here, there)
    assert_equal(here, there)


def test_writes_at_the_responder_do_not_disturb(groups):
    """K11: what the responder writes between the table and the fetch comes with the answer."""
    here, there = groups(3)
    for name in here:
        there[name].put_many([(b"%05d" % (131 * key), b"x") for key in range(4)])
    outcome = compare(here, there)
    for name in here:
        there[name].put(b"00003", b"meanwhile")
    found = finish(outcome, here, there)
    assert all(one.unproven == 0 for one in found.values())
    assert_equal(here, there)


def test_a_lie_in_the_shared_table_is_not_believed(groups):
    """F47: cells that were tampered with send each tablet a longer way, never to a wrong end."""
    here, there = groups(2)
    for case in range(30):
        rng = random.Random(case)

        def garble(reply, rng=rng):
            body = bytearray(reply.body)
            for _ in range(rng.choice((1, 3, 40))):
                body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
            return type(reply)(bytes(body))

        for name in here:
            there[name].put_many([(b"%05d" % rng.randrange(RECORDS), b"%d" % case) for _ in range(3)])
        try:
            outcome = compare(here, there, case, garble)
        except errors.FrameError:
            continue
        assert outcome.figures.rounds <= 2
        for one in finish(outcome, here, there).values():
            assert one.figures.rounds <= limits.EXCHANGE_ROUNDS_MAX
        for name in outcome.exchanges:
            assert here[name].root == there[name].root


def test_malformed_answers_and_requests_are_refused(groups):
    """F47: counts, places and sizes beyond bounds raise FrameError on both sides before memory is given to them."""
    here, there = groups(2)
    names = tuple(sorted(here))
    responder = SharedResponder(sides(there))
    for body in (b"", b"x" * 63, b"x" * 65):
        with pytest.raises(errors.FrameError):
            responder.step(SharedCompare(names, body))
    for tablets in ((), names[::-1], (names[0], names[0]), tuple(f"{n:032x}" for n in range(2000))):
        with pytest.raises(errors.FrameError):
            responder.step(SharedCompare(tablets, b"x" * 32 * len(tablets)))
    with pytest.raises(errors.NotFound):
        responder.step(SharedCompare(("ff" * 16,), b"x" * 32))
    for ways, width in ((3, limits.EXCHANGE_CELLS_MAX), (9, 4), (3, 0)):
        shape = exchange_shared_messages.Shape(True, ways, width, 1)
        with pytest.raises(errors.FrameError):
            responder.step(SharedSketch(names, exchange_shared_messages.encode_shape(shape)))
    for reply in (
        SharedDiffers(b""),
        SharedDiffers(b"\x03" + b"\0" * 402),
        SharedDiffers(b"\x01" + b"\x07\0" + b"\0" * 380),
        SharedDiffers(b"\x02" + 2 * (b"\0\0" + b"\0" * 8) + b"\0" * 372),
        SharedDiffers(b"\xff\xff\xff\xff\xff"),
        SharedCells(b"\0" * 100),
    ):
        initiator = SharedInitiator(sides(here), random.Random(1))
        initiator.start()
        with pytest.raises(errors.FrameError):
            initiator.step(reply)
        assert initiator.drain().outcome is None
        with pytest.raises(errors.FrameError):
            initiator.step(SharedDiffers(b"\0"))


def test_no_answer_times_out(groups):
    """F47: a responder that does not answer is given up."""
    here, _ = groups(1)
    initiator = SharedInitiator(sides(here), random.Random(1))
    initiator.start()
    initiator.tick(100.0)
    initiator.tick(100.0 + exchange_shared_machine.REPLY_TIMEOUT_S)
    with pytest.raises(errors.TimedOut):
        initiator.tick(100.1 + exchange_shared_machine.REPLY_TIMEOUT_S)


def test_every_message_survives_the_codec():
    """The messages are registered under their names and come back as they were."""
    for message in (
        SharedCompare(("a", "b"), b"x" * 64),
        SharedDiffers(b"\0"),
        SharedSketch(("a",), b"y" * 13),
        SharedCells(b"z" * 38),
    ):
        assert registry.decode(*registry.encode(message)) == message
