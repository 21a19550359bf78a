"""A TCP proxy that does to a connection what networks do: for every test that needs a bad one.

::

    with ChaosProxy("127.0.0.1", port) as proxy:
        connect(proxy.address)  # "tcp://127.0.0.1:<port of the proxy>"
        proxy.forward.delay_s = 0.2  # forward: from who connected to the target; backward: the way back
        proxy.backward.black_hole = True  # one-way cut: read, and never passed on
        proxy.forward.bytes_per_s = 125_000  # 1 Mbit/s
        proxy.cut()  # reset every connection
        proxy.refusing = True  # and new ones
        proxy.forward.recording = True
        ...
        proxy.forward.recorded

Two levels, because ZeroMQ speaks over a TCP stream:

* **bytes** (always): delay, bandwidth, one-way black hole, cuts, flipped bits (`corrupt_bytes`), recording. Losing or
  reordering bytes of a stream is corruption, so it is not offered here.
* **messages** (``level="messages"``): the ZMTP 3 stream of a link without CURVE is taken apart behind its greeting, and
  whole ZeroMQ messages are dropped, duplicated, swapped with the next one, held back, or have a bit of their content
  flipped, at a rate or as ``decide(number, parts)`` says. Handshake and heartbeats pass.

One thread with its own event loop; settings may be changed at any time from any thread. All randomness is from
``seed``.
"""

from __future__ import annotations

import asyncio
import enum
import random
import socket
import struct
import threading
from collections.abc import Callable
from typing import Self

_GREETING_BYTES = 64
_CHUNK_BYTES = 64 * 1024
_MORE, _LONG, _COMMAND = 1, 2, 4


class Verdict(enum.Enum):
    """What happens to one message."""

    PASS = "pass"
    DROP = "drop"
    DUPLICATE = "duplicate"
    SWAP = "swap"
    """Goes behind the next message of its direction."""
    HOLD = "hold"
    """Kept until `Direction.release`; later ones pass."""
    CORRUPT = "corrupt"
    """One bit of the last part's content is flipped; the framing stays whole."""


class Direction:
    """Settings, counters and recording of one direction, over all connections of the proxy."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.delay_s = 0.0
        self.jitter_s = 0.0
        self.bytes_per_s: float | None = None
        self.black_hole = False
        self.corrupt_bytes = 0.0
        """Probability that a chunk has a bit flipped."""
        self.drop = 0.0
        self.duplicate = 0.0
        self.swap = 0.0
        self.corrupt = 0.0
        """Probabilities for each message; only with ``level="messages"``."""
        self.decide: Callable[[int, list[bytes]], Verdict] | None = None
        """Asked instead of the probabilities: number (from 0, over all connections) and parts of a message."""
        self.recording = False
        self.recorded = bytearray()
        self.bytes_passed = 0
        self.messages_seen = 0
        self.verdicts: dict[Verdict, int] = dict.fromkeys(Verdict, 0)
        self.held: list[tuple[Callable[[bytes], None], bytes]] = []

    def verdict(self, parts: list[bytes]) -> Verdict:
        number = self.messages_seen
        self.messages_seen += 1
        found = self.decide(number, parts) if self.decide is not None else self._by_chance()
        self.verdicts[found] += 1
        return found

    def _by_chance(self) -> Verdict:
        draw = self.random.random()
        for rate, verdict in (
            (self.drop, Verdict.DROP),
            (self.duplicate, Verdict.DUPLICATE),
            (self.swap, Verdict.SWAP),
            (self.corrupt, Verdict.CORRUPT),
        ):
            if draw < rate:
                return verdict
            draw -= rate
        return Verdict.PASS


class ChaosProxy:
    """Forwards TCP connections to a target, badly if told so. A context manager; or `start` and `stop`."""

    def __init__(self, host: str, port: int, *, level: str = "bytes", seed: int = 0) -> None:
        assert level in {"bytes", "messages"}, level
        self.target = (host, port)
        self.level = level
        self.refusing = False
        """New connections are accepted and reset at once."""
        self.connections_seen = 0
        self.forward = Direction(seed)
        self.backward = Direction(seed + 1)
        self.failure: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._server: asyncio.Server | None = None
        self._pairs: set[_Pair] = set()
        self.port = 0

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Self:
        """Listen on a free loopback port; return self."""
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="chaos-proxy", daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def stop(self) -> None:
        """Reset all connections and stop; raises what failed inside."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._thread = None
        if self.failure is not None:
            raise self.failure

    def cut(self) -> None:
        """Reset every connection; returns when it is done."""
        self._call(self._cut)

    def release(self) -> int:
        """Let held messages go, in the order in which they came; return how many."""
        return self._call(self._release)

    def retarget(self, host: str, port: int) -> None:
        """Connect new connections to another target (a peer that came back elsewhere)."""
        self.target = (host, port)

    def _call(self, function):
        done = threading.Event()
        found = []

        def run() -> None:
            found.append(function())
            done.set()

        self._loop.call_soon_threadsafe(run)
        assert done.wait(10)
        return found[0]

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.set_exception_handler(self._failed)
        self._loop.run_until_complete(self._listen())
        started.set()
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._shut_down())
            self._loop.close()

    def _failed(self, _loop, context) -> None:
        error = context.get("exception") or RuntimeError(context["message"])
        # Stopping cancels what still runs; asyncio's own callback for accepted connections reports that.
        if not isinstance(error, asyncio.CancelledError):
            self.failure = error

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_CHUNK_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _shut_down(self) -> None:
        self._server.close()
        self._cut()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _cut(self) -> None:
        for pair in list(self._pairs):
            pair.reset()

    def _release(self) -> int:
        count = 0
        for direction in (self.forward, self.backward):
            held, direction.held = direction.held, []
            count += len(held)
            for send, message in held:
                send(message)
        return count

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections_seen += 1
        if self.refusing:
            _reset(writer)
            return
        try:
            other_reader, other_writer = await asyncio.open_connection(*self.target, limit=_CHUNK_BYTES)
        except OSError:
            _reset(writer)
            return
        pair = _Pair(self, writer, other_writer)
        self._pairs.add(pair)
        try:
            await asyncio.gather(
                pair.pump(reader, other_writer, self.forward), pair.pump(other_reader, writer, self.backward)
            )
        except OSError:
            pass
        finally:
            pair.reset()
            self._pairs.discard(pair)


