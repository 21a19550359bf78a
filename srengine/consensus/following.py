"""What a node does with what its leader says: entries, heartbeats, the offer of a state.

Every answer is sent after everything it says is durable, since it leaves in the same `Effects` as what has to be
persisted. Entries that are known to be committed are never replaced, whatever a message says.
"""

from __future__ import annotations

from srengine.consensus.effects import InstallState
from srengine.consensus.election import Election
from srengine.consensus.entries import Entry, Floor, HardState
from srengine.consensus.messages import Append, AppendReply, Install
from srengine.consensus.roles import Follower


class Following(Election):
    """The follower's side of `Append` and `Install`."""

    # --- whom to follow ----------------------------------------------------------------------------------------------

    def _follow(self, message: Append | Install) -> bool:
        """Take the sender for the leader of its term, or answer that it is not; return whether it is."""
        if self._is_over(message):
            self._refuse_term(message)
            return False
        if message.term == self.hard_state.term and self.leader not in {None, message.sender}:
            # Two leaders in one term, or a member that lies.
            self._drop("second leader")
            return False
        if message.term > self.hard_state.term or not isinstance(self.state, Follower):
            self._become_follower(message.term, message.sender, "a leader was heard")
        state = self.state
        assert isinstance(state, Follower), state
        if not self.trusted and not self.hard_state.vote:
            # So that its forgotten vote of this term is not given a second time: see `machine`, "Trust".
            self.hard_state = HardState(self.term, message.sender)
        state.round = max(state.round, message.round)
        state.campaign_at = self.now + state.timeout_s
        state.early_campaigns = 0
        self._promise()
        if state.leader is None:
            state.leader = message.sender
            self._announce("a leader was heard")
        return True

    def _is_over(self, message: Append | Install) -> bool:
        """Whether the sender's term is over."""
        return message.term < self.term

    def _promise(self) -> None:
        """Vote for nobody for a while: the answer says so."""
        self.promise_until = max(self.promise_until, self.now + self.timing.lease_s)

    def _refuse_term(self, message: Append | Install) -> None:
        """Answer a leader whose term is over, so that it stands back.

        NB: round 0, not the one that it asked with. It may lead the later term by now, and would take the answer for
        one to a round of that term, hence for a promise that was never given.
        """
        reply = AppendReply(
            group=self.group,
            term=self.term,
            sender=self.node_id,
            success=False,
            match_index=0,
            round=0,
            votes=self.trusted,
            nonce=self.nonce,
        )
        self._say(message.sender, reply)

    def _reply(
        self,
        message: Append | Install,
        *,
        success: bool,
        match_index: int = 0,
        conflict_term: int = 0,
    ) -> None:
        reply = AppendReply(
            group=self.group,
            term=self.term,
            sender=self.node_id,
            success=success,
            match_index=match_index,
            round=message.round,
            previous_index=message.previous_index if isinstance(message, Append) else 0,
            conflict_term=conflict_term,
            votes=self.trusted,
            nonce=self.nonce,
        )
        self._say(message.sender, reply)

    # --- entries -----------------------------------------------------------------------------------------------------

    def _on_append(self, message: Append) -> None:
        if not self._follow(message):
            return
        previous_index, entries = message.previous_index, message.entries
        floor = self.view.floor
        match_index = previous_index + len(entries)
        if previous_index < floor.index:
            # What is trimmed here is applied, hence equal.
            entries = entries[floor.index - previous_index :]
            previous_index = floor.index
            match_index = max(match_index, floor.index)
        elif not self._fits(previous_index, message.previous_term):
            self._refuse_append(message)
            return
        fresh = self._fresh(entries)
        if fresh and fresh[0].index <= self.commit_index:
            self._drop("contradicts committed")
            return
        if fresh:
            before = self.view.configuration
            self.view.append(fresh)
            if self.view.configuration is not before:
                self._announce("the configuration changed")
        self._learn_commit(min(message.commit_index, match_index))
        self._regain_trust(message, match_index)
        self._reply(message, success=True, match_index=match_index)

    def _fits(self, index: int, term: int) -> bool:
        """Whether this log has an entry of ``term`` at ``index``: then both are equal up to there."""
        return self.view.term_at(index) == term

    def _refuse_append(self, message: Append) -> None:
        """Say where the logs may still be equal."""
        if message.previous_index <= self.commit_index:
            self._drop("contradicts committed")
            return
        place = self.view.fitting(min(message.previous_index, self.view.last_index), message.previous_term)
        term = self.view.term_at(place)
        assert term is not None, (place, self.view.floor)
        self._reply(message, success=False, match_index=place, conflict_term=term)

    def _fresh(self, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        """Return the entries from the first that this log has not, or has another one for."""
        for position, entry in enumerate(entries):
            if self.view.term_at(entry.index) != entry.term:
                return entries[position:]
        return ()

    def _learn_commit(self, index: int) -> None:
        self.commit_index = max(self.commit_index, index)

    def _regain_trust(self, message: Append, match_index: int) -> None:
        """Vote again if the leader proves that nothing this node may have forgotten matters any more."""
        if self._is_proved(message, match_index):
            self.trusted = True
            self.nonce = 0

    def _is_proved(self, message: Append, match_index: int) -> bool:
        """Whether the message proves it: see `machine`, "Trust"."""
        if self.trusted or message.nonce != self.nonce:
            return False
        return 0 < message.barrier <= min(match_index, message.commit_index)

    # --- state -------------------------------------------------------------------------------------------------------

    def _on_install(self, message: Install) -> None:
        if not self._follow(message):
            return
        if message.index <= self.commit_index or self._fits(message.index, message.index_term):
            self._learn_commit(message.index)
            self._reply(message, success=True, match_index=message.index)
            return
        if self.installing is None:
            self.installing = message
            floor = Floor(message.index, message.index_term, message.configuration)
            self._install = InstallState(message.sender, floor, message.reference)
        self._reply(message, success=True, match_index=0)

    def _on_installed(self, floor: Floor) -> None:
        """`Installed`: the state is in place; tell the leader at once."""
        self.installing = None
        self._install = None
        self.view.installed(floor)
        self._learn_commit(floor.index)
        self.handed_index = max(self.handed_index, floor.index)
        self.applied_index = max(self.applied_index, floor.index)
        self._handed.drop(floor.index)
        self._announce("the configuration changed")
        state = self.state
        if isinstance(state, Follower) and state.leader is not None:
            reply = AppendReply(
                group=self.group,
                term=self.term,
                sender=self.node_id,
                success=True,
                match_index=floor.index,
                round=state.round,
                votes=self.trusted,
                nonce=self.nonce,
            )
            self._say(state.leader, reply)

    def _on_install_failed(self, index: int) -> None:
        """`InstallFailed`: the next offer is taken again."""
        if self.installing is not None and self.installing.index == index:
            self.installing = None
