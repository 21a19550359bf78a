"""What it takes to fence: counted in durable transactions, because time is the machine's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest

from srengine.ha.backends.raft_leading import Leading
from srengine.ha.messages import JOURNAL_GROUP
from srengine.ha.protocol import Fencing
from srengine.storage import MetadataStore
from tests.ha.contract.clusters import until

pytestmark = pytest.mark.backends("raft")

LEADERSHIPS = 3


@dataclass(frozen=True)
class Cost:
    """Turns of a node's log, and durable transactions of the node: of its log and of its state."""

    turns: float
    transactions: int

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.turns - other.turns, self.transactions - other.transactions)

    def within(self, turns: int, transactions: int) -> bool:
        return 1 <= self.turns <= turns and 1 <= self.transactions <= transactions


@dataclass(frozen=True)
class Fenced:
    """``whole``: from the election on. ``epoch``: from when the first entry of the term was applied."""

    whole: Cost
    epoch: Cost


@pytest.fixture
def fenced(monkeypatch) -> list[Fenced]:
    """Count what happens on a node while it fences; each success adds one."""
    found: list[Fenced] = []
    transactions: Counter[str] = Counter()
    begin, try_fence = MetadataStore.transaction, Leading.try_fence

    def counted(self):
        transactions[self.path.parent.name] += 1
        return begin(self)

    async def measured(self) -> Fencing:
        def now() -> Cost:
            return Cost(self._around.metrics.value("srengine_consensus_turns_total"), transactions[self._around.name])

        elected = now()
        await self._driver.read_index(JOURNAL_GROUP)
        applied = now()
        status = await try_fence(self)
        if status is Fencing.SUCCESS:
            found.append(Fenced(now() - elected, now() - applied))
        return status

    # Flushes of the state are nobody's wait: here they would be counted where they happen to fall.
    monkeypatch.setattr("srengine.consensus.applying.FLUSH_S", 1000)
    monkeypatch.setattr(MetadataStore, "transaction", counted)
    monkeypatch.setattr(Leading, "try_fence", measured)
    return found


@pytest.mark.parametrize("count", [1, 3])
def test_fencing_costs_one_turn_of_the_log(on, fenced, count):
    """B08: an epoch costs its leader one turn of the log and no other transaction; together with the first entry of the
    term, which must be applied before, twice that. Alone and with others that must answer.
    """

    async def scenario(cluster):
        for number in range(1, LEADERSHIPS + 1):
            leader = await cluster.leader()
            assert leader.protocol.epoch == number
            assert len(fenced) == number
            await leader.protocol.resign("the next one")
            await until(lambda leader=leader: not leader.leads)

    on(scenario, count)
    for each in fenced[:LEADERSHIPS]:
        assert each.epoch.within(turns=1, transactions=1), fenced
        assert each.whole.within(turns=2, transactions=2), fenced
