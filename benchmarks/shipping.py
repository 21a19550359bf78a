"""Two processes: this one serves, a child receives. For the rows on shipping.

The parent serves streams from a thread with its own event loop, and bare frames from another; the child is receiver.py.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
import zmq
from zmq.utils import z85

from benchmarks import machine
from srengine.codec import registry
from srengine.sync.hops import made_ahead
from srengine.transport import Endpoint, Identity, Peer, new_key_pair

CHILD_S_MAX = 600.0
STREAM_S_MAX = 60.0
SAMPLE_S = 0.01

T = TypeVar("T")


class Prepared(msgspec.Struct, frozen=True):
    """Ask for the prepared items, the first ``count`` of them."""

    count: int


class Made(msgspec.Struct, frozen=True):
    """Ask for items that are made meanwhile."""


registry.register("bench.prepared", Prepared)
registry.register("bench.made", Made)


class Memory:
    """Sample this process's anonymous memory in a thread; ``grown`` is the highest growth since the beginning."""

    def __init__(self) -> None:
        """Begin."""
        self._anonymous = machine.AnonymousMemory()
        self._before = self._anonymous.bytes()
        self._highest = self._before
        self._stopped = False
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stopped:
            time.sleep(SAMPLE_S)
            self._highest = max(self._highest, self._anonymous.bytes())

    def stop(self) -> int:
        """End sampling and return the growth in bytes."""
        self._stopped = True
        self._thread.join()
        self._anonymous.close()
        return self._highest - self._before


class Use:
    """What this process uses from now on until `stop`."""

    def __init__(self) -> None:
        """Begin."""
        self._memory = Memory()
        self._processor_s = time.process_time()
        self._start = time.perf_counter()

    def stop(self) -> dict[str, float]:
        """Return seconds, growth of memory in bytes, and seconds of processor time."""
        seconds = time.perf_counter() - self._start
        return {
            "seconds": seconds,
            "processor": time.process_time() - self._processor_s,
            "memory": self._memory.stop(),
        }


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
        for item in self.prepared[: message.count]:
            yield item

    def _made(self, peer: Peer, message: Made) -> AsyncIterator[bytes]:
        return made_ahead(self.make)

    def _serve_raw(self) -> None:
        while (asked := self.socket.recv()) != b"stop":
            self.socket.send(b"connected")
            for item in self.prepared[: int(asked)]:
                self.socket.send(item, copy=False)
        self.socket.close()

    def child(self) -> Child:
        """Start a receiving process."""
        return Child([self.address, self.raw_address, self.keys.public.hex() if self.keys is not None else ""])

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


class Child:
    """A receiving process; a context manager."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """Start it."""
        command = [sys.executable, "-m", "benchmarks.receiver", *arguments]
        self.process = subprocess.Popen(
            command, cwd=Path(__file__).parent.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *words: object) -> dict[str, float]:
        """Have it do one command and return what it says."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        said = self.process.stdout.readline()
        assert said, ("the receiving process ended with", self.process.wait(CHILD_S_MAX))
        answer: dict[str, float] = json.loads(said)
        return answer

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let it end."""
        self.process.communicate(timeout=CHILD_S_MAX)


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
