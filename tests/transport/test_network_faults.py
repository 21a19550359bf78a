"""Bad networks between honest sides: duplicates, reordering, delay, damage, cuts, flaps."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random

import pytest

from srengine import errors, limits
from tests.chaos.proxy import ChaosProxy, Verdict
from tests.transport.world import Count, Echo, total, until, world

HELLOS = 1
"""Frames of each direction that belong to hello."""


def run(scenario, *, port="client", level="messages", seed=0):
    async def inside():
        async with world() as found:
            with ChaosProxy("127.0.0.1", found.node.port(port), level=level, seed=seed) as proxy:
                await scenario(found, proxy, found.caller.channel(proxy.address, port=port))

    asyncio.run(inside())


def after_hello(verdict):
    return lambda number, _: Verdict.PASS if number < HELLOS else verdict(number)


def test_duplicated_frames_have_one_effect():
    """F27: every frame twice, in both directions: each request runs once, is answered once, and duplicates are
    counted.
    """

    async def scenario(found, proxy, channel):
        proxy.forward.decide = proxy.backward.decide = lambda *_: Verdict.DUPLICATE
        for number in range(30):
            reply = await channel.request(Echo(str(number)), [b"x"], timeout_s=20)
            assert reply.message.text == str(number)
        assert [message.text for message in found.node.asked] == [str(number) for number in range(30)]
        assert total(found.node.endpoint, "duplicates") >= 29
        assert total(found.caller, "duplicates") >= 29

    run(scenario)


def test_duplicated_pieces_change_nothing():
    """F27: with every frame doubled, large attachments and streams still arrive byte for byte."""

    async def scenario(found, proxy, channel):
        proxy.forward.decide = proxy.backward.decide = lambda *_: Verdict.DUPLICATE
        data = os.urandom(3 * limits.MIB + 5)
        reply = await channel.request(Echo("big"), [data], timeout_s=60)
        assert bytes(reply.attachments[0]) == data
        numbers = [bytes(item)[3] async for item in channel.stream(Count(60, 5000), timeout_s=30)]
        assert numbers == list(range(60))

    run(scenario, port="bulk")


def test_reordered_requests_are_each_answered_once():
    """F27: frames that overtake each other: every request still runs once and gets its own answer."""

    async def scenario(found, proxy, channel):
        await channel.request(Echo("first"), timeout_s=20)
        proxy.forward.swap = proxy.backward.swap = 0.4

        async def ask(number):
            await asyncio.sleep(number * 0.001)  # apart, so that they are frames of their own
            return (await channel.request(Echo(str(number)), timeout_s=30)).message.text

        async def go_on():
            # A frame that is held back passes when the next one has overtaken it: there is always a next one.
            for number in itertools.count():
                with contextlib.suppress(errors.TimedOut):
                    await channel.request(Echo(f"more {number}"), timeout_s=0.05)

        more = asyncio.create_task(go_on())
        results = await asyncio.gather(*[ask(number) for number in range(100)])
        more.cancel()
        assert results == [str(number) for number in range(100)]
        texts = [message.text for message in found.node.asked]
        assert len(texts) == len(set(texts))

    run(scenario, seed=3)


def test_a_frame_delayed_by_minutes_has_no_second_effect():
    """F27: a request that was held back, given up by its caller and released late runs at most once; its answer is
    dropped.
    """

    async def scenario(found, proxy, channel):
        proxy.forward.decide = after_hello(lambda n: Verdict.HOLD if n == HELLOS else Verdict.PASS)
        with pytest.raises(errors.TimedOut) as caught:
            await channel.request(Echo("held"), timeout_s=0.1)
        assert caught.value.sent is True
        assert (await channel.request(Echo("later"), timeout_s=20)).message.text == "later"
        assert proxy.release() == 1
        await until(lambda: len(found.node.asked) == 2)
        assert (await channel.request(Echo("last"), timeout_s=20)).message.text == "last"
        assert [message.text for message in found.node.asked] == ["later", "held", "last"]

    run(scenario)


def test_a_frame_of_an_ended_connection_has_no_effect():
    """F27: frames kept from an older connection and played into a new one end it, because hello does not fit; no
    effect.
    """

    async def scenario(found, proxy, channel):
        recorded = []
        proxy.forward.decide = lambda number, parts: (recorded.append(parts), Verdict.PASS)[1]
        await channel.request(Echo("once"), timeout_s=20)
        import zmq

        context = zmq.Context()
        raw = context.socket(zmq.DEALER)
        raw.linger = 0
        try:
            raw.connect(found.node.addresses["client"])
            for parts in recorded[1:]:
                raw.send_multipart(parts)
            await until(lambda: total(found.node.endpoint, "frames_refused") >= 1)
            assert [message.text for message in found.node.asked] == ["once"]
        finally:
            raw.close()
            context.term()

    run(scenario)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_corrupted_frame_ends_the_connection_and_nothing_else(direction):
    """F28: a flipped bit that TCP let through: counted, connection reset, no state change; the next request works."""

    async def scenario(found, proxy, channel):
        await channel.request(Echo("before"), timeout_s=20)
        bad = getattr(proxy, direction)
        bad.decide = lambda *_: Verdict.CORRUPT
        with pytest.raises(errors.Unreachable) as caught:
            await channel.request(Echo("damaged"), [b"0123456789"], timeout_s=20)
        assert caught.value.sent is True
        side = found.node.endpoint if direction == "forward" else found.caller
        assert total(side, "frames_refused") == 1
        if direction == "forward":
            assert [message.text for message in found.node.asked] == ["before"]
        bad.decide = None
        channel.wake()
        assert (await channel.request(Echo("after"), timeout_s=20)).message.text == "after"
        assert proxy.connections_seen == 2

    run(scenario)


def test_corrupted_bulk_is_never_delivered():
    """F28: damage in a stream's data ends the stream with a typed error; every item that came before is whole."""

    async def scenario(found, proxy, channel):
        proxy.backward.decide = after_hello(lambda n: Verdict.CORRUPT if n == 6 else Verdict.PASS)
        items = []
        with pytest.raises(errors.Unreachable):
            async for item in channel.stream(Count(100, 100_000), timeout_s=20):
                items += [bytes(item)]
        assert items == [number.to_bytes(4, "big") + bytes(99_996) for number in range(len(items))]

    run(scenario, port="bulk")


