"""A replica of one group that follows its leader, without I/O: ask, apply, ask again; know when one is current.

The picture::

              +-- ask --> Asking --answer: nothing / starting --> Idle --+
    Idle -----+             |                                            |
      ^                     +--answer: rows that fit --> Applying ------>+
      |                     +--answer: too much, half applied --> Copying(delta|full) -->+
      +------------------ after a pause ---- refused (diverged, foreign, unsafe source) -+

One question is open at a time. A question states the own durable position, so it acknowledges everything up to there.

*Current.* The machine remembers ``fresh_at``: when the question was asked whose answer it has since caught up with (own
sequence at or above what the leader called committed in that answer). It is SYNCED while that is at most
``STALENESS_S_MAX`` ago. Nothing else makes it SYNCED, and nothing of it is stored: after a start it is not.

Invariants, each checked by the simulation in tests/ha:

1. Only positions of the source are ever applied: a delta starts at exactly the own sequence and root, or is refused by
   the tablet.
2. The own copy is replaced (full copy) only by a source of the same lineage that stands at or past the own sequence, or
   when the own copy is empty. Otherwise the machine halts and names both (`reason`).
3. ``committed_known`` never goes back; a reader waits (`AwaitCommitted`) until it covers what was read.
4. A refusal (diverged, foreign) ends SYNCED at once.
"""

from __future__ import annotations

import enum
import heapq
from dataclasses import dataclass
from typing import assert_never

from srengine import limits
from srengine.types import Position

# --- what goes in ----------------------------------------------------------------------------------------------------


class SourceState(enum.Enum):
    """What the answer to a pull says."""

    STARTING = "starting"
    NOTHING = "nothing"
    DELTA = "delta"
    TOO_LARGE = "too_large"
    COPY = "copy"
    DIVERGED = "diverged"
    FOREIGN = "foreign"


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer to question ``number``. ``bytes_received``: of the delta that came with it."""

    number: int
    state: SourceState
    source: Position
    committed: int
    target: Position | None = None
    """Where the delta that came along ends; only with DELTA."""
    bytes_received: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """Question ``number`` got no answer."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class DeltaApplied:
    """The delta was applied durably."""

    position: Position


@dataclass(frozen=True, slots=True)
class DeltaRefused:
    """The tablet would not apply the delta (another root, damaged bytes); nothing changed."""

    reason: str
    diverged: bool = False


@dataclass(frozen=True, slots=True)
class Copied:
    """A copy over the bulk port is complete and proved; the replica stands at ``position``."""

    position: Position
    bytes_received: int


@dataclass(frozen=True, slots=True)
class CopyFailed:
    """The copy stopped; what was begun is resumed by the next one. ``position`` is the own one now."""

    reason: str
    position: Position
    filling: bool
    bytes_received: int = 0


@dataclass(frozen=True, slots=True)
class AwaitCommitted:
    """A reader met a record of version ``sequence``; released when it is known to be committed."""

    token: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Kick:
    """The leader is another process now: give the open question up and ask again."""


Input = Answered | Failed | DeltaApplied | DeltaRefused | Copied | CopyFailed | AwaitCommitted | Kick

# --- what comes out --------------------------------------------------------------------------------------------------


class Path(enum.Enum):
    """How rows came: the tail of the log while current, a delta after an absence, a full copy."""

    LOG = "log"
    DELTA = "delta"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Ask:
    """Send a pull with the own position; its answer is `Answered` or `Failed` with this number."""

    number: int
    position: Position
    filling: bool
    committed_known: int


@dataclass(frozen=True, slots=True)
class ApplyDelta:
    """Apply the delta that came with answer ``number``."""

    number: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Fetch over the bulk port: a DELTA in place, or a FULL copy into a stage that replaces the own copy once
    proved.
    """

    path: Path
    source: Position


@dataclass(frozen=True, slots=True)
class Release:
    """A reader may go on."""

    token: int


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that a person must see."""

    event: str
    message: str


@dataclass(frozen=True, slots=True)
class Effects:
    """What the service does: at most one of ``ask``, ``apply``, ``copy`` is there."""

    ask: Ask | None = None
    apply: ApplyDelta | None = None
    copy: Copy | None = None
    release: tuple[Release, ...] = ()
    alarms: tuple[Alarm, ...] = ()


# --- state -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Idle:
    """Asks at ``ask_at``."""

    ask_at: float


@dataclass(frozen=True, slots=True)
class Asking:
    """One question is open."""

    number: int
    asked_at: float


@dataclass(frozen=True, slots=True)
class Applying:
    """``asked_at`` and ``committed`` of the answer that brought the rows: what makes the replica current once
    applied.
    """

    asked_at: float
    committed: int


@dataclass(frozen=True, slots=True)
class Copying:
    """A copy over the bulk port is running."""

    path: Path


class ReplicaState(enum.Enum):
    """As docs/cli.md (State) shows it."""

    SEEDING = "SEEDING"
    SYNCING = "SYNCING"
    SYNCED = "SYNCED"
    STALE = "STALE"


