"""The exchange: make one replica equal to another at a cost that follows the difference, in two round trips. No I/O.

    initiator (wants to be equal)                     responder (the authority, SYNCED)
    Compare: root, count, sequence          ───>
                                            <───      Equal, or Differs: six cells over leaves, and the estimator
    one or two records differ: the cells tell which
      Fetch: those                          ───>
    else a table of the size that the estimate asks for
      (over records, Prepare: its shape     ───>      makes its own meanwhile, and nobody waits for the answer)
      Sketch: its cells                     ───>      subtracts its own, peels, finds the records
                                            <───      Close: rows, what it does not have, its state
    repair: one transaction that must reach the responder's root and count, or nothing

The cells are sums over leaves; over records when more than a sixteenth of the leaves or some thousand records differ,
or when the caller has a slow link: one walk of all records a side, a third of the bytes. The two sides walk at the same
time, because the initiator says which table it is about to make. A table that was too small after all is answered by
`Tables`: the responder's own cells of it and of a second one, which are peeled together at the initiator. That costs no
round for locating, but the records come one round later; it happens in a few runs of a hundred.

Escalation, each step for a stated reason: sketch → sketch over records, other seed, half as large again → dump of leaf
digests → full copy. A full copy at once when more than a quarter differs.

Invariants:

* The initiator changes nothing but by `Apply`, which is proved by the root that the responder showed for its own state.
* Whatever the peer says, work and memory are bounded by `limits.EXCHANGE_*`, and after EXCHANGE_ROUNDS_MAX requests it
  ends as UNDECIDED.
* No answer depends on what the responder keeps between requests. What it changed between two of them comes with the
  answer (`Fetch` names the sequence at which it was told what differs), so writes there do not disturb the exchange.
* The initiator's tablet stands still: if it moved, the exchange starts again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NoReturn

from srengine import errors, limits
from srengine.sync.exchange_messages import (
    PREPARED_BYTES,
    Differs,
    ExchangeClose,
    ExchangeCompare,
    ExchangeDiffers,
    ExchangeDump,
    ExchangeEqual,
    ExchangeFetch,
    ExchangeFull,
    ExchangePrepare,
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
    decode_tables,
    encode_compare,
    encode_fetch,
    encode_prepare,
    encode_sketch,
)
from srengine.sync.exchange_responder_machine import Responder
from srengine.sync.exchange_side import NOTHING, Moment, Side, located_by, prefix_of, table_of
from srengine.sync.exchange_sizes import estimate, leaves_with, shape_for, upper
from srengine.types import Actual, Item, Located

if TYPE_CHECKING:
    import random

__all__ = [
    "Apply",
    "Effects",
    "Figures",
    "Initiator",
    "Moment",
    "Outcome",
    "Responder",
    "Send",
    "Side",
]

Buffer = bytes | memoryview

LEAF_MODE_SHARE: Final = 1 / 16
"""Above this share of differing leaves too many hold several differences, and records are cheaper."""
LEAF_MODE_RECORDS_MAX: Final = 3000
"""Above so many differing records a walk of all is worth the two thirds of the bytes that it saves."""
ANNOUNCED_RECORDS_MIN: Final = 10_000
"""A walk of fewer records takes less than the message that announces it."""
FULL_COPY_SHARE: Final = 1 / 4
FULL_COPY_RECORDS_MIN: Final = 256
"""A tablet of which fewer records differ is never worth a full copy."""
REPLY_TIMEOUT_S: Final = 30.0


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
    """What the driver does, in this order.

    ``announce``: send this and call `Initiator.announced` at once; the answer says nothing and may not come.
    """

    announce: Send | None = None
    send: Send | None = None
    apply: Apply | None = None
    outcome: Outcome | None = None


# --- the initiator ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Comparing:
    """Waits for `Equal` or `Differs`."""

    root: bytes


@dataclass(frozen=True, slots=True)
class Announcing:
    """The responder is told which table comes; the own one is made next."""

    shape: Shape


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


State = Comparing | Announcing | Sketching | Fetching | Dumping | Applying | Ended


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

    def start_with(self, items: list[Item], sequence: int) -> None:
        """Begin with what a table that many tablets share has shown to differ; the responder stood at ``sequence``."""
        with self._side.moment() as moment:
            self._base = (moment.sequence, moment.root)
            self._shown = moment.root
            self.figures.mode = "shared"
            self._fetch(moment, moment.resolve(items), sequence)

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
                    try:
                        self._close(reply, attachments)
                    except errors.QuotaExceeded:
                        self._end(Reason.TOO_LARGE, [])
                case ExchangeFull() if isinstance(state, Sketching | Fetching | Dumping):
                    self._end(_reason(reply.body), [])
                case _:
                    _out_of_place(reply)
        except errors.FrameError:
            self._state = Ended()
            raise

    def announced(self) -> None:
        """Make the table that was announced and send it; the responder makes its own at the same time."""
        state = self._state
        assert isinstance(state, Announcing), state
        with self._side.moment() as moment:
            if not self._moved(moment):
                self._send_sketch(moment, state.shape)

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
        if isinstance(self._state, Ended | Applying | Announcing):
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
        elif by_leaf and records > LEAF_MODE_RECORDS_MAX:
            by_leaf = False
            self.figures.reasons.append(f"more than {LEAF_MODE_RECORDS_MAX} records differ")
        if not by_leaf and moment.count > limits.EXCHANGE_RECORDS_MAX:
            by_leaf = True
            self.figures.reasons.append("too many records to hold their ids")
        shape = shape_for(leaves if by_leaf else wanted, self._rng.getrandbits(64), by_leaf=by_leaf)
        self.figures.sketches += 1
        self.figures.mode = "leaf" if by_leaf else "record"
        if by_leaf or moment.count < ANNOUNCED_RECORDS_MIN:
            self._send_sketch(moment, shape)
            return
        message = ExchangePrepare(self._tablet, encode_prepare(shape))
        self.figures.locating_bytes += len(message.body) + PREPARED_BYTES
        self._state = Announcing(shape)
        self._effects = Effects(announce=Send(message))

    def _send_sketch(self, moment: Moment, shape: Shape) -> None:
        cells = table_of(moment, shape).encode()
        self._state = Sketching(shape)
        self._send(ExchangeSketch(self._tablet, encode_sketch(shape, moment.rows_digest[:8], cells)))

    def _peel(self, shape: Shape, tables: Tables) -> None:
        """Peel what the responder could not, with its second table, and with the prefix if that still holds."""
        self.figures.extended += 1
        with self._side.moment() as moment:
            if self._moved(moment):
                return
            first, second = table_of(moment, shape), table_of(moment, tables.extension)
            first.subtract(tables.first)
            second.subtract(tables.second)
            together = [first, second]
            if shape.by_leaf and self._differs is not None and self._differs.sequence == tables.sequence:
                prefix = prefix_of(moment, self._shown)
                prefix.subtract(self._differs.prefix)
                together.append(prefix)
            items = moment.peel(together)
            if items is not None:
                self._fetch(moment, located_by(moment, items, by_leaf=shape.by_leaf), tables.sequence)
                return
        self.figures.reasons.append("the sketch could not be read")
        self._again()

    def _again(self) -> None:
        """Another sketch, of another kind, seed and size; after some of them the leaf digests."""
        if self._differs is None:
            # It began with what a shared table said, which was not it.
            self.start()
            return
        self._attempts += 1
        with self._side.moment() as moment:
            if self._moved(moment):
                return
            if self._attempts < limits.EXCHANGE_ATTEMPTS_MAX:
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
        if sum(len(part) for part in attachments) > 2 * limits.EXCHANGE_BYTES_MAX:
            raise errors.FrameError(f"the end of an exchange has at most {2 * limits.EXCHANGE_BYTES_MAX} bytes")
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
