"""The journal in etcd: one writer for each term, every command once and whole, however it went on the way."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
from typing import Any

import pytest

from srengine import errors
from srengine.ha.backends import etcd_client as ec
from srengine.ha.backends.etcd_client import EtcdClient, EtcdOptions
from srengine.ha.backends.etcd_journal import PART_BYTES, BelowFloor, EtcdEntry, EtcdJournal
from srengine.ha.backends.etcd_keys import (
    Candidacy,
    ClusterRecord,
    CopyRecord,
    FloorRecord,
    JournalRecord,
    Keys,
    SessionRecord,
    decode,
    decode_entry,
    encode,
    encode_entry,
    entry_digest,
    number,
    read_number,
)
from tests.ha.etcd.parts import Cluster, Follower, founded, running, until

pytestmark = pytest.mark.requires_tool("etcd")


def test_entries_follow_each_other(options: EtcdOptions) -> None:
    """What is appended under a term is read back in order, several commands of one transaction too."""

    async def run() -> None:
        async with founded(options) as cluster:
            term = await cluster.elect()
            await cluster.append(1, term, b"two")
            await cluster.append(2, term, b"three", b"four")
            assert await cluster.journal.head() == 4
            assert await cluster.read() == [
                EtcdEntry(1, 0, b"first"),
                EtcdEntry(2, term, b"two"),
                EtcdEntry(3, term, b"three"),
                EtcdEntry(4, term, b"four"),
            ]
            assert [entry.index for entry in await cluster.read(4)] == [4]

    asyncio.run(run())


def test_a_leader_that_lost_the_election_appends_nothing(options: EtcdOptions) -> None:
    """H06, F21: under the old term nothing is appended once the key has changed or is gone; StaleEpoch says so."""

    async def run() -> None:
        async with founded(options) as cluster:
            old = await cluster.elect("a")
            new = await cluster.elect("b")
            with pytest.raises(errors.StaleEpoch):
                await cluster.append(1, old, b"late")
            await cluster.append(1, new, b"mine")
            await cluster.client.txn([], [ec.delete(cluster.keys.election)])
            with pytest.raises(errors.StaleEpoch):
                await cluster.append(2, new, b"late")
            assert [entry.data for entry in await cluster.read()] == [b"first", b"mine"]

    asyncio.run(run())


def test_a_lease_that_ended_takes_the_right_to_append(options: EtcdOptions) -> None:
    """The election key goes with its lease, and the transaction with the key."""

    async def run() -> None:
        async with founded(options) as cluster:
            lease = await cluster.client.grant(2)
            term = await cluster.elect("a", lease.ID)
            await cluster.append(1, term, b"in time")
            follower = Follower(cluster)
            async with running(follower.mirror.run()):
                await until(lambda: follower.mirror.term == term, "the leader")
                await until(lambda: follower.mirror.election is None, "the end of the lease")
            with pytest.raises(errors.StaleEpoch):
                await cluster.append(2, term, b"late")

    asyncio.run(run())


class _Losing(EtcdClient):
    """Does every transaction, and loses the first answers."""

    def __init__(self, options: EtcdOptions, losses: int) -> None:
        super().__init__(options)
        self.losses = losses

    async def txn(self, *arguments: Any, **named: Any) -> ec.TxnReply:
        reply = await super().txn(*arguments, **named)
        if self.losses:
            self.losses -= 1
            raise errors.TimedOut("the answer is lost")
        return reply


@pytest.mark.parametrize("bytes_", [10, PART_BYTES * 2 + 5])
def test_a_lost_answer_neither_loses_nor_repeats(options: EtcdOptions, bytes_: int) -> None:
    """When the answer to an append is lost, asking again finds that it was done; nothing is appended twice."""

    async def run() -> None:
        async with founded(options) as cluster:
            term = await cluster.elect()
            losing = _Losing(options, 3)
            cluster.journal = EtcdJournal(cluster.place(losing))
            await cluster.append(1, term, secrets.token_bytes(bytes_))
            await cluster.append(2, term, b"next")
            assert [entry.index for entry in await cluster.read()] == [1, 2, 3]
            losing.close()

    asyncio.run(run())


def test_unknown_stays_unknown(options: EtcdOptions) -> None:
    """An append of which no answer comes within the time is TimedOut: it may stand."""

    async def run() -> None:
        async with founded(options) as cluster:
            term = await cluster.elect()
            losing = _Losing(options, 1000)
            cluster.journal = EtcdJournal(cluster.place(losing))
            with pytest.raises(errors.TimedOut):
                await cluster.append(1, term, b"perhaps", within_s=0.3)
            losing.close()

    asyncio.run(run())


def test_somebody_who_writes_under_our_term_is_found(options: EtcdOptions) -> None:
    """If head moved though the election is ours, nothing is appended and Diverged says why."""

    async def run() -> None:
        async with founded(options) as cluster:
            term = await cluster.elect()
            await cluster.client.txn([], [ec.put(cluster.keys.head, number(7))])
            with pytest.raises(errors.Diverged):
                await cluster.append(1, term, b"x")

    asyncio.run(run())


def test_a_further_condition_decides_too(options: EtcdOptions) -> None:
    """The transaction of an epoch: taken, it appends nothing and raises Conflict."""

    async def run() -> None:
        async with founded(options) as cluster:
            term = await cluster.elect()
            epoch = cluster.keys.epoch(1)
            await cluster.append(1, term, b"a", compare=[ec.absent(epoch)], success=[ec.put(epoch, b"a")])
            with pytest.raises(errors.Conflict) as caught:
                await cluster.append(2, term, b"b", compare=[ec.absent(epoch)], success=[ec.put(epoch, b"b")])
            assert type(caught.value) is errors.Conflict
            assert await cluster.journal.head() == 2

    asyncio.run(run())


@pytest.mark.parametrize("bytes_", [PART_BYTES, PART_BYTES + 1, PART_BYTES * 2, PART_BYTES * 4 - 1])
def test_a_large_command_is_split_and_whole_again(options: EtcdOptions, bytes_: int) -> None:
    """A command over the request limit arrives whole, and only when its last part has."""

    async def run() -> None:
        async with founded(options) as cluster:
            term = await cluster.elect()
            data = secrets.token_bytes(bytes_)
            await cluster.append(1, term, data)
            await cluster.append(2, term, b"small")
            entries = await cluster.read(2)
            assert [entry.index for entry in entries] == [2, 3]
            assert entries[0].data == data

    asyncio.run(run())


def test_parts_without_their_last_count_for_nothing(options: EtcdOptions) -> None:
    """A leader that dies between two parts leaves no entry; the next leader's command of that index is its own."""

    async def run() -> None:
        async with founded(options) as cluster:
            first = await cluster.elect("a")
            data = b"a" * (3 * PART_BYTES)
            for part in range(2):
                await cluster.client.txn([], [ec.put(cluster.keys.part(2, part), data[:PART_BYTES])])
            assert await cluster.journal.head() == 1
            assert [entry.index for entry in await cluster.read()] == [1]
            second = await cluster.elect("b")
            assert second > first
            other = b"b" * (2 * PART_BYTES)
            await cluster.append(1, second, other)
            assert (await cluster.read(2))[0].data == other

    asyncio.run(run())


