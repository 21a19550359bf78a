"""The page reader: it agrees with LMDB on healthy files, and survives any bytes."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srengine import errors
from srengine.storage import pages

MAKE = """
import json, lmdb, random, sys
path, seed, duplicates = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "duplicates"
random_ = random.Random(seed)
environment = lmdb.open(path, map_size=1 << 28, max_dbs=8, mode=0o600)
records = environment.open_db(b"records")
changes = environment.open_db(b"changes", integerkey=True)
meta = environment.open_db(b"meta")
several = environment.open_db(b"several", dupsort=True) if duplicates else None
fixed = environment.open_db(b"fixed", dupsort=True, dupfixed=True) if duplicates else None
sequence = 0
for _ in range(random_.randrange(2, 9)):
    with environment.begin(write=True) as t:
        for _ in range(random_.randrange(1, 400)):
            sequence += 1
            key = b"%05d" % random_.randrange(1500)
            if random_.random() < 0.7:
                t.put(key, random_.randbytes(random_.choice([0, 10, 100, 1000, 3000, 9000])), db=records)
                t.put(sequence.to_bytes(8, "little"), key, db=changes, append=True)
            else:
                t.delete(key, db=records)
            if duplicates:
                t.put(key[:3], random_.randbytes(random_.randrange(1, 30)), db=several)
                t.put(key[:3], random_.randbytes(8), db=fixed)
        t.put(b"sequence", sequence.to_bytes(8, "little"), db=meta)
with environment.begin() as t:
    rows = {name: [(k.hex(), v.hex()) for k, v in t.cursor(db=db)] for name, db in
            (("records", records), ("changes", changes), ("meta", meta))}
info = environment.info()
environment.close()
print(json.dumps([rows, info["last_txnid"], info["last_pgno"]]))
"""


def make(path, seed, kind="plain"):
    """Make a file with py-lmdb in a process of its own; return what LMDB reads from it."""
    path.mkdir(mode=0o700)
    made = subprocess.run([sys.executable, "-c", MAKE, str(path), str(seed), kind], capture_output=True, check=True)
    return json.loads(made.stdout)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """The bytes of a healthy file with every kind of page."""
    path = tmp_path_factory.mktemp("healthy") / "e"
    make(path, 5)
    return (path / "data.mdb").read_bytes()


@pytest.mark.parametrize("kind", ["plain", "duplicates"])
@pytest.mark.parametrize("seed", range(4))
def test_healthy_files_are_clean_and_read_as_lmdb_reads_them(tmp_path, seed, kind):
    """T17, T16: the walk of a healthy file names nothing, accounts for every page, and yields LMDB's own rows."""
    rows, transaction, last_page = make(tmp_path / "e", seed, kind)
    path = tmp_path / "e" / "data.mdb"
    report = pages.walk(path)
    assert report.damages == []
    assert report.meta.transaction == transaction
    assert report.meta.last_page == last_page
    assert report.reached + report.free + 2 == last_page + 1
    with pages.PageFile(path) as file:
        for name, wanted in rows.items():
            assert [[key.hex(), value.hex()] for key, value in file.items(name)] == wanted
    assert pages.check_before_open(path) == report.meta


def write(path, content):
    path.write_bytes(content)
    return path


# --- files that LMDB must not get ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", errors.TruncatedTablet),
        (b"x", errors.TruncatedTablet),
        (bytes(100), errors.ForeignData),
        (bytes(8192), errors.ForeignData),
        (b"SQLite format 3\0" + bytes(8192), errors.ForeignData),
        (b"\x7fELF" + bytes(range(256)) * 40, errors.ForeignData),
    ],
)
def test_foreign_and_empty_files_are_refused(tmp_path, content, error):
    """T14, F11: a zero-length, too short or foreign data.mdb is a typed error, and stays as it was."""
    path = write(tmp_path / "data.mdb", content)
    with pytest.raises(error):
        pages.check_before_open(path)
    assert path.read_bytes() == content


