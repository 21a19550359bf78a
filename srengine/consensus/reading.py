"""Linearizable reads without an entry in the log (read index: Ongaro's thesis, 6.4).

A read may be answered from state that has applied what was committed when it was asked for, once it is certain that no
other node had committed more by then. At the leader::

    Read -> an entry of the own term is committed -> index := commit index -> a heartbeat round begins
         -> a majority of voters answers that round or a later one -> ReadReady(index)

Reads that come while a round is open wait for the next one, so any number of them costs one round trip at a time. With
`Timing.lease_reads` and a lease nobody is asked; the reader must look at ``lease_until`` again with a fresh clock after
it has read: a process may be stopped between any two steps.

A follower asks the leader with a number of its own, one question for all reads that wait. An answer to any repetition
of the question is good, however late: it was confirmed after the question, which was asked after the reads.
"""

from __future__ import annotations

from srengine import limits
from srengine.consensus import quorum
from srengine.consensus.core import Core
from srengine.consensus.effects import ReadReady, Why
from srengine.consensus.messages import ReadIndex, ReadIndexReply
from srengine.consensus.roles import Inquiry, Leader, WaitingRead
from srengine.types import NodeId


class Reading(Core):
    """Reads at the leader and through it."""

    # --- at the leader -----------------------------------------------------------------------------------------------

    def _on_read(self, token: int) -> None:
        """Take in a `Read` of this node's own clients."""
        waiting = len(self.state.reads) if isinstance(self.state, Leader) else self._reads_unanswered
        if waiting >= limits.READS_WAITING_MAX:
            self._refuse(token, Why.FULL, "too many reads wait")
        elif isinstance(self.state, Leader):
            self._read_here(self.state, None, token)
        else:
            self._unasked.append((token, self.now + self.timing.election_s_max))

    @property
    def _reads_unanswered(self) -> int:
        return len(self._unasked) + (len(self._inquiry.tokens) if self._inquiry else 0)

    def _on_read_index(self, message: ReadIndex) -> None:
        """Answer a follower, when it is certain."""
        if not isinstance(self.state, Leader) or message.sender not in self.configuration.nodes:
            self._answer_read(message.sender, message.token, 0)
        elif len(self.state.reads) >= limits.READS_WAITING_MAX:
            self._drop("reads full")
        else:
            self._read_here(self.state, message.sender, message.token)

    def _read_here(self, leader: Leader, origin: NodeId | None, token: int) -> None:
        if self.timing.lease_reads and self._term_settled(leader) and self._lease_until(leader) > self.now:
            self._answer_read(origin, token, self.commit_index)
        else:
            leader.reads.append(WaitingRead(origin, token))

    def _answer_read(self, origin: NodeId | None, token: int, index: int) -> None:
        if origin is None:
            self._reads.append(ReadReady(token, index))
            return
        if index and isinstance(self.state, Leader):
            self._tell_asker(self.state, origin)
        self._say(origin, ReadIndexReply(self.group, self.term, self.node_id, token, index))

    def _tell_asker(self, leader: Leader, target: NodeId) -> None:
        """Tell who asked what is committed, before the answer: it waits until it has applied that."""
        raise NotImplementedError

    def _term_settled(self, leader: Leader) -> bool:
        """Whether an entry of the own term is committed: before that the commit index may be behind the truth."""
        return self.commit_index >= leader.first_index

    def _lease_until(self, leader: Leader) -> float:
        """Until then no other node can lead: a majority has promised, counted from our sending, by a slow clock."""
        if not leader.leases:
            return float("-inf")
        until = leader.contact_at + self.timing.lease_s * (1 - self.timing.drift)
        if self.persisting_since is not None:
            # Heartbeats do not renew the lease of a leader whose own disk does not answer.
            until = min(until, self.persisting_since + self.timing.lease_s)
        return until

    def _begin_reads(self, leader: Leader) -> None:
        """Begin a round for the reads that have none, unless one is open; there are reads."""
        if leader.reads[0].round == 0 and self._term_settled(leader):
            self._begin_round(leader)
            self._answer_reads(leader)

    def _join_round(self, leader: Leader) -> None:
        """Let the reads that have no round wait for the one that is just beginning."""
        if not self._term_settled(leader):
            return
        for read in reversed(leader.reads):
            if read.round:
                break
            read.index, read.round = self.commit_index, leader.round

    def _answer_reads(self, leader: Leader) -> None:
        """Answer the reads whose round a majority has answered."""
        confirmed = self._confirmed_round(leader)
        while leader.reads and 0 < leader.reads[0].round <= confirmed:
            read = leader.reads.popleft()
            self._answer_read(read.origin, read.token, read.index)

    def _confirmed_round(self, leader: Leader) -> int:
        """Return the newest round after whose beginning a majority of the voters still followed."""
        own, peers = self.node_id, leader.peers
        return quorum.agreed(
            [leader.round if voter == own else peers[voter].acked_round for voter in self.configuration.voters]
        )

    def _fail_reads(self, leader: Leader) -> None:
        for read in leader.reads:
            self._answer_read(read.origin, read.token, 0)
        leader.reads.clear()

    def _adopt_reads(self, leader: Leader) -> None:
        """Answer here what was to be asked of another: this node leads now."""
        tokens = [*(self._inquiry.tokens if self._inquiry else ()), *self._unasked]
        self._inquiry = None
        self._unasked.clear()
        leader.reads.extend(WaitingRead(None, token) for token, _ in tokens)

    # --- at a follower -----------------------------------------------------------------------------------------------

    def _ask_leader(self) -> None:
        """Ask, or ask again, if there is something to ask and somebody who knows."""
        if self._inquiry is None and self._unasked:
            self._inquiries += 1
            self._inquiry = Inquiry(self._inquiries, list(self._unasked), self.now)
            self._unasked.clear()
        inquiry, leader = self._inquiry, self.leader
        if inquiry is not None and leader is not None and leader != self.node_id and self.now >= inquiry.ask_at:
            inquiry.ask_at = self.now + self.timing.lease_s
            self._say(leader, ReadIndex(self.group, self.term, self.node_id, inquiry.number))

    def _on_read_index_reply(self, message: ReadIndexReply) -> None:
        inquiry = self._inquiry
        if inquiry is None or message.token != inquiry.number:
            return
        if message.index == 0:
            # It does not lead (any more): whoever does will be heard before we ask again.
            inquiry.ask_at = self.now + self.timing.heartbeat_s
            return
        self._inquiry = None
        self._reads.extend(ReadReady(token, message.index) for token, _ in inquiry.tokens)

    def _expire_reads(self) -> None:
        inquiry = self._inquiry
        if inquiry is not None and any(until <= self.now for _, until in inquiry.tokens):
            self._reads.extend(ReadReady(token, 0) for token, until in inquiry.tokens if until <= self.now)
            inquiry.tokens = [(token, until) for token, until in inquiry.tokens if until > self.now]
            if not inquiry.tokens:
                self._inquiry = None
        while self._unasked and self._unasked[0][1] <= self.now:
            self._reads.append(ReadReady(self._unasked.popleft()[0], 0))

    def _reads_deadline(self) -> float:
        deadlines = [until for _, until in self._inquiry.tokens] if self._inquiry else []
        if self._inquiry and self.leader not in (None, self.node_id):
            deadlines.append(self._inquiry.ask_at)
        if self._unasked:
            deadlines.append(self._unasked[0][1])
        return min(deadlines, default=float("inf"))
