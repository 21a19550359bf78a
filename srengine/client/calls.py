"""One request, asked until it is answered: redirects, retries, failover, all within one deadline.

    call ──> candidate 1 ── answer ─────────────────────────────────────────────> done
                 │ NotLeader(leader)  ─> ask that one at once (REDIRECTS_MAX times), remember it
                 │ Unreachable, TimedOut ─> next candidate; after a round of them: read the catalog again, pause
                 │ NotReady, NoLeader, NoQuorum ─> the same
                 │ any other error ────────────────────────────────────────────> raised
                 └ deadline ───────> the most telling of the errors seen

Invariants:

* A request takes at most its deadline and one turn of the loop.
* Whatever is repeated is either a read or carries a request id, so repeating never changes what one execution would do.
* When a write is given up after it may have reached a node, the error says ``outcome="unknown"``; otherwise nothing
  was executed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec

from srengine import errors, limits
from srengine.client import messages
from srengine.client.routing import Routes

SERVER_SHARE = 0.8
"""Part of an attempt that the node may spend: it shall say what it waits for before the client stops listening."""
_Kind = TypeVar("_Kind")


class ReplyLike(Protocol):
    """What a channel answers: a message and its attachments."""

    @property
    def message(self) -> Any:
        """The struct."""

    @property
    def attachments(self) -> Sequence[bytes | memoryview]:
        """The raw bytes beside it."""


class Channel(Protocol):
    """The part of ``srengine.transport.Channel`` that a client needs."""

    async def request(
        self, message: msgspec.Struct, attachments: Sequence[bytes | memoryview] = (), *, timeout_s: float
    ) -> ReplyLike:
        """Ask; return the answer, or raise the remote's typed error, `Unreachable` or `TimedOut`."""
        ...

    def wake(self) -> None:
        """End the back-off of a lost connection: somebody wants to know now."""


class ChannelSource(Protocol):
    """The part of ``srengine.transport.Endpoint`` that a client needs."""

    def channel(self, address: str, *, port: Any = "client", server_key: bytes | None = None) -> Any:
        """Return a `Channel` to an address; connects when first asked."""

    async def close(self) -> None:
        """Close all channels."""


@dataclass(slots=True)
class Call:
    """One request on its way."""

    build: Callable[[float], msgspec.Struct]
    """Makes the message for an attempt that may take so many seconds."""
    candidates: Callable[[], list[str]]
    """Addresses to try, the best first; asked again for each round."""
    deadline: float
    """On the clock of the running loop."""
    attachments: Sequence[bytes | memoryview] = ()
    tablet: tuple[str, int] | None = None
    """(table, tablet index) of a request that a leader answers: redirects are remembered for it."""
    is_write: bool = False
    seen: list[errors.Error] = field(default_factory=list)
    """Failures of attempts, in order; at most one of each code is kept."""
    may_have_happened: bool = False
    """An attempt that got no definite answer may have been executed."""

    def note(self, error: errors.Error) -> None:
        """Keep a failure that may pass, and whether the request may have been executed nevertheless."""
        self.seen = [other for other in self.seen if other.code != error.code]
        self.seen.append(error)
        sent = error.details.get("sent", not isinstance(error, (errors.NoLeader, errors.NotReady)))
        if sent:
            self.may_have_happened = True


