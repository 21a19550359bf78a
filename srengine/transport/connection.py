"""One connection between two processes, whatever carries its frames.

`Connection` has what both sides share: the queue of envelopes that leaves as coalesced frames, the reading of frames,
the end. `srengine.transport.caller.Caller` asks, `srengine.transport.callee.Callee` answers. A `Wire` carries frames: a
ZeroMQ socket, or memory in tests. Everything runs on one event loop.

Coalescing: whatever is posted in one turn of the loop leaves together, in as few frames as the bounds allow. A question
or an answer that is the only one under way leaves at once: nothing is there that could join it.

Ends: any frame that cannot be trusted ends the connection (`fail`): the wire is cut, every waiting caller gets a typed
error, nothing of the frame has an effect.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from srengine import errors, limits
from srengine.codec import frames, registry
from srengine.codec.envelopes import Answer, Ask, Cancel, Credit, Data, End, Envelope, Failure, Open, Post, Taken
from srengine.metrics import Metrics
from srengine.transport.peers import Buffer, Peer
from srengine.transport.transfers import Budget

_RETRY_S = 0.005


class Wire(Protocol):
    """What carries a connection's frames to the other side, whole and in order, or not at all."""

    part_bytes_max: int
    """The largest part of a frame that the other side's port lets through."""

    def send(self, parts: Sequence[Buffer]) -> bool:
        """Send one frame now. False: there is no room at the moment; the same frame is offered again."""
        ...

    def cut(self) -> None:
        """End the connection at once."""
        ...


