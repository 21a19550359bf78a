"""The tablet's limits, change log, views, growth, threads, requests and copies."""

from __future__ import annotations

import random
import re
import secrets
import struct
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srengine import errors, limits
from srengine._native import tablet as kernel
from srengine.storage import Batch, Store, check_operations, check_rows, encode_deletes, encode_operations, encode_puts
from tests.reference import tablet as reference


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "data") as opened:
        yield opened


@pytest.fixture
def tablet(store):
    return store.tablet("t")


def twin(store, tablet):
    """An empty replica of a tablet."""
    return store.create_tablet(secrets.token_hex(16), lineage=tablet.lineage, seed=tablet.seed)


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 510, 511])
def test_keys_up_to_the_limit(tablet, size):
    """T04: keys of 1 to 511 bytes."""
    key = b"k" * size
    tablet.put(key, b"v")
    assert tablet.get(key) == b"v"


def test_values_up_to_the_limit(tablet):
    """T04: values of 0 bytes to 64 MiB."""
    for size in (0, 1, 4096, limits.VALUE_BYTES_MAX):
        value = b"\x5a" * size
        tablet.put(b"k", value)
        assert tablet.get(b"k") == value
    assert tablet.verify().clean


@pytest.mark.parametrize("key", [b"", b"k" * 512])
def test_keys_beyond_the_limit(tablet, key):
    """T04: beyond the limit InvalidValue names it, and nothing is written."""
    before = tablet.position
    for call in (
        lambda: tablet.put(key, b"v"),
        lambda: tablet.get(key),
        lambda: tablet.delete(key),
        lambda: tablet.put_many([(b"good", b"v"), (key, b"v")]),
        lambda: tablet.delete_many([b"good", key]),
        lambda: tablet.get_many([key]),
        lambda: encode_puts([(key, b"v")]),
    ):
        with pytest.raises(errors.InvalidValue, match="511"):
            call()
    assert tablet.position == before


def test_values_beyond_the_limit(tablet):
    """T04: a value of 64 MiB and a byte is refused and nothing is written."""
    before = tablet.position
    large = bytes(limits.VALUE_BYTES_MAX + 1)
    for call in (
        lambda: tablet.put(b"k", large),
        lambda: tablet.put_many([(b"good", b"v"), (b"k", large)]),
        lambda: encode_puts([(b"k", large)]),
    ):
        with pytest.raises(errors.InvalidValue, match=str(limits.VALUE_BYTES_MAX)):
            call()
    assert tablet.position == before and tablet.get(b"good") is None


@pytest.mark.parametrize("bad", ["text", 7, None, bytearray(b"k")])
def test_keys_and_values_are_bytes(tablet, bad):
    """T04: anything but bytes is a TypeError and changes nothing."""
    before = tablet.position
    for call in (
        lambda: tablet.put(bad, b"v"),
        lambda: tablet.put(b"k", bad),
        lambda: tablet.get(bad),
        lambda: tablet.put_many([(b"k", bad)]),
        lambda: tablet.put_many([(bad, b"v")]),
    ):
        with pytest.raises(TypeError):
            call()
    assert tablet.position == before


def test_wrong_shapes(tablet):
    """T04: triples, both conditions at once, bad bounds and limits are refused."""
    with pytest.raises(errors.InvalidValue):
        tablet.put_many([(b"a", b"b", b"c")])
    with pytest.raises(errors.InvalidValue):
        tablet.put(b"k", b"v", if_absent=True, if_version=3)
    with pytest.raises(errors.InvalidValue):
        tablet.put(b"k", b"v", if_version=-1)
    with pytest.raises(TypeError):
        list(tablet.scan(start="a"))
    with pytest.raises(errors.InvalidValue):
        list(tablet.scan(limit=-1))
    with pytest.raises(errors.InvalidValue):
        list(tablet.scan(start=b"k" * 512))


