"""The mirror: every entry once and in order, whatever becomes of the watch; who leads, as of the newest news."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from srengine import errors
from srengine.ha.backends import etcd_client as ec
from srengine.ha.backends.etcd_client import EtcdClient, EtcdOptions
from srengine.ha.backends.etcd_keys import FloorRecord
from tests.etcd import Etcd
from tests.ha.etcd.parts import Cluster, Follower, founded, running, until

pytestmark = pytest.mark.requires_tool("etcd")


async def write(cluster: Cluster, term: int, before: int, count: int) -> None:
    for index in range(before, before + count):
        await cluster.append(index, term, b"entry %d" % (index + 1))


def indexes(follower: Follower) -> list[int]:
    return [entry.index for entry in follower.entries]


def test_what_was_before_and_what_comes(options: EtcdOptions) -> None:
    """Entries of the past, then those of now; the election as it changes; sessions as they come and go."""

    async def run() -> None:
        async with founded(options) as cluster:
            term = await cluster.elect("a")
            await write(cluster, term, 1, 3)
            follower = Follower(cluster)
            mirror = follower.mirror
            async with running(mirror.run(), mirror.beat()):
                await until(lambda: len(follower.entries) == 4, "the past")
                await cluster.append(4, term, b"5", b"6")
                await until(lambda: indexes(follower) == [1, 2, 3, 4, 5, 6], "the present")
                assert mirror.candidacy is not None and mirror.candidacy.name == "a"
                assert mirror.term == term
                session = cluster.session("n1")
                async with running(session.run()):
                    await until(lambda: mirror.session("n1"), "a session")
                await session.end()
                await until(lambda: not mirror.session("n1"), "the end of the session")
                other = await cluster.elect("b")
                await until(lambda: mirror.term == other, "the next leader")
                await cluster.client.txn([], [ec.delete(cluster.keys.election)])
                await until(lambda: mirror.candidacy is None, "no leader")

    asyncio.run(run())


def test_old_news_of_the_election_change_nothing(options: EtcdOptions) -> None:
    """What was true at an earlier revision does not replace what is known."""

    async def run() -> None:
        async with founded(options) as cluster:
            mirror = Follower(cluster).mirror
            mirror.see_election(10, None)
            mirror.see_election(9, ec.KeyValue(b"k", b"{}"))
            assert mirror.election is None
            mirror.see_election(11, ec.KeyValue(b"k", b"{}"))
            mirror.see_election(10, None)
            assert mirror.election is not None

    asyncio.run(run())


def test_resume_across_a_compaction(tmp_path: Path) -> None:
    """While the follower is cut off, entries are written and etcd compacts its history: it goes on without a gap."""

    async def run(etcd: Etcd) -> None:
        async with founded(EtcdOptions(etcd.urls)) as cluster:
            term = await cluster.elect()
            follower = Follower(cluster, EtcdClient(EtcdOptions(etcd.urls)))
            async with running(follower.mirror.run(), follower.mirror.beat()):
                await until(lambda: indexes(follower) == [1], "the first entry")
            await write(cluster, term, 1, 5)
            status = await cluster.client.status()
            await cluster.client._ask(
                "/v3/kv/compaction", {"revision": status.header.revision}, ec.TxnReply, timeout_s=5
            )
            async with running(follower.mirror.run(), follower.mirror.beat()):
                await until(lambda: indexes(follower) == [1, 2, 3, 4, 5, 6], "what was missed")
            follower.client.close()

    with Etcd(tmp_path) as etcd:
        asyncio.run(run(etcd))


def test_a_compaction_before_the_watch_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If etcd compacts between reading and watching, the watch is refused and everything is read again."""

    async def run(etcd: Etcd) -> None:
        async with founded(EtcdOptions(etcd.urls)) as cluster:
            term = await cluster.elect()
            follower = Follower(cluster)
            mirror = follower.mirror
            catch_up, done = mirror._catch_up, False

            async def slow() -> None:
                nonlocal done
                await catch_up()
                if not done:
                    done = True
                    await write(cluster, term, 1, 3)
                    status = await cluster.client.status()
                    asked = {"revision": status.header.revision}
                    await cluster.client._ask("/v3/kv/compaction", asked, ec.TxnReply, timeout_s=5)

            monkeypatch.setattr(mirror, "_catch_up", slow)
            async with running(mirror.run(), mirror.beat()):
                await until(lambda: indexes(follower) == [1, 2, 3, 4], "all entries")
            assert mirror.restarts >= 2

    with Etcd(tmp_path) as etcd:
        asyncio.run(run(etcd))


