"""Retries, redirects, failover and request ids: faults of the way never change what a call means."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from srengine import errors, limits
from srengine.client import AsyncClient, Client, messages, routing
from tests.client.fake import ADDRESSES, LOSE_ANSWER, FakeCluster

N1, N2, N3 = ADDRESSES


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster({"a.b": 2})


@pytest.fixture
def client(cluster: FakeCluster) -> Iterator[Client]:
    with Client(ADDRESSES, source=cluster.source, timeout_s=5) as client:
        yield client


def writes(cluster: FakeCluster) -> list[tuple[str, messages.Write]]:
    return [(address, message) for address, message in cluster.log if isinstance(message, messages.Write)]


def test_lost_answer_happens_once(cluster: FakeCluster, client: Client) -> None:
    """A write whose answer is lost is repeated under the same request id and has its effect once."""
    table = client.table("a.b")
    table.put(b"k", b"0")
    cluster.faults[N1] = [LOSE_ANSWER, LOSE_ANSWER]
    version = table.put(b"k", b"1", if_version=1)
    assert cluster.executed == 2
    sent = [(message.session, message.number) for _, message in writes(cluster)]
    assert len(set(sent[1:])) == 1
    assert len(sent) >= 4
    record = table.get_record(b"k")
    assert record is not None
    assert (record.value, record.version) == (b"1", version)


def test_numbers_increase(cluster: FakeCluster, client: Client) -> None:
    """Every new write to a tablet takes a new number, from 1."""
    table = client.table("a.b")
    for number in range(1, 6):
        table.put(b"k", b"%d" % number)
    assert [message.number for _, message in writes(cluster)] == [1, 2, 3, 4, 5]


def test_redirect_is_followed_and_remembered(cluster: FakeCluster, client: Client) -> None:
    """NotLeader leads to the named node at once; the next write goes there directly."""
    cluster.leader = N3
    table = client.table("a.b")
    table.put(b"k", b"1")
    assert [address for address, _ in writes(cluster)] == [N1, N3]
    table.put(b"k", b"2")
    assert [address for address, _ in writes(cluster)] == [N1, N3, N3]


@pytest.mark.parametrize("leader", ["", N2])
def test_redirects_that_lead_nowhere_end(cluster: FakeCluster, leader: str) -> None:
    """Nodes that name nobody, or one that refuses in turn, end as NoLeader within the time-out."""
    cluster.leader = leader
    cluster.faults[N2] = [errors.NotLeader("not me", leader=N1)] * 1000
    with Client(ADDRESSES, source=cluster.source, timeout_s=0.3) as client, pytest.raises(errors.NoLeader) as caught:
        client.table("a.b").put(b"k", b"1")
    assert caught.value.outcome == "not executed"
    assert not isinstance(caught.value, errors.NotLeader)


def test_failover_over_endpoints(cluster: FakeCluster, client: Client) -> None:
    """A dead first endpoint costs a retry, and the next request begins with one that answers."""
    cluster.down = {N1}
    assert client.list_databases() == ["a"]
    cluster.log.clear()
    assert client.list_databases() == ["a"]
    assert [address for address, _ in cluster.log] == [N2]


def test_failover_of_reads(cluster: FakeCluster, client: Client) -> None:
    """A read at `one` goes to another replica when some are down or not ready."""
    cluster.put_directly("a.b", {b"k": b"v"})
    cluster.down = {N1}
    for _ in range(8):
        cluster.faults[N2] = [errors.NotReady("catching up")]
        assert client.table("a.b").get(b"k", consistency="one") == b"v"
        cluster.faults[N2] = []


def test_local_reads_stay_at_the_endpoint(cluster: FakeCluster) -> None:
    """`local` asks the endpoint only: NotReady there is never answered by another node."""
    cluster.put_directly("a.b", {b"k": b"v"})
    with Client(N3, source=cluster.source, timeout_s=0.3) as client:
        table = client.table("a.b")
        assert table.get(b"k", consistency="local") == b"v"
        cluster.faults[N3] = [errors.NotReady("catching up")] * 1000
        with pytest.raises(errors.NotReady):
            table.get(b"k", consistency="local")
    assert {address for address, message in cluster.log if isinstance(message, messages.Read)} == {N3}


def test_waits_until_ready(cluster: FakeCluster, client: Client) -> None:
    """NotReady and NoQuorum pass: the client asks again within its time-out."""
    cluster.faults[N1] = [errors.NotReady("starting"), errors.NoQuorum("two are away")]
    cluster.down = {N2, N3}
    client.table("a.b").put(b"k", b"v")
    assert cluster.contents("a.b") == {b"k": b"v"}


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (errors.Unreachable("down"), errors.Unreachable),
        (errors.TimedOut("silent"), errors.TimedOut),
        (errors.NoQuorum("two are away"), errors.NoQuorum),
        (errors.NotReady("starting"), errors.NotReady),
    ],
)
def test_what_is_raised_in_the_end(cluster: FakeCluster, fault: errors.Error, kind: type[errors.Error]) -> None:
    """When nothing helps, the typed error of the way is raised, within the time-out."""
    for address in ADDRESSES:
        cluster.faults[address] = [fault] * 1000
    with Client(ADDRESSES, source=cluster.source, timeout_s=0.2) as client, pytest.raises(kind) as caught:
        client.list_databases()
    assert type(caught.value) is kind


def test_nobody_there_is_unreachable(cluster: FakeCluster) -> None:
    """Unreachable names the endpoints that were tried."""
    cluster.down = set(ADDRESSES)
    with Client([N1, N2], source=cluster.source, timeout_s=0.2) as client, pytest.raises(errors.Unreachable) as caught:
        client.status()
    assert caught.value.endpoints == [N1, N2]


def test_unknown_outcome_is_said(cluster: FakeCluster) -> None:
    """A write that may have happened says so; one that was refused says that it did not."""
    with Client(N1, source=cluster.source, timeout_s=0.3) as client:
        table = client.table("a.b")
        table.put(b"k", b"0")
        cluster.faults[N1] = [errors.TimedOut("silent")] * 1000
        with pytest.raises(errors.TimedOut) as caught:
            table.put(b"k", b"1")
        assert caught.value.outcome == "unknown"
        cluster.faults[N1] = [errors.NotReady("starting")] * 1000
        with pytest.raises(errors.NotReady) as refused:
            table.put(b"k", b"1")
        assert refused.value.outcome == "not executed"


def test_a_write_that_was_never_sent_says_so(cluster: FakeCluster) -> None:
    """When not even a session can be opened, or nobody is there, a write was not executed."""
    with Client(N1, source=cluster.source, timeout_s=0.2) as client:
        table = client.table("a.b")
        table.get(b"k")
        cluster.down = {N2, N3}
        cluster.faults[N1] = [errors.TimedOut("silent")] * 1000
        for attempt in (lambda: table.put(b"k", b"v"), lambda: table.put_many({b"k": b"v"})):
            with pytest.raises(errors.TimedOut) as caught:
                attempt()
            assert caught.value.outcome == "not executed"
    cluster.down = set(ADDRESSES)
    with Client(N1, source=cluster.source, timeout_s=0.2) as client, pytest.raises(errors.Unreachable) as nobody:
        client.table("a.b").delete(b"k")
    assert nobody.value.outcome == "not executed"


def test_conflict_carries_the_current_version(cluster: FakeCluster, client: Client) -> None:
    """A lost condition is a Conflict with the version that stands; None when there is no record."""
    table = client.table("a.b")
    version = table.put(b"k", b"1", if_absent=True)
    for condition in ({"if_absent": True}, {"if_version": version + 7}):
        with pytest.raises(errors.Conflict) as caught:
            table.put(b"k", b"2", **condition)
        assert caught.value.current_version == version
    with pytest.raises(errors.Conflict) as caught:
        table.delete(b"nothing", if_version=3)
    assert caught.value.current_version is None
    assert table.put(b"k", b"2", if_version=version) > version
    with pytest.raises(errors.InvalidValue):
        table.put(b"k", b"2", if_absent=True, if_version=1)


def test_conflict_without_the_current_version(cluster: FakeCluster) -> None:
    """A lost condition stays a Conflict when what stands cannot be read any more."""
    with Client(N1, source=cluster.source, timeout_s=0.2) as client:
        table = client.table("a.b")
        table.put(b"k", b"1")
        cluster.faults[N1] = [None, *[errors.NotReady("starting")] * 1000]
        with pytest.raises(errors.Conflict) as caught:
            table.put(b"k", b"2", if_absent=True)
        assert caught.value.current_version == 0


def test_forgotten_session_is_reopened(cluster: FakeCluster, client: Client) -> None:
    """A session that the cluster forgot is replaced when the write cannot have happened."""
    table = client.table("a.b")
    table.put(b"k", b"1")
    cluster.sessions.clear()
    table.put(b"k", b"2")
    assert cluster.contents("a.b") == {b"k": b"2"}


def test_forgotten_session_after_a_lost_answer_is_raised(cluster: FakeCluster, client: Client) -> None:
    """If the write may have happened, a forgotten session is never papered over by a second execution."""
    table = client.table("a.b")
    table.put(b"k", b"1")

    def lose_and_forget(_: object) -> None:
        cluster.sessions.clear()
        raise errors.TimedOut("silent")

    cluster.faults[N1] = [lose_and_forget]
    with pytest.raises(errors.RequestExpired) as caught:
        table.put(b"k", b"2")
    assert caught.value.outcome == "unknown"


def test_pop_is_atomic(cluster: FakeCluster, client: Client) -> None:
    """Pop returns the value that it deleted, also when another writer changes it in between."""
    table = client.table("a.b")
    table.put(b"k", b"old")

    def change(_: object) -> None:
        cluster.put_directly("a.b", {b"k": b"new"})

    cluster.faults[N1] = [None, change]  # the read passes; before the delete somebody writes
    assert table.pop(b"k") == b"new"
    assert cluster.contents("a.b") == {}


def test_setdefault_is_atomic(cluster: FakeCluster, client: Client) -> None:
    """Setdefault returns the other writer's value when that one comes first."""
    table = client.table("a.b")
    table.put(b"other", b"x")

    def change(message: object) -> None:
        if isinstance(message, messages.Write):
            cluster.put_directly("a.b", {b"k": b"theirs"})

    cluster.faults[N1] = [change, change]
    assert table.setdefault(b"k", b"mine") == b"theirs"