def test_lists_work_as_pairs(tablet):
    """T01: pairs may be lists, the iterable anything, a later pair of one key wins."""
    tablet.put_many(iter([[b"a", b"1"], (b"b", b"2"), (b"a", b"3")]))
    assert dict(tablet.scan()) == {b"a": b"3", b"b": b"2"}
    tablet.put_many({b"c": b"4"}.items())
    assert tablet.get_many([b"c", b"a", b"x"]) == [b"4", b"3", None]
    assert tablet.put_many([]) == tablet.sequence
    assert tablet.delete_many([]) == 0


# --- change log -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.booleans(), st.integers(0, 15), st.binary(max_size=4)), min_size=1, max_size=12),
        min_size=1,
        max_size=8,
    ),
    st.data(),
)
def test_changes_since_any_sequence(tmp_path_factory, rounds, data):
    """T06: a copy at S that gets the changes since S is equal, for every boundary S from the purge mark on."""
    with Store(tmp_path_factory.mktemp("log") / "data", map_bytes=1 << 20) as store:
        tablet = store.tablet("t")
        copies = []
        for number, operations in enumerate(rounds):
            tablet.apply(
                [
                    Batch(
                        encode_operations(
                            [
                                (0 if put else 1, b"%d" % key, value if put else None, 0, 0)
                                for put, key, value in operations
                            ]
                        )
                    )
                ]
            )
            if number in (1, 4):
                tablet.purge(data.draw(st.integers(tablet.purge_mark, tablet.sequence)))
            copy = twin(store, tablet)
            copy.apply_delta(tablet.delta_since(0, bytes_max=1 << 20)) if not tablet.purge_mark else None
            copies.append(copy)
        for copy in copies:
            if copy.sequence < tablet.purge_mark:
                with pytest.raises(errors.BelowPurgeMark):
                    tablet.delta_since(copy.sequence, bytes_max=1 << 20)
                continue
            delta = tablet.delta_since(copy.sequence, bytes_max=1 << 20)
            assert copy.apply_delta(delta) == tablet.position
            assert copy.diff(tablet) == []
            assert copy.verify().damages == []


def test_dead_change_entries_are_bounded(tablet):
    """T06: overwriting the same keys again and again leaves at most about as many dead entries as live ones."""
    rng = random.Random(1)
    for _ in range(300):
        tablet.put_many([(b"%d" % rng.randrange(500), b"v") for _ in range(100)])
    assert tablet.dead_changes <= tablet.count + 1024 + 200
    assert tablet.verify().clean


def test_a_dead_entry_is_never_shown(tablet):
    """T06: readers of the change log see each key once, at its latest sequence."""
    for value in (b"1", b"2", b"3"):
        tablet.put(b"a", value)
    tablet.put(b"b", b"1")
    with tablet.view() as view:
        rows = kernel.decode_rows(view.rows_since(0, bytes_max=1000).rows)
    assert [(key, value, sequence) for key, value, sequence, *_ in rows] == [(b"a", b"3", 3), (b"b", b"1", 4)]


def test_delta_bound(tablet):
    """T06: a delta larger than asked for is None, a sequence ahead an error, an empty one is cheap."""
    tablet.put_many([(b"%d" % i, b"v" * 100) for i in range(100)])
    assert tablet.delta_since(0, bytes_max=1000) is None
    with pytest.raises(errors.InvalidValue):
        tablet.delta_since(tablet.sequence + 1, bytes_max=1000)
    empty = tablet.delta_since(tablet.sequence, bytes_max=1000)
    assert empty.rows == b"" and empty.meta == b"" and empty.position == tablet.position


def test_delta_costs_no_more_than_its_records(tablet):
    """T06: a row costs 24 bytes beside key and value, and nothing but changed records travels."""
    tablet.put_many([(b"%06d" % i, b"v" * 50) for i in range(2000)])
    before = tablet.sequence
    tablet.put_many([(b"%06d" % i, b"w" * 50) for i in range(100, 120)])
    assert len(tablet.delta_since(before, bytes_max=1 << 20).rows) == 20 * (24 + 6 + 50)