class Caller:
    """Sends calls over channels; belongs to one loop."""

    def __init__(self, source: ChannelSource, routes: Routes, server_key: bytes | None) -> None:
        self._source = source
        self._routes = routes
        self._server_key = server_key
        self._channels: dict[str, Channel] = {}
        self._woken: dict[str, float] = {}
        """Address -> when its back-off was last ended; on the clock of the loop."""

    async def call(self, call: Call) -> ReplyLike:
        """Return the answer; raise the cluster's typed error, or `Unreachable`, `TimedOut`, `NoQuorum` and below."""
        loop = asyncio.get_running_loop()
        delay_s = limits.RETRY_DELAY_S_MIN
        while True:
            answer = await self._round(call)
            if answer is not None:
                return answer
            remaining_s = call.deadline - loop.time()
            if remaining_s <= 0:
                raise self._given_up(call)
            await asyncio.sleep(min(delay_s * random.uniform(0.5, 1.0), remaining_s))
            delay_s = min(delay_s * 2, limits.RETRY_DELAY_S_MAX)
            if call.tablet is not None:
                self._routes.forget_leader(*call.tablet)
                await self.refresh(call.deadline)

    async def refresh(self, deadline: float) -> bool:
        """Read the catalog from any node; return whether one answered. Errors are left to the call that needs it."""
        loop = asyncio.get_running_loop()
        for address in self._routes.anybody():
            remaining_s = deadline - loop.time()
            if remaining_s <= 0:
                return False
            try:
                reply = await self._ask(address, messages.ClusterInfo(), (), _attempt_s(remaining_s))
            except (errors.Unreachable, errors.TimedOut, errors.NoQuorum):
                continue
            self._routes.learn(expect(reply.message, messages.ClusterInfoReply))
            return True
        return False

    async def _round(self, call: Call) -> ReplyLike | None:
        """Ask each candidate once, following redirects; None when all of them failed in a way that may pass."""
        loop = asyncio.get_running_loop()
        waiting = call.candidates()
        asked: set[str] = set()
        redirects = 0
        while waiting:
            address = waiting.pop(0)
            remaining_s = call.deadline - loop.time()
            if remaining_s <= 0:
                return None
            asked.add(address)
            attempt_s = _attempt_s(remaining_s)
            try:
                message = call.build(attempt_s * SERVER_SHARE)
                reply = await self._ask(address, message, call.attachments, attempt_s)
            except errors.NotLeader as error:
                leader = str(error.details.get("leader") or "")
                call.note(error)
                if leader and leader not in asked and redirects < limits.REDIRECTS_MAX:
                    redirects += 1
                    waiting = [leader, *(other for other in waiting if other != leader)]
                    if call.tablet is not None:
                        self._routes.set_leader(*call.tablet, leader)
            except (errors.Unreachable, errors.TimedOut, errors.NoQuorum) as error:
                call.note(error)
            except errors.Error as error:
                if call.may_have_happened:
                    error.details.setdefault("outcome", "unknown")
                raise
            else:
                self._routes.answered(address)
                return reply
        return None

    async def _ask(
        self, address: str, message: msgspec.Struct, attachments: Sequence[bytes | memoryview], attempt_s: float
    ) -> ReplyLike:
        channel = self._channels.get(address)
        if channel is None:
            key = self._routes.server_keys.get(address)
            server_key = bytes.fromhex(key) if key else self._server_key
            channel = self._channels[address] = self._source.channel(address, port="client", server_key=server_key)
        now = asyncio.get_running_loop().time()
        if now - self._woken.get(address, 0.0) >= limits.RETRY_DELAY_S_MAX:
            # A channel's own back-off is for those who keep a connection; a call has its own, and a deadline.
            self._woken[address] = now
            channel.wake()
        return await channel.request(message, attachments, timeout_s=attempt_s)

    def _given_up(self, call: Call) -> errors.Error:
        """Return the most telling failure.

        What a node said about its quorum comes first, then a silent node, then a redirect (to a node that did not
        answer), then addresses where nobody is.
        """
        addresses = call.candidates()
        found = max(call.seen, key=_telling, default=None)
        if found is None:
            found = errors.TimedOut("the time allowed ran out before anybody was asked")
        if isinstance(found, errors.NotLeader):
            found = errors.NoLeader("no leader answers", asked=addresses)
        if isinstance(found, errors.Unreachable):
            found = errors.Unreachable(f"nobody answers at {', '.join(addresses)}", endpoints=addresses)
        if call.is_write:
            found.details["outcome"] = "unknown" if call.may_have_happened else "not executed"
        return found


def _telling(error: errors.Error) -> int:
    if isinstance(error, errors.NotLeader):
        return 1
    return 3 if isinstance(error, errors.NoQuorum) else 2 if isinstance(error, errors.TimedOut) else 0


def _attempt_s(remaining_s: float) -> float:
    """Return how long one attempt may take: half of what is left, for another's chance, but not below 1 s."""
    return max(remaining_s / 2, min(remaining_s, 1.0))


def expect(message: Any, kind: type[_Kind]) -> _Kind:
    """Return ``message`` if it is of the agreed kind; `FrameError` otherwise."""
    if not isinstance(message, kind):
        raise errors.FrameError(f"answered by {type(message).__name__} where {kind.__name__} belongs")
    return message
