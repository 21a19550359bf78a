"""Many tablets compared at once: which differ, and where, in two round trips whatever their number. No I/O.

    initiator                                             responder
    SharedCompare: root, count, sequence of each   ───>
                                                   <───   SharedDiffers: which; six cells and the estimator over those
    SharedSketch: how large a table                ───>   (when the six cells do not tell)
                                                   <───   SharedCells: one table over the leaves of all that differ
    for each tablet: an `Initiator` that fetches what was found there

Sums add up, so one table serves the leaves of any number of tablets: their ids are seeded by each tablet's own seed
and do not meet. A hundred tablets in which one record differs cost the six cells once, not a hundred times; records
that are spread over many tablets share one table, and its slack.

What comes out is an `Initiator` for each tablet that differs: it begins with what was found, fetches, repairs, and goes
on by itself if that does not prove out. Tablets that the table could not tell (too small, more than a sixteenth of the
leaves differ) get one that begins from the start; nothing is tried twice here.

Invariants:

* Nothing is changed and nothing is believed here: the proof is each tablet's own repair.
* Two requests at most. Work and memory are bounded by the number of tablets and by EXCHANGE_CELLS_MAX.
* One tablet is looked at after the other, in the order of their names; no two are held at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NoReturn, assert_never

from srengine import errors, limits
from srengine._native import merkle
from srengine.sync.exchange_machine import LEAF_MODE_RECORDS_MAX, LEAF_MODE_SHARE, REPLY_TIMEOUT_S, Initiator
from srengine.sync.exchange_messages import PREFIX_WAYS, PREFIX_WIDTH, Shape
from srengine.sync.exchange_shared_messages import (
    Differing,
    SharedCells,
    SharedCompare,
    SharedDiffers,
    SharedReply,
    SharedRequest,
    SharedSketch,
    decode_cells,
    decode_differing,
    decode_places,
    decode_shape,
    encode_cells,
    encode_differing,
    encode_places,
    encode_shape,
)
from srengine.sync.exchange_side import Side
from srengine.sync.exchange_sizes import estimate, leaves_with, shape_for, upper
from srengine.types import Item

if TYPE_CHECKING:
    import random

SPARE_ITEMS: Final = 4
"""A table that cannot be read sends every tablet its own long way, so it is larger than one tablet's by so many."""


@dataclass(slots=True)
class SharedFigures:
    """What the comparison cost: requests, bytes of bodies both ways, how many records the estimator saw to differ."""

    rounds: int = 0
    bytes: int = 0
    estimate: int = 0
    reasons: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SharedOutcome:
    """The end. ``equal``: tablets that stand where the authority does. ``exchanges``: one for each other tablet.

    Each of them has been started: its driver drains it next.
    """

    equal: list[str]
    exchanges: dict[str, Initiator]
    figures: SharedFigures


@dataclass(frozen=True, slots=True)
class SharedEffects:
    """What the driver does: send this and bring the answer to `SharedInitiator.step`, or take the outcome."""

    send: SharedRequest | None = None
    outcome: SharedOutcome | None = None


@dataclass(frozen=True, slots=True)
class Comparing:
    """Waits for `SharedDiffers`; ``places``: (root, count, sequence) as shown."""

    places: list[tuple[bytes, int, int]]


@dataclass(frozen=True, slots=True)
class Sketching:
    """Waits for `SharedCells` over ``tablets``.

    ``prefix``: the difference of the six cells, which still holds while ``own`` and ``theirs``, the sequences at which
    it was taken, are those of the table.
    """

    tablets: tuple[str, ...]
    shape: Shape
    prefix: merkle.Sketch
    own: list[int]
    theirs: list[int]


@dataclass(frozen=True, slots=True)
class Ended:
    """There is an outcome; nothing is taken any more."""


