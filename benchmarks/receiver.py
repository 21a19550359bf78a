"""The receiving process of the rows on shipping: ``python -m benchmarks.receiver ADDRESS RAW_ADDRESS KEY``.

It connects, then reads commands, one a line on stdin, and answers each with a line of JSON: the seconds that it took,
by how much its memory, mapped pages aside, grew meanwhile, and the seconds of processor time that it used.

    ship COUNT                      read a stream of prepared items and drop them
    raw COUNT                       read as many frames over a bare pyzmq socket
    apply COUNT DIRECTORY BYTES     read the prepared items, then, timed, apply them to an empty tablet there
    all 0 DIRECTORY BYTES           read a snapshot as it is made, and apply it meanwhile

The tablet's file becomes no larger than BYTES.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from benchmarks import machine
from benchmarks.shipping import STREAM_S_MAX, Made, Prepared, Use, secure
from srengine.snapshot import InPlace, SnapshotSink
from srengine.storage import Store
from srengine.sync.hops import use_all
from srengine.transport import Endpoint, Identity, new_key_pair


class Receiver:
    """Two connections to the server: one of ours, one bare."""

    def __init__(self, runner: asyncio.Runner, address: str, raw_address: str, key: bytes) -> None:
        """Connect both."""
        self.runner = runner
        self.endpoint = runner.run(self._connect(address, key))
        self.socket = zmq.Context().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        secure(self.socket, key)
        self.socket.connect(raw_address)
        self.raw(0)

    async def _connect(self, address: str, key: bytes) -> Endpoint:
        endpoint = Endpoint(Identity(keys=new_key_pair() if key else None))
        self.channel = endpoint.channel(address, port="bulk", server_key=key or None)
        async for _ in self.channel.stream(Prepared(0), timeout_s=STREAM_S_MAX, proved=True):
            pass
        return endpoint

    async def read(self, message: msgspec.Struct, take: Callable[[memoryview], object] | None) -> None:
        """Read a whole stream; ``take`` each item in another thread, in order."""
        items = self.channel.stream(message, timeout_s=STREAM_S_MAX, proved=True)
        if take is None:
            async for _ in items:
                pass
        else:
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                await use_all(items, take, thread)

    def raw(self, count: int) -> None:
        """Read ``count`` bare frames."""
        self.socket.send(b"%d" % count)
        for _ in range(count + 1):
            self.socket.recv(copy=False)

    def work(self, command: str, count: str, directory: str = "", size: str = "") -> dict[str, float]:
        """Do one command."""
        if command in {"ship", "raw"}:
            use = Use()
            if command == "raw":
                self.raw(int(count))
            else:
                self.runner.run(self.read(Prepared(int(count)), None))
            return use.stop()
        items: list[bytes] = []
        if command == "apply":
            self.runner.run(self.read(Prepared(int(count)), lambda item: items.append(bytes(item))))
        machine.have_memory(Path(directory).parent, int(size))
        with Store(Path(directory)) as store, SnapshotSink(InPlace(store.tablet("copy"))) as sink:
            use = Use()
            if command == "all":
                self.runner.run(self.read(Made(), sink.accept))
            for item in items:
                sink.accept(item)
            sink.finish()
            return use.stop()


def main(address: str, raw_address: str, key: str) -> None:
    """Be the child until stdin ends."""
    with asyncio.Runner() as runner:
        receiver = Receiver(runner, address, raw_address, bytes.fromhex(key))
        for line in sys.stdin:
            print(json.dumps(receiver.work(*line.split())), flush=True)
        receiver.socket.close()
        runner.run(receiver.endpoint.close())


if __name__ == "__main__":
    main(*sys.argv[1:])
