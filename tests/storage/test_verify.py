"""The offline check names what is damaged, and only that, and changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srengine import errors, storage
from srengine.storage import fences, pages, verify
from srengine.storage.metadata import MetadataStore


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A data directory with two tablets and a metadata store, as a node and an embedded store together have it."""
    path = tmp_path_factory.mktemp("original") / "data"
    random_ = random.Random(3)
    with storage.Store(path, map_bytes=1 << 24) as store:
        one = store.tablet("one")
        one.put_many([(b"key-%05d" % i, b"value-%05d-" % i + random_.randbytes(i % 300)) for i in range(3000)])
        one.put_many([(b"large-%d" % i, b"large-%d-" % i + random_.randbytes(10_000)) for i in range(20)])
        one.delete_many([b"key-%05d" % i for i in range(0, 3000, 7)])
        store.tablet("two").put(b"k", b"v")
    with MetadataStore(path / "meta") as meta, meta.transaction() as t:
        for i in range(200):
            t.put("members", b"member-%03d" % i, b"address-%03d" % i)
    return path


@pytest.fixture
def path(original, tmp_path):
    shutil.copytree(original, tmp_path / "data")
    return tmp_path / "data"


def tablet_of(path, name):
    entries = json.loads((path / "store.json").read_text())["tablets"]
    return entries[name]["id"]


def data_of(path, name):
    return path / "tablets" / tablet_of(path, name) / "data.mdb"


def fingerprint(path):
    return {
        str(entry.relative_to(path)): (entry.stat().st_mtime_ns, entry.stat().st_mode, digest(entry))
        for entry in sorted(path.rglob("*"))
    }


def digest(entry):
    return hashlib.sha256(entry.read_bytes()).hexdigest() if entry.is_file() else None


def flip(data, at, bit=0):
    raw = bytearray(data.read_bytes())
    raw[at] ^= 1 << bit
    data.write_bytes(raw)


def find_live(data, table, key):
    """Return (page, offset in the file) where the bytes of ``key``'s value begin, in the tree that is in use."""
    with pages.PageFile(data) as file:
        value = dict(file.items(table))[key]
        raw = data.read_bytes()
        kinds = used(data, table)
        needle = value[-40:] if len(value) > 40 else value
        at = -1
        while True:
            at = raw.index(needle, at + 1)
            page = at // 4096
            if any(first <= page < first + count for first, count in kinds.items()):
                return at - len(value) + len(needle), at


def used(data, table):
    """Return {first page: pages} of a tree's pages and runs."""
    found = {}

    class Noting(pages._Walker):
        def page(self, number, wanted):
            found[number] = 1
            return super().page(number, wanted)

        def overflow(self, node, *, read):
            count, value = super().overflow(node, read=read)
            found[node.child] = count
            return count, value

    with pages.PageFile(data) as file:
        Noting(file, file.newest(), pages.PageReport()).check(file.tables()[table])
    return found


def test_a_clean_directory_has_no_damage_and_is_not_changed(path):
    """T16: clean: no damage, everything was read, and not a byte, mode or time of any file changed."""
    before = fingerprint(path)
    report = storage.verify_directory(path)
    assert report.clean, report.damages
    assert report.damages == []
    assert report.tablets == 2
    assert report.records >= 3020 + 1 + 200
    assert report.pages > 200
    assert fingerprint(path) == before
    assert json.loads(json.dumps(report.as_dict()))["clean"] is True


def test_without_lock_files_none_is_left_behind(path):
    """T16: a check of a copied directory leaves no lock files in it."""
    for lock in path.rglob("lock.mdb"):
        lock.unlink()
    before = fingerprint(path)
    assert storage.verify_directory(path).clean
    assert set(fingerprint(path)) == set(before)


@pytest.mark.parametrize("key", [b"key-00001", b"key-02999", b"large-7"])
@pytest.mark.parametrize("where", ["value", "header", "checksum"])
def test_a_flipped_bit_in_a_record_is_named_by_key(path, key, where):
    """T16, T11, F10: a flipped bit in a record's value, header or checksum is named with tablet, file and key."""
    data = data_of(path, "one")
    start, end = find_live(data, "records", key)
    at = {"value": end + 3, "header": start + 5, "checksum": start + 22}[where]
    flip(data, at, 3)
    report = storage.verify_directory(path)
    named = [damage for damage in report.damages if damage.key == key]
    assert named, report.damages
    assert named[0].tablet == tablet_of(path, "one")
    assert named[0].file == f"tablets/{tablet_of(path, 'one')}/data.mdb"
    assert all(damage.key in {key, None} for damage in report.damages)
    assert not report.as_dict()["clean"]