def test_pages_shrink_for_large_commands(options: EtcdOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is over the bound of an answer is asked for again in smaller ones."""
    monkeypatch.setattr(ec, "ANSWER_BYTES_MAX", 3_000_000)

    async def run() -> None:
        async with founded(options) as cluster:
            term = await cluster.elect()
            for index in range(1, 7):
                await cluster.append(index, term, secrets.token_bytes(PART_BYTES - 100))
            assert [entry.index for entry in await cluster.read()] == list(range(1, 8))

    asyncio.run(run())


def test_damage_is_found(options: EtcdOptions) -> None:
    """A changed entry, a missing one, a missing part, and something that is no entry are CorruptionError."""

    async def run() -> None:
        async with founded(options) as cluster:
            term = await cluster.elect()
            await cluster.append(1, term, b"two", b"three")
            await cluster.append(3, term, b"x" * (2 * PART_BYTES))
            keys = cluster.keys
            whole = (await cluster.client.range(keys.journal(2))).first
            assert whole is not None
            changed = encode_entry(
                decode_entry(whole.value).__class__(2, term, 0, decode_entry(whole.value).digest, b"2")
            )
            for damage in (
                [ec.put(keys.journal(2), changed)],
                [ec.put(keys.journal(2), b"?")],
                [ec.delete(keys.journal(2))],
            ):
                await cluster.client.txn([], damage)
                with pytest.raises(errors.CorruptionError):
                    await cluster.read()
                await cluster.client.txn([], [ec.put(keys.journal(2), whole.value)])
            assert len(await cluster.read()) == 4
            await cluster.client.txn([], [ec.delete(keys.part(4, 0))])
            with pytest.raises(errors.CorruptionError):
                await cluster.read()

    asyncio.run(run())


def test_what_is_trimmed_is_said_to_be(options: EtcdOptions) -> None:
    """After a trim the entries behind the floor are read, those below raise BelowFloor; parts are gone too. A trim
    without the election, or with a copy that changed, removes nothing.
    """

    async def run() -> None:
        async with founded(options) as cluster:
            keys, client = cluster.keys, cluster.client
            term = await cluster.elect()
            await cluster.append(1, term, b"x" * (2 * PART_BYTES))
            await cluster.append(2, term, b"three", b"four")
            await client.txn([], [ec.put(keys.state("a"), b"")])
            copy = (await client.range(keys.state("a"))).first
            assert copy is not None
            floor = FloorRecord(3, 3, bytes(16), ("a",))
            assert not await cluster.journal.trim(term - 1, floor, [copy], timeout_s=5)
            await client.txn([], [ec.put(keys.state("a"), b"")])
            assert not await cluster.journal.trim(term, floor, [copy], timeout_s=5)
            assert len(await cluster.read()) == 4
            copy = (await client.range(keys.state("a"))).first
            assert copy is not None
            assert await cluster.journal.trim(term, floor, [copy], timeout_s=5)
            assert await cluster.journal.floor() == floor
            assert [entry.index for entry in await cluster.read(4)] == [4]
            for first in (1, 3):
                with pytest.raises(BelowFloor):
                    await cluster.read(first)
            assert (await client.range(keys.part(2, 0))).first is None
            await cluster.append(4, term, b"five")

    asyncio.run(run())


def test_one_cluster_is_founded_for_a_name(options: EtcdOptions) -> None:
    """B04, F12: sixteen nodes found clusters of one name with ids of their own: one wins, all learn its id; again
    changes nothing; another cluster's keys are refused.
    """

    async def run() -> None:
        name = f"c{secrets.token_hex(4)}"
        clusters = [Cluster(options) for _ in range(16)]
        try:
            won = await asyncio.gather(*(one.journal.bootstrap(name, one.keys.cluster_id.encode()) for one in clusters))
            assert len(set(won)) == 1
            winner = next(one for one in clusters if one.keys.cluster_id == won[0])
            assert await winner.journal.bootstrap(name, b"again") == won[0]
            assert [entry.data for entry in await winner.read()] == [won[0].encode()]
            assert (await winner.journal.check_cluster()).name == name
            loser = next(one for one in clusters if one is not winner)
            with pytest.raises(errors.NotFound):
                await loser.journal.check_cluster()
            found = (await winner.client.range(winner.keys.cluster)).first
            assert found is not None
            await loser.client.txn([], [ec.put(loser.keys.cluster, found.value)])
            with pytest.raises(errors.ForeignData):
                await loser.journal.check_cluster()
            await loser.client.txn([], [ec.put(loser.keys.cluster, found.value.replace(b'"format":1', b'"format":9'))])
            with pytest.raises(errors.UnsupportedFeature):
                await loser.journal.check_cluster()
        finally:
            for one in clusters:
                one.client.close()

    asyncio.run(run())


def test_of_sixteen_contenders_one_takes_each_epoch(options: EtcdOptions) -> None:
    """B04: sixteen contenders with one term and one journal behind them append the same epoch at once, ten times over:
    each time one is told that it did, and the epoch is its own.
    """

    async def run() -> None:
        async with founded(options) as cluster:
            term = await cluster.elect()
            keys = cluster.keys
            clients = [EtcdClient(options) for _ in range(16)]

            async def contend(number_: int, epoch: int) -> bool:
                journal = EtcdJournal(cluster.place(clients[number_]))
                key = keys.epoch(epoch)
                deadline = asyncio.get_running_loop().time() + 30
                try:
                    await journal.append(
                        epoch,
                        term,
                        [b"%d" % number_],
                        compare=[ec.absent(key)],
                        success=[ec.put(key, b"%d" % number_)],
                        deadline=lambda: deadline,
                    )
                except errors.Conflict:
                    return False
                return True

            for epoch in range(1, 11):
                won = await asyncio.gather(*(contend(number_, epoch) for number_ in range(16)))
                assert sum(won) == 1
                found = (await cluster.client.range(keys.epoch(epoch))).first
                assert found is not None and int(found.value) == won.index(True)
                assert [entry.data for entry in await cluster.read(epoch + 1)] == [found.value]
            for client in clients:
                client.close()

    asyncio.run(run())


def test_the_bytes_in_etcd_stay_the_same() -> None:
    """What lies in somebody's etcd is read by every later version: keys and values of format 1, byte for byte."""
    keys = Keys("0123456789abcdef" * 2)
    base = b"srengine/0123456789abcdef0123456789abcdef/"
    assert keys.journal(7) == base + b"journal/00000000000000000007"
    assert keys.part(7, 1) == b"srengine-parts/" + base[9:] + b"00000000000000000007/00000000000000000001"
    assert keys.epoch(3) == base + b"epochs/00000000000000000003"
    assert keys.session("aa") == base + b"sessions/aa"
    assert keys.state("aa") == base + b"state/aa"
    assert Keys.name("prod") == b"srengine-names/prod"
    named = (keys.cluster, keys.election, keys.head, keys.floor)
    assert named == tuple(base + name for name in (b"cluster", b"election", b"head", b"floor"))
    assert all(base <= key < keys.base_end for key in (*named, keys.journal(7), keys.state("aa")))
    assert not base <= keys.part(7, 1) < keys.base_end
    entry = JournalRecord(7, 5, 0, entry_digest(7, 5, b"data"), b"data")
    stored = bytes.fromhex("95070500c410ENTRYc40464617461".replace("ENTRY", entry.digest.hex()))
    assert encode_entry(entry) == stored
    assert decode_entry(stored) == entry
    assert entry.digest.hex() == "f8000ebe426da888eedebb7ddc27122f"
    for record, stored in (
        (ClusterRecord("c", "prod"), b'{"cluster_id":"c","name":"prod","format":1}'),
        (Candidacy("a", "n1"), b'{"node_id":"a","name":"n1"}'),
        (SessionRecord("a", "n1", 9), b'{"node_id":"a","name":"n1","applied":9}'),
        (CopyRecord("a", "n1", 9, b"\x00\xff"), b'{"node_id":"a","name":"n1","index":9,"digest":"AP8="}'),
        (FloorRecord(5, 9, b"\x00", ("a",)), b'{"index":5,"digest_index":9,"digest":"AA==","holders":["a"]}'),
    ):
        assert encode(record) == stored
        assert decode(stored, type(record)) == record
        with pytest.raises(errors.CorruptionError):
            decode(stored[:-1], type(record))


def test_without_h11_the_backend_says_what_it_needs() -> None:
    """The extra is missing: asking for the backend names the package, and nothing else of srengine minds."""
    code = (
        "import sys; sys.modules['h11'] = None\n"
        "from srengine import errors\n"
        "from srengine.ha.backends import find_backend, names\n"
        "assert 'etcd' in names()\n"
        "try: find_backend('etcd')\n"
        "except errors.UnsupportedFeature as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "srengine[etcd]" in done.stdout


def test_keys_and_values_that_are_none_of_ours() -> None:
    """CorruptionError, never a wrong number."""
    keys = Keys("a" * 32)
    assert keys.index_of(keys.journal(12)) == 12
    for key in (keys.journals + b"12", keys.journals + b"x" * 20, b"other" + number(1)):
        with pytest.raises(errors.CorruptionError):
            keys.index_of(key)
    for value in (b"", b"-1", b"1" * 21, b"\xb2"):
        with pytest.raises(errors.CorruptionError):
            read_number(value)
