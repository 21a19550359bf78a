"""Streams: items whole and in order, credit, ends and errors; the same over ZeroMQ and in memory."""

from __future__ import annotations

import asyncio

import pytest

from srengine import errors, limits
from tests.transport.world import Count, Echo, until, world


@pytest.fixture(params=["zmq", "memory"])
def kind(request):
    return request.param


def run(kind, scenario):
    async def inside():
        async with world(kind) as found:
            await scenario(found, found.caller.channel(found.node.addresses["bulk"], port="bulk"))

    asyncio.run(inside())


@pytest.mark.parametrize(
    ("items", "size"),
    [(0, 0), (1, 4), (1000, 10), (40, limits.MIB), (3, 20 * limits.MIB), (5, limits.BULK_FRAME_BYTES_MAX)],
)
def test_items_arrive_whole_and_in_order(kind, items, size):
    """Whatever their number and size, items come as they were made."""

    async def scenario(found, channel):
        number = 0
        async for item in channel.stream(Count(items, size), timeout_s=30):
            assert item[:4] == number.to_bytes(4, "big")
            assert len(item) == max(4, size)
            number += 1
        assert number == items

    run(kind, scenario)


def test_a_slow_reader_holds_the_sender_back(kind):
    """Without being read the sender makes no more items than its credit."""

    async def scenario(found, channel):
        items = channel.stream(Count(-1, 100), timeout_s=30)
        await anext(items)
        before = -1
        while before != found.node.streamed:
            before = found.node.streamed
            for _ in range(200):
                await asyncio.sleep(0)
            await asyncio.sleep(0.05)
        assert found.node.streamed <= 2 * limits.CREDIT_FRAMES
        await items.aclose()
        await until(lambda: found.node.streams_closed == 1)

    run(kind, scenario)


def test_a_reader_that_stops_stops_the_sender(kind):
    """Closing the generator ends the handler's generator; the connection goes on."""

    async def scenario(found, channel):
        for _ in range(5):
            items = channel.stream(Count(-1, 100), timeout_s=30)
            async for item in items:
                if item[3] == 50:
                    break
            await items.aclose()
        await until(lambda: found.node.streams_closed == 5)
        assert [bytes(item) async for item in channel.stream(Count(1, 4), timeout_s=30)] == [bytes(4)]

    run(kind, scenario)


def test_an_error_inside_a_stream_is_typed(kind):
    """Items made before the error arrive, then the error, with its facts."""

    async def scenario(found, channel):
        seen = []
        with pytest.raises(errors.NotFound) as caught:
            async for item in channel.stream(Count(10, 4, fail_at=3), timeout_s=30):
                seen += [bytes(item)[3]]
        assert seen == [0, 1, 2]
        assert caught.value.number == 3

    run(kind, scenario)


def test_streams_share_a_connection(kind):
    """Several streams and requests at once on one connection; none waits for another one's reader."""

    async def scenario(found, channel):
        stalled = channel.stream(Count(-1, limits.MIB), timeout_s=30)
        await anext(stalled)

        async def read(size):
            return [len(item) async for item in channel.stream(Count(30, size), timeout_s=30)]

        results = await asyncio.gather(*[read(100 * n + 4) for n in range(5)])
        assert results == [[100 * n + 4] * 30 for n in range(5)]
        assert (await channel.request(Echo("hi"), timeout_s=20)).message.text == "hi"
        await stalled.aclose()

    run(kind, scenario)


def test_no_progress_is_a_time_out(kind):
    """A stream that brings nothing for its time is TimedOut."""

    async def scenario(found, channel):
        async def silent(peer, message):
            await asyncio.Event().wait()
            yield b""

        found.node.count = silent
        found.node.endpoint._stream_handlers["bulk", Count] = silent
        with pytest.raises(errors.TimedOut):
            async for _ in channel.stream(Count(1), timeout_s=0.05):
                pass

    run(kind, scenario)


def test_a_lost_node_ends_a_stream(kind):
    """When the node goes, the reader gets Unreachable or its reason, not silence."""

    async def scenario(found, channel):
        items = channel.stream(Count(-1, 100), timeout_s=60)
        await anext(items)
        await found.node.endpoint.close()
        with pytest.raises(errors.Error) as caught:
            async for _ in items:
                pass
        assert isinstance(caught.value, (errors.Unreachable, errors.Closed))

    run(kind, scenario)
