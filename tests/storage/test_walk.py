"""Walks over a whole tablet, which step through LMDB's leaves themselves: they see what single reads see."""

from __future__ import annotations

import random

import pytest

from srengine._native import tablet as kernel
from srengine.storage import Store


def walked(tablet, *, bytes_max):
    """Return all records by walks of at most ``bytes_max``, each going on behind the last."""
    found, after, done = [], None, False
    with tablet.view() as view:
        while not done:
            batch = view.rows_by_key(after, bytes_max=bytes_max)
            found += [(key, value) for key, value, *_ in kernel.decode_rows(batch.rows)]
            assert batch.count or batch.done
            after, done = batch.last, batch.done
    return found


def filled(tablet, count, sizes, seed):
    """Put records of the given sizes of values in random order, delete some and purge them; return what is left."""
    rng = random.Random(seed)
    pairs = {rng.randbytes(rng.randrange(1, 40)): rng.randbytes(rng.choice(sizes)) for _ in range(count)}
    items = list(pairs.items())
    for start in range(0, count, 700):
        tablet.put_many(items[start : start + 700])
    gone = rng.sample(sorted(pairs), len(pairs) // 3)
    tablet.delete_many(gone)
    tablet.purge(tablet.sequence)
    for key in gone:
        del pairs[key]
    return sorted(pairs.items())


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        pytest.param(1, (5,), id="one record"),
        pytest.param(12, (100,), id="a root that is a leaf"),
        pytest.param(30_000, (0, 1, 90), id="small values in leaves of three levels"),
        pytest.param(1_500, (0, 60, 1_900, 2_100, 5_000, 20_000), id="values in the leaf and on pages of their own"),
        pytest.param(300, (9_000,), id="every value on pages of its own"),
    ],
)
@pytest.mark.parametrize("bytes_max", [1 << 20, 3_000])
def test_walks_see_what_single_reads_see(tmp_path, count, sizes, bytes_max):
    """Rows in key order and the check of every record meet each record once, in order, whole."""
    with Store(tmp_path / "data") as store:
        tablet = store.tablet("t")
        expected = filled(tablet, count, sizes, seed=count)
        assert walked(tablet, bytes_max=bytes_max) == expected
        assert [(key, tablet.get(key)) for key, _ in expected] == expected
        with tablet.view() as view:
            assert view.check_all() == (len(expected), sum(len(key) + len(value) for key, value in expected))


def test_a_walk_over_nothing(tmp_path):
    """An empty tablet has no leaf to walk on; nor has one whose records were all removed."""
    with Store(tmp_path / "data") as store:
        tablet = store.tablet("t")
        for _ in range(2):
            assert walked(tablet, bytes_max=1000) == []
            with tablet.view() as view:
                assert view.check_all() == (0, 0)
            tablet.put(b"k", b"v")
            tablet.delete(b"k")
            tablet.purge(tablet.sequence)
