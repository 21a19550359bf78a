"""The client of etcd's JSON gateway, against real servers and against servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from srengine import errors
from srengine.ha.backends import etcd_client as ec
from srengine.ha.backends.etcd_client import EtcdClient, EtcdOptions
from tests.etcd import Etcd, EtcdServer
from tests.processes import free_ports, wait_for

needs_etcd = pytest.mark.requires_tool("etcd")


@contextlib.asynccontextmanager
async def client_of(options: EtcdOptions) -> AsyncIterator[EtcdClient]:
    client = EtcdClient(options)
    try:
        yield client
    finally:
        client.close()


# --- what it does ----------------------------------------------------------------------------------------------------


@needs_etcd
def test_a_transaction_does_all_or_the_other_side(options: EtcdOptions, prefix: bytes) -> None:
    """A transaction whose compares hold does its operations at one revision; otherwise the other side is done."""

    async def run() -> None:
        async with client_of(options) as client:
            key = prefix + b"\x00\xff key"
            first = await client.txn([ec.absent(key)], [ec.put(key, b"\x00one"), ec.put(key + b"2", b"two")])
            assert first.succeeded
            both = await client.range(prefix, ec.prefix_end(prefix))
            assert [(kv.key, kv.value) for kv in both.kvs] == [(key, b"\x00one"), (key + b"2", b"two")]
            assert {kv.mod_revision for kv in both.kvs} == {first.header.revision}
            again = await client.txn([ec.absent(key)], [ec.put(key, b"no")], [ec.get(key)])
            assert not again.succeeded
            found = again.responses[0].range.first
            assert found is not None and found.value == b"\x00one"
            assert (
                await client.txn(
                    [ec.holds(key, b"\x00one"), ec.present(key), ec.unchanged(key, first.header.revision)],
                    [ec.delete(prefix, ec.prefix_end(prefix))],
                )
            ).succeeded
            assert (await client.range(prefix, ec.prefix_end(prefix))).count == 0

    asyncio.run(run())


@needs_etcd
def test_a_range_is_read_in_pages(options: EtcdOptions, prefix: bytes) -> None:
    """A limit cuts a range and says so; descending gives the last keys."""

    async def run() -> None:
        async with client_of(options) as client:
            for number in range(5):
                await client.txn([], [ec.put(prefix + b"%d" % number, b"")])
            page = await client.range(prefix, ec.prefix_end(prefix), limit=2)
            assert (len(page.kvs), page.more, page.count) == (2, True, 5)
            last = await client.range(prefix, ec.prefix_end(prefix), limit=1, descending=True)
            assert last.first is not None and last.first.key == prefix + b"4"

    asyncio.run(run())


@needs_etcd
def test_a_lease_takes_its_keys_with_it(options: EtcdOptions, prefix: bytes) -> None:
    """A key bound to a lease is gone with it, and a lease that is over cannot be renewed."""

    async def run() -> None:
        async with client_of(options) as client:
            lease = await client.grant(5)
            assert lease.TTL >= 5
            await client.txn([], [ec.put(prefix + b"a", b"", lease=lease.ID)])
            assert await client.keepalive(lease.ID) >= 5
            assert await client.revoke(lease.ID)
            assert (await client.range(prefix + b"a")).first is None
            assert await client.keepalive(lease.ID) == 0
            assert not await client.revoke(lease.ID)
            with pytest.raises(errors.NotFound):
                await client.txn([], [ec.put(prefix + b"a", b"", lease=lease.ID)])

    asyncio.run(run())


@needs_etcd
def test_a_watch_goes_on_where_it_was(options: EtcdOptions, prefix: bytes) -> None:
    """A watch from a revision yields everything since, in order, deletes included; a second one resumes behind it."""

    async def run() -> None:
        async with client_of(options) as client:
            start = (await client.txn([], [ec.put(prefix + b"0", b"")])).header.revision
            for number in (1, 2):
                await client.txn([], [ec.put(prefix + b"%d" % number, b"")])
            seen = await watched(client, prefix, start, 3)
            assert [event.kv.key[-1:] for event in seen] == [b"0", b"1", b"2"]
            await client.txn([], [ec.delete(prefix + b"1")])
            more = await watched(client, prefix, seen[-1].kv.mod_revision + 1, 1)
            assert [(event.type, event.kv.key[-1:]) for event in more] == [("DELETE", b"1")]

    asyncio.run(run())


async def watched(client: EtcdClient, prefix: bytes, start: int, count: int) -> list[ec.Event]:
    seen: list[ec.Event] = []
    async with asyncio.timeout(20):
        async with contextlib.aclosing(client.watch(prefix, ec.prefix_end(prefix), start_revision=start)) as replies:
            async for reply in replies:
                seen += reply.events
                if len(seen) >= count:
                    break
    return seen


@needs_etcd
def test_a_compacted_revision_is_named(tmp_path: Path) -> None:
    """A watch from a revision that etcd has compacted raises Compacted."""

    async def run(etcd: Etcd) -> None:
        async with client_of(EtcdOptions(etcd.urls)) as client:
            for _ in range(3):
                last = await client.txn([], [ec.put(b"a/b", b"")])
            await client._ask("/v3/kv/compaction", {"revision": last.header.revision}, ec.TxnReply, timeout_s=5)
            with pytest.raises(ec.Compacted):
                await watched(client, b"a/", 1, 1)

    with Etcd(tmp_path) as etcd:
        asyncio.run(run(etcd))


@needs_etcd
def test_what_etcd_refuses_is_typed(options: EtcdOptions, prefix: bytes) -> None:
    """A request over etcd's limit is InvalidValue, and nothing of it stands."""

    async def run() -> None:
        async with client_of(options) as client:
            with pytest.raises(errors.InvalidValue, match="too large"):
                await client.txn([], [ec.put(prefix, bytes(1_700_000))])
            assert (await client.range(prefix)).first is None

    asyncio.run(run())


