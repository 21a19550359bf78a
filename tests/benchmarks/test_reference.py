"""The reference loops do the work that they claim: what is compared with them would otherwise win too easily."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

lmdb = pytest.importorskip("lmdb")


def reference(path: Path) -> Any:
    """Return a fresh store with 8-byte keys and 16-byte values."""
    from benchmarks._reference import Store

    return Store(path, 8, 16, 1 << 26)


def contents(path: Path) -> tuple[dict[bytes, bytes], list[bytes]]:
    """Return the records and the keys of the change log in order, read by another binding."""
    environment = lmdb.open(str(path), max_dbs=4, readonly=True, lock=False)
    records, changes = environment.open_db(b"records", create=False), environment.open_db(b"changes", create=False)
    with environment.begin() as transaction:
        held = dict(transaction.cursor(records))
        log = [value for _, value in transaction.cursor(changes)]
    environment.close()
    return held, log


def test_batches_are_put_and_logged(tmp_path: Path) -> None:
    """A batch of inserts and overwrites leaves the latest values and one log entry for each put."""
    store = reference(tmp_path / "store")
    keys = [b"key-%04d" % number for number in (3, 1, 2)]
    store.put_batch(b"".join(keys), b"".join(b"value-%010d" % number for number in (3, 1, 2)))
    store.put_batch(keys[0], b"value-%010d" % 33, digests=False)
    assert store.scan_copy() == (3, 3 * 24)
    blocks = store.scan_blocks(64, keep=True)
    assert [len(block) for block in blocks] == [48, 48, 48]
    assert store.scan_blocks() == 3 * 48
    store.close()
    records, log = contents(tmp_path / "store")
    assert {key: value[32:] for key, value in records.items()} == {
        keys[1]: b"value-%010d" % 1,
        keys[2]: b"value-%010d" % 2,
        keys[0]: b"value-%010d" % 33,
    }
    assert log == [keys[1], keys[2], keys[0], keys[0]]


def test_append_load_equals_batches(tmp_path: Path) -> None:
    """The append loop leaves every record and its log entry, whatever the transaction size."""
    store = reference(tmp_path / "store")
    keys = [b"key-%04d" % number for number in range(100)]
    store.append_load(b"".join(keys), b"v" * 1600, 33)
    assert store.scan_copy() == (100, 2400)
    store.close()
    records, log = contents(tmp_path / "store")
    assert sorted(records) == keys
    assert log == keys


def test_wrong_sizes_are_refused(tmp_path: Path) -> None:
    """Arrays that are no whole pairs raise ValueError and write nothing."""
    store = reference(tmp_path / "store")
    for keys, values in ((b"k" * 7, b"v" * 16), (b"k" * 8, b"v" * 17), (b"", b"")):
        with pytest.raises(ValueError):
            store.put_batch(keys, values)
    assert store.scan_copy() == (0, 0)
