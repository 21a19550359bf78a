"""The exchange: make one replica equal to another at a cost that follows the difference, in two round trips. No I/O.

    initiator (wants to be equal)                     responder (the authority, SYNCED)
    Compare: root, count, sequence          ───>
                                            <───      Equal, or Differs: six cells over leaves, and the estimator
    one or two records differ: the cells tell which
      Fetch: those                          ───>
    else a table of the size that the estimate asks for
      Sketch: its cells                     ───>      subtracts its own, peels, finds the records
                                            <───      Close: rows, what it does not have, its state
    repair: one transaction that must reach the responder's root and count, or nothing

The cells are sums over leaves; over records when more than a sixteenth of the leaves would differ, or when the caller
has a slow link (one walk of all records a side, a third of the bytes). A table that was too small after all is
answered by `Tables`: the responder's own cells of it and of a second one, which are peeled together at the initiator.
That costs no round for locating, but the records come one round later; it happens in a few runs of a hundred.

Escalation, each step for a stated reason: sketch → sketch over records, other seed, half as large again → dump of leaf
digests → full copy. A full copy at once when more than a quarter differs.

Invariants:

* The initiator changes nothing but by `Apply`, which is proved by the root that the responder showed for its own state.
* Whatever the peer says, work and memory are bounded by `limits.EXCHANGE_*`, and after EXCHANGE_ROUNDS_MAX requests it
  ends as UNDECIDED.
* The responder keeps nothing between requests. What it changed between two of them comes with the answer (`Fetch` names
  the sequence at which it was told what differs), so writes there do not disturb the exchange.
* The initiator's tablet stands still: if it moved, the exchange starts again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, assert_never

from srengine import errors, limits
from srengine._native import merkle
from srengine.sync.exchange_messages import (
    PREFIX_WAYS,
    PREFIX_WIDTH,
    Differs,
    ExchangeClose,
    ExchangeCompare,
    ExchangeDiffers,
    ExchangeDump,
    ExchangeEqual,
    ExchangeFetch,
    ExchangeFull,
    ExchangeSketch,
    ExchangeTables,
    Reason,
    Reply,
    Request,
    Shape,
    Tables,
    body_bytes,
    decode_close,
    decode_differs,
    decode_fetch,
    decode_sketch,
    decode_tables,
    encode_close,
    encode_compare,
    encode_fetch,
    encode_sketch,
    encode_tables,
)
from srengine.types import Actual, Found, Item, Listed, Located, Repair

if TYPE_CHECKING:
    import random
    from contextlib import AbstractContextManager

Buffer = bytes | memoryview
NOTHING: Final = Located([], [], [])

LEAF_MODE_SHARE: Final = 1 / 16
"""Above this share of differing leaves too many hold several differences, and records are cheaper."""
FULL_COPY_SHARE: Final = 1 / 4
FULL_COPY_RECORDS_MIN: Final = 256
"""A tablet of which fewer records differ is never worth a full copy."""
SAMPLE_DEVIATIONS: Final = 1.2
BUCKET_DEVIATIONS: Final = 1.75
"""How far above the estimate a table is sized, in standard deviations of its two errors: every second record counts
(square root of the number), and there are so many buckets (a tenth). With the table's own slack one in fifty is too
small."""
CELLS_MORE: Final = 8
CELLS_MIN: Final = 30
"""Cells beyond the factor, and at least: small tables are peeled by luck, and small estimates are mostly too low."""
EXTENSION_SHARE: Final = 0.8
EXTENSION_CELLS_MIN: Final = 40
FIVE_WAYS_CELLS_MAX: Final = 45
FOUR_WAYS_CELLS_MAX: Final = 600
"""Up to so many cells five, then four subtables peel better; above it three need fewer cells."""
REPLY_TIMEOUT_S: Final = 30.0


class Moment(Protocol):
    """A tablet at one moment: the arithmetic and the reads that `srengine.storage.merkle.Moment` does for a side."""

    sequence: int
    root: bytes
    count: int

    @property
    def state(self) -> bytes:
        """The state row."""
        ...

    @property
    def leaf_count(self) -> int:
        """How many leaves there are."""
        ...

    @property
    def estimator(self) -> bytes:
        """The estimator's buckets."""
        ...

    @property
    def rows_digest(self) -> bytes:
        """The root without its records."""
        ...

    @property
    def actual(self) -> Actual:
        """What the records add up to."""
        ...

    @property
    def dump(self) -> bytes:
        """All leaf digests."""
        ...

    def sketch(self, *, by_leaf: bool, ways: int, width: int, seed: int) -> merkle.Sketch:
        """Return a table of all leaves or records."""
        ...

    def peel(self, sketches: list[merkle.Sketch]) -> list[Item] | None:
        """Read what differs, or None."""
        ...

    def resolve(self, items: list[Item]) -> Located:
        """Locate the records behind differing leaves."""
        ...

    def list_ranges(self, located: Located) -> Located:
        """List ranges in place of shipping them."""
        ...

    def compare_listed(self, listed: tuple[Listed, ...]) -> tuple[list[bytes], tuple[Listed, ...]]:
        """Return our keys beyond the lists, and the lists of what is not here."""
        ...

    def differing_leaves(self, dump: bytes) -> Located:
        """Return what a dump shows to differ."""
        ...

    def rows_of(self, located: Located, since: int | None, *, bytes_max: int) -> Found:
        """Return the rows to ship."""
        ...

    def meta(self, *, with_rows: bool) -> bytes:
        """Return the meta rows to ship."""
        ...

    def settle(self, rows: bytes, absent: Located, extra: list[bytes]) -> Repair:
        """Work out the repair."""
        ...

    @staticmethod
    def sequence_of(state: bytes) -> int:
        """Return the sequence of a state row."""
        ...

    @staticmethod
    def merge_rows(older: bytes, newer: bytes) -> bytes:
        """Return rows of both, newer ones over older."""
        ...


