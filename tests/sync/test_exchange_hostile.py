"""Peers that lie on purpose: what they can make us do is bounded in requests, work and memory; nothing is changed."""

from __future__ import annotations

import random
import shutil
import struct
import tracemalloc

import pytest

from srengine import errors, limits
from srengine._native import merkle
from srengine.storage.tablet import Tablet
from srengine.sync import exchange_messages as messages
from srengine.sync.exchange_machine import Initiator
from srengine.sync.exchange_messages import (
    ExchangeClose,
    ExchangeCompare,
    ExchangeDiffers,
    ExchangeDump,
    ExchangeEqual,
    ExchangeFetch,
    ExchangeFull,
    ExchangePrepare,
    ExchangePrepared,
    ExchangeSketch,
    ExchangeTables,
    Reason,
)
from srengine.sync.exchange_responder_machine import Responder
from srengine.types import Listed, Located
from tests.exchanges import TabletSide, exchange

TABLET = "00" * 16
RECORDS = 4000
MEMORY_BYTES_MAX = 48 << 20
"""What a hostile message may cost a tablet of so many records; most of it is the message itself."""


@pytest.fixture
def pair(tmp_path):
    """Two tablets that differ in some records."""
    paths = [tmp_path / "0", tmp_path / "1"]
    paths[0].mkdir()
    made = Tablet.create(paths[0], TABLET, lineage="cd" * 16, seed=b"abcdefgh", map_bytes=1 << 26)
    made.put_many([(b"%05d" % number, b"x" * 40) for number in range(RECORDS)])
    made.close()
    shutil.copytree(paths[0], paths[1])
    one, other = (Tablet.open(path, TABLET, map_bytes=1 << 26) for path in paths)
    other.put_many([(b"%05d" % (41 * number), b"there") for number in range(30)])
    one.put(b"only here", b"")
    yield one, other
    one.close()
    other.close()


class Hostile:
    """A responder that answers with what ``lie`` makes of (number of the request, request, honest answer)."""

    def __init__(self, tablet, lie):
        self._honest, self._lie = Responder(TabletSide(tablet)), lie
        self.requests = 0

    def step(self, request):
        self.requests += 1
        return self._lie(self.requests, request, self._honest.step(request))


def against(tablet, hostile, **options):
    """Run an exchange to its end; (outcome or the error, attempts to repair). Measures the memory it took."""
    initiator = Initiator("t", TabletSide(tablet), random.Random(1), **options)
    repairs = 0
    tracemalloc.start()
    try:
        initiator.start()
        while True:
            effects = initiator.drain()
            if effects.outcome is not None:
                return effects.outcome, repairs
            if effects.announce is not None:
                hostile.step(effects.announce.message)
                initiator.announced()
                continue
            if effects.send is not None:
                initiator.step(*hostile.step(effects.send.message))
                continue
            repairs += 1
            work = effects.apply
            try:
                tablet.repair(
                    work.rows, work.removed, work.meta, work.state, replace_rows=work.replace_rows, base=work.base
                )
                initiator.applied(proved=True)
            except (errors.Diverged, errors.FrameError):
                initiator.applied(proved=False)
    except errors.FrameError as error:
        assert initiator.drain() == type(effects)()
        return error, repairs
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY_BYTES_MAX, peak


def count(number):
    return messages.encode_number(number)


def ranges(*pairs):
    return messages.encode_located(Located([], [], list(pairs)))


def close(located, attachments, flags=b"\0"):
    return ExchangeClose(flags + located), attachments


EVERYTHING = [(b"", None)]
NOTHING = b"\0\0\0\0"
NOISE = random.Random(7).randbytes(1 << 20)
IDS = b"".join(struct.pack("<HI", 1, number) for number in range(200_000))


def always(change):
    """Lie in the message that brings records; be honest before it."""

    def lie(number, request, honest):
        reply, attachments = honest
        return change(attachments) if isinstance(reply, ExchangeClose) else honest

    return lie