def test_a_missing_file_is_damage(tmp_path):
    """T14, F11: a tablet's directory without data.mdb is `CorruptionError`, not a new tablet."""
    with pytest.raises(errors.CorruptionError, match="missing"):
        pages.check_before_open(tmp_path / "data.mdb")
    assert not (tmp_path / "data.mdb").exists()


def test_a_link_in_the_place_of_the_file_is_refused(tmp_path, healthy):
    """F40: data.mdb is never opened through a symbolic link."""
    write(tmp_path / "real", healthy)
    (tmp_path / "data.mdb").symlink_to(tmp_path / "real")
    with pytest.raises(errors.InvalidValue, match="symbolic link"):
        pages.check_before_open(tmp_path / "data.mdb")


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (16, b"\0\0\0\0", errors.CorruptionError),  # magic of page 0, the meta flag still there
        (20, struct.pack("<I", 2), errors.ForeignData),  # LMDB 1.0
        (20, struct.pack(">I", 1), errors.ForeignData),  # the other byte order
        (40, struct.pack("<I", 0), errors.CorruptionError),  # page size
        (40, struct.pack("<I", 5000), errors.CorruptionError),
        (40, struct.pack("<I", 1 << 30), errors.CorruptionError),
        (10, struct.pack("<H", 2), errors.CorruptionError),  # a leaf page in the place of a meta page
        (4096 + 16, b"\0\0\0\0", errors.CorruptionError),
        (4096 + 20, struct.pack("<I", 999), errors.ForeignData),
    ],
)
def test_damaged_meta_pages_are_refused(tmp_path, healthy, at, value, error):
    """T14: a meta page with another mark, version, byte order or page size is a typed error, the file unharmed."""
    content = bytearray(healthy)
    content[at : at + len(value)] = value
    path = write(tmp_path / "data.mdb", bytes(content))
    with pytest.raises(error):
        pages.check_before_open(path)
    assert path.read_bytes() == content
    assert not pages.walk(path).clean


