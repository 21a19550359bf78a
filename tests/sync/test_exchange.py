"""The exchange: random cases of all shapes, and each decision of the machine."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import struct

import pytest

from srengine import errors, limits
from srengine._native import merkle as merkle_kernel
from srengine.storage import Batch, encode_operations
from srengine.storage import merkle as storage_merkle
from srengine.storage.merkle import Leaves
from srengine.storage.tablet import Tablet
from srengine.sync import exchange_machine, exchange_messages, exchange_sizes
from srengine.sync.exchange_machine import Initiator, Responder
from srengine.sync.exchange_messages import ExchangePrepare, Reason
from srengine.types import Located
from tests.exchanges import TabletSide, drive, exchange

TABLET = "00" * 16


@pytest.fixture
def make(tmp_path):
    """A function that makes ``count`` tablets that hold the same records."""
    opened = []

    def build(pairs, count=2, prepare=None):
        (tmp_path / "0").mkdir()
        first = Tablet.create(tmp_path / "0", TABLET, lineage="cd" * 16, seed=b"abcdefgh", map_bytes=1 << 26)
        if pairs:
            first.put_many(pairs)
        if prepare is not None:
            prepare(first)
        first.close()
        for number in range(1, count):
            shutil.copytree(tmp_path / "0", tmp_path / str(number))
        opened.extend(Tablet.open(tmp_path / str(number), TABLET, map_bytes=1 << 26) for number in range(count))
        return opened

    yield build
    for tablet in opened:
        tablet.close()


def same(one, other):
    return (one.root, one.count, one.live_count, one.sequence, one.purge_mark, one.lineage) == (
        other.root, other.count, other.live_count, other.sequence, other.purge_mark, other.lineage,
    )  # fmt: skip


def contents(tablet):
    with tablet.view() as view:
        return {(r.key, r.value, r.version, r.tombstone) for r in view.records(tombstones=True)}


def differing(one, other):
    return sorted({record[0] for record in contents(one) ^ contents(other)})


def disturb(rng, one, other, universe, boundaries):
    """Change both sides at random, apart from each other: missing, updated, deleted, purged, boundary keys."""
    for tablet in (one, other):
        for _ in range(rng.randrange(4)):
            pool = boundaries if rng.random() < 0.3 else universe
            picked = rng.sample(pool, min(len(pool), rng.choice((1, 1, 2, 5, 30))))
            kind = rng.randrange(4)
            if kind == 0:
                tablet.delete_many(picked)
            elif kind == 1 and rng.random() < 0.3:
                tablet.purge(tablet.sequence)
            else:
                tablet.put_many([(key, rng.randbytes(rng.randrange(12))) for key in picked])


SHAPES = {
    "usual": {},
    "every key a boundary": {"boundary_bits": 0},
    "everything in one leaf": {"boundary_bits": 16},
    "small leaves": {"boundary_bits": 2},
    "ids that collide": {"id_bits": 9},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_random_cases(make, shape):
    """T08, K11: what differs is found and nothing else reported, or a full copy is asked for; never a silent miss."""
    random_cases(make, shape, range(150))


@pytest.mark.fuzz
@pytest.mark.parametrize("shape", SHAPES)
def test_other_random_cases(make, shape):
    """T08, K11: the same for other seeds; `make fuzz` goes on for 200 000 of each shape."""
    count = 200_000 if os.environ.get("SRENGINE_HYPOTHESIS") == "fuzz" else 50
    random_cases(make, shape, range(1_000_000, 1_000_000 + count))


def random_cases(make, shape, cases):
    """Disturb both sides and exchange, for each case."""
    widths = SHAPES[shape]
    universe = [b"%05d" % i for i in range(1500)]
    one, other = make([(key, b"") for key in universe[::2]])
    sides = [TabletSide(tablet, Leaves(tablet._environment, **widths)) for tablet in (one, other)]
    boundaries = [leaf[0] for leaf in one.leaves.tree.leaves() if leaf[0]] or universe[:40]
    one.leaves.drop()
    copies = over = located = 0
    for case in cases:
        rng = random.Random(case)
        disturb(rng, one, other, universe, boundaries)
        truth = differing(one, other)
        # What the authority purged goes with its purge mark, whether or not it was found.
        purged = {key for key, _, version, gone in contents(one) if gone and version <= other.purge_mark}
        outcome = exchange(*sides, case, prefer_records=rng.random() < 0.3)
        if outcome.full_copy is None:
            assert same(one, other), case
            assert contents(one) == contents(other), case
            assert set(truth) <= set(outcome.report) | purged, case
            over += len(set(outcome.report) - set(truth))
            located += len(truth)
        else:
            copies += 1
            rows = [(key, value) for key, value in other.scan()]
            one.put_many(rows or [(b"x", b"")])
    assert over <= max(1, 0.01 * located)
    assert widths.get("id_bits") or copies <= max(10, len(cases) // 20), copies
    for tablet in (one, other):
        assert not tablet.verify().damages


def test_boundary_keys_on_one_side_only(make):
    """T08: a boundary key that one side lacks costs one record, not two leaves."""
    one, other = make([(b"%06d" % i, b"") for i in range(20000)])
    with one.leaves.moment():
        tree = one.leaves.tree
        keys = [leaf[0] for leaf in tree.leaves()[1:]]
    for run in range(12):
        for tablet in (one, other):
            tablet.delete_many(keys[run * 10 : run * 10 + 5])
            tablet.purge(tablet.sequence)
            exchange(one, other)
        fresh = [key + b"!" for key in keys[200 + 3 * run : 203 + 3 * run]]
        (one if run % 2 else other).put_many([(key, b"new") for key in fresh])
        outcome = exchange(one, other, run)
        assert outcome.report == fresh
        assert same(one, other)


def test_only_here_is_removed_never_resurrected(make):
    """F47, P3: what only the initiator has goes; a newer version of its own gives way to the authority's."""
    one, other = make([(b"%04d" % i, b"") for i in range(500)])
    other.delete(b"0007")
    for _ in range(3):
        one.put(b"0008", b"newer here")
    one.put(b"zzz", b"only here")
    outcome = exchange(one, other)
    assert outcome.report == [b"0007", b"0008", b"zzz"]
    assert same(one, other)
    assert one.get(b"0007") is None
    assert one.get(b"0008") == b""
    assert one.get(b"zzz") is None
    assert not one.verify().damages
    one.put(b"after", b"")
    assert not one.verify().damages


