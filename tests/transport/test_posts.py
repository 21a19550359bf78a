"""Posts: messages without an answer, over ZeroMQ and in memory."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from srengine import errors, limits
from srengine.codec import registry
from srengine.transport import Identity, sockets
from tests.transport.world import total, until, world


class Note(msgspec.Struct, frozen=True):
    number: int = 0
    data: bytes = b""


class Other(msgspec.Struct, frozen=True):
    number: int = 0


registry.register("transport_test.note", Note)
registry.register("transport_test.other", Other)

KINDS = pytest.mark.parametrize("kind", ["zmq", "memory"])
CALLER = "2" * 32


def listen(w):
    """Take the notes of a world's node at its peer port; return the list of (node id, note)."""
    notes = []
    w.node.endpoint.serve_posts(Note, lambda peer, note: notes.append((peer.node_id, note)))
    return notes


def on_their_way(channel):
    return channel._caller._posted_bytes - channel._caller._taken_bytes


@KINDS
def test_posts_arrive_in_order_with_their_sender(kind):
    """F27: what is posted over one connection arrives once, in order, named by the hello's node id; the first ones
    wait for the connection.
    """

    async def run():
        async with world(kind) as w:
            w.caller.identity = Identity(node_id=CALLER)
            notes = listen(w)
            channel = w.caller.channel(w.node.addresses["peer"], port="peer")
            for number in range(limits.POSTS_HELD_MAX):
                assert channel.post(Note(number))
            await until(lambda: channel.connected)
            for number in range(limits.POSTS_HELD_MAX, 1000):
                assert channel.post(Note(number, b"x" * (number % 700)))
                if number % 100 == 0:
                    await asyncio.sleep(0)
            await until(lambda: len(notes) == 1000)
            assert [note.number for _, note in notes] == list(range(1000))
            assert {sender for sender, _ in notes} == {CALLER}
            assert total(w.caller, "posts_dropped") == 0

    asyncio.run(run())


@KINDS
def test_more_than_waits_for_a_connection_is_dropped_and_counted(kind):
    """P6: while a connection is made a bounded number of posts waits; the rest is dropped, said so, and counted."""

    async def run():
        async with world(kind) as w:
            notes = listen(w)
            channel = w.caller.channel(w.node.addresses["peer"], port="peer")
            told = [channel.post(Note(number)) for number in range(limits.POSTS_HELD_MAX + 5)]
            assert told == [True] * limits.POSTS_HELD_MAX + [False] * 5
            assert total(w.caller, "posts_dropped") == 5
            await until(lambda: len(notes) == limits.POSTS_HELD_MAX)

    asyncio.run(run())


@KINDS
def test_a_large_post_passes_and_one_beyond_the_frame_is_refused(kind):
    """F40: a post may be as large as the port's frame part; a larger one is the caller's mistake and breaks nothing."""

    async def run():
        async with world(kind) as w:
            notes = listen(w)
            channel = w.caller.channel(w.node.addresses["peer"], port="peer")
            channel.post(Note(0))
            await until(lambda: len(notes) == 1)
            assert channel.post(Note(1, bytes(4 * limits.MIB)))
            with pytest.raises(errors.InvalidValue):
                channel.post(Note(2, bytes(sockets.FRAME_BYTES_MAX["peer"])))
            assert channel.post(Note(3))
            await until(lambda: len(notes) == 3)
            assert [(note.number, len(note.data)) for _, note in notes] == [(0, 0), (1, 4 * limits.MIB), (3, 0)]

    asyncio.run(run())


@KINDS
def test_what_is_on_its_way_is_bounded_and_the_bound_moves(kind):
    """P6: at most POSTS_BYTES_MAX are on their way; beyond it posts are dropped until the peer has taken some in."""

    async def run():
        async with world(kind) as w:
            notes = listen(w)
            channel = w.caller.channel(w.node.addresses["peer"], port="peer")
            channel.post(Note())
            await until(lambda: len(notes) == 1)
            # Nothing arrives while this coroutine keeps the loop.
            sent = sum(channel.post(Note(1, bytes(limits.MIB - 100))) for _ in range(40))
            assert sent == limits.POSTS_BYTES_MAX // limits.MIB
            assert total(w.caller, "posts_dropped") == 40 - sent
            await until(lambda: len(notes) == 1 + sent)
            for _ in range(5):
                count = len(notes)
                await until(lambda: on_their_way(channel) < limits.POSTS_BYTES_MAX // 4)
                assert all(channel.post(Note(2, bytes(limits.MIB - 100))) for _ in range(8))
                await until(lambda count=count: len(notes) == count + 8)

    asyncio.run(run())


def test_lost_posts_do_not_use_up_the_bound():
    """P6: posts that a network ate count as taken in as soon as a later one arrives."""

    async def run():
        async with world("memory") as w:
            notes = listen(w)
            channel = w.caller.channel(w.node.addresses["peer"], port="peer")
            channel.post(Note())
            await until(lambda: len(notes) == 1)
            w.network.link(w.caller, w.node.endpoint).loss = 1.0
            assert all(channel.post(Note(1, bytes(limits.MIB))) for _ in range(12))
            w.network.heal()
            assert channel.post(Note(2))
            await until(lambda: len(notes) == 2)
            await until(lambda: channel._caller._taken_bytes > 12 * limits.MIB)
            assert all(channel.post(Note(3, bytes(limits.MIB))) for _ in range(12))
            await until(lambda: len(notes) == 14)

    asyncio.run(run())


@KINDS
def test_a_post_that_nobody_takes_changes_nothing(kind):
    """P6: a post without a handler at the port is counted and dropped, and the connection goes on."""

    async def run():
        async with world(kind) as w:
            notes = listen(w)
            channel = w.caller.channel(w.node.addresses["peer"], port="peer")
            channel.post(Other(1))
            channel.post(Note(2))
            await until(lambda: len(notes) == 1)
            assert total(w.node.endpoint, "posts_refused") == 1

    asyncio.run(run())


@KINDS
def test_a_mistake_of_the_handler_is_not_the_connections(kind):
    """P6: a handler that raises is reported to the loop; the next post arrives over the same connection."""

    async def run():
        reported = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context["exception"]))
        async with world(kind) as w:
            notes = []

            def take(peer, note):
                notes.append(note)
                if note.number == 1:
                    raise RuntimeError("a mistake")

            w.node.endpoint.serve_posts(Note, take)
            channel = w.caller.channel(w.node.addresses["peer"], port="peer")
            for number in range(3):
                channel.post(Note(number))
            await until(lambda: len(notes) == 3)
            assert [str(error) for error in reported] == ["a mistake"]
            assert len(w.node.endpoint.connections("peer")) == 1

    asyncio.run(run())


