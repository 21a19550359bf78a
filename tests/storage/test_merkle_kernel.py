"""The merkle kernel: leaves against a rebuild and a plain oracle, sketches against theirs."""

from __future__ import annotations

import random
import struct
import threading

import pytest

from srengine import errors
from srengine._native import merkle
from srengine._native import tablet as kernel
from srengine.storage import open_store
from tests.reference import merkle as oracle
from tests.reference.tablet import record_digest


def warm(tablet, **widths):
    """A tree of the tablet as it stands."""
    tree = merkle.Tree(tablet._environment, **widths)
    tree.start_tracking()
    reader = tablet._environment.reader()
    assert tree.build(reader)
    reader.close()
    return tree


def advance(tree, tablet):
    reader = tablet._environment.reader()
    try:
        return tree.advance(reader)
    finally:
        reader.close()


def digests_of(tablet):
    with tablet.view() as view:
        return {
            record.key: record_digest(
                tablet.seed, record.key, int(record.tombstone), record.version, record.hybrid_clock, record.value
            )
            for record in view.records(tombstones=True)
        }


def shown(tree):
    return tree.leaves(), tree.sum, tree.count, tree.estimator


def rebuilt(tablet, **widths):
    """What a fresh walk says, without disturbing the tablet's own tree."""
    other = merkle.Tree(tablet._environment, **widths)
    reader = tablet._environment.reader()
    assert other.build(reader)
    result = shown(other)
    reader.close()
    return result


def change(tablet, rng, keys):
    """One random transaction of every kind that changes records."""
    kind = rng.randrange(6)
    picked = [b"k%05d" % rng.randrange(keys) for _ in range(rng.randrange(1, 40))]
    if kind == 0:
        tablet.put_many([(key, rng.randbytes(rng.randrange(40))) for key in picked])
    elif kind == 1:
        tablet.delete_many(picked)
    elif kind == 2:
        tablet.put(picked[0], b"one")
    elif kind == 3:
        tablet.delete(picked[0])
    elif kind == 4:
        try:
            tablet.put(picked[0], b"conditional", if_absent=True)
        except errors.Conflict:
            pass
    else:
        tablet.purge(rng.randrange(tablet.sequence + 1))


@pytest.fixture
def tablet(tmp_path):
    with open_store(tmp_path / "store") as store:
        yield store.tablet("t")


@pytest.mark.parametrize("seed", range(6))
def test_incremental_leaves_equal_rebuild_and_oracle(tablet, seed):
    """T07, K12: after random operations the adjusted leaves equal a rebuild and a plain Python oracle."""
    rng = random.Random(seed)
    bits = rng.choice((1, 3, 5))
    keys = rng.choice((60, 3000))
    tree = warm(tablet, boundary_bits=bits)
    for step in range(120):
        change(tablet, rng, keys)
        if rng.random() < 0.3:
            assert advance(tree, tablet)
            if step % 10 == 0:
                assert shown(tree) == rebuilt(tablet, boundary_bits=bits)
    assert advance(tree, tablet)
    digests = digests_of(tablet)
    assert tree.leaves() == [leaf.fields() for leaf in oracle.leaves(tablet.seed, digests, bits)]
    assert tree.estimator == oracle.estimator(tablet.seed, digests)
    assert shown(tree) == rebuilt(tablet, boundary_bits=bits)
    total = int.from_bytes(tree.sum, "little")
    if tablet.purge_mark:
        reader = tablet._environment.reader()
        total += int.from_bytes(tree.rows_digest(reader), "little")
        reader.close()
    assert total % (1 << 128) == int.from_bytes(tablet.root, "little")