def test_a_delta_proves_its_end(store, tablet):
    """T06: another base, another lineage, a changed row, a cut, a wrong state: refused by name, nothing changed."""
    copy = twin(store, tablet)
    tablet.put_many([(b"%d" % i, b"v") for i in range(10)])
    first = tablet.delta_since(0, bytes_max=10_000)
    copy.apply_delta(first)
    tablet.put(b"more", b"x")
    delta = tablet.delta_since(copy.sequence, bytes_max=10_000)
    before = copy.position
    flipped = bytearray(delta.rows)
    flipped[-1] ^= 1
    for bad, error in (
        (first, errors.Diverged),
        (delta._replace(base_root=bytes(16)), errors.Diverged),
        (delta._replace(rows=bytes(flipped)), errors.Diverged),
        (delta._replace(rows=b""), errors.Diverged),
        (delta._replace(rows=delta.rows[:-1]), errors.FrameError),
        (delta._replace(rows=delta.rows * 2), errors.FrameError),
        (delta._replace(state=delta.state[:-1]), errors.FrameError),
        (delta._replace(state=first.state), errors.Diverged),
        (delta._replace(position=delta.position._replace(lineage="0" * 32)), errors.Diverged),
        (delta._replace(meta=b"\x00"), errors.FrameError),
    ):
        with pytest.raises(error):
            copy.apply_delta(bad)
        assert copy.position == before
    assert copy.apply_delta(delta) == tablet.position


# --- views and the map ------------------------------------------------------------------------------------------------


def test_a_view_does_not_move(tablet):
    """T09: writes under a view are invisible to it."""
    tablet.put_many([(b"a", b"1"), (b"b", b"1")])
    with tablet.view() as view:
        position = view.position
        tablet.put(b"a", b"2")
        tablet.delete(b"b")
        tablet.put(b"c", b"1")
        assert dict(view.scan()) == {b"a": b"1", b"b": b"1"}
        assert view.get(b"c") is None and view.get(b"b") == b"1" and view.position == position
    with pytest.raises(errors.Closed):
        view.get(b"a")


def test_an_old_view_expires(tmp_path):
    """T09, F19: past its age a view raises ViewExpired and the file stops growing."""
    with Store(tmp_path / "data", view_age_s_max=30.0) as store:
        tablet = store.tablet("t")
        tablet.put_many([(b"%d" % i, b"v" * 100) for i in range(1000)])
        view = tablet.view(max_age_s=0.0)
        pinned = tablet.view()
        assert tablet.counters["pinned"] == 2
        # The age is compared with a monotonic millisecond clock: the first write after it has moved expires the view.
        while tablet.counters["expired"] == 0:
            tablet.put(b"x", b"y")
        with pytest.raises(errors.ViewExpired):
            view.get(b"1")
        with pytest.raises(errors.ViewExpired):
            list(view.scan())
        assert pinned.get(b"1") == b"v" * 100
        pinned.close()
        assert tablet.counters["pinned"] == 0
        for _ in range(20):
            tablet.put_many([(b"%d" % i, b"w" * 100) for i in range(1000)])
        settled = tablet.file_bytes
        for _ in range(100):
            tablet.put_many([(b"%d" % i, b"w" * 100) for i in range(1000)])
        assert tablet.file_bytes <= settled * 1.5
        view.close()


