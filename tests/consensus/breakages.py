"""Deliberate breakages of the machine, one rule each: a test that cannot find them proves nothing."""

from __future__ import annotations

from srengine.consensus.entries import HardState
from srengine.consensus.machine import RaftMachine


class VotesTwice(RaftMachine):
    """Gives its vote of a term to whoever asks."""

    def _vote_is_free(self, message):
        return self.leader is None


class ForgetsItsVote(RaftMachine):
    """Does not make its vote durable."""

    def _vote_for(self, message):
        super()._vote_for(message)
        self._durable_state = self.hard_state


class VotesForShorterLogs(RaftMachine):
    """Does not look at the candidate's log."""

    def _is_up_to_date(self, message):
        return True


class VotesByLengthAlone(RaftMachine):
    """Compares how long logs are, not the terms of their last entries."""

    def _is_up_to_date(self, message):
        return message.last_index >= self.view.last_index


class FollowsOldTerms(RaftMachine):
    """Takes entries of a leader whose term is over."""

    def _is_over(self, message):
        return False

    def _adopt_term(self, term):
        if term != self.term:
            self.hard_state = HardState(term)


class CommitsByCountAlone(RaftMachine):
    """Calls entries of earlier terms committed when a majority holds them."""

    def _may_commit(self, index):
        return True


class CommitsWithoutMajority(RaftMachine):
    """Counts one node less."""

    def _held_by_majority(self, leader):
        held = [self.view.durable_index, *(peer.counted_index for _, peer in sorted(leader.peers.items()))]
        return sorted(held, reverse=True)[max(len(self.configuration.voters) // 2 - 1, 0)]


class WinsWithHalf(RaftMachine):
    """Takes half of the votes, rounded down, for a majority."""

    def _count_votes(self):
        voters = self.configuration.voters
        given = sum(self.state.votes.get(voter, False) for voter in voters)
        if given >= max(len(voters) // 2, 1) and type(self.state).__name__ == "Candidate":
            self._become_leader("elected by half")
        else:
            super()._count_votes()


class DoesNotCheckThePlaceBefore(RaftMachine):
    """Appends whatever comes, without looking whether the logs are equal before it."""

    def _fits(self, index, term):
        return index <= self.view.last_index


class BelievesEveryCommitIndex(RaftMachine):
    """Takes the leader's commit index for all it holds, instead of what the message proved to be equal."""

    def _learn_commit(self, index):
        super()._learn_commit(min(self.view.last_index, index + 3))


class BreaksItsPromise(RaftMachine):
    """Votes while somebody counts on it not to."""

    def _promised(self):
        return False


class ReadsWithoutAsking(RaftMachine):
    """Answers reads at once, confirmed by nobody."""

    def _confirmed_round(self, leader):
        return leader.round


class ReadsBeforeTheTermIsSettled(RaftMachine):
    """Answers reads with the commit index that it had as a follower."""

    def _term_settled(self, leader):
        return True


class CountsItsLeaseFromReceipt(RaftMachine):
    """Counts the lease from the answer instead of from the question."""

    def _hear_round(self, leader, peer, number):
        super()._hear_round(leader, peer, number)
        peer.acked_at = self.now


class KeepsItsLeaseWhileHandingOver(RaftMachine):
    """Sends TimeoutNow and goes on to read under its lease."""

    def _send_timeout_now(self, leader, target):
        super()._send_timeout_now(leader, target)
        leader.leases = True


class ChangesTwoVotersAtOnce(RaftMachine):
    """Takes any configuration."""

    def _why_no_step(self, wanted):
        return None if wanted.voters else "a group has a voter"


class ChangesWithoutWaiting(RaftMachine):
    """Changes the configuration while another change is not committed, and before it has committed anything."""

    def _why_not(self, leader, proposal):
        refusal = super()._why_not(leader, proposal)
        return None if refusal is not None and refusal[0].name == "BUSY" and leader.transfer is None else refusal


class TrustsItself(RaftMachine):
    """Votes although its directory was put back."""

    def __init__(self, **given):
        super().__init__(**{**given, "trusted": True})


class CountsTheUntrusted(RaftMachine):
    """Counts what an untrusted node acknowledges."""

    def _hear_match(self, peer, message):
        super()._hear_match(peer, message)
        peer.counted_index = max(peer.counted_index, peer.match_index)


class ForgetsWhatOthersHold(RaftMachine):
    """Votes and stands again as if no voter held more than an older directory."""

    def _on_trust(self, *, trusted, held):
        super()._on_trust(trusted=trusted, held=(0, 0))


class TrustsWithoutBarrier(RaftMachine):
    """Trusts itself as soon as it has caught up with any leader."""

    def _is_proved(self, message, match_index):
        return not self.trusted and match_index >= message.commit_index


class AnswersOldTermsWithTheirRound(RaftMachine):
    """Echoes the round of a heartbeat whose term is over."""

    def _refuse_term(self, message):
        self._reply(message, success=False)


ALL = [
    kind
    for kind in list(globals().values())
    if isinstance(kind, type) and issubclass(kind, RaftMachine) and kind is not RaftMachine
]
