"""A term of office: how it begins, what a leader takes in, what it may call committed, and how it ends.

A leader calls an entry committed when a majority holds it *and* it is of its own term; with it, everything before. By
count alone an entry of an earlier term could still be replaced (figure 8 of the paper). So a term begins with an entry
without content, and reads and changes of membership wait for it.

A configuration is in force from the moment it is in the log. A leader that is not in it any more goes on until it is
committed, counting the others, then leaves. Removed nodes stay among the peers until they have heard that it is.

It ends when a later term is heard of, when no majority has followed for ``election_s_min`` (by the time of *asking*: a
process that was stopped finds only old answers), when the own disk takes longer than that, or when somebody above says
so. A leader that leaves on its own tells the best voter to campaign at once: it cannot use its lease any more.
"""

from __future__ import annotations

from itertools import pairwise

from srengine import limits
from srengine.consensus.effects import Accepted, Propose, Transfer, Why
from srengine.consensus.entries import Configuration, Entry, EntryKind, entry_bytes
from srengine.consensus.messages import TimeoutNow
from srengine.consensus.progress import Progress
from srengine.consensus.replication import Replication
from srengine.consensus.roles import Departing, Leader, Transferring
from srengine.types import NodeId


class Leading(Replication):
    """What a leader does but for sending."""

    # --- the beginning -----------------------------------------------------------------------------------------------

    def _become_leader(self, reason: str) -> None:
        first_index = self.view.last_index + 1
        leader = Leader(
            first_index=first_index, elected_at=self.now, peers={}, heartbeat_at=self.now + self.timing.heartbeat_s
        )
        self.state = leader
        assert self.installing is None, self.installing
        self._meet_peers(leader, [node for _, node in self._removals()])
        self._announce(reason)
        self._adopt_reads(leader)
        self._append_own(leader, EntryKind.NOOP)
        self._begin_round(leader)

    def _meet_peers(self, leader: Leader, to_be_told: list[NodeId]) -> None:
        """Make the peers those of the configuration in force, and for some time those who have to learn that they
        are not in it.
        """
        nodes = self.configuration.nodes
        removals = {node: index for index, node in self._removals() if node in to_be_told}
        for node in sorted({*nodes, *removals} - {self.node_id}):
            if node not in leader.peers:
                leader.peers[node] = Progress(next_index=self.view.durable_index + 1)
                leader.news_at = self.now  # it has not heard of anything
        for node in nodes:
            leader.departing.pop(node, None)
        for node, index in sorted(removals.items()):
            leader.departing.setdefault(node, Departing(index, self.now + limits.DEPARTING_S_MAX))

    def _tell_removed(self, leader: Leader, node: NodeId) -> None:
        """Tell a node that it was removed: it stands for election, so it does not know."""
        if node not in leader.peers and any(node == removed for _, removed in self._removals()):
            self._meet_peers(leader, [node])

    def _removals(self) -> list[tuple[int, NodeId]]:
        """Return (index, node) for each node that a configuration of the kept log had and the one in force has not."""
        known = self.view.configurations
        current = {*self.configuration.nodes, self.node_id}
        found: dict[NodeId, int] = {}
        for (_, before), (index, after) in pairwise(known):
            for node in before.nodes:
                if node not in after.nodes and node not in current:
                    found[node] = index
        return sorted((index, node) for node, index in found.items())

    # --- taking in ---------------------------------------------------------------------------------------------------

    def _on_propose(self, proposal: Propose) -> None:
        leader = self.state
        if not isinstance(leader, Leader):
            self._refuse(proposal.token, Why.NOT_LEADER)
            return
        refusal = self._why_not(leader, proposal)
        if refusal is not None:
            self._refuse(proposal.token, *refusal)
            return
        kind = EntryKind.COMMAND if proposal.configuration is None else EntryKind.CONFIGURATION
        index = self._append_own(leader, kind, proposal.data, proposal.configuration)
        self._accepted.append(Accepted(proposal.token, index, self.term))

    def _why_not(self, leader: Leader, proposal: Propose) -> tuple[Why, str] | None:
        """Return why the proposal cannot be taken, None when it can."""
        proposed = len(proposal.data)
        if leader.transfer is not None:
            return Why.BUSY, "leadership is being handed over"
        if proposed > limits.ENTRY_BYTES_MAX:
            return Why.INVALID, f"an entry has at most {limits.ENTRY_BYTES_MAX} bytes, this one has {proposed}"
        if leader.uncommitted and leader.uncommitted_bytes + proposed > limits.UNCOMMITTED_BYTES_MAX:
            return Why.FULL, f"{leader.uncommitted_bytes} bytes are not committed"
        if proposal.configuration is None:
            return None
        if not self._term_settled(leader):
            return Why.BUSY, "no entry of this term is committed yet"
        if self.view.configuration_index > self.commit_index:
            return Why.BUSY, "another change of membership is not committed yet"
        why = self._why_no_step(proposal.configuration)
        return None if why is None else (Why.INVALID, why)

    def _why_no_step(self, wanted: Configuration) -> str | None:
        """Return why the configuration is not one step from the one in force: two majorities could miss each other."""
        nodes = wanted.nodes
        if not wanted.voters:
            return "a group has a voter"
        if len(set(nodes)) != len(nodes) or len(nodes) > limits.GROUP_NODES_MAX:
            return f"a node is either voter or learner, and there are at most {limits.GROUP_NODES_MAX}"
        if list(wanted.voters) != sorted(wanted.voters) or list(wanted.learners) != sorted(wanted.learners):
            return "voters and learners are sorted"
        changed = set(wanted.voters) ^ set(self.configuration.voters)
        if len(changed) > 1:
            return f"one voter more or less at a time, not {len(changed)}: {', '.join(sorted(changed))}"
        return None

    def _append_own(
        self, leader: Leader, kind: EntryKind, data: bytes = b"", configuration: Configuration | None = None
    ) -> int:
        entry = Entry(self.view.last_index + 1, self.term, kind, data, configuration)
        self.view.append((entry,))
        size = entry_bytes(entry)
        leader.uncommitted.append((entry.index, size))
        leader.uncommitted_bytes += size
        if configuration is not None:
            self._meet_peers(leader, list(leader.peers))
        return entry.index

    # --- calling committed -------------------------------------------------------------------------------------------

    def _advance(self, leader: Leader) -> None:
        self._maybe_commit(leader)
        if self.state is not leader:
            return
        if leader.reads:
            self._answer_reads(leader)
        if leader.transfer is not None:
            self._go_on_with_transfer(leader)
        if leader.departing:
            self._bid_farewell(leader)

    def _maybe_commit(self, leader: Leader) -> bool:
        """Move the commit index on if a majority holds more; return whether it did."""
        if self.commit_index == self.view.last_index:
            return False  # a late answer, as a rule
        index = self._held_by_majority(leader)
        if index <= self.commit_index or not self._may_commit(index):
            return False
        self.commit_index = index
        self._plan_news(leader)
        while leader.uncommitted and leader.uncommitted[0][0] <= index:
            leader.uncommitted_bytes -= leader.uncommitted.popleft()[1]
        if not self.is_voter and self.view.configuration_index <= index:
            leader.news_at = self.now  # the last that they hear of it
            self._replicate(leader)
            self._abdicate(leader, "this node was removed")
        return True

    def _may_commit(self, index: int) -> bool:
        """Whether what a majority holds at ``index`` is decided: only if the entry is of the own term."""
        return self.view.term_at(index) == self.hard_state.term

    def _bid_farewell(self, leader: Leader) -> None:
        """Forget removed nodes that know it, or that could not be told for long enough."""
        for node, departing in sorted(leader.departing.items()):
            peer = leader.peers[node]
            if (
                departing.told_round == 0
                and self.commit_index >= departing.index
                and peer.commit_sent >= departing.index
            ):
                departing.told_round = leader.round
            heard = 0 < departing.told_round < peer.acked_round and peer.match_index >= departing.index
            if heard or self.now >= departing.until:
                del leader.departing[node], leader.peers[node]

    # --- handing over ------------------------------------------------------------------------------------------------

    def _on_transfer(self, wish: Transfer) -> None:
        leader = self.state
        if not isinstance(leader, Leader):
            self._refuse(wish.token, Why.NOT_LEADER)
            return
        if leader.transfer is not None:
            self._refuse(wish.token, Why.BUSY, f"leadership is being handed over to {leader.transfer.target}")
            return
        target = wish.target if wish.target is not None else self._best_voter(leader)
        if target is None or target not in self.configuration.voters or target == self.node_id:
            self._refuse(wish.token, Why.INVALID, "there is no other voter" if target is None else "it is no voter")
            return
        if not leader.peers[target].trusted:
            self._refuse(wish.token, Why.INVALID, "it may not vote before it has caught up")
            return
        leader.transfer = Transferring(target, wish.token, self.now + self.timing.election_s_min)
        self._go_on_with_transfer(leader)

    def _best_voter(self, leader: Leader) -> NodeId | None:
        """Return the voter that holds most among those heard of last."""
        others = [
            (peer.acked_at >= self.now - self.timing.lease_s, peer.counted_index, node)
            for node, peer in sorted(leader.peers.items())
            if node in self.configuration.voters and peer.trusted and peer.acked_round
        ]
        return max(others, default=(False, 0, None), key=lambda other: other[:2])[2]

    def _go_on_with_transfer(self, leader: Leader) -> None:
        """Tell the target to campaign once it holds everything; the lease is given up before."""
        transfer = leader.transfer
        assert transfer is not None, "nothing is handed over"
        peer = leader.peers.get(transfer.target)
        if peer is not None and leader.leases and peer.match_index == self.view.last_index:
            self._send_timeout_now(leader, transfer.target)

    def _send_timeout_now(self, leader: Leader, target: NodeId) -> None:
        """Have the target campaign past all promises. It may do so at any time from now on: no lease in this term."""
        leader.leases = False
        self._say(target, TimeoutNow(self.group, self.term, self.node_id))

    def _end_transfer(self, leader: Leader, message: str) -> None:
        if leader.transfer is not None:
            token, leader.transfer = leader.transfer.token, None
            self._refuse(token, Why.BUSY, message)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _abdicate(self, leader: Leader, reason: str) -> None:
        """Give up leadership, to the best voter if there is one."""
        target = self._best_voter(leader)
        if target is not None:
            self._send_timeout_now(leader, target)
        self._become_follower(self.term, None, reason)

    def _leave_office(self, leader: Leader) -> None:
        self._fail_reads(leader)
        leader.transfer = None

    def _on_step_down(self, reason: str) -> None:
        if isinstance(self.state, Leader):
            self._abdicate(self.state, reason)

    def _tick_leader(self, leader: Leader) -> None:
        reason = self._why_to_leave(leader)
        if reason is not None:
            self._abdicate(leader, reason)
            return
        transfer = leader.transfer
        if transfer is not None and self.now >= transfer.until:
            self._end_transfer(leader, f"{transfer.target} has not taken over in time")
        self._bid_farewell(leader)
        if self.now >= leader.heartbeat_at:
            self._begin_round(leader)
            self._answer_reads(leader)
            if leader.transfer is not None and not leader.leases:
                self._send_timeout_now(leader, leader.transfer.target)

    def _why_to_leave(self, leader: Leader) -> str | None:
        """Return why this node should lead no longer, None when it may."""
        if self._disk_deadline() <= self.now:
            return "the own disk does not answer"
        if self._contact_deadline(leader) <= self.now:
            return "no contact with a majority"
        return None

    def _contact_deadline(self, leader: Leader) -> float:
        if len(self.view.configuration.voters) == 1:
            # Nobody else is asked: the time alone moves it. Else answers do, and each is counted when it comes.
            self._count_contact(leader)
        return max(leader.contact_at, leader.elected_at) + self.timing.election_s_min

    def _disk_deadline(self) -> float:
        since = self.persisting_since
        return float("inf") if since is None else since + self.timing.election_s_min

    def _leader_deadline(self, leader: Leader) -> float:
        deadline = min(leader.heartbeat_at, self._contact_deadline(leader))
        if self.persisting_since is not None:
            deadline = min(deadline, self._disk_deadline())
        elif leader.news_at < deadline:
            deadline = leader.news_at
        return deadline if leader.transfer is None else min(deadline, leader.transfer.until)
