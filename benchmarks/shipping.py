"""Two processes: this one serves, a child receives. For the rows on shipping.

The parent serves streams from a thread with its own event loop, and bare frames from another; the child is receiver.py.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
import zmq
from zmq.utils import z85

from benchmarks import machine
from srengine.codec import registry
from srengine.transport import Endpoint, Identity, Peer, new_key_pair

CHILD_S_MAX = 600.0
STREAM_S_MAX = 60.0
SAMPLE_S = 0.005

T = TypeVar("T")


class Prepared(msgspec.Struct, frozen=True):
    """Ask for the prepared items."""


class Made(msgspec.Struct, frozen=True):
    """Ask for items that are made meanwhile."""


registry.register("bench.prepared", Prepared)
registry.register("bench.made", Made)


class Memory:
    """Sample this process's anonymous memory in a thread; ``grown`` is the highest growth since the beginning."""

    def __init__(self) -> None:
        """Begin."""
        self._before = machine.anonymous_bytes()
        self._highest = self._before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self._highest = max(self._highest, machine.anonymous_bytes())

    def stop(self) -> int:
        """End sampling and return the growth in bytes."""
        self._stop.set()
        self._thread.join()
        return self._highest - self._before


class Server:
    """Serves streams on a bulk port, and the same bytes over a bare pyzmq socket, each in a thread of its own."""

    def __init__(self, prepared: Sequence[bytes], make: Callable[[], Iterator[bytes]], *, secure: bool) -> None:
        """Begin to serve; ``secure``: CURVE."""
        self.prepared = prepared
        self.make = make
        self.keys = new_key_pair() if secure else None
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.address = self.run(self._start())
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if self.keys is not None:
            self.socket.setsockopt(zmq.CURVE_SERVER, 1)
            self.socket.setsockopt(zmq.CURVE_PUBLICKEY, self.keys.public)
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, self.keys.secret)
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.raw_address = f"tcp://127.0.0.1:{port}"
        self.raw_thread = threading.Thread(target=self._serve_raw, daemon=True)
        self.raw_thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(CHILD_S_MAX)

    async def _start(self) -> str:
        self.endpoint = Endpoint(Identity(keys=self.keys), authenticator=Anyone())
        self.endpoint.serve_stream(Prepared, self._prepared)
        self.endpoint.serve_stream(Made, self._made)
        return await self.endpoint.listen("bulk", "tcp://127.0.0.1:0")

    async def _prepared(self, peer: Peer, message: Prepared) -> AsyncIterator[bytes]:
        for item in self.prepared:
            yield item

    async def _made(self, peer: Peer, message: Made) -> AsyncIterator[bytes]:
        items = self.make()
        while (item := await self.loop.run_in_executor(None, next, items, None)) is not None:
            yield item

    def _serve_raw(self) -> None:
        while self.socket.recv() == b"go":
            for item in self.prepared:
                self.socket.send(item, copy=False)
        self.socket.close()

    def child(self, mode: str, directory: Path) -> dict[str, float]:
        """Run a child to its end and return what it says."""
        key = self.keys.public.hex() if self.keys is not None else ""
        address = self.raw_address if mode == "raw" else self.address
        command = [
            sys.executable,
            "-m",
            "benchmarks.receiver",
            mode,
            address,
            key,
            str(directory),
            str(len(self.prepared)),
        ]
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent.parent,
            check=True,
            stdout=subprocess.PIPE,
            timeout=CHILD_S_MAX,
            text=True,
        )
        said: dict[str, float] = json.loads(done.stdout)
        return said

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop both."""
        with self.context.socket(zmq.DEALER) as stopper:
            secure(stopper, self.keys.public if self.keys is not None else b"")
            stopper.connect(self.raw_address)
            stopper.send(b"stop")
            self.raw_thread.join(STREAM_S_MAX)
        self.context.destroy(0)
        self.run(self.endpoint.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(STREAM_S_MAX)
        self.loop.close()


class Anyone:
    """Admits everybody: the port is on loopback and lives for seconds."""

    def admit(self, port: str, address: str, public_key: bytes | None) -> bool:
        """Return True."""
        return True


def secure(socket: zmq.Socket[bytes], server_key: bytes) -> None:
    """Make a bare socket talk CURVE as a stranger, when there is a key."""
    if server_key:
        public, secret = zmq.curve_keypair()
        socket.setsockopt(zmq.CURVE_SERVERKEY, z85.encode(server_key))
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