class SharedInitiator:
    """The side that becomes equal: `start`, then `step` with each answer, then `drain`."""

    def __init__(self, sides: Mapping[str, Side], rng: random.Random) -> None:
        if not 0 < len(sides) <= limits.EXCHANGE_TABLETS_MAX:
            raise errors.InvalidValue(f"1 to {limits.EXCHANGE_TABLETS_MAX} tablets are compared, not {len(sides)}")
        self._sides = sides
        self._tablets = tuple(sorted(sides))
        self._rng = rng
        self._state: Comparing | Sketching | Ended = Ended()
        self._effects = SharedEffects()
        self._equal: list[str] = []
        self._sent_at: float | None = None
        self.figures = SharedFigures()

    def start(self) -> None:
        """Begin: say where all tablets stand."""
        places = [self._sides[tablet].place for tablet in self._tablets]
        self._state = Comparing(places)
        self._send(SharedCompare(self._tablets, encode_places(places)))

    def step(self, reply: SharedReply) -> None:
        """Take an answer. Raises `FrameError` for one that is malformed or out of place; that is the end of it."""
        self._sent_at = None
        self.figures.bytes += len(reply.body)
        state, self._state = self._state, Ended()
        match reply:
            case SharedDiffers() if isinstance(state, Comparing):
                self._choose(state, decode_differing(reply.body, len(self._tablets)))
            case SharedCells() if isinstance(state, Sketching):
                self._peel(state, *decode_cells(reply.body, len(state.tablets), state.shape))
            case _:
                _out_of_place(reply)

    def tick(self, now: float) -> None:
        """Take the time, seconds on any clock that rises. Raises `TimedOut` when an answer is overdue."""
        if isinstance(self._state, Ended):
            return
        if self._sent_at is None:
            self._sent_at = now
        elif now - self._sent_at > REPLY_TIMEOUT_S:
            self._state = Ended()
            raise errors.TimedOut(f"a comparison of {len(self._tablets)} tablets got no answer in {REPLY_TIMEOUT_S} s")

    def drain(self) -> SharedEffects:
        """Return what is to be done, once."""
        effects, self._effects = self._effects, SharedEffects()
        return effects

    # --- decisions ---------------------------------------------------------------------------------------------------

    def _choose(self, state: Comparing, differing: Differing) -> None:
        """Take the prefix if it tells, else ask for a table of the size that the estimator says."""
        tablets = tuple(self._tablets[at] for at, _ in differing.tablets)
        self._equal = [tablet for tablet in self._tablets if tablet not in set(tablets)]
        if not tablets:
            self._end({})
            return
        shown = state.places[differing.tablets[0][0]][0]
        prefix, buckets, leaf_count, own = _summed(self._sides, tablets, shown)
        prefix.subtract(differing.prefix)
        items = merkle.peel([prefix])
        theirs = [sequence for _, sequence in differing.tablets]
        if items is not None:
            self._end(self._located(tablets, theirs, items))
            return
        records = estimate(buckets, differing.estimator)
        self.figures.estimate = int(records)
        if leaves_with(records, leaf_count) > leaf_count * LEAF_MODE_SHARE or records > LEAF_MODE_RECORDS_MAX:
            self.figures.reasons.append("too much differs for one table over leaves")
            self._end(self._from_start(tablets))
            return
        items_max = leaves_with(upper(records), leaf_count) + SPARE_ITEMS
        shape = shape_for(items_max, self._rng.getrandbits(64), by_leaf=True)
        self._state = Sketching(tablets, shape, prefix, own, theirs)
        self._send(SharedSketch(tablets, encode_shape(shape)))

    def _peel(self, state: Sketching, sequences: list[int], cells: bytes) -> None:
        table, own = _table_of(self._sides, state.tablets, state.shape)
        table.subtract(cells)
        still = (own, sequences) == (state.own, state.theirs)
        items = merkle.peel([table, state.prefix] if still else [table])
        if items is None:
            self.figures.reasons.append("the sketch could not be read")
            self._end(self._from_start(state.tablets))
        else:
            self._end(self._located(state.tablets, sequences, items))

    def _located(self, tablets: tuple[str, ...], sequences: list[int], items: list[Item]) -> dict[str, Initiator]:
        """Return an exchange for each tablet that begins with what was found there.

        A leaf that no tablet has here begins with a boundary key that only the responder has: which tablet's, the
        answers will say, so all of them ask.
        """
        everywhere = {item[0] for item in items}
        here: dict[str, set[int]] = {}
        for tablet in tablets:
            with self._sides[tablet].moment() as moment:
                here[tablet] = moment.own_leaves(items)
                everywhere -= here[tablet]
        exchanges = {}
        for tablet, sequence in zip(tablets, sequences, strict=True):
            exchanges[tablet] = exchange = self._exchange(tablet)
            mine = [item for item in items if item[0] in here[tablet] or item[0] in everywhere]
            exchange.start_with(mine, sequence)
        return exchanges

    def _from_start(self, tablets: tuple[str, ...]) -> dict[str, Initiator]:
        exchanges = {}
        for tablet in tablets:
            exchanges[tablet] = self._exchange(tablet)
            exchanges[tablet].start()
        return exchanges

    def _exchange(self, tablet: str) -> Initiator:
        return Initiator(tablet, self._sides[tablet], self._rng)

    # --- effects -----------------------------------------------------------------------------------------------------

    def _send(self, message: SharedRequest) -> None:
        self.figures.rounds += 1
        self.figures.bytes += len(message.body)
        self._effects = SharedEffects(send=message)

    def _end(self, exchanges: dict[str, Initiator]) -> None:
        self._state = Ended()
        self._effects = SharedEffects(outcome=SharedOutcome(self._equal, exchanges, self.figures))