def test_a_flipped_bit_in_a_key_is_named(path):
    """T16, T11: a flipped bit in a record's key is named: by its record's check, the order of keys, or the root."""
    data = data_of(path, "one")
    start, _ = find_live(data, "records", b"key-00001")
    for back in (1, 5):
        copy = path.parent / f"copy-{back}"
        shutil.copytree(path, copy)
        flip(data_of(copy, "one"), start - back, 1)
        report = storage.verify_directory(copy)
        assert not report.clean
        assert {damage.tablet for damage in report.damages} == {tablet_of(path, "one")}


def test_a_flipped_bit_in_a_branch_page_is_named_by_page(path):
    """T16, F10: a flipped bit in a branch page is named with the page's number; the records on other pages are still
    checked.
    """
    data = data_of(path, "one")
    with pages.PageFile(data) as file:
        root = file.tables()["records"].root
    flip(data, root * 4096 + 12)
    report = storage.verify_directory(path)
    assert root in {damage.page for damage in report.damages}
    assert all(damage.tablet == tablet_of(path, "one") for damage in report.damages)


def test_damage_to_page_and_record_are_both_named(path):
    """T16: one damaged page does not hide a damaged record on another."""
    data = data_of(path, "one")
    _, at = find_live(data, "records", b"key-00001")
    with pages.PageFile(data) as file:
        leaf = max(
            page
            for page, count in used(data, "records").items()
            if count == 1
            and page != at // 4096
            and page != file.tables()["records"].root
            and file.read(page * 4096 + 10, 2) == b"\2\0"
        )
    flip(data, at, 2)
    flip(data, leaf * 4096 + 14, 1)
    report = storage.verify_directory(path)
    assert leaf in {damage.page for damage in report.damages}
    assert b"key-00001" in {damage.key for damage in report.damages}


@pytest.mark.parametrize("offset", [10, 16, 20, 41, 88 + 6, 88 + 40, 136, 144])
def test_a_flipped_bit_in_a_meta_page_is_named(path, offset):
    """T16, F10: damage to a meta page is named, with its page unless it passes for another one's."""
    data = data_of(path, "one")
    with pages.PageFile(data) as file:
        newest = file.newest().page
    flip(data, newest * 4096 + offset, 1)
    report = storage.verify_directory(path)
    assert not report.clean
    assert {damage.tablet for damage in report.damages} == {tablet_of(path, "one")}