def test_a_truncated_file_is_refused_and_left_alone(tmp_path, healthy):
    """T14, F11: a file that ends before a page in use is `TruncatedTablet`, wherever it ends, and is not touched."""
    path = tmp_path / "data.mdb"
    for length in (100, 4096, 5000, 8192, 8193, 12288, len(healthy) // 2, len(healthy) - 4096):
        write(path, healthy[:length])
        with pytest.raises(errors.TruncatedTablet):
            pages.check_before_open(path)
        assert path.stat().st_size == length


def test_a_healthy_short_file_is_extended(tmp_path):
    """T14: a file that lacks only freed pages at its end is healthy: it is extended sparsely and opens in LMDB."""
    source = """
import lmdb, sys
environment = lmdb.open(sys.argv[1], map_size=1 << 24, max_dbs=4, mode=0o600)
records = environment.open_db(b"records")
with environment.begin(write=True) as t: t.put(b"keep", b"me", db=records)
with environment.begin(write=True) as t: t.put(b"large", bytes(400_000), db=records)
with environment.begin(write=True) as t: t.delete(b"large", db=records)
for n in range(4):
    with environment.begin(write=True) as t: t.put(b"keep", b"%d" % n, db=records)
environment.close()
"""
    directory = tmp_path / "e"
    directory.mkdir(mode=0o700)
    subprocess.run([sys.executable, "-c", source, str(directory)], check=True)
    path = directory / "data.mdb"
    content = path.read_bytes()
    meta = pages.check_before_open(path)
    with pages.PageFile(path) as file:
        walker = pages._Walker(file, meta, pages.PageReport())
        walker.check(meta.main)
        walker.check(meta.free)
        used = max(page for page in range(meta.last_page + 1) if walker.taken(page))
    assert used < meta.last_page, "the test needs free pages at the end"
    write(path, content[: (used + 1) * 4096])
    # Looking alone changes nothing.
    assert pages.walk(path).clean
    pages.check_before_open(path, extend=False)
    assert path.stat().st_size == (used + 1) * 4096
    pages.check_before_open(path)
    assert path.stat().st_size == meta.bytes_claimed
    read = (
        "import lmdb, sys; e = lmdb.open(sys.argv[1], max_dbs=4); d = e.open_db(b'records')\n"
        "print(e.begin().get(b'keep', db=d))"
    )
    seen = subprocess.run([sys.executable, "-c", read, str(directory)], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "b'3'"


# --- damage is named -------------------------------------------------------------------------------------------------


class Noting(pages._Walker):
    """A walker that notes where pages begin and of which kind they are."""

    def __init__(self, file, meta):
        self.kinds = {}
        super().__init__(file, meta, pages.PageReport())

    def page(self, number, wanted):
        self.kinds[number] = wanted
        return super().page(number, wanted)

    def overflow(self, node, *, read):
        self.kinds[node.child] = 4
        return super().overflow(node, read=read)


def used_pages(path, table=None):
    """Return {page: kind} of the pages in use, by everything or by one named tree; of runs the first."""
    with pages.PageFile(path) as file:
        walker = Noting(file, file.newest())
        walker.check(file.newest().main if table is None else file.tables()[table])
        return walker.kinds


def test_every_bit_of_page_headers_and_branches_is_guarded(tmp_path, healthy):
    """F10, T16: a flipped bit in the header or the pointers of any page in use, or in a branch page's page numbers, is
    named with its page.
    """
    path = write(tmp_path / "data.mdb", healthy)
    random_ = random.Random(7)
    kinds = used_pages(path)
    assert set(kinds.values()) == {1, 2, 4}
    for page in random_.sample(sorted(kinds), 60):
        base = page * 4096
        overflow = kinds[page] == 4
        offsets = [0, 1, 2, 7, 10] if overflow else [0, 1, 2, 7, 10, 12, 13, 14, 15, 16, 17]
        for offset in offsets:
            content = bytearray(healthy)
            content[base + offset] ^= 1 << random_.randrange(8)
            write(path, bytes(content))
            report = pages.walk(path)
            assert not report.clean, (page, offset)
            if offset < 10:
                assert any(damage.page == page for damage in report.damages), (page, offset, report.damages)


def test_swapped_pages_are_named(tmp_path, healthy):
    """F10: two pages of a tree swapped on the disk are named."""
    path = write(tmp_path / "data.mdb", healthy)
    leaves = [page for page, flags in used_pages(path, "records").items() if flags == 2][:2]
    content = bytearray(healthy)
    one, other = (slice(page * 4096, (page + 1) * 4096) for page in leaves)
    content[one], content[other] = content[other], content[one]
    write(path, bytes(content))
    assert {damage.page for damage in pages.walk(path).damages} >= set(leaves)


def test_a_meta_page_that_forgot_is_noticed(tmp_path, healthy):
    """F10, T16: any flipped bit in what a meta page says of transaction, last page, roots and counts is named; none of
    them passes for another healthy state.
    """
    path = tmp_path / "data.mdb"
    write(path, healthy)
    with pages.PageFile(path) as file:
        newest = file.newest().page
    for offset in range(16 + 16, 16 + 136):
        in_tree = (offset - 16 - 24) % 48
        if 40 <= offset < 136 and in_tree in {0, 1, 2, 3} and offset >= 88:
            continue  # md_pad of the main tree: unused
        content = bytearray(healthy)
        content[newest * 4096 + offset] ^= 1
        write(path, bytes(content))
        try:
            pages.check_before_open(path)
        except errors.Error:
            pass
        report = pages.walk(path)
        if 44 <= offset < 46 or 32 <= offset < 40:
            continue  # flags of the environment, and a larger map: they change nothing that is read
        assert not report.clean, offset


# --- anything at all -------------------------------------------------------------------------------------------------

MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["bit", "byte", "word", "copy", "cut", "zero"]),
        st.integers(0, 2**32),
        st.integers(0, 2**64 - 1),
    ),
    min_size=1,
    max_size=6,
)


