"""Drivers with real logs: elections, proposals, restarts, partitions, disks that fail, states that are installed."""

from __future__ import annotations

import asyncio
import errno
import os
import threading

import pytest

from srengine import errors
from srengine.clock import SystemClock
from srengine.consensus.driver import Driver, prepare
from srengine.consensus.effects import Role
from srengine.consensus.entries import Configuration, Floor
from srengine.consensus.log import NodeLog
from srengine.consensus.messages import Append, Bundle, TimeoutNow
from srengine.consensus.services import Bounds, Health
from srengine.consensus.waiting import WaitingRoom
from srengine.storage.logged import recover_logged
from srengine.transport import Peer
from tests.consensus.cluster import GROUP, LateState, QuickState, State, cluster, until
from tests.consensus.logs import NODES, Raw, filled

KINDS = pytest.mark.parametrize("kind", ["memory", "zmq"])


def run(coroutine):
    asyncio.run(coroutine)


def followers(c, leader):
    return [member for member in c.members if member is not leader]


# --- the usual -------------------------------------------------------------------------------------------------------


@KINDS
def test_concurrent_proposals_are_applied_once_everywhere(tmp_path, kind):
    """H01: one node leads; what many clients propose at once is decided, each in its place, the same on all nodes."""

    async def main():
        async with cluster(tmp_path, kind) as c:
            leader = await c.leader()

            async def client(number):
                return [await leader.propose(b"p%d-%d" % (number, count)) for count in range(10)]

            places = await asyncio.gather(*(client(number) for number in range(20)))
            await c.settled()
            state = leader.states[GROUP]
            decided = {
                place: b"p%d-%d" % (number, count)
                for number, client_places in enumerate(places)
                for count, place in enumerate(client_places)
            }
            assert len(decided) == 200
            assert {(index, term): data for index, term, data in state.entries if data.startswith(b"p")} == decided
            assert sum(member.role is Role.LEADER for member in c.members) == 1
            assert state.threads == {"srengine-apply"}
            # What came during one transaction of the log shared the next one.
            assert leader.metrics.value("srengine_consensus_turns_total") < 150

    run(main())


@KINDS
def test_reads_are_linearizable_at_any_node(tmp_path, kind):
    """H10: an index for a read is one that the node has applied, and not below what was decided before the question."""

    async def main():
        async with cluster(tmp_path, kind) as c:
            leader = await c.leader()
            for number in range(5):
                index, _ = await leader.propose(b"p%d" % number)
                for member in c.members:
                    read = await member.driver.read_index(GROUP)
                    assert read >= index
                    assert b"p%d" % number in member.states[GROUP].data

    run(main())


@KINDS
def test_leadership_is_handed_over(tmp_path, kind):
    """H15: a transfer names who leads then; a transfer by a node that does not lead is refused with the leader."""

    async def main():
        async with cluster(tmp_path, kind) as c:
            leader = await c.leader()
            await leader.propose(b"p1")
            target, other = followers(c, leader)
            with pytest.raises(errors.NotLeader) as caught:
                await target.driver.transfer(GROUP)
            assert caught.value.leader == leader.id
            assert await leader.driver.transfer(GROUP, target.id) == target.id
            await until(lambda: target.role is Role.LEADER)
            with pytest.raises(errors.InvalidValue):
                await target.driver.transfer(GROUP, "f" * 32)
            await target.propose(b"p2")
            await c.settled()
            assert other.states[GROUP].data == [b"p1", b"p2"]

    run(main())


def test_roles_are_told_in_order(tmp_path):
    """H04: an observer is told the present role and then every change, in order, terms never falling."""

    async def main():
        async with cluster(tmp_path) as c:
            leader = await c.leader()
            await leader.propose(b"p")
            leader.driver.step_down(GROUP, "the test wants it")
            await until(lambda: leader.role is not Role.LEADER)
            await c.leader()
            terms = [role.term for role in leader.roles]
            assert terms == sorted(terms)
            kinds = [role.role for role in leader.roles]
            assert kinds[0] is Role.FOLLOWER
            assert Role.LEADER in kinds
            late = []
            end = leader.driver.watch_roles(GROUP, late.append)
            assert late == [leader.roles[-1]]
            end()

    run(main())


def test_what_a_node_refuses(tmp_path):
    """A proposal elsewhere than at the leader names it; an unknown group, a step of membership too far and a stopped
    driver are typed errors, and nothing happened.
    """

    async def main():
        async with cluster(tmp_path) as c:
            leader = await c.leader()
            await leader.propose(b"p1")
            follower = followers(c, leader)[0]
            await follower.driver.read_index(GROUP)
            with pytest.raises(errors.NotLeader) as caught:
                await follower.propose(b"p2")
            assert caught.value.leader == leader.id
            with pytest.raises(errors.NotFound):
                await leader.driver.propose("unknown", b"")
            with pytest.raises(errors.InvalidValue):
                await leader.propose(b"p3", configuration=Configuration(NODES[:1]))
            waiting = [asyncio.ensure_future(leader.propose(b"p4")) for _ in range(3)]
            await asyncio.sleep(0)
            driver = leader.driver
            await leader.stop()
            for result in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(result, errors.Closed | tuple)
            with pytest.raises(errors.Closed):
                await driver.propose(GROUP, b"p5")
            with pytest.raises(errors.Closed):
                await driver.read_index(GROUP)

    run(main())


