"""`sockets.Pump`: a socket read on the event loop, whatever comes."""

from __future__ import annotations

import asyncio

import pytest
import zmq

from srengine import limits
from srengine.transport.sockets import Pump

TAKEN = limits.PARTS_MAX + 2


@pytest.fixture
def pair():
    """Two sockets that are connected."""
    with zmq.Context() as context:
        sockets = [context.socket(zmq.PAIR) for _ in range(2)]
        sockets[0].bind("inproc://pump")
        sockets[1].connect("inproc://pump")
        yield sockets
        for socket in sockets:
            socket.close(0)


@pytest.mark.parametrize("count", [1, 2, TAKEN - 1, TAKEN, TAKEN + 1, 10 * TAKEN])
def test_a_message_is_handed_on_once_and_never_grows(pair, count):
    """Of a message of ever so many parts only as many are kept as prove that there are too many; it is handed on
    once, as is the next one.
    """

    async def work():
        seen = []
        done = asyncio.Event()

        def take(parts):
            seen.append([part.bytes for part in parts])
            kept.append(parts)
            if parts[-1].bytes == b"end":
                done.set()

        kept = []
        pump = Pump(pair[0], take)
        pair[1].send_multipart([b"%d" % number for number in range(count)])
        pair[1].send(b"end")
        await done.wait()
        pump.close(0)
        assert seen == [[b"%d" % number for number in range(min(count, TAKEN))], [b"end"]]
        assert [len(parts) for parts in kept] == [min(count, TAKEN), 1], "nothing is kept of the rest"

    asyncio.run(work())