class _Pair:
    """Both halves of one proxied connection."""

    def __init__(self, proxy: ChaosProxy, one: asyncio.StreamWriter, other: asyncio.StreamWriter) -> None:
        self.proxy = proxy
        self.writers = (one, other)
        self.loop = asyncio.get_running_loop()

    def reset(self) -> None:
        for writer in self.writers:
            _reset(writer)

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        """Read one side, treat what came, and write it to the other, until an end or a reset."""
        queue: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue(maxsize=64)
        sender = self.loop.create_task(_send(queue, writer, direction))
        splitter = _Splitter() if self.proxy.level == "messages" else None

        def put_later(message: bytes) -> None:
            if not writer.is_closing():
                writer.write(message)

        swapped: bytes | None = None
        arrives_at = 0.0
        try:
            while chunk := await reader.read(_CHUNK_BYTES):
                if direction.black_hole:
                    continue
                if direction.corrupt_bytes and direction.random.random() < direction.corrupt_bytes:
                    chunk = _flip(chunk, direction.random)
                out = bytearray()
                if splitter is None:
                    out += chunk
                else:
                    for raw, parts in splitter.feed(chunk):
                        if parts is None:
                            out += raw
                            continue
                        verdict = direction.verdict(parts)
                        if verdict is Verdict.HOLD:
                            direction.held.append((put_later, raw))
                        elif verdict is Verdict.SWAP and swapped is None:
                            swapped = raw
                        elif verdict is not Verdict.DROP:
                            out += _flip_content(raw, parts, direction.random) if verdict is Verdict.CORRUPT else raw
                            out += raw if verdict is Verdict.DUPLICATE else b""
                            out += swapped or b""
                            swapped = None
                if out:
                    pause = direction.delay_s + direction.jitter_s * direction.random.random()
                    arrives_at = max(arrives_at, self.loop.time() + pause)
                    await queue.put((arrives_at, bytes(out)))
            await queue.put(None)
            await sender
            if writer.can_write_eof() and not writer.is_closing():
                writer.write_eof()
        finally:
            sender.cancel()


async def _send(queue: asyncio.Queue, writer: asyncio.StreamWriter, direction: Direction) -> None:
    loop = asyncio.get_running_loop()
    while (item := await queue.get()) is not None:
        arrives_at, data = item
        if arrives_at > loop.time():
            await asyncio.sleep(arrives_at - loop.time())
        rest = memoryview(data)
        while rest:
            rate = direction.bytes_per_s
            piece = rest[: max(1, int(rate / 50))] if rate else rest
            rest = rest[len(piece) :]
            if rate:
                await asyncio.sleep(len(piece) / rate)
            if direction.recording:
                direction.recorded += piece
            direction.bytes_passed += len(piece)
            writer.write(piece)
            await writer.drain()


class _Splitter:
    """Take a ZMTP 3 stream apart: (raw bytes, parts of the message), parts None for what is not to be touched."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._greeted = False
        self._raw = bytearray()
        self._parts: list[bytes] = []

    def feed(self, chunk: bytes):
        self._buffer += chunk
        if not self._greeted:
            if len(self._buffer) < _GREETING_BYTES:
                # Passed on as it comes: both sides send the greeting in steps and wait for each other's.
                raw = bytes(self._buffer[len(self._raw) :])
                self._raw += raw
                if raw:
                    yield raw, None
                return
            raw = bytes(self._buffer[len(self._raw) : _GREETING_BYTES])
            yield raw, None
            self._raw.clear()
            del self._buffer[:_GREETING_BYTES]
            self._greeted = True
        while (found := self._frame()) is not None:
            flags, header, body = found
            raw = header + body
            if flags & _COMMAND:
                yield raw, None
                continue
            self._raw += raw
            self._parts.append(body)
            if not flags & _MORE:
                message, parts = bytes(self._raw), self._parts
                self._raw.clear()
                self._parts = []
                yield message, parts

    def _frame(self) -> tuple[int, bytes, bytes] | None:
        if len(self._buffer) < 2:
            return None
        flags = self._buffer[0]
        header_bytes = 9 if flags & _LONG else 2
        if len(self._buffer) < header_bytes:
            return None
        size = struct.unpack(">Q", self._buffer[1:9])[0] if flags & _LONG else self._buffer[1]
        if len(self._buffer) < header_bytes + size:
            return None
        header = bytes(self._buffer[:header_bytes])
        body = bytes(self._buffer[header_bytes : header_bytes + size])
        del self._buffer[: header_bytes + size]
        return flags, header, body


def _flip(data: bytes, source: random.Random) -> bytes:
    changed = bytearray(data)
    changed[source.randrange(len(changed))] ^= 1 << source.randrange(8)
    return bytes(changed)


def _flip_content(raw: bytes, parts: list[bytes], source: random.Random) -> bytes:
    last = parts[-1]
    return raw[: len(raw) - len(last)] + _flip(last, source) if last else raw


def _reset(writer: asyncio.StreamWriter) -> None:
    if writer.is_closing():
        return
    connection = writer.get_extra_info("socket")
    if connection is not None:
        # A reset, not an orderly end: what is on its way is lost, as when a machine goes.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
