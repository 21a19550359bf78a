"""`RaftMachine`: one node's part in one group, without I/O.

A group of nodes keeps one log. One of them leads a *term*; it takes proposals, sends them to the others, and calls an
entry committed when a majority of voters holds it durably. Whoever may lead next needs the votes of a majority, and
nobody votes for a candidate that holds less than himself: so every later leader holds everything committed::

      Propose, Read          Received            Received
          |                     ^  |                ^  |
          v                     |  v                |  v
     +---------+  Append   +----------+        +----------+      step(input), tick(now)
     | leader  | --------> | follower |        | learner  |          |
     |         | <-------- |          |        |          |          v
     +---------+  answers  +----------+        +----------+      drain() -> Effects
          |                     |                   |              persist, send, apply, ...
          v                     v                   v
      Accepted               apply               apply           next_deadline

What each part does stands in its file: `election` (campaigns, votes, promises), `leading` (a term of office),
`replication` (the log on its way), `following` (the other end), `reading` (reads without entries). `effects` has the
driver's duties.

Invariants, each checked by the simulators in tests/:

1. *Election safety*: at most one leader in a term.
2. *Log matching*: two logs with an entry of the same index and term are equal up to it.
3. *Leader completeness*: what is committed is in the log of every leader of a later term.
4. *State machine safety*: no two nodes apply different entries at one index; each applies every index once, in order.
5. *Lease*: while ``now < lease_until`` at a leader no other node has committed anything it has not. It rests on clocks:
   over ``lease_s`` no node's clock runs faster than another's by more than ``drift``.
6. ``floor <= applied <= handed <= commit <= last``; the commit index never falls.

Nothing a peer says is asserted; what makes no sense is dropped and counted in ``dropped``.

**Trust.** A directory may be older than its node: put back from a backup, copied, or cut by a damaged disk. Such a node
U may have forgotten (1) votes, (2) later terms, (3) entries that it acknowledged, (4) promises. Until it is trusted it
does not vote, does not campaign, and its answers carry ``votes=False``: they count neither for leases, contact and
reads, nor for commitment. The last is needed: if U forgot that it voted for C in a later term, then C may yet win that
term without an entry that was committed by counting U.

It is trusted again when the services above say so (`Trust`), or by this proof. U draws a *nonce* at its start and says
it with every answer. A leader L of term T that hears a new one appends an entry, the *barrier* b, and once b is
committed, by a majority Q that does not count U, says (nonce, b) with every `Append`. U trusts itself when it holds b
itself, and records its vote of T for L if it has none. Then what it forgot does not matter any more:

- *Votes of terms below T*: it is in term T, and votes in no earlier one. *Of T*: its vote is recorded, and it knows L.
- *Votes of terms M > T*. Whoever asked for one, C, was in M before U started, hence before b was made, and takes no
  entry of term T after that. So C's log has nothing of T at or after b. It has nothing of a term between T and M,
  either: that term's leader was elected before b was made by a majority, which shares a node with Q other than U, and
  that node could not hold b from L afterwards. So C's log is behind b. To win M it needs a majority, which again shares
  a node other than U with Q; if that node voted for C before it held b, it could not take b from L; after it, it finds
  C's log behind its own. So C never wins M, and a second vote of U in M makes no second leader.
- *Entries acknowledged*. A committed entry e that U forgot is held by the rest of its majority, which shares a node
  with every majority that does not need U; and U votes for nobody meanwhile. So every leader elected meanwhile has e, L
  too: e is before b, or of a term after T, and the argument above excludes those. U holds L's log up to b, so it holds
  e again. L itself forgets what U acknowledged when it hears the nonce; a late acknowledgement from before the start
  can still be counted, and is harmless by the same argument.
- *Promises*: it waits ``lease_s`` from its start, as every node does.

Adjacent configurations do not weaken it: majorities of configurations that differ by one voter share a voter, and
neither of the two majorities above counts U. The proof needs a majority without U, so a group of two cannot use it, nor
one in which a majority lost its trust: those need `Trust`. A majority of older directories could elect one of their own
and cut off what an intact node has applied; `Trust.held` keeps them from that.

**What it costs.** A write is one round trip and one fsync on its way (a follower's; the leader's runs beside it).
Without a leader nothing is written for at least ``lease_s`` after its last heartbeat, unless it handed over. Clocks are
needed for leases alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

import msgspec

from srengine.consensus import checks
from srengine.consensus.effects import (
    NOTHING,
    Applied,
    Effects,
    Hint,
    Input,
    Installed,
    InstallFailed,
    Persist,
    Persisted,
    Propose,
    Read,
    Received,
    StepDown,
    Transfer,
    Trimmed,
    Trust,
)
from srengine.consensus.entries import Entry, Floor
from srengine.consensus.following import Following
from srengine.consensus.messages import (
    Append,
    AppendReply,
    Install,
    Message,
    ReadIndex,
    ReadIndexReply,
    TimeoutNow,
    Vote,
    VoteReply,
)
from srengine.consensus.progress import Progress
from srengine.consensus.roles import Candidate, Follower, Leader, PreCandidate
from srengine.limits import APPLY_BYTES_MAX
from srengine.types import NodeId


class RaftMachine(Following):
    """One node in one group; see the module's text, and `effects` for how it is driven.

    ``RaftMachine(group=, node_id=, log=, hard_state=, applied_index=, timing=, random=, now=, trusted=False)``: ``log``
    and ``hard_state`` are what was persisted, ``applied_index`` what the state machine holds durably (not above the
    log's last index: a driver moves a log that ends before it), ``trusted`` see `effects.Trust`, ``now`` as for `tick`.
    """

    # --- in ----------------------------------------------------------------------------------------------------------

    def pass_time(self, now: float) -> None:
        """`tick` before `next_deadline`: nothing happens but that it is later."""
        self.now = max(self.now, now)

    def tick(self, now: float) -> None:
        """Let time pass. A clock that goes back counts as one that stands still."""
        self.now = max(self.now, now)
        self._expire_reads()
        if isinstance(self.state, Leader):
            self._tick_leader(self.state)
        else:
            self._tick_follower(self.state)

    def step(self, given: Input) -> None:
        """Take one input in; what follows from it leaves with `drain`."""
        assert self.persisting_since is None or isinstance(given, Persisted), (given, self.persisting_since)
        match given:
            case Received(message):
                self._receive(message)
            case Propose():
                self._on_propose(given)
            case Read(token):
                self._on_read(token)
            case Persisted(last_index):
                self._on_persisted(last_index)
            case Applied(index):
                self._on_applied(index)
            case Installed(floor):
                self._on_installed(floor)
            case InstallFailed(index):
                self._on_install_failed(index)
            case Trimmed():
                self._on_trimmed(given)
            case Transfer():
                self._on_transfer(given)
            case Hint():
                self._on_hint(given)
            case StepDown(reason):
                self._on_step_down(reason)
            case Trust(trusted, held):
                self._on_trust(trusted=trusted, held=held)
            case _:
                assert_never(given)

    def _receive(self, message: Message) -> None:
        if message.group != self.group or message.sender in {self.node_id, ""} or not checks.is_sound(message):
            self._drop("malformed")
            return
        if self._is_ahead(message):
            self._hear_later_term(message)
            return
        match message:
            case Append():
                self._on_append(message)
            case AppendReply():
                self._on_append_reply(message)
            case Vote():
                self._on_vote(message)
            case VoteReply():
                self._on_vote_reply(message)
            case TimeoutNow():
                self._on_timeout_now(message)
            case Install():
                self._on_install(message)
            case ReadIndex():
                self._on_read_index(message)
            case ReadIndexReply():
                self._on_read_index_reply(message)
            case _:
                assert_never(message)

    def _is_ahead(self, message: Message) -> bool:
        """Whether an answer or question tells that its sender has moved on to a later term."""
        match message:
            case AppendReply() | ReadIndex():
                return message.term > self.hard_state.term
            case VoteReply():
                return message.term > self.term and not (message.pre and message.granted)
            case _:
                return False

    def _hear_later_term(self, message: Message) -> None:
        """Stop leading or standing in an earlier term: a member has moved on. Strangers move nobody."""
        if isinstance(self.state, Follower):
            self._drop("late")
        elif message.sender not in self.configuration.nodes:
            self._drop("stranger")
        else:
            self._become_follower(message.term, None, f"{message.sender} is in a later term")

    def _on_persisted(self, last_index: int) -> None:
        assert self.persisting_since is not None, "nothing was being persisted"
        self.persisting_since = None
        self._state_on_way = False
        self.view.persisted(last_index)
        if isinstance(self.state, Leader):
            self._advance(self.state)

    def _on_applied(self, index: int) -> None:
        assert self.applied_index <= index <= self.handed_index, (self.applied_index, index, self.handed_index)
        self.applied_index = index
        self._handed.drop(index)

    def _on_trimmed(self, trimmed: Trimmed) -> None:
        assert trimmed.floor.index <= self.applied_index, (trimmed.floor.index, self.applied_index)
        self.view.trimmed(trimmed.floor)
        if trimmed.reference is not None:
            self.reference = trimmed.reference

    # --- out ---------------------------------------------------------------------------------------------------------

    def drain(self) -> Effects:
        """Return what there is to do now, once; `effects.NOTHING` itself when there is nothing."""
        leader = self.state
        if isinstance(leader, Leader):
            if leader.reads:
                self._begin_reads(leader)
            if self.persisting_since is None:
                self._replicate(leader)
        elif self._unasked or self._inquiry is not None:
            self._ask_leader()
        apply = self._take_apply() if self.commit_index > self.handed_index else ()
        effects = NOTHING
        if self._state_on_way:
            # Only a group of one voter leads before its term is durable; its learners hear of it when it is.
            self._send.clear()
        if self._send or apply or self._refused or self._reads or self._roles or self._install is not None:
            effects = Effects(
                send=tuple(self._send),
                apply=apply,
                refused=tuple(self._refused),
                reads=tuple(self._reads),
                install=self._install,
                roles=tuple(self._roles),
            )
            self._send, self._refused, self._reads, self._roles = [], [], [], []
            self._install = None
            if self._is_free_of_persist():
                return effects
        accepted, self._accepted = tuple(self._accepted), []
        persist = self._take_persist()
        if persist is None and not accepted:
            return effects
        return msgspec.structs.replace(effects, persist=persist, accepted=accepted)

    def _is_free_of_persist(self) -> bool:
        """Whether what was just said depends on nothing that is still to be persisted, so that it need not wait.

        A leader applies and answers what is durable already, and what it sends says nothing of its own disk; only its
        term may not be durable. Everybody else's answers say that something is.
        """
        return isinstance(self.state, Leader) and self.hard_state == self._durable_state

    def _take_persist(self) -> Persist | None:
        if self.persisting_since is not None:
            return None
        changed = self.hard_state if self.hard_state != self._durable_state else None
        if changed is None and self.view.last_index == self.view.durable_index:
            return None
        self._durable_state = self.hard_state
        self._state_on_way = changed is not None
        self.persisting_since = self.now
        return Persist(changed, self.view.pending)

    def _take_apply(self) -> tuple[Entry, ...]:
        # NB: a leader may hear of a majority that does not need its own copy before that is durable.
        held = self.view.durable_index if isinstance(self.state, Leader) else self.view.last_index
        stop = min(self.commit_index, held) + 1
        if self.installing is not None or self.persisting_since is not None or self.handed_index + 1 >= stop:
            return ()
        room = APPLY_BYTES_MAX - self._handed.bytes
        if room <= 0:
            return ()
        entries = self.view.entries(self.handed_index + 1, stop, room)
        self._handed.add(entries)
        self.handed_index = entries[-1].index
        return entries

    @property
    def next_deadline(self) -> float:
        """When `tick` is due if nothing comes before; infinite when never."""
        match self.state:
            case Leader():
                own = self._leader_deadline(self.state)
            case Follower() | PreCandidate() | Candidate():
                own = float("inf") if self.persisting_since is not None else self.state.campaign_at
        if self._unasked or self._inquiry is not None:
            own = min(own, self._reads_deadline())
        return own

    # --- what everybody may ask --------------------------------------------------------------------------------------

    @property
    def lease_until(self) -> float:
        """Until then this node leads and nobody else can; minus infinity when it has no lease. To be compared with a
        clock read after what was read under it.
        """
        leader = self.state
        if not isinstance(leader, Leader) or not self._term_settled(leader):
            return float("-inf")
        return self._lease_until(leader)

    @property
    def last_index(self) -> int:
        """Index of the last entry, durable or not."""
        return self.view.last_index

    @property
    def configuration_index(self) -> int:
        """Where the configuration in force stands; committed when not above the commit index."""
        return self.view.configuration_index

    @property
    def progress(self) -> Mapping[NodeId, Progress]:
        """What a leader knows of each other node; empty at others. Not to be changed."""
        return dict(self.state.peers) if isinstance(self.state, Leader) else {}

    @property
    def awaited_index(self) -> int | None:
        """The lowest index behind which somebody who is there still lacks entries of this leader; None: nobody does, or
        this node does not lead. A peer counts while it answers; of one that fetches the state, what comes after that.
        """
        if not isinstance(self.state, Leader):
            return None
        since = self.now - self.timing.lease_s
        lacking = [
            max(peer.match_index, peer.install_index)
            for peer in self.state.peers.values()
            if peer.heard_at >= since and peer.match_index < self.view.last_index
        ]
        return min(lacking, default=None)

    def floor_at(self, index: int) -> Floor:
        """Return the floor for trimming the log up to ``index``, which is applied and not below the present floor."""
        assert self.view.floor.index <= index <= self.applied_index, (self.view.floor, index, self.applied_index)
        term = self.view.term_at(index)
        assert term is not None, index
        return Floor(index, term, self.view.configuration_at(index))
