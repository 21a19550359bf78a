"""What every backend's journal does: once, in order, everywhere, seen by who wrote."""

from __future__ import annotations

import asyncio

import pytest

from srengine import errors
from srengine.ha.journal import Command
from tests.ha.contract.clusters import until


def set_to(body: bytes, **more) -> Command:
    return Command("test.set", body, **more)


def test_commands_are_applied_everywhere(on):
    """B01: what any node proposes is applied by all in one order, and the states are equal."""

    async def scenario(cluster):
        await cluster.leader()
        for number in range(9):
            name = f"n{number % 3}"
            await cluster[name].protocol.propose(set_to(b"%d" % number))
        await cluster.equal()
        for node in cluster.nodes.values():
            assert node.rows() == [b"%d" % number for number in range(9)]

    on(scenario)


def test_a_proposer_reads_its_own_write(on):
    """H16: when a proposal returns, the node that it was made on has applied it, also through a follower."""

    async def scenario(cluster):
        follower = await cluster.follower()
        for number in range(20):
            index = await follower.protocol.propose(set_to(b"%d" % number))
            assert follower.machine.applied_index >= index
            assert follower.rows()[-1] == b"%d" % number

    on(scenario)


def test_a_refusal_reaches_the_proposer(on):
    """B01: what an applier refuses is raised where it was proposed, with its details; nothing of it is kept."""

    async def scenario(cluster):
        await cluster.leader()
        for node in cluster.nodes.values():
            with pytest.raises(errors.Conflict, match="refused at") as caught:
                await node.protocol.propose(Command("test.refuse", b""))
            assert caught.value.current_version > 0
        with pytest.raises(errors.UnsupportedFeature):
            await node.protocol.propose(Command("no.such", b""))
        await cluster.equal()
        assert node.rows() == []

    on(scenario)


def test_a_request_that_is_sent_again_is_applied_once(on):
    """F27, H11: the same request id, proposed at every node, is one command with one index."""

    async def scenario(cluster):
        await cluster.leader()
        command = set_to(b"once", request=b"q" * 16)
        found = await asyncio.gather(*(node.protocol.propose(command) for node in cluster.nodes.values()))
        assert len(set(found)) == 1
        await cluster.equal()
        assert cluster["n0"].rows() == [b"once"]

    on(scenario)


def test_concurrent_proposals_all_arrive(on):
    """B01: many at once from all nodes: each is applied once, in one order."""

    async def scenario(cluster):
        await cluster.leader()
        bodies = [b"%d" % number for number in range(60)]
        nodes = list(cluster.nodes.values())
        await asyncio.gather(
            *(nodes[number % len(nodes)].protocol.propose(set_to(body)) for number, body in enumerate(bodies))
        )
        await cluster.equal()
        assert sorted(nodes[0].rows()) == sorted(bodies)

    on(scenario)


def test_a_subscriber_sees_every_entry(on):
    """B01: a subscriber gets all entries from where it asks, those of the past first, in order."""

    async def scenario(cluster):
        leader = await cluster.leader()
        await leader.protocol.propose(set_to(b"before"))
        seen = []

        async def follow(node):
            async for index, command in node.protocol.subscribe(1):
                seen.append((index, command.body))
                if command.body == b"last":
                    return

        follower = await cluster.follower()
        task = asyncio.ensure_future(follow(follower))
        for number in range(5):
            await leader.protocol.propose(set_to(b"%d" % number))
        await leader.protocol.propose(set_to(b"last"))
        await asyncio.wait_for(task, 60)
        indexes = [index for index, _ in seen]
        assert indexes == sorted(set(indexes))
        assert [body for _, body in seen if body in {b"before", b"last"} or body.isdigit()] == [
            b"before",
            *(b"%d" % number for number in range(5)),
            b"last",
        ]

    on(scenario)


def test_a_command_that_is_too_large_is_refused(on):
    """B01: nothing of it leaves the node."""

    async def scenario(cluster):
        leader = await cluster.leader()
        with pytest.raises(errors.InvalidValue):
            await leader.protocol.propose(set_to(bytes(5_000_000)))

    on(scenario)


def test_reads_are_linearizable_behind_a_barrier(on):
    """F21: a barrier on any node returns an index that holds everything acknowledged before it was asked for."""

    async def scenario(cluster):
        await cluster.leader()
        for number in range(6):
            writer, reader = (list(cluster.nodes.values())[(number + offset) % 3] for offset in (0, 1))
            index = await writer.protocol.propose(set_to(b"%d" % number))
            assert await reader.protocol.read_barrier() >= index
            assert reader.rows()[-1] == b"%d" % number

    on(scenario)


def test_a_stopped_backend_says_so(on):
    """B01: whoever waits at a backend that stops gets Closed; stopping again does nothing."""

    async def scenario(cluster):
        node = await cluster.follower()
        waiting = asyncio.ensure_future(anext(aiter(node.protocol.subscribe(10_000))))
        await until(lambda: not waiting.done())
        await node.protocol.stop()
        await node.protocol.stop()
        with pytest.raises(errors.Closed):
            await asyncio.wait_for(waiting, 30)
        with pytest.raises(errors.Closed):
            await node.protocol.propose(set_to(b"x"))

    on(scenario)
