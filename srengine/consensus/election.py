"""Who leads: campaigns, votes, promises, trust.

Before a node campaigns it asks who would vote for it (pre-vote); only with a majority it raises the term. So a node
that cannot win, because its log is old or because the others hear a leader, disturbs nobody however often it tries.

A vote is refused, without adopting its term, within a promise: a voter that has answered a heartbeat votes for nobody
for ``lease_s`` from its receipt, and a node that has just started not for ``lease_s`` from its start, since it may have
promised just before. ``transfer`` passes promises: the leader that they were given to has given its lease up for the
rest of its term before it sent the TimeoutNow, and no leader of an earlier term has one any more.
"""

from __future__ import annotations

from srengine import limits
from srengine.consensus import quorum
from srengine.consensus.effects import Hint
from srengine.consensus.entries import HardState
from srengine.consensus.leading import Leading
from srengine.consensus.messages import TimeoutNow, Vote, VoteReply
from srengine.consensus.quorum import Outcome
from srengine.consensus.roles import Candidate, Follower, Leader, PreCandidate
from srengine.types import NodeId


class Election(Leading):
    """Both sides of `Vote`."""

    # --- standing ----------------------------------------------------------------------------------------------------

    def _may_campaign(self) -> bool:
        """Whether this node may stand: it counts, it may vote for itself, and it holds what it says it holds."""
        ready = self.installing is None and self.persisting_since is None
        return self._is_eligible() and self.trusted and ready and self.held >= self.held_least

    def _is_eligible(self) -> bool:
        """Whether the group may need this node to lead.

        So it does, too, when the configuration that removes it is in its log but perhaps not committed: the others may
        have too little to win (thesis, 4.2.2).
        """
        configurations = self.view.configurations
        undecided = self.view.configuration_index > self.commit_index and len(configurations) > 1
        return self.is_voter or (undecided and self.node_id in configurations[-2][1].voters)

    def _tick_follower(self, state: Follower | PreCandidate | Candidate) -> None:
        if self.now < state.campaign_at or self.persisting_since is not None:
            return
        if not self._may_campaign():
            self._become_follower(self.term, None, "no leader heard")
        elif self._promised():
            state.campaign_at = self.promise_until
        else:
            self._campaign(max(state.early_campaigns - 1, 0))

    def _campaign(self, early_campaigns: int) -> None:
        """Ask who would vote for this node in the next term."""
        if self.configuration.voters == (self.node_id,):
            self._stand(early_campaigns, transfer=False)
            return
        self.state = PreCandidate({self.node_id: True}, self._campaign_again_at(early_campaigns), early_campaigns)
        self._announce("no leader heard")
        self._ask_for_votes(self.term + 1, pre=True)

    def _stand(self, early_campaigns: int, *, transfer: bool) -> None:
        """Raise the term and stand for election in it."""
        self.hard_state = HardState(self.term + 1, self.node_id)
        self.state = Candidate(
            {self.node_id: True}, self._campaign_again_at(early_campaigns), early_campaigns, transfer=transfer
        )
        self._announce("stands for election")
        self._ask_for_votes(self.term, transfer=transfer)
        self._count_votes()

    def _campaign_again_at(self, early_campaigns: int) -> float:
        return self.now + (self._draw_soon() if early_campaigns else self._draw_timeout())

    def _ask_for_votes(self, term: int, *, pre: bool = False, transfer: bool = False) -> None:
        for voter in self.configuration.voters:
            if voter != self.node_id:
                message = Vote(
                    self.group,
                    term,
                    self.node_id,
                    self.view.last_index,
                    self.view.last_term,
                    pre=pre,
                    transfer=transfer,
                )
                self._say(voter, message)

    def _on_hint(self, hint: Hint) -> None:
        """Do not wait for the time-out, only for the promise: the leader is probably dead."""
        state = self.state
        if isinstance(state, Follower) and state.leader == hint.peer and self._may_campaign():
            spread = self._random.uniform(0, 1) * self.timing.heartbeat_s
            state.campaign_at = min(state.campaign_at, max(self.now, self.promise_until) + spread)
            state.early_campaigns = limits.EARLY_CAMPAIGNS_MAX

    def _on_timeout_now(self, message: TimeoutNow) -> None:
        """Campaign for the leader that hands over: no pre-vote, no promise stands in the way."""
        if message.term != self.term or not isinstance(self.state, Follower) or self.state.leader != message.sender:
            self._drop("late")
        elif self._may_campaign():
            self._stand(limits.EARLY_CAMPAIGNS_MAX, transfer=True)

    # --- voting ------------------------------------------------------------------------------------------------------

    def _on_vote(self, message: Vote) -> None:
        if isinstance(self.state, Leader):
            self._tell_removed(self.state, message.sender)
        if message.pre:
            granted = self._would_vote(message)
            self._reply_vote(message, granted=granted, term=message.term if granted else self.term)
            return
        if not self._may_vote(message):
            self._reply_vote(message, granted=False, term=self.term)
            return
        if message.term > self.term:
            self._become_follower(message.term, None, f"{message.sender} stands for election")
        granted = self._vote_is_free(message) and self._is_up_to_date(message)
        if granted:
            self._vote_for(message)
        self._reply_vote(message, granted=granted, term=self.term)

    def _would_vote(self, message: Vote) -> bool:
        """Whether a vote would be given, were it asked for."""
        return self._may_vote(message) and message.term > self.term and self._is_up_to_date(message)

    def _may_vote(self, message: Vote) -> bool:
        """Whether a vote may be given at all, or the term of one adopted."""
        if not self._is_current(message) or not self.trusted:
            return False
        if message.transfer and not message.pre:
            return True
        return not self._promised() and not self._has_lease()

    def _is_current(self, message: Vote) -> bool:
        """Whether the candidate's term is not over."""
        return message.term >= self.term

    def _promised(self) -> bool:
        """Whether somebody may count on this node voting for nobody."""
        return self.now < self.promise_until

    def _has_lease(self) -> bool:
        """Whether this node itself leads with a lease, of which its own vote is a part."""
        return isinstance(self.state, Leader) and self._lease_until(self.state) > self.now

    def _vote_is_free(self, message: Vote) -> bool:
        """Whether the vote of this term is not given to anybody else."""
        return self.hard_state.vote in {"", message.sender} and self.leader is None

    def _is_up_to_date(self, message: Vote) -> bool:
        """Whether the candidate holds at least what this node holds, or should hold, hence everything committed."""
        return (message.last_term, message.last_index) >= max(self.held, self.held_least)

    def _vote_for(self, message: Vote) -> None:
        self.hard_state = HardState(self.term, message.sender)
        if isinstance(self.state, Follower):
            self.state.campaign_at = self.now + self.state.timeout_s

    def _reply_vote(self, message: Vote, *, granted: bool, term: int) -> None:
        self._say(message.sender, VoteReply(self.group, term, self.node_id, granted=granted, pre=message.pre))

    # --- counting ----------------------------------------------------------------------------------------------------

    def _on_vote_reply(self, message: VoteReply) -> None:
        match self.state:
            case PreCandidate(votes=votes) if message.pre and (not message.granted or message.term == self.term + 1):
                self._note_vote(votes, message)
            case Candidate(votes=votes) if not message.pre and message.term == self.term:
                self._note_vote(votes, message)
            case _:
                self._drop("late")

    def _note_vote(self, votes: dict[NodeId, bool], message: VoteReply) -> None:
        """Note an answer. A vote stays: a refusal may answer a question of an earlier term, and name this one."""
        votes[message.sender] = message.granted or votes.get(message.sender, False)
        self._count_votes()

    def _count_votes(self) -> None:
        state = self.state
        assert isinstance(state, PreCandidate | Candidate), state
        match quorum.vote(self.configuration.voters, state.votes), state:
            case Outcome.WON, PreCandidate():
                if self._promised():
                    self._become_follower(self.term, None, "promised meanwhile")
                else:
                    self._stand(state.early_campaigns, transfer=False)
            case Outcome.WON, Candidate():
                self._become_leader("elected")
            case Outcome.LOST, _:
                self._become_follower(self.term, None, "not elected", early_campaigns=state.early_campaigns)
            case _:
                pass

    # --- trust -------------------------------------------------------------------------------------------------------

    def _on_trust(self, *, trusted: bool, held: tuple[int, int]) -> None:
        """`Trust`: what the services above found out about this directory."""
        self.held_least = held
        if trusted == self.trusted:
            return
        self.trusted = trusted
        self.nonce = 0 if trusted else self._draw_nonce()
        if trusted or isinstance(self.state, Follower):
            return
        if isinstance(self.state, Leader):
            self._abdicate(self.state, "this directory is not trusted")
        else:
            self._become_follower(self.term, None, "this directory is not trusted")