def test_the_map_grows_under_readers(tmp_path):
    """T05: a 64 KiB map takes 100 MiB while readers come and go; nobody sees an error."""
    with Store(tmp_path / "data", map_bytes=64 * 1024) as store:
        tablet = store.tablet("t")
        tablet.put(b"first", b"1")
        stop = threading.Event()
        failures: list[BaseException] = []
        reads = [0, 0]

        def read(slot):
            try:
                while not stop.is_set():
                    with tablet.view() as view:
                        assert view.get(b"first") == b"1"
                        for _ in view.scan(limit=50):
                            pass
                    assert tablet.get(b"first") == b"1"
                    reads[slot] += 1
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=read, args=(slot,)) for slot in range(2)]
        for thread in threads:
            thread.start()
        value = b"v" * 10_000
        for batch in range(100):
            tablet.put_many([(b"%d-%d" % (batch, i), value) for i in range(105)])
        stop.set()
        for thread in threads:
            thread.join()
        assert failures == []
        assert all(reads)
        assert tablet.counters["grown"] >= 10 and tablet.file_bytes > 100 << 20
        assert tablet.live_count == 100 * 105 + 1


def test_a_full_map_waits_for_a_view_no_longer_than_its_age(tmp_path):
    """T05, F08: a view held by the writer itself delays growth until its age, then expires; the write succeeds."""
    with Store(tmp_path / "data", map_bytes=64 * 1024, view_age_s_max=0.2) as store:
        tablet = store.tablet("t")
        tablet.put(b"k", b"v")
        view = tablet.view()
        tablet.put_many([(b"%d" % i, b"v" * 1000) for i in range(1000)])
        with pytest.raises(errors.ViewExpired):
            view.get(b"k")
        assert tablet.live_count == 1001


# --- damage -----------------------------------------------------------------------------------------------------------


