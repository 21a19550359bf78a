"""The lease: believed in for less than etcd keeps it, given up for good once the belief has ended."""

from __future__ import annotations

import asyncio

import pytest

from srengine.ha.backends.etcd_client import EtcdClient, EtcdOptions
from srengine.ha.backends.etcd_keys import SessionRecord, decode
from tests.etcd import Etcd
from tests.ha.etcd.parts import FakeClock, founded, running, until

pytestmark = pytest.mark.requires_tool("etcd")


def test_a_session_is_seen_and_renewed(options: EtcdOptions) -> None:
    """While it runs, the node's key is there and the lease stays the same beyond its time; at the end both are gone."""

    async def run() -> None:
        async with founded(options) as cluster:
            session = cluster.session("n1")
            async with running(session.run()):
                lease = await until(lambda: session.lease, "a lease")
                first = session.until
                await until(lambda: session.until > first + 2.5, "renewals beyond the first time")
                assert session.lease == lease
                found = (await cluster.client.range(cluster.keys.session("n1"))).first
                assert found is not None and found.lease == lease
                assert decode(found.value, SessionRecord).name == "n1"
            await session.end()
            assert session.lease == 0
            assert (await cluster.client.range(cluster.keys.session("n1"))).first is None

    asyncio.run(run())


def test_a_node_that_slept_has_no_lease(options: EtcdOptions) -> None:
    """F21: after a pause longer than the lease the node believes in nothing at once, without asking anybody, and begins
    a new lease; the old one is given back.
    """

    async def run() -> None:
        async with founded(options) as cluster:
            clock = FakeClock()
            session = cluster.session("n1", clock=clock)
            async with running(session.run()):
                old = await until(lambda: session.lease, "a lease")
                clock.ahead_s += 30
                assert session.lease == 0
                new = await until(lambda: session.lease, "a new lease")
                assert new != old
                await until(lambda: not session._abandoned, "the old lease given back")
                assert await cluster.client.keepalive(old) == 0

    asyncio.run(run())


def test_the_belief_ends_before_the_lease(tmp_path) -> None:
    """When etcd is paused, the belief ends within the lease; when it goes on, a new lease begins."""

    async def run(etcd: Etcd) -> None:
        async with founded(EtcdOptions(etcd.urls)) as cluster:
            session = cluster.session("n1")
            clock = session._clock
            async with running(session.run()):
                old = await until(lambda: session.lease, "a lease")
                etcd.servers[0].pause()
                paused = clock.boottime_s()
                await until(lambda: not session.lease, "the end of the belief")
                assert clock.boottime_s() - paused < 2.5
                etcd.servers[0].go_on()
                new = await until(lambda: session.lease, "a new lease")
                assert new != old

    with Etcd(tmp_path) as etcd:
        asyncio.run(run(etcd))


def test_a_revoked_lease_is_noticed(options: EtcdOptions) -> None:
    """When somebody ends the lease in etcd, the next renewal says so and a new one begins."""

    async def run() -> None:
        async with founded(options) as cluster:
            session = cluster.session("n1")
            other = EtcdClient(options)
            async with running(session.run()):
                old = await until(lambda: session.lease, "a lease")
                await other.revoke(old)
                new = await until(lambda: session.lease not in {0, old} and session.lease, "a new lease")
                assert new != old
            other.close()

    asyncio.run(run())