class Side(Protocol):
    """What the machine needs of a tablet. `srengine.storage.Tablet.leaves` and its position give it."""

    @property
    def place(self) -> tuple[bytes, int, int]:
        """(root, count, sequence), without touching a record."""
        ...

    def stands_at(self, where: bytes) -> bool:
        """Whether it is there; costs nothing."""
        ...

    def moment(self, *, recount: bool = False) -> AbstractContextManager[Moment]:
        """Bring the leaves up to date and pin the view."""
        ...


@dataclass(frozen=True, slots=True)
class Send:
    """Send this and bring the answer to `Initiator.step`."""

    message: Request


@dataclass(frozen=True, slots=True)
class Apply:
    """Repair the tablet (`Tablet.repair`) and report to `Initiator.applied`."""

    rows: bytes
    removed: list[bytes]
    meta: bytes
    state: bytes
    replace_rows: bool
    base: tuple[int, bytes]
    actual: Actual | None


@dataclass(slots=True)
class Figures:
    """What an exchange cost. ``locating_bytes``: bodies both ways, and rows that turned out to be equal here."""

    rounds: int = 0
    locating_rounds: int = 0
    locating_bytes: int = 0
    record_bytes: int = 0
    sketches: int = 0
    extended: int = 0
    estimate: int = 0
    mode: str = ""
    reasons: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end. ``full_copy``: why the tablet is to be copied whole instead, or None: it is equal to the authority's.

    ``report``: the keys that differed. ``unproven``: how often what the peer sent did not reach the root it promised.
    """

    full_copy: Reason | None
    report: list[bytes]
    figures: Figures
    unproven: int


@dataclass(frozen=True, slots=True)
class Effects:
    """What the driver does, in this order."""

    send: Send | None = None
    apply: Apply | None = None
    outcome: Outcome | None = None


# --- sizes -----------------------------------------------------------------------------------------------------------

_FACTORS: Final[tuple[tuple[float, float], ...]] = (
    (0.0, 1.45),
    (200.0, 1.45),
    (1000.0, 1.33),
    (10_000.0, 1.27),
    (100_000.0, 1.245),
    (1e9, 1.24),
)
"""Cells for each item so that peeling ends in all but about 1 % of runs: measured, interpolated by the logarithm."""


def estimate(here: bytes, there: bytes) -> float:
    """Return how many records differ, to about a tenth: twice the sum of squares of what the buckets differ by."""
    total = 0
    for one, other in zip(here, there, strict=True):
        step = (one - other) & 0xFF
        total += (step if step < 128 else step - 256) ** 2
    return 2.0 * total


def upper(records: float) -> float:
    """Return a number of records that the truth is rarely above, for an estimate of ``records``."""
    records = max(records, 2.0)
    sample, buckets = records, records * records * 2 / merkle.ESTIMATOR_BYTES
    return records + math.sqrt(SAMPLE_DEVIATIONS**2 * sample + BUCKET_DEVIATIONS**2 * buckets)


def leaves_with(records: float, leaf_count: int) -> float:
    """Return how many of the leaves so many records touch, boundary keys that split leaves included."""
    return leaf_count * -math.expm1(-records / leaf_count) * 1.045


def cells_for(items: float) -> int:
    """Return how many cells hold so many items."""
    for (low, factor), (high, following) in pairwise(_FACTORS):
        if items <= high:
            share = math.log(max(items, 1) / max(low, 1)) / math.log(high / max(low, 1))
            share = min(max(share, 0.0), 1.0)
            return max(CELLS_MIN, CELLS_MORE + math.ceil(items * (factor + (following - factor) * share)))
    raise AssertionError(items)


def ways_for(cells: int) -> int:
    """Return how many subtables a table of so many cells has."""
    return 5 if cells <= FIVE_WAYS_CELLS_MAX else 4 if cells <= FOUR_WAYS_CELLS_MAX else 3


def shape_for(items: float, seed: int, *, by_leaf: bool) -> Shape:
    """Return the shape of a table for so many items."""
    cells = min(cells_for(items), limits.EXCHANGE_CELLS_MAX - 4)
    ways = ways_for(cells)
    return Shape(by_leaf, ways, max(1, cells // ways), seed)


def extension_of(shape: Shape) -> Shape:
    """Return the second table that goes with one that was too small."""
    cells = min(max(int(shape.cells * EXTENSION_SHARE), EXTENSION_CELLS_MIN), limits.EXCHANGE_CELLS_MAX - 4)
    ways = ways_for(cells)
    return Shape(shape.by_leaf, ways, max(1, cells // ways), shape.seed ^ 0x5EED5EED5EED5EED)


def prefix_of(moment: Moment, root: bytes) -> merkle.Sketch:
    """Return the six cells over leaves; their seed is the root that the initiator showed."""
    return moment.sketch(by_leaf=True, ways=PREFIX_WAYS, width=PREFIX_WIDTH, seed=int.from_bytes(root[:8], "little"))


def _table(moment: Moment, shape: Shape) -> merkle.Sketch:
    return moment.sketch(by_leaf=shape.by_leaf, ways=shape.ways, width=shape.width, seed=shape.seed)


def _located(moment: Moment, items: list[Item], *, by_leaf: bool) -> Located:
    return moment.resolve(items) if by_leaf else Located([], sorted(item for item, _, _ in items), [])


# --- the initiator ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Comparing:
    """Waits for `Equal` or `Differs`."""

    root: bytes


@dataclass(frozen=True, slots=True)
class Sketching:
    """Waits for `Close`, `Tables` or `Full` after a sketch."""

    shape: Shape


@dataclass(frozen=True, slots=True)
class Fetching:
    """Waits for the records that it asked for. ``rows``, ``extra``, ``absent``: what the answer with lists said."""

    asked: Located
    rows: bytes = b""
    extra: tuple[bytes, ...] = ()
    absent: Located = NOTHING


@dataclass(frozen=True, slots=True)
class Dumping:
    """Waits for the answer to its leaf digests."""


@dataclass(frozen=True, slots=True)
class Applying:
    """Waits for the driver to say what came of the repair."""

    report: list[bytes]
    last: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """There is an outcome; nothing is taken any more."""


State = Comparing | Sketching | Fetching | Dumping | Applying | Ended


class Initiator:
    """The side that becomes equal: `start`, then `step` with each answer, `applied` after each `Apply`, then `drain`.

    ``recount``: do not trust the root that the tablet carries, sum all records up again first (damage, scrub).
    ``prefer_records``: compare record by record from the start, for a slow link.
    """

    def __init__(
        self,
        tablet: str,
        side: Side,
        rng: random.Random,
        *,
        recount: bool = False,
        prefer_records: bool = False,
    ) -> None:
        self._tablet = tablet
        self._side = side
        self._rng = rng
        self._recount = recount
        self._prefer_records = prefer_records
        self._state: State = Ended()
        self._effects = Effects()
        self._base: tuple[int, bytes] = (0, b"")
        self._actual: Actual | None = None
        self._shown = b""
        self._differs: Differs | None = None
        self._attempts = 0
        self._unproven = 0
        self._restarts = 0
        self._sent_at: float | None = None
        self.figures = Figures()

    # --- the four verbs ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin: say where the tablet stands."""
        if self._recount:
            with self._side.moment(recount=True) as moment:
                actual = moment.actual
                self._base = (moment.sequence, moment.root)
                self._actual = None if (actual.root, actual.count) == (moment.root, moment.count) else actual
                root, count, sequence = actual.root, actual.count, moment.sequence
        else:
            root, count, sequence = self._side.place
            self._base = (sequence, root)
        self._shown = root
        self._state = Comparing(root)
        self._send(ExchangeCompare(self._tablet, encode_compare(root, count, sequence)))

    def step(self, reply: Reply, attachments: Sequence[Buffer] = ()) -> None:
        """Take an answer. Raises `FrameError` for one that is malformed or out of place; the exchange is over then."""
        self._sent_at = None
        body, records = body_bytes(reply, attachments)
        self.figures.locating_bytes += body
        self.figures.record_bytes += records
        state = self._state
        try:
            match reply:
                case ExchangeEqual() if isinstance(state, Comparing):
                    self._end(None, [])
                case ExchangeDiffers() if isinstance(state, Comparing):
                    self._differs = decode_differs(reply.body)
                    self._choose(self._differs)
                case ExchangeTables() if isinstance(state, Sketching):
                    self._peel(state.shape, decode_tables(reply.body, state.shape))
                case ExchangeClose() if isinstance(state, Sketching | Fetching | Dumping):
                    self._close(reply, attachments)
                case ExchangeFull() if isinstance(state, Sketching | Fetching | Dumping):
                    self._end(_reason(reply.body), [])
                case _:
                    _out_of_place(reply)
        except errors.FrameError:
            self._state = Ended()
            raise

    def applied(self, *, proved: bool) -> None:
        """Take what came of an `Apply`: whether the transaction reached the root."""
        state = self._state
        assert isinstance(state, Applying), state
        if proved:
            self._end(None, state.report)
            return
        self._unproven += 1
        self.figures.reasons.append("the root was not reached")
        if state.last:
            self._end(Reason.UNDECIDED, [])
        else:
            self._again()

    def tick(self, now: float) -> None:
        """Take the time, seconds on any clock that rises. Raises `TimedOut` when an answer is overdue."""
        if isinstance(self._state, Ended | Applying):
            return
        if self._sent_at is None:
            self._sent_at = now
        elif now - self._sent_at > REPLY_TIMEOUT_S:
            self._state = Ended()
            raise errors.TimedOut(f"the exchange of tablet {self._tablet} got no answer in {REPLY_TIMEOUT_S} s")

    def drain(self) -> Effects:
        """Return what is to be done, once."""
        effects, self._effects = self._effects, Effects()
        return effects

    # --- decisions ---------------------------------------------------------------------------------------------------

    def _choose(self, differs: Differs) -> None:
        """Look at prefix and estimate: fetch, sketch or give up."""
        with self._side.moment() as moment:
            if self._moved(moment):
                return
            prefix = prefix_of(moment, self._shown)
            prefix.subtract(differs.prefix)
            items = moment.peel([prefix])
            if items is not None:
                self.figures.mode = self.figures.mode or "prefix"
                self._fetch(moment, moment.resolve(items), differs.sequence)
                return
            records = estimate(moment.estimator, differs.estimator)
            self.figures.estimate = int(records)
            if records > max(moment.count * FULL_COPY_SHARE, FULL_COPY_RECORDS_MIN):
                self._end(Reason.TOO_DIFFERENT, [])
                return
            self._sketch(moment, records)

    def _sketch(self, moment: Moment, records: float) -> None:
        wanted = upper(records) * 1.5**self._attempts
        leaves = leaves_with(wanted, moment.leaf_count)
        by_leaf = not self._prefer_records and not self._attempts
        if by_leaf and leaves_with(records, moment.leaf_count) > moment.leaf_count * LEAF_MODE_SHARE:
            by_leaf = False
            self.figures.reasons.append("more than a sixteenth of the leaves differ")
        if not by_leaf and moment.count > limits.EXCHANGE_RECORDS_MAX:
            by_leaf = True
            self.figures.reasons.append("too many records to hold their ids")
        shape = shape_for(leaves if by_leaf else wanted, self._rng.getrandbits(64), by_leaf=by_leaf)
        cells = _table(moment, shape).encode()
        self.figures.sketches += 1
        self.figures.mode = "leaf" if by_leaf else "record"
        self._state = Sketching(shape)
        self._send(ExchangeSketch(self._tablet, encode_sketch(shape, moment.rows_digest[:8], cells)))

    def _peel(self, shape: Shape, tables: Tables) -> None:
        """Peel what the responder could not, with its second table, and with the prefix if that still holds."""
        self.figures.extended += 1
        with self._side.moment() as moment:
            if self._moved(moment):
                return
            first, second = _table(moment, shape), _table(moment, tables.extension)
            first.subtract(tables.first)
            second.subtract(tables.second)
            together = [first, second]
            if shape.by_leaf and self._differs is not None and self._differs.sequence == tables.sequence:
                prefix = prefix_of(moment, self._shown)
                prefix.subtract(self._differs.prefix)
                together.append(prefix)
            items = moment.peel(together)
            if items is not None:
                self._fetch(moment, _located(moment, items, by_leaf=shape.by_leaf), tables.sequence)
                return
        self.figures.reasons.append("the sketch could not be read")
        self._again()

    def _again(self) -> None:
        """Another sketch, of another kind, seed and size; after some of them the leaf digests."""
        self._attempts += 1
        with self._side.moment() as moment:
            if self._moved(moment):
                return
            if self._attempts < limits.EXCHANGE_ATTEMPTS_MAX and self._differs is not None:
                self._sketch(moment, max(estimate(moment.estimator, self._differs.estimator), 8.0))
                return
            if isinstance(self._state, Dumping) or moment.leaf_count * 14 > limits.EXCHANGE_BYTES_MAX // 2:
                self._end(Reason.UNDECIDED, [])
                return
            self.figures.reasons.append("leaf digests after all sketches")
            self.figures.mode = "dump"
            self._state = Dumping()
            self._send(ExchangeDump(self._tablet, moment.rows_digest[:8] + moment.dump))

    def _fetch(self, moment: Moment, located: Located, sequence: int) -> None:
        if len(located.ranges) > limits.EXCHANGE_RANGES_MAX:
            self._end(Reason.UNDECIDED, [])
            return
        self._state = Fetching(located)
        self.figures.locating_rounds = self.figures.rounds
        self._send(ExchangeFetch(self._tablet, encode_fetch(sequence, moment.rows_digest[:8], located)))

    def _close(self, reply: ExchangeClose, attachments: Sequence[Buffer]) -> None:
        if len(attachments) != 3:
            raise errors.FrameError(f"the end of an exchange has three attachments, not {len(attachments)}")
        rows, meta, state = (bytes(part) for part in attachments)
        absent, replace_rows = decode_close(reply.body)
        extra: list[bytes] = []
        with self._side.moment() as moment:
            if self._moved(moment):
                return
            if isinstance(self._state, Fetching):
                asked, earlier = self._state.asked, self._state.absent
                if absent != NOTHING:
                    raise errors.FrameError("records that were asked for come without anything else")
                rows = moment.merge_rows(self._state.rows, rows)
                absent = Located(asked.pairs + earlier.pairs, asked.ids + earlier.ids, asked.ranges + earlier.ranges)
                extra = list(self._state.extra)
            elif absent.listed:
                extra, wanted = moment.compare_listed(absent.listed)
                absent = absent._replace(listed=())
                if wanted:
                    self._fetch(moment, Located([], [], [], wanted), moment.sequence_of(state))
                    self._state = Fetching(Located([], [], []), rows, tuple(extra), absent)
                    return
            if not self.figures.locating_rounds:
                self.figures.locating_rounds = self.figures.rounds
            repair = moment.settle(rows, absent, extra)
        self.figures.locating_bytes += repair.equal_bytes
        self.figures.record_bytes -= repair.equal_bytes
        self._state = Applying(repair.report, isinstance(self._state, Dumping))
        self._effects = Effects(
            apply=Apply(repair.rows, repair.removed, meta, state, replace_rows, self._base, self._actual)
        )

    def _moved(self, moment: Moment) -> bool:
        """Start again when the tablet is no longer where it was; bounded, for it ought to stand still."""
        if (moment.sequence, moment.root) == self._base:
            return False
        self._restarts += 1
        self.figures.reasons.append("the tablet moved on")
        if self._restarts > limits.EXCHANGE_ATTEMPTS_MAX:
            self._end(Reason.UNDECIDED, [])
        else:
            self.start()
        return True

    # --- effects -----------------------------------------------------------------------------------------------------

    def _send(self, message: Request) -> None:
        if self.figures.rounds == limits.EXCHANGE_ROUNDS_MAX:
            self._end(Reason.UNDECIDED, [])
            return
        self.figures.rounds += 1
        if not isinstance(message, ExchangeFetch) or self.figures.mode == "prefix":
            self.figures.locating_rounds = 0
        self.figures.locating_bytes += len(message.body)
        self._effects = Effects(send=Send(message))

    def _end(self, reason: Reason | None, report: list[bytes]) -> None:
        self._state = Ended()
        if not self.figures.locating_rounds:
            self.figures.locating_rounds = self.figures.rounds
        if reason is not None:
            self.figures.reasons.append(f"full copy: {reason.name.lower().replace('_', ' ')}")
        self._effects = Effects(outcome=Outcome(reason, report, self.figures, self._unproven))