class SharedResponder:
    """The authority's side: one answer for each request, nothing kept in between."""

    def __init__(self, sides: Mapping[str, Side]) -> None:
        self._sides = sides

    def step(self, request: SharedRequest) -> SharedReply:
        """Return the answer. Raises `FrameError` for a malformed request, `NotFound` for a tablet that is not here."""
        match request:
            case SharedCompare():
                return self._compare(request)
            case SharedSketch():
                shape = decode_shape(request)
                self._check(request.tablets)
                table, sequences = _table_of(self._sides, request.tablets, shape)
                return SharedCells(encode_cells(sequences, table.encode()))
            case _:
                assert_never(request)

    def _check(self, tablets: tuple[str, ...]) -> None:
        for tablet in tablets:
            if tablet not in self._sides:
                raise errors.NotFound(f"there is no tablet {tablet} here", tablet=tablet)

    def _compare(self, request: SharedCompare) -> SharedReply:
        places = decode_places(request)
        self._check(request.tablets)
        differing = [at for at, tablet in enumerate(request.tablets) if not self._sides[tablet].stands_at(places[at])]
        if not differing:
            return SharedDiffers(encode_differing(Differing([], b"", b"")))
        tablets = tuple(request.tablets[at] for at in differing)
        prefix, buckets, _, sequences = _summed(self._sides, tablets, places[differing[0]][:16])
        found = list(zip(differing, sequences, strict=True))
        return SharedDiffers(encode_differing(Differing(found, prefix.encode(), buckets)))


def _summed(
    sides: Mapping[str, Side], tablets: tuple[str, ...], root: bytes
) -> tuple[merkle.Sketch, bytes, int, list[int]]:
    """Return prefix, estimator, number of leaves and sequences of tablets; ``root`` of the first seeds the prefix."""
    prefix = merkle.Sketch(PREFIX_WIDTH, int.from_bytes(root[:8], "little"), by_leaf=True, ways=PREFIX_WAYS)
    buckets = bytearray(merkle.ESTIMATOR_BYTES)
    leaf_count, sequences = 0, []
    for tablet in tablets:
        with sides[tablet].moment() as moment:
            moment.fill(prefix)
            for at, bucket in enumerate(moment.estimator):
                buckets[at] = (buckets[at] + bucket) & 0xFF
            leaf_count += moment.leaf_count
            sequences.append(moment.sequence)
    return prefix, bytes(buckets), leaf_count, sequences


def _table_of(sides: Mapping[str, Side], tablets: tuple[str, ...], shape: Shape) -> tuple[merkle.Sketch, list[int]]:
    """Return a table over the leaves of tablets, and the sequence at which each was added."""
    table = merkle.Sketch(shape.width, shape.seed, by_leaf=True, ways=shape.ways)
    sequences = []
    for tablet in tablets:
        with sides[tablet].moment() as moment:
            moment.fill(table)
            sequences.append(moment.sequence)
    return table, sequences


def _out_of_place(reply: SharedReply) -> NoReturn:
    raise errors.FrameError(f"{type(reply).__name__} is no answer to what was asked")
