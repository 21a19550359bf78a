"""Damaged and lying snapshots: each is refused by name, and the target is as it was."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srengine import errors
from srengine.snapshot import SnapshotSink, SnapshotSource, Staged, apply_snapshot, verify_snapshot
from srengine.snapshot import format as words
from tests.reference import chunk as oracle
from tests.reference.snapshot_tablet import PlainStore, PlainTablet
from tests.snapshot.shipping import change, made_tablet


def items_of(seed: int = 1, *, compression: str = "none", count: int = 120) -> list[bytes]:
    """Return the items of a full snapshot with chunks by key and by sequence."""
    tablet = made_tablet(seed, count=count)
    chance = random.Random(seed)
    # Only while the scan runs: the snapshot gets chunks of both kinds.
    writes = iter(range(6))

    def write() -> None:
        if next(writes, None) is not None:
            change(tablet, chance, 8)

    tablet.on_read = write
    tablet.view_calls_max = 3
    return list(SnapshotSource(tablet, chunk_bytes=700, compression=compression))


ITEMS = items_of()
OTHER = items_of(2)
PACKED = items_of(compression="zstd")


def refused(items: list[bytes], tmp_path, match: str = r".+") -> errors.SnapshotDamaged:
    """Check that file and sink refuse the items and touch nothing; return the file's error."""
    path = tmp_path / "snap"
    path.write_bytes(b"".join(items))
    target = PlainTablet(lineage="fresh")
    with pytest.raises(errors.SnapshotDamaged, match=match) as caught:
        apply_snapshot(target, path)
    assert str(path) in str(caught.value)
    assert (target.records, target.fills, target.fill_mark) == ({}, [], None)
    store = PlainStore()
    old = store.tablets["t1"] = made_tablet(3, count=10)
    with SnapshotSink(Staged(store, "t1")) as sink, pytest.raises(errors.SnapshotDamaged):
        for item in items:
            sink.accept(item)
        sink.finish()
    # What was proved at the trailer stays proved; anything else leaves the old tablet.
    assert sink.progress.complete or store.tablets["t1"] is old
    return caught.value


def test_the_undamaged_one_is_accepted(tmp_path):
    for items in (ITEMS, PACKED):
        (tmp_path / "snap").write_bytes(b"".join(items))
        apply_snapshot(PlainTablet(lineage="fresh"), tmp_path / "snap")
    assert words.read_head(ITEMS[BY_KEY]).by_key
    assert not words.read_head(ITEMS[BY_SEQUENCE]).by_key


@pytest.mark.parametrize("items", [ITEMS, PACKED], ids=["none", "zstd"])
def test_every_flipped_byte_is_refused(items, tmp_path):
    """T12: flip. Bytes all over the file, with a moving bit (every bit of one item: test_kernel.py)."""
    whole = b"".join(items)
    path = tmp_path / "snap"
    for at in range(0, len(whole), 17):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises((errors.SnapshotDamaged, errors.UnsupportedFeature)):
            verify_snapshot(path)


def test_every_truncation_is_refused(tmp_path):
    """T12: truncate, inside items and between them."""
    whole = b"".join(ITEMS)
    path = tmp_path / "snap"
    ends = [sum(map(len, ITEMS[:n])) for n in range(len(ITEMS))]
    for size in sorted({*range(0, len(whole), 61), *ends}):
        path.write_bytes(whole[:size])
        with pytest.raises(errors.SnapshotDamaged, match="ends"):
            verify_snapshot(path)
    for count in range(len(ITEMS)):
        refused(ITEMS[:count], tmp_path, "ends before its trailer")


def test_what_is_longer_is_refused(tmp_path):
    """T12: extend, by anything."""
    refused([*ITEMS, b"\0"], tmp_path, "ends inside the head")
    refused([*ITEMS, bytes(500)], tmp_path, "no item of a snapshot")
    refused([*ITEMS, ITEMS[-1]], tmp_path, "after the trailer")
    refused([*ITEMS, *ITEMS], tmp_path, "second manifest|after the trailer")
    refused(
        [*ITEMS[:-1], oracle.reseal(ITEMS[3], ordinal=len(ITEMS) - 1), ITEMS[-1]], tmp_path, "by key after the scan"
    )


def test_reordered_chunks_are_refused(tmp_path):
    """T12: reorder, named as such."""
    for at in range(1, len(ITEMS) - 1):
        moved = [*ITEMS[:at], ITEMS[at + 1], ITEMS[at], *ITEMS[at + 2 :]]
        refused(moved, tmp_path, f"comes where {at} was due|item of kind|{at + 1} was due")
    refused(ITEMS[1:], tmp_path, "before the manifest")


def test_duplicated_and_dropped_chunks_are_refused(tmp_path):
    """T12: duplicate, drop, named as such."""
    for at in range(1, len(ITEMS) - 1):
        refused([*ITEMS[: at + 1], *ITEMS[at:]], tmp_path, f"item {at} comes again where {at + 1} was due")
        refused([*ITEMS[:at], *ITEMS[at + 1 :]], tmp_path, rf"item {at + 1} comes where {at} was due")


