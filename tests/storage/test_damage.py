"""A damaged file in the hands of the engine: typed errors, never wrong data, never a crash."""

from __future__ import annotations

import random

import pytest

from srengine import storage
from srengine.storage import pages
from tests.crash import children

FLIPS = 150
READ = """
import random, shutil
base, work, first, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
rows = json.loads((base / "rows.json").read_text())
model = {bytes.fromhex(key): bytes.fromhex(value) for key, value in rows.items()}
(data,) = (base / "store" / "tablets").glob("*/data.mdb")
healthy = data.read_bytes()
for seed in range(first, first + count):
    tell({"seed": seed})
    random_ = random.Random(seed)
    raw = bytearray(healthy)
    # Half of the flips hit the heads of pages, where a structure breaks; the others anything.
    page = random_.randrange(len(raw) // 4096)
    raw[page * 4096 + random_.randrange(64 if seed % 2 else 4096)] ^= 1 << random_.randrange(8)
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base / "store", work)
    (work / "tablets" / data.parent.name / "data.mdb").write_bytes(raw)
    damaged = wrong = 0
    try:
        with storage.Store(work) as store:
            tablet = store.open_tablet(data.parent.name)
            for key, value in model.items():
                try:
                    found = tablet.get(key)
                    wrong += found is not None and found != value
                    damaged += found is None
                except errors.CorruptionError:
                    damaged += 1
            try:
                seen = dict(tablet.scan())
                wrong += any(model.get(key) != value for key, value in seen.items())
                damaged += len(seen) != len(model)
            except errors.CorruptionError:
                damaged += 1
    except errors.Error:
        damaged += 1
    tell({"seed": seed, "wrong": wrong, "unnamed": bool(damaged) and storage.verify_directory(work).clean})
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tablet with every kind of page, and what is in it."""
    import json

    path = tmp_path_factory.mktemp("base")
    random_ = random.Random(1)
    model = {}
    with storage.Store(path / "store", map_bytes=1 << 22) as store:
        tablet = store.tablet("t")
        for _ in range(4):
            pairs = {
                b"%05d" % random_.randrange(900): random_.randbytes(random_.choice([0, 5, 100, 300, 6000]))
                for _ in range(250)
            }
            tablet.put_many(list(pairs.items()))
            model.update(pairs)
        gone = [key for key in model if random_.random() < 0.1]
        tablet.delete_many(gone)
        for key in gone:
            del model[key]
    (path / "rows.json").write_text(json.dumps({key.hex(): value.hex() for key, value in model.items()}))
    return path


def test_the_flips_that_once_aborted(base, tmp_path):
    """T11, F10: leaf pages whose mark says something else are damage, not an abort of the process."""
    with pages.PageFile(next((base / "store" / "tablets").glob("*/data.mdb"))) as file:
        last = file.newest().last_page
        leaves = [page for page in range(2, last) if file.read(page * 4096 + 10, 2) == b"\2\0"]
    source = READ.replace(
        "raw[page * 4096 + random_.randrange(64 if seed % 2 else 4096)] ^= 1 << random_.randrange(8)",
        f"raw[{leaves!r}[seed] * 4096 + 10] ^= 1 << seed % 8",
    )
    ended = children.run(source, base, tmp_path / "work", 0, min(len(leaves), 60))
    assert ended.code == 0, (ended.code, ended.lines[-1:], ended.errors)
    results = [line for line in ended.lines if "wrong" in line]
    assert [line for line in results if line["wrong"] or line["unnamed"]] == []


def test_reads_of_a_file_with_a_flipped_bit(base, tmp_path):
    """T11, F10: with one bit of the file flipped, anywhere, a read gives the right value or a typed error, or misses a
    key of a page that the offline check names; it never gives wrong data, and the process lives.
    """
    ended = children.run(READ, base, tmp_path / "work", 0, FLIPS)
    assert ended.code == 0, (ended.code, ended.lines[-1:], ended.errors)
    results = [line for line in ended.lines if "wrong" in line]
    assert len(results) == FLIPS
    assert [line for line in results if line["wrong"] or line["unnamed"]] == []
