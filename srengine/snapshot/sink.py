"""Write the items of a snapshot into a tablet: the receiver's driver.

Each item is proved (items.py), placed (transfer_machine.py), and its rows gathered until a transaction is worth its
fsync; one thread fills while the next rows arrive. The mark goes into the same transaction as the rows it speaks of,
so after any crash the tablet says itself where to go on. The last transaction writes meta rows, purges, compares root
and count and takes the mark away: only then is the copy more than a copy in the making.

Where to write is a `Target`: a stage beside the real tablet, which takes its place when proved (full copies of a
node), or the tablet in place (deltas; an empty tablet).
"""

from __future__ import annotations

import concurrent.futures
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, Self

from srengine import errors, failpoints, limits
from srengine.snapshot import format as words
from srengine.snapshot import items
from srengine.snapshot.compression import Decompressor
from srengine.snapshot.source import seed_id
from srengine.snapshot.transfer_machine import Begin, Complete, Fill, Finish, ReceiveMachine

if TYPE_CHECKING:
    from types import TracebackType

    from srengine.snapshot.format import Head, Manifest, Mark, Trailer
    from srengine.storage import Store, Tablet
    from srengine.types import Position

FILL_BYTES: Final = 8 * limits.MIB
"""Rows of one transaction. Within 64 MiB they are held four times: gathered, being written, sorted, as dirty pages."""
_FIRST_FILL_BYTES: Final = 2 * limits.MIB
"""Of the first transaction; each may be twice as large as the one before, so that the disk is soon at work."""
FILL_ROWS_MAX: Final = 100_000


class Target(Protocol):
    """Where a snapshot goes."""

    def mark(self) -> bytes | None:
        """Return what an earlier attempt left, if it can be resumed."""

    def begin(self, manifest: Manifest, *, resumed: bool) -> Tablet:
        """Return the tablet to fill, proved fit for this snapshot and untouched if it is not."""

    def complete(self, tablet: Tablet) -> Tablet:
        """Make the proved copy the tablet; return it open."""

    def abandon(self, tablet: Tablet) -> None:
        """See to it that what was filled is not gone on with: its end was reached and could not be proved."""


class InPlace:
    """A delta onto its base, or a full snapshot onto an empty tablet, which takes over its seed.

    ``adopt``: the copy will live outside its group; its first own write begins a child lineage.
    """

    def __init__(self, tablet: Tablet, *, adopt: bool = False) -> None:
        self._tablet = tablet
        self._adopt = adopt

    def mark(self) -> bytes | None:
        """Return the tablet's fill mark."""
        return self._tablet.fill_mark

    def check(self, manifest: Manifest, *, resumed: bool) -> None:
        """Check the tablet against the manifest; nothing is written. Raises `Diverged`, `Conflict`, `ForeignData`."""
        tablet, here = self._tablet, self._tablet.position
        if not resumed and tablet.fill_mark is not None:
            raise errors.Conflict(
                f"tablet {tablet.id} is half filled from another snapshot; apply that one again or drop the tablet",
                tablet=tablet.id,
            )
        if not resumed and manifest.base is None and (here.sequence or here.count):
            raise errors.Conflict(
                f"a full snapshot needs an empty tablet; {tablet.id} has {here.count} records", tablet=tablet.id
            )
        if not resumed and manifest.base is not None and manifest.base.value() != here:
            base = manifest.base
            raise errors.Diverged(
                f"the delta starts at {base.lineage}:{base.sequence} with root {base.root.hex()}, the tablet is at "
                f"{here.lineage}:{here.sequence} with root {bytes(here.root).hex()}",
                base=base.sequence,
                sequence=here.sequence,
            )
        if manifest.seed_id != seed_id(tablet.seed) and (resumed or manifest.base is not None or manifest.seed is None):
            raise errors.ForeignData(
                "the snapshot is of a tablet with another seed; only an empty one can take it over", tablet=tablet.id
            )

    def begin(self, manifest: Manifest, *, resumed: bool) -> Tablet:
        """Check as `check`, then take over the seed if need be."""
        self.check(manifest, resumed=resumed)
        tablet = self._tablet
        if manifest.base is None and self._adopt:
            # NB: before the first row, so that no crash leaves a copy that writes under its source's lineage.
            tablet.mark_adopted()
        if manifest.seed is not None and manifest.seed != tablet.seed:
            tablet.adopt_seed(manifest.seed)
        return tablet

    def complete(self, tablet: Tablet) -> Tablet:
        """Nothing is left to do: the last transaction proved it."""
        return tablet

    def abandon(self, tablet: Tablet) -> None:
        """Leave a mark that nobody can go on from; a delta that was one transaction changed nothing."""
        if tablet.fill_mark is not None:
            tablet.fill(b"", words.BROKEN_MARK)