class Connection:
    """The part that both sides share. Subclasses give `handle` and `ended`."""

    def __init__(self, wire: Wire, metrics: Metrics, budget: Budget, port: str) -> None:
        self.wire = wire
        self.metrics = metrics
        self.port = port
        self.peer: Peer | None = None
        """None until the hello is done."""
        self.budgets = (Budget(limits.CONNECTION_BYTES_MAX), budget)
        self.closed: errors.Error | None = None
        """Why the connection ended; None while it lives."""
        self.loop = asyncio.get_running_loop()
        self.progress_at = self.loop.time()
        """When a transfer last moved; looked at while `transfers_pending`."""
        self._out: deque[tuple[Envelope, Sequence[Buffer]]] = deque()
        self._held: Sequence[Buffer] | None = None
        """A packed frame that the wire had no room for."""
        self._flush_due = False
        self._sent = metrics.counter("srengine_transport_frames_sent_total", port=port)

    # --- leaving -----------------------------------------------------------------------------------------------------

    def post(self, envelope: Envelope, chunks: Sequence[Buffer] = (), *, alone: bool = False) -> None:
        """Send an envelope with its data in this turn of the loop; dropped when the connection has ended.

        ``alone``: nothing will join it, so it leaves now, unless something waits to leave before it.
        """
        if self.closed is not None:
            return
        if alone and not self._flush_due and not self._out:
            self._offer(frames.pack((envelope,), chunks))
            return
        self._out.append((envelope, chunks))
        if not self._flush_due:
            self._flush_due = True
            self.loop.call_soon(self.flush)

    def flush(self) -> None:
        """Send what is queued, in as few frames as the bounds allow."""
        self._flush_due = False
        while self.closed is None and (self._held is not None or self._out):
            parts = self._held if self._held is not None else self._next_frame()
            if not self._offer(parts):
                return

    def send_now(self, envelope: Envelope, chunk: Buffer) -> None:
        """Send an envelope with bytes that no other envelope can share a frame with, behind what is queued."""
        self.post(envelope, (chunk,), alone=True)
        if self._out:
            self.flush()

    def _offer(self, parts: Sequence[Buffer]) -> bool:
        """Give a frame to the wire; hold it for a moment, and return False, when there is no room."""
        if self.wire.send(parts):
            self._held = None
            self._sent.value += 1
            return True
        self._held = parts
        self._flush_due = True
        self.loop.call_later(_RETRY_S, self.flush)
        return False

    def _next_frame(self) -> Sequence[Buffer]:
        envelopes: list[Envelope] = []
        chunks: list[Buffer] = []
        body_bytes = data_bytes = 0
        while self._out and len(envelopes) < limits.ENVELOPES_MAX:
            envelope, more = self._out[0]
            size = sum(len(chunk) for chunk in more)
            if envelopes and (data_bytes + size > limits.PART_BYTES_MAX or body_bytes > limits.ENVELOPES_BYTES_TARGET):
                break
            body = _body_bytes(envelope)
            if envelopes and body_bytes + body > limits.ENVELOPES_BYTES_TARGET:
                break
            self._out.popleft()
            envelopes.append(envelope)
            chunks.extend(chunk for chunk in more if len(chunk))
            data_bytes += size
            body_bytes += body
        return frames.pack(envelopes, chunks)

    # --- arriving ----------------------------------------------------------------------------------------------------

    def receive(self, parts: Sequence[Any]) -> None:
        """Take one frame: bytes, or ZeroMQ's parts as they came. Whatever is wrong with it ends the connection and has
        no other effect.
        """
        if self.closed is not None:
            return
        try:
            envelopes, data = frames.unpack(parts, data_bytes_max=self.wire.part_bytes_max)
            if len(envelopes) == 1:
                self.handle(envelopes[0], data)
                return
            offset = 0
            for envelope in envelopes:
                size = frames.inline_bytes(envelope)
                self.handle(envelope, data[offset : offset + size])
                offset += size
        except (errors.FrameError, errors.UnsupportedFeature) as error:
            self.metrics.add("srengine_transport_frames_refused_total", port=self.port)
            self.fail(error)

    def handle(self, envelope: Envelope, data: memoryview) -> None:
        """Act on one envelope; ``data`` are its bytes in the frame. `FrameError`: the peer breaks the protocol."""
        raise NotImplementedError

    # --- the end -----------------------------------------------------------------------------------------------------

    def fail(self, error: errors.Error) -> None:
        """End the connection because of ``error``; idempotent."""
        if self.closed is not None:
            return
        self.closed = error
        self._out.clear()
        self._held = None
        self.wire.cut()
        self.ended(error)

    def ended(self, error: errors.Error) -> None:
        """Tell everybody who waits. Called once."""
        raise NotImplementedError

    def transfers_pending(self) -> bool:
        """Return whether the peer owes bytes or credit."""
        raise NotImplementedError

    def check_progress(self, now: float) -> None:
        """End a connection that owes bytes or credit and has not moved for too long."""
        if not self.transfers_pending():
            self.progress_at = now
        elif now - self.progress_at > limits.PROGRESS_S_MAX:
            self.fail(errors.Unreachable(f"no byte of an unfinished transfer for {limits.PROGRESS_S_MAX} s"))


def encode_message(message: msgspec.Struct) -> tuple[str, msgspec.Raw]:
    """Return the kind and bytes of a message; `InvalidValue` when it is larger than a message may be."""
    kind, body = registry.encode(message)
    if len(body) > limits.BODY_BYTES_MAX:
        raise errors.InvalidValue(
            f"a {kind} of {len(body)} bytes; at most {limits.BODY_BYTES_MAX} (bulk belongs into attachments)",
            bytes=len(body),
        )
    return kind, msgspec.Raw(body)


def slices(sizes: Sequence[int], data: memoryview) -> list[memoryview]:
    """Return the attachments that lie in one run of bytes."""
    found = []
    offset = 0
    for size in sizes:
        found.append(data[offset : offset + size])
        offset += size
    return found


def _body_bytes(envelope: Envelope) -> int:
    match envelope:
        case Ask(body=body) | Answer(body=body) | Open(body=body):
            return memoryview(body).nbytes
        case Failure():
            return limits.FAILURE_BYTES_MAX // 8
        case Data() | Credit() | End() | Cancel() | Taken():
            return 16
        case Post(body=body):
            return memoryview(body).nbytes
