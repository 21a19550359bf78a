"""The tablet against plain Python: whatever sequence of calls, reopens included, both hold the same."""

from __future__ import annotations

import secrets

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from srengine import errors
from srengine.storage import Batch, Store, encode_operations
from srengine.storage.entries import KIND_PURGE
from tests.reference.tablet import DELETE, PUT, ReferenceTablet

KEYS = st.one_of(st.binary(min_size=1, max_size=3), st.sampled_from([b"a", b"ab", b"abc", b"\xff" * 511, b"\x00"]))
VALUES = st.one_of(st.binary(max_size=40), st.sampled_from([b"", b"x" * 5000, b"y" * 3]))
CONDITIONS = st.sampled_from([0, 0, 0, 1, 3])


class TabletMachine(RuleBasedStateMachine):
    """T01, T07: put, get, delete, scan, batches, purge and reopen agree with a dict, and so do root and counts."""

    @initialize(directory=st.just(None))
    def begin(self, directory):
        import tempfile

        self.directory = tempfile.TemporaryDirectory()
        self.open()
        self.model = ReferenceTablet(self.tablet.seed)

    def open(self):
        self.store = Store(self.directory.name + "/data", map_bytes=1 << 20)
        self.tablet = self.store.tablet("t")

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            self.directory.cleanup()

    def did(self, operations):
        results = self.model.apply(operations, self.tablet.hybrid_clock)
        assert self.tablet.sequence == self.model.sequence
        return results

    @rule(key=KEYS, value=VALUES)
    def put(self, key, value):
        version = self.tablet.put(key, value)
        self.did([(PUT, key, value, 0, 0)])
        assert version == self.model.sequence

    @rule(key=KEYS, value=VALUES)
    def put_if_absent(self, key, value):
        held = self.model.live().get(key)
        if held is None:
            self.tablet.put(key, value, if_absent=True)
        else:
            with pytest.raises(errors.Conflict) as caught:
                self.tablet.put(key, value, if_absent=True)
            assert caught.value.current_version == self.model.records[key].sequence
        self.did([(PUT, key, value, 1, 0)])

    @rule(key=KEYS, value=VALUES, wrong=st.booleans())
    def put_if_version(self, key, value, wrong):
        record = self.model.records.get(key)
        good = record is not None and not record.tombstone and not wrong
        version = record.sequence if good else 1 << 40
        if good:
            self.tablet.put(key, value, if_version=version)
        else:
            with pytest.raises(errors.Conflict):
                self.tablet.put(key, value, if_version=version)
        self.did([(PUT, key, value, 2, version)])

    @rule(key=KEYS)
    def delete(self, key):
        assert self.tablet.delete(key) == (key in self.model.live())
        self.did([(DELETE, key, None, 0, 0)])

    @rule(pairs=st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=30))
    def put_many(self, pairs):
        self.tablet.put_many(pairs)
        self.did([(PUT, key, value, 0, 0) for key, value in pairs])

    @rule(keys=st.lists(KEYS, min_size=1, max_size=30))
    def delete_many(self, keys):
        before = self.model.live()
        assert self.tablet.delete_many(keys) == len({key for key in keys if key in before})
        self.did([(DELETE, key, None, 0, 0) for key in keys])

    @rule(
        entries=st.lists(
            st.lists(st.tuples(st.sampled_from([PUT, DELETE]), KEYS, VALUES, CONDITIONS), max_size=12),
            min_size=1,
            max_size=5,
        )
    )
    def apply(self, entries):
        encoded = [
            [(kind, key, value if kind == PUT else None, condition, 0) for kind, key, value, condition in entry]
            for entry in entries
        ]
        outcomes = self.tablet.apply([Batch(encode_operations(entry)) for entry in encoded])
        # Entries of one transaction have clocks one apart, the last of them the tablet's.
        last = self.tablet.hybrid_clock
        for index, (entry, outcome) in enumerate(zip(encoded, outcomes, strict=True)):
            clocks = [self.records_clock(entry, outcome), last - (len(encoded) - 1 - index)]
            clock = next(clock for clock in clocks if clock is not None)
            assert outcome.results == self.model.apply(entry, clock)
            assert outcome.entry_end == self.model.sequence
            if index == len(encoded) - 1:
                assert outcome.root == self.model.root()

    def records_clock(self, entry, outcome):
        """The clock of an entry as a record that it wrote shows it, if one still stands."""
        for ordinal, (_, key, *_rest) in enumerate(entry):
            record = self.tablet.get_record(key, tombstones=True)
            if record is not None and record.version == outcome.first_sequence + ordinal:
                return record.hybrid_clock
        return None

    @precondition(lambda self: self.model.sequence)
    @rule(fraction=st.floats(0, 1))
    def purge(self, fraction):
        mark = max(int(self.model.sequence * fraction), self.model.purge_mark)
        self.tablet.apply([Batch(b"", kind=KIND_PURGE, argument=mark)])
        self.model.purge(mark)

    @rule()
    def reopen(self):
        before = self.tablet.position
        self.store.close()
        self.open()
        assert self.tablet.position == before

    @rule(key=KEYS)
    def get(self, key):
        assert self.tablet.get(key) == self.model.live().get(key)
        assert (key in self.tablet) == (key in self.model.live())

    @rule(
        start=st.none() | KEYS,
        stop=st.none() | KEYS,
        prefix=st.none() | st.binary(max_size=2),
        reverse=st.booleans(),
        limit=st.none() | st.integers(0, 7),
    )
    def scan(self, start, stop, prefix, reverse, limit):
        expected = [
            (key, value)
            for key, value in sorted(self.model.live().items(), reverse=reverse)
            if (start is None or key >= start) and (stop is None or key < stop) and key.startswith(prefix or b"")
        ]
        found = self.tablet.scan(start=start, stop=stop, prefix=prefix, reverse=reverse, limit=limit)
        assert list(found) == expected[:limit]

    @invariant()
    def same(self):
        if hasattr(self, "model"):
            assert self.tablet.root == self.model.root()
            assert self.tablet.count == len(self.model.records)
            assert self.tablet.live_count == len(self.model.live())

    @rule()
    def verify(self):
        assert self.tablet.verify().damages == []


