"""The write-ahead log: what was appended is there, what was not ends it, and everything else is named."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import os
import random
import select
import signal
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srengine import errors
from srengine._native import wal as kernel
from srengine.storage import wal
from srengine.storage.wal import Place, WriteAheadLog
from tests.reference import wal as reference
from tests.storage.logged.stores import writing_to

SECTOR, ROOM = reference.SECTOR, reference.ROOM
identities = st.integers(0, (1 << 64) - 1)
numbers = st.integers(0, (1 << 32) - 1)
sizes = st.sampled_from([0, 1, ROOM - 1, ROOM, ROOM + 1, 3 * ROOM]) | st.integers(0, 4 * ROOM)
RECORDS = (b"first", random.Random(1).randbytes(ROOM + 7), b"", random.Random(2).randbytes(3 * ROOM - 1))
"""1, 2, 1 and 3 sectors."""


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "store"
    path.mkdir(mode=0o700)
    return path


@contextlib.contextmanager
def opened(directory, place):
    """Open the log; it is closed at the end, and read offline as well."""
    log, records = WriteAheadLog.open(directory, place)
    try:
        assert wal.read_offline(directory, place) == records
        yield log, records
    finally:
        log.close()


def written(directory, records=RECORDS, before=(b"old" * 1500,), sectors=16):
    """Make a file of generation 2 with some records over an older one; return its place."""
    place = WriteAheadLog.create(directory, sectors * SECTOR)
    with opened(directory, place) as (log, _):
        for record in before:
            log.append(record)
        place = log.next_place()
        log.restart()
        for record in records:
            log.append(record)
    return place


def file_of(directory):
    return directory / wal.WAL_NAME


def check_damaged(directory, place, sector=None):
    """Both ways to read it refuse, and name the file and the sector."""
    for read in (WriteAheadLog.open, wal.read_offline):
        with pytest.raises(errors.CorruptionError) as caught:
            read(directory, place)
        assert caught.value.file == str(file_of(directory))
        assert getattr(caught.value, "offset", None) == (None if sector is None else sector * SECTOR)


# --- the kernel ------------------------------------------------------------------------------------------------------


@given(sizes, st.integers(0, 5), identities, numbers, numbers)
def test_the_kernel_writes_what_the_format_says(tmp_path_factory, size, first, identity, generation, number):
    """A record's sectors are byte for byte those of the description, in their place, and nothing else is touched."""
    record = random.Random(size).randbytes(size)
    path = tmp_path_factory.mktemp("kernel") / "file"
    path.write_bytes(b"x" * 20 * SECTOR)
    fd = os.open(path, os.O_RDWR)
    try:
        assert kernel.append(fd, first, identity, generation, number, record) == 0
    finally:
        os.close(fd)
    sectors = reference.sectors(record, first, identity, generation, number)
    behind = 20 - first - len(sectors)
    assert path.read_bytes() == b"x" * first * SECTOR + b"".join(sectors) + b"x" * behind * SECTOR
    path.unlink()