def test_values_on_pages_of_their_own(tablet):
    """T07: leaves of large and small values, in any mixture, by one walk and by two, equal the oracle."""
    rng = random.Random(3)
    sizes = (0, 10, 300, 1900, 2100, 5000, 40_000)
    for _ in range(6):
        tablet.put_many([(b"%04d" % rng.randrange(3000), rng.randbytes(rng.choice(sizes))) for _ in range(150)])
    tree = warm(tablet)
    fields = [leaf.fields() for leaf in oracle.leaves(tablet.seed, digests_of(tablet), 5)]
    assert tree.leaves() == fields
    one, two = tablet._environment.reader(), tablet._environment.reader()
    assert tree.build(one, two)
    assert tree.leaves() == fields
    for start in range(0, 3000, 517):
        found = tree.records_between(one, b"%04d" % start, b"%04d" % (start + 400), None, True)
        with tablet.view() as view:
            there = [r.key for r in view.records(tombstones=True) if b"%04d" % start <= r.key < b"%04d" % (start + 400)]
        assert [row[2] for row in found] == there
    one.close()
    two.close()


def test_blocks_split_and_empty(tablet):
    """T07: blocks of leaves split when many boundaries come and go away when they are purged."""
    tree = warm(tablet, boundary_bits=0)
    for base in range(0, 4000, 500):
        tablet.put_many([(b"%06d" % ((7919 * (base + i)) % 4000), b"x") for i in range(500)])
        assert advance(tree, tablet)
    assert tree.leaf_count == 4001
    tablet.delete_many([b"%06d" % i for i in range(3990)])
    tablet.purge(tablet.sequence)
    assert advance(tree, tablet)
    assert tree.leaf_count == 11
    assert shown(tree) == rebuilt(tablet, boundary_bits=0)


def test_two_walks_from_both_ends_equal_one(tablet):
    """T07: a build that two threads share equals one thread's."""
    tablet.put_many([(b"%08d" % (i * 7), b"v%d" % i) for i in range(30000)])
    tree = warm(tablet)
    single = shown(tree)
    one, two = tablet._environment.reader(), tablet._environment.reader()
    for _ in range(5):
        assert tree.build(one, two)
        assert shown(tree) == single
    tablet.put(b"later", b"")
    three = tablet._environment.reader()
    assert not tree.build(one, three)
    for reader in (one, two, three):
        reader.close()


def test_records_by_two_walks_equal_one(tablet):
    """T07, T08: places and table that two threads gather are one thread's."""
    tablet.put_many([(b"%08d" % (i * 7), b"v%d" % i) for i in range(30000)])
    tree = warm(tablet)
    one, two = tablet._environment.reader(), tablet._environment.reader()
    alone, cells = records(tree, one)
    ids = [row[0] for row in tree.records(one, 0, tree.leaf_count, None, False)]
    for _ in range(5):
        both, filled = records(tree, one, two)
        assert both.count == alone.count == 30000
        assert both.find(ids[:3] + ids[-3:]) == [0, 1, 2, 29997, 29998, 29999]
        assert all(both.find([ids[at]]) == [at] for at in range(0, 30000, 1499))
        assert filled == cells
    tablet.put(b"later", b"")
    three = tablet._environment.reader()
    assert records(tree, one, three)[1] == cells
    with pytest.raises(errors.QuotaExceeded):
        merkle.Records(tree, one, 29999, two)
    for reader in (one, two, three):
        reader.close()


def records(tree, reader, other=None):
    """Walk all records: (where they are, the cells of a table of them)."""
    table = merkle.Sketch(50, 3, by_leaf=False)
    found = merkle.Records(tree, reader, 1 << 20, other, table)
    expected = merkle.Sketch(50, 3, by_leaf=False)
    for item, value, *_ in tree.records(reader, 0, tree.leaf_count, None, False):
        expected.add(item, value)
    assert table.encode() == expected.encode()
    return found, table.encode()