def test_membership_changes_by_entries(tmp_path):
    """H07: a configuration is proposed like any entry, one step at a time, and is in force on all nodes."""

    async def main():
        async with cluster(tmp_path) as c:
            leader = await c.leader()
            await leader.propose(b"p1")
            out = followers(c, leader)[0]
            left = Configuration(tuple(sorted(set(NODES) - {out.id})))
            await leader.propose(b"remove", configuration=left)
            await leader.propose(b"p2")
            other = next(member for member in followers(c, leader) if member is not out)
            await until(lambda: other.states[GROUP].data == [b"p1", b"p2"])
            assert leader.log.group(GROUP).configuration == left
            assert leader.states[GROUP].applied.configuration == left
            await out.stop()
            await leader.propose(b"p3")

    run(main())


def test_many_groups_share_turns_and_bundles(tmp_path):
    """Entries of many groups are written in common transactions, their messages posted in common bundles."""
    names = (GROUP, *(f"tablet-{number}" for number in range(20)))

    async def main():
        async with cluster(tmp_path) as c:
            for member in c.members:
                await member.stop()
            for member in c.members:
                await member.start(groups=names)

            async def write(name):
                for count in range(5):
                    while True:
                        leading = [m for m in c.members if m.driver.status(name).role is Role.LEADER]
                        try:
                            await leading[0].driver.propose(name, b"p%d" % count)
                            break
                        except (errors.NoQuorum, IndexError):
                            await asyncio.sleep(0.02)

            await asyncio.gather(*(write(name) for name in names))
            await until(
                lambda: all(
                    member.states[name].data == [b"p0", b"p1", b"p2", b"p3", b"p4"]
                    for member in c.members
                    for name in names
                )
            )
            for member in c.members:
                entries_written = sum(member.log.group(name).last_index for name in names)
                assert member.metrics.value("srengine_consensus_turns_total") < entries_written

    run(main())


# --- nodes that go and come ------------------------------------------------------------------------------------------


@KINDS
def test_a_leader_that_dies_is_replaced_and_comes_back(tmp_path, kind):
    """H03, F01: when the leader goes, a closed connection starts an election early; nothing acknowledged is lost; the
    old leader catches up after its restart.
    """

    async def main():
        async with cluster(tmp_path, kind) as c:
            leader = await c.leader()
            for number in range(10):
                await leader.propose(b"p%d" % number)
            await leader.stop()
            index, _ = await c.write(b"p10")
            assert index > 10
            await leader.start()
            await c.write(b"p11")
            await c.settled()
            assert leader.states[GROUP].data == [b"p%d" % number for number in range(12)]
            for member in c.members:
                assert member.log.group(GROUP).damage is None

    run(main())


def test_every_node_restarts(tmp_path):
    """F01: when all nodes stop and start again, everything that was acknowledged is there, and they go on."""

    async def main():
        async with cluster(tmp_path) as c:
            for life in range(3):
                await c.write(b"p%d" % life)
                await c.settled()
                for member in c.members:
                    await member.stop()
                for member in c.members:
                    await member.start()
            await c.write(b"p3")
            await c.settled()
            assert c.members[0].states[GROUP].data == [b"p0", b"p1", b"p2", b"p3"]

    run(main())


def test_a_minority_decides_nothing(tmp_path):
    """F23: a leader that is cut off decides nothing more, the majority goes on; after the heal its undecided entries
    have been cut and saved, and their proposers were told.
    """

    async def main():
        async with cluster(tmp_path) as c:
            old = await c.leader()
            await old.propose(b"p1")
            await c.settled()
            others = followers(c, old)
            c.network.partition([old.endpoint], [member.endpoint for member in others])
            lost = [asyncio.ensure_future(old.propose(b"lost%d" % number, timeout_s=30)) for number in range(3)]
            new = await c.leader(others)
            await new.propose(b"p2")
            await until(lambda: old.role is not Role.LEADER)
            with pytest.raises(errors.NoQuorum):
                await old.driver.read_index(GROUP, timeout_s=5)
            assert not any(task.done() for task in lost), "not known yet"
            c.network.heal()
            for member in c.members:
                for channel in member.channels.values():
                    channel.wake()
            await c.write(b"p3")
            await c.settled()
            assert old.states[GROUP].data == [b"p1", b"p2", b"p3"]
            for result in await asyncio.gather(*lost, return_exceptions=True):
                assert isinstance(result, errors.Conflict), result
            saved = [entry.data for _, items in old.log.saved(GROUP) for entry in items]
            assert set(saved) >= {b"lost0", b"lost1", b"lost2"}

    run(main())


def test_a_proposal_that_is_not_decided_times_out(tmp_path):
    """F23: without a majority a proposal ends by its time-out, as not known."""

    async def main():
        async with cluster(tmp_path) as c:
            leader = await c.leader()
            c.network.partition([leader.endpoint], [member.endpoint for member in followers(c, leader)])
            with pytest.raises((errors.TimedOut, errors.NoQuorum)):
                await leader.propose(b"p1", timeout_s=0.05)
            assert leader.driver.status(GROUP).waiting == 0

    run(main())


def test_a_node_that_starts_ends_the_back_off_of_the_others(tmp_path):
    """F30: a node says that it is here as soon as it starts, so that nobody waits out a back-off to reach it."""

    async def main():
        async with cluster(tmp_path) as c:
            leader = await c.leader()
            away = followers(c, leader)[0]
            await leader.propose(b"p1")
            await away.stop()
            channel = leader.channels[away.id]
            await until(lambda: not channel.connected and channel._attempt is None)
            channel._not_before = asyncio.get_running_loop().time() + 1000
            bundles = []
            receive = leader.driver.receive
            leader.endpoint._post_handlers["peer", Bundle] = lambda peer, bundle: (
                bundles.append((peer.node_id, bundle)),
                receive(peer, bundle),
            )
            await away.start()
            await until(lambda: channel.connected)
            first = next(bundle for node, bundle in bundles if node == away.id)
            assert first == Bundle(()), "before it has anything to say"
            await c.settled()

    run(main())


