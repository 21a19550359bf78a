"""The asking side of a connection: requests, and streams that it reads.

At most `limits.REQUESTS_IN_FLIGHT_MAX` requests are unanswered at a time; further ones wait here. A request whose
caller has given up still counts until the peer answers it, because the peer still works on it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec

from srengine import errors, limits
from srengine.alarm import Alarm
from srengine.codec import registry
from srengine.codec.envelopes import (
    NOTHING,
    Answer,
    Ask,
    Cancel,
    Credit,
    Data,
    End,
    Envelope,
    Failure,
    Open,
    Post,
    Taken,
)
from srengine.metrics import Metrics
from srengine.transport.connection import Connection, Wire, encode_message, slices
from srengine.transport.failures import error_of
from srengine.transport.peers import Buffer, Reply
from srengine.transport.transfers import GRANT_PIECES, Assembly, Budget, Outgoing, Reservation, check_sizes, sizes_of


class _Pending:
    """One unanswered request."""

    __slots__ = ("assembly", "deadline", "future", "outgoing", "reply", "timeout_s")

    def __init__(self, future: asyncio.Future[Reply], deadline: float, timeout_s: float) -> None:
        self.future = future
        self.deadline = deadline
        """In the loop's time."""
        self.timeout_s = timeout_s
        self.outgoing: Outgoing | None = None
        """Attachments of the question that wait for credit."""
        self.assembly: Assembly | None = None
        """Attachments of the answer that are on their way."""
        self.reply: msgspec.Struct | None = None


