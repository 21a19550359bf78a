"""Hostile or broken peers at our ports: bounded, cut off, and never in the way of an honest client."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from srengine import errors, limits
from srengine.codec import envelopes, frames
from srengine.transport.messages import Hello
from tests.transport.world import Count, Echo, Node, total, until, world

PORTS = ["client", "peer", "bulk"]
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
MIB = limits.MIB


def rss() -> int:
    """Bytes of memory of this process that are resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def in_thread(function, *arguments):
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


async def serve_honest(found, port="client"):
    """An honest client with a new connection is served."""
    channel = found.caller.channel(found.node.addresses[port], port=port)
    for _ in range(100):
        try:
            assert (await channel.request(Echo("honest"), timeout_s=20)).message.text == "honest"
            break
        except errors.Unreachable:
            channel.wake()
    else:
        pytest.fail("the honest client was never served")
    await channel.close()


def talk(port: int, data: bytes) -> bytes:
    """Send bytes to a port and return what comes back before it closes or is silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        except OSError:
            return b""
        return answer


def greet(connection: socket.socket) -> None:
    """Do ZMTP's handshake: what comes before its end would be taken for a part of it."""
    connection.sendall(GREETING + READY)
    answer = b""
    while b"READY" not in answer:
        part = connection.recv(65536)
        assert part, answer
        answer += part


def tls_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("port", PORTS)
def test_garbage_on_every_port(port):
    """F33: random bytes, HTTP, a TLS hello and bare connects at each port: closed, and an honest client is served."""

    async def scenario():
        async with world() as found:
            number = found.node.port(port)
            samples = [
                b"",
                b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
                tls_hello(),
                *[os.urandom(size) for size in (1, 10, 64, 65, 1000, 100_000)],
                GREETING[:30],
                GREETING + os.urandom(200),
                GREETING + READY + os.urandom(500),
                GREETING + READY + b"\x00\x04srEf",
            ]
            for sample in samples:
                await in_thread(talk, number, sample)
            await serve_honest(found, port)
            assert found.node.asked == [Echo("honest")]
            listener = next(one for one in found.node.endpoint._listeners if one.port == port)
            await until(lambda: not listener.accepted)
            assert not listener.callees

    asyncio.run(scenario())


def test_half_handshakes_are_cut_and_disturb_nobody():
    """F34: hundreds of connections that stop half way are closed at the handshake's end; peers on their port stay
    up.
    """

    async def scenario():
        async with world(connections_max=100) as found:
            peer = found.caller.channel(found.node.addresses["peer"], port="peer")
            await peer.request(Echo("peer"), timeout_s=20)
            number = found.node.port("client")
            half = [socket.create_connection(("127.0.0.1", number), timeout=5) for _ in range(300)]
            try:
                for index, connection in enumerate(half):
                    try:
                        connection.send(GREETING[: index % 64])
                    except OSError:
                        pass  # it was shed already
                await peer.request(Echo("peer"), timeout_s=20)
                listener = next(one for one in found.node.endpoint._listeners if one.port == "client")
                await until(lambda: total(found.node.endpoint, "connections_shed") >= 150)
                await until(lambda: len(listener.accepted) <= 100)
                # Without a single byte more: the handshake's time runs out.
                await until(lambda: not listener.accepted)
                await serve_honest(found)
                await peer.request(Echo("peer"), timeout_s=20)
            finally:
                for connection in half:
                    connection.close()

    asyncio.run(scenario())


def test_a_connection_without_hello_is_closed(monkeypatch):
    """F34: who finishes ZeroMQ's handshake and then says nothing is closed as well."""
    monkeypatch.setattr(limits, "HELLO_S_MAX", 0.2)

    async def scenario():
        async with world() as found:
            with socket.create_connection(("127.0.0.1", found.node.port("client")), timeout=30) as connection:
                await in_thread(greet, connection)
                await until(lambda: total(found.node.endpoint, "hellos_missed") == 1)
                connection.setblocking(False)
                data = b"x"
                while data:
                    await asyncio.sleep(0.01)
                    try:
                        data = connection.recv(65536)
                    except BlockingIOError:
                        data = b"x"
                    except ConnectionError:
                        break
            await serve_honest(found)

    asyncio.run(scenario())


