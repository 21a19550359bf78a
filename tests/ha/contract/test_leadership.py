"""What every backend does about leadership: one, fenced, found from everywhere, handed over, never split."""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec
import pytest

from srengine import errors
from srengine.ha import epochs as e
from srengine.ha.journal import Command
from srengine.ha.protocol import Role
from tests.ha.contract.clusters import until


def set_to(body: bytes, **more) -> Command:
    return Command("test.set", body, **more)


def test_one_node_leads_under_epoch_one(on):
    """H01: a new cluster elects one leader by itself, which owns epoch 1; the others follow and know it."""

    async def scenario(cluster):
        leader = await cluster.leader()
        assert leader.protocol.epoch >= 1
        assert leader.admission.epoch == leader.protocol.epoch
        for node in cluster.nodes.values():
            await until(lambda node=node: node.protocol.observed.leader == leader.name)
            assert await node.protocol.get_leader_name() == leader.name
            assert await node.protocol.get_leader() == node.member(leader.name).address
            assert await node.protocol.get_latest_epoch() == leader.protocol.epoch
            if node is not leader:
                assert (node.protocol.epoch, node.leads) == (0, False)
                await until(lambda node=node: node.roles.role is Role.FOLLOWER)

    on(scenario)


def test_a_dead_leader_is_replaced_under_a_later_epoch(on):
    """H01, H11: another node leads, under a later epoch, and everything acknowledged is there."""

    async def scenario(cluster):
        first = await cluster.leader()
        epoch = first.protocol.epoch
        for number in range(5):
            await first.protocol.propose(set_to(b"%d" % number))
        await cluster.stop_node(first.name)
        second = await cluster.leader(but=first.name)
        assert second.protocol.epoch > epoch
        await second.protocol.propose(set_to(b"after"))
        assert second.rows() == [b"0", b"1", b"2", b"3", b"4", b"after"]
        await cluster.start_node(first.name, first.number)
        await cluster.equal()
        assert cluster[first.name].rows() == second.rows()
        assert e.check_epochs(second.store) == await second.protocol.get_latest_epoch()

    on(scenario)


def test_epochs_are_never_used_twice(on):
    """B04, B05: over several leaderships each epoch has one owner, and the chain is whole on every node."""

    async def scenario(cluster):
        for _ in range(3):
            leader = await cluster.leader()
            await cluster.stop_node(leader.name)
            await cluster.leader(but=leader.name)
            await cluster.start_node(leader.name, leader.number)
        await (await cluster.leader()).protocol.propose(set_to(b"x"))
        await cluster.equal()
        for node in cluster.nodes.values():
            newest = e.check_epochs(node.store)
            assert newest >= 4
            terms = [e.read_epoch(node.store, epoch).term for epoch in range(1, newest + 1)]
            assert terms == sorted(set(terms))

    on(scenario)


def test_fencing_again_finds_its_own_record(on):
    """B02: a leader whose answer was lost and that tries again owns the same epoch; no second one is made."""

    async def scenario(cluster):
        leader = await cluster.leader()
        epoch = leader.protocol.epoch
        assert await leader.protocol.fencing() is True
        assert leader.protocol.epoch == epoch
        assert await leader.protocol.get_latest_epoch() == epoch

    on(scenario)


def test_only_the_elected_node_fences(on):
    """B04: contenders that the election does not name get false, after their tries, and make no epoch."""

    async def scenario(cluster):
        leader = await cluster.leader()
        before = await leader.protocol.get_latest_epoch()
        others = [node for node in cluster.nodes.values() if node is not leader]
        assert await asyncio.gather(*(node.protocol.fencing() for node in others)) == [False, False]
        assert await leader.protocol.get_latest_epoch() == before
        assert others[0].metrics.value("srengine_ha_fencing_total", status="ERROR") == 3

    on(scenario)


def test_a_command_of_an_old_epoch_changes_nothing(on):
    """B06, H06: what states epoch e-1 is refused with STALE_EPOCH on every node; epoch e is taken."""

    async def scenario(cluster):
        first = await cluster.leader()
        await cluster.stop_node(first.name)
        leader = await cluster.leader(but=first.name)
        epoch = leader.protocol.epoch
        assert epoch > 1
        for node in cluster.nodes.values():
            with pytest.raises(errors.StaleEpoch):
                await node.protocol.propose(set_to(b"stale", epoch=epoch - 1))
            await node.protocol.propose(set_to(b"fresh", epoch=epoch))
        assert leader.rows() == [b"fresh", b"fresh"]

    on(scenario)


def test_leadership_is_handed_over(on):
    """H07, H22: a transfer makes the named node leader, and the old one a follower that goes on in its process."""

    async def scenario(cluster):
        old = await cluster.leader()
        await old.protocol.propose(set_to(b"before"))
        target = next(node for node in cluster.nodes.values() if node is not old)
        asked = next(node for node in cluster.nodes.values() if node not in {old, target})
        assert await asked.protocol.transfer_leader(target.name) == target.name
        await until(lambda: target.leads)
        await until(lambda: old.roles.role is Role.FOLLOWER)
        assert old.admission.told[-3:] == ["close", "drain", "drop"]
        assert old.exits == []
        await old.protocol.propose(set_to(b"after"))
        assert old.rows() == [b"before", b"after"]
        assert await target.protocol.transfer_leader(target.name) == target.name

    on(scenario)


