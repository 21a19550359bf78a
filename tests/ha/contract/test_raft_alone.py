"""What is the embedded backend's alone: partitions of its own network, its log, copies of its state."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import threading
import time

import msgspec
import pytest

from srengine import errors
from srengine.consensus.log import NodeLog
from srengine.ha import members as m
from srengine.ha.backends import find_backend, names
from srengine.ha.backends.raft import first_entry, found
from srengine.ha.backends.raft_options import raft_options
from srengine.ha.backends.raft_state import JournalState
from srengine.ha.journal import Command
from srengine.ha.protocol import Acknowledge, Role
from srengine.storage import MetadataStore
from tests.ha.agreed import address, bootstrap, command, node_id
from tests.ha.contract.clusters import until

pytestmark = pytest.mark.backends("raft")


def set_to(body: bytes, **more) -> Command:
    return Command("test.set", body, **more)


# --- the start -------------------------------------------------------------------------------------------------------


def test_who_asks_a_node_that_starts_waits(on, monkeypatch):
    """H01, F53: a node that opens its log, however long that takes, is asked already: it owns no epoch and is current
    for nothing, reads and commands wait until it has started and are answered then, or end with a typed error.
    """

    async def scenario(cluster):
        leader = await cluster.leader()
        await leader.protocol.propose(set_to(b"before"))
        await cluster.equal()
        away = next(node.name for node in cluster.nodes.values() if node is not leader)
        number = cluster[away].number
        await cluster.stop_node(away)
        opening, may_open = threading.Event(), threading.Event()
        open_log = NodeLog.open

        def slow(*args, **options):
            opening.set()
            assert may_open.wait(60)
            return open_log(*args, **options)

        monkeypatch.setattr(NodeLog, "open", slow)
        starting = asyncio.ensure_future(cluster.start_node(away, number))
        await asyncio.to_thread(opening.wait, 60)
        protocol = cluster[away].protocol
        assert (protocol.epoch, protocol.current, protocol.applied_index > 0) == (0, False, True)
        assert not protocol.trust(trusted=True)
        with pytest.raises(errors.NotReady):
            await protocol.read_barrier(timeout_s=0.05)
        with pytest.raises(errors.NotReady):
            await protocol.propose(set_to(b"too soon"), timeout_s=0.05)
        asked = [asyncio.ensure_future(protocol.read_barrier(timeout_s=60))]
        asked.append(asyncio.ensure_future(protocol.propose(set_to(b"after"), timeout_s=60)))
        await asyncio.sleep(0)
        assert not any(task.done() for task in asked)
        may_open.set()
        await starting
        await asyncio.gather(*asked)
        await cluster.equal()
        assert leader.rows() == [b"before", b"after"]

    on(scenario)


# --- partitions ------------------------------------------------------------------------------------------------------


def test_a_leader_without_a_majority_is_replaced(on):
    """H09, F23, H06: cut off, the old leader acknowledges nothing and gives up; the others elect one under a later
    epoch; after the heal what it had queued is nowhere, and all are equal.
    """

    async def scenario(cluster):
        old = await cluster.leader()
        epoch = old.protocol.epoch
        await old.protocol.propose(set_to(b"before"))
        cluster.isolate(old.name)
        queued = asyncio.ensure_future(old.protocol.propose(set_to(b"queued", epoch=epoch), timeout_s=30))
        new = await cluster.leader(but=old.name)
        assert new.protocol.epoch > epoch
        await new.protocol.propose(set_to(b"after"))
        await until(lambda: not old.leads)
        assert old.protocol.epoch == 0
        assert old.rows() == [b"before"]
        cluster.network.heal()
        with pytest.raises(errors.StaleEpoch):
            await queued
        await until(lambda: old.protocol.observed.role is Role.FOLLOWER)
        await cluster.equal()
        assert new.rows() == old.rows() == [b"before", b"after"]

    on(scenario)


def test_a_command_of_a_cut_off_leader_goes_to_the_next_one(on):
    """H11: what states no epoch is a user's wish: proposed at a leader that loses its majority, it is applied once by
    the next leader when the network heals.
    """

    async def scenario(cluster):
        old = await cluster.leader()
        cluster.isolate(old.name)
        queued = asyncio.ensure_future(old.protocol.propose(set_to(b"wish"), timeout_s=60))
        new = await cluster.leader(but=old.name)
        cluster.network.heal()
        await queued
        await cluster.equal()
        assert new.rows() == [b"wish"]

    on(scenario)


def test_a_follower_that_is_cut_off_is_not_current(on):
    """H08, B07: without contact a follower is UNKNOWN, names no master, is not current; after the heal it is again."""

    async def scenario(cluster):
        follower = await cluster.follower()
        await until(lambda: follower.protocol.current)
        cluster.isolate(follower.name)
        await until(lambda: follower.protocol.observed.role is Role.UNKNOWN)
        assert not follower.protocol.current
        with pytest.raises(errors.UnknownMaster):
            await follower.protocol.get_leader()
        with pytest.raises((errors.NoQuorum, errors.TimedOut)):
            await follower.protocol.read_barrier(timeout_s=0.3)
        await until(lambda: follower.roles.role is Role.UNKNOWN)
        cluster.network.heal()
        await until(lambda: follower.protocol.current)
        await until(lambda: follower.roles.role is Role.FOLLOWER)

    on(scenario)


def test_lossy_links_lose_and_double_nothing(on):
    """B18, F27: with a fifth of all frames lost, proposals from all nodes are applied once each; nobody is removed."""

    async def scenario(cluster):
        await cluster.leader()
        ends = [node.endpoint for node in cluster.nodes.values()]
        for source in ends:
            for target in ends:
                cluster.network.link(source, target).loss = 0.2
        nodes = list(cluster.nodes.values())
        bodies = [b"%d" % number for number in range(12)]
        done = await asyncio.gather(
            *(nodes[number % 3].protocol.propose(set_to(body), timeout_s=90) for number, body in enumerate(bodies))
        )
        assert len(set(done)) == len(bodies)
        cluster.network.heal()
        await cluster.equal()
        assert sorted(nodes[0].rows()) == sorted(bodies)
        assert [row.name for row in m.read_members(nodes[0].store)] == ["n0", "n1", "n2"]
        assert not any(node.exits for node in nodes)

    on(scenario)


# --- acknowledgement -------------------------------------------------------------------------------------------------


def test_all_waits_for_every_voter(on):
    """B21: `all` is answered when every member that votes has applied the command; with one away it is TIMEOUT and the
    command stands; `majority` is answered all the same.
    """

    async def scenario(cluster):
        leader = await cluster.leader()
        index = await leader.protocol.propose(set_to(b"a"), acknowledge=Acknowledge.ALL)
        assert all(node.machine.applied_index >= index for node in cluster.nodes.values())
        follower = await cluster.follower()
        index = await follower.protocol.propose(set_to(b"b"), acknowledge=Acknowledge.ALL)
        assert all(node.machine.applied_index >= index for node in cluster.nodes.values())
        await cluster.stop_node(follower.name)
        with pytest.raises(errors.TimedOut):
            await leader.protocol.propose(set_to(b"c"), timeout_s=1.0, acknowledge=Acknowledge.ALL)
        await leader.protocol.propose(set_to(b"d"))
        assert leader.rows() == [b"a", b"b", b"c", b"d"]

    on(scenario)


def test_none_is_answered_before_anything_is_durable(on):
    """B21: `none` is answered at once, even by a leader that reaches nobody; then it may be lost, and is applied
    nowhere before a majority has it.
    """

    async def scenario(cluster):
        leader = await cluster.leader()
        assert await leader.protocol.propose(set_to(b"kept"), acknowledge=Acknowledge.NONE) == 0
        await until(lambda: leader.rows() == [b"kept"])
        follower = await cluster.follower()
        assert await follower.protocol.propose(set_to(b"too"), acknowledge=Acknowledge.NONE) == 0
        await until(lambda: follower.rows() == [b"kept", b"too"])
        cluster.isolate(leader.name)
        await leader.protocol.propose(set_to(b"lost"), acknowledge=Acknowledge.NONE)
        new = await cluster.leader(but=leader.name)
        await new.protocol.propose(set_to(b"after"))
        assert b"lost" not in leader.rows()
        cluster.network.heal()
        await cluster.equal()
        assert new.rows() == [b"kept", b"too", b"after"]

    on(scenario)


def test_membership_is_always_acknowledged_by_a_majority(on):
    """B21: a change of membership is never answered before it is applied, whatever policy is asked for."""

    async def scenario(cluster):
        leader = await cluster.leader()
        change = command(m.ADD, m.AddMember("o1", node_id(9), address(9), "observer"))
        index = await leader.protocol.propose(change, acknowledge=Acknowledge.NONE)
        assert index > 0
        assert leader.member("o1") is not None

    on(scenario)


# --- the log and the state -------------------------------------------------------------------------------------------


def test_a_node_behind_the_log_gets_the_state(on, monkeypatch):
    """B22: a follower that was away while the log was trimmed catches up by a copy of the state, and goes on from the
    log; a subscriber that stood before the trimmed entries is told so.
    """
    from tests.ha.contract.clusters import RaftCluster

    monkeypatch.setattr(RaftCluster, "settings", {**RaftCluster.settings, "entries_kept": 5})

    async def scenario(cluster):
        follower = await cluster.follower()
        leader = await cluster.leader()
        await leader.protocol.propose(set_to(b"first"))
        await cluster.equal()
        await cluster.stop_node(follower.name)
        for number in range(40):
            await leader.protocol.propose(set_to(b"%d" % number, request=b"%16d" % number))
        log = leader.protocol._log.group("journal")
        for number in itertools.count(40):
            # What it lacks is kept as long as it was there a moment ago.
            if log.floor.index > 20:
                break
            await leader.protocol.propose(set_to(b"%d" % number, request=b"%16d" % number))
            await asyncio.sleep(0.01)
        back = await cluster.start_node(follower.name, follower.number)
        await cluster.equal()
        await until(lambda: back.metrics.value("srengine_consensus_installs_total") == 1)
        assert back.rows() == leader.rows()
        await back.protocol.propose(set_to(b"again", request=b"%16d" % 3))
        assert back.rows() == leader.rows()
        assert not list((cluster.path / follower.name / "copies").iterdir())
        with pytest.raises(errors.BelowPurgeMark) as caught:
            await anext(aiter(leader.protocol.subscribe(1)))
        following = aiter(leader.protocol.subscribe(caught.value.floor + 1))
        assert (await anext(following))[0] > caught.value.floor

    on(scenario)


def test_a_new_node_begins_with_a_copy(on, monkeypatch):
    """B22, H13: a joiner of a cluster whose log was trimmed gets the state, then entries, then its vote."""
    from tests.ha.contract.clusters import RaftCluster

    monkeypatch.setattr(RaftCluster, "settings", {**RaftCluster.settings, "entries_kept": 5})

    async def scenario(cluster):
        leader = await cluster.leader()
        for number in range(40):
            await leader.protocol.propose(set_to(b"%d" % number))
        await until(lambda: leader.protocol._log.group("journal").floor.index > 20)
        await leader.protocol.add_node("n3", node_id(9), address(9))
        joined = await cluster.start_node("n3", 9)
        await until(lambda: leader.member("n3").stable)
        await joined.protocol.propose(set_to(b"mine"))
        await cluster.equal()
        assert joined.rows() == leader.rows()

    on(scenario)


def test_a_joiner_that_applies_nothing_stays_unstable(on, monkeypatch):
    """B13: a node whose log grows and that answers heartbeats, but whose applying hangs, does not become stable until
    it goes on.
    """
    gate = threading.Event()
    real = JournalState.apply

    def slow(self, entries):
        if self.machine.store._below.path.parent.name == "n3":
            assert gate.wait(120)
        return real(self, entries)

    monkeypatch.setattr(JournalState, "apply", slow)
    monkeypatch.setattr(JournalState, "apply_now", lambda state, entries: False)

    async def scenario(cluster):
        try:
            leader = await cluster.leader()
            await leader.protocol.add_node("n3", node_id(9), address(9))
            joined = await cluster.start_node("n3", 9)
            await until(lambda: leader.protocol.machine.progress[joined.id].match_index >= leader.machine.applied_index)
            assert joined.id in leader.protocol.leading.alive()
            with pytest.raises(errors.NotReady):
                await leader.protocol.remove_unstable_node("n3")
            assert not leader.member("n3").stable
            gate.set()
            await until(lambda: leader.member("n3").stable)
        finally:
            gate.set()

    on(scenario)


def test_everything_survives_a_restart_of_all(on):
    """B20, H23: after all nodes stopped and started, journal, epochs and members agree and go on."""

    async def scenario(cluster):
        leader = await cluster.leader()
        await leader.protocol.propose(set_to(b"before"))
        epoch = leader.protocol.epoch
        await cluster.equal()
        numbers = {name: node.number for name, node in cluster.nodes.items()}
        for name in numbers:
            await cluster.stop_node(name)
        await asyncio.gather(*(cluster.start_node(name, number) for name, number in numbers.items()))
        leader = await cluster.leader()
        assert leader.protocol.epoch > epoch
        await leader.protocol.propose(set_to(b"after"))
        await cluster.equal()
        assert leader.rows() == [b"before", b"after"]

    on(scenario)


def test_every_node_is_restarted_under_load(on):
    """H23: restarting one node after the other, handing leadership over, loses and doubles nothing."""

    async def scenario(cluster):
        await cluster.leader()
        written: list[bytes] = []
        stopping = asyncio.Event()

        async def write() -> None:
            number = 0
            while not stopping.is_set():
                body = b"%d" % number
                node = list(cluster.nodes.values())[number % len(cluster.nodes)]
                try:
                    await node.protocol.propose(set_to(body), timeout_s=30)
                except (errors.Closed, errors.TimedOut):
                    pass  # the node that was asked is the one that stops: the outcome is not known
                else:
                    written.append(body)
                number += 1

        writing = asyncio.ensure_future(write())
        for name in ["n0", "n1", "n2"]:
            enough = len(written) + 5
            await until(lambda enough=enough: len(written) >= enough)
            leader = await cluster.leader()
            if leader.name == name:
                await leader.protocol.transfer_leader()
                await cluster.leader(but=name)
            number = cluster[name].number
            await cluster.stop_node(name)
            await cluster.start_node(name, number)
        stopping.set()
        await writing
        await cluster.equal()
        rows = cluster["n0"].rows()
        assert len(set(rows)) == len(rows)
        assert set(written) <= set(rows)
        assert len(written) > 10

    on(scenario)


# --- making one ------------------------------------------------------------------------------------------------------


def test_settings_are_checked():
    """H19: unknown settings, wrong types and times that make no sense are InvalidValue."""
    assert raft_options({}).timing.election_s_min == 1.0
    assert raft_options({"election_s_max": 5}).election_s_max == 5.0
    for wrong in (
        {"election": 1.0},
        {"heartbeat_s": "fast"},
        {"heartbeat_s": 0.0},
        {"lease_s": 9.0},
        {"election_s_min": 3.0},
        {"drift": 1.0},
        {"entries_kept": -1},
        {"catch_up_s": 0.0},
    ):
        with pytest.raises(errors.InvalidValue):
            raft_options(wrong)


def test_a_journal_begins_once(tmp_path):
    """F12: the same beginning again changes nothing, another one is a Conflict; without ids there is none."""
    tmp_path.chmod(0o700)
    found(tmp_path, bootstrap(3))
    found(tmp_path, bootstrap(3))
    with pytest.raises(errors.Conflict):
        found(tmp_path, bootstrap(2))
    entry = first_entry(bootstrap(3))
    assert (entry.index, entry.term) == (1, 1)
    assert entry.configuration.voters == (node_id(1), node_id(2), node_id(3))
    nobody = command(m.BOOTSTRAP, m.Bootstrap(m.Cluster("c" * 32, "x"), (m.Member("a", address(1), 0),)))
    with pytest.raises(errors.InvalidValue):
        first_entry(nobody)


def test_backends_are_found_by_name():
    """B33: the built-in ones are there; another name is InvalidValue that lists the known ones."""
    assert {"raft", "etcd"} <= set(names())
    assert find_backend("raft").__name__ == "RaftBackend"
    with pytest.raises(errors.InvalidValue, match="raft"):
        find_backend("paxos")


def test_few_electable_nodes_are_warned_of(on, caplog):
    """B23: two electable nodes are too few to lose one: a warning, and the metric says how many there are."""

    async def scenario(cluster):
        leader = await cluster.leader()
        assert leader.metrics.value("srengine_ha_members", what="voters") == 2

    on(scenario, count=2)
    assert any(getattr(record, "event", "") == "few_electable" for record in caplog.records)


def test_a_leader_measures_the_lag_of_the_living(on):
    """H20: the leader's gauges say how many entries each living node lacks, and who is not alive."""

    async def scenario(cluster):
        leader = await cluster.leader()
        follower = await cluster.follower()
        await leader.protocol.propose(set_to(b"x"), acknowledge=Acknowledge.ALL)
        value = leader.metrics.value
        await until(lambda: value("srengine_ha_node_alive", node=follower.name) == 1)
        await until(lambda: value("srengine_ha_replication_lag_entries", node=follower.name) == 0)
        await cluster.stop_node(follower.name)
        await until(lambda: value("srengine_ha_node_alive", node=follower.name) == 0)

    on(scenario)