def test_chunks_of_another_snapshot_are_refused(tmp_path):
    """T12: swap between snapshots, named as such."""
    for at in range(1, min(len(ITEMS), len(OTHER)) - 1):
        refused([*ITEMS[:at], OTHER[at], *ITEMS[at + 1 :]], tmp_path, "an item of snapshot")
    refused([OTHER[0], *ITEMS[1:]], tmp_path, "an item of snapshot")
    refused([*ITEMS[:-1], oracle.reseal(OTHER[-1], ordinal=len(ITEMS) - 1)], tmp_path, "an item of snapshot")


# --- liars: every digest is right ------------------------------------------------------------------------------------


def _rows(item: bytes) -> list[oracle.Row]:
    head_bytes, _, _ = words.chunk.measure(item[: words.HEAD_BYTES])
    return oracle.decode_rows(item[head_bytes:])


def _with(at: int, **changes: object) -> list[bytes]:
    return [*ITEMS[:at], oracle.reseal(ITEMS[at], **changes), *ITEMS[at + 1 :]]


BY_KEY = 2
BY_SEQUENCE = len(ITEMS) - 2


@pytest.mark.parametrize(
    ("at", "changes", "match"),
    [
        (BY_KEY, {"after_key": b"a"}, "does not start at the key"),
        (BY_KEY, {"last_key": b"zzz"}, "last key is not"),
        (BY_KEY, {"row_count": 1}, "rows, its head says 1"),
        (BY_KEY, {"view_sequence": 1}, "not one of its view"),
        (BY_KEY, {"flags": 3}, "by key after the scan|where the one before"),
        (BY_KEY, {"flags": 0}, r".+"),
        (BY_KEY, {"last_sequence": 5}, "has a range of sequences"),
        (BY_KEY, {"ordinal": 2**64 - 1}, "was due"),
        (BY_KEY, {"view_sequence": 2**64 - 1}, "a view at"),
        (BY_SEQUENCE, {"after_sequence": 0}, "does not start at the sequence"),
        (BY_SEQUENCE, {"last_sequence": 2**63}, "ahead of its view"),
        (BY_SEQUENCE, {"flags": 1}, r".+"),
        (BY_SEQUENCE, {"after_key": b"k"}, "range of keys"),
        (0, {"ordinal": 1}, "head and body differ"),
        (0, {"row_count": 1}, "fields of a chunk"),
        (0, {"snapshot": b"x" * 16}, "head and body differ"),
        (len(ITEMS) - 1, {"flags": 1}, "fields of a chunk"),
    ],
)
def test_a_head_that_lies_is_refused(at, changes, match, tmp_path):
    """T12, F41: sizes, counts, ranges and places that are not those of the rows, under a right digest."""
    refused(_with(at, **changes), tmp_path, match)


def test_rows_that_lie_are_refused(tmp_path):
    """T12, F41: rows out of order, twice, beyond their view or outside their range, under a right digest."""
    rows = _rows(ITEMS[BY_KEY])
    for wrong, match in (
        ([rows[1], rows[0], *rows[2:]], "keys do not rise"),
        ([rows[0], rows[0], *rows[2:]], "keys do not rise"),
        ([rows[0]._replace(key=b"a"), *rows[1:]], "keys do not rise"),
        ([rows[0]._replace(sequence=10**6), *rows[1:]], "not one of its view"),
        (rows[:-1], "rows, its head says"),
    ):
        refused(_with(BY_KEY, stored=oracle.encode_rows(wrong)), tmp_path, match)
    cut = oracle.encode_rows(rows)[:-1]
    refused(_with(BY_KEY, stored=cut), tmp_path, "cut off")


def _trailer_with(**changes: object) -> list[bytes]:
    body = ITEMS[-1][words.HEAD_BYTES :]
    trailer = msgspec.structs.replace(words.decode_trailer(body), **changes)
    return _with(len(ITEMS) - 1, stored=words.encode_trailer(trailer))


def test_a_trailer_that_lies_is_refused(tmp_path):
    """T12, F41: counts, digest, target, lineage that are not those of what arrived."""
    good = words.decode_trailer(ITEMS[-1][words.HEAD_BYTES :])
    replace = msgspec.structs.replace
    for changes, match in (
        ({"chunks": good.chunks + 1}, "the trailer counts"),
        ({"rows": good.rows - 1}, "the trailer counts"),
        ({"raw_bytes": 0}, "the trailer counts"),
        ({"digest": bytes(16)}, "the trailer's digest"),
        ({"target": replace(good.target, sequence=good.target.sequence + 1)}, "the trailer's target"),
        ({"target": replace(good.target, lineage="l2")}, "the trailer's lineage"),
        ({"target": replace(good.target, count=10**9)}, "counts more records"),
    ):
        refused(_trailer_with(**changes), tmp_path, match)


def _manifest_with(**changes: object) -> list[bytes]:
    manifest = msgspec.structs.replace(words.decode_manifest(ITEMS[0][words.HEAD_BYTES :]), **changes)
    return _with(0, stored=words.encode_manifest(manifest))