def test_an_initiator_that_is_ahead(make):
    """K11: an initiator of higher sequence goes back to the authority's, and its change log with it."""
    one, other = make([(b"%04d" % i, b"") for i in range(500)])
    for i in range(50):
        one.put(b"%04d" % (i * 3), b"mine")
    exchange(one, other)
    assert same(one, other)
    assert not one.verify().damages
    other.put(b"0001", b"next")
    delta = other.delta_since(one.sequence, bytes_max=10_000)
    one.apply_delta(delta)
    assert same(one, other)
    assert not one.verify().damages


def test_requests_sessions_and_purge_mark_travel_whole(make):
    """K11: deterministic rows that differ come with the end, so that the root can be reached."""
    one, other = make([(b"%04d" % i, b"") for i in range(300)])
    other.open_session(b"s" * 16)
    other.apply([Batch(encode_operations([(0, b"k", b"v", 0, 0)]), b"s" * 16, 1)])
    one.open_session(b"t" * 16)
    one.delete(b"0001")
    one.purge(one.sequence)
    outcome = exchange(one, other)
    assert outcome.report == [b"0001", b"k"]
    assert same(one, other)
    assert one.purge_mark == 0
    assert not one.verify().damages
    again = one.apply([Batch(encode_operations([(0, b"k", b"v", 0, 0)]), b"s" * 16, 1)])[0]
    assert again.duplicate