@given(st.data())
def test_the_kernel_tells_sectors_apart(data):
    """Sound ones with what their heads say, damaged ones by number, those of zeros not at all: as plain Python does."""
    identity = data.draw(identities)
    content = bytearray()
    for _ in range(data.draw(st.integers(0, 4))):
        what = data.draw(st.sampled_from(["record", "zeros", "noise", "another file's", "in another place"]))
        theirs = (identity + (what == "another file's")) & reference.MASK
        first = len(content) // SECTOR + (what == "in another place")
        record = bytes(data.draw(sizes))
        content += {"zeros": bytes(SECTOR), "noise": b"\7" * SECTOR}.get(
            what, b"".join(reference.sectors(record, first, theirs, data.draw(numbers), data.draw(numbers)))
        )
    for _ in range(data.draw(st.integers(0, 2))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert kernel.heads(bytes(content), identity) == reference.heads(bytes(content), identity)


def test_the_kernel_says_what_failed(tmp_path):
    """F05, F07: the errno of the write, or of the sync, is returned and nothing is raised."""
    path = tmp_path / "file"
    path.write_bytes(bytes(SECTOR))
    readable = os.open(path, os.O_RDONLY)
    full = os.open("/dev/full", os.O_RDWR)
    nowhere = os.open(os.devnull, os.O_RDWR)
    try:
        assert kernel.append(-1, 0, 1, 1, 0, b"x") == errno.EBADF
        assert kernel.append(readable, 0, 1, 1, 0, b"x") == errno.EBADF
        assert kernel.append(full, 0, 1, 1, 0, b"x") == errno.ENOSPC
        assert kernel.append(nowhere, 0, 1, 1, 0, b"x") == errno.EINVAL, "what cannot be synced is not durable"
    finally:
        for fd in (readable, full, nowhere):
            os.close(fd)


# --- the kernel's thread ---------------------------------------------------------------------------------------------


@pytest.fixture
def pipe():
    """Two ends of which neither makes anybody wait."""
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def appender(pipe):
    found = kernel.Appender(pipe[1])
    yield found
    found.close()


@pytest.fixture
def file(tmp_path):
    """A descriptor of a file of 20 sectors."""
    (tmp_path / "file").write_bytes(bytes(20 * SECTOR))
    fd = os.open(tmp_path / "file", os.O_RDWR)
    yield fd
    os.close(fd)


def threads():
    """The threads of this process, those that the interpreter does not know, too."""
    return set(Path("/proc/self/task").iterdir())


def until_gone(before):
    """Wait until no thread is there but those of before: one that was joined is listed for a moment longer."""
    while threads() - before:
        os.sched_yield()


def on_disk(fd, first, count):
    return os.pread(fd, count * SECTOR, first * SECTOR)


@settings(max_examples=30)
@given(sizes, st.integers(0, 5), identities, numbers, numbers)
def test_the_thread_writes_what_append_writes(tmp_path_factory, size, first, identity, generation, number):
    """What was begun leaves the file byte for byte as `append` leaves it."""
    record = random.Random(size).randbytes(size)
    directory = tmp_path_factory.mktemp("kernel")
    reader, notify = os.pipe()
    appender = kernel.Appender(notify)
    try:
        found = []
        for name, begins in [("append", False), ("begin", True)]:
            (directory / name).write_bytes(b"x" * 20 * SECTOR)
            fd = os.open(directory / name, os.O_RDWR)
            if begins:
                appender.begin(fd, first, identity, generation, number, record)
            assert (appender.take() if begins else kernel.append(fd, first, identity, generation, number, record)) == 0
            os.close(fd)
            found.append((directory / name).read_bytes())
            (directory / name).unlink()
        assert found[0] == found[1]
        assert found[0] != b"x" * 20 * SECTOR
    finally:
        appender.close()
        os.close(reader)
        os.close(notify)


def test_a_byte_says_that_a_record_is_done(appender, pipe, file):
    """F17: whoever waits for the descriptor gets one byte for each record, when it is written, and no other."""
    for number in range(20):
        with pytest.raises(BlockingIOError):
            os.read(pipe[0], 1)
        appender.begin(file, number, 1, 1, number, b"%d" % number)
        select.select([pipe[0]], [], [])
        assert on_disk(file, number, 1) == reference.sectors(b"%d" % number, number, 1, 1, number)[0]
        assert os.read(pipe[0], 10) == b"!"
        assert appender.take() == 0


def test_one_byte_comes_for_a_record_that_was_taken(appender, pipe, file):
    """Who waits by `take` and for the byte after it gets one, and no second one."""
    for number in range(200):
        appender.begin(file, 0, 1, 1, number, b"x")
        assert appender.take() == 0
        select.select([pipe[0]], [], [])
        assert os.read(pipe[0], 10) == b"!"


def test_the_thread_says_what_failed(appender, pipe, file, tmp_path):
    """F05, F07: the errno of the write, or of the sync, is what `take` returns, with its byte, and the next record is
    written as if nothing had been.
    """
    readable = os.open(tmp_path / "file", os.O_RDONLY)
    full = os.open("/dev/full", os.O_RDWR)
    nowhere = os.open(os.devnull, os.O_RDWR)
    wrong = {-1: errno.EBADF, readable: errno.EBADF, full: errno.ENOSPC, nowhere: errno.EINVAL}
    try:
        for fd, code in wrong.items():
            appender.begin(fd, 0, 1, 1, 0, b"x")
            assert appender.take() == code
            select.select([pipe[0]], [], [])
            assert os.read(pipe[0], 10) == b"!"
            appender.begin(file, 0, 1, 1, 0, b"x")
            assert appender.take() == 0
            select.select([pipe[0]], [], [])
            assert os.read(pipe[0], 10) == b"!"
    finally:
        for fd in (readable, full, nowhere):
            os.close(fd)


def test_one_record_at_a_time(appender, pipe, file):
    """A second `begin` before `take`, done or not, and a `take` of nothing are our caller's mistakes: ValueError, and
    what was begun is not touched.
    """
    assert not appender.busy
    with pytest.raises(ValueError, match="nothing"):
        appender.take()
    appender.begin(file, 0, 1, 1, 0, b"first")
    assert appender.busy
    with pytest.raises(ValueError, match="something to do"):
        appender.begin(file, 0, 1, 1, 0, b"second")
    select.select([pipe[0]], [], [])
    assert appender.busy, "done is not taken"
    with pytest.raises(ValueError, match="something to do"):
        appender.begin(file, 0, 1, 1, 0, b"second")
    assert appender.take() == 0
    assert not appender.busy
    assert on_disk(file, 0, 1) == reference.sectors(b"first", 0, 1, 1, 0)[0]
    with pytest.raises(ValueError, match="nothing"):
        appender.take()
    assert os.read(pipe[0], 10) == b"!"


@pytest.mark.parametrize("ends", ["closed", "dropped"])
@pytest.mark.parametrize("begun", [False, True])
def test_the_thread_ends(pipe, file, ends, begun):
    """An appender that is closed, twice is once, or that nobody has any more leaves no thread; what was begun is on the
    disk first. Who closes it waits for that and is told; who drops it is not.
    """
    before = threads()
    appender = kernel.Appender(pipe[1])
    assert len(threads() - before) == 1
    if begun:
        appender.begin(file, 3, 1, 1, 0, b"begun")
    if ends == "closed":
        appender.close()
        appender.close()
        with pytest.raises(ValueError, match="has ended"):
            appender.begin(file, 4, 1, 1, 0, b"late")
    else:
        del appender
        gc.collect()
    until_gone(before)
    assert on_disk(file, 3, 1) == (reference.sectors(b"begun", 3, 1, 1, 0)[0] if begun else bytes(SECTOR))
    assert on_disk(file, 4, 1) == bytes(SECTOR)
    if begun and ends == "closed":
        assert os.read(pipe[0], 10) == b"!"
        with pytest.raises(ValueError, match="nothing"):
            appender.take()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("begun", [False, True])
def test_a_forked_child_lets_go_of_the_thread(pipe, file, begun):
    """F18: the child has no such thread: to close or drop the appender there does nothing and waits for nobody; the
    parent's goes on.
    """
    appender = kernel.Appender(pipe[1])
    if begun:
        appender.begin(file, 0, 1, 1, 0, b"of the parent")
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # one that hangs dies of it
        try:
            appender.close()
            del appender
            gc.collect()
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    if not begun:
        appender.begin(file, 0, 1, 1, 0, b"of the parent")
    assert appender.take() == 0
    select.select([pipe[0]], [], [])  # the byte comes right behind what `take` waits for
    assert os.read(pipe[0], 10) == b"!"
    assert on_disk(file, 0, 1) == reference.sectors(b"of the parent", 0, 1, 1, 0)[0]
    appender.close()


# --- what was appended is there --------------------------------------------------------------------------------------


@given(st.lists(st.tuples(sizes, st.sampled_from(["", "", "", "reopen", "restart"])), max_size=25))
def test_what_was_appended_is_there(tmp_path_factory, steps):
    """Records of any sizes are there in order after opening again, those of this generation alone, as long as they fit;
    and the file is what the description reads from it.
    """
    directory = tmp_path_factory.mktemp("wal")
    place = WriteAheadLog.create(directory, 12 * SECTOR)
    log, records = WriteAheadLog.open(directory, place)
    try:
        for number, (size, what) in enumerate(steps):
            record = random.Random(number).randbytes(size)
            used = sum(max(1, -(-len(found) // ROOM)) for found in records)
            fits = used + max(1, -(-size // ROOM)) <= 12
            assert log.fits(record) == fits
            if fits:
                log.append(record)
                records.append(record)
            if what == "restart" or not fits:
                place = log.next_place()
                log.restart()
                assert log.place == place
                records = []
            if what == "reopen":
                log.close()
                log, found = WriteAheadLog.open(directory, place)
                assert found == records
            assert wal.read_offline(directory, place) == records
            content = file_of(directory).read_bytes()
            assert reference.records(content, place.identity, place.generation) == records
    finally:
        log.close()
        file_of(directory).unlink()


@settings(max_examples=50)
@given(st.lists(st.tuples(sizes, st.booleans(), st.sampled_from(["", "", "", "full", "restart"])), max_size=12))
def test_what_was_begun_and_finished_was_appended(tmp_path_factory, steps):
    """F07: `begin` and `finish` in any mixture with `append` leave the file, and the log, as `append` alone does, also
    after a disk that was full.
    """
    directories = [tmp_path_factory.mktemp("wal") for _ in range(2)]
    place = WriteAheadLog.create(directories[0], 12 * SECTOR)
    file_of(directories[1]).write_bytes(file_of(directories[0]).read_bytes())
    file_of(directories[1]).chmod(0o600)
    plain, mixed = (WriteAheadLog.open(directory, place)[0] for directory in directories)
    reader, notify = os.pipe()
    appender = kernel.Appender(notify)
    try:
        for number, (size, begins, what) in enumerate(steps):
            record = random.Random(number).randbytes(size)
            if not mixed.fits(record) or what == "restart":
                plain.restart()
                mixed.restart()
            if what == "full":
                with full_disk(mixed), pytest.raises(OSError, match="No space left") as caught:
                    if begins:
                        mixed.begin(appender, record)
                    mixed.finish(appender, record) if begins else mixed.append(record)
                assert caught.value.errno == errno.ENOSPC
            plain.append(record)
            if begins:
                mixed.begin(appender, record)
                mixed.finish(appender, record)
            else:
                mixed.append(record)
            assert not appender.busy
            assert file_of(directories[0]).read_bytes() == file_of(directories[1]).read_bytes()
            assert wal.read_offline(directories[1], mixed.place)[-1] == record
            assert [mixed.fits(bytes(room * ROOM)) for room in range(14)] == [
                plain.fits(bytes(room * ROOM)) for room in range(14)
            ]
    finally:
        appender.close()
        plain.close()
        mixed.close()
        os.close(reader)
        os.close(notify)
        for directory in directories:
            file_of(directory).unlink()


def test_a_file_is_full_to_its_last_sector(directory):
    """`fits` counts sectors: a record takes the last one, and not a byte more fits behind it."""
    place = WriteAheadLog.create(directory, 4 * SECTOR)
    with opened(directory, place) as (log, _):
        assert log.fits(bytes(4 * ROOM))
        assert not log.fits(bytes(4 * ROOM + 1))
        log.append(b"x")
        assert log.fits(bytes(3 * ROOM))
        assert not log.fits(bytes(3 * ROOM + 1))
        log.append(bytes(3 * ROOM))
        assert not log.fits(b"")
    with opened(directory, place) as (log, records):
        assert records == [b"x", bytes(3 * ROOM)]
        assert not log.fits(b"")
    assert file_of(directory).stat().st_size == 4 * SECTOR


def test_an_older_generation_is_void(directory):
    """After `restart` nothing of before is read, whatever is left of it behind the new records."""
    place = written(directory, records=(b"new",), before=RECORDS)
    with opened(directory, place) as (_, records):
        assert records == [b"new"]
    with opened(directory, place._replace(generation=3)) as (log, records):
        assert records == []
        log.append(b"of the third")
    with opened(directory, place._replace(generation=3)) as (_, records):
        assert records == [b"of the third"]


def test_a_new_file_takes_the_place_of_an_old_one(directory):
    """`create` makes another file with another identity: nothing of the old one is in it."""
    old = written(directory)
    place = WriteAheadLog.create(directory, 8 * SECTOR)
    assert place.identity != old.identity
    assert (place.generation, place.capacity) == (1, 8 * SECTOR)
    with opened(directory, place) as (_, records):
        assert records == []
    assert [path.name for path in directory.iterdir()] == [wal.WAL_NAME]
    assert file_of(directory).stat().st_mode & 0o777 == 0o600


def test_a_generation_is_the_last_one(directory):
    """The number of the generation never goes round: the last one is `QuotaExceeded`."""
    place = WriteAheadLog.create(directory, 4 * SECTOR)._replace(generation=(1 << 32) - 1)
    with opened(directory, place) as (log, _):
        log.append(b"x")
        for action in (log.next_place, log.restart):
            with pytest.raises(errors.QuotaExceeded):
                action()
    with opened(directory, place) as (_, records):
        assert records == [b"x"]


def test_closing_twice_is_closing_once(directory):
    """The second call closes nothing, least of all somebody else's descriptor."""
    place = written(directory)
    log, _ = WriteAheadLog.open(directory, place)
    number = log._fd
    log.close()
    with file_of(directory).open("rb") as other:
        os.dup2(other.fileno(), number)
        try:
            log.close()
            os.fstat(number)
        finally:
            os.close(number)
    with pytest.raises(OSError, match="Bad file descriptor"):
        log.append(b"x")


# --- what was not written to the end ---------------------------------------------------------------------------------


def test_a_last_record_of_which_sectors_are_missing_was_never_written(directory):
    """F04: whichever sectors of the last record a loss of power left out, zeros or older ones in their place, it
    counts as never written, the ones before it stand, and the next one goes where it was.
    """
    place = written(directory)
    sound = file_of(directory).read_bytes()
    old = b"".join(reference.sectors(b"old" * 1500, 0, place.identity, 1, 0))
    for missing in itertools.product([None, bytes(16 * SECTOR), old], repeat=3):
        if missing == (None, None, None):
            continue
        content = bytearray(sound)
        for sector, other in zip((4, 5, 6), missing, strict=True):
            if other is not None:
                content[sector * SECTOR : (sector + 1) * SECTOR] = other[sector * SECTOR : (sector + 1) * SECTOR]
        file_of(directory).write_bytes(content)
        with opened(directory, place) as (log, records):
            assert records == list(RECORDS[:3])
            log.append(b"in its place")
        with opened(directory, place) as (_, records):
            assert records == [*RECORDS[:3], b"in its place"]


@pytest.mark.parametrize("other", ["zeros", "older"])
def test_an_earlier_record_of_which_sectors_are_missing_is_damage(directory, other):
    """F04, F10: a record is begun when the one before it is durable: a sector of an earlier one that is zeros, or what
    was there before, is no end of the log but damage, and the place where the record should begin is named.
    """
    place = written(directory)
    sound = file_of(directory).read_bytes()
    old = b"".join(reference.sectors(b"old" * 1500, 0, place.identity, 1, 0))
    for sector, begin in {0: 0, 1: 1, 2: 1, 3: 3}.items():
        content = bytearray(sound)
        instead = bytes(SECTOR) if other == "zeros" else old[sector * SECTOR : (sector + 1) * SECTOR]
        content[sector * SECTOR : (sector + 1) * SECTOR] = instead
        file_of(directory).write_bytes(content)
        check_damaged(directory, place, begin)


@given(st.data())
def test_what_a_loss_of_power_leaves_is_read_as_described(tmp_path_factory, data):
    """F04: any sectors of any records left out: what is read, or refused, is what the plain description says."""
    directory = tmp_path_factory.mktemp("wal")
    wanted = [random.Random(size).randbytes(size) for size in data.draw(st.lists(sizes, min_size=1, max_size=4))]
    place = written(directory, records=wanted, sectors=20)
    content = bytearray(file_of(directory).read_bytes())
    old = b"".join(reference.sectors(b"old" * 1500, 0, place.identity, 1, 0)) + bytes(20 * SECTOR)
    for sector in data.draw(st.lists(st.integers(0, 19), max_size=3)):
        other = data.draw(st.sampled_from([bytes(20 * SECTOR), old]))
        content[sector * SECTOR : (sector + 1) * SECTOR] = other[sector * SECTOR : (sector + 1) * SECTOR]
    file_of(directory).write_bytes(content)
    try:
        expected = reference.records(bytes(content), place.identity, place.generation)
    except reference.Damaged:
        with pytest.raises(errors.CorruptionError):
            wal.read_offline(directory, place)
    else:
        assert wal.read_offline(directory, place) == expected == wanted[: len(expected)]
    file_of(directory).unlink()


# --- a full disk -----------------------------------------------------------------------------------------------------


def full_disk(log):
    """Let every write of an open log meet a full disk."""
    return writing_to(log, "/dev/full", os.O_RDWR)


@pytest.mark.parametrize("left", range(6))
def test_a_failed_append_leaves_its_place_to_the_next(directory, left):
    """F07: an append that met a full disk after some of its sectors is not there, and another, shorter one in the same
    place is, with those behind it, whatever the first has left.
    """
    place = written(directory)
    long = random.Random(3).randbytes(5 * ROOM)
    with opened(directory, place) as (log, _):
        with full_disk(log), pytest.raises(OSError, match="No space left") as caught:
            log.append(long)
        assert caught.value.errno == errno.ENOSPC
        sectors = reference.sectors(long, 7, place.identity, place.generation, len(RECORDS))
        with file_of(directory).open("r+b") as file:
            file.seek(7 * SECTOR)
            file.write(b"".join(sectors[:left]))
        log.append(b"shorter")
        assert wal.read_offline(directory, place) == [*RECORDS, b"shorter"]
        log.append(bytes(ROOM + 1))
        log.append(b"and another")
    with opened(directory, place) as (log, records):
        assert records == [*RECORDS, b"shorter", bytes(ROOM + 1), b"and another"]
        log.append(b"and on")
        assert wal.read_offline(directory, place)[-1] == b"and on"


# --- damage is named -------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found(directory):
    """F10: a bit that rots anywhere in the file, in a record of this generation, of an older one or in a sector never
    written to, is `CorruptionError` naming the sector: never an end of the log, never another record.
    """
    place = written(directory, sectors=12)
    sound = file_of(directory).read_bytes()
    fd = os.open(file_of(directory), os.O_RDWR)
    try:
        for at in range(len(sound)):
            # Every bit of the heads, one of each byte of the records.
            for bit in range(8) if at % SECTOR < reference.HEAD.size else [at % 8]:
                os.pwrite(fd, bytes([sound[at] ^ 1 << bit]), at)
                with pytest.raises(errors.CorruptionError) as caught:
                    wal.read_offline(directory, place)
                assert caught.value.offset == at // SECTOR * SECTOR
            os.pwrite(fd, sound[at : at + 1], at)
    finally:
        os.close(fd)
    with opened(directory, place) as (_, records):
        assert records == list(RECORDS)


def test_sectors_in_another_place_are_damage(directory):
    """F10: a sound sector that stands in another place than it was written to is damage."""
    place = written(directory)
    sound = file_of(directory).read_bytes()
    for source, target in [(3, 0), (0, 3), (4, 5), (5, 4), (6, 12)]:
        content = bytearray(sound)
        content[target * SECTOR : (target + 1) * SECTOR] = sound[source * SECTOR : (source + 1) * SECTOR]
        file_of(directory).write_bytes(content)
        check_damaged(directory, place, target)


def test_sound_sectors_of_two_records_are_no_record(directory):
    """F10: sectors that fit each other and not the digest of the record are damage, not data."""
    place = written(directory, records=())
    one, other = (reference.sectors(b"%d" % number * ROOM * 2, 0, place.identity, 2, 0) for number in (1, 2))
    mixed = bytearray(other[1])
    mixed[8:16] = one[0][8:16]
    mixed[:8] = reference.checksum(bytes(mixed), place.identity, 1).to_bytes(8, "little")
    with file_of(directory).open("r+b") as file:
        file.write(one[0] + mixed)
    check_damaged(directory, place, 0)


@pytest.mark.parametrize("difference", [-16 * SECTOR, -SECTOR, -1, 1, SECTOR])
def test_a_file_of_another_size_is_refused(directory, difference):
    """F11: a file that was cut, emptied or lengthened is not read, and stays as it is."""
    place = written(directory)
    content = file_of(directory).read_bytes()
    damaged = content[:difference] if difference < 0 else content + bytes(difference)
    file_of(directory).write_bytes(damaged)
    check_damaged(directory, place)
    assert file_of(directory).read_bytes() == damaged


def test_a_missing_file_is_damage(directory):
    """F11: a log that is gone is not silently begun again."""
    place = written(directory)
    file_of(directory).unlink()
    check_damaged(directory, place)
    assert not list(directory.iterdir())


def test_a_later_generation_is_damage(directory):
    """F14: records that are newer than what the owner knows say that the owner was put back: `CorruptionError`."""
    place = written(directory)
    check_damaged(directory, place._replace(generation=1), 0)


def test_another_identity_is_damage(directory):
    """F12: the file of another store is not read in this one."""
    place = written(directory)
    check_damaged(directory, place._replace(identity=place.identity ^ 1), 0)


@pytest.mark.parametrize("mode", [0o640, 0o602, 0o666])
def test_a_file_that_others_can_reach_is_refused(directory, mode):
    """F52: the file is private, as everything is."""
    place = written(directory)
    file_of(directory).chmod(mode)
    with pytest.raises(errors.UnsafePermissions):
        WriteAheadLog.open(directory, place)
    log, records = WriteAheadLog.open(directory, place, insecure=True)
    log.close()
    assert records == list(RECORDS)


def make_link(file):
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def make_socket(file):
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(file))  # of a path there may be no more than 107 bytes


MAKERS = {
    "link": make_link,
    "link to nothing": lambda file: file.symlink_to("nothing"),
    "directory": lambda file: file.mkdir(),
    "fifo": lambda file: os.mkfifo(file, 0o600),
    "socket": make_socket,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_no_file_is_refused(directory, kind):
    """F40: neither a symbolic link, even to a sound log, nor anything else that is no plain file is followed, read,
    waited for, or taken for a log that nobody has used: a typed error, and no descriptor is left.
    """
    place = written(directory)
    if kind != "link":
        file_of(directory).unlink()
    MAKERS[kind](file_of(directory))
    before = sorted(Path("/proc/self/fd").iterdir())
    for read in (WriteAheadLog.open, wal.read_offline, lambda found, _: wal.is_unused(found)):
        with pytest.raises(errors.Error) as caught:
            read(directory, place)
        assert str(file_of(directory)) in caught.value.message
        if "link" in kind:
            assert isinstance(caught.value, errors.InvalidValue)
        if kind in {"directory", "fifo"} and read is wal.read_offline:
            assert isinstance(caught.value, errors.CorruptionError)
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_a_log_is_unused_until_something_was_written(directory):
    """F14: no file, or one of zeros alone, was never used; one byte anywhere, of an older generation, too, says that it
    was.
    """
    assert wal.is_unused(directory)
    place = WriteAheadLog.create(directory, 4 * SECTOR)
    assert wal.is_unused(directory)
    with opened(directory, place) as (log, _):
        assert wal.is_unused(directory)
        log.append(b"")
        assert not wal.is_unused(directory)
        log.restart()
    assert not wal.is_unused(directory)
    for at in (0, SECTOR, 4 * SECTOR - 1):
        file_of(directory).write_bytes(bytes(at) + b"\1" + bytes(4 * SECTOR - 1 - at))
        assert not wal.is_unused(directory)


def test_no_descriptor_is_left_open(directory):
    """A log that is refused, and one that is closed, leave no descriptor behind."""
    place = written(directory)
    before = sorted(Path("/proc/self/fd").iterdir())
    with opened(directory, place):
        pass
    for wrong in (Place(1, 1, 16 * SECTOR), place._replace(capacity=SECTOR), place._replace(generation=1)):
        with contextlib.suppress(errors.CorruptionError):
            WriteAheadLog.open(directory, wrong)
        with contextlib.suppress(errors.CorruptionError):
            wal.read_offline(directory, wrong)
    assert sorted(Path("/proc/self/fd").iterdir()) == before