def test_a_transfer_that_cannot_be_made_changes_nothing(on):
    """B14: to nobody it is MEMBER_NOT_FOUND; from a leader that is alone it is MASTER_STATE."""

    async def scenario(cluster):
        leader = await cluster.leader()
        with pytest.raises(errors.MemberNotFound):
            await leader.protocol.transfer_leader("n9")
        with pytest.raises(errors.MasterState):
            await leader.protocol.transfer_leader()
        assert (await cluster.leader()) is leader

    on(scenario, count=1)


def test_resigning_makes_room(on):
    """H06: a leader that resigns leads no more under its epoch; whoever leads next has a later one."""

    async def scenario(cluster):
        leader = await cluster.leader()
        epoch = leader.protocol.epoch
        await leader.protocol.resign("test")
        await until(lambda: any(node.leads and node.protocol.epoch > epoch for node in cluster.nodes.values()))
        assert "close" in leader.admission.told
        follower = await cluster.follower()
        await follower.protocol.resign("nothing happens")
        await follower.protocol.propose(set_to(b"x"))

    on(scenario)


def test_leader_discovery(on):
    """B07: every node names the leader in well under 100 ms (looking it up asks nobody)."""

    async def scenario(cluster):
        leader = await cluster.leader()
        for node in cluster.nodes.values():
            await until(lambda node=node: node.protocol.observed.leader == leader.name)
            took = []
            for _ in range(200):
                began = time.perf_counter()
                assert await node.protocol.get_leader_name() == leader.name
                took.append(time.perf_counter() - began)
            assert sorted(took)[197] < 0.1

    on(scenario)


def test_no_leader_is_unknown_master(on):
    """B01, B07: with a majority gone the last node says UNKNOWN_MASTER, writes fail, and nothing of them is kept."""

    async def scenario(cluster):
        leader = await cluster.leader()
        await cluster.equal()
        for name in [name for name in cluster.nodes if name != leader.name]:
            await cluster.stop_node(name)
        await until(lambda: leader.protocol.observed.role is Role.UNKNOWN)
        with pytest.raises(errors.UnknownMaster):
            await leader.protocol.get_leader_name()
        with pytest.raises((errors.NoQuorum, errors.TimedOut)):
            await leader.protocol.propose(set_to(b"lost"), timeout_s=0.5)
        with pytest.raises((errors.NoQuorum, errors.TimedOut)):
            await leader.protocol.read_barrier(timeout_s=0.5)
        await until(lambda: not leader.leads)
        assert leader.protocol.epoch == 0
        assert leader.rows() == []

    on(scenario)


def test_observing_tells_everything_in_order(on):
    """H04: a reader of the election gets the present state first, then each change, roles and terms in order."""

    async def scenario(cluster):
        leader = await cluster.leader()
        node = await cluster.follower()
        seen = []

        async def watch():
            async for observed in node.protocol.observe():
                seen.append(observed)  # noqa: PERF401  (it is looked at meanwhile)

        task = asyncio.ensure_future(watch())
        await until(lambda: len(seen) > 0)
        assert (seen[0].role, seen[0].leader) == (Role.FOLLOWER, leader.name)
        await node.protocol.transfer_leader(node.name)
        await until(lambda: seen[-1].role is Role.LEADER)
        terms = [observed.term for observed in seen]
        assert terms == sorted(terms)
        assert seen[-1].leader == node.name
        task.cancel()
        await asyncio.wait([task])

    on(scenario)


def test_operations_are_logged_and_counted(on, caplog):
    """B24, B25, H21: fencing and each transition are one structured line, and counted."""
    caplog.set_level(logging.INFO, logger="srengine")

    async def scenario(cluster):
        leader = await cluster.leader()
        assert leader.metrics.value("srengine_ha_fencing_total", status="SUCCESS") >= 1
        leader.roles.measure()
        values = leader.metrics.snapshot()
        assert sum(values["srengine_ha_leader_changes_total"].values()) >= 1
        assert sum(values["srengine_ha_elections_total"].values()) >= 1

    on(scenario)
    lines = [record for record in caplog.records if getattr(record, "event", "") == "transition"]
    promoted = [record for record in lines if record.to == "LEADER"]
    assert promoted
    for record in promoted:
        facts = {"from": getattr(record, "from"), "to": record.to, "term": record.term, "ms": record.ms}
        assert msgspec.json.decode(msgspec.json.encode(facts)) == facts
        assert record.ms > 0
        assert isinstance(record.reason, str)
    assert any(getattr(record, "event", "") == "fencing" for record in caplog.records)
