"""What the exchange costs: exact bytes and round trips at 100 000 records; the table of a million is in benchmarks/."""

from __future__ import annotations

import random
import shutil
import struct

import pytest

from srengine.storage.tablet import Tablet
from tests.exchanges import exchange

RECORDS = 100_000
SEEDS = {1: 101, 10: 301, 100: 201, 1000: 21}


def put(tablet, pairs):
    """Write pairs as rows with made-up clocks: what the wall clock says must not decide what an exchange costs."""
    first = tablet.sequence + 1
    rows = b"".join(
        struct.pack("<BBHIQQ", 0, 0, len(key), len(value), first + i, (first + i) << 16) + key + value
        for i, (key, value) in enumerate(pairs)
    )
    tablet._environment.apply_rows(rows, [], True, None, None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A closed tablet, the same in every run, to be copied."""
    place = tmp_path_factory.mktemp("exchange")
    tablet = Tablet.create(place, "00" * 16, lineage="ab" * 16, seed=b"12345678")
    rng = random.Random(5)
    for _ in range(0, RECORDS, 20_000):
        put(tablet, [(b"%016x" % rng.getrandbits(64), b"v" * 8) for _ in range(20_000)])
    tablet.close()
    return place


@pytest.fixture
def pair(made, tmp_path):
    """Two equal tablets, and their keys; each test has its own, so that their order does not matter."""
    shutil.copytree(made, tmp_path / "a")
    shutil.copytree(made, tmp_path / "b")
    one, other = Tablet.open(tmp_path / "a", "00" * 16), Tablet.open(tmp_path / "b", "00" * 16)
    keys = [key for key, _ in one.scan()]
    yield one, other, keys
    one.close()
    other.close()


def differ(pair, count, run):
    """Make them differ in ``count`` records: one third only here, one third only there, one third updated."""
    one, other, keys = pair
    rng = random.Random(1000 * count + run)
    only_here, only_there = count // 3, count // 3
    updated = count - 2 * (count // 3)
    if count == 1:
        only_here, only_there, updated = [(1, 0, 0), (0, 1, 0), (0, 0, 1)][run % 3]
    here = [b"%016x" % rng.getrandbits(64) for _ in range(only_here)]
    there = [b"%016x" % rng.getrandbits(64) for _ in range(only_there)]
    changed = rng.sample(keys, updated)
    if here:
        put(one, [(key, b"x") for key in here])
    if there or changed:
        put(other, [(key, b"%d" % run) for key in there + changed])
    return sorted({*here, *there, *changed})


# (differing records, bytes at most, by records from the start)
TABLE = [
    (1, 475, False),
    (10, 1450, False),
    (100, 7800, False),
    (100, 4100, True),
    (1000, 90_000, False),
    (1000, 32_000, True),
]


@pytest.mark.parametrize(("count", "limit", "records"), TABLE)
def test_bytes_and_rounds(pair, count, limit, records):
    """K11, K12: locating d records costs the table's bytes in the median, 1.3 times that at the 95th percentile, two
    round trips, and reports exactly what differs.
    """
    one, other, _ = pair
    costs, later = [], 0
    seeds = SEEDS[count]
    for run in range(seeds):
        truth = differ(pair, count, run)
        outcome = exchange(one, other, run, prefer_records=records)
        assert outcome.full_copy is None, outcome
        assert outcome.report == truth, (count, run)
        assert (one.root, one.count, one.sequence) == (other.root, other.count, other.sequence)
        costs.append(outcome.figures.locating_bytes)
        later += outcome.figures.locating_rounds > 2
    costs.sort()
    assert costs[seeds // 2] <= limit, costs
    assert costs[int(seeds * 0.95)] <= 1.3 * limit, costs
    assert later <= 0.02 * seeds, later


def test_equal_tablets_cost_one_message_of_forty_bytes(pair):
    """K11, T08: equal tablets are known to be equal by 40 bytes in one round trip, without a look at a leaf."""
    one, other, _ = pair
    builds = one.leaves.builds, other.leaves.builds
    outcome = exchange(one, other)
    assert outcome.full_copy is None
    assert (outcome.figures.locating_bytes, outcome.figures.rounds) == (40, 1)
    assert (one.leaves.builds, other.leaves.builds) == builds


def test_tablets_are_sound_afterwards(pair):
    """K11: after all these repairs every record, the root, the counts and the change log verify on both sides."""
    one, other, _ = pair
    differ(pair, 500, 99)
    exchange(one, other)
    for tablet in (one, other):
        report = tablet.verify()
        assert not report.damages, report.damages
    assert one.dead_changes >= 0
    assert one.delta_since(one.sequence, bytes_max=1000) is not None