TestTabletModel = TabletMachine.TestCase
TestTabletModel.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)


def test_grouping_does_not_matter(tmp_path):
    """T06: the same entries one by one or in one transaction give the same records, sequences and change log."""
    with Store(tmp_path / "data") as store:
        import random

        rng = random.Random(7)
        one, other = store.tablet("one"), store.tablet("other")
        for _ in range(30):
            batches = []
            for _ in range(rng.randrange(1, 8)):
                operations = []
                for _ in range(rng.randrange(6)):
                    kind = rng.randrange(2)
                    key, value = b"%d" % rng.randrange(20), rng.randbytes(rng.randrange(30))
                    operations.append((kind, key, value if kind == PUT else None, rng.choice([0, 0, 1, 3]), 0))
                batches.append(Batch(encode_operations(operations)))
            together = one.apply(batches)
            apart = [other.apply([batch])[0] for batch in batches]
            assert [(o.first_sequence, o.entry_end, o.results) for o in together] == [
                (o.first_sequence, o.entry_end, o.results) for o in apart
            ]
            with one.view() as here, other.view() as there:
                assert [(r.key, r.value, r.version, r.tombstone) for r in here.records(tombstones=True)] == [
                    (r.key, r.value, r.version, r.tombstone) for r in there.records(tombstones=True)
                ]


def test_roots_between_entries_of_one_transaction(tmp_path):
    """T07: the root at the end of every entry is the one that the records at that point add up to."""
    with Store(tmp_path / "data") as store:
        tablet = store.tablet("t")
        model = ReferenceTablet(tablet.seed)
        entries = [
            [(PUT, b"k", b"%d" % i, 0, 0), (DELETE, b"k", None, 0, 0), (PUT, b"k%d" % i, b"v", 0, 0)] for i in range(5)
        ]
        outcomes = tablet.apply([Batch(encode_operations(entry)) for entry in entries])
        last = tablet.hybrid_clock
        clocks = [tablet.get_record(b"k%d" % i).hybrid_clock for i in range(5)]
        assert clocks[-1] == last and clocks == sorted(set(clocks))
        for entry, outcome, clock in zip(entries, outcomes, clocks, strict=True):
            model.apply(entry, clock)
            assert outcome.root == model.root()
            assert tablet.root_at(outcome.entry_end) == outcome.root
        assert tablet.root_at(outcomes[0].first_sequence) is None


def test_seeds_differ(tmp_path):
    """T07: two tablets with the same records and other seeds have other roots."""
    with Store(tmp_path / "data") as store:
        one = store.create_tablet(secrets.token_hex(16), lineage="1" * 32, seed=b"00000001")
        other = store.create_tablet(secrets.token_hex(16), lineage="1" * 32, seed=b"00000002")
        one.put(b"k", b"v")
        other.put(b"k", b"v")
        assert one.root != other.root
        assert one.diff(other) == []
