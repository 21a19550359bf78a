"""The leader of one group (the journal, or a tablet), without I/O: who holds what, what is therefore durable, who gets
which answer.

The picture::

    writes -> [service: tablet.apply] --Applied--> +---------+ --Release--> answers to writers and readers
                                                   | leader  |
    replica --Pulled(claim)----------------------> | machine | --Answer---> to the pull: rows, nothing, wait, refused
                                                   +---------+ --Recover--> service: fetch from that replica

A replica *pulls*: it states what it has durably applied (its claim: lineage, sequence, root, count) and asks for what
comes after. So a pull is an acknowledgement and a question at once; it is held until there is something new or the hold
time ends.

States::

    Starting --knows enough, nobody is ahead--> Serving
    Starting --knows enough, somebody is ahead--> Recovering(source) --Recovered--> Serving
    Recovering --RecoveryFailed--> Starting
    Serving --own records damaged, or a disagreement that is not outvoted--> Doubting
    Doubting --proved whole, and a majority agrees--> Serving
    Doubting --damaged or outvoted, and a replica to repair from--> Doubting(source) --Repaired--> Serving

Invariants, each checked by the simulation in tests/ha:

1. ``committed`` never goes back, and at least a majority of the replicas, this one included, holds it durably.
2. A replica counts only for what its root proves: ``held`` is set when its root equals ours at that sequence. A pull
   whose sequence left the ring of roots proves nothing and counts nothing until the next one.
3. A replica that shows a lower sequence than before counts from the lower one at once, and an alarm names it.
4. Nothing is released above ``committed`` (for `all`: above what every replica holds).
5. Nothing is served in Starting, Recovering and Doubting.
6. A replica with another root at the same sequence, or ahead of a leader that serves, is *diverged*: named by an alarm
   and in the status, it counts for nothing and gets no rows.
7. A diverged replica is told to repair itself only when the own copy was proved whole, the replica has proved itself,
   and it is damaged, or outvoted by a majority that agrees with the own root. One that is ahead waits until the leader
   has passed it.
8. The own copy is repaired only when it was proved damaged, from a replica that holds everything that may be
   acknowledged: it is proved to stand at or past ``committed`` and ``served_from``, or it is the highest of enough
   others whose disks are what they were; or when a majority agrees on another root at its own sequence.

*Disagreement* (`srengine.ha.proof`). A replica whose root differs, or that says that the rows which follow its position
do not reach our root, makes both sides prove themselves. A copy of ours that is damaged may lie ahead of all whole ones
by what was never acknowledged; then it goes back to the best of those, and who waited for more is not released.

What it does not do: elect (the first member leads), fence another leader (there is none), or decide how rows travel
(the service asks the tablet whether they fit into an answer).
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import assert_never

from srengine import limits
from srengine.ha import quorum
from srengine.ha.proof import Check
from srengine.types import Position

# --- what goes in ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claim:
    """What a replica says about its own copy, all of it durable."""

    position: Position
    trusted: bool = True
    """The disk is what it was when the node last ran; False after a wipe or a restore, until the copy was proved
    again.
    """
    filling: bool = False
    """A copy is half applied: ``position`` is the one that it began from; the replica cannot be a source."""
    committed_known: int = 0
    """The highest committed sequence that the replica was told."""
    check: Check = Check.NONE
    """What came out when the replica proved itself at this position; it did so because something did not fit."""

    @property
    def empty(self) -> bool:
        """Whether nothing was ever applied to the copy."""
        return self.position.sequence == 0


@dataclass(frozen=True, slots=True)
class Pulled:
    """A replica asks for what comes after its claim; answered once by an `Answer` with the same token."""

    replica: str
    claim: Claim
    token: int


@dataclass(frozen=True, slots=True)
class Applied:
    """The own copy stands at ``position``, durably."""

    position: Position


class Need(enum.Enum):
    """Who must hold a sequence before an answer may leave."""

    QUORUM = "quorum"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Await:
    """An answer waits until ``sequence`` is held as ``need`` says; released once by a `Release` with the same token."""

    token: int
    sequence: int
    need: Need = Need.QUORUM


@dataclass(frozen=True, slots=True)
class Forget:
    """The waiting answer or held pull behind the token is not wanted any more."""

    token: int


@dataclass(frozen=True, slots=True)
class Recovered:
    """The own copy was brought to ``position`` from the source that `Recover` named; it is proved."""

    position: Position


@dataclass(frozen=True, slots=True)
class RecoveryFailed:
    """The source could not be copied from; start asking again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Distrusted:
    """A peer has seen a later run of this node: the own disk was put back to an older state."""

    reason: str


