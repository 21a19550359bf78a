"""A replica of one group that follows its leader, without I/O: ask, apply, ask again; know when one is current.

The picture::

              +-- ask --> Asking --answer: nothing / starting --> Idle --+
    Idle -----+             |                                            |
      ^                     +--answer: rows that fit --> Applying ------>+
      |                     +--answer: too much, half applied --> Copying(delta|full) -->+
      |                     +--answer: repair, below the mark --> Copying(sketch) ------>+
      |                     +--answer: diverged; rows do not fit --> Proving ----------->+
      +------------------ after a pause ---- refused (diverged, foreign, unsafe source) -+

One question is open at a time. A question states the own durable position, so it acknowledges everything up to there.

*Current.* The machine remembers ``fresh_at``: when the question was asked whose answer it has since caught up with (own
sequence at or above what the leader called committed in that answer). It is SYNCED while that is at most
``STALENESS_S_MAX`` ago. Nothing else makes it SYNCED, and nothing of it is stored: after a start it is not.

*Doubt.* A root that the leader does not share, rows that do not reach their root, or damage that a scrub found makes
the replica prove itself (`srengine.ha.proof`): it recounts its records and says with every further question what came
out. The leader decides; `repair` tells this replica to become equal by an exchange. Until then nothing of it is
deleted.

Invariants, each checked by the simulation in tests/ha:

1. Only positions of the source are ever applied: a delta starts at exactly the own sequence and root, or is refused by
   the tablet.
2. The own copy is replaced (full copy) or repaired (exchange) only by a source of the same lineage that stands at or
   past the own sequence, or when the own copy is empty. Otherwise the machine halts and names both (`reason`).
3. ``committed_known`` never goes back; a reader waits (`AwaitCommitted`) until it covers what was read.
4. A refusal (diverged, foreign) and doubt end SYNCED at once.
"""

from __future__ import annotations

import enum
import heapq
from dataclasses import dataclass
from typing import assert_never

from srengine import limits
from srengine.ha.proof import Check
from srengine.types import Position


class Path(enum.Enum):
    """How rows came: the tail of the log while current, a delta after an absence, an exchange (sketches, or leaf
    digests after all sketches), a full copy.
    """

    LOG = "log"
    DELTA = "delta"
    SKETCH = "sketch"
    LEAVES = "leaves"
    FULL = "full"


# --- what goes in ----------------------------------------------------------------------------------------------------


class SourceState(enum.Enum):
    """What the answer to a pull says."""

    STARTING = "starting"
    NOTHING = "nothing"
    DELTA = "delta"
    TOO_LARGE = "too_large"
    COPY = "copy"
    EXCHANGE = "exchange"
    """The change log does not go back that far; what differs is found by an exchange."""
    REPAIR = "repair"
    """The leader has decided that this copy is the wrong one."""
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
class Damaged:
    """A scrub or a read found that the records are not what they were; nothing the leader said."""

    reason: str


@dataclass(frozen=True, slots=True)
class Proved:
    """The records were added up: ``whole`` when they give the root that the copy carries at ``position``."""

    position: Position
    whole: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Copied:
    """A copy or an exchange is complete and proved; the replica stands at ``position``. ``path``: how it went in the
    end, None: as was asked for.
    """

    position: Position
    bytes_received: int
    path: Path | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CopyFailed:
    """The copy stopped; what was begun is resumed by the next one. ``position`` is the own one now. ``unproven``: an
    exchange did not reach the root it was promised, so one of the two copies is not what it says.
    """

    reason: str
    position: Position
    filling: bool
    bytes_received: int = 0
    unproven: bool = False


@dataclass(frozen=True, slots=True)
class AwaitCommitted:
    """A reader met a record of version ``sequence``; released when it is known to be committed."""

    token: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Kick:
    """The leader is another process now: give the open question up and ask again."""


Input = Answered | Failed | DeltaApplied | DeltaRefused | Copied | CopyFailed | AwaitCommitted | Kick | Damaged | Proved

# --- what comes out --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ask:
    """Send a pull with the own position; its answer is `Answered` or `Failed` with this number."""

    number: int
    position: Position
    filling: bool
    committed_known: int
    check: Check = Check.NONE