def test_a_herd_of_clients_is_shed_by_the_cap():
    """F31: 500 clients at once: at most the cap is accepted, the rest is closed, and peers are not affected."""

    async def scenario():
        async with world(connections_max=64) as found:
            peer = found.caller.channel(found.node.addresses["peer"], port="peer")
            await peer.request(Echo("peer"), timeout_s=20)
            context = zmq.Context()
            context.set(zmq.MAX_SOCKETS, 2000)
            herd = []
            try:
                for _ in range(500):
                    one = context.socket(zmq.DEALER)
                    one.linger = 0
                    one.reconnect_ivl = 100
                    one.reconnect_ivl_max = 2000
                    one.connect(found.node.addresses["client"])
                    herd.append(one)
                listener = next(one for one in found.node.endpoint._listeners if one.port == "client")
                for _ in range(20):
                    await peer.request(Echo("peer"), timeout_s=20)
                    await asyncio.sleep(0.02)
                await until(lambda: total(found.node.endpoint, "connections_shed") >= 300)
                await until(lambda: len(listener.accepted) <= 64)
            finally:
                for one in herd:
                    one.close()
                context.term()
            await serve_honest(found)
            await peer.request(Echo("peer"), timeout_s=20)

    asyncio.run(scenario())


@contextmanager
def raw_dealer(address: str, *, hello: bool = True):
    """A DEALER that speaks frames itself."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.sndhwm = 4
    dealer.reconnect_ivl = -1
    dealer.sndtimeo = 5000
    dealer.rcvtimeo = 5000
    try:
        dealer.connect(address)
        if hello:
            import msgspec

            body = msgspec.Raw(msgspec.msgpack.encode(Hello(features=("attachments", "streams"))))
            dealer.send_multipart(frames.pack([envelopes.Ask(1, "transport.hello", body)]))
            dealer.recv_multipart()
        yield dealer
    finally:
        dealer.close()
        context.term()


@pytest.mark.parametrize("port", PORTS)
def test_oversize_frames_are_cut(port):
    """F37: a part over the port's size, and one that declares 2^40 bytes, end the connection; memory stays bounded."""

    async def scenario():
        async with world() as found:
            await serve_honest(found, port)
            before = rss()
            number = found.node.port(port)

            def declare(size):
                with socket.create_connection(("127.0.0.1", number), timeout=20) as connection:
                    greet(connection)
                    try:
                        connection.sendall(b"\x02" + struct.pack(">Q", size) + bytes(MIB))
                        while connection.recv(65536):
                            pass
                    except ConnectionError:
                        pass

            for size in (limits.PEER_FRAME_BYTES_MAX + 1, 2**40, 2**63):
                await in_thread(declare, size)

            def oversize():
                with raw_dealer(found.node.addresses[port]) as dealer:
                    monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
                    dealer.send(bytes(limits.PEER_FRAME_BYTES_MAX + 1))
                    was_cut = monitor.poll(20_000)
                    monitor.close()
                    dealer.disable_monitor()
                    return was_cut

            listener = next(one for one in found.node.endpoint._listeners if one.port == port)
            await until(lambda: not listener.callees)
            assert await in_thread(oversize)
            await until(lambda: not listener.callees)
            assert rss() - before < 128 * MIB
            await serve_honest(found, port)

    asyncio.run(scenario())