class Staged:
    """A full copy beside the real tablet ``tablet_id`` of ``store``; deltas go to ``tablet`` in place, if it is given.

    The real tablet stays as it is until the copy is proved, then the stage takes its place (`Store.switch_tablet`).
    """

    def __init__(self, store: Store, tablet_id: str, *, tablet: Tablet | None = None) -> None:
        self._store = store
        self._tablet_id = tablet_id
        self._in_place = None if tablet is None else InPlace(tablet)
        self._staged: Tablet | None = None

    def mark(self) -> bytes | None:
        """Return the mark of an unfinished stage, or of a tablet half filled in place."""
        staged = self._store.find_stage(self._tablet_id)
        if staged is not None and staged.fill_mark is not None:
            return staged.fill_mark
        return None if self._in_place is None else self._in_place.mark()

    def begin(self, manifest: Manifest, *, resumed: bool) -> Tablet:
        """Open the stage, a new one unless ``resumed``. Raises as `InPlace.begin` for a delta."""
        if manifest.base is not None:
            if self._in_place is None:
                raise errors.Conflict(f"tablet {self._tablet_id} has no base for a delta", tablet=self._tablet_id)
            return self._in_place.begin(manifest, resumed=resumed)
        if manifest.seed is None:
            raise errors.SnapshotDamaged("the snapshot does not carry its seed; a replica cannot be made of it")
        if manifest.tablet != self._tablet_id:
            raise errors.ForeignData(
                f"the snapshot is of tablet {manifest.tablet}, {self._tablet_id} was asked for", tablet=self._tablet_id
            )
        if not resumed:
            self._store.drop_stage(self._tablet_id)
        self._staged = self._store.stage_tablet(self._tablet_id, seed=manifest.seed)
        if resumed and self._staged.fill_mark is None:
            raise errors.SnapshotDamaged("the stage to go on with is gone", tablet=self._tablet_id)
        return self._staged

    def complete(self, tablet: Tablet) -> Tablet:
        """Switch a stage; after a delta in place, an older unfinished stage is good for nothing."""
        if tablet is self._staged:
            return self._store.switch_tablet(tablet)
        self._store.drop_stage(self._tablet_id)
        return tablet

    def abandon(self, tablet: Tablet) -> None:
        """Drop a stage; mark a tablet in place as broken, so that the next copy is a full one."""
        if tablet is self._staged:
            self._store.drop_stage(self._tablet_id)
        elif self._in_place is not None:
            self._in_place.abandon(tablet)


class Progress(NamedTuple):
    """How far a sink is."""

    chunks: int
    rows: int
    raw_bytes: int
    complete: bool