# --- disks -----------------------------------------------------------------------------------------------------------


class Disk:
    """The disk under one member's log, whichever way turns go to it: by the kernel's thread, or by the driver's.

    While ``shut`` it does not answer; with ``errno`` set what begins then fails.
    """

    def __init__(self, member, monkeypatch, way):
        self.errno = 0
        self._failing = 0
        self._open = threading.Event()
        self._open.set()
        self._held = None
        self._store = member.log._store
        if way == "kernel":
            self._appender = self._store._appender
            monkeypatch.setattr(self._store, "_appender", self)
        else:
            append = member.log.append

            def slow(turn):
                assert self._open.wait(60)
                if self.errno == errno.ENOSPC:
                    raise errors.DiskFull("no space left on the device")
                if self.errno:
                    raise errors.TabletFenced("input/output error", reason="io-error")
                append(turn)

            monkeypatch.setattr(member.log, "append", slow)
            monkeypatch.setattr(member.log, "begin", lambda turn: False)

    def shut(self):
        self._open.clear()

    def open(self):
        self._open.set()
        if self._held is not None:
            held, self._held = self._held, None
            self.begin(*held)

    def begin(self, *given):
        if not self._open.is_set():
            self._held = given
            return
        self._failing = self.errno
        if self._failing:
            os.write(self._store._notify, b"!")
        else:
            self._appender.begin(*given)

    def take(self):
        return self._failing or self._appender.take()

    def close(self):
        self._appender.close()


@pytest.fixture(params=["kernel", "thread"])
def way(request):
    """How turns of the log go to the disk."""
    return request.param


def test_nothing_is_acknowledged_before_it_is_durable(tmp_path, monkeypatch, way):
    """F17: while the disks of both followers hang, the leader's entry is not decided, however long its proposer waits;
    one of them answering is enough.
    """

    async def main():
        async with cluster(tmp_path) as c:
            leader = await c.leader()
            await leader.propose(b"p1")
            await c.settled()
            disks = [Disk(member, monkeypatch, way) for member in followers(c, leader)]
            for disk in disks:
                disk.shut()
            proposal = asyncio.ensure_future(leader.propose(b"p2"))
            await until(lambda: all(member.driver._groups[GROUP].busy for member in followers(c, leader)))
            await until(
                lambda: leader.log.group(GROUP).last_index == followers(c, leader)[0].log.group(GROUP).last_index + 1
            )
            assert not proposal.done()
            disks[0].open()
            await until(proposal.done)
            disks[1].open()
            await asyncio.gather(proposal, return_exceptions=True)
            await c.settled()

    run(main())


def test_a_hung_disk_costs_the_leader_its_leadership(tmp_path, monkeypatch, way):
    """F17, H13: while its disk does not answer the leader steps down though its process lives, the others elect and go
    on; nothing is acknowledged late; when the disk answers it follows.
    """

    async def main():
        async with cluster(tmp_path) as c:
            leader = await c.leader()
            await leader.propose(b"p1")
            disk = Disk(leader, monkeypatch, way)
            disk.shut()
            stuck = asyncio.ensure_future(leader.propose(b"pstuck", timeout_s=30))
            await until(lambda: leader.driver._groups[GROUP].busy)
            queued = asyncio.ensure_future(leader.propose(b"queued", timeout_s=30))
            await until(lambda: leader.role is not Role.LEADER, 2)
            await until(lambda: Health.SLOW in leader.health)
            with pytest.raises(errors.NoQuorum):
                await leader.propose(b"refused")
            new = await c.leader(followers(c, leader))
            await new.propose(b"p2")
            with pytest.raises(errors.NoQuorum):
                await queued
            assert not stuck.done(), "it may yet be decided"
            disk.open()
            await c.settled()
            index, term = await stuck
            assert (index, term, b"pstuck") in new.states[GROUP].entries
            assert leader.health[-1] is Health.OK
            assert leader.states[GROUP].data == [b"p1", b"pstuck", b"p2"]

    run(main())


def test_a_stop_does_not_wait_for_ever_for_the_disk(tmp_path, monkeypatch, way):
    """F17: a node whose disk hangs can end: `stop` says that the disk does not answer."""

    async def main():
        async with cluster(tmp_path) as c:
            leader = await c.leader()
            await leader.propose(b"p1")
            await c.settled()
            disk = Disk(leader, monkeypatch, way)
            disk.shut()
            stuck = asyncio.ensure_future(leader.propose(b"stuck"))
            await until(lambda: leader.driver._groups[GROUP].busy)
            monkeypatch.setattr("srengine.consensus.turns.STOP_S", 0.05)
            with pytest.raises(errors.TimedOut):
                await leader.driver.stop()
            with pytest.raises(errors.Closed):
                await stuck
            disk.open()

    run(main())


def test_a_full_disk_is_read_only_and_comes_back(tmp_path, monkeypatch, way):
    """H26, F07: a leader without space steps down, says so, and takes part again when there is space; no crash, nothing
    of the log is lost.
    """

    async def main():
        async with cluster(tmp_path) as c:
            leader = await c.leader()
            await leader.propose(b"p1")
            disk = Disk(leader, monkeypatch, way)
            disk.errno = errno.ENOSPC
            with pytest.raises((errors.NoQuorum, errors.TimedOut)):
                await leader.propose(b"lost", timeout_s=3)
            assert Health.FULL in leader.health
            new = await c.leader(followers(c, leader))
            await new.propose(b"p2")
            disk.errno = 0
            await until(lambda: leader.driver.health is Health.OK)
            await c.write(b"p3")
            await c.settled()
            assert leader.states[GROUP].data == [b"p1", b"p2", b"p3"]

    run(main())