def test_truncated_and_removed_files_are_named(path):
    """T16, F11: a truncated file, a removed file and a removed directory are named, each once, and the rest is
    checked.
    """
    one, two = tablet_of(path, "one"), tablet_of(path, "two")
    data = data_of(path, "one")
    os.truncate(data, data.stat().st_size // 2)
    report = storage.verify_directory(path)
    assert {damage.tablet for damage in report.damages} == {one}
    assert "beyond-end" in {damage.kind for damage in report.damages}
    data.unlink()
    report = storage.verify_directory(path)
    assert [(damage.kind, damage.tablet) for damage in report.damages] == [("missing", one)]
    shutil.rmtree(data.parent)
    report = storage.verify_directory(path)
    assert [(damage.kind, damage.tablet) for damage in report.damages] == [("missing", one)]
    assert report.tablets == 1
    assert two != one


def test_a_foreign_file_and_a_strange_directory_are_named(path):
    """T16: a file that is no LMDB file, another tablet's file, and a directory that is no tablet are named."""
    data_of(path, "one").write_bytes(b"not a database" * 1000)
    (path / "tablets" / "lost+found").mkdir()
    report = storage.verify_directory(path)
    assert [damage.kind for damage in report.damages].count("foreign") == 2
    shutil.copy(data_of(path, "two"), data_of(path, "one"))
    report = storage.verify_directory(path)
    assert ("foreign", tablet_of(path, "one")) in {(damage.kind, damage.tablet) for damage in report.damages}


def test_damaged_small_files_are_named(path):
    """T16: damage to store.json and identity.json is named by file."""
    flip(path / "store.json", 30, 2)
    (path / "identity.json").write_bytes(b"{")
    (path / "identity.json").chmod(0o600)
    report = storage.verify_directory(path)
    assert {damage.file for damage in report.damages} == {"store.json", "identity.json"}


@pytest.mark.parametrize("at", range(0, 300, 7))
def test_a_flipped_bit_in_the_identity_is_named(path, at):
    """T16: a flipped bit in a node's identity.json is named by file, or is white space."""
    from srengine.node import identity

    identity.save_identity(path, identity.new_identity("node-1", "cluster"))
    assert storage.verify_directory(path).clean
    file = path / "identity.json"
    raw = file.read_bytes()
    flip(file, at % len(raw), 1)
    report = storage.verify_directory(path)
    if not report.clean:
        assert [damage.file for damage in report.damages] == ["identity.json"]
    else:
        assert json.loads(file.read_bytes()) == json.loads(raw)


def test_damage_to_the_metadata_store_is_named(path):
    """T16: a flipped bit in a value of the metadata store is named with table and key, one in a page with the page."""
    data = path / "meta" / "data.mdb"
    _, at = find_live(data, "members", b"member-042")
    flip(data, at, 1)
    report = storage.verify_directory(path)
    assert [(damage.kind, damage.file, damage.key) for damage in report.damages] == [
        ("row", "meta/data.mdb", b"member-042")
    ]
    assert "members" in report.damages[0].detail
    with pages.PageFile(data) as file:
        root = file.tables()["members"].root
    flip(data, root * 4096 + 2)
    assert root in {damage.page for damage in storage.verify_directory(path).damages}


def test_a_fence_is_named(path):
    """T16, T15: a fenced tablet is not clean."""
    fences.set_fence(data_of(path, "one").parent, "io-error", "by the test")
    report = storage.verify_directory(path)
    assert [(damage.kind, damage.tablet) for damage in report.damages] == [("fenced", tablet_of(path, "one"))]


def test_what_is_no_data_directory_is_an_error(tmp_path):
    """T16: a missing directory, a file, and a directory of something else are errors and not clean reports."""
    with pytest.raises(errors.NotFound):
        storage.verify_directory(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.InvalidValue):
        storage.verify_directory(tmp_path / "file")
    with pytest.raises(errors.InvalidValue):
        storage.verify_directory(tmp_path)
    assert not any(entry.name == "LOCK" for entry in tmp_path.iterdir())


def test_rows_added_or_removed_behind_the_engine_are_named(path):
    """T16: a sound record removed, or put back from yesterday, behind the engine's back shows in count or root."""
    import lmdb

    data = data_of(path, "one")
    environment = lmdb.open(str(data.parent), max_dbs=16, map_size=1 << 24)
    records = environment.open_db(b"records", create=False)
    with environment.begin(write=True) as t:
        assert t.delete(b"key-00002", db=records)
    environment.close()
    report = storage.verify_directory(path)
    assert report.damages
    assert {damage.kind for damage in report.damages} & {"root", "count", "change"}


@pytest.mark.fuzz
@given(at=st.integers(0, 2**30), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_named_or_harmless(original, tmp_path_factory, at, bit):
    """T16, F10: a flipped bit anywhere in a tablet's file is named, or the tablet still gives every record right."""
    path = tmp_path_factory.getbasetemp() / "flipped"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(original, path)
    data = data_of(path, "one")
    flip(data, at % data.stat().st_size, bit)
    report = storage.verify_directory(path)
    if report.clean:
        with storage.Store(path) as store, storage.Store(original) as healthy:
            assert list(store.tablet("one").scan()) == list(healthy.tablet("one").scan())
            assert store.tablet("one").position == healthy.tablet("one").position


@given(key=st.binary(min_size=1, max_size=511), stored=st.binary(max_size=200))
def test_any_bytes_are_a_sound_record_or_not(key, stored):
    """T16: the check of a record takes any bytes."""
    assert verify.is_sound_record(key, stored) in {True, False}


def test_the_kernels_records_are_sound(original):
    """T16: the check of records without LMDB agrees with what the kernel wrote, tombstones included."""
    with pages.PageFile(data_of(original, "one")) as file:
        rows = list(file.items("records"))
    assert len(rows) == 3020
    assert all(verify.is_sound_record(key, stored) for key, stored in rows)
    assert not any(verify.is_sound_record(key + b"x", stored) for key, stored in rows)
