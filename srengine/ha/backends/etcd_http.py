"""A small HTTP/1.1 client for etcd's JSON gateway: POST a document, get one back, or a stream of lines.

h11 does the protocol (it reads nothing that is larger than it was told), asyncio the sockets, ssl the encryption. What
is kept here is what a caller that must not do things twice needs to know: *was anything sent?* `errors.Unreachable`
with ``sent`` False says that nothing was, so the next server may be asked. With ``sent`` True, and with
`errors.TimedOut`, whether the server acted is unknown.

No redirects, no proxies, no cookies, no compression: etcd has none of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from srengine import errors

try:
    import h11
except ImportError as error:
    raise errors.UnsupportedFeature(
        "the backend etcd needs the package h11: pip install 'srengine[etcd]'", package="h11"
    ) from error

HEAD_BYTES_MAX: Final = 64 * 1024
"""Status line and headers of an answer."""
READ_BYTES: Final = 256 * 1024
CONNECTIONS_KEPT_MAX: Final = 8
"""Idle connections of one server; more are closed when their answer is there."""
CONNECT_S_MAX: Final = 2.0

_FAILURES = (OSError, EOFError, h11.ProtocolError, ssl.SSLError)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    body: bytes


class _Connection:
    """One socket; one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._protocol = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES_MAX)

    async def send(self, target: str, headers: list[tuple[str, str]], body: bytes) -> None:
        heads = [*headers, ("Content-Length", str(len(body)))]
        request = h11.Request(method="POST", target=target, headers=heads)
        self._writer.write(
            (self._protocol.send(request) or b"")
            + (self._protocol.send(h11.Data(data=body)) or b"")
            + (self._protocol.send(h11.EndOfMessage()) or b"")
        )
        await self._writer.drain()

    async def status(self) -> int:
        """Return the status of the answer."""
        while True:
            match await self._event():
                case h11.Response(status_code=status):
                    return int(status)
                case h11.InformationalResponse():
                    continue
                case other:
                    raise EOFError(f"{type(other).__name__} in place of an answer")

    async def parts(self) -> AsyncIterator[bytes]:
        """Yield what comes of the body."""
        while True:
            match await self._event():
                case h11.Data(data=data):
                    yield bytes(data)
                case h11.EndOfMessage():
                    return
                case other:
                    raise EOFError(f"{type(other).__name__} in place of a body")

    async def whole(self, bytes_max: int) -> bytes:
        """Return the body; `errors.FrameError` once it is larger than ``bytes_max``."""
        read = bytearray()
        async for part in self.parts():
            read += part
            if len(read) > bytes_max:
                raise errors.FrameError(f"an answer of more than {bytes_max} bytes", bytes=len(read))
        return bytes(read)

    async def _event(self) -> h11.Event | type[h11.PAUSED]:
        while True:
            event = self._protocol.next_event()
            if event is not h11.NEED_DATA:
                assert not isinstance(event, type) or event is h11.PAUSED, event
                return event
            # NB: empty at the end of the stream; h11 then says whether that was allowed here.
            self._protocol.receive_data(await self._reader.read(READ_BYTES))

    def renew(self) -> bool:
        """Make ready for the next request; False when the server wants to close."""
        if self._protocol.our_state is not h11.DONE or self._protocol.their_state is not h11.DONE:
            return False
        self._protocol.start_next_cycle()
        return not self._reader.at_eof()

    @property
    def alive(self) -> bool:
        return not self._reader.at_eof() and not self._writer.is_closing()

    def close(self) -> None:
        """Close at once: nothing that we still have to say matters."""
        self._writer.transport.abort()