def test_an_input_output_error_ends_taking_part(tmp_path, monkeypatch, way):
    """F05: after EIO of the log the node takes part in no group, says so at once, keeps running; the others go on; who
    waited is told.
    """

    async def main():
        async with cluster(tmp_path) as c:
            leader = await c.leader()
            await leader.propose(b"p1")
            Disk(leader, monkeypatch, way).errno = errno.EIO
            with pytest.raises(errors.TabletFenced):
                await leader.propose(b"lost")
            assert leader.health == [Health.FENCED]
            assert leader.failed == [(GROUP, "FENCED")]
            assert leader.role is not Role.LEADER
            assert isinstance(leader.driver.status(GROUP).failed, errors.TabletFenced)
            with pytest.raises(errors.TabletFenced):
                await leader.propose(b"refused")
            await c.leader(followers(c, leader))
            await c.write(b"p2")
            monkeypatch.undo()
            await leader.stop()
            recover_logged(leader.path)
            await leader.start()
            await c.settled()
            assert leader.states[GROUP].data == [b"p1", b"p2"]

    run(main())


@pytest.mark.parametrize("step", ["begin", "finish"])
def test_an_error_of_the_system_in_the_log_ends_taking_part(tmp_path, monkeypatch, step):
    """F05: an error that nobody foresaw ends taking part as well: nothing is promised on a log in doubt."""

    async def main():
        async with cluster(tmp_path) as c:
            leader = await c.leader()
            await leader.propose(b"p1")

            def broken(*_):
                raise OSError(errno.EIO, "no such luck")

            monkeypatch.setattr(leader.log, step, broken)
            with pytest.raises(errors.Error, match="no such luck"):
                await leader.propose(b"p2")
            assert leader.health == [Health.FENCED]
            assert leader.driver.status(GROUP).failed is not None

    run(main())


def test_a_state_machine_that_fails_ends_its_group(tmp_path):
    """F05: what cannot be applied ends the group on this node, named; a full disk there is tried again."""

    async def main():
        async with cluster(tmp_path) as c:
            leader = await c.leader()
            await leader.propose(b"p0")
            leader.states[GROUP].fault = errors.DiskFull("no space")
            await leader.propose(b"p1")
            assert leader.health[0] is Health.FULL
            assert leader.states[GROUP].data == [b"p0", b"p1"]
            leader.states[GROUP].fault = errors.CorruptionError("a row is damaged")
            with pytest.raises(errors.CorruptionError):
                await leader.propose(b"p2")
            assert leader.failed == [(GROUP, "CORRUPTION")]
            await c.leader(followers(c, leader))

    run(main())


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_damaged_log_is_not_trusted_until_it_has_caught_up(tmp_path):
    """H28, F10: a node whose log has a damaged entry does not vote by what others say of it, catches up from the
    leader, and is whole again, durably.
    """

    async def main():
        async with cluster(tmp_path) as c:
            for number in range(6):
                await c.write(b"p%d" % number)
            await c.settled()
            leader = await c.leader()
            hurt = followers(c, leader)[0]
            await hurt.stop()
            hurt.states[GROUP] = State()
            with Raw(hurt.path) as raw:
                keys = sorted(raw.stored("entries"))
                raw.put("entries", keys[3], b"damaged")
            await hurt.start()
            status = hurt.driver.status(GROUP)
            assert status.damage is not None
            assert not status.trusted
            assert not hurt.driver.trust(GROUP, trusted=True)
            await until(lambda: hurt.driver.status(GROUP).trusted)
            await until(lambda: hurt.driver.status(GROUP).damage is None)
            await c.settled()
            await hurt.stop()
            await hurt.start()
            assert hurt.driver.status(GROUP).damage is None

    run(main())


def test_a_log_without_its_promises_is_not_run(tmp_path):
    """F14: a node whose term and vote are lost cannot go on under its id."""
    filled(tmp_path / "log")
    with Raw(tmp_path / "log") as raw:
        raw.put("groups", b"journal\0h", b"damaged")
    with NodeLog.open(tmp_path / "log") as log, pytest.raises(errors.CorruptionError, match="lost"):
        prepare(log, GROUP, State())


def test_a_log_behind_its_state_begins_behind_it(tmp_path):
    """Design rule 9: at start a log that ends before what is applied is moved to it; one whose floor is beyond the
    state is refused, and so is one of an older term.
    """
    filled(tmp_path / "log", last=9, floor=4)
    with NodeLog.open(tmp_path / "log") as log:
        state = State()
        state.applied = Floor(12, 1, Configuration(NODES))
        assert prepare(log, GROUP, state).floor == state.applied
        assert prepare(log, GROUP, state).last_index == 12
        state.applied = Floor(3, 1)
        with pytest.raises(errors.CorruptionError):
            prepare(log, GROUP, state)
        state.applied = Floor(20, 7)
        with pytest.raises(errors.CorruptionError):
            prepare(log, GROUP, state)


def test_who_proposes_alone_waits_for_no_turn_and_many_share_one(tmp_path):
    """P6: from the third proposal on, one after the other, each is written at once; those of one turn of the loop are
    written together.
    """

    async def main():
        async with cluster(tmp_path) as c:
            leader = await c.leader()
            loop, log, turns, waited = asyncio.get_running_loop(), leader.log, [], []
            begin = log.begin

            def beginning(turn):
                turns.append((len(turn[GROUP].entries), bool(waited)))
                return begin(turn)

            async def alone(data):
                waited.clear()
                loop.call_soon(waited.append, True)
                await leader.propose(data)

            log.begin = beginning
            for number in range(5):
                await alone(b"p%d" % number)
            assert turns[2:] == [(1, False)] * 3
            for burst in range(2):
                turns.clear()
                await asyncio.gather(*(leader.propose(b"q%d-%d" % (burst, number)) for number in range(8)))
            # The first of the first burst may have gone alone; after that it is known that they come in company.
            assert [count for count, _ in turns] in ([8], [1, 7])[: 2 - burst]
            turns.clear()
            for number in range(3):
                await alone(b"r%d" % number)
            assert [count for count, _ in turns] == [1] * 3
            assert turns[-1] == (1, False)
            await c.settled()

    run(main())


