"""A write-ahead log: one file of a fixed size, written from its beginning again and again, that makes records durable.

::

    sector   0     1     2     3     4     5     6    ...                       (512 bytes each)
    record  [0]   [1.0   1.1] [2]   | 9.3   9.4   10  ...                       of generation 7 | of generation 6

A record is spread over whole sectors, each with a head of its own: checksum, digest of the record, generation, number
of the record, place of the sector in it, bytes of the record (docs/formats-log.md). The file was written once in full,
so an append changes no length and no map of blocks: it is one write and one sync of data, less than half of what an
LMDB commit takes.

The owner keeps *identity*, *generation* and *capacity* elsewhere, durably. `restart` with the next generation makes
everything that was written so far void without touching it; the owner has it in a better place by then.

What is found at `open`:

* A record whose sectors are all there and of this generation was written, and is returned.
* A sector is on the disk as a whole or not at all; that is what LMDB trusts in, too. So a sector that was meant to be
  there and is still an older one, or none, was not written: the power went before the sync ended, nobody was told
  anything, and the record counts as never written (F04). That can only be the last record, because the next is begun
  after the sync of the one before: with any sector of a later record in the file it is `CorruptionError`.
* A sector that is neither sound nor empty, a file that is shorter or longer, one of a later generation: damage, which
  is never taken for an end. `CorruptionError` names the place.

What it cannot show: a tail that was replaced by zeros or by an older copy of itself, sector by sector. It looks like
an older copy of the directory, which only peers can tell.

One thread at a time.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path
from typing import Final, NamedTuple, Self

import xxhash

from srengine import errors, limits
from srengine._native import wal as kernel
from srengine.storage import files

WAL_NAME: Final = "wal"
CAPACITY: Final = 4 * limits.MIB
"""Bytes of a new file. What is in it is held in memory, too, until the owner has it elsewhere."""
CAPACITY_MAX: Final = 1 << 30
SECTOR_BYTES: Final = kernel.SECTOR_BYTES
_GENERATION_MAX: Final = (1 << 32) - 1


class Place(NamedTuple):
    """What the owner keeps about its file."""

    identity: int
    """64 bits, at random: sectors of another file are not sound in this one."""
    generation: int
    capacity: int


class _Head(NamedTuple):
    sector: int
    generation: int
    record: int
    place: int
    total: int
    digest: int


class WriteAheadLog:
    """The file ``wal`` of a directory; made by `create`, used through `open`."""

    def __init__(self, path: Path, fd: int, place: Place, *, records: int, sectors: int) -> None:
        self.path = path
        self.place = place
        self._fd = fd
        self._sectors_max = place.capacity // SECTOR_BYTES
        self._record = records
        """The number of the next one."""
        self._sector = sectors
        """Where it goes."""

    @classmethod
    def create(cls, directory: Path, capacity: int = CAPACITY) -> Place:
        """Write an empty file in full, durably; an old one is replaced. Return what to keep. `DiskFull`."""
        assert 0 < capacity <= CAPACITY_MAX, capacity
        assert capacity % SECTOR_BYTES == 0, capacity
        with files.Directory(directory) as opened:
            opened.write_durably(WAL_NAME, bytes(capacity))
        return Place(secrets.randbits(64), 1, capacity)

    @classmethod
    def open(cls, directory: Path, place: Place, *, insecure: bool = False) -> tuple[Self, list[bytes]]:
        """Open the file and return its records of this generation, in order.

        Raises `CorruptionError` as the module says, and when there is no file; `UnsafePermissions`.
        """
        path = directory / WAL_NAME
        try:
            with files.Directory(directory) as opened:
                fd = opened.open(WAL_NAME, os.O_RDWR)
        except errors.NotFound as error:
            raise _damaged(path, "is gone") from error
        try:
            files.check_private(path, directory=False, insecure=insecure)
            records, sectors = _read(path, fd, place)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, place, records=len(records), sectors=sectors), records

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def fits(self, record: bytes) -> bool:
        """Return whether there is room for a record behind those of this generation."""
        return self._sector + _sectors_of(len(record)) <= self._sectors_max

    def append(self, record: bytes) -> None:
        """Write a record that `fits`; it is durable when this returns.

        Raises `OSError`. After ENOSPC it does not count: the next one takes its place, and what a crash before that may
        leave of it was promised to nobody. After any other nobody knows what is on the disk: the
        owner writes no more.
        """
        place = self.place
        code = kernel.append(self._fd, self._sector, place.identity, place.generation, self._record, record)
        self._note(code, record)

    def begin(self, appender: kernel.Appender, record: bytes) -> None:
        """`append` in the appender's thread; `finish` has to follow before anything else."""
        place = self.place
        appender.begin(self._fd, self._sector, place.identity, place.generation, self._record, record)

    def finish(self, appender: kernel.Appender, record: bytes) -> None:
        """Wait until the record that was begun is durable. Raises as `append`."""
        self._note(appender.take(), record)

    def _note(self, code: int, record: bytes) -> None:
        if code:
            raise OSError(code, os.strerror(code), str(self.path))
        self._sector += _sectors_of(len(record))
        self._record += 1

    def next_place(self) -> Place:
        """Return what the owner keeps, durably, before it calls `restart`."""
        if self.place.generation == _GENERATION_MAX:
            raise errors.QuotaExceeded(f"{self.path} was begun again {_GENERATION_MAX} times", path=str(self.path))
        return self.place._replace(generation=self.place.generation + 1)

    def restart(self) -> None:
        """Begin the next generation at the beginning of the file."""
        self.place = self.next_place()
        self._sector = self._record = 0


