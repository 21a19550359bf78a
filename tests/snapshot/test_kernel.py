"""The chunk kernel against its plain-Python oracle, and whatever bytes against its bounded readers."""

from __future__ import annotations

import random
import struct
import sys
import threading
import time

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from srengine import errors, limits
from srengine._native import chunk
from srengine.snapshot import format as words
from tests.reference import chunk as oracle

KEYS = st.binary(min_size=1, max_size=511)
SEQUENCES = st.integers(1, 2**63 - 1)
ROWS = st.lists(
    st.builds(
        oracle.Row,
        key=st.binary(min_size=1, max_size=20),
        value=st.none() | st.binary(max_size=40),
        sequence=st.integers(1, 1000),
        hybrid_clock=st.integers(0, 2**64 - 1),
        versions=st.integers(0, 3).map(lambda n: bytes(range(16)) * n),
    ),
    max_size=12,
)


@pytest.mark.fuzz
@given(
    flags=st.integers(0, 3),
    ordinal=st.integers(0, 2**64 - 1),
    after=st.binary(max_size=511),
    last=st.binary(max_size=511),
    numbers=st.tuples(SEQUENCES, SEQUENCES, SEQUENCES),
    ids=st.tuples(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16)),
    stored=st.binary(max_size=300),
)
def test_a_head_is_sealed_as_by_the_oracle(flags, ordinal, after, last, numbers, ids, stored):
    fields = (2, 0, flags, ordinal, len(stored), 0, after, last, *numbers, *ids)
    head = chunk.seal(*fields, stored)
    assert head == oracle.seal(*fields, stored)
    assert chunk.verify(head, stored)
    assert chunk.measure(head) == (len(head), len(stored), len(stored))
    read = words.read_head(head)
    assert (read.flags, read.ordinal, read.after_key, read.last_key) == (flags, ordinal, after, last)
    assert (read.view_sequence, read.after_sequence, read.last_sequence) == numbers
    assert (read.snapshot, read.source) == ids
    assert chunk.join(head, stored) == head + stored


def test_every_flipped_bit_of_an_item_breaks_its_digest_or_its_fields():
    stored = b"some rows, it does not matter which"
    head = chunk.seal(2, 0, 1, 3, len(stored), 1, b"a", b"b", 9, 0, 0, bytes(16), bytes(16), stored)
    item = head + stored
    for bit in range(len(item) * 8):
        damaged = bytearray(item)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            head_bytes, stored_bytes, _ = chunk.measure(damaged[: chunk.HEAD_BYTES])
        except errors.Error:
            continue
        if head_bytes + stored_bytes == len(item):
            assert not chunk.verify(damaged[:head_bytes], damaged[head_bytes:]), bit


@pytest.mark.fuzz
@given(ROWS, st.booleans(), st.binary(max_size=3), st.integers(0, 20), st.integers(0, 1000))
def test_rows_are_judged_as_by_the_oracle(rows, by_key, after_key, after_sequence, sequence_max):
    if by_key and len(rows) % 2:
        rows = sorted({row.key: row for row in rows}.values())
    _compare(oracle.encode_rows(rows), by_key, after_key, after_sequence, sequence_max)


@pytest.mark.fuzz
@given(ROWS, st.booleans(), st.data())
def test_damaged_rows_are_judged_as_by_the_oracle(rows, by_key, data):
    encoded = bytearray(oracle.encode_rows(rows))
    if encoded:
        at = data.draw(st.integers(0, len(encoded) - 1))
        encoded[at] ^= data.draw(st.integers(1, 255))
        encoded = encoded[: data.draw(st.integers(0, len(encoded)))]
    _compare(bytes(encoded), by_key, b"", 0, 2**63)


@pytest.mark.fuzz
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_as_rows_are_judged_as_by_the_oracle(data, by_key):
    _compare(data, by_key, b"", 0, 2**63)


def _compare(encoded, by_key, after_key, after_sequence, sequence_max):
    asked = {
        "by_key": by_key,
        "after_key": after_key,
        "after_sequence": after_sequence,
        "sequence_max": sequence_max,
    }
    try:
        expected = oracle.check_rows(encoded, **asked)
    except ValueError:
        with pytest.raises(errors.SnapshotDamaged):
            chunk.check_rows(encoded, **asked)
    else:
        assert chunk.check_rows(encoded, **asked) == expected


@pytest.mark.fuzz
@given(st.binary(max_size=300))
def test_any_bytes_as_a_head_are_a_head_or_a_typed_error(data):
    for read in (chunk.measure, chunk.read_head):
        try:
            read(data)
        except (errors.SnapshotDamaged, errors.UnsupportedFeature):
            pass
    assert chunk.verify(data, b"") in {True, False}


@pytest.mark.fuzz
@given(st.integers(0, chunk.HEAD_BYTES - 1), st.integers(0, 255))
def test_a_head_with_any_byte_changed_is_a_head_or_a_typed_error(at, byte):
    head = bytearray(chunk.seal(2, 0, 1, 3, 30, 1, b"a", b"b", 9, 0, 0, bytes(16), bytes(16), bytes(30)))
    head[at] = byte
    try:
        fields = words.read_head(head)
    except (errors.SnapshotDamaged, errors.UnsupportedFeature):
        return
    assert fields.raw_bytes <= limits.CHUNK_BYTES_MAX
    assert fields.stored_bytes <= limits.CHUNK_COMPRESSED_BYTES_MAX


def test_a_head_of_a_later_format_is_an_unsupported_feature():
    head = bytearray(chunk.seal(2, 0, 1, 3, 30, 1, b"a", b"b", 9, 0, 0, bytes(16), bytes(16), bytes(30)))
    head[4] = 2
    with pytest.raises(errors.UnsupportedFeature, match="format 2"):
        chunk.read_head(head)


