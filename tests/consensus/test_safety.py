"""Storms over a group: what must hold, holds; and the storm is wild enough to find what is broken."""

from __future__ import annotations

import pytest

from srengine.consensus.machine import RaftMachine
from srengine.consensus.roles import Leader
from tests.consensus import breakages
from tests.consensus.storm import weather


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_storm_breaks_no_promise(first):
    """F21, F23, F24, F27, F29: ten storms of faults: safe all the time, and at work again afterwards."""
    decided = terms = 0
    for seed in range(first, first + 10):
        storm = weather(seed)
        decided += storm.committed
        terms += len(storm.leaders_of)
    assert decided > 50
    assert terms > 10


@pytest.mark.parametrize(
    "kind",
    [
        breakages.VotesTwice,
        breakages.VotesForShorterLogs,
        breakages.CommitsWithoutMajority,
        breakages.WinsWithHalf,
        breakages.DoesNotCheckThePlaceBefore,
        breakages.BelievesEveryCommitIndex,
        breakages.TrustsItself,
    ],
)
def test_storm_finds_a_broken_rule(kind):
    """A machine that breaks one rule does not get through 150 storms: a promise is broken, or an assertion stops it."""
    with pytest.raises(AssertionError):
        for seed in range(150):
            weather(seed, kind)


class Watched(RaftMachine):
    """Sees to it that a tick before the deadline does nothing, on which a driver relies that leaves it out."""

    quiet = 0

    def tick(self, now: float) -> None:
        early = now < self.next_deadline
        before = self.seen()
        super().tick(now)
        if early:
            Watched.quiet += 1
            assert self.seen() == before

    def seen(self) -> tuple:
        """Everything that a tick may change but the time, and removed nodes that need not be told any more: those may
        wait for the next heartbeat.
        """
        said = (self._send, self._reads, self._roles, self._refused, self._accepted)
        place = (self.hard_state, self.commit_index, self.view.last_index, self.promise_until, self._install)
        own = ()
        if isinstance(self.state, Leader):
            own = (self.state.round, self.state.transfer, self.state.leases, self.state.heartbeat_at)
        asked = None if self._inquiry is None else (self._inquiry.number, tuple(self._inquiry.tokens))
        return id(self.state), tuple(map(tuple, said)), place, own, asked, tuple(self._unasked)


def test_time_alone_does_nothing_before_the_deadline():
    """`tick` before `next_deadline` is `pass_time`, in any state that a storm brings about."""
    for seed in range(40):
        weather(seed, Watched, steps=300)
    assert Watched.quiet > 10_000