def test_every_bit_of_a_record_is_checked(tmp_path):
    """T11: flip any bit of a stored header or value: CorruptionError with tablet and key, never wrong data."""
    with Store(tmp_path / "data") as store:
        tablet = store.tablet("t")
        key, value = b"the-key", b"a value to be damaged"
        tablet.put(key, value)
        path = tablet.path / "data.mdb"
        stored = reference.header(key, 0, 1, tablet.hybrid_clock, value) + value
    content = path.read_bytes()
    places = [at for at in range(len(content)) if content.startswith(stored, at)]
    assert places
    for bit in range(len(stored) * 8):
        damaged = bytearray(content)
        for at in places:
            damaged[at + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with Store(tmp_path / "data") as store:
            tablet = store.tablet("t")
            with pytest.raises(errors.CorruptionError) as caught:
                tablet.get(key)
            assert caught.value.key == key.hex() and tablet.id in caught.value.tablet
            with pytest.raises(errors.CorruptionError):
                list(tablet.scan())
            with tablet.view() as view, pytest.raises(errors.CorruptionError):
                view.rows_by_key(None, bytes_max=1000)
            with pytest.raises(errors.CorruptionError):
                tablet.delta_since(0, bytes_max=1000)
            assert [damage.key for damage in tablet.verify().damages] == [key]


# --- threads ----------------------------------------------------------------------------------------------------------


def test_group_commit(tmp_path):
    """T19: 16 threads of single puts share transactions: commits are at most a fifth of the puts."""
    with Store(tmp_path / "data") as store:
        tablet = store.tablet("t")
        barrier = threading.Barrier(16)
        before = tablet.counters["commits"]

        def work(number):
            barrier.wait()
            for i in range(100):
                tablet.put(b"%d-%d" % (number, i), b"v" * 50)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert tablet.live_count == 1600
        assert tablet.counters["commits"] - before <= 1600 // 5
        assert tablet.verify().clean


def test_a_bad_neighbour_fails_alone(tmp_path):
    """T19: writers that share a transaction with one whose record is damaged are not harmed."""
    with Store(tmp_path / "data") as store:
        tablet = store.tablet("t")
        tablet.put(b"bad", b"x" * 100)
        stored = reference.header(b"bad", 0, 1, tablet.hybrid_clock, b"x" * 100)
        path = tablet.path / "data.mdb"
    content = path.read_bytes()
    path.write_bytes(content.replace(stored, stored[:4] + bytes(8) + stored[12:]))
    with Store(tmp_path / "data") as store:
        tablet = store.tablet("t")
        barrier = threading.Barrier(8)
        outcomes = []

        def work(number):
            barrier.wait()
            for i in range(20):
                try:
                    tablet.put(b"bad" if number == 0 else b"%d-%d" % (number, i), b"v")
                    outcomes.append((number, None))
                except errors.CorruptionError as error:
                    outcomes.append((number, error.key))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {key for number, key in outcomes if number == 0} == {b"bad".hex()}
        assert {key for number, key in outcomes if number != 0} == {None}
        assert len(outcomes) == 160


def test_native_work_releases_the_gil(tmp_path):
    """T18: a Python thread makes progress while the kernel applies, scans and writes rows."""
    with Store(tmp_path / "data") as store:
        tablet = store.tablet("t")
        encoded = encode_puts([(secrets.token_bytes(16), b"v" * 1200) for _ in range(50_000)])
        ticks = 0
        stop = threading.Event()

        def tick():
            nonlocal ticks
            while not stop.is_set():
                ticks += 1
                time.sleep(0)

        thread = threading.Thread(target=tick)
        interval = sys.getswitchinterval()
        # From here on nobody takes the GIL from a thread that does not give it up: the ticks of one call are those of
        # the time that the kernel spent without it. Entering and leaving a view gives a tick or two.
        sys.setswitchinterval(1000.0)
        thread.start()
        try:
            for call in (
                lambda: tablet.apply([Batch(encoded)]),
                lambda: tablet.view().check_all(),
                lambda: tablet.view().rows_by_key(None, bytes_max=64 << 20),
            ):
                for _ in range(100):  # a busy machine may not run the other thread during one call
                    before = ticks
                    call()
                    if ticks - before > 50:
                        break
                else:
                    pytest.fail("no progress in another thread during a hundred calls")
        finally:
            sys.setswitchinterval(interval)
            stop.set()
            thread.join()


# --- requests ---------------------------------------------------------------------------------------------------------


def test_a_repeated_request_gets_the_kept_answer(tablet):
    """F27: a request id repeats its answer and changes nothing, in the same transaction, later, and after a reopen."""
    session = b"s" * 16
    tablet.open_session(session)
    insert = Batch(encode_operations([(0, b"k", b"1", 1, 0), (0, b"j", b"1", 0, 0)]), session, 1)
    first, again = tablet.apply([insert, insert])
    assert first.results == b"\x00\x00" and not first.duplicate
    assert again.duplicate and again.results == first.results and again.first_sequence == first.first_sequence
    root = tablet.root
    later = tablet.apply([insert])[0]
    assert later.duplicate and later.results == b"\x00\x00" and tablet.root == root
    assert later.entry_end > later.last_sequence
    failed = tablet.apply([insert._replace(number=2)])[0]
    assert failed.results == b"\x01\x00" and not failed.duplicate
    assert tablet.verify().clean


def test_an_unknown_session_is_refused(tablet):
    """F27: a session that was not opened, or was evicted, is refused and executes nothing."""
    outcome = tablet.apply([Batch(encode_puts([(b"k", b"v")]), b"u" * 16, 1)])[0]
    assert outcome.refused and tablet.get(b"k") is None


def test_numbers_out_of_order_run_once(tablet):
    """F27: a lower number that was never executed runs, once."""
    session = b"s" * 16
    tablet.open_session(session)
    tablet.apply([Batch(encode_puts([(b"five", b"v")]), session, 5)])
    assert not tablet.apply([Batch(encode_puts([(b"four", b"v")]), session, 4)])[0].duplicate
    assert tablet.apply([Batch(encode_puts([(b"four", b"w")]), session, 4)])[0].duplicate
    assert tablet.get(b"four") == b"v"


def test_answers_and_sessions_are_bounded(store, tablet):
    """F27: old answers and sessions go by the log alone: a replica that got deltas refuses and keeps the same."""
    copy = twin(store, tablet)
    sessions = [struct.pack("<QQ", 7, i) for i in range(1100)]
    tablet.apply([Batch(b"", session, 0, 2) for session in sessions[:600]])
    copy.apply_delta(tablet.delta_since(0, bytes_max=1 << 24))
    tablet.apply([Batch(b"", session, 0, 2) for session in sessions[600:]])
    survivor, evicted = sessions[-1], sessions[0]
    for start in range(1, 4301, 500):
        tablet.apply(
            [Batch(encode_puts([(b"k", b"%d" % n)]), survivor, n) for n in range(start, min(start + 500, 4301))]
        )
        copy.apply_delta(tablet.delta_since(copy.sequence, bytes_max=1 << 24))
    for replica in (tablet, copy):
        assert replica.verify().clean
    assert copy.position == tablet.position
    outcomes = tablet.apply(
        [
            Batch(encode_puts([(b"k", b"again")]), survivor, 100),
            Batch(encode_puts([(b"k", b"again")]), survivor, 4300),
            Batch(encode_puts([(b"k", b"again")]), evicted, 1),
        ]
    )
    assert [(o.refused, o.duplicate) for o in outcomes] == [(True, False), (False, True), (True, False)]
    assert tablet.get(b"k") == b"4300"


# --- copies -----------------------------------------------------------------------------------------------------------


def fill_from(source, target, *, rows_bytes=5000):
    """Copy by key over short views, closed by the delta since the scan began."""
    began, after = source.sequence, None
    while True:
        with source.view() as view:
            batch = view.rows_by_key(after, bytes_max=rows_bytes)
        target.fill(batch.rows, b"mark")
        if batch.done:
            break
        after = batch.last
        yield
    with source.view() as view:
        closing = view.rows_since(began, bytes_max=1 << 24)
        target.finish_fill(view.meta_rows(0), view.state, rows=closing.rows)


def test_a_full_copy_under_writes(store, tablet):
    """T10: a copy filled by key while the source changes has its root, count, lineage and requests at the end."""
    rng = random.Random(3)
    tablet.open_session(b"s" * 16)
    tablet.put_many([(b"%d" % i, rng.randbytes(100)) for i in range(2000)])
    staged = store.stage_tablet(tablet.id, seed=tablet.seed)
    for _ in fill_from(tablet, staged):
        assert staged.fill_mark == b"mark"
        with pytest.raises(errors.NotReady):
            staged.get(b"1")
        with pytest.raises(errors.NotReady):
            staged.put(b"1", b"1")
        tablet.put_many([(b"%d" % rng.randrange(2500), rng.randbytes(50)) for _ in range(5)])
        tablet.delete_many([b"%d" % rng.randrange(2500) for _ in range(5)])
        tablet.apply([Batch(encode_deletes([b"%d" % rng.randrange(2500)]), b"s" * 16, tablet.sequence)])
    assert staged.position == tablet.position and staged.fill_mark is None
    assert staged.diff(tablet) == [] and staged.verify().clean
    assert staged.log_floor == tablet.sequence
    tablet.delete(b"1")
    staged.apply_delta(tablet.delta_since(staged.sequence, bytes_max=1 << 20))
    assert staged.position == tablet.position


def test_a_copy_that_does_not_prove_itself_stays_marked(store, tablet):
    """T10: a lost row is noticed at the end: SnapshotDamaged, the mark stays, also over a reopen."""
    tablet.put_many([(b"%d" % i, b"v") for i in range(100)])
    staged = store.stage_tablet(tablet.id, seed=tablet.seed)
    with tablet.view() as view:
        staged.fill(view.rows_by_key(None, bytes_max=500).rows, b"mark")
        with pytest.raises(errors.SnapshotDamaged):
            staged.finish_fill(view.meta_rows(0), view.state)
    assert staged.fill_mark == b"mark"
    path, tablet_id = staged.path, staged.id
    staged.close()
    from srengine.storage.tablet import Tablet

    again = Tablet.open(path, tablet_id)
    assert again.fill_mark == b"mark"
    with pytest.raises(errors.NotReady):
        again.get(b"1")
    again.close()


def test_the_first_own_write_to_a_copy_begins_a_child_lineage(store, tablet):
    """T10: a copy outside its group keeps the lineage until it is written to; then the ancestry says where."""
    tablet.put(b"k", b"v")
    copy = store.create_tablet(secrets.token_hex(16))
    copy.adopt_seed(tablet.seed)
    for _ in fill_from(tablet, copy):
        pass
    copy.mark_adopted()
    assert copy.lineage == tablet.lineage and copy.position == tablet.position
    copy.put(b"own", b"1")
    assert copy.lineage != tablet.lineage
    assert copy.ancestry == [(tablet.lineage, 1), (copy.lineage, tablet.sequence + 1)]
    with pytest.raises(errors.Conflict):
        copy.adopt_seed(b"12345678")


# --- bytes ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    key=st.binary(min_size=1, max_size=511),
    value=st.binary(max_size=600),
    flags=st.sampled_from([0, 1]),
    sequence=st.integers(1, 2**64 - 1),
    clock=st.integers(0, 2**64 - 1),
    seed=st.binary(min_size=8, max_size=8),
)
def test_record_bytes_and_digests(key, value, flags, sequence, clock, seed):
    """T07: stored bytes and digests are those of docs/formats.md, computed by plain Python."""
    stored, digest = kernel.digest_vector(int.from_bytes(seed, "little"), key, value, flags, sequence, clock)
    assert stored == reference.header(key, flags, sequence, clock, value) + value
    assert int.from_bytes(digest, "little") == reference.record_digest(seed, key, flags, sequence, clock, value)