def test_writes_at_the_authority_between_requests(make):
    """K11: what the authority changes between two requests comes with the answer; no exchange starves under writes."""
    one, other = make([(b"%05d" % i, b"") for i in range(20000)])
    rng = random.Random(3)
    for count in (1, 30, 300):
        other.put_many([(b"%05d" % rng.randrange(20000), b"d%d" % count) for _ in range(count)])

        def write():
            other.put(b"%05d" % rng.randrange(20000), b"meanwhile")

        outcome = exchange(one, other, between=write)
        assert outcome.full_copy is None
        assert same(one, other)


@pytest.fixture
def walks(monkeypatch):
    """How often all records of a tablet were walked for a table, in a list that grows."""
    done = []

    class Counted(merkle_kernel.Records):
        def __new__(cls, tree, *arguments):
            done.append(tree.environment)
            return super().__new__(cls, tree, *arguments)

    monkeypatch.setattr(merkle_kernel, "Records", Counted)
    monkeypatch.setattr(exchange_machine, "ANNOUNCED_RECORDS_MIN", 0)
    return done


def announced(make, seed=1):
    """Two tablets that differ in twenty records, the exchange up to its announcement, and that."""
    one, other = make([(b"%05d" % number, b"") for number in range(3000)])
    other.put_many([(b"%05d" % (71 * number), b"there") for number in range(20)])
    initiator = Initiator("t", TabletSide(one), random.Random(seed), prefer_records=True)
    initiator.start()
    initiator.step(*Responder(TabletSide(other)).step(initiator.drain().send.message))
    effects = initiator.drain()
    assert effects.send is None
    return one, other, initiator, effects.announce.message


@pytest.mark.parametrize("late", [False, True])
def test_what_is_announced_is_made_before_it_is_asked_for(make, walks, monkeypatch, late):
    """K11: by records, the initiator says which table it is about to make: the responder has made its own by the time
    the cells arrive, by one walk of its records, and makes another only when it has changed since.
    """
    one, other, initiator, message = announced(make)
    responder = Responder(TabletSide(other))
    responder.step(message)
    assert walks == [other._environment]
    kept, used, sketch = other.leaves.prepared[1], [], storage_merkle.Moment.sketch

    def noted(self, **shape):
        used.append(sketch(self, **shape))
        return used[-1]

    monkeypatch.setattr(storage_merkle.Moment, "sketch", noted)
    initiator.announced()
    assert walks[1:] == [one._environment]
    if late:
        other.put(b"00007", b"meanwhile")
    reply, attachments = responder.step(initiator.drain().send.message)
    assert walks[2:] == [other._environment] * late
    assert other.leaves.prepared is None
    assert [table is kept for table in used] == [False, not late]
    initiator.step(reply, attachments)
    assert drive(one, other, initiator=initiator).unproven == 0
    assert same(one, other)


@pytest.mark.parametrize("arrives", ["nothing", "another one", "it"])
def test_an_announcement_that_gets_lost_changes_nothing(make, walks, arrives):
    """K11: requests and result are the same whatever became of the announcement; a wrong one costs a walk there."""
    one, other, initiator, message = announced(make)
    if arrives == "another one":
        message = ExchangePrepare("t", struct.pack("<BIQ", 3, 9, 0))
    if arrives != "nothing":
        Responder(TabletSide(other)).step(message)
    initiator.announced()
    outcome = drive(one, other, initiator=initiator)
    assert same(one, other)
    assert (outcome.figures.rounds, outcome.figures.sketches, len(outcome.report)) == (2, 1, 20)
    assert len(walks) == 2 + (arrives == "another one")