def _out_of_place(reply: Reply) -> NoReturn:
    raise errors.FrameError(f"{type(reply).__name__} is no answer to what was asked")


def _reason(body: bytes) -> Reason:
    try:
        return Reason(body[0])
    except (IndexError, ValueError) as error:
        raise errors.FrameError("a full copy is asked for without a reason") from error


# --- the responder ---------------------------------------------------------------------------------------------------


class Responder:
    """The authority's side: one answer for each request, nothing kept in between."""

    def __init__(self, side: Side) -> None:
        self._side = side

    def step(self, request: Request) -> tuple[Reply, tuple[bytes, ...]]:
        """Return the answer and its attachments. Raises `FrameError` for a malformed request."""
        try:
            match request:
                case ExchangeCompare():
                    return self._compare(request.body), ()
                case ExchangeSketch():
                    return self._sketch(request.body)
                case ExchangeFetch():
                    return self._fetch(request.body)
                case ExchangeDump():
                    return self._dump(request.body)
                case _:
                    assert_never(request)
        except errors.QuotaExceeded:
            return _full(Reason.TOO_LARGE), ()
        except errors.BelowPurgeMark:
            return _full(Reason.BELOW_PURGE_MARK), ()

    def _compare(self, body: bytes) -> Reply:
        if self._side.stands_at(body):
            return ExchangeEqual(body[24:])
        with self._side.moment() as moment:
            head = moment.sequence.to_bytes(8, "little")
            return ExchangeDiffers(head + prefix_of(moment, body[:16]).encode() + moment.estimator)

    def _sketch(self, body: bytes) -> tuple[Reply, tuple[bytes, ...]]:
        shape, digest, cells = decode_sketch(body)
        with self._side.moment() as moment:
            mine = _table(moment, shape)
            difference = mine.minus(cells)
            items = moment.peel([difference])
            if items is not None:
                located = moment.list_ranges(_located(moment, items, by_leaf=shape.by_leaf))
                if len(located.ranges) <= limits.EXCHANGE_RANGES_MAX:
                    return self._close(moment, located, digest, None)
            extension = extension_of(shape)
            tables = Tables(moment.sequence, extension, mine.encode(), _table(moment, extension).encode())
            return ExchangeTables(encode_tables(tables)), ()

    def _fetch(self, body: bytes) -> tuple[Reply, tuple[bytes, ...]]:
        sequence, digest, located = decode_fetch(body)
        with self._side.moment() as moment:
            reply, attachments = self._close(moment, located, digest, sequence)
            # What is not here the initiator sees by itself: it asked for it.
            return ExchangeClose(encode_close(NOTHING, replace_rows=bool(reply.body[0]))), attachments

    def _dump(self, body: bytes) -> tuple[Reply, tuple[bytes, ...]]:
        if len(body) < 8:
            raise errors.FrameError("a dump of leaf digests begins with the digest of the rows")
        with self._side.moment() as moment:
            located = moment.differing_leaves(body[8:])
            if len(located.ranges) > limits.EXCHANGE_RANGES_MAX:
                return _full(Reason.TOO_DIFFERENT), ()
            return self._close(moment, located, body[:8], None)

    def _close(
        self, moment: Moment, located: Located, digest: bytes, since: int | None
    ) -> tuple[ExchangeClose, tuple[bytes, ...]]:
        wanted = located if since is not None else located._replace(listed=())
        found = moment.rows_of(wanted, since, bytes_max=limits.EXCHANGE_BYTES_MAX)
        replace_rows = moment.rows_digest[:8] != digest
        absent = Located(found.missing_pairs, found.missing_ids, located.ranges, located.listed)
        return (
            ExchangeClose(encode_close(absent, replace_rows=replace_rows)),
            (found.rows, moment.meta(with_rows=replace_rows), moment.state),
        )


def _full(reason: Reason) -> ExchangeFull:
    return ExchangeFull(bytes([reason]))
