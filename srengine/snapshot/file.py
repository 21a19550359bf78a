"""A snapshot as one file: written so that a crash costs one chunk, read so that damage costs nothing.

The file is the items of a snapshot one after the other. While it is written it is called ``.NAME.partial`` beside its
place and is its own checkpoint: every item carries a digest and the heads say how far the scan came, so a writer that
finds one cuts it behind the last whole chunk and goes on from there, from the same tablet or another replica at or past
what was read. A partial file of another tablet, base or form is begun again.

    write, write, ... fsync file | rename .NAME.partial NAME | fsync directory
    crash before:  NAME is as it was, the next call goes on        crash after: NAME is the new one

Reading proves the whole file before the target is touched, and proves each item again when it is applied.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from srengine import errors, failpoints, limits
from srengine._native import chunk
from srengine.snapshot import format as words
from srengine.snapshot import items
from srengine.snapshot.compression import Decompressor
from srengine.snapshot.format import HEAD_BYTES, Kind
from srengine.snapshot.overlap import overlapped
from srengine.snapshot.sink import InPlace, SnapshotSink
from srengine.snapshot.source import SnapshotSource, seed_id
from srengine.snapshot.transfer_machine import Complete, ReceiveMachine, advance, first_mark
from srengine.storage import files

if TYPE_CHECKING:
    from collections.abc import Generator

    from srengine.snapshot.format import Manifest, Mark, Trailer
    from srengine.snapshot.items import Opened, Sealed
    from srengine.storage import Tablet
    from srengine.types import Position

_READ_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_WRITE_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Summary(NamedTuple):
    """What a proved snapshot file holds."""

    manifest: Manifest
    trailer: Trailer
    file_bytes: int

    @property
    def position(self) -> Position:
        """Return where a tablet stands after it."""
        return self.trailer.target.value()


class _Raw(NamedTuple):
    """An item as it stands in a file."""

    head: bytes
    stored: bytes
    memory_bytes: int
    """What it takes to open it: stored and decompressed."""


def partial_path(path: str | os.PathLike[str]) -> Path:
    """Return the name that the file ``path`` has while it is written."""
    place = Path(path)
    return place.with_name(f".{place.name}.partial")


# --- writing ---------------------------------------------------------------------------------------------------------


def write_snapshot(
    tablet: Tablet,
    path: str | os.PathLike[str],
    since: Position | None = None,
    *,
    compression: str = "zstd",
    chunk_bytes: int = limits.CHUNK_BYTES_TARGET,
    node: bytes = words.NO_SOURCE,
    share_seed: bool = True,
) -> Position:
    """Write a full snapshot of ``tablet``, or a delta behind ``since``, to the file ``path``; return its position.

    Durable when it returns; before, ``path`` is as it was. A partial file that an earlier call left behind is gone on
    with if it fits. Raises `AlreadyOpen` (another writer of the same file), `Diverged`, `BelowPurgeMark`, `DiskFull`,
    `NotFound` (no such directory), `InvalidValue` (``path`` is a directory).
    """
    place = Path(path)
    if place.is_dir():
        raise errors.InvalidValue(f"{place} is a directory", path=str(place))
    fd = _open_partial(partial_path(place))
    try:
        return _write(fd, tablet, place, since, compression, chunk_bytes, node, share_seed=share_seed)
    except OSError as error:
        raise files.from_os_error(error, f"cannot write the snapshot {place}") from error
    finally:
        os.close(fd)


def _write(
    fd: int,
    tablet: Tablet,
    place: Path,
    since: Position | None,
    compression: str,
    chunk_bytes: int,
    node: bytes,
    *,
    share_seed: bool,
) -> Position:
    left, end = _recover(fd)
    if left is not None and not _fits(left.manifest, tablet, since, compression, share_seed=share_seed):
        left = None
    source = SnapshotSource(
        tablet,
        since=since,
        resume=left,
        compression=compression,
        node=node,
        chunk_bytes=chunk_bytes,
        share_seed=share_seed,
    )
    if not source.resumed:
        if left is not None and since is not None:
            # NB: a source answers a mark that it cannot honour with a full snapshot; here a delta was asked for.
            source = SnapshotSource(
                tablet, since=since, compression=compression, node=node, chunk_bytes=chunk_bytes, share_seed=share_seed
            )
        end = 0
    os.ftruncate(fd, end)
    os.lseek(fd, end, os.SEEK_SET)
    made = source.sealed(ahead=True)
    with contextlib.closing(made):
        for item in made:
            if item.head.kind == Kind.MANIFEST and source.resumed:
                continue
            _write_all(fd, item)
            failpoints.hit(f"snapshot.{Kind(item.head.kind).name.lower()}.written")
            # NB: held any longer, it would stand beside the next one; both may be of the largest size.
            del item
    os.fsync(fd)
    failpoints.hit("snapshot.synced")
    partial_path(place).rename(place)
    failpoints.hit("snapshot.renamed")
    files.sync_directory(place.parent)
    assert source.position is not None, "a source that ended has a position"
    return source.position


def _fits(manifest: Manifest, tablet: Tablet, since: Position | None, compression: str, *, share_seed: bool) -> bool:
    return (
        (None if manifest.base is None else manifest.base.value()) == since
        and manifest.tablet == tablet.id
        and manifest.compression == compression
        and manifest.seed_id == seed_id(tablet.seed)
        and (manifest.seed is not None) == share_seed
    )


def _open_partial(partial: Path) -> int:
    """Open the partial file and own it: two writers of one file would mix their chunks."""
    while True:
        try:
            fd = os.open(partial, _WRITE_FLAGS, files.FILE_MODE)
        except OSError as error:
            raise files.from_os_error(error, f"cannot write {partial}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            here, there = os.fstat(fd), partial.lstat()
        except BlockingIOError as error:
            os.close(fd)
            raise errors.AlreadyOpen(f"another writer is at {partial}", path=str(partial)) from error
        except FileNotFoundError:
            # Renamed by the writer before us between our open and our lock: it is no longer the partial file.
            os.close(fd)
            continue
        if not stat.S_ISREG(here.st_mode):
            os.close(fd)
            raise errors.InvalidValue(f"{partial} is no plain file", path=str(partial))
        if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
            return fd
        os.close(fd)


def _write_all(fd: int, item: Sealed) -> None:
    """Write head and stored bytes without joining them; the kernel may take less than all at once."""
    parts = [memoryview(item.head_bytes), memoryview(item.stored)]
    while parts:
        written = os.writev(fd, parts)
        while parts and written >= len(parts[0]):
            written -= len(parts.pop(0))
        if parts and written:
            parts[0] = parts[0][written:]
        parts = [part for part in parts if len(part)]


def _recover(fd: int) -> tuple[Mark | None, int]:
    """Return the mark of the whole chunks at the start of a partial file and where the last one ends."""
    mark: Mark | None = None
    end = 0
    try:
        for head_data, stored, _ in _read_items(fd):
            head = words.read_head(head_data)
            if not chunk.verify(head_data, stored):
                break
            if mark is None:
                if head.kind != Kind.MANIFEST:
                    break
                mark = first_mark(words.decode_manifest(stored), head.digest)
            elif head.kind == Kind.CHUNK:
                mark = advance(mark, head)
            else:
                # A trailer: the writer died before the rename. It is written again, after what changed since.
                break
            end += len(head_data) + len(stored)
    except errors.Error:
        # Where whole items end, the writer died: from there on nothing counts.
        pass
    return mark, end


# --- reading ---------------------------------------------------------------------------------------------------------


def verify_snapshot(path: str | os.PathLike[str]) -> Summary:
    """Prove the whole file without a target; return what it holds.

    Raises `SnapshotDamaged` naming what is wrong and where, `UnsupportedFeature`, `NotFound`. Memory stays bounded
    whatever the file says.
    """
    with _opened(path) as fd:
        return _prove(fd)


def apply_snapshot(tablet: Tablet, path: str | os.PathLike[str], *, adopt: bool = False) -> Position:
    """Prove the whole file, then apply it to ``tablet``; return the position reached.

    A damaged file is `SnapshotDamaged` and the tablet untouched. A delta that does not start where the tablet stands is
    `Diverged`, a full snapshot onto a tablet with data `Conflict`. After a crash in the middle the tablet is marked as
    half filled; the same call goes on. ``adopt``: see `InPlace`.
    """
    with _opened(path) as fd:
        summary = _prove(fd)
        with SnapshotSink(InPlace(tablet, adopt=adopt)) as sink:
            _feed(fd, sink, summary)
            return sink.finish()


def _feed(fd: int, sink: SnapshotSink, summary: Summary) -> None:
    """Give the sink the items it does not have yet; those before its mark are proved and passed over."""
    mark = words.decode_mark(sink.mark) if sink.mark is not None else None
    skip = mark.chunks if mark is not None and mark.manifest.snapshot == summary.manifest.snapshot else 0
    with contextlib.closing(_proved_items(fd)) as proved:
        for opened in proved:
            head = opened.message.head
            if head.kind == Kind.CHUNK and head.ordinal <= skip:
                continue
            sink.take(opened)


def _prove(fd: int) -> Summary:
    machine = ReceiveMachine()
    with contextlib.closing(_proved_items(fd)) as proved:
        for opened in proved:
            machine.step(opened.message)
            machine.drain()
    state = machine.state
    if not isinstance(state, Complete):
        mark = machine.mark
        raise errors.SnapshotDamaged(
            "snapshot refused: the file ends before its trailer", item=0 if mark is None else mark.chunks + 1
        )
    return Summary(state.mark.manifest, state.trailer, os.fstat(fd).st_size)


def _proved_items(fd: int) -> Generator[Opened, None, None]:
    decompressor = Decompressor()
    return overlapped(
        _read_items(fd),
        lambda raw: items.open_item(raw.head, raw.stored, decompressor),
        bytes_of=lambda raw: raw.memory_bytes,
    )


def _read_items(fd: int) -> Generator[_Raw, None, None]:
    """Yield (head, stored) of each item; sizes are checked against limits and the file's before anything is read."""
    left = os.fstat(fd).st_size
    offset = 0
    while left:
        fixed = _read_exactly(fd, min(HEAD_BYTES, left), offset)
        if len(fixed) < HEAD_BYTES:
            raise errors.SnapshotDamaged(
                f"snapshot refused: the file ends inside the head of an item (byte {offset})", offset=offset
            )
        try:
            head_bytes, stored_bytes, raw_bytes = chunk.measure(fixed)
        except errors.SnapshotDamaged as error:
            raise errors.SnapshotDamaged(
                f"snapshot refused: {error.message} (byte {offset})", **(error.details | {"offset": offset})
            ) from error
        if head_bytes + stored_bytes > left:
            raise errors.SnapshotDamaged(
                f"snapshot refused: the file ends {head_bytes + stored_bytes - left} bytes before the item at byte "
                f"{offset} does",
                offset=offset,
            )
        head = fixed + _read_exactly(fd, head_bytes - HEAD_BYTES, offset + HEAD_BYTES)
        box = [_Raw(head, _read_exactly(fd, stored_bytes, offset + head_bytes), stored_bytes + raw_bytes)]
        yield box.pop()
        offset += head_bytes + stored_bytes
        left -= head_bytes + stored_bytes


def _read_exactly(fd: int, size: int, offset: int) -> bytes:
    """Read ``size`` bytes; fewer only where a file that somebody shortens meanwhile ends."""
    data = os.pread(fd, size, offset)
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            raise errors.SnapshotDamaged(f"snapshot refused: the file ends at byte {offset + len(data)}")
        data += more
    return data


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Generator[int, None, None]:
    place = Path(path)
    try:
        fd = os.open(place, _READ_FLAGS)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise errors.InvalidValue(f"{place} is a symbolic link", path=str(place)) from error
        raise files.from_os_error(error, f"cannot read the snapshot {place}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise errors.InvalidValue(f"{place} is no plain file", path=str(place))
        try:
            yield fd
        except errors.SnapshotDamaged as error:
            raise errors.SnapshotDamaged(
                f"{place}: {error.message}", **(error.details | {"path": str(place)})
            ) from error
        except OSError as error:
            raise files.from_os_error(error, f"cannot read the snapshot {place}") from error
    finally:
        os.close(fd)
