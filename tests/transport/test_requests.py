"""Requests: answers, typed errors, attachments, time-outs, coalescing; the same over ZeroMQ and in memory."""

from __future__ import annotations

import asyncio
import os
import socket

import msgspec
import pytest

from srengine import errors, limits
from srengine.codec import registry
from srengine.transport import Endpoint, Identity, Reply
from tests.transport.world import Echo, total, until, world

KINDS = ["zmq", "memory"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def run(kind, scenario, **options):
    async def inside():
        async with world(kind, **options) as found:
            await scenario(found)

    asyncio.run(inside())


def test_an_answer_and_its_attachments(kind):
    """A request is answered by its reply; attachments come back whole, empty ones too."""

    async def scenario(found):
        channel = found.caller.channel(found.node.addresses["client"])
        assert channel.peer is None
        reply = await channel.request(Echo("hi"), [b"one", b"", bytearray(b"two"), memoryview(b"3")], timeout_s=5)
        assert reply.message == Echo("hi")
        assert [bytes(part) for part in reply.attachments] == [b"one", b"", b"two", b"3"]
        assert (channel.peer.name, channel.peer.node_id, channel.peer.cluster_id) == ("node-1", "1" * 32, "c" * 32)
        assert {"streams", "attachments"} <= channel.peer.features
        assert (await channel.request(Echo("who"), timeout_s=5)).message.text == "caller/client"

    run(kind, scenario)


def test_large_attachments_travel_in_parts(kind):
    """Attachments far over PART_BYTES_MAX arrive whole, both ways, several at once, and their room is given back."""

    async def scenario(found):
        channel = found.caller.channel(found.node.addresses["peer"], port="peer")
        big = [os.urandom(5 * limits.MIB + 17), b"", os.urandom(limits.PART_BYTES_MAX), os.urandom(1)]
        replies = await asyncio.gather(*[channel.request(Echo(str(n)), big, timeout_s=60) for n in range(4)])
        for number, reply in enumerate(replies):
            assert reply.message.text == str(number)
            assert [bytes(part) for part in reply.attachments] == big
        assert found.node.endpoint.budget.used == found.caller.budget.used == 0

    run(kind, scenario)


def test_small_requests_pass_large_ones(kind):
    """A small request is answered while a large attachment is still on its way."""

    async def scenario(found):
        channel = found.caller.channel(found.node.addresses["client"])
        await channel.request(Echo(), timeout_s=5)
        large = asyncio.create_task(channel.request(Echo("large"), [bytes(64 * limits.MIB)], timeout_s=60))
        await asyncio.sleep(0)
        await channel.request(Echo("small"), timeout_s=20)
        assert [message.text for message in found.node.asked] == ["", "small"]
        assert not large.done()
        await large

    run(kind, scenario)


def test_errors_arrive_typed(kind):
    """A handler's typed error arrives with code, sentence and facts; anything else as INTERNAL, without its secrets."""

    async def scenario(found):
        channel = found.caller.channel(found.node.addresses["client"])
        with pytest.raises(errors.Conflict, match="another") as caught:
            await channel.request(Echo("fail"), timeout_s=5)
        assert caught.value.current_version == 7
        for text in ("bug", "no reply"):
            with pytest.raises(errors.Error) as caught:
                await channel.request(Echo(text), timeout_s=5)
            assert caught.value.remote_code == "INTERNAL"
            assert "secret" not in str(caught.value)
        assert (await channel.request(Echo("fine"), timeout_s=5)).message.text == "fine"

    run(kind, scenario)


def test_what_nobody_serves_is_refused(kind):
    """A message without a handler at this port is UnsupportedFeature and names it."""

    class Unserved(msgspec.Struct, frozen=True):
        pass

    if kind == "zmq":
        registry.register("transport_test.unserved_zmq", Unserved)
    else:
        registry.register("transport_test.unserved_memory", Unserved)

    async def scenario(found):
        channel = found.caller.channel(found.node.addresses["client"])
        with pytest.raises(errors.UnsupportedFeature, match="not served"):
            await channel.request(Unserved(), timeout_s=5)
        with pytest.raises(errors.UnsupportedFeature, match="no stream"):
            async for _ in channel.stream(Unserved(), timeout_s=5):
                pass

    run(kind, scenario)


def test_too_large_is_refused_before_it_is_sent(kind):
    """Bodies and attachments beyond the bounds are InvalidValue at the caller; an answer beyond them too."""

    async def scenario(found):
        channel = found.caller.channel(found.node.addresses["client"])
        with pytest.raises(errors.InvalidValue, match="attachments"):
            await channel.request(Echo(data=bytes(limits.BODY_BYTES_MAX + 1)), timeout_s=5)
        with pytest.raises(errors.InvalidValue):
            await channel.request(Echo(), [b""] * (limits.ATTACHMENTS_MAX + 1), timeout_s=5)
        with pytest.raises(errors.InvalidValue):
            await channel.request(Echo(), [bytes(limits.CONNECTION_BYTES_MAX + 1)], timeout_s=5)
        with pytest.raises(errors.InvalidValue):
            await channel.request(Echo("grow", str(limits.CONNECTION_BYTES_MAX + 1).encode()), timeout_s=5)
        assert len(found.node.asked) == 1
        await channel.request(Echo("fine"), timeout_s=5)

    run(kind, scenario)


def test_a_time_out_is_typed_and_ends_nothing_else(kind):
    """A caller that waits too long gets TimedOut (sent); the connection and other requests go on."""

    async def scenario(found):
        channel = found.caller.channel(found.node.addresses["client"])
        with pytest.raises(errors.TimedOut) as caught:
            await channel.request(Echo("wait"), timeout_s=0.05)
        assert caught.value.sent is True
        assert (await channel.request(Echo("fine"), timeout_s=5)).message.text == "fine"
        found.node.gate.set()
        assert (await channel.request(Echo("again"), timeout_s=5)).message.text == "again"

    run(kind, scenario)


def test_concurrent_requests_share_frames(kind):
    """A hundred requests of one turn of the loop leave in few frames, and each gets its own answer."""

    async def scenario(found):
        channel = found.caller.channel(found.node.addresses["client"])
        await channel.request(Echo(), timeout_s=5)
        before = total(found.caller, "frames_sent")
        replies = await asyncio.gather(*[channel.request(Echo(str(n)), [b"%d" % n], timeout_s=20) for n in range(100)])
        assert [(reply.message.text, bytes(reply.attachments[0])) for reply in replies] == [
            (str(n), b"%d" % n) for n in range(100)
        ]
        assert total(found.caller, "frames_sent") - before <= 3

    run(kind, scenario)


def test_more_requests_than_may_be_in_flight_wait(kind):
    """Requests beyond the bound wait at the caller; all are answered, none breaks the callee's bound."""

    async def scenario(found):
        channel = found.caller.channel(found.node.addresses["client"])
        count = limits.REQUESTS_IN_FLIGHT_MAX + 200
        tasks = [asyncio.create_task(channel.request(Echo("wait"), timeout_s=60)) for _ in range(count)]
        await until(lambda: len(found.node.asked) == limits.REQUESTS_IN_FLIGHT_MAX)
        with pytest.raises(errors.TimedOut) as caught:
            await channel.request(Echo(), timeout_s=0.05)
        assert caught.value.sent is False
        found.node.gate.set()
        await asyncio.gather(*tasks)
        assert len(found.node.asked) == count

    run(kind, scenario)


def test_who_leaves_the_queue_takes_no_room_with_him(kind, monkeypatch):
    """Requests that wait for room may be given up, also in the moment in which they get it; nobody else's turn is lost,
    and everybody's is in the order of coming.
    """
    monkeypatch.setattr(limits, "REQUESTS_IN_FLIGHT_MAX", 2)

    async def scenario(found):
        channel = found.caller.channel(found.node.addresses["client"])
        await channel.request(Echo(), timeout_s=5)
        found.node.asked.clear()
        first = [asyncio.create_task(channel.request(Echo("wait"), timeout_s=60)) for _ in range(2)]
        await until(lambda: len(found.node.asked) == 2)
        waiting = [asyncio.create_task(channel.request(Echo(str(number)), timeout_s=60)) for number in range(6)]
        await asyncio.sleep(0)
        waiting[1].cancel()
        caller = channel._caller
        queue, leave = list(caller._queue), caller._leave_room
        assert len(queue) == 6

        def leaving():
            leave()
            if queue[2].done():
                waiting[2].cancel()  # it was given room just now, and has not run since

        monkeypatch.setattr(caller, "_leave_room", leaving)
        found.node.gate.set()
        done = await asyncio.gather(*first, *waiting, return_exceptions=True)
        kinds = [type(result) for result in done]
        assert kinds[3:5] == [asyncio.CancelledError] * 2
        assert [reply.message.text for reply in done if isinstance(reply, Reply)] == [
            "wait",
            "wait",
            "0",
            "3",
            "4",
            "5",
        ]
        assert caller._room == 2
        assert not caller._queue

    run(kind, scenario)


def test_nobody_there_is_unreachable_at_once(kind):
    """A refused connection is Unreachable long before the time allowed is over, for every request that waits."""

    async def scenario(found):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        channel = found.caller.channel(f"tcp://127.0.0.1:{port}")
        async with asyncio.timeout(30):
            results = await asyncio.gather(
                *[channel.request(Echo(), timeout_s=600) for _ in range(5)], return_exceptions=True
            )
            assert [type(result) for result in results] == [errors.Unreachable] * 5
            assert all(result.sent is False for result in results)
            for _ in range(5):
                with pytest.raises(errors.Unreachable):
                    await channel.request(Echo(), timeout_s=600)

    run(kind, scenario)


def test_a_stopped_node_fails_who_waits_and_a_new_one_is_found(kind):
    """Requests in flight get Unreachable when the node goes; the same channel works when one listens there again."""

    async def scenario(found):
        address = found.node.addresses["client"]
        channel = found.caller.channel(address)
        waiting = asyncio.create_task(channel.request(Echo("wait"), timeout_s=60))
        await until(lambda: found.node.asked)
        await found.node.endpoint.close()
        with pytest.raises(errors.Error) as caught:
            await waiting
        assert isinstance(caught.value, (errors.Unreachable, errors.Closed))
        make = found.network.endpoint if found.network is not None else Endpoint
        fresh = make(Identity(name="node-1"))

        async def answer(peer, message, attachments):
            return Reply(message)

        fresh.serve(Echo, answer)
        try:
            await fresh.listen("client", address)
            channel.wake()
            assert (await channel.request(Echo("back"), timeout_s=20)).message.text == "back"
        finally:
            await fresh.close()

    run(kind, scenario)


def test_closing_ends_everything(kind):
    """Closing a channel or an endpoint fails who waits, twice is once, and nothing can be asked afterwards."""

    async def scenario(found):
        channel = found.caller.channel(found.node.addresses["client"])
        waiting = asyncio.create_task(channel.request(Echo("wait"), timeout_s=60))
        await until(lambda: found.node.asked)
        await channel.close()
        await channel.close()
        with pytest.raises(errors.Unreachable):
            await waiting
        with pytest.raises(errors.Closed):
            await channel.request(Echo(), timeout_s=5)
        await found.caller.close()
        await found.caller.close()
        with pytest.raises(errors.Closed):
            found.caller.channel(found.node.addresses["client"])

    run(kind, scenario)


def test_who_waits_out_a_back_off_connects_to_nothing_after_the_end(kind, monkeypatch):
    """Somebody who pauses before the next attempt when the endpoint is closed is told so; no socket is made that
    nobody closes, which would keep the process from ending.
    """
    monkeypatch.setattr(limits, "RECONNECT_MS_MIN", 200)

    async def scenario(found):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        channel = found.caller.channel(f"tcp://127.0.0.1:{port}")
        with pytest.raises(errors.Unreachable):
            await channel.request(Echo(), timeout_s=60)
        pausing = asyncio.create_task(channel.request(Echo(), timeout_s=60))
        await asyncio.sleep(0)
        await channel.close()
        with pytest.raises(errors.Closed):
            await pausing
        await found.caller.close()

    run(kind, scenario)


def test_a_cancelled_caller_leaves_the_rest_alone(kind):
    """Cancelling one request neither ends the connection nor disturbs others; its large upload stops."""

    async def scenario(found):
        channel = found.caller.channel(found.node.addresses["client"])
        first = asyncio.create_task(channel.request(Echo("upload"), [bytes(100 * limits.MIB)], timeout_s=60))
        await until(lambda: found.node.endpoint.budget.used)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert (await channel.request(Echo("fine"), timeout_s=20)).message.text == "fine"
        await until(lambda: found.node.endpoint.budget.used == 0)
        assert [message.text for message in found.node.asked] == ["fine"]

    run(kind, scenario)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "tcp://",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:99999",
        "udp://127.0.0.1:1",
        "tcp://a b:1",
        "inproc://x",
        "ws://h:1",
    ],
)
def test_bad_addresses(kind, address):
    """An address that cannot be meant is InvalidValue, for listening and for connecting."""

    async def scenario(found):
        with pytest.raises(errors.InvalidValue):
            found.caller.channel(address)
        with pytest.raises(errors.InvalidValue):
            await found.node.endpoint.listen("client", address)

    run(kind, scenario)


def test_an_address_in_use(kind):
    """A port that is taken is AddressInUse."""

    async def scenario(found):
        with pytest.raises(errors.AddressInUse):
            await found.caller.listen("client", found.node.addresses["client"])

    run(kind, scenario)


@pytest.mark.parametrize("address", ["tcp://*:0", "tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://192.0.2.1:0"])
def test_a_routable_address_needs_keys(kind, address):
    """Without keys nobody listens where other machines can connect, unless insecure was said."""

    async def scenario(found):
        with pytest.raises(errors.InvalidValue, match="keys"):
            await found.node.endpoint.listen("client", address)

    run(kind, scenario)


def test_insecure_may_listen_everywhere():
    """With insecure=True a routable address is accepted."""

    async def scenario(found):
        assert await found.node.endpoint.listen("client", "tcp://0.0.0.0:0")

    run("zmq", scenario, insecure=True)


def test_ipc(tmp_path):
    """Processes of one machine may talk over a socket file."""

    async def scenario(found):
        address = await found.node.endpoint.listen("client", f"ipc://{tmp_path}/s")
        channel = found.caller.channel(address)
        assert (await channel.request(Echo("hi"), [bytes(limits.MIB)], timeout_s=5)).message.text == "hi"

    run("zmq", scenario)
