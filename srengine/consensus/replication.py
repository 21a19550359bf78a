"""A leader's log on its way to the others: rounds of heartbeats, entries, offers of state, and the answers to them.

Entries leave before they are durable here (Ongaro's thesis, 10.2.1): the leader's disk and the followers' work at the
same time, and the leader counts its own copy when it is durable, like anybody's. `progress` says how much may be on its
way; a heartbeat carries no entries and asks at the same time whether everything sent so far has arrived: its
``previous_index`` is the last entry sent.
"""

from __future__ import annotations

from srengine import limits
from srengine.consensus import quorum
from srengine.consensus.entries import EntryKind, bytes_of
from srengine.consensus.messages import Append, AppendReply, Install
from srengine.consensus.progress import Flow, Progress
from srengine.consensus.reading import Reading
from srengine.consensus.roles import Leader
from srengine.types import NodeId


class Replication(Reading):
    """The leader's side of `Append`, `Install` and `AppendReply`."""

    # --- sending -----------------------------------------------------------------------------------------------------

    def _begin_round(self, leader: Leader) -> None:
        leader.round += 1
        leader.rounds.append((leader.round, self.now))
        if len(leader.rounds) > limits.ROUNDS_KEPT_MAX:
            leader.rounds.popleft()
        leader.heartbeat_at = self.now + self.timing.heartbeat_s
        self._join_round(leader)
        for target, peer in sorted(leader.peers.items()):
            self._beat(leader, target, peer)
        self._count_contact(leader)

    def _beat(self, leader: Leader, target: NodeId, peer: Progress) -> None:
        """Send a heartbeat, in the form that the peer can answer."""
        peer.probing = False
        if self._needs_state(peer):
            self._offer_state(leader, target, peer)
            return
        # What is being looked for may as well be what is sent; but nothing is read while the log is written.
        looking = peer.flow is Flow.PROBE and self.persisting_since is None
        self._send_append(leader, target, peer, bytes_max=limits.APPEND_BYTES_MAX if looking else 0)

    def _replicate(self, leader: Leader) -> None:
        """Send to everybody what may be sent."""
        last_index, commit_index = self.view.last_index, self.commit_index
        tell = self.now >= leader.news_at
        if tell:
            leader.news_at = float("inf")
        for peer in leader.peers.values():
            if peer.next_index <= last_index or (tell and peer.commit_sent < commit_index):
                break
        else:
            return
        waiting = False
        said: Append | None = None
        for target, peer in sorted(leader.peers.items()):
            while peer.next_index <= last_index and peer.may_send():
                if self._needs_state(peer):
                    self._offer_state(leader, target, peer)
                    break
                said = self._send_append(leader, target, peer, bytes_max=limits.APPEND_BYTES_MAX, said=said)
            if tell:
                self._tell(leader, target, peer)
            elif peer.commit_sent < commit_index:
                waiting = True
        if not waiting:
            leader.news_at = float("inf")

    def _plan_news(self, leader: Leader) -> None:
        """See to it that others hear before long that more is committed: they answer reads, too. As a rule it goes with
        the next entries or the next heartbeat, which spares a message and its answer.
        """
        leader.news_at = min(leader.news_at, self.now + self.timing.news_s)

    def _tell(self, leader: Leader, target: NodeId, peer: Progress) -> None:
        """Send the news that more is committed, unless it was sent, or is to go with something else.

        A peer whose window is full may need what was trimmed meanwhile: the next heartbeat offers the state.
        """
        if peer.commit_sent < self.commit_index and peer.flow is Flow.REPLICATE and not self._needs_state(peer):
            self._send_append(leader, target, peer, bytes_max=0)

    def _tell_asker(self, leader: Leader, target: NodeId) -> None:
        peer = leader.peers.get(target)
        if peer is not None:
            self._tell(leader, target, peer)

    def _needs_state(self, peer: Progress) -> bool:
        """Whether the entries that the peer needs are gone here."""
        return peer.next_index - 1 < self.view.floor.index

    def _send_append(
        self, leader: Leader, target: NodeId, peer: Progress, *, bytes_max: int, said: Append | None = None
    ) -> Append:
        """Send one message with entries up to ``bytes_max``; 0: none. Return it.

        ``said``: what was just sent to another peer under the same bound. As a rule this one has to hear the same.
        """
        confirmed = peer.barrier if 0 < peer.barrier <= self.commit_index else 0
        if said is None or said.previous_index != peer.next_index - 1 or said.barrier or confirmed:
            said = self._append_message(
                leader, peer.next_index - 1, bytes_max, peer.nonce if confirmed else 0, confirmed
            )
        self._say(target, said)
        peer.commit_sent = self.commit_index
        if said.entries:
            peer.sent(said.entries[-1].index, bytes_of(said.entries))
        return said

    def _append_message(self, leader: Leader, previous_index: int, bytes_max: int, nonce: int, barrier: int) -> Append:
        last_index = self.view.last_index
        previous_term = self.view.term_at(previous_index)
        assert previous_term is not None, (previous_index, self.view.floor, last_index)
        entries = (
            self.view.entries(previous_index + 1, last_index + 1, bytes_max)
            if bytes_max and previous_index < last_index
            else ()
        )
        return Append(
            group=self.group,
            term=self.hard_state.term,
            sender=self.node_id,
            previous_index=previous_index,
            previous_term=previous_term,
            commit_index=self.commit_index,
            round=leader.round,
            entries=entries,
            nonce=nonce,
            barrier=barrier,
        )

    def _offer_state(self, leader: Leader, target: NodeId, peer: Progress) -> None:
        floor = self.view.floor
        if peer.flow is not Flow.INSTALL:
            peer.install(floor.index)
        message = Install(
            group=self.group,
            term=self.term,
            sender=self.node_id,
            round=leader.round,
            index=floor.index,
            index_term=floor.term,
            configuration=floor.configuration,
            reference=self.reference,
        )
        self._say(target, message)

    # --- answers -----------------------------------------------------------------------------------------------------

    def _on_append_reply(self, message: AppendReply) -> None:
        leader = self.state
        if message.term != self.hard_state.term or message.round == 0 or not isinstance(leader, Leader):
            self._drop("late")
            return
        peer = leader.peers.get(message.sender)
        if peer is None:
            self._drop("stranger")
            return
        if message.round > leader.round or message.match_index > self.view.last_index:
            self._drop("malformed")
            return
        peer.heard_at = self.now
        known_round = peer.acked_round
        self._hear_trust(leader, peer, message)
        if peer.acked_round != known_round:
            self._count_contact(leader)
        if message.success:
            self._hear_match(peer, message)
        else:
            peer.refused(message.previous_index, self._next_to_try(message))
        if peer.commit_sent < self.commit_index:
            self._plan_news(leader)
        self._advance(leader)

    def _hear_trust(self, leader: Leader, peer: Progress, message: AppendReply) -> None:
        """Count the answer as contact if its sender may vote; otherwise see to it that it may again."""
        peer.trusted = message.votes
        if message.votes:
            self._hear_round(leader, peer, message.round)
        elif message.nonce != peer.nonce:
            peer.forget(message.nonce)
            # Made after its start, so that nobody who has its forgotten vote can hold it (see `machine`, "Trust").
            peer.barrier = self._append_own(leader, EntryKind.NOOP)

    def _hear_round(self, leader: Leader, peer: Progress, number: int) -> None:
        """Note that the peer promised to vote for nobody, from a moment after round ``number`` began."""
        if number > peer.acked_round and leader.rounds and number >= leader.rounds[0][0]:
            peer.acked_round = number
            peer.acked_at = leader.rounds[number - leader.rounds[0][0]][1]

    def _hear_match(self, peer: Progress, message: AppendReply) -> None:
        peer.matched(message.match_index)
        if message.votes:
            peer.counted_index = max(peer.counted_index, message.match_index)

    def _next_to_try(self, message: AppendReply) -> int:
        """Find the last place that may be common, from the last place of the follower's log that may be."""
        if message.match_index < self.view.floor.index:
            return message.match_index + 1
        return self.view.fitting(message.match_index, message.conflict_term) + 1

    def _append_own(self, leader: Leader, kind: EntryKind, data: bytes = b"") -> int:
        """Add an entry of the own term to the log and return its index."""
        raise NotImplementedError

    def _advance(self, leader: Leader) -> None:
        """Draw the conclusions from what was heard."""
        raise NotImplementedError

    # --- what a majority has done ------------------------------------------------------------------------------------

    def _count_contact(self, leader: Leader) -> None:
        """Find the newest moment after which a majority is known to have followed."""
        own, peers = self.node_id, leader.peers
        acked = [self.now if voter == own else peers[voter].acked_at for voter in self.view.configuration.voters]
        leader.contact_at = max(leader.contact_at, quorum.agreed(acked))

    def _held_by_majority(self, leader: Leader) -> int:
        """Return the highest index that a majority of voters holds durably."""
        own, peers, durable_index = self.node_id, leader.peers, self.view.durable_index
        return quorum.agreed(
            [durable_index if voter == own else peers[voter].counted_index for voter in self.view.configuration.voters]
        )