@pytest.mark.parametrize(
    "fields",
    [
        (0, 0, 0, 0, 0, 0, b"", b"", 0, 0, 0, bytes(16), bytes(16)),
        (4, 0, 0, 0, 0, 0, b"", b"", 0, 0, 0, bytes(16), bytes(16)),
        (258, 0, 0, 0, 0, 0, b"", b"", 0, 0, 0, bytes(16), bytes(16)),
        (2, 2, 0, 0, 0, 0, b"", b"", 0, 0, 0, bytes(16), bytes(16)),
        (2, 0, 4, 0, 0, 0, b"", b"", 0, 0, 0, bytes(16), bytes(16)),
        (2, 0, 0, 0, 1, 0, b"", b"", 0, 0, 0, bytes(16), bytes(16)),
        (2, 0, 0, 0, 0, 1, b"", b"", 0, 0, 0, bytes(16), bytes(16)),
        (2, 0, 0, 0, 0, 0, b"k" * 512, b"", 0, 0, 0, bytes(16), bytes(16)),
        (2, 0, 0, 0, 0, 0, b"", b"", 0, 0, 0, bytes(15), bytes(16)),
        (2, 1, 0, 0, limits.CHUNK_BYTES_MAX + 1, 0, b"", b"", 0, 0, 0, bytes(16), bytes(16)),
    ],
)
def test_a_head_that_no_reader_would_take_is_not_sealed(fields):
    with pytest.raises(ValueError, match=r".+"):
        chunk.seal(*fields, b"")


@pytest.mark.fuzz
@given(st.binary(max_size=3000), st.integers(1, 5), st.booleans(), st.booleans(), st.binary(max_size=10))
def test_the_end_of_a_zstd_frame_is_found(data, level, checksum, size, behind):
    packed = zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=size).compress(data)
    used, window, content = chunk.zstd_frame(packed + behind)
    assert used == len(packed)
    parameters = zstandard.get_frame_parameters(packed)
    assert window == parameters.window_size
    assert content == (len(data) if parameters.content_size != zstandard.CONTENTSIZE_UNKNOWN else -1)
    for cut in range(len(packed)):
        with pytest.raises(errors.SnapshotDamaged):
            chunk.zstd_frame(packed[:cut])


@pytest.mark.fuzz
@given(st.binary(max_size=60).map(lambda rest: b"\x28\xb5\x2f\xfd" + rest))
def test_any_bytes_as_a_zstd_frame_are_a_frame_or_a_typed_error(data):
    try:
        used, _, _ = chunk.zstd_frame(data)
    except errors.SnapshotDamaged:
        return
    assert 6 <= used <= len(data)


def test_the_largest_row_is_read_and_a_larger_one_refused():
    head = struct.pack("<BBHIQQ", 0, 0, 1, limits.VALUE_BYTES_MAX, 1, 0) + b"k"
    rows = head + bytes(limits.VALUE_BYTES_MAX)
    asked = {"by_key": True, "after_key": b"", "after_sequence": 0, "sequence_max": 1}
    assert chunk.check_rows(rows, **asked) == (1, b"k", 1)
    with pytest.raises(errors.SnapshotDamaged, match="too large"):
        chunk.check_rows(struct.pack("<BBHIQQ", 0, 0, 1, limits.VALUE_BYTES_MAX + 1, 1, 0) + b"k", **asked)


@pytest.fixture
def only_given_up():
    """Let a thread get the interpreter only when another gives it up; yield its count of turns."""
    turns = [0]
    done = threading.Event()

    def take_turns() -> None:
        while not done.is_set():
            turns[0] += 1
            time.sleep(0)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    thread = threading.Thread(target=take_turns)
    thread.start()
    try:
        yield turns
    finally:
        done.set()
        sys.setswitchinterval(before)
        thread.join()


@pytest.mark.parametrize("what", ["check rows", "seal", "verify", "join"])
def test_the_byte_work_leaves_the_interpreter_to_others(only_given_up, what):
    """T18: Python code of another thread runs while a chunk is checked, hashed or copied."""
    rows = oracle.encode_rows([oracle.Row(b"%08d" % n, b"", n + 1) for n in range(30_000)])
    body = bytes(48 * limits.MIB)
    fields = (2, 0, 0, 1, len(body), 0, b"", b"", 1, 0, 1, bytes(16), bytes(16))
    head = chunk.seal(*fields, body)
    calls = {
        "check rows": lambda: chunk.check_rows(rows, by_key=True, after_key=b"", after_sequence=0, sequence_max=2**60),
        "seal": lambda: chunk.seal(*fields, body),
        "verify": lambda: chunk.verify(head, body),
        "join": lambda: chunk.join(head, body),
    }
    call = calls[what]
    seen = 0
    for _ in range(200):
        before = only_given_up[0]
        call()
        seen += only_given_up[0] > before
        if seen:
            break
    assert seen


@pytest.mark.parametrize("size", [0, 1, 128, 240, 241, 1023, 1024, 1025, 4096, 65_537, limits.MIB + 3])
def test_digest_is_the_same_with_every_instruction_set(size):
    """A head's digest does not depend on the vectors it was computed with: none, or this processor's widest."""
    stored = random.Random(size).randbytes(size)
    found = {}
    try:
        for wide in (False, True):
            in_use = chunk.choose_vectors(wide=wide)
            assert not in_use or wide
            head = chunk.seal(2, 0, 0, 1, size, 0, b"", b"", 1, 0, 0, bytes(16), bytes(16), stored)
            assert chunk.verify(head, stored)
            found[wide] = head
    finally:
        chunk.choose_vectors(wide=True)
    assert found[False] == found[True]
    assert found[True][96:112] == oracle.xxh128(found[True][:96] + oracle.xxh128(stored))