LIES = {
    "endless differences: every estimator is full": lambda number, request, honest: (
        (ExchangeDiffers(b"\0" * 8 + NOISE[: 180 + merkle.ESTIMATOR_BYTES]), ())
        if isinstance(request, ExchangeCompare)
        else honest
    ),
    "always another table": lambda number, request, honest: (
        (
            ExchangeTables(
                struct.pack("<QBIQ", number, 3, 40, number)
                + NOISE[: messages.decode_sketch(request.body)[0].cells_bytes]
                + NOISE[: 120 * (30 if messages.decode_sketch(request.body)[0].by_leaf else 17)]
            ),
            (),
        )
        if isinstance(request, ExchangeSketch)
        else honest
    ),
    "a second table beyond bounds": lambda number, request, honest: (
        (ExchangeTables(struct.pack("<QBIQ", 0, 5, limits.EXCHANGE_CELLS_MAX, 1) + NOISE), ())
        if isinstance(request, ExchangeSketch)
        else honest
    ),
    "no records at all": always(lambda parts: close(NOTHING, (b"", *parts[1:]))),
    "everything is to be removed": always(lambda parts: close(ranges(*EVERYTHING), (b"", *parts[1:]))),
    "a range ten thousand times": always(lambda parts: close(ranges(*EVERYTHING * 4000), parts)),
    "more ranges than bounds": always(lambda parts: close(b"\0\0" + count(5000) + b"\0" * 30_000, parts)),
    "ranges out of order": always(lambda parts: close(ranges((b"5", b"6"), (b"1", b"2")), parts)),
    "a range that ends before it begins": always(lambda parts: close(ranges((b"5", b"1")), parts)),
    "a key beyond bounds": always(lambda parts: close(ranges((b"k" * 600, None)), parts)),
    "two hundred thousand ids": always(lambda parts: close(b"\0" + count(200_000) + IDS + b"\0\0", parts)),
    "ids that are not there": always(lambda parts: close(b"\0" + count((1 << 28) - 1) + IDS, parts)),
    "pairs beyond 47 bits": always(lambda parts: close(b"\x01" + b"\xff" * 12 + b"\0\0\0", parts)),
    "lists of nothing: all is to be removed": always(
        lambda parts: close(messages.encode_located(Located([], [], [], (Listed(b"", None, []),))), parts)
    ),
    "a list whose records never come": always(
        lambda parts: close(
            messages.encode_located(Located([], [], [], (Listed(b"", None, [b"sixsix"] * 500),))), (b"", *parts[1:])
        )
    ),
    "lists that overlap": always(
        lambda parts: close(messages.encode_located(Located([], [], [], (Listed(b"", None, []),) * 2)), parts)
    ),
    "rows that are noise": always(lambda parts: close(NOTHING, (NOISE, *parts[1:]))),
    "rows without an end": always(lambda parts: close(NOTHING, (parts[0] * 60, *parts[1:]))),
    "a state that is noise": always(lambda parts: close(NOTHING, (*parts[:2], NOISE[:104]))),
    "meta rows that are noise": always(lambda parts: close(NOTHING, (parts[0], NOISE[:500], parts[2]))),
    "attachments missing": always(lambda parts: close(NOTHING, parts[:2])),
    "unknown flags": always(lambda parts: close(NOTHING, parts, b"\xff")),
    "bytes behind the end": always(lambda parts: close(NOTHING + b"!", parts)),
    "equal, after it differed": lambda number, request, honest: (
        (ExchangeEqual(b"\0" * 8), ()) if number > 1 else honest
    ),
    "differs, over and over": lambda number, request, honest: (
        ExchangeDiffers(b"\0" * 8 + NOISE[: 180 + merkle.ESTIMATOR_BYTES]),
        (),
    ),
    "a full copy without a reason": lambda number, request, honest: (ExchangeFull(b""), ()) if number > 1 else honest,
    "a full copy for an unknown reason": lambda number, request, honest: (
        (ExchangeFull(b"\x63"), ()) if number > 1 else honest
    ),
    "records before they were asked for": lambda number, request, honest: (
        ExchangeClose(b"\0" + NOTHING),
        (b"", b"", b""),
    ),
}


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("records", [False, True])
def test_a_hostile_responder_changes_nothing(pair, name, records):
    """F47: whatever is answered, there are at most EXCHANGE_ROUNDS_MAX requests and a few attempts to repair, memory
    stays small, the end is an error or a stated reason, and the tablet is as it was.
    """
    one, other = pair
    before = one.position, list(one.scan())
    hostile = Hostile(other, LIES[name])
    outcome, repairs = against(one, hostile, prefer_records=records)
    assert hostile.requests <= limits.EXCHANGE_ROUNDS_MAX
    assert repairs <= limits.EXCHANGE_ATTEMPTS_MAX + 1
    if isinstance(outcome, errors.FrameError):
        assert (one.position, list(one.scan())) == before
    elif outcome.full_copy is not None:
        assert (one.position, list(one.scan())) == before
        assert isinstance(outcome.full_copy, Reason)
    else:
        # It lied about sizes alone, and what came in the end was proved by its own root.
        assert (one.root, list(one.scan())) == (other.root, list(other.scan()))
        assert name in ("endless differences: every estimator is full", "always another table")