def test_a_broken_chain_of_epochs_stops_the_start(on):
    """B05: a node whose epochs were changed by hand does not start, and says what is wrong."""

    async def scenario(cluster):
        follower = await cluster.follower()
        number = follower.number
        await cluster.stop_node(follower.name)
        with MetadataStore(cluster.path / follower.name / "meta") as store, store.transaction() as transaction:
            assert transaction.delete("epochs", (1).to_bytes(8, "big"))
        with pytest.raises(errors.CorruptionError, match="chain of epochs"):
            await cluster.start_node(follower.name, number)

    on(scenario)


def test_an_epoch_ends_with_its_term(on):
    """H06, B06: elected again in a later term, a leader has no epoch before it has fenced anew."""

    async def scenario(cluster):
        leader = await cluster.leader()
        epoch, term = leader.protocol.epoch, leader.protocol.observed.term
        seen = []

        async def watch():
            async for observed in leader.protocol.observe():
                if observed.role is Role.LEADER and observed.term > term:
                    seen.append(leader.protocol.epoch)
                    return

        watching = asyncio.ensure_future(watch())
        await leader.protocol.resign("test")
        await asyncio.wait_for(watching, 60)
        assert seen == [0]
        await until(lambda: leader.protocol.epoch == epoch + 1)

    on(scenario, count=1)