def test_an_initiator_that_moves_before_it_makes_its_table_starts_again(make, walks):
    """K11: a write here between the announcement and the own table begins the exchange anew."""
    one, other, initiator, _ = announced(make)
    one.put(b"00001", b"moved")
    initiator.announced()
    outcome = drive(one, other, initiator=initiator)
    assert outcome.figures.reasons == ["the tablet moved on"]
    assert same(one, other)


def test_an_initiator_that_moves_starts_again(make):
    """K11: a write at the initiator in between repairs nothing wrongly: the exchange starts again, a bounded number of
    times.
    """
    one, other = make([(b"%05d" % i, b"") for i in range(2000)])
    other.put(b"00001", b"x")
    moves = iter(range(2))
    outcome = exchange(
        one, other, between=lambda: one.put(b"own", b"%d" % next(moves, 7)) if next(moves, None) else None
    )
    assert outcome.full_copy is None
    assert same(one, other)
    other.put(b"00002", b"x")
    outcome = exchange(one, other, between=lambda: one.put(b"own", b"for ever"))
    assert outcome.full_copy is Reason.UNDECIDED


def test_too_different_asks_for_a_full_copy(make):
    """K11: more than a quarter of a tablet differs: a full copy, for a stated reason, and nothing was changed."""
    one, other = make([(b"%05d" % i, b"") for i in range(4000)])
    other.put_many([(b"%05d" % i, b"x") for i in range(3000)])
    before = one.root
    outcome = exchange(one, other)
    assert outcome.full_copy is Reason.TOO_DIFFERENT
    assert one.root == before
    assert outcome.figures.reasons == ["full copy: too different"]


def test_too_large_asks_for_a_full_copy(make, monkeypatch):
    """K11: differing records of more bytes than a message holds: a full copy."""
    monkeypatch.setattr(limits, "EXCHANGE_BYTES_MAX", 50_000)
    one, other = make([(b"%05d" % i, b"") for i in range(4000)])
    other.put_many([(b"%05d" % (37 * i), b"x" * 9000) for i in range(20)])
    assert exchange(one, other).full_copy is Reason.TOO_LARGE


def test_tables_too_small_are_peeled_with_the_extension(make, monkeypatch):
    """K11: a table that is too small is answered by the responder's cells and a second table: still located in two."""
    monkeypatch.setattr(exchange_sizes, "cells_for", lambda items: max(12, int(0.8 * items)))
    one, other = make([(b"%05d" % i, b"") for i in range(50000)])
    extended = 0
    for run in range(10):
        rng = random.Random(run)
        truth = sorted({b"%05d" % rng.randrange(50000) for _ in range(40)})
        other.put_many([(key, b"%d" % run) for key in truth])
        outcome = exchange(one, other, run)
        assert outcome.report == truth
        extended += outcome.figures.extended
        if outcome.figures.sketches == 1:
            assert outcome.figures.locating_rounds == 2
    assert extended >= 5


def test_after_all_sketches_leaf_digests(make, monkeypatch):
    """K11: when no sketch can be read, the leaf digests are dumped; what they show is shipped whole."""
    monkeypatch.setattr(storage_merkle.Moment, "peel", lambda self, sketches: None)
    one, other = make([(b"%05d" % i, b"") for i in range(5000)])
    other.put(b"00777", b"x")
    one.put(b"only here", b"")
    outcome = exchange(one, other)
    assert outcome.full_copy is None
    assert outcome.report == [b"00777", b"only here"]
    assert outcome.figures.mode == "dump"
    assert outcome.figures.sketches == limits.EXCHANGE_ATTEMPTS_MAX
    assert same(one, other)


def test_recount_finds_what_the_carried_root_hides(make):
    """K11: records removed, added and damaged behind the engine are found by summing the records up again."""
    one, other = make([(b"%05d" % i, b"v%d" % i) for i in range(3000)])
    tamper(one)
    assert one.root == other.root
    assert exchange(one, other).report == []
    outcome = exchange(one, other, recount=True)
    assert outcome.full_copy is None
    assert outcome.report == [b"00100", b"00200", b"added"]
    assert contents(one) == contents(other)
    assert same(one, other)
    assert not one.verify().damages