@dataclass(frozen=True, slots=True)
class ApplyDelta:
    """Apply the delta that came with answer ``number``."""

    number: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Fetch over the bulk port: a DELTA in place, or a FULL copy into a stage that replaces the own copy once
    proved; or SKETCH: become equal by an exchange. ``recount``: the records do not give the carried root.
    """

    path: Path
    source: Position
    recount: bool = False


@dataclass(frozen=True, slots=True)
class Prove:
    """Add the records up and report by `Proved`."""


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
    """What the service does: at most one of ``ask``, ``apply``, ``copy``, ``prove`` is there."""

    ask: Ask | None = None
    apply: ApplyDelta | None = None
    copy: Copy | None = None
    prove: Prove | None = None
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
    """A copy over the bulk port, or an exchange, is running."""

    path: Path


@dataclass(frozen=True, slots=True)
class Proving:
    """The records are being added up."""


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
    this run because the directory had none (a new member, or a wiped one). ``provable``: the group can add its records
    up and exchange (a tablet); the journal cannot, and halts where a tablet would prove itself.
    """

    def __init__(self, *, own: Position, filling: bool, created: bool, now: float, provable: bool = False) -> None:
        self.own = own
        self.filling = filling
        self.state: Idle | Asking | Applying | Copying | Proving = Idle(now)
        self.check = Check.NONE
        """What the own proof said; holds for ``own`` alone and is forgotten when that changes."""
        self.doubt = ""
        """Why the copy has to be proved next; empty: nothing is doubted, or the proof was made."""
        self._checked_at = now
        """When ``check`` was made; WHOLE is tried anew after a while, for the leader's copy may be another one then."""
        self._disputed = False
        """Whether it was the leader's word or rows that did not fit; else a scrub's finding."""
        self.committed_known = 0
        self.fresh_at: float | None = None
        """When the question was asked that made the replica current; None: never in this run, or refused since."""
        self.source: Position | None = None
        """The leader's position in its last answer."""
        self.halted = ""
        """Why the replica is refused or refuses; empty when it is not."""
        self.catch_up = CatchUp(reason="created" if created else "started")
        self.bytes_received_total = 0
        self._provable = provable
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
        self._effects_prove: Prove | None = None
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
                    self._unanswered(reason)
            case DeltaApplied(position):
                self._delta_applied(position)
            case DeltaRefused(reason, diverged):
                self._delta_refused(reason, diverged=diverged)
            case Copied():
                self._received(message.bytes_received)
                self._copied(message)
            case CopyFailed():
                self._copy_failed(message)
            case AwaitCommitted(token, sequence):
                heapq.heappush(self._waits, (sequence, token))
                self._release_waits()
            case Kick():
                self._kicked()
            case Damaged(reason):
                self._doubted(reason, disputed=False)
            case Proved(position, whole, reason):
                if isinstance(self.state, Proving):
                    self._proved(position, reason, whole=whole)
            case _:
                assert_never(message)

    def tick(self, now: float) -> None:
        """Let time pass: asks when it is time to."""
        assert now >= self._now, (now, self._now)
        self._now = now
        if self._was_synced and not self.synced(now):
            self._was_synced = False
            self.catch_up = CatchUp(reason=f"out of contact for {limits.STALENESS_S_MAX:g} s")
        if isinstance(self.state, Idle) and self.doubt and not self.filling:
            self.state = Proving()
            self._effects_prove = Prove()
        elif isinstance(self.state, Idle) and now >= self.state.ask_at:
            if self.check is Check.WHOLE and now - self._checked_at > limits.CHECK_KEPT_S:
                self.check = Check.NONE
            self._number += 1
            self.state = Asking(self._number, now)
            self._effects_ask = Ask(self._number, self.own, self.filling, self.committed_known, self.check)

    def drain(self) -> Effects:
        """Return what is to be done since the last call."""
        effects = Effects(
            self._effects_ask,
            self._effects_apply,
            self._effects_copy,
            self._effects_prove,
            tuple(self._release),
            tuple(self._alarms),
        )
        self._effects_ask = self._effects_apply = self._effects_copy = self._effects_prove = None
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
        if not isinstance(self.state, Idle):
            return None
        return self._now if self.doubt and not self.filling else self.state.ask_at

    def _kicked(self) -> None:
        self._failures = 0
        if isinstance(self.state, Asking | Idle):
            # A question that nobody has fetched yet is withdrawn with the state that asked it.
            self._effects_ask = None
            self.state = Idle(self._now)

    def _unanswered(self, reason: str) -> None:
        self._note_lag(reason)
        pause_s = limits.ASK_RETRY_S * 2 ** min(self._failures, limits.ASK_RETRY_DOUBLINGS_MAX)
        self._failures += 1
        self.state = Idle(self._now + pause_s)

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
            case SourceState.EXCHANGE:
                path = Path.SKETCH if self._provable and self.own.count and not self.filling else Path.FULL
                self._copy(path, answer, answer.reason)
            case SourceState.REPAIR:
                self._copy(
                    Path.FULL if self.filling else Path.SKETCH,
                    answer,
                    answer.reason,
                    recount=self.check is Check.DAMAGED,
                )
            case SourceState.DIVERGED:
                self._halt(answer.reason)
                if self.check is Check.NONE:
                    self._doubted(answer.reason, disputed=True)
            case SourceState.FOREIGN:
                self._halt(answer.reason)
            case _:
                assert_never(answer.state)

    # --- doubt -------------------------------------------------------------------------------------------------------

    def _doubted(self, reason: str, *, disputed: bool) -> None:
        """Have the copy proved as soon as nothing runs; it is not current until that and what follows is over."""
        if not self._provable:
            return
        self._disputed = self._disputed or disputed
        if self.doubt:
            return
        self.doubt = reason
        self._refuse(reason)

    def _proved(self, position: Position, reason: str, *, whole: bool) -> None:
        self._stand_at(position)
        doubt, self.doubt = self.doubt, ""
        disputed, self._disputed = self._disputed, False
        self.check = Check.DAMAGED if not whole else Check.WHOLE if disputed else Check.NONE
        self._checked_at = self._now
        if self.check is Check.NONE:
            # What was found was replaced or healed meanwhile.
            self.halted = ""
        if not whole:
            self.catch_up = CatchUp(reason=f"damaged: {reason}")
            self._alarms.append(Alarm("replica_damaged", f"{reason}; found because of: {doubt}"))
            self.halted = f"damaged: {reason}"
        self.state = Idle(self._now)

    def _stand_at(self, position: Position) -> None:
        if position != self.own:
            self.own = position
            self.check = Check.NONE

    def _copy(self, path: Path, answer: Answered, why: str, *, recount: bool = False) -> None:
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
        self._effects_copy = Copy(path, answer.source, recount)

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

    def _refuse(self, reason: str) -> None:
        """Stop being current, and say why; what runs goes on."""
        if reason != self.halted:
            self._alarms.append(Alarm("replica_refused", reason))
        self.halted = reason
        self.fresh_at = None
        self._was_synced = False

    def _halt(self, reason: str) -> None:
        self._refuse(reason)
        self.state = Idle(self._now + limits.HALT_RETRY_S)

    # --- rows --------------------------------------------------------------------------------------------------------

    def _delta_applied(self, position: Position) -> None:
        if not isinstance(self.state, Applying):
            return
        assert position.sequence >= self.own.sequence, (position, self.own)
        self._stand_at(position)
        applying = self.state
        self.state = Idle(self._now)
        self._become_fresh(applying.asked_at, applying.committed)

    def _delta_refused(self, reason: str, *, diverged: bool) -> None:
        if not isinstance(self.state, Applying):
            return
        if diverged:
            self._halt(reason)
            self._doubted(reason, disputed=True)
        else:
            self._note_lag(reason)
            self.state = Idle(self._now + limits.HALT_RETRY_S)

    def _copied(self, copied: Copied) -> None:
        self._stand_at(copied.position)
        self.filling, self.check = False, Check.NONE
        if isinstance(self.state, Copying) and self.state.path is Path.FULL:
            # Nothing of what was doubted is left. What was doubted during an exchange still has to be proved.
            self.doubt, self._disputed = "", False
        if not self.doubt:
            self.halted = ""
        if copied.path is not None:
            self.catch_up.path = copied.path
        if copied.reason:
            self._note_lag(copied.reason)
        self.state = Idle(self._now)

    def _copy_failed(self, failed: CopyFailed) -> None:
        self._received(failed.bytes_received)
        self._stand_at(failed.position)
        self.filling = failed.filling
        self._note_lag(f"interrupted: {failed.reason}")
        self.state = Idle(self._now + limits.HALT_RETRY_S)
        if failed.unproven:
            self._doubted(failed.reason, disputed=True)

    def _become_fresh(self, asked_at: float, committed: int) -> None:
        if self.doubt or self.check is Check.DAMAGED:
            return
        self.halted = ""
        self.check = Check.NONE
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
            self.catch_up = CatchUp(reason="repair" if path is Path.SKETCH else "behind")
        if path is not Path.DELTA or self.catch_up.path is not Path.FULL:
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