def test_one_write_is_taken_up_without_reading_records(tablet):
    """K12: among 100 000 records a write changes one leaf and reads no record; a new boundary reads the two leaves that
    it makes of one.
    """
    tablet.put_many([(b"%08d" % i, b"v") for i in range(100_000)])
    tree = warm(tablet)
    assert tree.walked == 100_000
    boundaries = {leaf[0] for leaf in tree.leaves()}
    for number in range(40):
        key = b"%08d" % (number * 2357)
        before = {leaf[0]: leaf for leaf in tree.leaves()}
        tablet.put(key, b"new")
        assert advance(tree, tablet)
        assert sum(before.get(leaf[0]) != leaf for leaf in tree.leaves()) == 1
    assert tree.walked == 100_000
    fresh = next(
        key
        for key in (b"00050000/%d" % number for number in range(10_000))
        if oracle.key_hash(tablet.seed, key) & 31 == 0
    )
    assert fresh not in boundaries
    tablet.put(fresh, b"")
    assert advance(tree, tablet)
    assert 0 < tree.walked - 100_000 < 500
    assert shown(tree) == rebuilt(tablet)


def test_notes_that_overflow_make_the_tree_cold(tablet):
    """T07: a bounded buffer: when more changed than it holds the tree says that it must be built again."""
    tree = warm(tablet)
    for i in range(5):
        tablet.put_many([(b"%0400d" % (i * 16000 + k), b"") for k in range(16000)])
    assert not advance(tree, tablet)
    assert not tree.warm
    reader = tablet._environment.reader()
    assert tree.build(reader)
    reader.close()
    tablet.put(b"k", b"v")
    assert advance(tree, tablet)
    assert shown(tree) == rebuilt(tablet)


def test_readers_between_commits_see_their_own_transaction(tablet):
    """T07: while writers commit, every reader is brought up exactly to the transaction that it sees."""
    tree = warm(tablet, boundary_bits=2)
    stop = threading.Event()

    def write():
        rng = random.Random(1)
        while not stop.is_set():
            change(tablet, rng, 300)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(60):
            reader = tablet._environment.reader()
            assert tree.advance(reader)
            total = int.from_bytes(tree.sum, "little") + int.from_bytes(tree.rows_digest(reader), "little")
            assert (total % (1 << 128)).to_bytes(16, "little") == reader.state_tuple[1]
            assert tree.count == reader.state_tuple[2]
            reader.close()
    finally:
        stop.set()
        writer.join()


def test_records_of_leaves(tablet):
    """T07: a leaf's records are found by its ordinal, by id, by position; rows are what the wire carries."""
    tablet.put_many([(b"%05d" % i, b"v%d" % i) for i in range(2000)])
    tree = warm(tablet)
    reader = tablet._environment.reader()
    assert tree.advance(reader)
    every = tree.records(reader, 0, tree.leaf_count, None, True)
    assert [record[2] for record in every] == [b"%05d" % i for i in range(2000)]
    assert kernel.decode_rows(every[7][4])[0][:2] == (b"00007", b"v7")
    digests = digests_of(tablet)
    assert {key: int.from_bytes(digest, "little") for _, _, key, digest, _, _ in every} == digests
    ids = [leaf[1] for leaf in tree.leaves()]
    found = tree.find_leaves([*ids[3:9], 12345])
    assert found == {ids[i]: i for i in range(3, 9)}
    assert tree.records(reader, 4, 5, None, False)[0][2] == tree.leaf_key(4)
    wanted = [every[5][0], every[1500][0]]
    assert [record[2] for record in tree.records(reader, 0, tree.leaf_count, wanted, False)] == [b"00005", b"01500"]
    records = merkle.Records(tree, reader, 2000)
    positions = records.find(wanted)
    assert positions == [5, 1500]
    ordinals = tree.leaves_at(positions)
    assert [r[2] for o in ordinals for r in tree.records(reader, o, o + 1, wanted, False)] == [b"00005", b"01500"]
    with pytest.raises(errors.QuotaExceeded):
        merkle.Records(tree, reader, 1999)
    reader.close()


