"""The rules between the items of a snapshot, for who sends and for who receives; no input or output here.

A full snapshot is a scan by key over short views, closed by what changed since the scan began:

    manifest   chunk by key   chunk by key   chunk by key+end   chunk by sequence   trailer
    S0 = 40    (-, f] at 40   (f, q] at 47   (q, inf) at 52     (40, 55] at 55      position at 55

    record changed last at or before S0   is the same in every view: its key was scanned
    record changed after S0               comes by sequence, from views at or past all before
    tombstone purged meanwhile            was sent or not; the receiver purges to the mark in the trailer

so the receiver ends as the view at 55, whoever sent which chunk. A delta is the second half alone, behind its base. A
mark says how far it came; with it any replica of the lineage goes on whose view is not behind the highest one used and
whose change log still reaches back to where the next chunk starts.

Invariants, checked for every item (data from a peer is checked, never asserted):

* ordinals rise by one; every head bears the manifest's snapshot id;
* ranges tile: a chunk starts where the one before ended, and the trailer's target is where the last one ended;
* no view is older than one used before;
* counts, bytes and folded digests of the trailer are those that arrived.

Not done here: the digest of an item and the rows inside (items.py), whether a target may be written at all (sink.py).
The drivers are source.py, sink.py and file.py; all of them feed the same machine, so there is one reader.
"""

from __future__ import annotations

import dataclasses
from typing import Final, NoReturn, TypeAlias, assert_never

import msgspec

from srengine import errors
from srengine._native import chunk
from srengine.snapshot import format as words
from srengine.snapshot.format import Encoding, Head, Kind, Manifest, Mark, Trailer

STALL_S_MAX: Final = 30.0
"""A receiver without a new item for so long asks another source."""
_SEQUENCE_MAX: Final = 2**63 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class ManifestRead:
    """The manifest arrived, its digest was right."""

    head: Head
    manifest: Manifest


@dataclasses.dataclass(frozen=True, slots=True)
class ChunkRead:
    """A chunk arrived: digest, size and rows were right in themselves."""

    head: Head


@dataclasses.dataclass(frozen=True, slots=True)
class TrailerRead:
    """The trailer arrived, its digest was right."""

    head: Head
    trailer: Trailer


Message: TypeAlias = ManifestRead | ChunkRead | TrailerRead


@dataclasses.dataclass(frozen=True, slots=True)
class Begin:
    """Prepare the target. ``resumed``: it holds what the mark says already; otherwise it is empty or at the base."""

    manifest: Manifest
    resumed: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Fill:
    """Write the rows of this chunk; they are covered by the next mark to persist."""

    head: Head


@dataclasses.dataclass(frozen=True, slots=True)
class Finish:
    """Write meta rows, purge to the mark, compare root and count, drop the mark: one transaction."""

    trailer: Trailer


@dataclasses.dataclass(frozen=True, slots=True)
class Ask:
    """Ask a source for the rest; ``mark`` None: for all of it."""

    mark: Mark | None