@pytest.mark.fuzz
@settings(deadline=None)
@given(st.binary(max_size=400))
def test_operations_decoder_takes_anything(data):
    """F38: bytes that are no operations give FrameError and nothing else; those that are round-trip."""
    try:
        count = check_operations(data)
    except errors.FrameError:
        return
    assert count >= 0 and (count == 0) == (not data)


@pytest.mark.fuzz
@settings(deadline=None)
@given(st.binary(max_size=400), st.sampled_from([0, 1, 2]))
def test_rows_decoder_takes_anything(data, order):
    """F38: bytes that are no rows give FrameError and nothing else."""
    try:
        count, _, _ = check_rows(data, order)
    except errors.FrameError:
        return
    assert (count == 0) == (not data)


@pytest.mark.fuzz
@settings(deadline=None, max_examples=200)
@given(st.data())
def test_damaged_rows_never_get_in(tmp_path_factory, data):
    """F38, T12: rows with flipped bytes are refused, or proved wrong by the root; the copy does not change."""
    with Store(tmp_path_factory.mktemp("rows") / "data", map_bytes=1 << 20) as store:
        tablet = store.tablet("t")
        copy = twin(store, tablet)
        tablet.put_many([(b"%d" % i, b"value") for i in range(5)])
        delta = tablet.delta_since(0, bytes_max=10_000)
        part = data.draw(st.sampled_from(["rows", "meta", "state"]))
        content = bytearray(getattr(delta, part))
        if not content:
            return
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
        before = copy.position
        try:
            copy.apply_delta(delta._replace(**{part: bytes(content)}))
        except (errors.FrameError, errors.Diverged):
            assert copy.position == before
        else:
            assert part == "meta"
            assert copy.position == tablet.position and copy.verify().clean


