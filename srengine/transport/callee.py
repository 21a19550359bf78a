"""The answering side of a connection: hello first, then handlers and streams.

* Before the peer's hello nothing else is read; anything else ends the connection.
* A request id is answered once: ids seen before are counted and dropped (`_Window`), so a repeated frame has no effect.
* A handler that raises an `errors.Error` answers with it. Anything else is a mistake of ours: logged, and answered
  INTERNAL.
* A post is handed on in the next turn of the loop, in order, and forgotten; its bytes are confirmed in groups.
* Memory: `limits.REQUESTS_IN_FLIGHT_MAX` unanswered requests, `limits.CONNECTION_BYTES_MAX` of large attachments, held
  until the handler is done. A peer that goes beyond is cut off.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

import msgspec

from srengine import errors, limits
from srengine.codec import registry
from srengine.codec.envelopes import Answer, Ask, Cancel, Credit, Data, End, Envelope, Failure, Open, Post, Taken
from srengine.metrics import Metrics
from srengine.transport.connection import Connection, Wire, encode_message, slices
from srengine.transport.failures import INTERNAL, failure_of
from srengine.transport.messages import Hello
from srengine.transport.peers import Buffer, Handler, Identity, Peer, PostHandler, StreamHandler, meet
from srengine.transport.transfers import Assembly, Budget, Outgoing, Reservation, check_sizes, cut, sizes_of

_logger = logging.getLogger(__name__)


class Service(Protocol):
    """What the endpoint knows and a connection asks for."""

    identity: Identity

    def handler(self, port: str, message_type: type[msgspec.Struct]) -> Handler | None:
        """Return who answers such a message at this port."""
        ...

    def stream_handler(self, port: str, message_type: type[msgspec.Struct]) -> StreamHandler | None:
        """Return who serves such a stream at this port."""
        ...

    def post_handler(self, port: str, message_type: type[msgspec.Struct]) -> PostHandler | None:
        """Return who takes such posts at this port."""
        ...

    def welcome(self, peer: Peer) -> None:
        """Look at a peer that has just said hello; raise a typed error to refuse it."""
        ...


class _Window:
    """Which request ids were seen: all up to ``highest - REQUEST_WINDOW``, and the ones remembered above."""

    def __init__(self) -> None:
        self.highest = 0
        self._seen: set[int] = set()

    def is_new(self, number: int) -> bool:
        """Return whether ``number`` was never seen, and remember it."""
        if number <= self.highest - limits.REQUEST_WINDOW or number in self._seen:
            return False
        self._seen.add(number)
        if number > self.highest:
            self.highest = number
            if len(self._seen) > 2 * limits.REQUEST_WINDOW:
                floor = number - limits.REQUEST_WINDOW
                self._seen = {seen for seen in self._seen if seen > floor}
        return True


class _Serving:
    """One request that is not fully answered."""

    __slots__ = ("assembly", "outgoing", "reservation", "task")

    def __init__(self) -> None:
        self.assembly: Assembly | None = None
        self.reservation: Reservation | None = None
        """Room of the question's attachments; held until the handler is done."""
        self.task: asyncio.Task[None] | None = None
        self.outgoing: Outgoing | None = None


class _Feed:
    """One stream that is being sent."""

    __slots__ = ("credit", "proved", "task", "waiter")

    def __init__(self, credit: int, *, proved: bool) -> None:
        self.credit = credit
        self.proved = proved
        """The reader proves the items: no checksum of a frame covers a piece that travels alone."""
        self.task: asyncio.Task[None] | None = None
        self.waiter: asyncio.Future[None] | None = None


