"""This node's lease in etcd: the key that says that it is alive, and the time for which it may act as leader.

A lease is granted by etcd and renewed by this node. Etcd ends it ``TTL`` after the last renewal that it has seen and
removes the keys bound to it, the election among them. This node counts from *before* it sent the renewal and a little
less, so its own belief ends first, whatever the network or a sleep did in between:

::

    here     sent ........ answered                    believed until sent + TTL - 1 %
    etcd             renewed                                          ends at renewed + TTL

Once the own count is over the lease is given up for good, though etcd may still have it: the next one is a new lease,
which holds nothing. Time is `Clock.boottime_s`, which goes on while the machine sleeps.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from srengine import errors
from srengine.ha.backends import etcd_client as ec
from srengine.ha.backends.etcd_journal import EtcdPlace
from srengine.ha.backends.etcd_keys import SessionRecord, encode

_logger = logging.getLogger(__name__)

DRIFT: Final = 0.01
"""What two clocks may differ by over one lease, as a fraction."""
RENEWALS: Final = 6
"""Renewals in the time of one lease: several may fail."""
RETRY_S: Final = 0.2
ABANDONED_MAX: Final = 8
TRANSIENT: Final = (errors.Unreachable, errors.NoQuorum, errors.TimedOut, errors.QuotaExceeded)
"""What etcd may say at any moment and not the next."""


class EtcdSession:
    """One lease after the other. `run` in a task; ``changed`` is called when the lease begins or ends."""

    def __init__(
        self,
        place: EtcdPlace,
        *,
        lease_s: int,
        applied: Callable[[], int],
        changed: Callable[[], None],
    ) -> None:
        self._client = place.client
        self._keys = place.keys
        self._node_id = place.node_id
        self._name = place.name
        self._lease_s = lease_s
        self._clock = place.clock
        self._applied = applied
        self._changed = changed
        self._lease = 0
        self._until = 0.0
        self._said = -1
        """Applied index that the session key shows."""
        self._abandoned: list[int] = []
        """Leases that ended here and perhaps not in etcd."""

    @property
    def lease(self) -> int:
        """Id of the lease, while it is believed in; 0 otherwise."""
        return self._lease if self._clock.boottime_s() < self._until else 0

    @property
    def until(self) -> float:
        """Moment (boottime) at which the belief ends, unless renewed."""
        return self._until

    async def run(self) -> None:
        """Hold a lease until cancelled."""
        while True:
            try:
                await self._turn()
                pause = self._lease_s / RENEWALS
            except TRANSIENT as error:
                _logger.info("no lease of etcd: %s", error)
                pause = RETRY_S
            await asyncio.sleep(pause)

    async def _turn(self) -> None:
        if self._lease and not self.lease:
            self._lapse("not renewed in time")
        if self._lease:
            await self._renew()
        else:
            await self._begin()
        if self._lease and self._said != self._applied():
            await self._show()

    async def _begin(self) -> None:
        while self._abandoned:
            await self._client.revoke(self._abandoned[-1], timeout_s=self._lease_s)
            self._abandoned.pop()
        sent = self._clock.boottime_s()
        granted = await self._client.grant(self._lease_s, timeout_s=self._lease_s)
        self._lease, self._until = granted.ID, self._counted(sent, granted.TTL)
        self._said = -1
        await self._show()
        self._changed()

    async def _renew(self) -> None:
        sent = self._clock.boottime_s()
        left = max(0.05, self._until - sent)
        ttl = await self._client.keepalive(self._lease, timeout_s=left)
        if ttl <= 0:
            self._lapse("etcd has ended it")
        elif self.lease:
            self._until = max(self._until, self._counted(sent, ttl))
        else:
            # It was renewed, but the answer came after our own belief had ended: others were told so.
            self._lapse("the answer to its renewal came too late")

    @staticmethod
    def _counted(sent: float, ttl: int) -> float:
        return sent + ttl * (1 - DRIFT)

    async def _show(self) -> None:
        """Write the session key, bound to the lease."""
        applied = self._applied()
        record = SessionRecord(self._node_id, self._name, applied)
        try:
            await self._client.txn(
                [],
                [ec.put(self._keys.session(self._node_id), encode(record), lease=self._lease)],
                timeout_s=self._lease_s,
            )
        except errors.NotFound:
            self._lapse("etcd has ended it")
        else:
            self._said = applied

    def _lapse(self, reason: str) -> None:
        _logger.warning("the lease of etcd is over: %s", reason)
        self._abandoned = [*self._abandoned[-ABANDONED_MAX:], self._lease]
        self._lease, self._until = 0, 0.0
        self._changed()

    async def end(self, *, timeout_s: float = 2.0) -> None:
        """Give the lease back: others need not wait for its end. Call it after `run` was cancelled."""
        lease, self._lease, self._until = self._lease, 0, 0.0
        self._changed()
        for ended in [*self._abandoned, *([lease] if lease else [])]:
            try:
                await self._client.revoke(ended, timeout_s=timeout_s)
            except (*TRANSIENT, errors.Closed) as error:
                _logger.info("a lease of etcd could not be given back, it will end by itself: %s", error)
                return