@dataclasses.dataclass(frozen=True, slots=True)
class Effects:
    """What the driver has to do, in this order: persist with apply (one transaction), then send."""

    persist: Mark | None = None
    send: tuple[Ask, ...] = ()
    apply: tuple[Begin | Fill | Finish, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Waiting:
    """No manifest yet. ``mark``: what an earlier attempt left, None for a fresh target."""

    mark: Mark | None


@dataclasses.dataclass(frozen=True, slots=True)
class Receiving:
    """Between manifest and trailer."""

    mark: Mark


@dataclasses.dataclass(frozen=True, slots=True)
class Complete:
    """The trailer was right: nothing may follow."""

    mark: Mark
    trailer: Trailer


class ReceiveMachine:
    """Takes items in order, says what to write; see the module's picture.

    ``state``: Waiting > Receiving > Complete, never back. A message that breaks a rule raises `SnapshotDamaged`, which
    names the rule, and leaves the state as it was.
    """

    def __init__(self, mark: Mark | None = None) -> None:
        self.state: Waiting | Receiving | Complete = Waiting(mark)
        self._effects = Effects()
        self._moved = True
        """Did an item arrive since the last tick?"""
        self._since = 0.0
        """When the last tick saw an item."""

    @property
    def mark(self) -> Mark | None:
        """Return how far the snapshot came; None before a manifest."""
        return self.state.mark

    def step(self, message: Message) -> None:
        """Take one item. Raises `SnapshotDamaged`."""
        match message:
            case ManifestRead():
                self._manifest(message.head, message.manifest)
            case ChunkRead():
                self._chunk(message.head)
            case TrailerRead():
                self._trailer(message.head, message.trailer)
            case _:
                assert_never(message)
        self._moved = True

    def tick(self, now: float) -> None:
        """Notice a source that went quiet; ``now`` in seconds of a monotonic clock."""
        if self._moved:
            self._moved, self._since = False, now
        elif not isinstance(self.state, Complete) and now - self._since >= STALL_S_MAX:
            self._since = now
            self._emit(send=(Ask(self.mark),))

    def drain(self) -> Effects:
        """Return and forget what is to be done."""
        effects, self._effects = self._effects, Effects()
        return effects

    def _emit(
        self,
        *,
        persist: Mark | None = None,
        send: tuple[Ask, ...] = (),
        apply: tuple[Begin | Fill | Finish, ...] = (),
    ) -> None:
        held = self._effects
        self._effects = Effects(persist or held.persist, held.send + send, held.apply + apply)

    def _manifest(self, head: Head, manifest: Manifest) -> None:
        if not isinstance(self.state, Waiting):
            _refuse("a second manifest", head)
        if head.kind != Kind.MANIFEST or head.ordinal != 0 or head.snapshot != manifest.snapshot:
            _refuse("the manifest's head and body differ", head)
        _check_plain(head)
        left = self.state.mark
        if left is not None and left.manifest.snapshot == manifest.snapshot:
            if left.manifest != manifest:
                _refuse("another manifest under the same snapshot id", head)
            self.state = Receiving(left)
            self._emit(apply=(Begin(manifest, resumed=True),))
        else:
            self.state = Receiving(first_mark(manifest, head.digest))
            self._emit(apply=(Begin(manifest, resumed=False),))

    def _chunk(self, head: Head) -> None:
        mark = advance(self._receiving(head), head)
        self.state = Receiving(mark)
        self._emit(persist=mark, apply=(Fill(head),))

    def _trailer(self, head: Head, trailer: Trailer) -> None:
        mark = self._receiving(head)
        check_trailer(mark, head, trailer)
        self.state = Complete(mark, trailer)
        self._emit(apply=(Finish(trailer),))

    def _receiving(self, head: Head) -> Mark:
        if isinstance(self.state, Waiting):
            _refuse("an item before the manifest", head)
        if isinstance(self.state, Complete):
            _refuse("an item after the trailer", head)
        return self.state.mark


def first_mark(manifest: Manifest, digest: bytes) -> Mark:
    """Return the mark of a snapshot of which only the manifest arrived; ``digest`` is that of the manifest's head."""
    return Mark(
        manifest=manifest,
        keys_done=manifest.kind == "delta",
        key=b"",
        sequence=manifest.scan_base,
        view_sequence=manifest.scan_base,
        chunks=0,
        rows=0,
        raw_bytes=0,
        digest=chunk.fold(words.NO_DIGEST, digest),
    )


def advance(mark: Mark, head: Head) -> Mark:
    """Return the mark after the chunk ``head``; raises `SnapshotDamaged` naming the rule it breaks."""
    manifest = mark.manifest
    _check_place(mark, head, Kind.CHUNK)
    if head.encoding == Encoding.ZSTD and manifest.compression != "zstd":
        _refuse("a compressed chunk in a snapshot that says it has none", head)
    if head.raw_bytes > manifest.chunk_bytes and head.row_count != 1:
        _refuse("a chunk is larger than the manifest says", head)
    if head.by_key:
        if mark.keys_done:
            _refuse("a chunk by key after the scan ended", head)
        if head.after_key != mark.key:
            _refuse("a chunk does not start at the key where the one before ended", head)
        if head.after_sequence or head.last_sequence:
            _refuse("a chunk by key has a range of sequences", head)
        if head.row_count == 0 and (head.last_key != head.after_key or not head.ends_keys):
            _refuse("a chunk by key is empty", head)
        if head.row_count and head.last_key <= head.after_key:
            _refuse("a chunk's range of keys is empty", head)
    else:
        if not mark.keys_done:
            _refuse("a chunk by sequence before the scan ended", head)
        if head.ends_keys or head.after_key or head.last_key:
            _refuse("a chunk by sequence has a range of keys", head)
        if head.after_sequence != mark.sequence:
            _refuse("a chunk does not start at the sequence where the one before ended", head)
        if not head.after_sequence < head.last_sequence <= head.view_sequence:
            _refuse("a chunk's range of sequences is empty or ahead of its view", head)
    if not mark.view_sequence <= head.view_sequence <= _SEQUENCE_MAX:
        _refuse(f"a view at {head.view_sequence} after one at {mark.view_sequence}", head)
    return msgspec.structs.replace(
        mark,
        keys_done=mark.keys_done or head.ends_keys,
        key=head.last_key if head.by_key else mark.key,
        sequence=mark.sequence if head.by_key else head.last_sequence,
        view_sequence=head.view_sequence,
        chunks=mark.chunks + 1,
        rows=mark.rows + head.row_count,
        raw_bytes=mark.raw_bytes + head.raw_bytes,
        digest=chunk.fold(mark.digest, head.digest),
    )


def check_trailer(mark: Mark, head: Head, trailer: Trailer) -> None:
    """Check that ``trailer`` closes what ``mark`` says arrived; raises `SnapshotDamaged`."""
    _check_place(mark, head, Kind.TRAILER)
    _check_plain(head)
    target = trailer.target
    if not mark.keys_done:
        _refuse("the trailer comes before the scan ended", head)
    if (trailer.chunks, trailer.rows, trailer.raw_bytes) != (mark.chunks, mark.rows, mark.raw_bytes):
        _refuse(
            f"the trailer counts {trailer.chunks} chunks, {trailer.rows} rows, {trailer.raw_bytes} bytes; "
            f"{mark.chunks}, {mark.rows}, {mark.raw_bytes} arrived",
            head,
        )
    if trailer.digest != mark.digest:
        _refuse("the trailer's digest is not that of the chunks that arrived", head)
    if target.sequence != mark.sequence or target.sequence != mark.view_sequence:
        _refuse(
            f"the trailer's target is sequence {target.sequence}, but chunks reach {mark.sequence} from views up to "
            f"{mark.view_sequence}",
            head,
        )
    if target.lineage != mark.manifest.lineage:
        _refuse("the trailer's lineage is not the manifest's", head)
    if mark.manifest.kind == "full" and target.count > mark.rows:
        _refuse("the trailer counts more records than arrived", head)


def _check_place(mark: Mark, head: Head, kind: Kind) -> None:
    due = mark.chunks + 1
    if head.kind != kind:
        _refuse(f"an item of kind {head.kind} where {kind.name.lower()} was read", head)
    if head.snapshot != mark.manifest.snapshot:
        _refuse(f"an item of snapshot {head.snapshot.hex()} in snapshot {mark.manifest.snapshot.hex()}", head)
    if head.ordinal < due:
        _refuse(f"item {head.ordinal} comes again where {due} was due", head)
    if head.ordinal > due:
        _refuse(f"item {head.ordinal} comes where {due} was due", head)


def _check_plain(head: Head) -> None:
    if head.encoding or head.flags or head.row_count or head.after_key or head.last_key:
        _refuse("a manifest or trailer with fields of a chunk", head)


def _refuse(what: str, head: Head) -> NoReturn:
    raise errors.SnapshotDamaged(f"snapshot refused: {what} (item {head.ordinal})", item=head.ordinal)


# --- the sender ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class ReadKeys:
    """Read rows by key behind ``after`` (None: from the first)."""

    after: bytes | None


@dataclasses.dataclass(frozen=True, slots=True)
class ReadSequences:
    """Read live rows by sequence behind ``after``."""

    after: int


@dataclasses.dataclass(frozen=True, slots=True)
class Close:
    """Everything up to the last view was read: read its meta rows and state, and end."""


@dataclasses.dataclass(frozen=True, slots=True)
class BatchRead:
    """The answer to a ReadKeys or ReadSequences. ``last``: key or sequence of the last row, None without rows."""

    row_count: int
    raw_bytes: int
    last: bytes | int | None
    done: bool
    """No row is left behind this batch in the view."""
    view_sequence: int


@dataclasses.dataclass(frozen=True, slots=True)
class ChunkPlan:
    """The head of the chunk to send, but for what only its bytes tell."""

    ordinal: int
    flags: int
    row_count: int
    raw_bytes: int
    after_key: bytes
    last_key: bytes
    view_sequence: int
    after_sequence: int
    last_sequence: int


@dataclasses.dataclass(frozen=True, slots=True)
class SendEffects:
    """What to read next (in ``apply``) and which chunk the last batch makes (in ``send``; none for an empty one)."""

    persist: None = None
    send: ChunkPlan | None = None
    apply: ReadKeys | ReadSequences | Close | None = None


class SendMachine:
    """Says what to read next and how the batch that was read travels; starts anywhere a mark points to."""

    def __init__(self, mark: Mark) -> None:
        self._keys_done = mark.keys_done
        self._key = mark.key
        """The last key sent; empty: none."""
        self._sequence = mark.sequence
        """By sequence, everything up to here was sent."""
        self._ordinal = mark.chunks + 1
        """Of the next item."""
        self._closed = False
        self._effects = SendEffects(apply=self._next())

    @property
    def ordinal(self) -> int:
        """Return the ordinal of the next item."""
        return self._ordinal

    def step(self, message: BatchRead) -> None:
        """Take the rows that were asked for."""
        assert not self._closed, "a batch after the end"
        plan = self._by_sequence(message) if self._keys_done else self._by_key(message)
        if plan is not None:
            self._ordinal += 1
        self._effects = SendEffects(send=plan, apply=Close() if self._closed else self._next())

    def tick(self, now: float) -> None:
        """Do nothing: a sender waits for its reader, never for time."""

    def drain(self) -> SendEffects:
        """Return and forget what is to be done."""
        effects, self._effects = self._effects, SendEffects()
        return effects

    def _next(self) -> ReadKeys | ReadSequences:
        return ReadSequences(self._sequence) if self._keys_done else ReadKeys(self._key or None)

    def _by_key(self, batch: BatchRead) -> ChunkPlan:
        after, last = self._key, batch.last
        assert last is None or isinstance(last, bytes), last
        assert batch.row_count or batch.done, batch
        self._key = after if last is None else last
        self._keys_done = batch.done
        return ChunkPlan(
            ordinal=self._ordinal,
            flags=words.FLAG_BY_KEY | (words.FLAG_KEYS_END if batch.done else 0),
            row_count=batch.row_count,
            raw_bytes=batch.raw_bytes,
            after_key=after,
            last_key=self._key,
            view_sequence=batch.view_sequence,
            after_sequence=0,
            last_sequence=0,
        )

    def _by_sequence(self, batch: BatchRead) -> ChunkPlan | None:
        after, last = self._sequence, batch.last
        assert last is None or isinstance(last, int), last
        assert batch.row_count or batch.done, batch
        # NB: a finished batch covers the gap up to its view: sequences without a row are part of what was read.
        self._sequence = batch.view_sequence if batch.done or last is None else last
        self._closed = batch.done
        if self._sequence == after:
            return None
        return ChunkPlan(
            ordinal=self._ordinal,
            flags=0,
            row_count=batch.row_count,
            raw_bytes=batch.raw_bytes,
            after_key=b"",
            last_key=b"",
            view_sequence=batch.view_sequence,
            after_sequence=after,
            last_sequence=self._sequence,
        )