@dataclass(frozen=True, slots=True)
class Damaged:
    """A scrub found that the own records do not give the root that the copy carries."""

    reason: str


@dataclass(frozen=True, slots=True)
class Proved:
    """The own records were added up: ``whole`` when they give the root that the copy carries."""

    whole: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Repaired:
    """The own copy was made equal to the replica that `Repair` named, proved by its root."""

    position: Position


@dataclass(frozen=True, slots=True)
class RepairFailed:
    """It was not; nothing changed."""

    reason: str


Input = (
    Pulled
    | Applied
    | Await
    | Forget
    | Recovered
    | RecoveryFailed
    | Distrusted
    | Damaged
    | Proved
    | Repaired
    | RepairFailed
)

# --- what comes out --------------------------------------------------------------------------------------------------


class AnswerKind(enum.Enum):
    """What a pull is answered with."""

    STARTING = "starting"
    """The leader does not serve yet; ask again."""
    NOTHING = "nothing"
    """The replica has everything; a new committed sequence may have come."""
    ROWS = "rows"
    """There is more: what changed since the claim's sequence, or the advice to copy when that is too large."""
    COPY = "copy"
    """Only a full copy helps: half applied."""
    REPAIR = "repair"
    """The replica is the wrong one: let it become equal to the leader by an exchange."""
    DIVERGED = "diverged"
    """The same history would have another root, or the replica is ahead: refused, and somebody must look."""
    FOREIGN = "foreign"
    """The replica has data of another lineage: refused."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to the pull with this token. ``committed`` and ``leader`` as of now; ``reason`` for a refusal."""

    token: int
    kind: AnswerKind
    committed: int
    leader: Position
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Release:
    """The answer that waited under this token may leave."""

    token: int


@dataclass(frozen=True, slots=True)
class Recover:
    """Fetch from ``replica`` until the own copy stands at ``target`` at least."""

    replica: str
    target: Position


@dataclass(frozen=True, slots=True)
class Prove:
    """Add the own records up and report by `Proved`."""