@KINDS
def test_a_peer_that_ends_is_told_and_a_refused_attempt_too(kind):
    """F29: who posts is told when the connection ends and when an attempt fails; `wake` ends the back-off at once."""

    async def run():
        async with world(kind) as w:
            notes = listen(w)
            channel = w.caller.channel(w.node.addresses["peer"], port="peer")
            told = []
            channel.on_down = told.append
            channel.post(Note(1))
            await until(lambda: len(notes) == 1)
            assert not told
            await w.node.endpoint.close()
            await until(lambda: len(told) == 1)
            assert isinstance(told[0], errors.Unreachable)
            assert channel.post(Note(2))
            await until(lambda: len(told) == 2)
            assert isinstance(told[1], errors.Unreachable)
            assert not channel.post(Note(3)), "the back-off goes on"
            assert total(w.caller, "posts_dropped") == 2
            channel.wake()
            assert channel.post(Note(4))
            await until(lambda: len(told) == 3)

    asyncio.run(run())


@KINDS
def test_a_refused_hello_is_told(kind):
    """F12: a hello that is refused (another cluster) is reported with its reason, and the held posts are dropped."""

    async def run():
        async with world(kind) as w:
            w.caller.identity = Identity(node_id=CALLER, cluster_id="d" * 32)
            notes = listen(w)
            channel = w.caller.channel(w.node.addresses["peer"], port="peer")
            told = []
            channel.on_down = told.append
            channel.post(Note(1))
            await until(lambda: told)
            assert isinstance(told[0], errors.ForeignData)
            assert not notes
            assert total(w.caller, "posts_dropped") == 1
            channel.post(Note(2))
            await channel.close()
            assert len(told) == 1, "closing it oneself is no news"

    asyncio.run(run())


def test_a_peer_without_the_feature_is_not_posted_to(monkeypatch):
    """P6: to a peer that does not offer posts they are dropped and counted, because it would end the connection."""

    async def run():
        async with world("memory") as w:
            notes = listen(w)
            channel = w.caller.channel(w.node.addresses["peer"], port="peer")
            monkeypatch.setattr("srengine.transport.peers.FEATURES", frozenset({"attachments", "streams"}))
            assert channel.post(Note(1)), "nothing is known of the peer yet"
            await until(lambda: total(w.caller, "posts_dropped") == 1)
            assert not channel.post(Note(2))
            assert not notes

    asyncio.run(run())


def test_a_post_from_the_answering_side_ends_the_connection():
    """P6: posts go from caller to callee; whatever else is a breach of the protocol."""
    from srengine.codec.envelopes import Post, Taken

    async def run():
        async with world("memory") as w:
            listen(w)
            channel = w.caller.channel(w.node.addresses["peer"], port="peer")
            told = []
            channel.on_down = told.append
            channel.post(Note())
            await until(lambda: channel.connected)
            callee = next(iter(w.node.endpoint._callees))
            callee.post(Post("transport_test.note", msgspec.Raw(b"\x80"), 1))
            await until(lambda: told)
            assert isinstance(told[0], errors.FrameError)
            channel.wake()
            channel.post(Note())
            await until(lambda: channel.connected)
            channel._caller.post(Taken(1))
            await until(lambda: len(told) == 2)

    asyncio.run(run())


def test_a_post_is_one_frame_that_leaves_at_once():
    """A post costs one frame and does not wait for the loop's next turn."""

    async def run():
        async with world("memory") as w:
            notes = listen(w)
            channel = w.caller.channel(w.node.addresses["peer"], port="peer")
            channel.post(Note())
            await until(lambda: len(notes) == 1)
            before = w.network.frames
            channel.post(Note(1))
            assert w.network.frames == before + 1

    asyncio.run(run())