# --- several servers -------------------------------------------------------------------------------------------------


@needs_etcd
def test_another_server_is_asked_when_one_is_gone(tmp_path: Path) -> None:
    """With one of three servers killed and another address that nobody has, reads and changes go on; with two killed,
    reading is NoQuorum, Unreachable or TimedOut, and a change is TimedOut or Unreachable, never done twice.
    """

    async def run(etcd: Etcd) -> None:
        nobody = f"http://127.0.0.1:{free_ports(1)}"
        async with client_of(EtcdOptions((nobody, *etcd.urls))) as client:
            assert (await client.txn([], [ec.put(b"k", b"1")], timeout_s=10)).succeeded
            etcd.servers[0].kill()
            found = (await client.range(b"k", timeout_s=20)).first
            assert found is not None and found.value == b"1"
            etcd.servers[1].kill()
            with pytest.raises((errors.NoQuorum, errors.Unreachable, errors.TimedOut)):
                await client.range(b"k", timeout_s=1.5)
            with pytest.raises((errors.TimedOut, errors.Unreachable)):
                await client.txn([], [ec.put(b"k", b"2")], timeout_s=1.5)

    with Etcd(tmp_path, 3) as etcd:
        asyncio.run(run(etcd))


@needs_etcd
def test_servers_of_two_clusters_are_refused(one_etcd: Etcd, tmp_path: Path) -> None:
    """An answer from another etcd cluster than the first one's is ForeignData."""

    async def run(other: Etcd) -> None:
        async with client_of(EtcdOptions((*one_etcd.urls, *other.urls))) as client:
            await client.status()
            client._preferred = 1
            with pytest.raises(errors.ForeignData):
                await client.status()

    with Etcd(tmp_path) as other:
        asyncio.run(run(other))


@needs_etcd
def test_user_and_password(tmp_path: Path) -> None:
    """With authentication the right user works, a lost token is renewed, a wrong password and no user are refused."""

    async def run(etcd: Etcd) -> None:
        async with client_of(EtcdOptions(etcd.urls)) as plain:

            async def admin(path: str, asked: object) -> None:
                await plain._ask(f"/v3/auth/{path}", asked, ec.TxnReply, timeout_s=5)

            await admin("user/add", {"name": "root", "password": "secret"})
            await admin("role/add", {"name": "root"})
            await admin("user/grant", {"user": "root", "role": "root"})
            await admin("enable", {})
            with pytest.raises((errors.NotAuthenticated, errors.InvalidValue)):
                await plain.txn([], [ec.put(b"k", b"")])
        async with client_of(EtcdOptions(etcd.urls, user="root", password="secret")) as client:
            assert (await client.txn([], [ec.put(b"k", b"")])).succeeded
            client._token = "lost.1"
            assert (await client.txn([], [ec.put(b"k", b"")])).succeeded
        async with client_of(EtcdOptions(etcd.urls, user="root", password="wrong")) as wrong:
            with pytest.raises(errors.NotAuthenticated):
                await wrong.range(b"k")

    with Etcd(tmp_path) as etcd:
        asyncio.run(run(etcd))


@needs_etcd
def test_a_silent_server_is_passed_over(tmp_path: Path) -> None:
    """A server that is paused costs a reader half of its time, and the next question nothing."""

    async def run(etcd: Etcd) -> None:
        async with client_of(EtcdOptions(etcd.urls)) as client:
            leader = (await client.status()).leader
            for place in range(3):
                client._preferred = place
                if (await client.status()).header.member_id != leader:
                    break
            etcd.servers[place].pause()
            assert (await client.range(b"k", timeout_s=2.0)).count == 0
            assert client._preferred != place

    with Etcd(tmp_path, 3) as etcd:
        asyncio.run(run(etcd))