@pytest.mark.parametrize("at", [4, 28])
def test_a_damaged_header_is_found_record_by_record(make, walks, at):
    """K11: a walk for a table over records takes headers as they are and tells that one is damaged by their number: it
    walks once more, so that what lies behind the damaged one is looked for in the right place.
    """
    one, other = make([(b"%05d" % i, b"v%d" % i) for i in range(3000)])
    with behind(one) as (txn, records, _):
        stored = bytearray(txn.get(b"00500", db=records))
        stored[at] ^= 0x10
        txn.put(b"00500", bytes(stored), db=records)
    changed = [b"%05d" % (97 * number) for number in range(1, 30)]
    other.put_many([(key, b"there") for key in changed])
    outcome = exchange(one, other, recount=True, prefer_records=True)
    assert (outcome.full_copy, outcome.figures.mode, outcome.unproven) == (None, "record", 0)
    assert outcome.report == sorted([*changed, b"00500"])
    assert same(one, other)
    assert not one.verify().damages
    assert len(walks) == 2


@contextlib.contextmanager
def behind(tablet):
    """Change a tablet's file without the engine's knowledge: (transaction, records, changes)."""
    import lmdb

    tablet._environment.close()
    with lmdb.open(str(tablet.path), max_dbs=16, map_size=1 << 26) as env:
        records = env.open_db(b"records", create=False)
        changes = env.open_db(b"changes", create=False, integerkey=True)
        with env.begin(write=True) as txn:
            yield txn, records, changes
    reopened = Tablet.open(tablet.path, TABLET, map_bytes=1 << 26)
    tablet._environment = reopened._environment
    tablet._leaves = None


def tamper(tablet):
    """Remove one record, change one and add one in the file, checks and all."""
    from srengine._native import tablet as kernel

    seed = int.from_bytes(tablet.seed, "little")
    with behind(tablet) as (txn, records, changes):
        stored = txn.get(b"00100", db=records)
        sequence = struct.unpack_from("<Q", stored, 4)[0]
        txn.delete(b"00100", db=records)
        txn.delete(struct.pack("<Q", sequence), db=changes)
        stored = txn.get(b"00200", db=records)
        sequence, clock = struct.unpack_from("<QQ", stored, 4)
        txn.put(b"00200", kernel.digest_vector(seed, b"00200", b"forged", 0, sequence, clock)[0], db=records)
        txn.put(b"added", kernel.digest_vector(seed, b"added", b"", 0, 2, clock)[0], db=records)


# --- a lying peer ----------------------------------------------------------------------------------------------------


class Liar:
    """A responder whose answers are changed on their way."""

    def __init__(self, tablet, change):
        self._responder, self._change, self.requests = Responder(TabletSide(tablet)), change, 0

    def step(self, request):
        self.requests += 1
        return self._change(*self._responder.step(request))


def against(one, liar, seed=1):
    initiator = Initiator("t", TabletSide(one), random.Random(seed))
    initiator.start()
    while True:
        effects = initiator.drain()
        if effects.outcome is not None:
            return effects.outcome
        if effects.send is not None:
            initiator.step(*liar.step(effects.send.message))
        elif effects.apply is not None:
            work = effects.apply
            try:
                one.repair(
                    work.rows,
                    work.removed,
                    work.meta,
                    work.state,
                    replace_rows=work.replace_rows,
                    base=work.base,
                    actual=work.actual,
                )
                initiator.applied(proved=True)
            except errors.Diverged:
                initiator.applied(proved=False)


