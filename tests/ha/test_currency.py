"""Whether a node has lately applied what is committed."""

from __future__ import annotations

from srengine import limits
from srengine.ha.backends.raft_currency import Currency


class Node:
    """A node whose time and indexes a test sets."""

    def __init__(self) -> None:
        self.now = 100.0
        self.committed = self.applied = 7
        self.reads_whole = False
        self.currency = Currency(lambda: self.committed, lambda: self.applied, lambda: self.reads_whole, self)

    def boottime_s(self) -> float:
        return self.now

    def passes(self, seconds: float, *, committing: int = 0) -> None:
        """Let time pass, with a look every quarter of a second; ``committing`` entries are committed at each."""
        for _ in range(int(seconds / 0.25)):
            self.now += 0.25
            self.committed += committing
            self.currency.look()

    @property
    def current(self) -> bool:
        return self.currency.within(limits.STALENESS_S_MAX)


def test_an_entry_that_is_being_applied_does_not_make_a_node_stale():
    """H17: a node is current while what it lacks was committed a moment ago, also after a long calm."""
    node = Node()
    node.passes(3600)
    node.committed += 1
    assert node.current
    node.passes(limits.STALENESS_S_MAX - 0.25)
    assert node.current
    node.passes(0.5)
    assert not node.current
    node.applied += 1
    assert node.current


def test_a_node_that_lags_a_little_for_ever_is_current():
    """H17: under load a node is always a few entries behind; that is no staleness while each is applied in time."""
    node = Node()
    node.currency.look()
    for _ in range(100):
        node.passes(0.25, committing=10)
        node.applied = node.committed - 10
        assert node.current


def test_a_node_that_lags_much_is_stale_though_it_applies():
    """H17: a node that applies all the time, and is ten seconds behind all the time, is not current."""
    node = Node()
    node.passes(10, committing=10)
    for _ in range(100):
        node.passes(0.25, committing=10)
        node.applied += 10
        assert not node.current


def test_a_node_that_applies_nothing_stands_still():
    """H17: nothing was applied although something is committed; neither calm nor a long backlog is that."""
    node = Node()
    node.passes(3600)
    assert not node.currency.still
    node.committed += 1000
    for _ in range(100):
        node.passes(1)
        node.applied += 1
        assert not node.currency.still
    node.now += 3600
    node.currency.look()
    assert not node.currency.still, "the process was stopped for an hour"
    node.passes(limits.STALENESS_S_MAX + 0.5)
    assert node.currency.still
    node.applied += 1
    node.currency.look()
    assert not node.currency.still


def test_a_node_that_reads_its_whole_state_does_not_stand_still():
    """H17, H27: a digest of a large state makes applying wait: the node is not current, but no leader gives up."""
    node = Node()
    node.committed += 1
    node.reads_whole = True
    node.passes(60)
    assert not node.current
    assert not node.currency.still
    node.reads_whole = False
    node.passes(60)
    assert node.currency.still