@needs_etcd
def test_https(tmp_path: Path) -> None:
    """With etcd's certificate as authority the gateway is used over TLS, watches too; without it, it is refused."""

    async def run(server: EtcdServer) -> None:
        authority = str(server.data / "fixtures" / "client" / "cert.pem")
        async with client_of(EtcdOptions((server.url,), ca_file=authority)) as client:
            start = (await client.txn([], [ec.put(b"k/1", b"v")])).header.revision
            assert [event.kv.value for event in await watched(client, b"k/", start, 1)] == [b"v"]
        async with client_of(EtcdOptions((server.url,))) as stranger:
            with pytest.raises(errors.Unreachable):
                await stranger.range(b"k", timeout_s=0.5)

    (server,) = Etcd(tmp_path, 1, arguments=["--auto-tls"]).servers
    server.url = server.url.replace("http:", "https:")
    try:
        server.start()
        wait_for(lambda: b"serving client requests" in server.log.read_bytes(), "serving", 30)
        asyncio.run(run(server))
    finally:
        server.kill()


# --- servers that misbehave ------------------------------------------------------------------------------------------

Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]


@contextlib.asynccontextmanager
async def impostor(answer: bytes, *, close: bool = True) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Serve ``answer`` to every request; yield the address and what was asked."""
    asked: list[bytes] = []
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        if close:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await server.wait_closed()


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        pytest.param(ok(b"[]"), errors.FrameError, id="not a document"),
        pytest.param(ok(b'{"kvs": 7}'), errors.FrameError, id="wrong type"),
        pytest.param(ok(b"[" * 100_000), errors.FrameError, id="depth"),
        pytest.param(ok(b'{"kvs": [{"key": "%%%"}]}'), errors.FrameError, id="no base64"),
        pytest.param(
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nNot Found", errors.FrameError, id="no gateway"
        ),
        pytest.param(b"SSH-2.0-OpenSSH_9\r\n", errors.Unreachable, id="not HTTP"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, errors.Unreachable, id="endless header"),
        pytest.param(ok(b"{}")[:-1], errors.Unreachable, id="cut"),
        pytest.param(b"", errors.Unreachable, id="closed"),
    ],
)
def test_an_answer_that_cannot_be_trusted_is_refused(answer: bytes, error: type[errors.Error]) -> None:
    """Whatever answers in etcd's place gives a typed error."""

    async def run() -> None:
        async with impostor(answer) as (address, _), client_of(EtcdOptions((address,))) as client:
            with pytest.raises(error):
                await client.range(b"k", timeout_s=0.5)

    asyncio.run(run())


def test_an_answer_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer over the bound is refused without being read to its end."""
    monkeypatch.setattr(ec, "ANSWER_BYTES_MAX", 100_000)

    async def run() -> None:
        endless = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n" + b" " * 2_000_000
        async with impostor(endless, close=False) as (address, _), client_of(EtcdOptions((address,))) as client:
            with pytest.raises(errors.FrameError, match="100000"):
                await client.range(b"k", timeout_s=5)

    asyncio.run(run())


def test_a_line_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch refuses a line over the bound."""
    monkeypatch.setattr(ec, "LINE_BYTES_MAX", 100_000)

    async def run() -> None:
        endless = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n" + b" " * 2_000_000
        async with impostor(endless, close=False) as (address, _), client_of(EtcdOptions((address,))) as client:
            with pytest.raises(errors.FrameError, match="100000"):
                await watched(client, b"a/", 1, 1)

    asyncio.run(run())


def test_a_change_is_not_repeated_when_the_answer_is_lost() -> None:
    """A transaction that was sent and not answered is TimedOut (unknown), and no other server gets it."""

    async def run() -> None:
        async with (
            impostor(b"") as (first, asked),
            impostor(ok(b'{"succeeded": true}')) as (second, others),
            client_of(EtcdOptions((first, second))) as client,
        ):
            with pytest.raises(errors.TimedOut):
                await client.txn([], [ec.put(b"k", b"")], timeout_s=5)
            assert (len(asked), len(others)) == (1, 0)
            assert (await client.txn([], [ec.put(b"k", b"")], timeout_s=5)).succeeded

    asyncio.run(run())


@pytest.mark.parametrize(
    "address",
    ["", "127.0.0.1:2379", "ftp://a:1", "http://a", "http://a:x", "http://u:p@a:1", "http://a:1/x", "http://a:99999"],
)
def test_addresses_are_checked(address: str) -> None:
    """An address that is none of an etcd is InvalidValue at once."""
    with pytest.raises(errors.InvalidValue):
        EtcdOptions.parse(address)


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """A key without certificate, certificates without https, a user without password, a file that is none."""
    for wrong in ({"cert_file": "a"}, {"ca_file": "a"}, {"user": "a"}, {"password": "a"}):
        with pytest.raises(errors.InvalidValue):
            EtcdOptions(("http://a:1",), **wrong)
    with pytest.raises(errors.InvalidValue):
        EtcdOptions(("https://a:1",), ca_file=str(tmp_path / "none")).context()


def test_the_password_is_not_shown() -> None:
    """The options can be logged."""
    assert "secret" not in repr(EtcdOptions(("http://a:1",), user="u", password="secret"))