def mutate(content, mutations):
    content = bytearray(content)
    for kind, at, value in mutations:
        if not content:
            break
        # Headers and node heads are where damage bites: half of the places are near a page's start.
        place = at % len(content) if at & 1 else (at >> 1) % (len(content) // 4096 + 1) * 4096 + value % 64
        place = min(place, len(content) - 1)
        match kind:
            case "bit":
                content[place] ^= 1 << value % 8
            case "byte":
                content[place] = value % 256
            case "word":
                content[place : place + 8] = value.to_bytes(8, "little")
            case "copy":
                source = value % len(content) // 4096 * 4096
                target = place // 4096 * 4096
                content[target : target + 4096] = content[source : source + 4096]
            case "cut":
                del content[place:]
            case "zero":
                content[place : place + value % 5000] = bytes(value % 5000)
    return bytes(content)


def look(path):
    """Do everything that reads a file; only our errors come out."""
    report = pages.walk(path)
    if report.meta is not None:
        assert report.reached <= report.pages
    try:
        pages.check_before_open(path, extend=False)
    except errors.Error:
        pass
    for skip in (False, True):
        try:
            with pages.PageFile(path) as file:
                for name in file.tables(skip_damage=skip):
                    for _ in file.items(name, skip_damage=skip):
                        pass
        except errors.Error:
            pass
    return report


@pytest.mark.fuzz
@given(mutations=MUTATIONS)
def test_any_damage_to_a_real_file_is_a_typed_result(healthy, tmp_path_factory, mutations):
    """T14, T16: flips, overwrites, copied pages and cuts of a real file give a report or a typed error, never a crash
    and never a walk without end; the file is never changed by looking.
    """
    content = mutate(healthy, mutations)
    path = write(tmp_path_factory.getbasetemp() / "mutated.mdb", content)
    path.chmod(0o600)
    look(path)
    assert path.read_bytes() == content


@pytest.mark.fuzz
@given(
    head=st.binary(max_size=200),
    magic=st.booleans(),
    last=st.integers(0, 2**64 - 1),
    root=st.integers(0, 2**64 - 1),
    rest=st.binary(max_size=3000),
)
def test_any_bytes_are_a_typed_result(tmp_path_factory, head, magic, last, root, rest):
    """T14: any bytes, with and without a believable meta page, give a report or a typed error."""
    content = bytearray(head.ljust(4096, b"\0") + head.ljust(4096, b"\0") + rest)
    if magic:
        for page in (0, 1):
            struct.pack_into("<QHHHH", content, page * 4096, page, 0, 8, 0, 0)
            struct.pack_into("<IIQQ", content, page * 4096 + 16, 0xBEEFC0DE, 1, 0, 1 << 20)
            struct.pack_into("<IHHQQQQQ", content, page * 4096 + 40, 4096, 8, 0, 0, 0, 0, 0, 2**64 - 1)
            struct.pack_into("<IHHQQQQQ", content, page * 4096 + 88, 0, 0, 1, 0, 1, 0, 1, root)
            struct.pack_into("<QQ", content, page * 4096 + 136, last, page)
    look(write(tmp_path_factory.getbasetemp() / "any.mdb", bytes(content)))


@pytest.mark.fuzz
@given(mutations=MUTATIONS, seed=st.integers(0, 3))
def test_damage_to_duplicate_trees_is_a_typed_result(twisted, tmp_path_factory, mutations, seed):
    """T14: trees with duplicates, which srengine does not write, are read within bounds, too."""
    look(write(tmp_path_factory.getbasetemp() / "twisted.mdb", mutate(twisted, mutations)))


@pytest.fixture(scope="module")
def twisted(tmp_path_factory):
    path = tmp_path_factory.mktemp("twisted") / "e"
    make(path, 3, "duplicates")
    return (path / "data.mdb").read_bytes()