def test_damage_in_a_proved_stream_is_the_readers_to_find():
    """F28: a stream opened as proved delivers what came, checked by nobody on the way; its frames are still framed."""

    async def scenario(found, proxy, channel):
        proxy.backward.decide = after_hello(lambda n: Verdict.CORRUPT if n == 6 else Verdict.PASS)
        size = 2 * limits.PART_BYTES_MAX
        expected = [number.to_bytes(4, "big") + bytes(size - 4) for number in range(10)]
        items = [bytes(item) async for item in channel.stream(Count(10, size), timeout_s=20, proved=True)]
        assert [len(item) for item in items] == [size] * 10
        assert sum(item != wanted for item, wanted in zip(items, expected, strict=True)) == 1

    run(scenario, port="bulk")


def test_random_damage_of_the_byte_stream():
    """F28: bits flipped anywhere in the TCP stream, framing included: typed errors or right answers, never wrong
    ones.
    """

    async def scenario(found, proxy, channel):
        proxy.forward.corrupt_bytes = proxy.backward.corrupt_bytes = 0.1
        answered = 0
        for number in range(60):
            channel.wake()
            try:
                reply = await channel.request(Echo(str(number), b"y" * 50), timeout_s=0.5)
            except (errors.Unreachable, errors.TimedOut):
                continue
            else:
                assert reply.message == Echo(str(number), b"y" * 50)
                answered += 1
        proxy.forward.corrupt_bytes = proxy.backward.corrupt_bytes = 0.0
        proxy.cut()
        channel.wake()
        assert (await ask_until_answered(channel, "healed")) == "healed"
        texts = [message.text for message in found.node.asked]
        assert len(texts) == len(set(texts))

    run(scenario, level="bytes", seed=11)


async def ask_until_answered(channel, text):
    """Ask until the connection stands again; a test's client may, the transport does not."""
    for _ in range(200):
        try:
            return (await channel.request(Echo(text), timeout_s=5)).message.text
        except (errors.Unreachable, errors.TimedOut):
            channel.wake()
    pytest.fail("never answered")


def test_flapping_connections():
    """F29: a connection cut fifty times: every request is answered or typed, and afterwards everything works."""

    async def scenario(found, proxy, channel):
        source = random.Random(1)
        for number in range(50):
            channel.wake()
            task = asyncio.create_task(channel.request(Echo(str(number)), timeout_s=20))
            for _ in range(source.randrange(4)):
                await asyncio.sleep(0.002)
            proxy.cut()
            try:
                await task
            except errors.Unreachable:
                continue
        assert (await ask_until_answered(channel, "calm")) == "calm"

    run(scenario, level="bytes")


def test_back_off_bounds_attempts():
    """F29: a peer that refuses is not hammered: a caller that asks as fast as it can makes few attempts."""

    async def scenario(found, proxy, channel):
        proxy.refusing = True
        refused = 0
        async with asyncio.timeout(30):
            for _ in range(12):
                with pytest.raises(errors.Unreachable):
                    await channel.request(Echo(), timeout_s=20)
                refused += 1
        assert refused == 12
        assert proxy.connections_seen <= 8
        proxy.refusing = False
        channel.wake()
        assert (await channel.request(Echo("open"), timeout_s=20)).message.text == "open"

    run(scenario, level="bytes")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_half_open_peer_is_found(direction):
    """F29: a link that swallows one direction: the waiting caller learns it from the heartbeats, before its own
    time-out.
    """

    async def scenario(found, proxy, channel):
        await channel.request(Echo(), timeout_s=20)
        getattr(proxy, direction).black_hole = True
        async with asyncio.timeout(60):
            with pytest.raises(errors.Unreachable):
                await channel.request(Echo("into the dark"), timeout_s=600)
        getattr(proxy, direction).black_hole = False
        assert (await ask_until_answered(channel, "light")) == "light"

    run(scenario, level="bytes")


def test_a_peer_with_a_new_address():
    """F30: behind the same name (the proxy) another process answers: the channel connects again and says hello anew."""

    async def scenario(found, proxy, channel):
        await channel.request(Echo(), timeout_s=20)
        nonce = channel.peer.boot_nonce
        async with world() as second:
            proxy.retarget("127.0.0.1", second.node.port("client"))
            proxy.cut()
            assert (await ask_until_answered(channel, "moved")) == "moved"
            assert channel.peer.boot_nonce != nonce
            await channel.close()

    run(scenario, level="bytes")


def test_a_slow_link():
    """F26: 200 ms and 1 Mbit/s: a transfer goes on as long as bytes come, and small requests pass on their own port."""

    async def scenario(found, proxy, channel):
        proxy.forward.delay_s = proxy.backward.delay_s = 0.1
        proxy.backward.bytes_per_s = 1_000_000
        direct = found.caller.channel(found.node.addresses["client"])
        stream = asyncio.create_task(collect(channel))
        for _ in range(5):
            await direct.request(Echo(), timeout_s=5)
        assert await stream == [200_000] * 4

    async def collect(channel):
        return [len(item) async for item in channel.stream(Count(4, 200_000), timeout_s=10)]

    run(scenario, port="bulk", level="bytes")