def test_put_many_names_what_failed(cluster: FakeCluster) -> None:
    """The error of a partly failed put_many names tablets and keys; the other tablets' parts are stored."""
    pairs = {b"k%d" % number: b"v" for number in range(20)}
    tablet = routing.tablet_of(b"k0", 2)

    def fail(message: object) -> None:
        if isinstance(message, messages.Write) and message.tablet == tablet:
            raise errors.DiskFull("no space")

    with Client(N1, source=cluster.source, timeout_s=1) as client:
        table = client.table("a.b")
        table.get(b"x")
        cluster.faults[N1] = [fail] * 10
        with pytest.raises(errors.DiskFull) as caught:
            table.put_many(pairs)
    failed = {key for key in pairs if routing.tablet_of(key, 2) == tablet}
    assert caught.value.failed_tablets == [tablet]
    assert caught.value.applied_tablets == [1 - tablet]
    assert caught.value.failed_count == len(failed)
    assert {bytes.fromhex(key) for key in caught.value.failed_keys} == failed
    assert set(cluster.contents("a.b")) == set(pairs) - failed


def test_put_many_refuses_too_much_before_sending(
    cluster: FakeCluster, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part larger than an entry is InvalidValue, and nothing of the batch is sent."""
    monkeypatch.setattr(limits, "ENTRY_OPERATIONS_MAX", 5)
    with pytest.raises(errors.InvalidValue):
        client.table("a.b").put_many({b"k%d" % number: b"v" for number in range(20)})
    assert writes(cluster) == []


def test_missing_table(client: Client) -> None:
    """A table that is not there is NotFound at its first use."""
    with pytest.raises(errors.NotFound):
        client.table("a.nothing").get(b"k")


def test_new_table_unknown_to_a_lagging_node(cluster: FakeCluster, client: Client) -> None:
    """A table that the asked node's catalog does not have yet is asked for by name."""
    client.create_database("c")
    client.create_table("c.d", tablets=3)
    fresh = Client(N2, source=cluster.source, timeout_s=1)
    hidden = messages.ClusterInfoReply("c" * 32, "fake", (), ())
    cluster._info = lambda: hidden  # type: ignore[method-assign]
    with fresh:
        assert fresh.table("c.d").get(b"k") is None


def test_catalog(cluster: FakeCluster, client: Client) -> None:
    """Databases and tables are created, listed and described; existing ones are Conflict unless allowed."""
    client.create_database("shop")
    with pytest.raises(errors.Conflict):
        client.create_database("shop")
    client.create_database("shop", if_missing=True)
    info = client.create_table("shop.orders", tablets=3, replicas=2)
    assert (info.name, len(info.tablets), info.replicas) == ("shop.orders", 3, 2)
    with pytest.raises(errors.Conflict):
        client.create_table("shop.orders")
    assert len(client.create_table("shop.orders", if_missing=True).tablets) == 3
    assert client.list_databases() == ["a", "shop"]
    assert [table.name for table in client.list_tables()] == ["a.b", "shop.orders"]
    assert [table.name for table in client.list_tables("shop")] == ["shop.orders"]
    with pytest.raises(errors.NotFound):
        client.create_table("nothing.orders")


def test_create_with_a_lost_answer_succeeds(cluster: FakeCluster, client: Client) -> None:
    """A create whose answer was lost is not answered by "exists"."""
    cluster.faults[N1] = [LOSE_ANSWER]
    client.create_database("shop")
    cluster.faults[N1] = [LOSE_ANSWER]
    assert client.create_table("shop.orders").name == "shop.orders"


@pytest.mark.parametrize("name", ["orders", "", ".x", "x.", "a b.c", "a.b/c", 3, None])
def test_bad_table_names(client: Client, name: object) -> None:
    """A name that cannot be one is InvalidValue at once."""
    with pytest.raises(errors.InvalidValue):
        client.table(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("consistency", ["", "strong", "QUORUM", None])
def test_bad_consistency(client: Client, cluster: FakeCluster, consistency: str) -> None:
    """An unknown consistency is InvalidValue, and nothing is sent; local and one are no way to write."""
    table = client.table("a.b")
    for attempt in (
        lambda: table.get(b"k", consistency=consistency),
        lambda: table.put(b"k", b"v", consistency=consistency),
        lambda: list(table.scan(consistency=consistency)),
        lambda: table.put_many({b"k": b"v"}, consistency="local"),
        lambda: table.delete(b"k", consistency="one"),
    ):
        with pytest.raises(errors.InvalidValue):
            attempt()
    assert cluster.log == []


@pytest.mark.parametrize(
    "endpoint",
    ["", "127.0.0.1:7400", "tcp://host", "tcp://host:0", "tcp://host:65536", "http://host:1", "tcp://a:1,,tcp://b:2",
     "tcp://host:1#abc", "tcp://:1", "tcp://host:1 x"],
)  # fmt: skip
def test_bad_endpoints(endpoint: str) -> None:
    """What is no endpoint is InvalidValue when the client is made."""
    with pytest.raises(errors.InvalidValue):
        Client(endpoint)


def test_endpoints() -> None:
    """Several endpoints in one text or several; a key behind # belongs to its endpoint."""
    addresses, keys = routing.parse_endpoints([f"tcp://a:1#{'AB' * 32}, tcp://[::1]:2", "tcp://a:1"])
    assert addresses == ["tcp://a:1", "tcp://[::1]:2"]
    assert keys == {"tcp://a:1": "ab" * 32}


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
def test_bad_timeout(timeout_s: float) -> None:
    """A time-out is a positive number."""
    with pytest.raises(errors.InvalidValue):
        AsyncClient("tcp://n1:1", timeout_s=timeout_s)


def test_two_clusters_are_not_mixed(cluster: FakeCluster, client: Client) -> None:
    """Endpoints of two clusters are ForeignData, never a mixture."""
    other = messages.ClusterInfoReply("d" * 32, "other", (), ())
    client.table("a.b").get(b"k")
    cluster._info = lambda: other  # type: ignore[method-assign]
    cluster.leader = "nobody"
    with pytest.raises(errors.ForeignData):
        client.table("a.b").get(b"k")


def test_async_client(cluster: FakeCluster) -> None:
    """The asyncio twin has the same names and does the same."""

    async def scenario() -> None:
        async with AsyncClient("tcp://n1:1", source=cluster.source(), timeout_s=2) as client:
            table = client.table("a.b")
            await asyncio.gather(*(table.put(b"k%d" % number, b"v") for number in range(20)))
            assert await table.count() == 20
            assert await table.get(b"k3") == b"v"
            assert [key async for key, _ in table.scan(limit=2)] == [b"k0", b"k1"]
            assert await table.pop(b"k3") == b"v"
            assert await table.setdefault(b"k3", b"w") == b"w"
            assert (await client.status())["leader"] == "node-1"
            assert [member["name"] for member in await client.members()] == ["node-1", "node-2", "node-3"]
            assert len(await client.sync_status("a.b")) == 6
            assert {each["outcome"] for each in await client.sync_run("a.b", timeout_s=5)} == {"equal"}

    asyncio.run(scenario())
    opened = {message.session for _, message in writes(cluster)}
    assert len(opened) == 1


def test_same_names() -> None:
    """Every public method of the asyncio twins exists at the blocking ones."""
    from srengine.client import AsyncTable, Table

    for twin, blocking in ((AsyncClient, Client), (AsyncTable, Table)):
        names = {name for name in vars(twin) if not name.startswith("_")} - {"pages", "count", "contains"}
        assert names - set(dir(blocking)) == set(), names - set(dir(blocking))


def test_a_token_is_refused_until_there_are_users():
    """A client that names a user is told that nobody checks it; it is not served as nobody."""
    with pytest.raises(errors.UnsupportedFeature, match="no users yet"):
        AsyncClient("tcp://127.0.0.1:1", token="secret")