def test_a_state_that_is_older_than_the_log_stops_the_start(on, monkeypatch):
    """F14: a node whose agreed state was put back to before what its log keeps does not start, and says so."""
    from tests.ha.contract.clusters import RaftCluster

    monkeypatch.setattr(RaftCluster, "settings", {**RaftCluster.settings, "entries_kept": 5})

    async def scenario(cluster):
        leader = await cluster.leader()
        for number in range(40):
            await leader.protocol.propose(set_to(b"%d" % number))
        await until(lambda: leader.protocol._log.group("journal").floor.index > 20)
        await cluster.stop_node(leader.name)
        shutil.rmtree(cluster.path / leader.name / "meta")
        with pytest.raises(errors.CorruptionError, match="behind"):
            await cluster.start_node(leader.name, leader.number)

    on(scenario, count=1)


def test_an_unstable_node_stays_so_for_its_grace(on, monkeypatch):
    """H19: with a grace a joiner that has caught up at once counts only after that time."""
    from tests.ha.contract.clusters import RaftCluster

    monkeypatch.setattr(RaftCluster, "settings", {**RaftCluster.settings, "unstable_grace_s": 1.5})

    async def scenario(cluster):
        leader = await cluster.leader()
        await leader.protocol.add_node("n3", node_id(9), address(9))
        began = time.monotonic()
        joined = await cluster.start_node("n3", 9)
        await until(lambda: joined.machine.applied_index >= leader.machine.applied_index)
        await until(lambda: leader.member("n3").stable)
        assert time.monotonic() - began >= 1.4

    on(scenario)