def test_vectors_of_the_documentation():
    """T07: the digests in docs/formats.md are what the kernel and plain Python compute."""
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    vectors = re.findall(
        r"^\| `([^`]+)` \| (?:`([^`]*)` )?\| (\d) \| (\d+) \| (\d+) \| `([0-9a-f]{32})` \|$", text, re.MULTILINE
    )
    assert len(vectors) == 3
    for key, value, flags, sequence, clock, expected in vectors:
        fields = (int(flags), int(sequence), int(clock))
        _, digest = kernel.digest_vector(0x0102030405060708, key.encode(), value.encode(), *fields)
        assert digest.hex() == expected
        seed = (0x0102030405060708).to_bytes(8, "little")
        by_hand = reference.record_digest(seed, key.encode(), *fields, value.encode())
        assert by_hand.to_bytes(16, "little").hex() == expected


def test_closing_under_work(tmp_path):
    """T14: closing a tablet while threads read and write it ends every call with a typed error or a result."""
    for _ in range(10):
        with Store(tmp_path / "data") as store:
            tablet = store.tablet("t")
            tablet.put(b"k", b"v")
            failures = []
            busy = threading.Barrier(5)

            def work(number, tablet=tablet, failures=failures, busy=busy):
                busy.wait()
                try:
                    while True:
                        tablet.put(b"%d" % number, b"v")
                        assert tablet.get(b"k") == b"v"
                        with tablet.view() as view:
                            assert view.get(b"k") == b"v"
                except (errors.Closed, errors.ViewExpired):
                    pass
                except BaseException as error:
                    failures.append(error)

            threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
            for thread in threads:
                thread.start()
            busy.wait()
            while tablet.counters["commits"] < 20:
                pass
            tablet.close()
            for thread in threads:
                thread.join()
            assert failures == []