class SnapshotSink:
    """Takes items in order (`accept`), writes them, and proves the end (`finish`). For one thread at a time.

    ``target`` says where to. ``mark`` is what a source needs to go on where an earlier sink stopped: send it with the
    request (None: nothing to go on with). `accept` blocks for the disk now and then and releases the GIL while it
    works. A failure leaves what was filled and its mark; a new sink on the same target resumes. `close` it in any
    case.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._tablet: Tablet | None = None
        left = target.mark()
        mark: Mark | None = None
        if left is not None:
            try:
                mark = words.decode_mark(left)
            except errors.Error:
                # NB: a mark of another version: the copy begins again, and the target decides whether it may.
                left = None
        self.mark = left
        self._machine = ReceiveMachine(mark)
        self._decompressor = Decompressor()
        self._buffers = [bytearray(), bytearray()]
        """One is gathered into, the other may be being written. Made at their full size once and used again, because
        memory that comes and goes with every transaction costs more than what it holds.
        """
        self._batch = memoryview(b"")
        """The first of the buffers."""
        self._used = 0
        """Bytes gathered in it."""
        self._batch_bytes_max = min(_FIRST_FILL_BYTES, FILL_BYTES)
        self._batch_rows = 0
        self._batch_order: tuple[bool, int] | None = None
        """(by key, view) of the gathered rows: a batch never holds a key twice, so it never mixes these."""
        self._batch_mark: Mark | None = None
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None
        self._filling: concurrent.futures.Future[None] | None = None
        self._position: Position | None = None
        self._failed = False
        """An item was taken and not written."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def progress(self) -> Progress:
        """Return how far it is, rows of earlier attempts included."""
        mark = self._machine.mark
        complete = isinstance(self._machine.state, Complete)
        return (
            Progress(0, 0, 0, complete) if mark is None else Progress(mark.chunks, mark.rows, mark.raw_bytes, complete)
        )

    @property
    def resume_mark(self) -> bytes | None:
        """Return the mark of what is durably filled: the one to ask another source with, after `close`."""
        return None if self._tablet is None else self._tablet.fill_mark

    @property
    def tablet(self) -> Tablet | None:
        """Return the filled tablet: after `finish` the one that took its place."""
        return self._tablet

    def accept(self, item: bytes | bytearray | memoryview) -> Progress:
        """Take the next item whole. Raises `SnapshotDamaged`, or what the target or the tablet says."""
        head, stored = items.split(item)
        self.take(items.open_item(head, stored, self._decompressor, self._room))
        return self.progress

    def take(self, opened: items.Opened) -> None:
        """Take the next item, already proved in itself."""
        if self._failed:
            raise errors.Closed("this sink failed; a new one on the same target goes on")
        self._machine.step(opened.message)
        # NB: from here on the machine counts the item as taken. If it is not, nothing that follows may be written, or a
        # mark would speak of rows that are not there.
        self._failed = True
        effects = self._machine.drain()
        for effect in effects.apply:
            match effect:
                case Begin(manifest, resumed):
                    self._tablet = self._target.begin(manifest, resumed=resumed)
                case Fill(head):
                    assert effects.persist is not None, "a chunk moves the mark"
                    self._gather(head, opened.rows, effects.persist)
                case Finish(trailer):
                    self._finish(trailer)
        self._failed = False

    def finish(self) -> Position:
        """Return the position reached; raises `SnapshotDamaged` when items are missing."""
        if self._position is None:
            raise errors.SnapshotDamaged("the snapshot ends before its trailer", **self.progress._asdict())
        return self._position

    def close(self) -> None:
        """Write what was gathered, if its copy is not complete, and stop the thread. Errors of the disk pass silently:
        what was not written is sent again.
        """
        try:
            if self._position is None and self._used and not self._failed:
                self._flush()
            self._wait()
        except errors.Error:
            pass
        finally:
            self._used = 0
            if self._thread is not None:
                self._thread.shutdown(wait=True)
                self._thread = None

    # --- filling ---------------------------------------------------------------------------------------------------

    def _room(self, head: Head) -> memoryview | None:
        """Return the place behind what was gathered, for a chunk that is decompressed but not yet known to be taken.

        What was gathered may be written for it: it stands under its own mark, whatever becomes of this chunk.
        """
        if self._tablet is None or self._failed or head.raw_bytes > FILL_BYTES // 2:
            return None
        # NB: as in `take`: if an earlier transaction turns out to have failed, nothing that follows may be written.
        self._failed = True
        self._make_room(head)
        self._failed = False
        return self._batch[self._used : self._used + head.raw_bytes + 1]

    def _make_room(self, head: Head) -> None:
        """Write what was gathered if this chunk's rows do not fit behind it."""
        full = self._used + head.raw_bytes > self._batch_bytes_max or self._batch_rows + head.row_count > FILL_ROWS_MAX
        if self._used and (full or _order_of(head) != self._batch_order):
            self._flush()
        if not self._buffers[0]:
            # One more than is ever used: a decompressor notices by it that there is too much.
            self._buffers[0] = bytearray(FILL_BYTES + 1)
            self._batch = memoryview(self._buffers[0])

    def _gather(self, head: Head, rows: memoryview, mark: Mark) -> None:
        self._make_room(head)
        self._batch_order = _order_of(head)
        self._batch_mark = mark
        if len(rows) > FILL_BYTES // 2:
            # Alone and uncopied, with nothing else in the making: it may be of the largest size.
            if self._used:
                self._flush()
            self._wait()
            assert self._tablet is not None, "rows come after the manifest"
            self._fill(self._tablet, rows, mark)
            return
        if rows.obj is not self._buffers[0]:  # else it was decompressed where it belongs
            self._batch[self._used : self._used + len(rows)] = rows
        self._used += len(rows)
        self._batch_rows += head.row_count

    def _flush(self) -> None:
        self._wait()
        assert self._tablet is not None, "rows come after the manifest"
        assert self._batch_mark is not None, "rows come with a mark"
        batch = self._batch[: self._used]
        self._buffers.reverse()
        self._batch, self._used, self._batch_rows = memoryview(self._buffers[0]), 0, 0
        self._batch_bytes_max = min(2 * self._batch_bytes_max, FILL_BYTES)
        if self._thread is None:
            self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="srengine-snapshot-fill")
        self._filling = self._thread.submit(self._fill, self._tablet, batch, self._batch_mark)

    @staticmethod
    def _fill(tablet: Tablet, rows: memoryview, mark: Mark) -> None:
        failpoints.hit("snapshot.fill.before")
        tablet.fill(rows, words.encode_mark(mark))
        failpoints.hit("snapshot.fill.after")

    def _wait(self) -> None:
        filling, self._filling = self._filling, None
        if filling is not None:
            filling.result()

    def _finish(self, trailer: Trailer) -> None:
        self._wait()
        tablet = self._tablet
        assert tablet is not None, "a trailer comes after the manifest"
        failpoints.hit("snapshot.finish.before")
        try:
            position = self._prove(tablet, trailer)
        except errors.SnapshotDamaged:
            self._target.abandon(tablet)
            raise
        except errors.FrameError as error:
            self._target.abandon(tablet)
            raise errors.SnapshotDamaged(f"snapshot refused: the trailer's rows: {error.message}") from error
        failpoints.hit("snapshot.finish.after")
        self._used = 0
        self._tablet = self._target.complete(tablet)
        failpoints.hit("snapshot.finish.complete")
        self._position = position

    def _prove(self, tablet: Tablet, trailer: Trailer) -> Position:
        target = trailer.target.value()
        promised = tablet.promised(trailer.meta, trailer.state)
        if promised != target:
            raise errors.SnapshotDamaged(
                f"snapshot refused: the trailer's target is {target.lineage}:{target.sequence}, its state row says "
                f"{promised.lineage}:{promised.sequence}, or roots or counts differ"
            )
        position = tablet.finish_fill(trailer.meta, trailer.state, rows=self._batch[: self._used])
        assert position == target, (position, target)
        return position


def _order_of(head: Head) -> tuple[bool, int]:
    """Return what two chunks have in common that may be one transaction.

    Rows by sequence of two views may name a key twice; rows by key never do.
    """
    return head.by_key, 0 if head.by_key else head.view_sequence
