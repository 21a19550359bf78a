"""The parts of the backend, put together by hand for one test."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from srengine.clock import SystemClock
from srengine.ha.backends import etcd_client as ec
from srengine.ha.backends.etcd_client import EtcdClient, EtcdOptions
from srengine.ha.backends.etcd_journal import EtcdEntry, EtcdJournal, EtcdPlace
from srengine.ha.backends.etcd_keys import Candidacy, Keys, encode
from srengine.ha.backends.etcd_mirror import EtcdMirror
from srengine.ha.backends.etcd_session import EtcdSession


class FakeClock(SystemClock):
    """The machine's clock, moved on by hand."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def boottime_s(self) -> float:
        return super().boottime_s() + self.ahead_s


class Cluster:
    """One founded cluster in etcd, and clients of it."""

    def __init__(self, options: EtcdOptions) -> None:
        self.options = options
        self.keys = Keys(secrets.token_hex(16))
        self.client = EtcdClient(options)
        self.journal = EtcdJournal(self.place())

    def place(
        self, client: EtcdClient | None = None, *, name: str = "n", clock: SystemClock | None = None
    ) -> EtcdPlace:
        return EtcdPlace(client or self.client, self.keys, name, name, clock or SystemClock())

    async def elect(self, name: str = "n", lease: int = 0) -> int:
        """Make somebody leader by force; return the term."""
        value = encode(Candidacy(secrets.token_hex(16), name))
        return (await self.client.txn([], [ec.put(self.keys.election, value, lease=lease)])).header.revision

    async def append(self, before: int, term: int, *commands: bytes, within_s: float = 10.0, **more: Any) -> None:
        deadline = time.monotonic() + within_s
        await self.journal.append(before, term, commands, deadline=lambda: deadline, **more)

    async def read(self, first: int = 1) -> list[EtcdEntry]:
        return [entry async for page in self.journal.entries(first) for entry in page]

    def session(self, name: str, *, lease_s: int = 2, clock: SystemClock | None = None) -> EtcdSession:
        return EtcdSession(
            self.place(name=name, clock=clock),
            lease_s=lease_s,
            applied=lambda: 0,
            changed=lambda: None,
        )


@contextlib.asynccontextmanager
async def founded(options: EtcdOptions) -> AsyncIterator[Cluster]:
    cluster = Cluster(options)
    try:
        name = f"c{cluster.keys.cluster_id[:8]}"
        assert await cluster.journal.bootstrap(name, b"first") == cluster.keys.cluster_id
        yield cluster
    finally:
        cluster.client.close()


@contextlib.asynccontextmanager
async def running(*work: Any) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """Run coroutines beside the test."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Callable[[], Any], what: str, timeout_s: float = 20.0) -> Any:
    """Return the first true value of ``condition()``."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.01)
    return value


class Follower:
    """A mirror and what it delivered."""

    def __init__(self, cluster: Cluster, client: EtcdClient | None = None, *, clock: SystemClock | None = None) -> None:
        self.entries: list[EtcdEntry] = []
        self.client = client or cluster.client
        self.fetched = 0
        place = cluster.place(self.client, clock=clock)
        self.mirror = EtcdMirror(
            place,
            EtcdJournal(place),
            delivered=0,
            deliver=self.deliver,
            fetch=self.fetch,
            changed=lambda: None,
        )

    async def deliver(self, entries: Sequence[EtcdEntry]) -> None:
        self.entries += entries

    async def fetch(self) -> int:
        assert self.mirror.floor is not None
        self.fetched += 1
        return self.mirror.floor.index