def test_a_machine_that_fails_under_a_lone_proposal_ends_its_group(tmp_path):
    """Who proposes gets a typed error, the loop is told of the mistake, and the group takes part no more."""

    async def main():
        async with cluster(tmp_path) as c:
            leader = await c.leader()
            for number in range(3):
                await leader.propose(b"p%d" % number)
            told = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
            group = leader.driver._groups[GROUP]

            def fail():
                raise ZeroDivisionError

            group.machine.drain = fail
            with pytest.raises(errors.Error, match="the machine of"):
                await leader.propose(b"x")
            assert [type(error) for error in told] == [ZeroDivisionError]
            assert group.failed is not None
            asyncio.get_running_loop().set_exception_handler(None)

    run(main())


# --- trims and installs ----------------------------------------------------------------------------------------------


async def written_until_trimmed(leader, number, index):
    """Write p<number>, p<number + 1>, ... until the leader's log begins behind ``index``; return the next number.

    What a node lacks that was there a moment ago is kept for it; only later entries end that.
    """
    while leader.log.group(GROUP).floor.index <= index:
        await leader.propose(b"p%d" % number)
        number += 1
        await asyncio.sleep(0.005)
    return number


@KINDS
def test_a_node_that_lags_behind_the_log_gets_the_state(tmp_path, kind):
    """H17: the log is trimmed behind what is applied; a node that missed more is given the state, goes on from there,
    and its log begins at it; a fetch that fails is tried again.
    """

    async def main():
        async with cluster(tmp_path, kind, bounds=Bounds(entries_kept=10)) as c:
            leader = await c.leader()
            await leader.propose(b"p0")
            await c.settled()
            away = followers(c, leader)[0]
            await away.stop()
            for number in range(1, 60):
                await c.write(b"p%d" % number)
            leader = await c.leader()
            count = await written_until_trimmed(leader, 60, 40)
            assert leader.log.group(GROUP).last_index - leader.log.group(GROUP).floor.index >= 10
            away.fetch_fault = errors.Unreachable("not now")
            await away.start()
            await c.settled()
            assert away.fetches == 2
            assert away.states[GROUP].data == [b"p%d" % number for number in range(count)]
            await until(lambda: away.log.group(GROUP).floor.index > 40)
            await leader.propose(b"more")
            await c.settled()
            await away.stop()
            await away.start()
            await leader.propose(b"and more")
            await c.settled()

    run(main())


def test_what_a_fetched_state_goes_on_with_is_kept(tmp_path):
    """B22: while a node fetches the state, far more is written than a log keeps; it fetches once all the same."""

    async def main():
        async with cluster(tmp_path, bounds=Bounds(entries_kept=5)) as c:
            leader = await c.leader()
            away = followers(c, leader)[0]
            await away.stop()
            count = await written_until_trimmed(leader, 0, 20)

            async def write():
                for number in range(count, count + 200):
                    await leader.propose(b"p%d" % number)

            away.in_fetch = write
            await away.start()
            await c.settled()
            assert away.fetches == 1
            # Once it has caught up, nothing is kept for it any more.
            count = await written_until_trimmed(leader, count + 200, count + 150)
            await c.settled()
            assert away.states[GROUP].data == [b"p%d" % number for number in range(count)]

    run(main())


def test_what_is_kept_for_others_is_bounded_by_bytes(tmp_path):
    """P6: a state that takes too long to fetch does not make the log of the others grow without an end."""

    async def main():
        async with cluster(tmp_path, bounds=Bounds(entries_kept=5, bytes_kept=100_000)) as c:
            leader = await c.leader()
            away = followers(c, leader)[0]
            await away.stop()
            count = await written_until_trimmed(leader, 0, 5)

            async def write():
                away.in_fetch = None
                for number in range(count, count + 40):
                    await leader.propose(b"p%d" % number + bytes(20_000))
                await until(lambda: leader.log.group(GROUP).bytes < 250_000)

            away.in_fetch = write
            await away.start()
            await c.settled()
            assert away.fetches == 2

    run(main())


def test_logs_are_trimmed_by_bytes(tmp_path):
    """P6: large entries are trimmed by their bytes, long before their number matters."""

    async def main():
        async with cluster(tmp_path, bounds=Bounds(entries_kept=10_000, bytes_kept=100_000)) as c:
            leader = await c.leader()
            for number in range(40):
                await leader.propose(b"p%d" % number + bytes(20_000))
            for member in c.members:
                await until(lambda member=member: member.log.group(GROUP).bytes < 250_000)
            await c.settled()

    run(main())


# --- who waits -------------------------------------------------------------------------------------------------------


def test_everybody_who_waits_ends_at_their_own_time():
    """One timer serves all: who comes later with less time ends first, and the others at theirs, none before."""

    async def main():
        loop = asyncio.get_running_loop()
        room = WaitingRoom(GROUP, loop)
        ended = []
        began = loop.time()
        for timeout_s in (0.3, 0.1, 0.2, 1000):
            token, future = room.begin("proposal", timeout_s)
            future.add_done_callback(lambda _, timeout_s=timeout_s: ended.append((timeout_s, loop.time() - began)))
        kept = token
        await until(lambda: len(ended) == 3)
        assert [timeout_s for timeout_s, _ in ended] == [0.1, 0.2, 0.3]
        assert all(after >= timeout_s - 0.01 for timeout_s, after in ended)
        assert kept in room
        room.end_all(lambda: errors.Closed("over"))
        with pytest.raises(errors.Closed):
            await future

    asyncio.run(main())