@dataclass(frozen=True, slots=True)
class Repair:
    """Become equal to ``replica``, which stands at ``target``, by an exchange; report `Repaired` or `RepairFailed`.

    ``recount``: the own records do not give the carried root.
    """

    replica: str
    target: Position
    recount: bool


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that a person must see: goes to the log and the status."""

    event: str
    replica: str
    message: str


@dataclass(frozen=True, slots=True)
class Effects:
    """What the service does, in this order: persist (nothing here), send answers, release, act."""

    send: tuple[Answer, ...] = ()
    release: tuple[Release, ...] = ()
    recover: Recover | None = None
    prove: Prove | None = None
    repair: Repair | None = None
    alarms: tuple[Alarm, ...] = ()


# --- state -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Progress:
    """What the leader knows of one replica while it serves."""

    claim: Claim | None = None
    """The last claim; None: not heard since the start."""
    held: int = 0
    """Sequence that the replica holds durably, proved by its root; ``0 <= held <= own sequence``."""
    highest: int = 0
    """Highest sequence ever claimed in this run; a lower claim later is an alarm."""
    fault: str = ""
    """Why it counts for nothing (diverged, foreign), empty when all is well."""


@dataclass(slots=True)
class Starting:
    """Collecting positions."""

    told: dict[str, Claim] = field(default_factory=dict)
    grace_until: float | None = None
    """Set when enough is known: how long to wait for the rest."""
    failed: str = ""
    """Why the last recovery failed."""


@dataclass(slots=True)
class Recovering:
    """Fetching from the replica that is furthest ahead."""

    source: str
    target: Position


@dataclass(slots=True)
class Serving:
    """The normal state."""


@dataclass(slots=True)
class Doubting:
    """The own copy is not known to be right: nothing is served."""

    why: str
    source: str = ""
    """The replica that the own copy is being repaired from; empty: none is."""
    failed: str = ""
    """Why the last repair failed."""
    retry_at: float | None = None
    """When the next repair may begin; None: at once."""
    named: bool = False
    """Whether the alarm about two histories was raised."""
    back_at: float | None = None
    """Until when a replica that is behind may come up before a damaged copy goes back to it; None: not damaged."""
    avoid: str = ""
    """The replica from which the last repair failed; another one is tried first."""


class LeaderMachine:
    """One group's leader. ``step``, ``tick``, ``drain``; see the module's text.

    ``others``: names of the other replicas. ``own``: the own durable position, ``own_trusted``: whether the disk is
    what it was. ``root_at(sequence)``: the own root after that sequence, None when it left the ring; a pure function of
    the tablet. ``provable``: the group can add its records up and exchange (a tablet); the journal cannot, so there a
    diverged replica is only named.
    """

    def __init__(
        self,
        *,
        name: str,
        others: Sequence[str],
        own: Position,
        own_trusted: bool,
        own_whole: bool = True,
        root_at: Callable[[int], bytes | None],
        now: float,
        provable: bool = False,
    ) -> None:
        assert name not in others, (name, others)
        self.name = name
        self.others = tuple(sorted(others))
        self.own = own
        self.own_trusted = own_trusted
        self.own_whole = own_whole
        """False: the own copy does not open or is half applied; nothing is served before it was replaced."""
        self.committed = 0
        self.served_from = 0
        """The own sequence when serving began: what stands up to it may be acknowledged, whatever `committed` says."""
        self.state: Starting | Recovering | Serving | Doubting = Starting()
        self.check = Check.NONE
        """What the own proof said; forgotten when nothing disagrees any more."""
        self.progress: dict[str, Progress] = {other: Progress() for other in self.others}
        self._root_at = root_at
        self._provable = provable
        self._proving = False
        self._now = now
        self._held_pulls: dict[str, tuple[Pulled, float]] = {}
        self._quorum_waits: list[tuple[int, int]] = []
        self._all_waits: list[tuple[int, int]] = []
        self._waiting: set[int] = set()
        self._send: list[Answer] = []
        self._release: list[Release] = []
        self._recover: Recover | None = None
        self._prove: Prove | None = None
        self._repair: Repair | None = None
        self._alarms: list[Alarm] = []
        self._maybe_leave_start()

    # --- the three verbs ---------------------------------------------------------------------------------------------

    def step(self, message: Input) -> None:
        """Take one input."""
        match message:
            case Pulled():
                self._pulled(message)
            case Applied(position):
                self._applied(position)
            case Await():
                self._await(message)
            case Forget(token):
                self._forget(token)
            case Recovered(position):
                self._recovered(position)
            case RecoveryFailed(reason):
                if isinstance(self.state, Recovering):
                    self.state = Starting(failed=reason)
            case Distrusted(reason):
                self._distrusted(reason)
            case Damaged(reason):
                self._own_damaged(reason)
            case Proved(whole, reason):
                self._proved(reason, whole=whole)
            case Repaired() | RepairFailed():
                self._repair_over(message)
            case _:
                assert_never(message)

    def tick(self, now: float) -> None:
        """Let time pass: answers held pulls whose time is up, ends the grace of the start."""
        assert now >= self._now, (now, self._now)
        self._now = now
        for replica in sorted(self._held_pulls):
            pull, deadline = self._held_pulls[replica]
            if now >= deadline:
                del self._held_pulls[replica]
                kind = AnswerKind.NOTHING if isinstance(self.state, Serving | Doubting) else AnswerKind.STARTING
                self._answer(pull, kind)
        if isinstance(self.state, Starting):
            self._maybe_leave_start()
        if isinstance(self.state, Doubting):
            if self.state.retry_at is not None and now >= self.state.retry_at:
                self.state.retry_at = None
                self._decide()
            elif self.state.back_at is not None and now >= self.state.back_at and not self.state.source:
                self._decide()

    def drain(self) -> Effects:
        """Return what is to be done since the last call."""
        effects = Effects(
            tuple(self._send), tuple(self._release), self._recover, self._prove, self._repair, tuple(self._alarms)
        )
        self._send, self._release, self._alarms = [], [], []
        self._recover = self._prove = self._repair = None
        return effects

    # --- for status --------------------------------------------------------------------------------------------------

    @property
    def serving(self) -> bool:
        """Whether reads and writes are answered."""
        return isinstance(self.state, Serving)

    @property
    def may_ship(self) -> bool:
        """Whether copies may be made from the own copy: it serves, or it was proved whole and only waits for votes."""
        return self.serving or (isinstance(self.state, Doubting) and self.check is Check.WHOLE)

    @property
    def next_deadline(self) -> float | None:
        """Time of the next useful ``tick``, None when there is none."""
        times = [deadline for _, deadline in self._held_pulls.values()]
        if isinstance(self.state, Starting) and self.state.grace_until is not None:
            times.append(self.state.grace_until)
        if isinstance(self.state, Doubting):
            times += [
                time for time in (self.state.retry_at, self.state.back_at) if time is not None and time > self._now
            ]
        return min(times, default=None)

    @property
    def held_by_all(self) -> int:
        """The sequence that every replica is proved to hold."""
        return min([self.own.sequence, *(self.progress[other].held for other in self.others)])

    def why_not_serving(self) -> str:
        """Return one sentence for `NotReady`."""
        match self.state:
            case Serving():
                return ""
            case Doubting(why, source, failed):
                doing = f"; it is being repaired from {source}" if source else f"; {failed}" if failed else ""
                return f"the leader's copy is in doubt: {why}{doing}"
            case Recovering(source, target):
                return f"the leader fetches what it lacks from {source} (to sequence {target.sequence})"
            case Starting(told=told, failed=failed):
                missing = [other for other in self.others if other not in told]
                waits = (
                    f"the leader waits for positions of {', '.join(missing)}" if missing else "the leader cannot start"
                )
                own = "" if self.own_trusted else "; its own copy was wiped or restored and does not count"
                why = f"; {failed}" if failed else ""
                return f"{waits}{own}{why}"

    # --- pulls -------------------------------------------------------------------------------------------------------

    def _pulled(self, pull: Pulled) -> None:
        if pull.replica not in self.progress:
            self._answer(pull, AnswerKind.FOREIGN, f"{pull.replica} is no replica of this tablet")
            return
        before = self._held_pulls.pop(pull.replica, None)
        if before is not None:
            # The replica asks anew, so it gave the older question up.
            self._answer(before[0], AnswerKind.STARTING, "superseded")
        match self.state:
            case Starting(told=told):
                self.progress[pull.replica].claim = pull.claim
                told[pull.replica] = pull.claim
                self._hold(pull)
                self._maybe_leave_start()
            case Recovering():
                self.progress[pull.replica].claim = pull.claim
                self._hold(pull)
            case Serving() | Doubting():
                self._count(pull.replica, pull.claim)
                self._advance()
                self._decide()
                self._maybe_answer(pull)

    def _hold(self, pull: Pulled) -> None:
        self._held_pulls[pull.replica] = (pull, self._now + limits.PULL_HOLD_S)

    def _answer(self, pull: Pulled, kind: AnswerKind, reason: str = "") -> None:
        self._send.append(Answer(pull.token, kind, self.committed, self.own, reason))

    def _maybe_answer(self, pull: Pulled) -> bool:
        """Answer a pull if there is something to say, else hold it. Its claim was counted already."""
        claim, position = pull.claim, pull.claim.position
        progress = self.progress[pull.replica]
        if progress.fault.startswith("foreign"):
            self._answer(pull, AnswerKind.FOREIGN, progress.fault)
        elif self._wrong(pull.replica):
            damaged = claim.check is Check.DAMAGED
            why = "its records do not give its root" if damaged else "what follows its position does not reach the root"
            self._answer(pull, AnswerKind.REPAIR, progress.fault or why)
        elif progress.fault:
            self._answer(pull, AnswerKind.DIVERGED, progress.fault)
        elif claim.check is not Check.NONE and self._provable and not claim.filling:
            # The own proof is on its way, or the own copy is the damaged one.
            self._answer(pull, AnswerKind.DIVERGED, "the leader proves its own copy first")
        elif claim.filling:
            self._answer(pull, AnswerKind.COPY)
        elif position.sequence < self.own.sequence:
            self._answer(pull, AnswerKind.ROWS)
        elif claim.committed_known < self.committed:
            self._answer(pull, AnswerKind.NOTHING)
        else:
            self._hold(pull)
            return False
        return True

    def _count(self, replica: str, claim: Claim) -> None:
        """Count what a claim proves."""
        progress = self.progress[replica]
        position = claim.position
        progress.claim = claim
        if claim.filling:
            progress.held, progress.fault = 0, ""
            return
        if position.sequence < progress.highest:
            self._alarm(
                "replica_went_back", replica, f"{replica} stood at {progress.highest} and now at {position.sequence}"
            )
        progress.highest = position.sequence
        fault = self._fault(replica, position)
        if fault and fault != progress.fault:
            self._alarm("replica_diverged", replica, fault)
        progress.fault = fault
        if fault:
            progress.held = 0
            return
        proof = self._root_at(position.sequence)
        # A copy that does not add up is nothing to rely on, whatever root it carries.
        right = proof is not None and proof == position.root and claim.check is not Check.DAMAGED
        progress.held = position.sequence if right else 0

    def _fault(self, replica: str, position: Position) -> str:
        if position.lineage != self.own.lineage:
            if position.sequence == 0:
                return ""
            return (
                f"foreign: {replica} has lineage {position.lineage} at {position.sequence}, "
                f"{self.name} has lineage {self.own.lineage} at {self.own.sequence}"
            )
        if position.sequence > self.own.sequence:
            return (
                f"diverged: {replica} is ahead at {position.sequence}, "
                f"the leader {self.name} stands at {self.own.sequence}"
            )
        proof = self._root_at(position.sequence)
        if proof is not None and proof != position.root:
            return (
                f"diverged: at sequence {position.sequence} {replica} has root {position.root.hex()}, "
                f"{self.name} has {proof.hex()}"
            )
        return ""

    def _alarm(self, event: str, replica: str, message: str) -> None:
        self._alarms.append(Alarm(event, replica, message))

    # --- the committed sequence --------------------------------------------------------------------------------------

    def _applied(self, position: Position) -> None:
        assert position.sequence >= self.own.sequence or not self.serving, (position, self.own)
        if position.sequence == self.own.sequence and position.lineage == self.own.lineage:
            return
        self.own = position
        if isinstance(self.state, Serving | Doubting):
            self._advance()
            self._review_held_pulls()

    def _advance(self) -> None:
        """Raise ``committed`` to what a majority holds, release what waited for it, tell the replicas."""
        held = [self.own.sequence, *(self.progress[other].held for other in self.others)]
        committed = quorum.held_by_majority(held, len(held))
        if committed > self.committed:
            self.committed = committed
            self._review_held_pulls()
        self._release_up_to(self._quorum_waits, self.committed)
        self._release_up_to(self._all_waits, min(held))

    def _review_held_pulls(self) -> None:
        for replica in sorted(self._held_pulls):
            pull, deadline = self._held_pulls.pop(replica)
            if not self._maybe_answer(pull):
                self._held_pulls[replica] = (pull, deadline)

    def _await(self, wait: Await) -> None:
        self._waiting.add(wait.token)
        waits = self._quorum_waits if wait.need is Need.QUORUM else self._all_waits
        heapq.heappush(waits, (wait.sequence, wait.token))
        if isinstance(self.state, Serving | Doubting):
            self._advance()

    def _release_up_to(self, waits: list[tuple[int, int]], sequence: int) -> None:
        while waits and waits[0][0] <= sequence:
            _, token = heapq.heappop(waits)
            if token in self._waiting:
                self._waiting.discard(token)
                self._release.append(Release(token))

    def _forget(self, token: int) -> None:
        if token in self._waiting:
            # The heap keeps the entry until its sequence is reached; the token is what counts.
            self._waiting.discard(token)
            return
        for replica, (pull, _) in list(self._held_pulls.items()):
            if pull.token == token:
                del self._held_pulls[replica]

    # --- disagreement ------------------------------------------------------------------------------------------------

    def _disputes(self, replica: str) -> bool:
        """Whether the replica shows another root at a sequence of ours, or could not apply what follows it."""
        progress = self.progress[replica]
        claim = progress.claim
        if claim is None or claim.filling or progress.fault.startswith("foreign"):
            return False
        if claim.position.sequence > self.own.sequence:
            return False
        return bool(progress.fault) or claim.check is Check.WHOLE

    def _supporters(self, sequence: int) -> int:
        """How many replicas, this one included, are proved to share the own history up to there."""
        return 1 + sum(self.progress[other].held >= sequence for other in self.others)

    def _outvoted(self, replica: str) -> bool:
        """Whether a majority shares the own history where this replica tells another."""
        progress = self.progress[replica]
        assert progress.claim is not None, replica
        if not progress.fault and progress.held == progress.claim.position.sequence:
            # It shares ours up to where it stands: what follows is the leader's to say, once that was proved whole.
            return True
        return self._supporters(progress.claim.position.sequence) >= quorum.majority(len(self.others) + 1)

    def _wrong(self, replica: str) -> bool:
        """Whether the replica is to repair itself from the own copy (invariant 7)."""
        claim = self.progress[replica].claim
        if claim is None or claim.filling or not self._provable or not self.may_ship:
            return False
        if claim.position.sequence > self.own.sequence or claim.check is Check.NONE:
            return False
        if claim.check is Check.DAMAGED and not self.progress[replica].fault:
            return True
        return self.check is Check.WHOLE and (claim.check is Check.DAMAGED or self._outvoted(replica))

    def _decide(self) -> None:
        """Look at who disagrees: go on, have the own copy proved, stop serving, or repair it."""
        if not self._provable or not isinstance(self.state, Serving | Doubting):
            return
        disputing = [other for other in self.others if self._disputes(other)]
        if not disputing:
            if self.check is Check.WHOLE:
                self.check = Check.NONE
            if isinstance(self.state, Doubting) and self.check is Check.NONE and not self._proving:
                self._serve_again()
                return
        elif self.check is Check.NONE and not self._proving:
            self._proving = True
            self._prove = Prove()
        open_ones = [other for other in disputing if not self._settled(other)]
        if isinstance(self.state, Serving):
            if open_ones:
                self._doubt(self.progress[open_ones[0]].fault or f"{open_ones[0]} cannot apply what follows")
            return
        if self.check is Check.WHOLE and not open_ones:
            self._serve_again()
        elif self.check is not Check.NONE and not self.state.source and self.state.retry_at is None:
            self._choose_source(self.state, open_ones)

    def _settled(self, replica: str) -> bool:
        """Whether a disagreement is decided in the own favour, so that serving may go on."""
        claim = self.progress[replica].claim
        assert claim is not None, replica
        if self.check is Check.DAMAGED:
            return False
        if claim.check is Check.DAMAGED:
            return True
        if self.check is Check.NONE and not self.progress[replica].fault:
            # It shares our root and yet our rows do not fit: the own copy is the likelier one.
            return False
        return self._outvoted(replica)

    def _doubt(self, why: str) -> None:
        self._alarm("leader_in_doubt", self.name, why)
        self.state = Doubting(why)

    def _own_damaged(self, reason: str) -> None:
        if not self.others:
            # Nobody could know better. Reads check what they find; what is missing only this alarm names.
            self._alarm("only_copy_damaged", self.name, reason)
            return
        self.check = Check.DAMAGED
        if isinstance(self.state, Serving):
            self._doubt(f"damaged: {reason}")
        if isinstance(self.state, Doubting):
            self.state.why = f"damaged: {reason}"
            self.state.back_at = self._now + limits.COME_UP_S
        self._decide()

    def _proved(self, reason: str, *, whole: bool) -> None:
        self._proving = False
        if not whole:
            self._own_damaged(reason)
            return
        self.check = Check.WHOLE
        self._decide()
        self._review_held_pulls()

    def _choose_source(self, state: Doubting, disputing: list[str]) -> None:
        damaged = self.check is Check.DAMAGED
        source = self._whole_source() if damaged else self._majority_source(disputing)
        if source:
            claim = self.progress[source].claim
            assert claim is not None, source
            state.source = source
            self._repair = Repair(source, claim.position, recount=damaged)
        elif not damaged and not state.named and all(self._proved_whole(other) for other in disputing):
            state.named = True
            self._alarm(
                "two_histories",
                ", ".join(disputing),
                f"{self.name} and {', '.join(disputing)} are whole and differ: {state.why}; nothing is served",
            )

    def _proved_whole(self, replica: str) -> bool:
        claim = self.progress[replica].claim
        return claim is not None and claim.check is Check.WHOLE

    def _whole_source(self) -> str:
        """Return the best replica for a damaged own copy (invariant 8), empty when there is none yet.

        One that stands where the own copy stands; or behind it, when it could not apply what follows or had its time
        to come up.
        """
        assert isinstance(self.state, Doubting), self.state
        floor = max(self.committed, self.served_from)
        waiting = self.state.back_at is None or self._now < self.state.back_at
        told = {
            other: progress.claim
            for other, progress in sorted(self.progress.items())
            if progress.claim is not None
            and not (progress.claim.filling or progress.fault or progress.claim.check is Check.DAMAGED)
        }
        trusted = [claim.position.sequence for claim in told.values() if claim.trusted]
        # As at a start: so many disks that are what they were hold every acknowledged write between them.
        highest = max(trusted) if len(trusted) >= quorum.others_needed(len(self.others) + 1) else None
        best, found = (-1, False), ""
        for other, claim in told.items():
            sequence = claim.position.sequence
            complete = (self.progress[other].held == sequence and sequence >= floor) or sequence == highest
            comes_up = waiting and sequence < self.own.sequence and claim.check is not Check.WHOLE
            rank = (sequence, other != self.state.avoid)
            if complete and not comes_up and sequence <= self.own.sequence and rank > best:
                best, found = rank, other
        return found

    def _majority_source(self, disputing: list[str]) -> str:
        """Return a replica of a majority that agrees on another root at the own sequence, empty when there is none."""
        avoid = self.state.avoid if isinstance(self.state, Doubting) else ""
        votes: dict[tuple[int, bytes], list[str]] = {}
        for other in disputing:
            claim = self.progress[other].claim
            if claim is not None and claim.check is Check.WHOLE and claim.trusted:
                votes.setdefault((claim.position.sequence, claim.position.root), []).append(other)
        for (sequence, _), voters in sorted(votes.items()):
            if sequence == self.own.sequence and len(voters) >= quorum.majority(len(self.others) + 1):
                # Another than the one that failed, when there is one.
                return min(voters, key=lambda other: (other == avoid, other))
        return ""

    def _repair_over(self, message: Repaired | RepairFailed) -> None:
        if not isinstance(self.state, Doubting) or not self.state.source:
            return
        if isinstance(message, RepairFailed):
            self.state.avoid, self.state.source, self.state.failed = self.state.source, "", message.reason
            self.state.retry_at = self._now + limits.HALT_RETRY_S
            return
        position = message.position
        if position.sequence < self.own.sequence:
            # What was beyond is gone: it was never acknowledged, and the next write takes its sequences.
            self._quorum_waits = self._forget_above(self._quorum_waits, position.sequence)
            self._all_waits = self._forget_above(self._all_waits, position.sequence)
        # The transaction that ended the exchange was proved by the root: as good as a proof of ours.
        self.own, self.check = position, Check.WHOLE
        self._serve_again()

    def _forget_above(self, waits: list[tuple[int, int]], sequence: int) -> list[tuple[int, int]]:
        self._waiting.difference_update(token for wanted, token in waits if wanted > sequence)
        kept = [wait for wait in waits if wait[0] <= sequence]
        heapq.heapify(kept)
        return kept

    def _serve_again(self) -> None:
        self.state = Serving()
        for other in self.others:
            claim = self.progress[other].claim
            if claim is not None:
                self._count(other, claim)
        self._advance()
        self._decide()
        self._review_held_pulls()

    # --- the start ---------------------------------------------------------------------------------------------------

    def _maybe_leave_start(self) -> None:
        if not isinstance(self.state, Starting):
            return
        told = self.state.told
        trusted = sum(claim.trusted for claim in told.values())
        known = quorum.knowledge(
            replicas=len(self.others) + 1,
            own_trusted=self.own_trusted,
            told_trusted=trusted,
            told_untrusted=len(told) - trusted,
        )
        match known:
            case quorum.Knowledge.TOO_LITTLE:
                return
            case quorum.Knowledge.ENOUGH:
                if self.state.grace_until is None:
                    self.state.grace_until = self._now + limits.START_GRACE_S
                if self._now < self.state.grace_until:
                    return
            case quorum.Knowledge.COMPLETE_UNTRUSTED:
                names = [other for other in self.others if not told[other].trusted]
                self._alarm(
                    "acknowledged_writes_may_be_missing",
                    self.name,
                    f"{', '.join([self.name, *names])} wiped or restored: the highest position left is taken",
                )
            case quorum.Knowledge.COMPLETE:
                pass
        self._leave_start(self.state)

    def _leave_start(self, state: Starting) -> None:
        told, own = state.told, self.own
        ahead = [
            (claim.position.sequence, other)
            for other, claim in sorted(told.items())
            if not claim.empty and not claim.filling and (claim.position.lineage == own.lineage or own.sequence == 0)
        ]
        best = max(ahead, default=(0, ""), key=lambda item: item[0])
        begun = max((claim.position.sequence for claim in told.values() if claim.filling), default=0)
        if begun > max(best[0], own.sequence):
            # What that replica held before its copy began may be acknowledged and nowhere else: touch nothing.
            state.failed = f"a replica with a half-applied copy held {begun}, nobody whole does"
            return
        if not self.own_whole and not best[1]:
            best = max(
                ((claim.position.sequence, other) for other, claim in sorted(told.items()) if not claim.filling),
                default=best,
            )
            if not best[1]:
                state.failed = "the own copy cannot be used, and nobody else has one"
                return
        if best[0] > own.sequence or not self.own_whole:
            source = best[1]
            if self.own_trusted and own.sequence > 0:
                self._alarm(
                    "leader_behind",
                    source,
                    f"the leader {self.name} stands at {own.sequence}, {source} at {best[0]}: fetching from it",
                )
            target = told[source].position
            self.state = Recovering(source, target)
            self._recover = Recover(source, target)
            return
        self._serve()

    def _distrusted(self, reason: str) -> None:
        if isinstance(self.state, Starting):
            self.own_trusted = False
            self.state.grace_until = None
        else:
            self._alarm("leader_restored", self.name, f"{reason}, and found only after serving began")

    def _recovered(self, position: Position) -> None:
        if not isinstance(self.state, Recovering):
            return
        assert position.sequence >= self.state.target.sequence, (position, self.state.target)
        self.own, self.own_whole = position, True
        self._serve()

    def _serve(self) -> None:
        self.own_trusted = True
        self.served_from = self.own.sequence
        self.state = Serving()
        # All claims before the first answer: a held question must not be answered on a claim that was not looked at.
        for other in self.others:
            claim = self.progress[other].claim
            if claim is not None:
                self._count(other, claim)
        self._advance()
        if self.check is Check.DAMAGED:
            self._own_damaged("found before it served")
        self._decide()
        self._review_held_pulls()
