"""What holds for the backend ``etcd`` alone: it depends on etcd, not on the other nodes."""

from __future__ import annotations

import asyncio

import pytest

from srengine import errors
from srengine.ha.journal import Command
from srengine.ha.protocol import Role
from tests.ha.contract.clusters import until

pytestmark = pytest.mark.backends("etcd")


def set_to(body: bytes, **more) -> Command:
    return Command("test.set", body, **more)


def test_a_leader_cut_off_from_etcd_stops_acting_before_another_begins(on):
    """H06, H09, F23: the leader loses etcd and the others; it acknowledges nothing and says UNKNOWN; another one leads
    with a later epoch; healed, it follows, and all are equal.
    """

    async def scenario(cluster):
        old = await cluster.leader()
        await old.protocol.propose(set_to(b"before"))
        epoch = old.protocol.epoch
        cluster.isolate(old.name)
        late = asyncio.create_task(old.protocol.propose(set_to(b"late", epoch=epoch), timeout_s=5.0))
        others = [node for node in cluster.nodes.values() if node is not old]
        acted = []

        def replaced() -> bool:
            acted.append((old.protocol.epoch, sum(node.protocol.epoch for node in others)))
            return any(node.leads for node in others)

        await until(replaced)
        assert not [both for both in acted if all(both)], "two nodes acted at the same moment"
        with pytest.raises((errors.StaleEpoch, errors.NoQuorum, errors.TimedOut)):
            await late
        new = next(node for node in others if node.leads)
        assert new.protocol.epoch > epoch
        await new.protocol.propose(set_to(b"after"))
        assert old.protocol.observed.role is Role.UNKNOWN
        cluster.heal()
        await until(lambda: old.protocol.observed.role is Role.FOLLOWER)
        await cluster.equal()
        assert old.rows() == new.rows() == [b"before", b"after"]

    on(scenario)


def test_a_follower_cut_off_from_etcd_disturbs_nobody(on):
    """H08, F24: a follower without etcd is UNKNOWN and not current; the leader stays, its term too; healed, the
    follower has what it missed.
    """

    async def scenario(cluster):
        leader = await cluster.leader()
        follower = await cluster.follower()
        term = leader.protocol.observed.term
        cluster.isolate(follower.name)
        for number in range(10):
            await leader.protocol.propose(set_to(b"%d" % number))
        await until(lambda: follower.protocol.observed.role is Role.UNKNOWN)
        assert not follower.protocol.current
        assert follower.rows() == []
        cluster.heal()
        await cluster.equal()
        await until(lambda: follower.protocol.current)
        assert len(follower.rows()) == 10
        assert (leader.protocol.observed.role, leader.protocol.observed.term) == (Role.LEADER, term)

    on(scenario)


def test_one_node_is_enough(on):
    """H09 is etcd's business here: the last node goes on alone, because etcd has the quorum."""

    async def scenario(cluster):
        first = await cluster.leader()
        await first.protocol.propose(set_to(b"1"))
        await cluster.stop_node(first.name)
        second = await cluster.leader(but=first.name)
        await cluster.stop_node(second.name)
        last = await cluster.leader(but=second.name)
        await last.protocol.propose(set_to(b"2"))
        assert last.rows() == [b"1", b"2"]

    on(scenario)


def test_etcd_comes_back(on):
    """B20: etcd is killed and started again: what was acknowledged is there, and a later epoch goes on."""

    async def scenario(cluster):
        leader = await cluster.leader()
        await leader.protocol.propose(set_to(b"1"))
        epoch = leader.protocol.epoch
        (server,) = cluster.etcd.servers
        server.kill()
        await until(lambda: all(node.protocol.observed.role is Role.UNKNOWN for node in cluster.nodes.values()))
        await asyncio.to_thread(lambda: server.start().wait_healthy())
        again = await cluster.leader()
        assert again.protocol.epoch > epoch
        await again.protocol.propose(set_to(b"2"))
        await cluster.equal()
        assert again.rows() == [b"1", b"2"]

    on(scenario)