# --- states that are durable later -----------------------------------------------------------------------------------


def test_what_is_applied_is_flushed_together_and_trimmed_behind_that(tmp_path, monkeypatch):
    """Entries are answered before the state is durable, many share a flush, and no log is trimmed beyond it."""
    monkeypatch.setattr("srengine.consensus.applying.FLUSH_S", 0.05)

    async def main():
        async with cluster(tmp_path, state_type=LateState, bounds=Bounds(entries_kept=0)) as c:
            leader = await c.leader()
            for number in range(60):
                if number % 20 == 10:
                    for member in c.members:
                        member.states[GROUP].not_now = 3
                index, _ = await leader.propose(b"p%d" % number)
                for member in c.members:
                    assert member.log.group(GROUP).floor.index <= member.states[GROUP].applied.index
            assert leader.states[GROUP].visible.index == index
            await until(lambda: all(member.states[GROUP].applied.index == index for member in c.members))
            assert all(0 < member.states[GROUP].flushes < 60 for member in c.members)
            await until(lambda: all(member.log.group(GROUP).floor.index > 0 for member in c.members))
            assert leader.states[GROUP].threads == {"srengine-apply"}
            await c.settled()

    run(main())


def test_a_long_trim_lets_others_write_between_its_steps(tmp_path, monkeypatch):
    """P6: many entries are trimmed in steps; an entry that is proposed meanwhile is written before the last of them."""
    monkeypatch.setattr("srengine.consensus.applying.FLUSH_S", 0.01)
    monkeypatch.setattr("srengine.consensus.applying.TRIM_ROWS", 10)

    async def main():
        async with cluster(tmp_path, state_type=LateState, bounds=Bounds(entries_kept=0)) as c:
            leader = await c.leader()
            loop, log, proposed, happened = asyncio.get_running_loop(), leader.log, [], []
            trim, begin = log.trim, log.begin

            def trimming(name, floor):
                happened.append(floor.index - log.group(name).floor.index)
                if len(happened) == 1:

                    async def propose():
                        return await leader.propose(b"meanwhile")

                    proposed.append(asyncio.run_coroutine_threadsafe(propose(), loop))
                trim(name, floor)

            def beginning(turn):
                if happened:
                    happened.append("turn")
                return begin(turn)

            leader.states[GROUP].not_now = 1_000_000
            for number in range(60):
                index, _ = await leader.propose(b"p%d" % number)
            log.trim, log.begin = trimming, beginning
            leader.states[GROUP].not_now = 0
            await until(lambda: log.group(GROUP).floor.index >= index)
            steps = [step for step in happened if step != "turn"]
            assert len(steps) >= 6
            assert max(steps) == 10
            assert "turn" in happened[: len(happened) - happened[::-1].index(steps[-1])]
            await asyncio.wrap_future(proposed[0])
            await c.settled()

    run(main())


def test_what_memory_can_answer_is_applied_on_the_loop(tmp_path, monkeypatch):
    """Entries that a state takes at once never see the thread; those that it does not take do, in their order."""
    monkeypatch.setattr("srengine.consensus.applying.FLUSH_S", 0.01)

    async def main():
        async with cluster(tmp_path, state_type=QuickState) as c:
            leader = await c.leader()
            state = leader.states[GROUP]
            for number in range(30):
                if number % 10 == 5:
                    state.busy = 2
                index, _ = await leader.propose(b"p%d" % number)
                assert state.visible.index == index
            assert not state.busy
            assert 20 <= state.at_once < len(state.entries)
            await until(lambda: state.applied.index == index)
            assert state.threads == {"srengine-apply"}
            await c.settled()
            assert state.data == [b"p%d" % number for number in range(30)]

    run(main())


def test_what_leaves_and_what_is_written_does_not_wait_for_what_is_applied(tmp_path, monkeypatch):
    """P6: a follower acknowledges entries before it applies the ones before them, and the disk works meanwhile: others
    wait for both, nobody but its own readers for the state.
    """

    async def main():
        async with cluster(tmp_path, state_type=QuickState) as c:
            leader = await c.leader()
            await leader.propose(b"p0")
            await c.settled()
            turns = [[]]  # of the loop; what leaves right after the disk is counted with the turn before

            def noted(owner, name, what):
                original = getattr(owner, name)

                def call(*given):
                    turns[-1].append(what)
                    return original(*given)

                monkeypatch.setattr(owner, name, call)

            for member in c.members:
                turn = member.driver._turn

                def begun(turn=turn):
                    turns.append([])
                    turn()

                monkeypatch.setattr(member.driver, "_turn", begun)
                noted(member.driver, "_send", "send")
                noted(member.driver._turns, "work", "log")
                noted(member.states[GROUP], "apply_now", "apply")
            for number in range(20):
                await leader.propose(b"p%d" % number)
            await c.settled()
            applying = [turn for turn in turns if "apply" in turn]
            assert len(applying) >= 20 * len(c.members) // 2
            before = [turn[: turn.index("apply")] for turn in applying]
            assert all(done in (["send", "log"], ["log"]) for done in before), applying

    run(main())


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_what_is_proposed_on_the_news_of_an_election_is_written_with_its_first_entry(tmp_path, monkeypatch, turns):
    """B08: a proposal of who hears of the election, up to three turns of the loop later, shares the first write of the
    term; nothing of the term leaves this node before.
    """

    async def main():
        async with cluster(tmp_path) as c:
            before = await c.leader()
            await before.propose(b"p0")
            await c.settled()
            writes = {member.id: [] for member in c.members}
            for member in c.members:
                begin = member.log.begin

                def noted(turn, member=member, begin=begin):
                    if turn[GROUP].entries:
                        writes[member.id].append([(entry.term, entry.data) for entry in turn[GROUP].entries])
                    return begin(turn)

                monkeypatch.setattr(member.log, "begin", noted)
            proposals = []

            async def propose(member):
                for _ in range(turns - 1):
                    await asyncio.sleep(0)
                return await member.propose(b"p")

            def watch(member):
                def told(role):
                    if role.role is Role.LEADER and role.term > before.driver.status(GROUP).term - 1:
                        proposals.append((member, role.term, asyncio.ensure_future(propose(member))))

                return told

            for member in followers(c, before):
                member.driver.watch_roles(GROUP, watch(member))
            await before.driver.transfer(GROUP)
            await until(lambda: proposals)
            member, term, proposal = proposals[0]
            await proposal
            await c.settled()  # the third one, too
            for node in c.members:
                first = next(entries for entries in writes[node.id] if entries[0][0] == term)
                assert [data for _, data in first] == [b"", b"p"], (turns, writes)

    run(main())