def test_a_node_of_doubtful_memory_regains_its_vote(on):
    """F14: a node whose directory may be behind what it promised follows without a vote until it has caught up with a
    leader that a majority without it confirms; or until it is told that its directory is right.
    """

    async def scenario(cluster):
        leader = await cluster.leader()
        follower = await cluster.follower()
        await cluster.stop_node(follower.name)
        back = await cluster.start_node(follower.name, follower.number, trusted=False)
        assert not back.protocol.machine.trusted
        await leader.protocol.propose(set_to(b"x"))
        await until(lambda: back.protocol.machine.trusted)
        for node in cluster.nodes.values():
            if node is not back:
                await cluster.stop_node(node.name)
                break
        numbers = {"n0": 1, "n1": 2, "n2": 3}
        missing = next(name for name in numbers if name not in cluster.nodes)
        again = await cluster.start_node(missing, numbers[missing], trusted=False)
        assert again.protocol.trust(trusted=True)
        await until(lambda: again.protocol.machine.trusted)
        await again.protocol.propose(set_to(b"y"))

    on(scenario)


def flushed(node) -> bool:
    """Whether everything that a node has applied is in its file."""
    return node.protocol._journal.applied.index == node.protocol.applied_index


@pytest.mark.parametrize("who", ["a follower", "the leader"])
def test_a_state_that_was_changed_by_hand_is_repaired(on, monkeypatch, who):
    """B17: a row changed by hand on one node is found within the period and put right from the majority, once; the
    counter says so, and the node goes on applying.
    """
    from tests.ha.contract.clusters import RaftCluster

    monkeypatch.setattr(RaftCluster, "settings", {**RaftCluster.settings, "reconcile_s": 0.5})

    async def scenario(cluster):
        leader = await cluster.leader()
        await leader.protocol.propose(set_to(b"before"))
        await cluster.equal()
        node = leader if who == "the leader" else await cluster.follower()
        await until(lambda: flushed(node))
        right = node.machine.digest()
        moved = msgspec.structs.replace(node.member("n0"), address=address(77))
        with node.disk.transaction() as transaction:
            transaction.put("members", b"n0", msgspec.msgpack.encode(moved))
        assert node.machine.digest() != right
        await until(lambda: node.metrics.value("srengine_ha_state_repairs_total") == 1)
        assert node.member("n0").address == address(0)
        for other in cluster.nodes.values():
            await other.protocol.propose(set_to(other.name.encode()))
        await cluster.equal()
        assert any(alarm.startswith("state_differs") for alarm in node.alarms)
        repairs = [each.metrics.value("srengine_ha_state_repairs_total") for each in cluster.nodes.values()]
        assert sorted(repairs) == [0, 0, 1]

    on(scenario)


def test_one_of_two_cannot_know_who_is_right(on):
    """B17: without a majority against it nobody throws its state away."""

    async def scenario(cluster):
        leader = await cluster.leader()
        await cluster.equal()
        await until(lambda: flushed(leader))
        with leader.disk.transaction() as transaction:
            transaction.put("test", b"stray", b"row")
        before = {name: node.machine.digest() for name, node in cluster.nodes.items()}
        assert len(set(before.values())) == 2
        for node in cluster.nodes.values():
            assert not await node.protocol.reconciling.compare()
        assert {name: node.machine.digest() for name, node in cluster.nodes.items()} == before

    on(scenario, count=2)