def test_etcd_killed_and_started_again(tmp_path: Path) -> None:
    """With three servers, each killed and started again in turn under load: every acknowledged entry arrives, once."""

    async def run(etcd: Etcd) -> None:
        async with founded(EtcdOptions(etcd.urls)) as cluster:
            term = await cluster.elect()
            follower = Follower(cluster, EtcdClient(EtcdOptions(etcd.urls[::-1])))
            async with running(follower.mirror.run(), follower.mirror.beat()):
                index = 1
                for server in etcd.servers:
                    server.kill()
                    for _ in range(3):
                        await cluster.append(index, term, b"x", within_s=30)
                        index += 1
                    await asyncio.to_thread(lambda server=server: server.start().wait_healthy())
                await until(lambda: len(follower.entries) == index, "all entries")
                assert indexes(follower) == list(range(1, index + 1))
            follower.client.close()

    with Etcd(tmp_path, 3) as etcd:
        asyncio.run(run(etcd))


def test_a_silent_watch_is_replaced(options: EtcdOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch that delivers nothing though the journal has grown is given up, and the entries are read."""

    async def run() -> None:
        async with founded(options) as cluster:
            term = await cluster.elect()
            client = EtcdClient(options)
            follower = Follower(cluster, client)

            async def silent(*_: object, **__: object):
                await asyncio.Event().wait()
                yield ec.WatchReply()

            monkeypatch.setattr(client, "watch", silent)
            async with running(follower.mirror.run(), follower.mirror.beat()):
                await until(lambda: indexes(follower) == [1], "the first entry")
                await write(cluster, term, 1, 2)
                await until(lambda: indexes(follower) == [1, 2, 3], "the rest")
                assert follower.mirror.restarts >= 2
            client.close()

    asyncio.run(run())


def test_contact_is_an_answer_of_etcd(tmp_path: Path) -> None:
    """While etcd is paused the contact runs out; it is back when etcd answers again."""

    async def run(etcd: Etcd) -> None:
        async with founded(EtcdOptions(etcd.urls)) as cluster:
            mirror = Follower(cluster).mirror
            clock = mirror._clock

            def contact() -> bool:
                return mirror.contact_until > clock.boottime_s()

            async with running(mirror.run(), mirror.beat()):
                await until(contact, "contact")
                etcd.servers[0].pause()
                await until(lambda: not contact(), "loss of contact")
                etcd.servers[0].go_on()
                await until(contact, "contact again")

    with Etcd(tmp_path) as etcd:
        asyncio.run(run(etcd))


def test_below_the_floor_the_state_is_fetched(options: EtcdOptions) -> None:
    """B22: a follower that needs trimmed entries asks for the state, and goes on behind it."""

    async def run() -> None:
        async with founded(options) as cluster:
            term = await cluster.elect()
            await write(cluster, term, 1, 4)
            assert await cluster.journal.trim(term, FloorRecord(3, 3, bytes(16), ()), [], timeout_s=5)
            follower = Follower(cluster)
            async with running(follower.mirror.run(), follower.mirror.beat()):
                await until(lambda: indexes(follower) == [4, 5], "what is behind the floor")
                await write(cluster, term, 5, 1)
                await until(lambda: indexes(follower) == [4, 5, 6], "the next")
            assert follower.fetched == 1

    asyncio.run(run())


def test_damage_ends_it(options: EtcdOptions) -> None:
    """Damage in etcd is no matter of a moment: following ends with CorruptionError."""

    async def run() -> None:
        async with founded(options) as cluster:
            await cluster.client.txn([], [ec.put(cluster.keys.journal(2), b"?"), ec.put(cluster.keys.head, b"2")])
            with pytest.raises(errors.CorruptionError):
                await asyncio.wait_for(Follower(cluster).mirror.run(), 20)

    asyncio.run(run())