# --- diff -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.binary(min_size=1, max_size=3), st.binary(max_size=3), max_size=30),
    st.dictionaries(st.binary(min_size=1, max_size=3), st.binary(max_size=3), max_size=30),
    st.booleans(),
)
def test_diff_is_the_set_difference(tmp_path_factory, here, there, same_seed):
    """T08: the keys that differ are those of the set difference, whether the seeds are equal or not."""
    with Store(tmp_path_factory.mktemp("diff") / "data", map_bytes=1 << 20) as store:
        one = store.tablet("one")
        seed = one.seed if same_seed else None
        other = store.create_tablet(secrets.token_hex(16), seed=seed)
        one.put_many(here.items())
        other.put_many(there.items())
        expected = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
        assert one.diff(other) == expected
        assert other.diff(one) == expected


def test_equal_tablets_cost_one_comparison(store, tablet):
    """T08: two copies of one history answer from their roots; no record is read (damage in one would be noticed)."""
    copy = twin(store, tablet)
    tablet.put_many([(b"%d" % i, b"v") for i in range(100)])
    copy.apply_delta(tablet.delta_since(0, bytes_max=1 << 20))
    stored = reference.header(b"7", 0, 8, tablet.hybrid_clock, b"v")
    path, tablet_id = copy.path, copy.id
    copy.close()
    content = (path / "data.mdb").read_bytes()
    assert stored in content
    (path / "data.mdb").write_bytes(content.replace(stored, stored[:-1] + bytes([stored[-1] ^ 1])))
    damaged = store.open_tablet(tablet_id)
    with pytest.raises(errors.CorruptionError):
        list(damaged.scan())
    assert tablet.diff(damaged) == []


def test_closing_one_view_from_many_threads(tablet):
    """T09: threads that use a view while others close it get a result or a typed error."""
    tablet.put_many([(b"%d" % i, b"v") for i in range(100)])
    for _ in range(50):
        view = tablet.view()
        barrier = threading.Barrier(4)
        failures = []

        def work(number, view=view, barrier=barrier, failures=failures):
            barrier.wait()
            try:
                for _ in range(20):
                    assert len(list(view.scan(limit=50))) == 50
                    if number > 1:
                        view.close()
            except errors.Closed:
                pass
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
    assert tablet.counters["pinned"] == 0
