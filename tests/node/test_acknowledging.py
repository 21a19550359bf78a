"""What is acknowledged, what is shown, and what is repeated, while replicas stand still."""

from __future__ import annotations

import pytest

from srengine import errors
from srengine.client import messages
from srengine.storage import encode_puts
from tests.node.cluster import Asker, numbered
from tests.processes import Nodes, wait_for

pytestmark = pytest.mark.processes
TABLE = "shop.orders"
NOT_SHOWN = (errors.NotReady, errors.NoQuorum, errors.TimedOut)


def test_what_only_the_leader_holds_is_neither_acknowledged_nor_shown(nodes: Nodes, asker: Asker) -> None:
    """A read or scan that meets a record above the acknowledged sequence waits or says NOT_READY; later it is shown."""
    one = nodes["node-1"].address
    asker.create(one, TABLE, tablets=1)
    asker.write(one, TABLE, {b"a": b"1"})
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal")
    for name in ("node-2", "node-3"):
        nodes[name].pause()
    with pytest.raises((errors.TimedOut, errors.NoQuorum)):
        asker.write(one, TABLE, {b"a": b"2"}, timeout_s=1)
    with pytest.raises(NOT_SHOWN):
        asker.read(one, TABLE, [b"a"], timeout_s=0.5)
    with pytest.raises(NOT_SHOWN):
        asker.ask(one, messages.Scan(TABLE, 0, timeout_s=0.5))
    for name in ("node-2", "node-3"):
        nodes[name].go_on()
    shown = wait_for(lambda: readable(asker, one), "the write is shown once a majority holds it")
    assert shown == {b"a": b"2"}


def readable(asker: Asker, address: str) -> dict[bytes, bytes | None] | None:
    try:
        return asker.read(address, TABLE, [b"a"], timeout_s=1)
    except NOT_SHOWN:
        return None


def test_a_repeated_request_waits_like_the_first_and_is_executed_once(nodes: Nodes, asker: Asker) -> None:
    """F27: the kept answer of a repeated request id waits for the majority, too, and says what was done the first
    time.
    """
    one = nodes["node-1"].address
    asker.create(one, TABLE, tablets=1)
    session = asker.ask(one, messages.OpenSession(TABLE)).message.session
    for name in ("node-2", "node-3"):
        nodes[name].pause()
    write = messages.Write(TABLE, 0, session, 1, timeout_s=1.0)
    for _ in range(2):
        with pytest.raises((errors.TimedOut, errors.NoQuorum)):
            asker.ask(one, write, [encode_puts([(b"k", b"v")])])
    for name in ("node-2", "node-3"):
        nodes[name].go_on()

    def repeated() -> messages.WriteReply | None:
        try:
            return asker.ask(one, write, [encode_puts([(b"k", b"other")])]).message
        except NOT_SHOWN:
            return None

    reply = wait_for(repeated, "the repeated request is answered")
    assert reply.duplicate
    assert reply.results == b"\x00"
    assert asker.read(one, TABLE, [b"k"]) == {b"k": b"v"}


def test_an_unknown_session_and_a_malformed_write_change_nothing(nodes: Nodes, asker: Asker) -> None:
    """A write of a session that was never opened is REQUEST_EXPIRED; malformed operations are refused; both change
    nothing.
    """
    one = nodes["node-1"].address
    asker.create(one, TABLE, tablets=1)
    asker.write(one, TABLE, {b"a": b"1"})
    with pytest.raises(errors.RequestExpired):
        asker.ask(one, messages.Write(TABLE, 0, bytes(16), 7), [encode_puts([(b"a", b"2")])])
    session = asker.ask(one, messages.OpenSession(TABLE)).message.session
    for operations in (b"", b"\x00" * 7, encode_puts([(b"a", b"2")])[:-1]):
        with pytest.raises(errors.InvalidValue):
            asker.ask(one, messages.Write(TABLE, 0, session, 1), [operations])
    assert asker.everything(one, TABLE) == {b"a": b"1"}


def test_consistency_all_waits_for_every_replica(nodes: Nodes, asker: Asker) -> None:
    """`all` needs every replica: refused by name while one is away, and then every replica has it at once."""
    one = nodes["node-1"].address
    asker.create(one, TABLE, tablets=1)
    asker.write(one, TABLE, numbered(0, 10), consistency="all")
    for replica in asker.replicas(one, TABLE):
        assert replica["count"] == 10, replica
    nodes["node-2"].kill()

    def refused() -> errors.NoQuorum | None:
        try:
            asker.write(one, TABLE, numbered(10, 20), consistency="all", timeout_s=1)
        except errors.NoQuorum as error:
            return error
        except errors.TimedOut:
            return None
        return None

    assert "node-2" in wait_for(refused, "all is refused").message
    asker.write(one, TABLE, numbered(20, 30))


def test_a_node_that_does_not_lead_passes_requests_on(nodes: Nodes, asker: Asker) -> None:
    """Any node takes writes, reads, scans and catalog changes; while the leader is away it says so by a typed error."""
    two = nodes["node-2"].address
    asker.create(two, TABLE)
    asker.write(two, TABLE, numbered(0, 40))
    assert asker.read(two, TABLE, [b"key-000007"]) == {b"key-000007": b"v-7"}
    assert len(asker.everything(two, TABLE)) == 40
    with pytest.raises(errors.Conflict):
        asker.ask(two, messages.CreateTable(TABLE))
    with pytest.raises(errors.NotFound):
        asker.ask(two, messages.CreateTable("nowhere.t"))
    with pytest.raises(errors.NotFound):
        asker.ask(two, messages.Read("shop.none", 0, (b"a",)))
    with pytest.raises(errors.InvalidValue):
        asker.ask(two, messages.CreateTable("shop.many", replicas=4))
    nodes["node-1"].kill()
    with pytest.raises(errors.NoQuorum):
        asker.write(two, TABLE, numbered(40, 41), timeout_s=2)
    with pytest.raises(errors.NoQuorum):
        asker.read(two, TABLE, [b"key-000007"], timeout_s=2)


def test_a_value_larger_than_an_answer_is_replicated(nodes: Nodes, asker: Asker) -> None:
    """A value of 20 MiB travels over the bulk port, is acknowledged at quorum, and is read back."""
    one, three = nodes["node-1"].address, nodes["node-3"].address
    asker.create(one, TABLE, tablets=1)
    value = bytes(range(256)) * 80 * 1024
    asker.write(one, TABLE, {b"large": value}, timeout_s=60)
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal")
    assert asker.read(three, TABLE, [b"large"], consistency="local") == {b"large": value}


def test_sigterm_drains_and_ends_with_0(nodes: Nodes, asker: Asker) -> None:
    """SIGTERM: what was acknowledged is there after the start, the exit code is 0."""
    one = nodes["node-1"].address
    asker.create(one, TABLE)
    asker.write(one, TABLE, numbered(0, 40))
    assert [node.stop() for node in nodes] == [0, 0, 0]
    nodes.start_all()
    assert len(asker.everything(one, TABLE)) == 40
