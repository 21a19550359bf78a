"""Request ids: why a write that is sent twice happens once.

Each write carries (session, number). A session is opened once for each table and client, its numbers increase by one
for each write to a tablet, and a tablet keeps the answers of recent numbers: a repeated one gets the kept answer. A
write keeps its number through all retries, and a new write never takes an old number.

A session may be forgotten by the cluster (`RequestExpired`). If no attempt of the write can have been executed, the
write is repeated under a new session; otherwise the error is raised, because only the caller knows whether twice is
harmless.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from srengine import errors
from srengine.client import messages
from srengine.client.calls import expect

if TYPE_CHECKING:
    from srengine.client.asynchronous import AsyncClient

SESSION_BYTES = 16


@dataclass(slots=True)
class Session:
    """One opened session. ``numbers``: tablet index -> the last number used there."""

    id: bytes
    numbers: dict[int, int] = field(default_factory=dict)

    def next_number(self, tablet: int) -> int:
        """Return the next unused number for a tablet, from 1."""
        number = self.numbers.get(tablet, 0) + 1
        self.numbers[tablet] = number
        return number


class Sessions:
    """The sessions of one client, opened when a table is first written to."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._opened: dict[str, asyncio.Future[Session]] = {}

    async def get(self, table: str, deadline: float) -> Session:
        """Return the session for a table; concurrent first writers share one request."""
        waiting = self._opened.get(table)
        if waiting is not None and not (waiting.done() and (waiting.cancelled() or waiting.exception() is not None)):
            return await asyncio.shield(waiting)
        self._opened[table] = waiting = asyncio.ensure_future(self._open(table, deadline))
        return await asyncio.shield(waiting)

    def drop(self, table: str, session: Session) -> None:
        """Forget a session that the cluster does not know any more; another one that replaced it stays."""
        waiting = self._opened.get(table)
        if waiting is None or not waiting.done() or waiting.cancelled() or waiting.exception() is not None:
            return
        if waiting.result() is session:
            del self._opened[table]

    async def _open(self, table: str, deadline: float) -> Session:
        call = self._client._any_call(lambda wait_s: messages.OpenSession(table, wait_s))
        call.deadline = deadline
        opened = expect((await self._client._call(call)).message, messages.SessionOpened)
        if len(opened.session) != SESSION_BYTES:
            raise errors.FrameError(f"a session of {len(opened.session)} bytes where {SESSION_BYTES} belong")
        return Session(opened.session)