class Callee(Connection):
    """Answer over one connection."""

    def __init__(
        self,
        wire: Wire,
        metrics: Metrics,
        budget: Budget,
        port: str,
        service: Service,
        address: str,
        public_key: bytes | None,
        forget: Callable[[Callee], None],
    ) -> None:
        super().__init__(wire, metrics, budget, port)
        self._service = service
        self._address = address
        self._public_key = public_key
        self._forget = forget
        self._window = _Window()
        self._serving: dict[int, _Serving] = {}
        self._feeds: dict[int, _Feed] = {}
        self._confirmed_bytes = 0
        """Up to where the caller knows that its posts were taken in."""

    def handle(self, envelope: Envelope, data: memoryview) -> None:
        """Act on one envelope of the caller."""
        if self.peer is None:
            self._greet(envelope)
            return
        match envelope:
            case Post():  # first, because there is most of it; then questions
                self._posted(self.peer, envelope, data)
            case Ask():
                self._asked(self.peer, envelope, data)
            case Open():
                self._opened(self.peer, envelope)
            case Data(request=number, proved=proved):
                if proved:
                    raise errors.FrameError("a piece without a checksum that nobody promised to prove")
                self.progress_at = self.loop.time()
                serving = self._serving.get(number)
                if serving is not None and serving.assembly is not None:
                    credit = serving.assembly.add(envelope, data)
                    if credit:
                        self.post(Credit(number, credit))
            case Credit(request=number, pieces=pieces):
                self._credited(number, pieces)
            case Cancel(request=number):
                self._cancelled(number)
            case Answer() | Failure() | End() | Taken():
                raise errors.FrameError("an answer where only questions are expected")

    # --- hello -------------------------------------------------------------------------------------------------------

    def _greet(self, envelope: Envelope) -> None:
        if not isinstance(envelope, Ask) or envelope.sizes or envelope.kind != registry.kind_of(Hello):
            raise errors.FrameError("a connection that does not begin with hello")
        self._window.is_new(envelope.request)
        hello = registry.decode_scanned(envelope.kind, envelope.body)
        identity = self._service.identity
        try:
            peer = meet(identity, hello, self._address, self.port, self._public_key)
            self._service.welcome(peer)
        except errors.Error as error:
            # The wire stays until the peer has read why; it ends the connection, or the hello deadline does.
            self.post(failure_of(envelope.request, error))
            return
        self.peer = peer
        kind, body = encode_message(identity.hello())
        self.post(Answer(envelope.request, kind, body))

    # --- requests ----------------------------------------------------------------------------------------------------

    def _asked(self, peer: Peer, ask: Ask, data: memoryview) -> None:
        if not self._admit(ask.request):
            return
        message = registry.decode_scanned(ask.kind, ask.body)
        handler = self._service.handler(self.port, type(message))
        try:
            total = check_sizes(ask.sizes) if ask.sizes else 0
            if handler is None:
                raise errors.UnsupportedFeature(f"{ask.kind} is not served at the {self.port} port", kind=ask.kind)
        except errors.InvalidValue as error:
            self.post(failure_of(ask.request, error))
            return
        serving = self._serving[ask.request] = _Serving()
        if total <= limits.PART_BYTES_MAX:
            self._run(ask.request, handler, peer, message, slices(ask.sizes, data))
            return
        number = ask.request

        def arrived(parts: list[memoryview]) -> None:
            serving.assembly = None
            self._run(number, handler, peer, message, parts)

        serving.assembly = Assembly(ask.sizes, arrived)
        serving.reservation = serving.assembly.reservation = Reservation(
            total, self.budgets, lambda: self.post(Credit(number, limits.CREDIT_FRAMES))
        )

    def _admit(self, number: int) -> bool:
        if not self._window.is_new(number):
            self.metrics.add("srengine_transport_duplicates_total", port=self.port)
            return False
        if len(self._serving) + len(self._feeds) >= limits.REQUESTS_IN_FLIGHT_MAX:
            raise errors.FrameError(f"more than {limits.REQUESTS_IN_FLIGHT_MAX} unanswered requests")
        return True

    def _run(
        self, number: int, handler: Handler, peer: Peer, message: msgspec.Struct, attachments: Sequence[memoryview]
    ) -> None:
        async def call() -> None:
            # It answers itself: a callback would come a turn of the loop later.
            try:
                reply = await handler(peer, message, attachments)
                kind, body = encode_message(reply.message)
                sizes, total = sizes_of(reply.attachments)
            except asyncio.CancelledError:
                self._fail_request(number, errors.Closed("the node stops"))
                raise
            except Exception as error:  # noqa: BLE001  (the caller is told)
                self._fail_request(number, error)
            else:
                self._answer(Answer(number, kind, body, sizes), total, reply.attachments)

        self._serving[number].task = self.loop.create_task(call())

    def _answer(self, answer: Answer, total: int, attachments: Sequence[Buffer]) -> None:
        number = answer.request
        serving = self._serving.get(number)
        if serving is None:  # the connection has ended meanwhile: nobody waits for the answer
            return
        if serving.reservation is not None:
            serving.reservation.release()
        inline = total <= limits.PART_BYTES_MAX
        self.post(answer, attachments if inline else (), alone=len(self._serving) == 1)
        if inline or self.closed is not None:
            del self._serving[number]
        else:
            serving.outgoing = Outgoing(number, attachments)

    def _fail_request(self, number: int, error: BaseException) -> None:
        serving = self._serving.pop(number, None)
        if serving is not None and serving.reservation is not None:
            serving.reservation.release()
        self.post(failure_of(number, _typed(error)))

    def _credited(self, number: int, pieces: int) -> None:
        self.progress_at = self.loop.time()
        serving = self._serving.get(number)
        if serving is not None and serving.outgoing is not None:
            for step, piece in serving.outgoing.grant(pieces):
                self.post(step, (piece,))
            if serving.outgoing.finished:
                del self._serving[number]
            return
        feed = self._feeds.get(number)
        if feed is not None:
            feed.credit = min(feed.credit + pieces, limits.CREDIT_FRAMES)
            if feed.waiter is not None and not feed.waiter.done():
                feed.waiter.set_result(None)

    def _cancelled(self, number: int) -> None:
        serving = self._serving.get(number)
        if serving is not None and serving.outgoing is not None:
            del self._serving[number]
        elif serving is not None and serving.assembly is not None:
            self._fail_request(number, errors.TimedOut("the caller gave up before its attachments had arrived"))
        # A handler that runs goes on: its effects may be under way.
        feed = self._feeds.get(number)
        if feed is not None and feed.task is not None:
            feed.task.cancel()

    # --- posts -------------------------------------------------------------------------------------------------------

    def _posted(self, peer: Peer, post: Post, data: memoryview) -> None:
        if post.size:
            message = registry.decode(post.kind, data)
        else:
            message = registry.decode_scanned(post.kind, post.body)
        if post.total - self._confirmed_bytes >= limits.POSTS_BYTES_MAX // 4:
            self._confirmed_bytes = post.total
            self.post(Taken(post.total))
        handler = self._service.post_handler(self.port, type(message))
        if handler is None:
            self.metrics.add("srengine_transport_posts_refused_total", port=self.port)
            return
        try:
            handler(peer, message)
        except Exception as error:  # noqa: BLE001  (its mistakes are not the connection's)
            self.loop.call_exception_handler({"message": f"the handler of {post.kind} failed", "exception": error})

    # --- streams -----------------------------------------------------------------------------------------------------

    def _opened(self, peer: Peer, opening: Open) -> None:
        if not self._admit(opening.request):
            return
        message = registry.decode_scanned(opening.kind, opening.body)
        handler = self._service.stream_handler(self.port, type(message))
        number = opening.request
        if handler is None:
            error = errors.UnsupportedFeature(f"{opening.kind} is no stream of the {self.port} port", kind=opening.kind)
            self.post(failure_of(number, error))
            return
        feed = self._feeds[number] = _Feed(min(opening.credit, limits.CREDIT_FRAMES), proved=opening.proved)
        feed.task = self.loop.create_task(self._send_items(number, feed, handler(peer, message)))
        feed.task.add_done_callback(lambda done: self._stream_ended(number, done))

    async def _send_items(self, number: int, feed: _Feed, items: AsyncIterator[Buffer]) -> None:
        sent = 0
        piece_bytes_max = self.wire.part_bytes_max
        try:
            async for item in items:
                whole = memoryview(item).cast("B")
                pieces = ((whole, True),) if whole.nbytes <= piece_bytes_max else cut(whole, piece_bytes_max)
                for piece, last in pieces:
                    while feed.credit == 0:
                        feed.waiter = self.loop.create_future()
                        await feed.waiter
                    feed.credit -= 1
                    size = piece.nbytes
                    if size > limits.PART_BYTES_MAX:
                        # Nothing can join it: the wire works while the next piece is made.
                        self.send_now(Data(number, sent, size, last, feed.proved), piece)
                    else:
                        self.post(Data(number, sent, size, last), (piece,))
                    sent += 1
        finally:
            # An async generator is closed here and now, not when somebody collects it: it may hold a view.
            close = getattr(items, "aclose", None)
            if close is not None:
                await close()

    def _stream_ended(self, number: int, task: asyncio.Task[None]) -> None:
        self._feeds.pop(number, None)
        if task.cancelled():
            self.post(failure_of(number, errors.Closed("the stream was cancelled")))
            return
        error = task.exception()
        self.post(End(number) if error is None else failure_of(number, _typed(error)))

    # --- the end -----------------------------------------------------------------------------------------------------

    def ended(self, _error: errors.Error) -> None:
        """Stop streams; handlers finish what they began."""
        for number, serving in list(self._serving.items()):
            # Handlers go on (a write that was begun ends), only their answers are dropped; what they hold is given back
            # when they are done.
            if serving.task is None or serving.task.done():
                del self._serving[number]
                if serving.reservation is not None:
                    serving.reservation.release()
        for feed in list(self._feeds.values()):
            if feed.task is not None:
                feed.task.cancel()
        self._forget(self)

    def tasks(self) -> list[asyncio.Task[Any]]:
        """Return what is still running for this connection."""
        running: list[asyncio.Task[Any]] = []
        running.extend(serving.task for serving in self._serving.values() if serving.task is not None)
        running.extend(feed.task for feed in self._feeds.values() if feed.task is not None)
        return running

    def transfers_pending(self) -> bool:
        """Return whether the caller owes bytes or credit."""
        return any(
            serving.outgoing is not None
            or (
                serving.assembly is not None and serving.reservation is not None and serving.reservation.state == "held"
            )
            for serving in self._serving.values()
        ) or any(feed.waiter is not None and not feed.waiter.done() for feed in self._feeds.values())


def _typed(error: BaseException) -> errors.Error:
    """Return what the caller is told about a handler's exception."""
    if isinstance(error, errors.Error):
        return error
    _logger.error("a handler failed", exc_info=error)
    return errors.Error("the peer failed inside; its log has the reason", remote_code=INTERNAL)