@dataclass(slots=True)
class CatchUp:
    """The last catch-up, for status: how, why, how many bytes; a new one begins when the replica was not current."""

    path: Path = Path.LOG
    reason: str = ""
    bytes_received: int = 0
    running: bool = True


class FollowerMachine:
    """One replica of the journal or of a tablet; ``step``, ``tick``, ``drain``, see the module's text.

    ``filling``: the SYNCING mark stands in the tablet, so its position is none. ``created``: the tablet was made in
    this run because the directory had none (a new member, or a wiped one).
    """

    def __init__(self, *, own: Position, filling: bool, created: bool, now: float) -> None:
        self.own = own
        self.filling = filling
        self.state: Idle | Asking | Applying | Copying = Idle(now)
        self.committed_known = 0
        self.fresh_at: float | None = None
        """When the question was asked that made the replica current; None: never in this run, or refused since."""
        self.source: Position | None = None
        """The leader's position in its last answer."""
        self.halted = ""
        """Why the replica is refused or refuses; empty when it is not."""
        self.catch_up = CatchUp(reason="created" if created else "started")
        self.bytes_received_total = 0
        self._seeding = created
        self._was_synced = False
        self._now = now
        self._number = 0
        self._failures = 0
        """Questions in a row without an answer."""
        self._waits: list[tuple[int, int]] = []
        self._effects_ask: Ask | None = None
        self._effects_apply: ApplyDelta | None = None
        self._effects_copy: Copy | None = None
        self._release: list[Release] = []
        self._alarms: list[Alarm] = []

    # --- the three verbs ---------------------------------------------------------------------------------------------

    def step(self, message: Input) -> None:
        """Take one input; what does not fit the state (a late answer) is dropped."""
        match message:
            case Answered():
                if isinstance(self.state, Asking) and self.state.number == message.number:
                    self._answered(message, self.state.asked_at)
            case Failed(number, reason):
                if isinstance(self.state, Asking) and self.state.number == number:
                    self._note_lag(reason)
                    pause_s = limits.ASK_RETRY_S * 2 ** min(self._failures, limits.ASK_RETRY_DOUBLINGS_MAX)
                    self._failures += 1
                    self.state = Idle(self._now + pause_s)
            case DeltaApplied(position):
                self._delta_applied(position)
            case DeltaRefused(reason, diverged):
                self._delta_refused(reason, diverged=diverged)
            case Copied(position, bytes_received):
                self._received(bytes_received)
                self._copied(position)
            case CopyFailed(reason, position, filling, bytes_received):
                self._received(bytes_received)
                self.own, self.filling = position, filling
                self._note_lag(f"interrupted: {reason}")
                self.state = Idle(self._now + limits.HALT_RETRY_S)
            case AwaitCommitted(token, sequence):
                heapq.heappush(self._waits, (sequence, token))
                self._release_waits()
            case Kick():
                self._failures = 0
                if isinstance(self.state, Asking | Idle):
                    # A question that nobody has fetched yet is withdrawn with the state that asked it.
                    self._effects_ask = None
                    self.state = Idle(self._now)
            case _:
                assert_never(message)

    def tick(self, now: float) -> None:
        """Let time pass: asks when it is time to."""
        assert now >= self._now, (now, self._now)
        self._now = now
        if self._was_synced and not self.synced(now):
            self._was_synced = False
            self.catch_up = CatchUp(reason=f"out of contact for {limits.STALENESS_S_MAX:g} s")
        if isinstance(self.state, Idle) and now >= self.state.ask_at:
            self._number += 1
            self.state = Asking(self._number, now)
            self._effects_ask = Ask(self._number, self.own, self.filling, self.committed_known)

    def drain(self) -> Effects:
        """Return what is to be done since the last call."""
        effects = Effects(
            self._effects_ask, self._effects_apply, self._effects_copy, tuple(self._release), tuple(self._alarms)
        )
        self._effects_ask = self._effects_apply = self._effects_copy = None
        self._release, self._alarms = [], []
        return effects

    # --- for readers and status --------------------------------------------------------------------------------------

    def synced(self, now: float) -> bool:
        """Return whether a `local` read may be answered at ``now``."""
        return self.fresh_at is not None and not self.filling and now - self.fresh_at <= limits.STALENESS_S_MAX

    def replica_state(self, now: float) -> ReplicaState:
        """Return the state as status shows it."""
        if self.synced(now):
            return ReplicaState.SYNCED
        if self.halted:
            return ReplicaState.STALE
        if self._seeding:
            return ReplicaState.SEEDING
        if self.filling or isinstance(self.state, Applying | Copying):
            return ReplicaState.SYNCING
        behind = self.source is not None and self.source.sequence > self.own.sequence
        if self.fresh_at is None or behind:
            return ReplicaState.SYNCING
        return ReplicaState.STALE

    @property
    def behind(self) -> int:
        """How many sequences the leader was ahead in its last answer."""
        return max(0, self.source.sequence - self.own.sequence) if self.source is not None else 0

    @property
    def next_deadline(self) -> float | None:
        """Time of the next useful ``tick``, None while something runs."""
        return self.state.ask_at if isinstance(self.state, Idle) else None

    # --- answers -----------------------------------------------------------------------------------------------------

    def _answered(self, answer: Answered, asked_at: float) -> None:
        self.source = answer.source
        self._failures = 0
        match answer.state:
            case SourceState.STARTING:
                # It was held at the leader, so asking again at once is no busy loop; it may also have been superseded.
                self._note_lag(answer.reason or "the leader is starting")
                self.state = Idle(self._now)
            case SourceState.NOTHING:
                self._learn_committed(answer.committed)
                self._become_fresh(asked_at, answer.committed)
                self.state = Idle(self._now)
            case SourceState.DELTA:
                assert answer.target is not None, answer
                self._learn_committed(answer.committed)
                self._begin_catch_up(Path.FULL if self.own.sequence == 0 and self._seeding else Path.DELTA)
                self._received(answer.bytes_received)
                self.state = Applying(asked_at, answer.committed)
                self._effects_apply = ApplyDelta(answer.number)
            case SourceState.TOO_LARGE:
                # A delta is worth it when there is something to build on.
                self._copy(
                    Path.FULL if self.own.count == 0 else Path.DELTA, answer, "more changes than fit in an answer"
                )
            case SourceState.COPY:
                # What a delta left half applied is gone on with; without anything to build on only a full copy helps.
                path = Path.DELTA if self.filling and self.own.count else Path.FULL
                self._copy(path, answer, answer.reason or "a copy was interrupted")
            case SourceState.DIVERGED | SourceState.FOREIGN:
                self._halt(answer.reason)
            case _:
                assert_never(answer.state)

    def _copy(self, path: Path, answer: Answered, why: str) -> None:
        refusal = self._unsafe(answer.source)
        if refusal:
            self._halt(refusal)
            return
        self._begin_catch_up(path)
        self._note_lag(why)
        if self.own.sequence == 0:
            self._seeding = True
        self.fresh_at = None
        self.halted = ""
        self.state = Copying(path)
        self._effects_copy = Copy(path, answer.source)

    def _unsafe(self, source: Position) -> str:
        """Return why the own copy must not be replaced by this source, empty if it may."""
        if self.own.sequence == 0:
            return ""
        ours = f"own copy: lineage {self.own.lineage} at {self.own.sequence}"
        theirs = f"source: lineage {source.lineage} at {source.sequence}"
        if source.sequence == 0:
            return f"the source is empty ({ours}; {theirs})"
        if source.lineage != self.own.lineage:
            return f"foreign lineage ({ours}; {theirs})"
        if source.sequence < self.own.sequence:
            return f"the source is behind ({ours}; {theirs})"
        return ""

    def _halt(self, reason: str) -> None:
        if reason != self.halted:
            self._alarms.append(Alarm("replica_refused", reason))
        self.halted = reason
        self.fresh_at = None
        self._was_synced = False
        self.state = Idle(self._now + limits.HALT_RETRY_S)

    # --- rows --------------------------------------------------------------------------------------------------------

    def _delta_applied(self, position: Position) -> None:
        if not isinstance(self.state, Applying):
            return
        assert position.sequence >= self.own.sequence, (position, self.own)
        self.own = position
        applying = self.state
        self.state = Idle(self._now)
        self._become_fresh(applying.asked_at, applying.committed)

    def _delta_refused(self, reason: str, *, diverged: bool) -> None:
        if not isinstance(self.state, Applying):
            return
        if diverged:
            self._halt(reason)
        else:
            self._note_lag(reason)
            self.state = Idle(self._now + limits.HALT_RETRY_S)

    def _copied(self, position: Position) -> None:
        self.own, self.filling = position, False
        self.state = Idle(self._now)

    def _become_fresh(self, asked_at: float, committed: int) -> None:
        self.halted = ""
        if self.filling or self.own.sequence < committed:
            return
        self.fresh_at = asked_at
        self._seeding = False
        self._was_synced = True
        self.catch_up.running = False

    def _begin_catch_up(self, path: Path) -> None:
        if self._was_synced and path is Path.DELTA:
            # Rows that come while current are the tail of the log, no catch-up.
            if not self.catch_up.running and self.catch_up.reason == "":
                self.catch_up.path = Path.LOG
            return
        if not self.catch_up.running:
            self.catch_up = CatchUp(reason="behind")
        if path is Path.FULL or self.catch_up.path is not Path.FULL:
            self.catch_up.path = path

    def _received(self, count: int) -> None:
        self.bytes_received_total += count
        if self.catch_up.running:
            self.catch_up.bytes_received += count

    def _note_lag(self, reason: str) -> None:
        if self.catch_up.running and reason not in self.catch_up.reason:
            self.catch_up.reason = f"{self.catch_up.reason}; {reason}"[-500:]

    # --- readers -----------------------------------------------------------------------------------------------------

    def _learn_committed(self, committed: int) -> None:
        self.committed_known = max(self.committed_known, committed)
        self._release_waits()

    def _release_waits(self) -> None:
        while self._waits and self._waits[0][0] <= self.committed_known:
            _, token = heapq.heappop(self._waits)
            self._release.append(Release(token))