def test_faults_of_what_is_applied_on_the_loop(tmp_path, monkeypatch):
    """H26: a full disk is tried again, in the thread; F05: anything else ends the group here, named, and no other."""
    monkeypatch.setattr("srengine.consensus.applying.RETRY_S", 0.02)

    async def main():
        async with cluster(tmp_path, state_type=QuickState) as c:
            leader = await c.leader()
            state = leader.states[GROUP]
            state.fault = errors.DiskFull("no space")
            index, _ = await leader.propose(b"p0")
            assert state.visible.index == index
            assert Health.FULL in leader.health
            state.fault = ValueError("a mistake")
            with pytest.raises(errors.Error):
                await leader.propose(b"p1")
            assert [name for name, _ in leader.failed] == [GROUP]
            await c.leader(followers(c, leader))

    run(main())


def test_a_crash_before_the_flush_applies_again(tmp_path, monkeypatch):
    """H11, F04: what all nodes only showed when they died is applied again from their logs: nothing is lost."""
    monkeypatch.setattr("srengine.consensus.applying.FLUSH_S", 1000)

    async def main():
        async with cluster(tmp_path, state_type=LateState) as c:
            for number in range(20):
                await c.write(b"p%d" % number)
            await c.settled()
            assert all(member.states[GROUP].applied.index == 0 for member in c.members)
            monkeypatch.setattr(LateState, "flush", lambda state: None)
            for member in c.members:
                await member.stop()
                member.states[GROUP].crash()
                assert not member.states[GROUP].data
            for member in c.members:
                await member.start()
            await c.write(b"p20")
            await c.settled()
            for member in c.members:
                assert member.states[GROUP].data == [b"p%d" % number for number in range(21)]

    run(main())


def test_large_entries_are_flushed_at_once_and_the_rest_at_the_stop(tmp_path, monkeypatch):
    """Memory for what is not durable is bounded; a stop in order leaves nothing to be applied again."""
    monkeypatch.setattr("srengine.consensus.applying.FLUSH_S", 1000)
    monkeypatch.setattr("srengine.consensus.applying.FLUSH_BYTES", 100_000)

    async def main():
        async with cluster(tmp_path, state_type=LateState) as c:
            leader = await c.leader()
            for number in range(20):
                await leader.propose(b"p%d" % number + bytes(20_000))
            index, _ = await leader.propose(b"p20")
            state = leader.states[GROUP]
            await until(lambda: state.flushes >= 3)
            assert state.applied.index < index
            await leader.stop()
            assert state.applied.index >= index

    run(main())


def test_a_flush_that_fails(tmp_path, monkeypatch):
    """H26, F07: a full disk is tried again, and what cannot be now; F05: anything else ends the group here, named."""
    monkeypatch.setattr("srengine.consensus.applying.FLUSH_S", 0.02)
    monkeypatch.setattr("srengine.consensus.applying.RETRY_S", 0.02)

    async def main():
        async with cluster(tmp_path, state_type=LateState) as c:
            leader = await c.leader()
            state = leader.states[GROUP]
            state.flush_fault = errors.DiskFull("no space")
            index, _ = await leader.propose(b"p0")
            await until(lambda: state.applied.index >= index)
            # There is space again, and that is told when the state is written, not when somebody writes next.
            await until(lambda: leader.health == [Health.FULL, Health.OK])
            assert leader.driver.health is Health.OK
            state.not_now = 3
            index, _ = await leader.propose(b"p1")
            await until(lambda: state.applied.index >= index)
            assert not state.not_now
            state.flush_fault = errors.CorruptionError("a row is damaged")
            await leader.propose(b"p2")
            await until(lambda: leader.failed)
            assert leader.failed == [(GROUP, "CORRUPTION")]
            await c.leader(followers(c, leader))

    run(main())


def test_health_is_the_worst_of_the_log_and_of_each_state(tmp_path, monkeypatch):
    """H26, F07: a log that writes again says nothing about a state that cannot, nor one state about another; what is
    full is so until it was written itself, or takes part no more. A disk that failed stays failed.
    """
    monkeypatch.setattr("srengine.consensus.applying.FLUSH_S", 1000)

    async def main():
        async with cluster(tmp_path, state_type=LateState) as c:
            leader = await c.leader()
            driver = leader.driver
            full = errors.DiskFull("no space")
            driver.set_health(Health.FULL, full, of=GROUP)
            driver.set_health(Health.SLOW, None)
            await leader.propose(b"p0")  # a turn of the log, which is well after it
            assert driver.health is Health.FULL
            driver.set_health(Health.FULL, full, of="other")
            driver.set_health(Health.OK, None, of="other")
            assert driver.health is Health.FULL
            driver.set_health(Health.OK, None, of=GROUP)
            assert driver.health is Health.OK
            driver.set_health(Health.FULL, full, of=GROUP)
            driver.fail_group(driver._group(GROUP), errors.CorruptionError("a row is damaged"))
            assert driver.health is Health.OK
            assert leader.health == [Health.FULL, Health.OK, Health.FULL, Health.OK]
            driver.set_health(Health.FENCED, errors.TabletFenced("io", reason="io-error"))
            driver.set_health(Health.OK, None)
            assert driver.health is Health.FENCED

    run(main())


