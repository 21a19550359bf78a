"""What it takes to fence: counted in durable transactions, because time is the machine's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest

from srengine.consensus.driver import Driver
from srengine.ha.backends.raft_leading import Leading
from srengine.ha.epochs import claim, newest_epoch
from srengine.ha.protocol import Fencing
from srengine.storage.logged import LoggedStore
from srengine.storage.metadata import MetadataStore
from tests.ha.contract.clusters import until

pytestmark = pytest.mark.backends("raft")

LEADERSHIPS = 3


@dataclass(frozen=True)
class Cost:
    """Turns of a node's log; durable transactions of the node, of its log and of its state; reads of its leader."""

    turns: float
    transactions: int
    reads: int

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.turns - other.turns, self.transactions - other.transactions, self.reads - other.reads)


@pytest.fixture
def fenced(monkeypatch) -> list[Cost]:
    """Count what happens on a node while it fences, from the election on; each success adds one."""
    found: list[Cost] = []
    transactions: Counter[str] = Counter()
    reads: Counter[str] = Counter()
    try_fence, read_index = Leading.try_fence, Driver.read_index

    def counting(begin):
        def counted(self, *change):
            transactions[self.path.parent.name] += 1
            return begin(self, *change)

        return counted

    async def counted_read(self, *args, **options):
        reads[self.node] += 1
        return await read_index(self, *args, **options)

    async def measured(self) -> Fencing:
        def now() -> Cost:
            return Cost(
                self._around.metrics.value("srengine_consensus_turns_total"),
                transactions[self._around.name],
                reads[self._around.node_id],
            )

        elected = now()
        status = await try_fence(self)
        if status is Fencing.SUCCESS:
            found.append(now() - elected)
        return status

    # Flushes of the state are nobody's wait: here they would be counted where they happen to fall.
    monkeypatch.setattr("srengine.consensus.applying.FLUSH_S", 1000)
    for store, begin in ((MetadataStore, "transaction"), (LoggedStore, "transaction"), (LoggedStore, "begin")):
        monkeypatch.setattr(store, begin, counting(getattr(store, begin)))
    monkeypatch.setattr(Driver, "read_index", counted_read)
    monkeypatch.setattr(Leading, "try_fence", measured)
    return found


@pytest.mark.parametrize("count", [1, 3])
def test_fencing_costs_one_turn_of_the_log(on, fenced, count):
    """B08: an epoch is decided together with the first entry of its term: one turn of the leader's log, no other
    transaction, no round of reading. A node alone knows that it leads when its vote is durable: a second turn.
    """

    async def scenario(cluster):
        for number in range(1, LEADERSHIPS + 1):
            leader = await cluster.leader()
            assert leader.protocol.epoch == number
            assert len(fenced) == number
            await leader.protocol.resign("the next one")
            await until(lambda leader=leader: not leader.leads)

    on(scenario, count)
    most = 2 if count == 1 else 1
    for each in fenced[:LEADERSHIPS]:
        assert 1 <= each.turns <= most, fenced
        assert 1 <= each.transactions <= most, fenced
        assert each.reads == 0, fenced


def test_a_claim_on_an_old_state_is_made_again(on, fenced, monkeypatch):
    """B03: the first claim of a term does not wait for what the log holds. When the number turns out to be taken, all
    that is committed is applied, and the next number is claimed: no leader gives up because it was quick.
    """
    seen: list[int] = []

    def claim_of(rows, **who):
        number, _ = newest_epoch(rows)
        seen.append(number)
        if len(seen) in {2, 4}:  # the first claim of the second and of the third leadership: as if it had seen nothing
            return claim(Nothing(), **who)
        return claim(rows, **who)

    class Nothing:
        def get(self, table, key):
            return None

    monkeypatch.setattr("srengine.ha.backends.raft_leading.claim", claim_of)

    async def scenario(cluster):
        for number in range(1, LEADERSHIPS + 1):
            leader = await cluster.leader()
            assert leader.protocol.epoch == number
            await leader.protocol.resign("the next one")
            await until(lambda leader=leader: not leader.leads)

    on(scenario, 3)
    assert seen[:5] == [0, 1, 1, 2, 2]
    assert [each.reads for each in fenced[:LEADERSHIPS]] == [0, 1, 1]
