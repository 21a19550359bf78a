"""The etcd backend whole: one leader at a time, fenced; one state everywhere; what a former leader sends is void."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from srengine import errors
from srengine.ha.backends import etcd_client as ec
from srengine.ha.backends.etcd_client import EtcdClient, EtcdOptions
from srengine.ha.backends.etcd_keys import FloorRecord, encode, number
from srengine.ha.backends.etcd_settings import EtcdSettings
from srengine.ha.epochs import read_epoch
from srengine.ha.protocol import Role
from srengine.ha.registers import put_register
from tests.etcd import Etcd
from tests.ha.etcd.nodes import Node, Nodes, cluster
from tests.ha.etcd.parts import until

pytestmark = pytest.mark.requires_tool("etcd")


def same_state(nodes: Nodes) -> set[bytes]:
    return {node.backend._machine.digest() for node in nodes.nodes.values()}


def test_one_leads_and_everybody_agrees(one_etcd: Etcd, tmp_path: Path) -> None:
    """H01, H27, B07: one node leads with epoch 1, the others follow it by name; what is proposed anywhere is read
    everywhere, and the states are equal.
    """

    async def run() -> None:
        async with cluster(tmp_path, one_etcd.urls) as nodes:
            leader = await nodes.leader()
            assert leader.backend.epoch == 1
            for node in nodes.nodes.values():
                assert await node.backend.get_leader_name() == leader.name
                assert await node.backend.get_leader() == leader.address
                assert await node.backend.get_latest_epoch() == 1
                await node.put(node.name, node.name.encode())
            for node in nodes.nodes.values():
                assert [await node.get(f"n{number}") for number in (1, 2, 3)] == [b"n1", b"n2", b"n3"]
            assert {node.backend.observed.role for node in nodes.others(leader)} == {Role.FOLLOWER}
            await until(lambda: len(same_state(nodes)) == 1, "equal states")
            assert await leader.backend.get_electable_nodes() == ["n1", "n2", "n3"]
            assert leader.name not in await leader.backend.get_electable_nodes(include_leader=False)
            assert await leader.backend.get_observer_nodes() == []

    asyncio.run(run())


def test_the_next_leader_after_a_crash(one_etcd: Etcd, tmp_path: Path) -> None:
    """H01: when the leader dies, another one leads with the next epoch once the lease has ended; nothing is lost."""

    async def run() -> None:
        async with cluster(tmp_path, one_etcd.urls) as nodes:
            leader = await nodes.leader()
            await leader.put("a", b"1")
            await leader.crash()
            del nodes.nodes[int(leader.node_id, 16)]
            after = await nodes.leader()
            assert after.backend.epoch == 2
            assert await after.get("a") == b"1"
            await after.put("a", b"2")
            record = read_epoch(after.store, 2)
            assert record is not None and (record.name, record.predecessor) == (after.name, 1)

    asyncio.run(run())


def test_a_leader_that_stops_does_not_keep_others_waiting(one_etcd: Etcd, tmp_path: Path) -> None:
    """H22: a leader that stops gives its lease back: the next one leads without waiting for its end."""

    async def run() -> None:
        async with cluster(tmp_path, one_etcd.urls, lease_s=60) as nodes:
            leader = await nodes.leader()
            await leader.stop()
            del nodes.nodes[int(leader.node_id, 16)]
            assert (await nodes.leader(timeout_s=20)).backend.epoch == 2

    asyncio.run(run())


def test_a_leader_that_slept_does_nothing(one_etcd: Etcd, tmp_path: Path) -> None:
    """H06, F21: a leader whose clock jumps 30 s ahead (it was stopped, and woken) says at once that it does not lead;
    its queued commands are refused with StaleEpoch, and it leads again only by another term and epoch.
    """

    async def run() -> None:
        async with cluster(tmp_path, one_etcd.urls) as nodes:
            leader = await nodes.leader()
            await leader.put("a", b"1")
            writer = leader.backend._leading.writer()
            assert writer is not None
            queued = asyncio.create_task(writer.write(put_register("a", b"queued")))
            leader.clock.ahead_s += 30
            assert leader.backend.epoch == 0
            assert leader.backend.observed.role is not Role.LEADER
            with pytest.raises((errors.StaleEpoch, errors.TimedOut)):
                await queued
            after = await nodes.leader()
            assert after.backend.epoch == 2
            assert await after.get("a") in {b"1", b"queued"}

    asyncio.run(run())


def test_what_a_former_leader_sends_is_void(one_etcd: Etcd, tmp_path: Path) -> None:
    """H06, B06, F21: a leader is paused so deeply that it believes in its lease; meanwhile another one leads. Its
    command is refused by the transaction with StaleEpoch, and one under its epoch by the state itself.
    """

    async def run() -> None:
        async with cluster(tmp_path, one_etcd.urls) as nodes:
            leader = await nodes.leader()
            writer = leader.backend._leading.writer()
            assert writer is not None
            old_epoch = leader.backend.epoch
            # Its clock stands still, and it hears nothing: as if it had just been about to send.
            await leader.backend._client.revoke(leader.backend._session.lease)
            for task in leader.backend._tasks:
                if "etcd" in repr(task):
                    task.cancel()
            others = nodes.others(leader)
            after = await until(lambda: next((node for node in others if node.leads), None), "the next leader")
            await after.put("a", b"new")
            with pytest.raises(errors.StaleEpoch):
                await asyncio.wait_for(writer.write(put_register("a", b"old")), 10)
            assert await after.get("a") == b"new"
            with pytest.raises(errors.StaleEpoch):
                command = put_register("a", b"stale")
                await after.backend.propose(type(command)(command.kind, command.body, old_epoch))
            assert await after.get("a") == b"new"
            assert after.backend.epoch == old_epoch + 1

    asyncio.run(run())


def test_cut_off_from_etcd_nobody_acts(tmp_path: Path) -> None:
    """H09: while etcd does not answer, no node leads or acknowledges; what is applied stays readable; when it answers
    again, one leads with another epoch.
    """

    async def run(etcd: Etcd) -> None:
        async with cluster(tmp_path / "nodes", etcd.urls) as nodes:
            leader = await nodes.leader()
            await leader.put("a", b"1")
            etcd.servers[0].pause()
            await until(lambda: not any(node.leads for node in nodes.nodes.values()), "nobody leads")
            with pytest.raises((errors.NoQuorum, errors.TimedOut)):
                await leader.put("a", b"2", timeout_s=1.0)
            with pytest.raises((errors.NoQuorum, errors.TimedOut, errors.Unreachable)):
                await leader.backend.read_barrier(timeout_s=1.0)
            await until(
                lambda: all(node.backend.observed.role is Role.UNKNOWN for node in nodes.nodes.values()), "all UNKNOWN"
            )
            assert not leader.backend.current
            etcd.servers[0].go_on()
            after = await nodes.leader()
            assert after.backend.epoch >= 2
            await after.put("a", b"3")
            assert await after.get("a") == b"3"

    (tmp_path / "nodes").mkdir()
    with Etcd(tmp_path / "etcd") as etcd:
        asyncio.run(run(etcd))


def test_queued_commands_end_with_the_lease(tmp_path: Path) -> None:
    """H06: etcd hangs, a command is on its way and another one waits; the node sleeps beyond its lease: at once the
    first is unknown (TimedOut) and the second certainly not done (StaleEpoch), without a word of etcd.
    """

    async def run(etcd: Etcd) -> None:
        async with cluster(tmp_path / "nodes", etcd.urls, (1,), lease_s=60) as nodes:
            leader = await nodes.leader()
            writer = leader.backend._leading.writer()
            assert writer is not None
            etcd.servers[0].pause()
            try:
                first = asyncio.create_task(writer.write(put_register("a", b"1")))
                await until(lambda: writer._sending, "the first on its way")
                second = asyncio.create_task(writer.write(put_register("a", b"2")))
                await until(lambda: writer._queue, "the second waiting")
                leader.clock.ahead_s += 120
                assert leader.backend.epoch == 0
                with pytest.raises(errors.StaleEpoch):
                    await asyncio.wait_for(second, 1)
                with pytest.raises(errors.TimedOut):
                    await asyncio.wait_for(first, 1)
            finally:
                etcd.servers[0].go_on()

    (tmp_path / "nodes").mkdir()
    with Etcd(tmp_path / "etcd") as etcd:
        asyncio.run(run(etcd))


def test_etcd_loses_a_server(tmp_path: Path) -> None:
    """With one of three etcd servers killed (its leader, at some time), the journal goes on and nothing is lost."""

    async def run(etcd: Etcd) -> None:
        async with cluster(tmp_path / "nodes", etcd.urls, lease_s=10) as nodes:
            await nodes.leader()
            for turn, server in enumerate(etcd.servers):
                server.kill()
                for name in ("a", "b"):
                    await nodes.nodes[1].put(f"{name}{turn}", b"x", timeout_s=30)
                await asyncio.to_thread(lambda server=server: server.start().wait_healthy())
            for node in nodes.nodes.values():
                for turn in range(3):
                    assert await node.get(f"b{turn}") == b"x"

    (tmp_path / "nodes").mkdir()
    with Etcd(tmp_path / "etcd", 3) as etcd:
        asyncio.run(run(etcd))


def test_leadership_is_handed_over_without_a_gap(one_etcd: Etcd, tmp_path: Path) -> None:
    """H07, H22: transfer_leader names the new leader, from the leader and from elsewhere; who cannot take over is
    refused and nothing changes.
    """

    async def run() -> None:
        async with cluster(tmp_path, one_etcd.urls) as nodes:
            leader = await nodes.leader()
            target = nodes.others(leader)[0]
            assert await leader.backend.transfer_leader(leader.name) == leader.name
            with pytest.raises(errors.MemberNotFound):
                await leader.backend.transfer_leader("nobody")
            assert leader.backend.epoch == 1
            assert await leader.backend.transfer_leader(target.name) == target.name
            assert await nodes.leader() is target
            assert target.backend.epoch == 2
            roles = [observed.role for observed in leader.seen]
            assert roles[-1] is Role.FOLLOWER
            assert await leader.backend.transfer_leader(leader.name) == leader.name
            assert await nodes.leader() is leader
            name = await leader.backend.transfer_leader()
            assert (await nodes.leader()).name == name != leader.name
            for node in nodes.nodes.values():
                await node.put("a", node.name.encode())
            await nodes.nodes[1].stop()
            del nodes.nodes[1]
            leader = await nodes.leader()
            with pytest.raises(errors.MasterState):
                await leader.backend.transfer_leader("n1")

    asyncio.run(run())


def test_commands_are_applied_once_and_in_order(one_etcd: Etcd, tmp_path: Path) -> None:
    """A request that is proposed again has its first outcome; sixty proposers at once on three nodes lose nothing; the
    order is the same for whoever subscribes, from any index.
    """

    async def run() -> None:
        async with cluster(tmp_path, one_etcd.urls) as nodes:
            leader = await nodes.leader()
            command = put_register("once", b"1")
            command = type(command)(command.kind, command.body, 0, b"r" * 16)
            first = await leader.backend.propose(command)
            assert await nodes.others(leader)[0].backend.propose(command) == first
            everybody = list(nodes.nodes.values())
            await asyncio.gather(*(everybody[number % 3].put(f"r{number}", b"") for number in range(60)))
            indexes = []
            for node in everybody:
                last = await node.backend.read_barrier()
                seen = []
                async for index, found in node.backend.subscribe(1):
                    seen.append((index, found))
                    if index == last:
                        break
                indexes.append(seen)
            assert indexes[0] == indexes[1] == indexes[2]
            assert [index for index, _ in indexes[0]] == list(range(1, len(indexes[0]) + 1))
            assert len(same_state(nodes)) == 1

    asyncio.run(run())


def test_refusals_reach_the_proposer(one_etcd: Etcd, tmp_path: Path) -> None:
    """A condition that does not hold is Conflict on the leader and elsewhere; an unknown kind, too large a command and
    another epoch are refused.
    """

    async def run() -> None:
        async with cluster(tmp_path, one_etcd.urls) as nodes:
            leader = await nodes.leader()
            version = await leader.put("a", b"1")
            for node in nodes.nodes.values():
                with pytest.raises(errors.Conflict) as caught:
                    await node.put("a", b"2", if_version=0)
                assert caught.value.current_version == version
            kind = type(put_register("a", b""))
            with pytest.raises(errors.UnsupportedFeature):
                await leader.backend.propose(kind("nobody.knows", b""))
            with pytest.raises(errors.InvalidValue):
                await leader.backend.propose(kind("nobody.knows", bytes(5_000_000)))
            with pytest.raises(errors.StaleEpoch):
                await leader.backend.propose(kind("nobody.knows", b"", 7))

    asyncio.run(run())


def test_members_join_and_leave(one_etcd: Etcd, tmp_path: Path) -> None:
    """H12, H13, B10, B14, H18: a joiner is unstable until it has caught up, then electable; an observer follows and
    never leads; the leader is not removed, others are; unknown names are MemberNotFound.
    """

    async def run() -> None:
        async with cluster(tmp_path, one_etcd.urls) as nodes:
            leader = await nodes.leader()
            other = nodes.others(leader)[0]
            joiner = Node(nodes, 4)
            await other.backend.add_node("n4", joiner.node_id, joiner.address)
            assert "n4" not in await leader.backend.get_electable_nodes()
            with pytest.raises(errors.NotReady):
                await leader.backend.remove_unstable_node("n4")
            await nodes.start(4)
            await until(lambda: nodes.nodes[4].backend.observed.role is Role.FOLLOWER, "the joiner follows")
            await until(
                lambda: any(m.name == "n4" and m.stable for m in other.backend._roster.members), "stable by itself"
            )
            await leader.backend.add_unstable_node("n4")
            assert "n4" not in await leader.backend.get_electable_nodes()
            await other.backend.remove_unstable_node("n4")
            assert "n4" in await leader.backend.get_electable_nodes()
            await leader.backend.add_node("n5", f"{5:032x}", "tcp://127.0.0.1:7050", role="observer")
            await nodes.start(5)
            await until(lambda: nodes.nodes[5].backend.observed.role is Role.OBSERVER, "the observer observes")
            await nodes.nodes[5].backend.read_barrier()
            assert await nodes.nodes[5].backend.get_observer_nodes() == ["n5"]
            with pytest.raises(errors.MasterState):
                await other.backend.remove_node(leader.name)
            with pytest.raises(errors.MasterState):
                await other.backend.add_unstable_node(leader.name)
            with pytest.raises(errors.MemberNotFound):
                await other.backend.remove_node("nobody")
            await other.backend.update_address("n4", "tcp://127.0.0.1:7777")
            await leader.backend.remove_node("n4")
            await leader.backend.remove_node("n5")
            assert await leader.backend.get_electable_nodes() == ["n1", "n2", "n3"]
            removed = nodes.nodes[4]
            await until(lambda: removed.alarms, "the removed node knows")
            assert removed.alarms[0][0] == "removed"
            assert removed.backend.observed.role is Role.UNKNOWN
            for ask in (removed.backend.get_leader, removed.backend.read_barrier):
                with pytest.raises(errors.Removed):
                    await ask()

    asyncio.run(run())


def test_only_voters_campaign(one_etcd: Etcd, tmp_path: Path) -> None:
    """H18, B11: with the leader and the other voters gone, neither an observer nor an unstable node is elected."""

    async def run() -> None:
        async with cluster(tmp_path, one_etcd.urls, (1,), unstable_grace_s=600) as nodes:
            leader = await nodes.leader()
            await leader.backend.add_node("n2", f"{2:032x}", "tcp://127.0.0.1:7020")
            await leader.backend.add_node("n3", f"{3:032x}", "tcp://127.0.0.1:7030", role="observer")
            for number_ in (2, 3):
                node = await nodes.start(number_)
                await until(lambda node=node: node.backend.applied_index == leader.backend.applied_index, "caught up")
            await leader.stop()
            del nodes.nodes[1]
            unknown = Role.UNKNOWN
            await until(lambda: all(n.backend.observed.role is unknown for n in nodes.nodes.values()), "no leader")
            election = nodes.nodes[2].backend._election
            # Both have looked whether to stand since then.
            for node in nodes.nodes.values():
                assert not node.backend._election._may_campaign()
                assert node.backend._session.lease
            assert election.observed.leader is None

    asyncio.run(run())


def test_the_epoch_of_another_is_final(one_etcd: Etcd, tmp_path: Path) -> None:
    """B02: when the next epoch's key exists already, fencing is False after one try, and the node gives up the
    election.
    """

    async def run() -> None:
        async with cluster(tmp_path, one_etcd.urls, (1,)) as nodes:
            node = await nodes.leader()
            node.fences = False
            client = EtcdClient(EtcdOptions(one_etcd.urls))
            await client.txn([], [ec.put(node.backend._keys.epoch(2), b"somebody else")])
            await node.backend.resign("test")
            node.backend._election._held_back_until = 0.0
            await until(lambda: node.backend.observed.role is Role.LEADER, "elected again")
            assert not await node.backend.fencing()
            assert node.backend.epoch == 0
            assert node.metrics.value("srengine_ha_fencing_total", status="KEYEXIST") == 1
            client.close()

    asyncio.run(run())


def test_a_fence_whose_answer_was_lost_is_ours(one_etcd: Etcd, tmp_path: Path) -> None:
    """B03: when the epoch was inserted and the answer lost, the next try finds it and succeeds with the same epoch."""

    async def run() -> None:
        async with cluster(tmp_path, one_etcd.urls, (1,)) as nodes:
            node = await nodes.leader()
            node.backend._leading.end_leadership("test")
            assert node.backend.epoch == 0
            assert await node.backend.fencing()
            assert node.backend.epoch == 1
            await node.put("a", b"1")

    asyncio.run(run())


def test_the_journal_is_trimmed_behind_two_copies(one_etcd: Etcd, tmp_path: Path) -> None:
    """B22, H27: entries are trimmed when two nodes hold copies of the state; a node that missed them gets a copy and
    goes on; the state is the same; subscribing below the floor says that it is gone.
    """

    async def run() -> None:
        async with cluster(tmp_path, one_etcd.urls, kept=20) as nodes:
            leader = await nodes.leader()
            away = nodes.others(leader)[0]
            number_ = int(away.node_id, 16)
            await away.stop()
            del nodes.nodes[number_]
            for turn in range(120):
                await leader.put(f"r{turn % 10}", b"%d" % turn)
            floor = await until(lambda: leader.backend._mirror.floor, "a floor")
            assert len(floor.holders) >= 2
            await until(lambda: leader.backend._mirror.floor.index > 60, "a higher floor")
            back = await nodes.start(number_, kept=20)
            await until(lambda: back.backend.applied_index >= leader.backend.applied_index, "caught up")
            assert back.metrics.value("srengine_ha_etcd_states_fetched_total") == 1
            assert await back.get("r9") == b"119"
            assert len(same_state(nodes)) == 1
            with pytest.raises(errors.BelowPurgeMark):
                async for _ in back.backend.subscribe(1):
                    break
            await back.put("after", b"1")

    asyncio.run(run())


@pytest.mark.parametrize("damage", ["record", "file", "gone"])
def test_a_copy_that_is_not_the_one_etcd_knows_is_refused(
    one_etcd: Etcd, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """P7, B22: a copy whose digest is not the one in etcd, a damaged one and one that is gone are not used: the other
    holder is asked, and the state is equal in the end.
    """

    async def run() -> None:
        async with cluster(tmp_path, one_etcd.urls) as nodes:
            leader = await nodes.leader()
            away = nodes.others(leader)[0]
            await away.stop()
            number_ = int(away.node_id, 16)
            del nodes.nodes[number_]
            for turn in range(5):
                await leader.put(f"r{turn}", b"x")
            holders = sorted(nodes.nodes.values(), key=lambda node: node.node_id)
            for node in holders:
                await node.backend.read_barrier()
                await node.backend._copies.make()
            first = holders[0].backend._copies
            path = first._path(first._copied)
            mirror = leader.backend._mirror
            await until(lambda: len(mirror.states) == 2, "two copies")
            if damage == "record":
                record, _ = mirror.copies()[0]
                wrong = encode(msgspec.structs.replace(record, digest=bytes(16)))
                await first._client.txn([], [ec.put(first._keys.state(record.node_id), wrong)])
            elif damage == "file":
                content = bytearray(path.read_bytes())
                content[len(content) // 2] ^= 1
                path.write_bytes(content)
            else:
                path.unlink()
            await until(lambda: len({record.digest for record, _ in mirror.copies()}) == 1 + (damage == "record"), "it")
            floor = FloorRecord(mirror.head, mirror.head, bytes(16), ())
            assert await leader.backend._journal.trim(leader.backend._leading.writer().term, floor, [], timeout_s=5)
            back = await nodes.start(number_)
            await until(lambda: back.backend.applied_index >= floor.index, "caught up")
            assert f"no copy of the state from {holders[0].name}" in caplog.text
            assert back.metrics.value("srengine_ha_etcd_states_fetched_total") == 1
            assert await back.get("r4") == b"x"
            assert len(same_state(nodes)) == 1

    asyncio.run(run())


def test_without_a_copy_a_node_waits(one_etcd: Etcd, tmp_path: Path) -> None:
    """A node below the floor of which nobody offers a copy changes nothing, and goes on as soon as one is offered."""

    async def run() -> None:
        async with cluster(tmp_path, one_etcd.urls) as nodes:
            leader = await nodes.leader()
            away = nodes.others(leader)[0]
            await away.stop()
            number_ = int(away.node_id, 16)
            del nodes.nodes[number_]
            await leader.put("a", b"1")
            mirror = leader.backend._mirror
            floor = FloorRecord(mirror.head, mirror.head, bytes(16), ())
            assert await leader.backend._journal.trim(leader.backend._leading.writer().term, floor, [], timeout_s=5)
            back = await nodes.start(number_)
            before = back.backend.applied_index
            await until(lambda: back.backend._mirror.restarts >= 2, "it has tried")
            assert back.backend.applied_index == before < floor.index
            assert not back.backend.current
            await leader.backend._copies.make()
            await until(lambda: back.backend.applied_index >= floor.index, "caught up")
            assert await back.get("a") == b"1"

    asyncio.run(run())


def test_another_history_is_refused(one_etcd: Etcd, tmp_path: Path) -> None:
    """F14: a node does not start against an etcd that holds another cluster, none, or a shorter or other journal than
    it has applied.
    """

    async def run() -> None:
        async with cluster(tmp_path, one_etcd.urls, (1,)) as nodes:
            node = await nodes.leader()
            await node.put("a", b"1")
            await node.stop()
            keys = node.backend._keys
            client = EtcdClient(EtcdOptions(one_etcd.urls))
            again = Node(nodes, 1)
            with pytest.raises(errors.ForeignData):
                await again.start(cluster_id="f" * 32)
            await again._stack.aclose()
            head = (await client.range(keys.head)).first
            assert head is not None
            await client.txn([], [ec.put(keys.head, number(1))])
            again = Node(nodes, 1)
            with pytest.raises(errors.ForeignData):
                await again.start()
            again.backend._client.close()
            await again._stack.aclose()
            await client.txn([], [ec.put(keys.head, head.value)])
            await nodes.start(1)
            await nodes.leader()
            client.close()

    asyncio.run(run())


def test_a_full_disk_gives_the_leadership_away(one_etcd: Etcd, tmp_path: Path) -> None:
    """H26: a leader that cannot write the agreed state says so and another one leads; when there is room again it has
    applied everything.
    """

    async def run() -> None:
        async with cluster(tmp_path, one_etcd.urls) as nodes:
            leader = await nodes.leader()
            machine = leader.backend._machine
            apply_all, full = machine.apply_all, True

            def refuse(entries):
                if full:
                    raise errors.DiskFull("no room")
                return apply_all(entries)

            machine.apply_all = refuse
            write = asyncio.create_task(nodes.others(leader)[0].put("a", b"1"))
            others = nodes.others(leader)
            after = await until(lambda: next((node for node in others if node.leads), None), "another leader")
            await write
            assert await after.get("a") == b"1"
            assert leader.alarms and leader.alarms[0][0] == "journal_stuck"
            full = False
            assert await leader.get("a") == b"1"
            assert len(same_state(nodes)) == 1

    asyncio.run(run())


def test_who_waits_is_told_of_the_end(one_etcd: Etcd, tmp_path: Path) -> None:
    """Subscribers, observers, proposers of a node that stops get Closed, and so does whoever asks it later."""

    async def run() -> None:
        async with cluster(tmp_path, one_etcd.urls, (1,)) as nodes:
            node = await nodes.leader()
            last = await node.backend.read_barrier()

            async def follow() -> None:
                async for _ in node.backend.subscribe(last + 1):
                    pass

            async def observe() -> None:
                async for _ in node.backend.observe():
                    pass

            waiting = [asyncio.create_task(follow()), asyncio.create_task(observe())]
            await asyncio.sleep(0)
            await node.stop()
            for task in waiting:
                with pytest.raises(errors.Closed):
                    await asyncio.wait_for(task, 10)
            for ask in (node.backend.read_barrier, node.backend.get_leader, node.backend.fencing):
                with pytest.raises(errors.Closed):
                    await ask()
            await node.backend.stop()

    asyncio.run(run())


def test_settings_are_checked() -> None:
    """An unknown setting, a lease that etcd would not grant, no server: InvalidValue."""
    assert EtcdSettings.read({"servers": "http://a:1,http://b:2"}).etcd.servers == ("http://a:1", "http://b:2")
    for wrong in (
        {},
        {"servers": "http://a:1", "colour": "red"},
        {"servers": "http://a:1", "lease_s": 1},
        {"servers": "http://a:1", "lease_s": 2.5},
        {"servers": "http://a:1", "kept": 0},
    ):
        with pytest.raises(errors.InvalidValue):
            EtcdSettings.read(wrong)