def test_the_end_of_a_flush_tells_no_more_than_was_handed_out(tmp_path, monkeypatch):
    """A fetched state may be in place before the loop hears of the flush before it: the machine, which has not heard of
    that state, must not be told its index.
    """
    monkeypatch.setattr("srengine.consensus.applying.FLUSH_S", 0.02)
    flush = LateState.flush

    def and_then_a_state(state):
        flush(state)
        state.applied = Floor(state.visible.index + 5, state.visible.term, state.visible.configuration)

    async def main():
        async with cluster(tmp_path, state_type=LateState) as c:
            leader = await c.leader()
            await c.settled()
            monkeypatch.setattr(LateState, "flush", and_then_a_state)
            await leader.propose(b"p0")
            await until(lambda: leader.states[GROUP].applied.index > leader.states[GROUP].visible.index)
            monkeypatch.setattr(LateState, "flush", flush)
            await leader.propose(b"p1")
            assert not leader.failed

    run(main())


# --- hostile and unlucky ---------------------------------------------------------------------------------------------


def test_messages_in_anothers_name_are_refused(tmp_path):
    """P6: a message must name the node of the connection that it came over, and a group that is run here."""

    async def main():
        async with cluster(tmp_path) as c:
            leader = await c.leader()
            peer = Peer(NODES[0], "x", None, None, frozenset(), "", "peer")
            term = leader.driver.status(GROUP).term
            target = followers(c, leader)[0]
            before = target.metrics.value("srengine_consensus_messages_refused_total")
            target.driver.receive(
                peer, Bundle((TimeoutNow(GROUP, term, NODES[1]), TimeoutNow("other", term, NODES[0])))
            )
            assert target.metrics.value("srengine_consensus_messages_refused_total") == before + 2
            nobody = Peer(None, None, None, None, frozenset(), "", "peer")
            target.driver.receive(nobody, Bundle((TimeoutNow(GROUP, term, leader.id),)))
            await leader.propose(b"p1")
            assert leader.driver.status(GROUP).term == term

    run(main())


class Mailbox:
    """A channel that keeps what it is given."""

    on_down = None
    connected = True

    def __init__(self):
        self.got = []

    def post(self, bundle):
        self.got.append(bundle)
        return True


def test_what_is_the_same_for_all_is_made_once_and_the_rest_is_not(tmp_path):
    """Each node gets its own messages, in order; a bundle is shared only by those that are said the same."""

    async def main():
        boxes = {node: Mailbox() for node in ("b", "c", "d", "e", "f")}

        class Everybody:
            channel = staticmethod(boxes.get)

        same, other = Append(GROUP, 2, "a", 5, 2, 5, 7), Append(GROUP, 2, "a", 6, 2, 5, 7)
        with NodeLog.open(tmp_path / "log") as log:
            driver = Driver(NODES[0], log, Everybody(), SystemClock())
            driver._outbox = {"b": [same], "c": [same], "d": [other], "e": [same, other], "f": [same]}
            driver._send()
            await driver.stop()
        said = {node: [list(bundle.messages) for bundle in box.got] for node, box in boxes.items()}
        assert said == {"b": [[same]], "c": [[same]], "d": [[other]], "e": [[same, other]], "f": [[same]]}
        assert boxes["b"].got[0] is boxes["c"].got[0]

    run(main())


def test_what_waits_for_a_busy_group_is_bounded(tmp_path, monkeypatch, way):
    """P6: while the disk hangs, messages of peers are kept up to a bound; the rest is dropped and counted."""

    async def main():
        async with cluster(tmp_path) as c:
            leader = await c.leader()
            target = followers(c, leader)[0]
            disk = Disk(target, monkeypatch, way)
            disk.shut()
            monkeypatch.setattr("srengine.consensus.driver.INBOX_MESSAGES_MAX", 5)
            for number in range(20):
                await leader.propose(b"p%d" % number)
            await until(lambda: target.metrics.value("srengine_consensus_messages_dropped_total") > 0)
            assert target.driver._groups[GROUP].inbox_messages <= 5
            disk.open()
            await c.settled()

    run(main())


def test_a_cancelled_proposal_leaves_nothing_behind(tmp_path):
    """F53: who stops waiting is forgotten; the entry may or may not be decided."""

    async def main():
        async with cluster(tmp_path) as c:
            leader = await c.leader()
            task = asyncio.ensure_future(leader.propose(b"p1"))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await leader.propose(b"p2")
            await until(lambda: leader.driver.status(GROUP).waiting == 0)

    run(main())


def test_lossy_network(tmp_path):
    """F26, F27: with a fifth of the frames lost, everything that is acknowledged is on all nodes after the heal."""

    async def main():
        async with cluster(tmp_path) as c:
            await c.leader()
            for one in c.members:
                for other in c.members:
                    if one is not other:
                        c.network.link(one.endpoint, other.endpoint).loss = 0.2
            acknowledged = [await c.write(b"p%d" % number, seconds=60) for number in range(15)]
            c.network.heal()
            await c.write(b"p-last", seconds=60)
            await c.settled()
            found = {(index, term) for index, term, _ in c.members[0].states[GROUP].entries}
            assert set(acknowledged) <= found

    run(main())
