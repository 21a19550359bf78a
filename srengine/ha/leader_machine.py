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

Invariants, each checked by the simulation in tests/ha:

1. ``committed`` never goes back, and at least a majority of the replicas, this one included, holds it durably.
2. A replica counts only for what its root proves: ``held`` is set when its root equals ours at that sequence. A pull
   whose sequence left the ring of roots proves nothing and counts nothing until the next one.
3. A replica that shows a lower sequence than before counts from the lower one at once, and an alarm names it.
4. Nothing is released above ``committed`` (for `all`: above what every replica holds).
5. Nothing is served in Starting and Recovering.
6. A replica with another root at the same sequence, or ahead of a leader that serves, is *diverged*: named by an alarm
   and in the status, it counts for nothing and gets no rows; nothing of it or of us is deleted.

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


Input = Pulled | Applied | Await | Forget | Recovered | RecoveryFailed | Distrusted

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


class LeaderMachine:
    """One group's leader. ``step``, ``tick``, ``drain``; see the module's text.

    ``others``: names of the other replicas. ``own``: the own durable position, ``own_trusted``: whether the disk is
    what it was. ``root_at(sequence)``: the own root after that sequence, None when it left the ring; a pure function of
    the tablet.
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
        self.state: Starting | Recovering | Serving = Starting()
        self.progress: dict[str, Progress] = {other: Progress() for other in self.others}
        self._root_at = root_at
        self._now = now
        self._held_pulls: dict[str, tuple[Pulled, float]] = {}
        self._quorum_waits: list[tuple[int, int]] = []
        self._all_waits: list[tuple[int, int]] = []
        self._waiting: set[int] = set()
        self._send: list[Answer] = []
        self._release: list[Release] = []
        self._recover: Recover | None = None
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
                if isinstance(self.state, Starting):
                    self.own_trusted = False
                    self.state.grace_until = None
                else:
                    self._alarm("leader_restored", self.name, f"{reason}, and found only after serving began")
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
                kind = AnswerKind.NOTHING if isinstance(self.state, Serving) else AnswerKind.STARTING
                self._answer(pull, kind)
        if isinstance(self.state, Starting):
            self._maybe_leave_start()

    def drain(self) -> Effects:
        """Return what is to be done since the last call."""
        effects = Effects(tuple(self._send), tuple(self._release), self._recover, tuple(self._alarms))
        self._send, self._release, self._recover, self._alarms = [], [], None, []
        return effects

    # --- for status --------------------------------------------------------------------------------------------------

    @property
    def serving(self) -> bool:
        """Whether reads and writes are answered."""
        return isinstance(self.state, Serving)

    @property
    def next_deadline(self) -> float | None:
        """Time of the next useful ``tick``, None when there is none."""
        times = [deadline for _, deadline in self._held_pulls.values()]
        if isinstance(self.state, Starting) and self.state.grace_until is not None:
            times.append(self.state.grace_until)
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
            case Serving():
                self._count(pull.replica, pull.claim)
                self._advance()
                self._maybe_answer(pull)

    def _hold(self, pull: Pulled) -> None:
        self._held_pulls[pull.replica] = (pull, self._now + limits.PULL_HOLD_S)

    def _answer(self, pull: Pulled, kind: AnswerKind, reason: str = "") -> None:
        self._send.append(Answer(pull.token, kind, self.committed, self.own, reason))

    def _maybe_answer(self, pull: Pulled) -> bool:
        """Answer a pull if there is something to say, else hold it. Its claim was counted already."""
        claim, position = pull.claim, pull.claim.position
        progress = self.progress[pull.replica]
        if progress.fault:
            kind = AnswerKind.FOREIGN if progress.fault.startswith("foreign") else AnswerKind.DIVERGED
            self._answer(pull, kind, progress.fault)
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
            progress.held = 0
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
        progress.held = position.sequence if proof is not None and proof == position.root else 0

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
        if self.serving:
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
        if self.serving:
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
        self._review_held_pulls()