class Server:
    """One address, ``http://host:port`` or ``https://host:port``, with its idle connections."""

    def __init__(self, address: str, context: ssl.SSLContext | None = None) -> None:
        parsed = parse_address(address)
        self.address = address
        self._host, self._port = parsed
        self._context = context
        self._idle: list[_Connection] = []
        self._headers = [("Host", f"{self._host}:{self._port}"), ("Content-Type", "application/json")]

    async def post(
        self, target: str, body: bytes, *, headers: list[tuple[str, str]], bytes_max: int, timeout_s: float
    ) -> Answer:
        """Return the answer, at most ``bytes_max`` of it: a larger one is `errors.FrameError` (and was executed)."""
        connection: _Connection | None = None
        sent = False
        try:
            async with asyncio.timeout(timeout_s):
                connection = self._kept() or await self._connect(timeout_s)
                sent = True
                await connection.send(target, [*self._headers, *headers], body)
                status = await connection.status()
                whole = await connection.whole(bytes_max)
        except TimeoutError:
            self._drop(connection)
            if not sent:
                raise errors.Unreachable(f"{self.address}: no connection in {timeout_s:.1f} s", sent=False) from None
            raise errors.TimedOut(f"{self.address} did not answer in {timeout_s:.1f} s", sent=True) from None
        except _FAILURES as error:
            self._drop(connection)
            raise errors.Unreachable(f"{self.address}: {_reason(error)}", sent=sent) from error
        except BaseException:
            self._drop(connection)
            raise
        if connection.renew() and len(self._idle) < CONNECTIONS_KEPT_MAX:
            self._idle.append(connection)
        else:
            connection.close()
        return Answer(status, whole)

    async def lines(
        self, target: str, body: bytes, *, headers: list[tuple[str, str]], bytes_max: int, timeout_s: float
    ) -> AsyncIterator[bytes]:
        """Yield each line of an answer that does not end; ``timeout_s`` is for its first byte.

        Raises `errors.Unreachable` when the stream breaks or ends, `errors.FrameError` for a line over ``bytes_max``.
        """
        connection: _Connection | None = None
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    connection = await self._connect(timeout_s)
                    await connection.send(target, [*self._headers, *headers], body)
                    await connection.status()
            except TimeoutError:
                raise errors.TimedOut(f"{self.address} did not answer in {timeout_s:.1f} s") from None
            pending = bytearray()
            async for part in connection.parts():
                searched = len(pending)
                pending += part
                while (end := pending.find(b"\n", searched)) >= 0:
                    line = bytes(pending[:end])
                    del pending[: end + 1]
                    searched = 0
                    yield line
                if len(pending) > bytes_max:
                    raise errors.FrameError(f"{self.address} sent a line of more than {bytes_max} bytes")
            if pending:
                yield bytes(pending)
            raise errors.Unreachable(f"{self.address} ended the stream")
        except _FAILURES as error:
            raise errors.Unreachable(f"{self.address}: {_reason(error)}") from error
        finally:
            self._drop(connection)

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().close()

    def _kept(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.alive:
                return connection
            connection.close()
        return None

    async def _connect(self, timeout_s: float) -> _Connection:
        try:
            async with asyncio.timeout(min(timeout_s, CONNECT_S_MAX)):
                reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._context)
        except TimeoutError:
            raise OSError("no connection in time") from None
        raw = writer.get_extra_info("socket")
        if raw is not None:
            with contextlib.suppress(OSError):
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return _Connection(reader, writer)

    @staticmethod
    def _drop(connection: _Connection | None) -> None:
        if connection is not None:
            connection.close()


def parse_address(address: str) -> tuple[str, int]:
    """Return host and port of an etcd address; `errors.InvalidValue`.

    >>> parse_address("http://127.0.0.1:2379")
    ('127.0.0.1', 2379)
    """
    parsed = urlsplit(address)
    try:
        port = parsed.port
    except ValueError:
        port = None
    plain = parsed.path in {"", "/"} and not parsed.query and not parsed.fragment and parsed.username is None
    if parsed.scheme not in {"http", "https"} or not parsed.hostname or port is None or not plain:
        raise errors.InvalidValue(f"{address!r} is no address of an etcd: http://host:port or https://host:port")
    return parsed.hostname, port


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
