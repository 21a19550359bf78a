"""The receiving process of the rows on shipping: ``python -m benchmarks.receiver MODE ADDRESS KEY DIRECTORY COUNT``.

It imports everything first, then does its work and prints one JSON line: the seconds that it took, and by how
much its memory, mapped pages aside, grew meanwhile.

    ship     read a stream of prepared items and drop them        all      read a snapshot as it is made, and apply it
    apply    read the prepared items, then, timed, apply them      raw      read as many frames over a bare pyzmq socket
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from benchmarks.shipping import STREAM_S_MAX, Made, Memory, Prepared, secure
from srengine.snapshot import InPlace, SnapshotSink
from srengine.storage import Store
from srengine.transport import Endpoint, Identity, KeyPair, new_key_pair


async def receive(
    address: str, server_key: bytes, message: msgspec.Struct, take: Callable[[memoryview], object] | None
) -> float:
    """Read a whole stream; ``take`` each item in another thread, in order. Return the seconds from the asking on."""
    keys: KeyPair | None = new_key_pair() if server_key else None
    endpoint = Endpoint(Identity(keys=keys))
    loop = asyncio.get_running_loop()
    try:
        channel = endpoint.channel(address, port="bulk", server_key=server_key or None)
        start = time.perf_counter()
        async for item in channel.stream(message, timeout_s=STREAM_S_MAX):
            if take is not None:
                await loop.run_in_executor(None, take, item)
        return time.perf_counter() - start
    finally:
        await endpoint.close()


def receive_raw(address: str, server_key: bytes, count: int) -> float:
    """Read ``count`` frames from a bare socket."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        secure(socket, server_key)
        socket.connect(address)
        start = time.perf_counter()
        socket.send(b"go")
        for _ in range(count):
            socket.recv(copy=False)
        return time.perf_counter() - start


def main(mode: str, address: str, key: str, directory: str, count: str) -> None:
    """Be the child."""
    server_key = bytes.fromhex(key)
    if mode in {"raw", "ship"}:
        memory = Memory()
        if mode == "raw":
            seconds = receive_raw(address, server_key, int(count))
        else:
            seconds = asyncio.run(receive(address, server_key, Prepared(), None))
    else:
        items: list[bytes] = []
        if mode == "apply":
            asyncio.run(receive(address, server_key, Prepared(), lambda item: items.append(bytes(item))))
        with Store(Path(directory)) as store, SnapshotSink(InPlace(store.tablet("copy"))) as sink:
            memory = Memory()
            if mode == "all":
                seconds = asyncio.run(receive(address, server_key, Made(), sink.accept))
                start = time.perf_counter()
            else:
                seconds, start = 0.0, time.perf_counter()
                for item in items:
                    sink.accept(item)
            sink.finish()
            seconds += time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "memory": memory.stop()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