@pytest.mark.parametrize("case", range(40))
def test_a_lying_peer_changes_nothing(make, case):
    """F47: garbled answers end in an error or unproven, after a bounded number of requests; nothing was changed."""
    rng = random.Random(case)
    one, other = make([(b"%04d" % i, b"") for i in range(3000)])
    other.put_many([(b"%04d" % (i * 17), b"x") for i in range(rng.choice((1, 5, 60)))])

    def garble(reply, attachments):
        body = bytearray(reply.body)
        parts = [bytearray(part) for part in attachments]
        target = rng.choice([body, *parts])
        kind = rng.randrange(4)
        if kind == 0 and target:
            target[rng.randrange(len(target))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del target[rng.randrange(len(target) + 1) :]
        elif kind == 2:
            target += rng.randbytes(rng.randrange(1, 50))
        else:
            target[:] = rng.randbytes(len(target))
        return type(reply)(bytes(body)), tuple(bytes(part) for part in parts)

    liar = Liar(other, garble)
    before = contents(one), one.position
    try:
        outcome = against(one, liar)
    except errors.FrameError:
        outcome = None
    assert liar.requests <= limits.EXCHANGE_ROUNDS_MAX
    if contents(one) != before[0]:
        # NB: garbage in the prefix or the estimator only sends it a longer way to the truth. The name of the lineage is
        # the peer's word alone: no root covers it.
        assert outcome is not None
        assert (one.root, contents(one)) == (other.root, contents(other))
    else:
        assert one.position == before[1]


def test_an_endless_liar_is_counted(make):
    """F47: a peer whose proofs fail every time is asked a bounded number of times; the failures are counted."""
    one, other = make([(b"%04d" % i, b"") for i in range(3000)])
    other.put(b"0001", b"x")

    def wrong_rows(reply, attachments):
        if not attachments:
            return reply, attachments
        return reply, (b"", *attachments[1:])

    before = one.position
    outcome = against(one, Liar(other, wrong_rows))
    assert outcome.full_copy is Reason.UNDECIDED
    assert 1 < outcome.unproven <= limits.EXCHANGE_ATTEMPTS_MAX + 1
    assert one.position == before


def test_hostile_requests_cost_bounded_work(make):
    """F47: malformed and greedy requests raise FrameError, or are answered by a full copy, at the responder."""
    one, other = make([(b"%04d" % i, b"x" * 100) for i in range(1000)])
    responder = Responder(TabletSide(other))
    rng = random.Random(1)
    requests = [
        exchange_messages.ExchangeCompare,
        exchange_messages.ExchangeSketch,
        exchange_messages.ExchangeFetch,
        exchange_messages.ExchangeDump,
    ]
    for _ in range(400):
        message = rng.choice(requests)("t", rng.randbytes(rng.choice((0, 7, 16, 22, 32, 100))))
        try:
            responder.step(message)
        except errors.FrameError:
            pass
    huge = exchange_messages.Shape(True, 3, limits.EXCHANGE_CELLS_MAX, 1)
    with pytest.raises(errors.FrameError):
        responder.step(exchange_messages.ExchangeSketch("t", exchange_messages.encode_sketch(huge, b"\0" * 8, b"")))
    many = exchange_messages.encode_fetch(0, b"\0" * 8, Located([], [], [(b"", None)] * 3))
    with pytest.raises(errors.FrameError):
        responder.step(exchange_messages.ExchangeFetch("t", many))
    once = exchange_messages.encode_fetch(0, b"\0" * 8, Located([], [], [(b"", None)]))
    _, attachments = responder.step(exchange_messages.ExchangeFetch("t", once))
    assert len(attachments[0]) < 200_000
    assert one.count == other.count == 1000


def test_diff_by_leaves_equals_diff_by_scan(make):
    """T08: `Tablet.diff` of tablets of one seed compares leaves and finds the same as a scan of both."""
    universe = [b"%05d" % i for i in range(3000)]
    one, other = make([(key, b"") for key in universe[::2]])
    for case in range(30):
        disturb(random.Random(case), one, other, universe, universe[:50])
        assert one.diff(other) == differing(one, other)
        assert other.diff(one) == one.diff(other)
