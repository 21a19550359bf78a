"""Calls that wait for the end of what is being read, and what that spares the loop."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from srengine.soon import Soon
from srengine.transport import Identity, sockets
from tests.transport.test_posts import Note, listen
from tests.transport.world import Echo, until, world


def test_a_call_waits_for_the_end_of_what_is_read():
    """Inside, calls run at the end, in their order, also those of a read within a read; outside, in the next turn."""

    async def run():
        soon = Soon.of(asyncio.get_running_loop())
        assert Soon.of(asyncio.get_running_loop()) is soon
        seen = []
        with soon:
            soon.call(lambda: seen.append("first"))
            with soon:
                soon.call(lambda: seen.append("second"))
            assert seen == []
        assert seen == ["first", "second"]
        soon.call(lambda: seen.append("later"))
        assert seen == ["first", "second"]
        await asyncio.sleep(0)
        assert seen == ["first", "second", "later"]

    asyncio.run(run())


def test_a_call_that_fails_keeps_no_other_from_its_turn():
    """The error leaves; what was put off behind it is called in the next turn of the loop."""

    async def run():
        soon = Soon.of(asyncio.get_running_loop())
        seen = []
        with pytest.raises(ZeroDivisionError), soon:
            soon.call(lambda: seen.append("before"))
            soon.call(lambda: 1 // 0)
            soon.call(lambda: seen.append("behind"))
        assert seen == ["before"]
        await asyncio.sleep(0)
        assert seen == ["before", "behind"]
        with soon:
            soon.call(lambda: seen.append("again"))
        assert seen[-1] == "again"

    asyncio.run(run())


def test_calls_that_call_again_wait_for_the_next_turn():
    """A call that puts itself off again does not keep the reader for ever."""

    async def run():
        soon = Soon.of(asyncio.get_running_loop())
        seen = []

        def again():
            seen.append(len(seen))
            if len(seen) < 3:
                soon.call(again)

        with soon:
            soon.call(again)
        assert seen == [0]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert seen == [0, 1, 2]

    asyncio.run(run())


def test_no_loop_is_kept_by_its_calls():
    """What was made for a loop goes with it."""

    async def run():
        return weakref.ref(Soon.of(asyncio.get_running_loop()))

    found = asyncio.run(run())
    gc.collect()
    assert found() is None


def test_what_hears_of_posts_has_its_turn_when_all_are_read():
    """Posts that arrive together are all handed on before what they put off runs, with no turn of the loop between."""

    async def run():
        async with world("zmq") as w:
            w.caller.identity = Identity(node_id="2" * 32)
            loop = asyncio.get_running_loop()
            soon = Soon.of(loop)
            turns, seen, due = [], [], []

            def hear(_, note):
                seen.append(note.number)
                if not due:
                    due.append(True)
                    soon.call(turn)

            def turn():
                due.clear()
                turns.append(list(seen))

            w.node.endpoint.serve_posts(Note, hear)
            channel = w.caller.channel(w.node.addresses["peer"], port="peer")
            await channel.request(Echo(), timeout_s=10)
            drained = []
            drain = sockets.Pump.drain

            def counting(pump):
                before = len(turns)
                read = len(seen)
                drain(pump)
                if len(seen) > read:
                    drained.append((len(turns) - before, turns[-1] == seen))

            (listener,) = (found for found in w.node.endpoint._listeners if found.port == "peer")
            pump = listener.pump
            loop.remove_reader(pump._descriptor)
            loop.add_reader(pump._descriptor, counting, pump)
            for number in range(50):
                assert channel.post(Note(number))
            await until(lambda: len(seen) == 50)
            assert drained
            assert all(found == (1, True) for found in drained)

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["zmq", "memory"])
def test_a_question_that_is_alone_costs_no_turn_of_the_loop(kind):
    """One question under way, and its answer, leave at once: nothing is there that could join them. With more, they
    wait for each other (`test_concurrent_requests_share_frames`).
    """

    async def run():
        async with world(kind) as w:
            channel = w.caller.channel(w.node.addresses["client"])
            await channel.request(Echo(), timeout_s=10)
            caller = channel._caller
            sent = []
            send = caller.wire.send
            caller.wire.send = lambda parts: sent.append(len(parts)) or send(parts)
            asking = channel.request(Echo("alone"), timeout_s=10)
            first = asyncio.ensure_future(asking)
            await asyncio.sleep(0)  # the task's first step
            assert len(sent) == 1
            more = [asyncio.ensure_future(channel.request(Echo("more"), timeout_s=10)) for _ in range(5)]
            replies = await asyncio.gather(first, *more)
            assert [reply.message.text for reply in replies] == ["alone", *["more"] * 5]

    asyncio.run(run())


def test_what_waits_to_leave_goes_before_what_is_said():
    """Order: an answer that could leave at once still leaves behind what was posted before it."""

    async def run():
        async with world("memory") as w:
            w.caller.identity = Identity(node_id="2" * 32)
            notes = listen(w)
            channel = w.caller.channel(w.node.addresses["peer"], port="peer")
            await channel.request(Echo(), timeout_s=10)
            caller = channel._caller
            frames = []
            send = caller.wire.send
            caller.wire.send = lambda parts: frames.append(parts) or send(parts)
            asking = [asyncio.ensure_future(channel.request(Echo(str(n)), timeout_s=10)) for n in range(2)]
            await asyncio.sleep(0)
            # The first question has left, the second waits for what may join it: the post does, and does not pass it.
            assert len(frames) == 1
            assert channel.post(Note(7))
            assert len(frames) == 1
            await asyncio.gather(*asking)
            await until(lambda: [note.number for _, note in notes] == [7])
            assert len(frames) == 2

    asyncio.run(run())