@pytest.mark.parametrize("ways", [3, 4, 5])
@pytest.mark.parametrize("by_leaf", [True, False])
def test_sketch_cells_equal_the_oracle(by_leaf, ways):
    """T08: cells of a sketch are byte for byte those of the plain Python oracle, negative values included."""
    rng = random.Random(5)
    here, there = merkle.Sketch(7, 99, by_leaf=by_leaf, ways=ways), oracle.Sketch(7, 99, by_leaf=by_leaf, ways=ways)
    for _ in range(50):
        item, value = rng.getrandbits(47), rng.choice((1, -1)) * rng.getrandbits(40)
        weighted = value * rng.getrandbits(47) if by_leaf else 0
        here.add(item, value, weighted)
        there.add(item, value, weighted)
    assert here.encode() == there.encode()


@pytest.mark.parametrize("ways", [3, 4, 5])
@pytest.mark.parametrize("by_leaf", [True, False])
def test_peeling_finds_what_was_put_in(by_leaf, ways):
    """T08: a table that is large enough gives its items back, of either sign; one that is too small gives none."""
    rng = random.Random(6)
    for count in (0, 1, 2, 5, 50, 700):
        items = {rng.getrandbits(47): (rng.choice((1, -1)) * rng.randrange(1, 1 << 40)) for _ in range(count)}
        sketch = merkle.Sketch(count + 20, 3, by_leaf=by_leaf, ways=ways)
        for item, value in items.items():
            sketch.add(item, value, value * 77 if by_leaf else 0)
        found = merkle.peel([sketch])
        assert found is not None
        assert {item: value for item, value, _ in found} == items
        assert all(weighted == (value * 77 if by_leaf else 0) for _, value, weighted in found)
        assert len(found) == count
    assert count == 700
    small = merkle.Sketch(100, 3, by_leaf=by_leaf, ways=ways)
    for item, value in items.items():
        small.add(item, value)
    assert merkle.peel([small]) is None


def test_peeling_two_tables_together():
    """T08: tables that are each too small are peeled together."""
    rng = random.Random(7)
    items = [(rng.getrandbits(47), rng.randrange(1, 1 << 40)) for _ in range(300)]
    one, two = merkle.Sketch(95, 1, by_leaf=False), merkle.Sketch(75, 2, by_leaf=False)
    for item, value in items:
        one.add(item, value)
        two.add(item, value)
    assert merkle.peel([one]) is None
    assert merkle.peel([two]) is None
    assert sorted(merkle.peel([one, two])) == sorted((item, value, 0) for item, value in items)


def test_garbage_cells_end_the_peeling():
    """F47: cells of a lying peer cost work bounded by their number and never raise."""
    rng = random.Random(8)
    for by_leaf, size in ((True, 30), (False, 17)):
        for _ in range(50):
            sketch = merkle.Sketch(50, 4, by_leaf=by_leaf)
            sketch.subtract(rng.randbytes(150 * size))
            assert merkle.peel([sketch]) is None
        with pytest.raises(errors.FrameError):
            sketch.subtract(b"\0" * (150 * size - 1))
    # An item in all of its cells but one: taking it out puts it there, and so on without end, were there no bound.
    sketch = merkle.Sketch(5, 4, by_leaf=False)
    cells = bytearray(15 * 17)
    sketch.add(77, 5)
    whole = sketch.encode()
    for start in range(0, len(cells), 17):
        if any(whole[start : start + 17]):
            cells[start : start + 17] = whole[start : start + 17]
            break
    lying = merkle.Sketch(5, 4, by_leaf=False)
    lying.subtract(bytes(cells))
    assert merkle.peel([lying]) is None


def test_sum_of_a_changed_note_is_the_root(tablet):
    """K11: the leaves' sum plus the deterministic rows is the root, recomputed from records."""
    tablet.open_session(b"s" * 16)
    tablet.put_many([(struct.pack(">Q", i), b"") for i in range(100)])
    tree = warm(tablet)
    reader = tablet._environment.reader()
    rows = int.from_bytes(tree.rows_digest(reader), "little")
    reader.close()
    assert rows
    assert (int.from_bytes(tree.sum, "little") + rows) % (1 << 128) == int.from_bytes(tablet.root, "little")
