"""Who leads, as etcd says, and this node's part in it: a campaign when nobody does.

The election is one key, bound to the lease of whoever holds it; the revision of its last change is the *term*. It is
taken by a transaction that requires that nobody holds it and that the journal ends where this node has applied it, so
a leader begins with everything. It ends with the lease, by resignation (deleted) or by handing over: changed in one
transaction to another node's name and lease, so that there is no moment without a leader, and nothing changes if it
cannot be done.

Observed are:

==========  =====================================================================================================
LEADER      the key is bound to the lease that this node believes in (`EtcdSession.lease`)
FOLLOWER    another node holds the key, and etcd has answered lately
OBSERVER    the same, on a member that is an observer
UNKNOWN     nobody holds it, or this node's own former lease does, or etcd has not answered for `CONTACT_S`; or a node
            does that is no member as far as this node has applied
INIT        etcd has not answered yet, or nothing is applied yet
==========  =====================================================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final

from srengine import errors
from srengine.ha.backends import etcd_client as ec
from srengine.ha.backends.etcd_journal import EtcdPlace
from srengine.ha.backends.etcd_keys import Candidacy, encode, number
from srengine.ha.backends.etcd_mirror import EtcdMirror
from srengine.ha.backends.etcd_session import TRANSIENT, EtcdSession
from srengine.ha.members import Member
from srengine.ha.protocol import Observed, Role

_logger = logging.getLogger(__name__)

WAITING_MAX: Final = 10_000
"""Changes that one who observes may leave unread; elections take seconds."""
RETRY_S: Final = 0.2
IDLE_S: Final = 1.0
"""How long nothing is looked at when nothing is heard; what is heard is looked at, at once."""


class EtcdElection:
    """`look_out` and `stand` in tasks; call `changed` whenever something may have changed.

    ``member``: this node as the agreed state has it, None when it is none (yet); ``removed``: it was one.
    ``knows``: whether a node id is a member's.
    """

    def __init__(
        self,
        place: EtcdPlace,
        mirror: EtcdMirror,
        session: EtcdSession,
        *,
        applied: Callable[[], int],
        member: Callable[[], Member | None],
        removed: Callable[[], bool],
        knows: Callable[[str], bool],
        moved: Callable[[Observed], None],
    ) -> None:
        self._client = place.client
        self._keys = place.keys
        self._mirror = mirror
        self._session = session
        self._node_id = place.node_id
        self._name = place.name
        self._clock = place.clock
        self._applied = applied
        self._member = member
        self._removed = removed
        self._knows = knows
        self._moved = moved
        self._observed = Observed(Role.INIT, None, 0, "etcd was not heard yet")
        self._listeners: list[_Listener] = []
        self._look_again = asyncio.Event()
        self._stand_again = asyncio.Event()
        self._held_back_until = 0.0
        """Moment up to which this node does not campaign: it has resigned."""
        self._ended = False

    @property
    def observed(self) -> Observed:
        """What is known now: looked at anew, because a lease may have ended since."""
        self._look()
        return self._observed

    @property
    def term(self) -> int:
        """The term for which this node leads; 0 when it does not."""
        observed = self.observed
        return observed.term if observed.role is Role.LEADER else 0

    async def observe(self) -> AsyncIterator[Observed]:
        """See `protocol.HAProtocol.observe`."""
        listener = _Listener(self.observed)
        self._listeners.append(listener)
        try:
            while True:
                listener.news.clear()
                while listener.waiting:
                    yield listener.waiting.popleft()
                if self._ended:
                    raise errors.Closed("this node takes no part any more")
                await listener.news.wait()
        finally:
            self._listeners.remove(listener)

    def changed(self) -> None:
        """Something may have changed."""
        self._look()
        self._look_again.set()
        self._stand_again.set()

    # --- what is observed --------------------------------------------------------------------------------------------

    def _look(self) -> None:
        if self._ended:
            return
        seen = self._seen()
        before = self._observed
        if (seen.role, seen.leader, seen.term) == (before.role, before.leader, before.term):
            return
        roles = {seen.role, before.role}
        if Role.OBSERVER in roles and not roles & {Role.INIT, Role.UNKNOWN}:
            self._tell(Observed(Role.UNKNOWN, None, seen.term, f"from {before.role.value} to {seen.role.value}"))
        self._tell(seen)

    def _seen(self) -> Observed:
        now = self._clock.boottime_s()
        mirror, term = self._mirror, self._mirror.term
        if not mirror.contact_until:
            return Observed(Role.INIT, None, 0, "etcd was not heard yet")
        if now >= mirror.contact_until:
            return Observed(Role.UNKNOWN, None, self._observed.term, "etcd does not answer")
        candidacy, election = mirror.candidacy, mirror.election
        if self._removed():
            return Observed(Role.UNKNOWN, None, self._observed.term, "this node was removed")
        if candidacy is None or election is None:
            return Observed(Role.UNKNOWN, None, self._observed.term, "nobody holds the election")
        if candidacy.node_id == self._node_id:
            lease = self._session.lease
            if lease and election.lease == lease:
                return Observed(Role.LEADER, self._name, term, "this node holds the election")
            return Observed(Role.UNKNOWN, None, term, "this node's former lease holds the election")
        if not self._knows(candidacy.node_id):
            # This node has applied too little to say where the leader is.
            role = Role.INIT if self._observed.role is Role.INIT else Role.UNKNOWN
            return Observed(role, None, term, f"{candidacy.name} holds the election and is not known here yet")
        member = self._member()
        role = Role.OBSERVER if member is not None and member.role == "observer" else Role.FOLLOWER
        return Observed(role, candidacy.name, term, f"{candidacy.name} holds the election")

    def _tell(self, observed: Observed) -> None:
        before, self._observed = self._observed, observed
        _logger.info(
            "%s -> %s: %s",
            before.role.value,
            observed.role.value,
            observed.reason,
            extra={
                "event": "observed",
                "from": before.role.value,
                "to": observed.role.value,
                "leader": observed.leader,
                "term": observed.term,
                "reason": observed.reason,
            },
        )
        for listener in self._listeners:
            assert len(listener.waiting) < WAITING_MAX, len(listener.waiting)
            listener.waiting.append(observed)
            listener.news.set()
        self._moved(observed)

    async def look_out(self) -> None:
        """Notice what changes because time passes, until cancelled."""
        while True:
            self._look_again.clear()
            self._look()
            await _wait(self._look_again, self._pause(self._mirror.contact_until, self._session.until))

    def _pause(self, *moments: float) -> float:
        """Return how long nothing can change unless something is heard."""
        now = self._clock.boottime_s()
        return min([IDLE_S, *(moment - now for moment in moments if moment > now)])

    @contextlib.asynccontextmanager
    async def within(self, timeout_s: float, what: str) -> AsyncIterator[None]:
        """Turn the end of the time into what `too_late` says."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise self.too_late(what, timeout_s, None) from None

    def too_late(self, what: str, timeout_s: float, last: errors.Error | None) -> errors.Error:
        """Return what the end of the time means: nobody leads, or it took too long (then it may have happened)."""
        observed = self.observed
        known = last is None or not isinstance(last, errors.TimedOut | errors.Unreachable)
        if observed.role in {Role.UNKNOWN, Role.INIT} and known:
            return errors.UnknownMaster(f"not within {timeout_s:.1f} s: {what}; {observed.reason}")
        reason = "" if last is None else f"; last: {last.message}"
        return errors.TimedOut(f"not within {timeout_s:.1f} s: {what}{reason}")

    # --- the campaign ------------------------------------------------------------------------------------------------

    async def stand(self) -> None:
        """Take the election when nobody has it and this node may, until cancelled."""
        while True:
            self._stand_again.clear()
            pause = self._pause(self._held_back_until)
            if self._may_campaign():
                try:
                    await self._campaign()
                except TRANSIENT as error:
                    _logger.info("the campaign failed: %s", error)
                    pause = RETRY_S
            await _wait(self._stand_again, pause)

    def _may_campaign(self) -> bool:
        now = self._clock.boottime_s()
        member = self._member()
        return (
            not self._ended
            and now < self._mirror.contact_until
            and self._mirror.election is None
            and self._session.lease != 0
            and member is not None
            and member.votes
            and now >= self._held_back_until
            and self._applied() == self._mirror.head > 0
        )

    async def _campaign(self) -> None:
        keys, lease = self._keys, self._session.lease
        applied = self._applied()
        value = encode(Candidacy(self._node_id, self._name))
        try:
            reply = await self._client.txn(
                [ec.absent(keys.election), ec.holds(keys.head, number(applied))],
                [ec.put(keys.election, value, lease=lease), ec.get(keys.election)],
                [ec.get(keys.election)],
            )
        except errors.NotFound:
            return  # the lease is over; the session will say so
        except errors.TimedOut:
            await self._mirror.ask()  # it may have been done
            return
        self._mirror.see_election(reply.header.revision, reply.responses[-1].range.first)
        if not reply.succeeded:
            await self._mirror.ask()  # somebody else was faster, or the journal is longer than was known

    # --- the end of a leadership -------------------------------------------------------------------------------------

    async def resign(self, *, held_back_s: float, timeout_s: float = 2.0) -> bool:
        """Give the election up if this node holds it; not a candidate again for ``held_back_s``, so that others are."""
        term = self.term
        if not term:
            return False
        self._held_back_until = self._clock.boottime_s() + held_back_s
        try:
            reply = await self._client.txn(
                [ec.unchanged(self._keys.election, term)], [ec.delete(self._keys.election)], timeout_s=timeout_s
            )
        except TRANSIENT as error:
            _logger.warning("the election could not be given up, it ends with the lease: %s", error)
            return False
        self._mirror.see_election(reply.header.revision, None)
        return reply.succeeded

    async def hand_over(self, target: Member, *, timeout_s: float) -> bool:
        """Make ``target`` hold the election in this node's place; False when it is not alive, or this node lost it."""
        term = self.term
        session = self._mirror.sessions.get(target.node_id)
        if not term or session is None or not session.lease:
            return False
        value = encode(Candidacy(target.node_id, target.name))
        try:
            reply = await self._client.txn(
                [ec.unchanged(self._keys.election, term), ec.present(session.key)],
                [ec.put(self._keys.election, value, lease=session.lease), ec.get(self._keys.election)],
                timeout_s=timeout_s,
            )
        except errors.NotFound:
            return False  # its lease has just ended
        if reply.succeeded:
            self._mirror.see_election(reply.header.revision, reply.responses[-1].range.first)
        return reply.succeeded

    def end(self) -> None:
        """Nothing is observed any more; who observes gets `Closed`."""
        self._look()
        self._ended = True
        for listener in self._listeners:
            listener.news.set()


class _Listener:
    """One who observes."""

    def __init__(self, first: Observed) -> None:
        self.waiting: deque[Observed] = deque([first])
        self.news = asyncio.Event()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