def test_a_manifest_that_lies_is_refused(tmp_path):
    """F41: a manifest at odds with itself or with the chunks behind it."""
    base = words.StoredPosition(lineage="l1", sequence=4, root=bytes(16), count=3)
    for changes, match in (
        ({"kind": "delta"}, "exactly a delta has a base"),
        ({"base": base}, "exactly a delta has a base"),
        ({"kind": "delta", "base": base}, "starts at its base"),
        ({"compression": "zstd"}, "zstd is not a required feature"),
        ({"chunk_bytes": 10}, "larger than the manifest says"),
        ({"scan_base": 10**9}, "a view at"),
        ({"snapshot": b"y" * 16}, "head and body differ"),
        ({"lineage": "l2"}, "the trailer's (digest|lineage)"),
    ):
        refused(_manifest_with(**changes), tmp_path, match)


def test_what_a_reader_does_not_know_is_refused_by_name_and_what_it_need_not_know_is_skipped(tmp_path):
    """F41: an unknown required feature or format names itself; an unknown field does not disturb."""
    manifest = words.decode_manifest(ITEMS[0][words.HEAD_BYTES :])
    path = tmp_path / "snap"
    for changes, match in (({"features": ("zstd", "teleport")}, "requires teleport"), ({"format": 2}, "format 2")):
        path.write_bytes(b"".join(_manifest_with(**changes)))
        with pytest.raises(errors.UnsupportedFeature, match=match):
            verify_snapshot(path)
    fields = msgspec.msgpack.decode(words.encode_manifest(manifest)) | {"colour": ["blue", {"a": 1}]}
    assert words.decode_manifest(msgspec.msgpack.encode(fields)) == manifest


def test_a_compressed_chunk_in_an_uncompressed_snapshot_is_refused(tmp_path):
    packed = next(item for item in PACKED if item[6] == 1 and item[5] == 2)
    snapshot = words.read_head(ITEMS[0]).snapshot
    refused([ITEMS[0], oracle.reseal(packed, snapshot=snapshot), *ITEMS[2:]], tmp_path, r"was due|says it has none")


def test_a_mark_that_does_not_match_is_refused():
    """A manifest that reuses a snapshot's id for something else is not gone on with."""
    store = PlainStore()
    with SnapshotSink(Staged(store, "t1")) as sink:
        for item in ITEMS[:4]:
            sink.accept(item)
    with SnapshotSink(Staged(store, "t1")) as sink:
        assert sink.mark is not None
        with pytest.raises(errors.SnapshotDamaged, match="another manifest under the same"):
            sink.accept(_manifest_with(writer="somebody else")[0])


# --- anything --------------------------------------------------------------------------------------------------------


@pytest.mark.fuzz
@given(st.binary(max_size=400))
@pytest.mark.parametrize("decode", [words.decode_manifest, words.decode_trailer, words.decode_mark])
def test_any_bytes_as_words_are_a_value_or_a_typed_error(decode, data):
    try:
        decode(data)
    except (errors.SnapshotDamaged, errors.UnsupportedFeature):
        pass


@pytest.mark.fuzz
@given(
    st.dictionaries(
        st.sampled_from(["format", "snapshot", "kind", "base", "ancestry", "x"]),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**63), 2**64 - 1)
            | st.floats()
            | st.binary(max_size=20)
            | st.text(max_size=9),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
        ),
    )
)
def test_any_values_as_a_manifest_are_a_manifest_or_a_typed_error(fields):
    manifest = msgspec.msgpack.decode(words.encode_manifest(words.decode_manifest(ITEMS[0][words.HEAD_BYTES :])))
    try:
        words.decode_manifest(msgspec.msgpack.encode(manifest | fields))
    except (errors.SnapshotDamaged, errors.UnsupportedFeature):
        pass


def test_deep_and_wide_words_are_a_typed_error():
    """A million nested lists, a list of four thousand million: refused, no stack or memory spent."""
    for data in (
        b"\x81\xa1z" + b"\x91" * 1_000_000,
        b"\x81\xa8ancestry\xdd\xff\xff\xff\xff",
        b"\x81\xa4seed\xc6\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        bytes(2_000_000),
    ):
        with pytest.raises(errors.SnapshotDamaged):
            words.decode_manifest(data)


@pytest.mark.fuzz
@given(st.lists(st.binary(max_size=300), max_size=4), st.data())
def test_any_items_are_accepted_or_a_typed_error(garbage, data):
    """T12: garbage, true items and resealed ones in any order: the sink answers with typed errors only."""
    items = data.draw(
        st.lists(
            st.sampled_from([*ITEMS, *OTHER[:4], *PACKED[:4]])
            | st.builds(
                lambda item, ordinal, flags: oracle.reseal(item, ordinal=ordinal, flags=flags),
                st.sampled_from(ITEMS),
                st.integers(0, 5),
                st.integers(0, 3),
            ),
            max_size=8,
        )
    )
    with SnapshotSink(Staged(PlainStore(), "t1")) as sink:
        for item in [*items, *garbage]:
            try:
                sink.accept(item)
            except (errors.SnapshotDamaged, errors.UnsupportedFeature, errors.Conflict, errors.Closed):
                pass