def test_an_honest_peer_after_all_of_them(pair):
    """F47: the same harness with an honest peer ends in a proved repair: what refuses the liars is not the harness."""
    one, other = pair
    outcome, repairs = against(one, Hostile(other, lambda number, request, honest: honest))
    assert (outcome.full_copy, repairs) == (None, 1)
    assert one.root == other.root


REQUESTS = {
    "a sketch beyond bounds": ExchangeSketch("t", struct.pack("<BBIQ8s", 1, 3, 1 << 31, 1, b"\0" * 8) + NOISE),
    "a sketch of no subtable": ExchangeSketch("t", struct.pack("<BBIQ8s", 1, 0, 10, 1, b"\0" * 8)),
    "a sketch of neither kind": ExchangeSketch("t", struct.pack("<BBIQ8s", 7, 3, 1, 1, b"\0" * 8) + b"\0" * 90),
    "an announcement beyond bounds": ExchangePrepare("t", struct.pack("<BIQ", 3, 1 << 31, 1)),
    "an announcement of no subtable": ExchangePrepare("t", struct.pack("<BIQ", 2, 10, 1)),
    "an announcement that goes on": ExchangePrepare("t", struct.pack("<BIQ", 3, 10, 1) + b"\0"),
    "a sketch without its cells": ExchangeSketch("t", struct.pack("<BBIQ8s", 0, 3, 400_000, 1, b"\0" * 8)),
    "everything, four thousand times": ExchangeFetch("t", b"\0" * 16 + ranges(*EVERYTHING * 4000)),
    "more ranges than bounds": ExchangeFetch("t", b"\0" * 16 + b"\0\0" + count(5000) + b"\0" * 30_000),
    "a count without an end": ExchangeFetch("t", b"\0" * 16 + b"\xff" * 100),
    "ids that are not there": ExchangeFetch("t", b"\0" * 16 + b"\0" + count((1 << 28) - 1) + IDS),
    "lists that overlap": ExchangeFetch(
        "t", b"\0" * 16 + messages.encode_located(Located([], [], [], (Listed(b"", None, [b"sixsix"]),) * 9))
    ),
    "a dump that is no dump": ExchangeDump("t", b"\0" * 21),
    "a short comparison": ExchangeCompare("t", b"\0" * 31),
}
ANSWERED = {
    "noise in every cell": ExchangeSketch("t", struct.pack("<BBIQ8s", 1, 5, 2000, 1, b"\0" * 8) + NOISE[:300_000]),
    "noise in every cell, by records": ExchangeSketch(
        "t", struct.pack("<BBIQ8s", 0, 3, 5000, 1, b"\0" * 8) + NOISE[: 15_000 * 17]
    ),
    "two hundred thousand ids": ExchangeFetch("t", b"\0" * 16 + b"\0" + count(200_000) + IDS + b"\0\0"),
    "everything": ExchangeFetch("t", b"\0" * 16 + ranges(*EVERYTHING)),
    "all that changed since the future": ExchangeFetch("t", b"\xff" * 8 + b"\0" * 8 + NOTHING),
    "all that changed since the beginning": ExchangeFetch("t", b"\0" * 16 + NOTHING),
    "a dump of noise": ExchangeDump("t", b"\0" * 8 + NOISE[: 14 * 1000]),
    "a dump of far more leaves than there are": ExchangeDump("t", b"\0" * 8 + NOISE[: 14 * 70_000]),
    "a comparison of noise": ExchangeCompare("t", NOISE[:32]),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_malformed_request_is_refused(pair, name):
    """F47: what is malformed or beyond bounds raises FrameError at the responder before memory is given to it."""
    responder = Responder(TabletSide(pair[1]))
    tracemalloc.start()
    try:
        with pytest.raises(errors.FrameError):
            responder.step(REQUESTS[name])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_BYTES_MAX, peak


@pytest.mark.parametrize("name", ANSWERED)
def test_a_greedy_request_costs_bounded_work(pair, name):
    """F47: what is well formed is answered, with no more bytes than the tablet has and a bounded amount of memory."""
    other = pair[1]
    responder = Responder(TabletSide(other))
    before = other.position
    tracemalloc.start()
    try:
        reply, attachments = responder.step(ANSWERED[name])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_BYTES_MAX, peak
    assert sum(map(len, attachments)) <= (other.count + 1) * 100 + 2000
    assert len(reply.body) <= 2 * len(ANSWERED[name].body) + 200_000
    assert other.position == before


def test_announcements_leave_one_table_and_none_that_is_larger_than_the_tablet(pair):
    """F47: an announcement costs a walk, as a sketch does; one table is kept, and none with more cells than there are
    records; what is announced instead of what comes helps nobody and harms nothing.
    """
    one, other = pair
    responder = Responder(TabletSide(other))
    for seed in range(20):
        reply, attachments = responder.step(ExchangePrepare("t", struct.pack("<BIQ", 3, 300, seed)))
        assert reply == ExchangePrepared(other.position.sequence.to_bytes(8, "little"))
        assert attachments == ()
    kept = other.leaves.prepared
    assert kept is not None
    assert (len(kept[1]), kept[1].seed) == (900, 19)
    for ways, width in ((3, limits.EXCHANGE_CELLS_MAX // 3), (5, other.count // 5 + 1)):
        responder.step(ExchangePrepare("t", struct.pack("<BIQ", ways, width, 1)))
        assert other.leaves.prepared is kept
    outcome = exchange(one, other, prefer_records=True)
    assert (outcome.full_copy, outcome.unproven) == (None, 0)
    assert one.root == other.root


def test_what_is_more_than_a_message_holds_is_not_gathered(pair, monkeypatch):
    """F47: ranges that hold more than a message may are refused while they are walked, at either side."""
    one, other = pair
    monkeypatch.setattr(limits, "EXCHANGE_BYTES_MAX", 100_000)
    reply, attachments = Responder(TabletSide(other)).step(ANSWERED["everything"])
    assert (reply.body, attachments) == (bytes([Reason.TOO_LARGE]), ())
    before = one.position
    for name in ("everything is to be removed", "lists of nothing: all is to be removed"):
        outcome, repairs = against(one, Hostile(other, LIES[name]))
        assert (outcome.full_copy, repairs) == (Reason.TOO_LARGE, 0)
    assert one.position == before