def test_a_million_parts():
    """F37: one message of a million parts: dropped, its sender cut off, memory bounded, the honest client served."""

    async def scenario():
        async with world() as found:
            await serve_honest(found)
            before = rss()

            def flood():
                frame = b"\x01\x01x" * 10_000
                with socket.create_connection(("127.0.0.1", found.node.port("client")), timeout=30) as connection:
                    try:
                        greet(connection)
                        for _ in range(100):
                            connection.sendall(frame)
                        connection.sendall(b"\x00\x01x")
                        while connection.recv(65536):
                            pass
                    except OSError:
                        pass

            await in_thread(flood)
            await until(lambda: total(found.node.endpoint, "frames_refused") == 1)
            assert rss() - before < 256 * MIB
            await serve_honest(found)

    asyncio.run(scenario())


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of bytes is Linux's")
def test_a_message_that_never_ends(monkeypatch):
    """F37: parts without end: ZeroMQ would keep them all; the connection is closed once it is owed too many bytes."""
    monkeypatch.setattr(limits, "UNREAD_BYTES_MAX", 32 * MIB)

    async def scenario():
        async with world() as found:
            await serve_honest(found, "peer")
            before = rss()
            stop = threading.Event()

            def flood():
                part = b"\x03" + struct.pack(">Q", MIB) + bytes(MIB)
                sent = 0
                with socket.create_connection(("127.0.0.1", found.node.port("peer")), timeout=30) as connection:
                    try:
                        greet(connection)
                        while sent < 4096 and not stop.is_set():
                            connection.sendall(part)
                            sent += 1
                            stop.wait(0.001)
                    except OSError:
                        pass
                return sent

            try:
                sent = await in_thread(flood)
            finally:
                stop.set()
            assert sent < 4096
            assert rss() - before < 1024 * MIB
            await serve_honest(found, "peer")

    asyncio.run(scenario())


def test_declared_attachments_reserve_nothing_by_themselves():
    """F37: a peer that announces gigabytes and sends nothing holds no memory and blocks nobody's own connection."""
    import msgspec

    async def scenario():
        async with world() as found:
            before = rss()

            def announce():
                with raw_dealer(found.node.addresses["peer"]) as dealer:
                    body = msgspec.Raw(msgspec.msgpack.encode(Echo("hoard")))
                    for number in range(2, 60):
                        ask = envelopes.Ask(number, "transport_test.echo", body, (limits.CONNECTION_BYTES_MAX,))
                        dealer.send_multipart(frames.pack([ask]))
                    dealer.recv_multipart()

            await in_thread(announce)
            assert rss() - before < 64 * MIB
            reply = await found.caller.channel(found.node.addresses["peer"], port="peer").request(
                Echo("big"), [bytes(50 * MIB)], timeout_s=60
            )
            assert len(reply.attachments[0]) == 50 * MIB
            assert [message.text for message in found.node.asked] == ["big"]
            await until(lambda: found.node.endpoint.budget.used == 0)

    asyncio.run(scenario())


def test_a_hoarder_is_cut_when_it_stands_still(monkeypatch):
    """F37: who was granted room and sends nothing for too long is closed, and the room is free again."""
    import msgspec

    monkeypatch.setattr(limits, "PROGRESS_S_MAX", 0.3)

    async def scenario():
        async with world() as found:

            def hoard():
                with raw_dealer(found.node.addresses["peer"]) as dealer:
                    body = msgspec.Raw(msgspec.msgpack.encode(Echo("hoard")))
                    ask = envelopes.Ask(2, "transport_test.echo", body, (limits.CONNECTION_BYTES_MAX,))
                    dealer.send_multipart(frames.pack([ask]))
                    dealer.recv_multipart()
                    threading.Event().wait(1.5)

            task = asyncio.create_task(in_thread(hoard))
            await until(lambda: found.node.endpoint.budget.used > 0)
            await until(lambda: found.node.endpoint.budget.used == 0)
            await task

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param([envelopes.Answer(5, "transport.hello", envelopes.NOTHING)], id="an answer at the port"),
        pytest.param([envelopes.Ask(5, "transport_test.echo", envelopes.NOTHING)], id="a body of nothing"),
        pytest.param([envelopes.Ask(5, "no.such_kind", envelopes.NOTHING)], id="an unknown kind"),
    ],
)
def test_protocol_breakers_are_cut(sent):
    """F33: well-formed frames that break the protocol end their connection; nothing was asked."""

    async def scenario():
        async with world() as found:
            cut = threading.Event()

            def breaker():
                with raw_dealer(found.node.addresses["client"]) as dealer:
                    dealer.send_multipart(frames.pack(sent))
                    cut.wait(20)

            task = asyncio.create_task(in_thread(breaker))
            await until(lambda: total(found.node.endpoint, "frames_refused") == 1)
            await until(lambda: not found.node.endpoint.connections("client"))
            cut.set()
            assert found.node.asked == []
            await serve_honest(found)
            await task

    asyncio.run(scenario())