def is_unused(directory: Path) -> bool:
    """Return whether no record was ever written to the file, or there is none."""
    if not os.path.lexists(directory / WAL_NAME):
        return True
    with files.Directory(directory) as opened:
        content = opened.read(WAL_NAME, bytes_max=CAPACITY_MAX, insecure=True)
    return content.count(0) == len(content)


def read_offline(directory: Path, place: Place) -> list[bytes]:
    """Return the records of a file that nobody has open. `CorruptionError`."""
    path = directory / WAL_NAME
    try:
        with files.Directory(directory) as opened:
            fd = opened.open(WAL_NAME, os.O_RDONLY | os.O_NONBLOCK)
    except errors.NotFound as error:
        raise _damaged(path, "is gone") from error
    try:
        return _read(path, fd, place)[0]
    finally:
        os.close(fd)


def _sectors_of(size: int) -> int:
    return -(-size // kernel.ROOM_BYTES) or 1


def _damaged(path: Path, what: str, sector: int | None = None) -> errors.CorruptionError:
    offset = {} if sector is None else {"offset": sector * SECTOR_BYTES}
    return errors.CorruptionError(f"the write-ahead log {path} {what}", file=str(path), **offset)


def _read(path: Path, fd: int, place: Place) -> tuple[list[bytes], int]:
    """Return the records of this generation, and how many sectors they take."""
    content = _content(path, fd, place.capacity)
    found, unsound = kernel.heads(content, place.identity)
    if unsound:
        raise _damaged(path, f"is damaged in sector {unsound[0]}", unsound[0])
    heads = [_Head(*head) for head in found]
    later = next((head for head in heads if head.generation > place.generation), None)
    if later is not None:
        what = f"is of generation {later.generation}, what it belongs to of {place.generation}: one was put back"
        raise _damaged(path, what, later.sector)
    live = {head.sector: head for head in heads if head.generation == place.generation}
    records: list[bytes] = []
    at = 0
    while (record := _record_at(path, content, live, at, len(records))) is not None:
        records.append(record)
        at += _sectors_of(len(record))
    behind = next((head for head in live.values() if head.record > len(records)), None)
    if behind is not None:
        raise _damaged(path, f"lacks record {len(records)} and holds record {behind.record}", at)
    return records, at


def _content(path: Path, fd: int, capacity: int) -> bytes:
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _damaged(path, "is no file")
        content = os.pread(fd, capacity + 1, 0)
    except OSError as error:
        if error.errno == errno.EIO:
            raise _damaged(path, f"cannot be read: {error.strerror}") from error
        raise files.from_os_error(error, f"cannot read {path}") from error
    if len(content) != capacity:
        raise _damaged(path, f"has {status.st_size} bytes instead of {capacity}")
    return content


def _record_at(path: Path, content: bytes, live: dict[int, _Head], at: int, number: int) -> bytes | None:
    """Return the record that begins in a sector; None when not all of it was written."""
    first = live.get(at)
    if first is None or (first.record, first.place) != (number, 0):
        return None
    count = _sectors_of(first.total)
    for place in range(1, count):
        if live.get(at + place) != first._replace(sector=at + place, place=place):
            return None
    room = kernel.ROOM_BYTES
    begin = SECTOR_BYTES - room
    sectors = range(at * SECTOR_BYTES, (at + count) * SECTOR_BYTES, SECTOR_BYTES)
    record = b"".join(content[start + begin : start + SECTOR_BYTES] for start in sectors)[: first.total]
    if xxhash.xxh3_64_intdigest(record) != first.digest:
        raise _damaged(path, f"holds sound sectors that are not record {number}", at)
    return record