class _Incoming:
    """One stream that is being read. Credit returns when an item is taken, or a piece of an unfinished item has
    come.
    """

    __slots__ = (
        *("ended", "items", "moved_at", "number", "parts", "proved", "since_grant", "timer", "waiter", "waiting_since"),
    )

    def __init__(self, *, proved: bool) -> None:
        self.proved = proved
        """Whoever reads it proves the items."""
        self.items: deque[tuple[memoryview, int]] = deque()
        """(item, pieces to grant when it is taken)"""
        self.parts: bytearray | None = None
        self.number = 0
        self.since_grant = 0
        self.ended: errors.Error | bool = False
        """False: goes on; True: complete; an error: failed."""
        self.waiter: asyncio.Future[None] | None = None
        self.waiting_since = 0.0
        self.moved_at = 0.0
        """When a piece last came, in the loop's time."""
        self.timer: asyncio.TimerHandle | None = None

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class Caller(Connection):
    """Ask over one connection."""

    def __init__(self, wire: Wire, metrics: Metrics, budget: Budget, port: str) -> None:
        super().__init__(wire, metrics, budget, port)
        self._next_request = 1
        self._pending: dict[int, _Pending] = {}
        self._streams: dict[int, _Incoming] = {}
        self._alarm = Alarm(self.loop, self._look)
        self._room = limits.REQUESTS_IN_FLIGHT_MAX
        """How many more requests may be under way."""
        self._queue: deque[asyncio.Future[None]] = deque()
        """Who waits for room; done: it was given to him."""
        self._posted_bytes = 0
        """Bytes of all posts so far."""
        self._taken_bytes = 0
        """As far as the callee has said to have taken them in; ``posted - taken <= limits.POSTS_BYTES_MAX``."""
        self.on_end: Callable[[errors.Error], None] | None = None
        """Told once why the connection has ended."""

    # --- requests ----------------------------------------------------------------------------------------------------

    async def request(self, message: msgspec.Struct, attachments: Sequence[Buffer], deadline: float) -> Reply:
        """Ask, and return the answer. ``deadline`` is in the loop's time; see `Channel.request` for the errors."""
        kind, body = encode_message(message)
        sizes, total = sizes_of(attachments)
        if self._room:
            self._room -= 1
        else:
            await self._wait_for_room(deadline)
        if self.closed is not None:
            self._leave_room()
            raise self._unsent()
        number = self._next_request
        self._next_request += 1
        timeout_s = max(0.0, deadline - self.loop.time())
        pending = self._pending[number] = _Pending(self.loop.create_future(), deadline, timeout_s)
        inline = total <= limits.PART_BYTES_MAX
        if not inline:
            pending.outgoing = Outgoing(number, attachments)
        ask = Ask(number, kind, body, sizes, int(timeout_s * 1000))
        self.post(ask, attachments if inline else (), alone=len(self._pending) == 1)
        self._alarm.at(deadline)
        try:
            return await pending.future
        except asyncio.CancelledError:
            self._abandon(number)
            raise

    async def _wait_for_room(self, deadline: float) -> None:
        turn = self.loop.create_future()
        self._queue.append(turn)
        try:
            async with asyncio.timeout_at(deadline):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # given to him while he was leaving
                self._leave_room()
            elif turn in self._queue:
                self._queue.remove(turn)
            if not isinstance(error, TimeoutError):
                raise
            raise errors.TimedOut(
                f"{limits.REQUESTS_IN_FLIGHT_MAX} requests are unanswered; this one was not sent", sent=False
            ) from error

    def _leave_room(self) -> None:
        """Give the room of a request to who has waited longest, or to who comes."""
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._room += 1

    def _look(self, now: float) -> float:
        """End the requests whose time is over; return when the next one's is."""
        for number, pending in list(self._pending.items()):
            if pending.deadline <= now and not pending.future.done():
                where = self.peer.address if self.peer is not None else "the peer"
                message = f"no answer from {where} in {pending.timeout_s:.3g} s"
                pending.future.set_exception(errors.TimedOut(message, sent=True))
                self._abandon(number)
        waiting = [pending.deadline for pending in self._pending.values() if not pending.future.done()]
        return min(waiting, default=float("inf"))

    def _abandon(self, number: int) -> None:
        pending = self._pending.get(number)
        if pending is not None:
            pending.outgoing = None
            self.post(Cancel(number))
            if pending.reply is not None:  # the answer has begun: the peer drops the rest, nothing more is owed
                self._finish(number)

    def _finish(self, number: int) -> None:
        pending = self._pending.pop(number, None)
        if pending is None:
            return
        self._leave_room()
        if pending.assembly is not None and pending.assembly.reservation is not None:
            pending.assembly.reservation.release()

    # --- posts -------------------------------------------------------------------------------------------------------

    def post_message(self, message: msgspec.Struct) -> bool:
        """Send a message that gets no answer, now; see `Channel.post`."""
        kind, body = registry.encode(message)
        size = len(body)
        if size > self.wire.part_bytes_max:
            raise errors.InvalidValue(
                f"a {kind} of {size} bytes; at most {self.wire.part_bytes_max} go through the {self.port} port",
                bytes=size,
            )
        assert self.peer is not None, "a post before hello"
        fits = self._posted_bytes - self._taken_bytes + size <= limits.POSTS_BYTES_MAX
        if self.closed is not None or not fits or "posts" not in self.peer.features:
            self.metrics.add("srengine_transport_posts_dropped_total", port=self.port)
            return False
        self._posted_bytes += size
        if size <= limits.ENVELOPES_BYTES_TARGET:
            self.post(Post(kind, msgspec.Raw(body), self._posted_bytes), alone=True)
        else:
            self.post(Post(kind, NOTHING, self._posted_bytes, size), (body,), alone=True)
        return True

    # --- streams -----------------------------------------------------------------------------------------------------

    async def stream(
        self, message: msgspec.Struct, timeout_s: float, *, proved: bool = False
    ) -> AsyncGenerator[memoryview, None]:
        """Yield the items of a stream; see `Channel.stream`."""
        kind, body = encode_message(message)
        if self.closed is not None:
            raise self._unsent()
        number = self._next_request
        self._next_request += 1
        incoming = self._streams[number] = _Incoming(proved=proved)
        self.post(Open(number, kind, body, limits.CREDIT_FRAMES, proved))
        try:
            while True:
                while incoming.items:
                    item, pieces = incoming.items.popleft()
                    self._grant(number, incoming, pieces)
                    yield item
                if incoming.ended is True:
                    return
                if isinstance(incoming.ended, errors.Error):
                    raise incoming.ended
                await self._wait_for_item(incoming, timeout_s)
        finally:
            if incoming.timer is not None:
                incoming.timer.cancel()
            if self._streams.pop(number, None) is not None and not incoming.ended:
                self.post(Cancel(number))

    async def _wait_for_item(self, incoming: _Incoming, timeout_s: float) -> None:
        """Wait until an item or the end is there; a piece of an unfinished item counts as progress."""
        incoming.waiting_since = self.loop.time()
        if incoming.timer is None:
            incoming.timer = self.loop.call_later(timeout_s, self._look_at, incoming, timeout_s)
        incoming.waiter = self.loop.create_future()
        try:
            await incoming.waiter
        finally:
            incoming.waiter = None

    def _look_at(self, incoming: _Incoming, timeout_s: float) -> None:
        """End the wait for an item when nothing has come for too long.

        One timer runs as long as the stream does: a new one for each item would cost more than the item.
        """
        incoming.timer = None
        waiter = incoming.waiter
        if waiter is None or waiter.done():
            return
        since = max(incoming.waiting_since, incoming.moved_at)
        left = since + timeout_s - self.loop.time()
        if left > 0:
            incoming.timer = self.loop.call_later(left, self._look_at, incoming, timeout_s)
        else:
            waiter.set_exception(errors.TimedOut(f"a stream brought nothing for {timeout_s:.3g} s"))

    def _grant(self, number: int, incoming: _Incoming, pieces: int) -> None:
        incoming.since_grant += pieces
        if incoming.since_grant >= GRANT_PIECES and not incoming.ended:
            self.post(Credit(number, incoming.since_grant))
            incoming.since_grant = 0

    def _take_piece(self, number: int, incoming: _Incoming, data: Data, piece: memoryview) -> None:
        if data.number < incoming.number:
            return  # a repeated frame
        if data.number != incoming.number:
            raise errors.FrameError(f"piece {data.number} of a stream where {incoming.number} belongs")
        incoming.number += 1
        incoming.moved_at = self.progress_at
        if incoming.parts is None and data.last:
            incoming.items.append((piece, 1))
        else:
            if incoming.parts is None:
                incoming.parts = bytearray()
            incoming.parts += piece
            if len(incoming.parts) > limits.CHUNK_COMPRESSED_BYTES_MAX:
                raise errors.FrameError(f"an item of more than {limits.CHUNK_COMPRESSED_BYTES_MAX} bytes in a stream")
            if data.last:
                incoming.items.append((memoryview(incoming.parts).toreadonly(), 1))
                incoming.parts = None
            else:
                self._grant(number, incoming, 1)
        if len(incoming.items) > limits.CREDIT_FRAMES + GRANT_PIECES:
            raise errors.FrameError("a stream goes on beyond its credit")
        if incoming.items:
            incoming.wake()

    # --- arriving ----------------------------------------------------------------------------------------------------

    def handle(self, envelope: Envelope, data: memoryview) -> None:
        """Act on one envelope of the callee."""
        match envelope:
            case Data():  # first, because bulk is nothing else
                self._piece(envelope, data)
            case Answer():
                self._answered(envelope, data)
            case Failure(request=number):
                self._failed(number, error_of(envelope))
            case Credit(request=number, pieces=pieces):
                self._credited(number, pieces)
            case Taken(total=total):
                self._taken_bytes = max(self._taken_bytes, min(total, self._posted_bytes))
            case End(request=number):
                incoming = self._streams.get(number)
                if incoming is not None and not incoming.ended:
                    if incoming.parts is not None:
                        raise errors.FrameError("a stream ended inside an item")
                    incoming.ended = True
                    incoming.wake()
            case Ask() | Open() | Cancel() | Post():
                raise errors.FrameError("a question where only answers are expected")

    def _piece(self, data: Data, piece: memoryview) -> None:
        self.progress_at = self.loop.time()
        incoming = self._streams.get(data.request)
        if data.proved and (incoming is None or not incoming.proved):
            if incoming is None and data.request < self._next_request:
                return  # of a stream that was given up
            raise errors.FrameError("a piece without a checksum that nobody promised to prove")
        if incoming is not None:
            self._take_piece(data.request, incoming, data, piece)
            return
        pending = self._pending.get(data.request)
        if pending is not None and pending.assembly is not None:
            credit = pending.assembly.add(data, piece)
            if credit:
                self.post(Credit(data.request, credit))

    def _credited(self, number: int, pieces: int) -> None:
        self.progress_at = self.loop.time()
        pending = self._pending.get(number)
        if pending is not None and pending.outgoing is not None:
            for step, piece in pending.outgoing.grant(pieces):
                self.post(step, (piece,))
            if pending.outgoing.finished:
                pending.outgoing = None

    def _answered(self, answer: Answer, data: memoryview) -> None:
        pending = self._pending.get(answer.request)
        if pending is None or pending.reply is not None:
            self.metrics.add("srengine_transport_duplicates_total", port=self.port)
            return
        try:
            total = check_sizes(answer.sizes) if answer.sizes else 0
        except errors.InvalidValue as error:
            raise errors.FrameError(str(error)) from error
        reply = registry.decode_scanned(answer.kind, answer.body)
        if total <= limits.PART_BYTES_MAX:
            if not pending.future.done():
                pending.future.set_result(Reply(reply, slices(answer.sizes, data)))
            self._finish(answer.request)
            return
        number = answer.request
        pending.reply = reply
        if pending.future.done():  # nobody waits: refuse the rest
            self.post(Cancel(number))
            self._finish(number)
            return
        pending.assembly = Assembly(answer.sizes, lambda parts: self._assembled(number, parts))
        pending.assembly.reservation = Reservation(
            total, self.budgets, lambda: self.post(Credit(number, limits.CREDIT_FRAMES))
        )

    def _assembled(self, number: int, parts: list[memoryview]) -> None:
        pending = self._pending.get(number)
        if pending is not None and pending.reply is not None and not pending.future.done():
            pending.future.set_result(Reply(pending.reply, parts))
        self._finish(number)

    def _failed(self, number: int, error: errors.Error) -> None:
        incoming = self._streams.get(number)
        if incoming is not None:
            if not incoming.ended:
                incoming.ended = error
                incoming.wake()
            return
        pending = self._pending.get(number)
        if pending is None:
            self.metrics.add("srengine_transport_duplicates_total", port=self.port)
            return
        if not pending.future.done():
            pending.future.set_exception(error)
        self._finish(number)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _unsent(self) -> errors.Error:
        return errors.Unreachable(f"the connection has ended: {self.closed}", sent=False)

    def ended(self, error: errors.Error) -> None:
        """Fail every request and stream that waits."""
        self._alarm.cancel()
        for number, pending in list(self._pending.items()):
            if not pending.future.done():
                pending.future.set_exception(
                    errors.Unreachable(f"the connection ended before the answer came: {error}", sent=True)
                )
            self._finish(number)
        for incoming in self._streams.values():
            if not incoming.ended:
                incoming.ended = errors.Unreachable(f"the connection ended inside a stream: {error}", sent=True)
                incoming.wake()
        if self.on_end is not None:
            self.on_end(error)

    def transfers_pending(self) -> bool:
        """Return whether the callee owes bytes or credit."""
        return any(
            pending.outgoing is not None
            or (
                pending.assembly is not None
                and pending.assembly.reservation is not None
                and pending.assembly.reservation.state == "held"
            )
            for pending in self._pending.values()
        )