def test_too_many_unanswered_requests_are_cut():
    """F37: a peer that ignores the bound on unanswered requests is cut off."""
    import msgspec

    async def scenario():
        async with world() as found:
            cut = threading.Event()

            def flood():
                with raw_dealer(found.node.addresses["client"]) as dealer:
                    body = msgspec.Raw(msgspec.msgpack.encode(Echo("wait")))
                    for start in range(2, 2 + limits.REQUESTS_IN_FLIGHT_MAX + 200, 100):
                        asks = [envelopes.Ask(start + n, "transport_test.echo", body) for n in range(100)]
                        try:
                            dealer.send_multipart(frames.pack(asks))
                        except zmq.Again:
                            return
                    cut.wait(20)

            task = asyncio.create_task(in_thread(flood))
            await until(lambda: total(found.node.endpoint, "frames_refused") == 1)
            cut.set()
            await task
            assert len(found.node.asked) <= limits.REQUESTS_IN_FLIGHT_MAX
            await serve_honest(found)

    asyncio.run(scenario())


def test_a_hostile_node_cannot_hurt_a_client():
    """F37: an honest client of a node that answers with more than it was asked for gets typed errors, bounded."""
    import msgspec

    async def scenario():
        async with world() as found:
            server = zmq.Context()
            router = server.socket(zmq.ROUTER)
            router.linger = 0
            port = router.bind_to_random_port("tcp://127.0.0.1")
            hello = msgspec.Raw(msgspec.msgpack.encode(Hello(features=("attachments", "streams"))))

            def answer():
                router.rcvtimeo = 10_000
                routing_id, *_ = router.recv_multipart()
                router.send_multipart([routing_id, *frames.pack([envelopes.Answer(1, "transport.hello", hello)])])
                router.recv_multipart()
                for number in range(100):  # far beyond the credit of 16
                    piece = bytes(MIB)
                    step = envelopes.Data(2, number, len(piece), last=True)
                    try:
                        router.send_multipart([routing_id, *frames.pack([step], [piece])])
                    except zmq.ZMQError:
                        return

            task = asyncio.create_task(in_thread(answer))
            channel = found.caller.channel(f"tcp://127.0.0.1:{port}", port="bulk")
            items = channel.stream(Count(1), timeout_s=20)
            await anext(items)
            await until(lambda: not channel.connected)
            with pytest.raises(errors.Unreachable):
                async for _ in items:
                    pass
            await task
            router.close()
            server.term()

    asyncio.run(scenario())


@pytest.mark.parametrize("port", ["client", "bulk"])
def test_an_unasked_proof_is_refused(port):
    """F28: a piece without a checksum ends the connection when its stream was not opened so."""

    async def scenario():
        async with world() as found:
            channel = found.caller.channel(found.node.addresses[port], port=port)
            await channel.request(Echo("hello"), timeout_s=10) if port == "client" else await anext(
                channel.stream(Count(1), timeout_s=10)
            )
            channel._caller.post(envelopes.Data(10_000, 0, 4, last=True, proved=True), (b"data",))
            await until(lambda: not channel.connected)

    asyncio.run(scenario())


FORK = """
import asyncio, sys
sys.path.insert(0, {root!r})
from tests.transport.world import Echo, world
async def scenario():
    async with world() as found:
        channel = found.caller.channel(found.node.addresses["client"])
        await channel.request(Echo("hi"), timeout_s=20)
asyncio.run(scenario())
print("clean")
"""


def test_a_process_ends_without_leftovers():
    """Closing endpoints leaves no thread, no socket and no warning behind: the process ends by itself."""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", FORK.format(root=root)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "clean\n", done.stderr
    assert "Warning" not in done.stderr
    assert Node is not None
