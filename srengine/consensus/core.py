"""What all parts of a machine share: its state, what it has to say, and the change of roles.

`machine.RaftMachine` is put together from parts, each a file: `core`, `reading`, `replication`, `leading`, `election`,
`following`. They are one object, cut by subject; every rule is a method with a name, so that a test can break exactly
one of them.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from srengine.consensus.effects import (
    Accepted,
    InstallState,
    LogReader,
    Outgoing,
    ReadReady,
    Refused,
    Role,
    RoleChanged,
    Timing,
    Why,
)
from srengine.consensus.entries import Configuration, HardState
from srengine.consensus.messages import Install, Message
from srengine.consensus.roles import Candidate, Follower, Inquiry, Leader, PreCandidate, State
from srengine.consensus.view import Handed, LogView
from srengine.types import NodeId

if TYPE_CHECKING:
    from random import Random

NONCE_BITS = 52
"""Numbers on the wire stay below 2^53."""


class Core:
    """State and helpers; see `machine.RaftMachine`."""

    def __init__(
        self,
        *,
        group: str,
        node_id: NodeId,
        log: LogReader,
        hard_state: HardState,
        applied_index: int,
        timing: Timing,
        random: Random,
        now: float,
        trusted: bool = False,
    ) -> None:
        self.group = group
        self.node_id = node_id
        self.timing = timing
        self.reference = b""
        """Where others fetch the state that this node has applied; opaque. See `effects.Trimmed`."""
        self.now = now
        """Seconds, of the last tick."""
        heard_of_terms = hard_state.term > 0
        self.view = LogView(log)
        if hard_state.term < self.view.last_term:
            # A bootstrapped log begins with an entry of term 1 that nobody was elected for.
            hard_state = HardState(self.view.last_term)
        self.hard_state = hard_state
        """As of the last step; durable when nothing is being persisted."""
        assert applied_index >= self.view.floor.index, (applied_index, self.view.floor)
        self.applied_index = applied_index
        """Up to here the state machine holds everything durably."""
        self.handed_index = applied_index
        """Up to here entries were handed out; ``applied_index <= handed_index <= commit_index``."""
        self.commit_index = applied_index
        """The highest place known to be decided. Not durable: the state machine's index takes its place at a start."""
        assert applied_index <= self.view.last_index, (applied_index, self.view.last_index)
        self.trusted = trusted
        self.nonce = 0
        """Of this start while not trusted, else 0; see `machine`, "Trust"."""
        # (term, index) of the last entry that a candidate must hold, whatever this node holds; see `Trust.held`.
        self.held_least = (0, 0)
        self.promise_until = now
        """Until then this node votes for nobody: somebody may count on it."""
        self.persisting_since: float | None = None
        """When the last `Persist` was handed out; None: everything handed out is durable."""
        self.installing: Install | None = None
        """The offered state that is being fetched."""
        self.dropped: dict[str, int] = {}
        """How many messages of each fault were dropped, by reason: for the metrics and the simulator."""

        self._random = random
        self._durable_state = hard_state
        """The hard state that was handed out last, durable once ``persisting_since`` is None."""
        self._state_on_way = False
        """Whether it is not durable yet: until then no message of its term may leave."""
        self._send: list[Outgoing] = []
        self._accepted: list[Accepted] = []
        self._refused: list[Refused] = []
        self._reads: list[ReadReady] = []
        self._install: InstallState | None = None
        self._roles: list[RoleChanged] = []
        self._handed = Handed()
        self._inquiry: Inquiry | None = None
        """What the leader was asked."""
        self._unasked: deque[tuple[int, float]] = deque()
        """(token, when it expires) of reads that no question covers yet."""
        self._inquiries = random.getrandbits(NONCE_BITS - 1)
        """Number of the last question; random at first, so that an answer to an earlier start fits none of this one."""
        if not trusted:
            self.nonce = self._draw_nonce()
        if heard_of_terms or not trusted:
            # It may have promised, and does not know when. Who never heard a leader has not: its term would be here.
            self.promise_until = now + timing.lease_s
        # Nobody is heard for a whole time-out only if nobody leads: the first campaign may be early (pre-vote).
        alone = self.configuration.voters == (node_id,)
        pause_s = 0.0 if alone else random.uniform(0, timing.lease_s)
        self.state: State = Follower(campaign_at=self.promise_until + pause_s, timeout_s=self._draw_timeout())
        self._announced: tuple[Role, int, NodeId | None] = (self.role, self.term, None)

    # --- what everybody may ask --------------------------------------------------------------------------------------

    @property
    def term(self) -> int:
        """The current term."""
        return self.hard_state.term

    @property
    def held(self) -> tuple[int, int]:
        """Term and index of the last entry, durable or not; zeros for an empty log."""
        return self.view.last_term, self.view.last_index

    @property
    def role(self) -> Role:
        """What this node is in the group now."""
        match self.state:
            case Leader():
                return Role.LEADER
            case Candidate() | PreCandidate():
                return Role.CANDIDATE
            case Follower():
                return Role.FOLLOWER if self.node_id in self.configuration.voters else Role.LEARNER

    @property
    def leader(self) -> NodeId | None:
        """Who leads the current term, as far as known."""
        match self.state:
            case Leader():
                return self.node_id
            case Follower(leader=leader):
                return leader
            case _:
                return None

    @property
    def configuration(self) -> Configuration:
        """The configuration in force."""
        return self.view.configuration

    @property
    def is_voter(self) -> bool:
        """Whether the configuration in force counts this node."""
        return self.node_id in self.configuration.voters

    # --- saying things -----------------------------------------------------------------------------------------------

    def _say(self, target: NodeId, message: Message) -> None:
        self._send.append(Outgoing(target, message))

    def _drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def _refuse(self, token: int, why: Why, message: str = "") -> None:
        self._refused.append(Refused(token, why, self.leader, message))

    def _announce(self, reason: str) -> None:
        """Tell the world above if role, term or leader are others than it was told last."""
        now = (self.role, self.term, self.leader)
        if now != self._announced:
            self._announced = now
            self._roles.append(RoleChanged(*now, reason))

    # --- dice --------------------------------------------------------------------------------------------------------

    def _draw_timeout(self) -> float:
        return self._random.uniform(self.timing.election_s_min, self.timing.election_s_max)

    def _draw_soon(self) -> float:
        """Draw a pause between early campaigns: others' promises end, and two should not collide again and again."""
        return self._random.uniform(1, 3) * self.timing.heartbeat_s

    def _draw_nonce(self) -> int:
        return self._random.randrange(1, 1 << NONCE_BITS)

    # --- changing roles ----------------------------------------------------------------------------------------------

    def _adopt_term(self, term: int) -> None:
        """Move on to a later term, in which this node has voted for nobody."""
        assert term >= self.term, (term, self.term)
        if term > self.term:
            self.hard_state = HardState(term)

    def _become_follower(self, term: int, leader: NodeId | None, reason: str, *, early_campaigns: int = 0) -> None:
        """Enter ``term`` (the current or a later one) as a follower."""
        if isinstance(self.state, Leader):
            self._leave_office(self.state)
        self._adopt_term(term)
        timeout_s = self._draw_timeout()
        pause_s = self._draw_soon() if early_campaigns else timeout_s
        self.state = Follower(
            campaign_at=self.now + pause_s, timeout_s=timeout_s, leader=leader, early_campaigns=early_campaigns
        )
        self._announce(reason)

    def _leave_office(self, leader: Leader) -> None:
        """End everything that only a leader can go on with."""
        raise NotImplementedError

    def _begin_round(self, leader: Leader) -> None:
        """Begin a heartbeat round."""
        raise NotImplementedError
