"""Who comes in: keys on the list, at their ports, while somebody decides; nobody else."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path

import pytest
import zmq

from srengine import errors, security
from srengine.transport import Endpoint, Identity, new_key_pair, probe, sockets
from tests.transport.world import Count, Echo, Node, until


async def ask(identity, address, server_key, port="client"):
    """Return the answer or the error of one request with its own endpoint."""
    caller = Endpoint(identity)
    try:
        reply = await caller.channel(address, port=port, server_key=server_key).request(Echo("who"), timeout_s=20)
        return reply.message
    except errors.Error as error:
        return error
    finally:
        await caller.close()


def run(scenario):
    """Run ``scenario(node, allow-list, node's keys)``; the list starts empty."""

    async def inside():
        keys, allowed = new_key_pair(), security.AllowList()
        node = Node(Endpoint(Identity(name="node-1", keys=keys), authenticator=allowed))
        try:
            await node.listen("client", "peer", "bulk")
            await scenario(node, allowed, keys)
        finally:
            await node.endpoint.close()

    asyncio.run(inside())


def test_allowed_keys_come_in_at_their_ports():
    """F35: a key on the list comes in, only at the ports that it was given, and the handler sees which key it is."""

    async def scenario(node, allowed, keys):
        guest = new_key_pair()
        allowed.allow(guest.public, ["client"], "reporting")
        answer = await ask(Identity(name="reporting", keys=guest), node.addresses["client"], keys.public)
        assert answer == Echo("reporting/client", guest.public)
        assert allowed.name_of(guest.public) == "reporting"
        for port in ("peer", "bulk"):
            refused = await ask(Identity(keys=guest), node.addresses[port], keys.public, port)
            assert isinstance(refused, errors.NotAuthenticated)
        assert len(node.asked) == 1

    run(scenario)


def test_strangers_stay_out():
    """F35: an unknown key, no key, a revoked key and a wrong server key are refused at every port; nothing is asked."""

    async def scenario(node, allowed, keys):
        revoked = new_key_pair()
        allowed.allow(revoked.public, ["client", "peer", "bulk"])
        assert allowed.revoke(revoked.public)
        assert not allowed.revoke(revoked.public)
        for port, address in node.addresses.items():
            for identity in (Identity(keys=new_key_pair()), Identity(), Identity(keys=revoked)):
                assert isinstance(await ask(identity, address, keys.public, port), errors.NotAuthenticated)
            assert isinstance(await ask(Identity(), address, None, port), errors.Unreachable)
            wrong = await ask(Identity(), address, new_key_pair().public, port)
            assert isinstance(wrong, errors.Unreachable)
            assert "security" in str(wrong)
        assert node.asked == []
        assert allowed.refused == 9

    run(scenario)


def test_a_revoked_key_loses_its_connections():
    """F35: dropping a revoked key ends what stands, and a new connection is refused."""

    async def scenario(node, allowed, keys):
        guest = new_key_pair()
        allowed.allow(guest.public, ["client"])
        caller = Endpoint(Identity(keys=guest))
        try:
            channel = caller.channel(node.addresses["client"], server_key=keys.public)
            await channel.request(Echo(), timeout_s=20)
            allowed.revoke(guest.public)
            assert node.endpoint.drop(guest.public) == 1
            await until(lambda: not channel.connected)
            with pytest.raises(errors.NotAuthenticated):
                await channel.request(Echo(), timeout_s=20)
        finally:
            await caller.close()

    run(scenario)


def test_nobody_comes_in_while_nobody_decides():
    """F35: with the handler dead, even an allowed key is refused: it fails closed."""

    async def scenario(node, allowed, keys):
        guest = new_key_pair()
        allowed.allow(guest.public, ["client"])
        node.endpoint._zap.close()
        assert isinstance(await ask(Identity(keys=guest), node.addresses["client"], keys.public), errors.Error)
        assert isinstance(await ask(Identity(keys=new_key_pair()), node.addresses["client"], keys.public), errors.Error)
        assert node.asked == []

    run(scenario)


def test_keys_without_an_authenticator_let_nobody_in():
    """F35: an endpoint with keys and no allow-list refuses everybody."""

    async def scenario():
        keys = new_key_pair()
        node = Node(Endpoint(Identity(keys=keys)))
        try:
            await node.listen("client")
            found = await ask(Identity(keys=new_key_pair()), node.addresses["client"], keys.public)
            assert isinstance(found, errors.NotAuthenticated)
        finally:
            await node.endpoint.close()

    asyncio.run(scenario())


def test_the_start_up_proof(monkeypatch):
    """F35: the self-test passes as things are, and fails when a stranger would come in or an allowed key would not."""
    asyncio.run(security.prove_closed())
    real = probe.try_handshake

    async def open_door(keys, admit):
        return await real(keys, admit) or admit is None

    async def shut_door(keys, admit):
        return False

    for broken, which in ((open_door, "handler dead"), (shut_door, "an allowed key")):
        monkeypatch.setattr(probe, "try_handshake", broken)
        with pytest.raises(errors.NotAuthenticated, match=which):
            asyncio.run(security.prove_closed())


def test_the_start_up_proof_notices_missing_enforcement(monkeypatch):
    """F35: were the domain not enforced, as is ZeroMQ's default, the proof would say so."""
    real = sockets.bind

    def lax(context, port, address, **options):
        socket = real(context, port, address, **options)
        if port == "zap":
            return socket
        where = socket.getsockopt(zmq.LAST_ENDPOINT)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 0)
        socket.unbind(where)
        socket.bind("tcp://127.0.0.1:*")
        return socket

    monkeypatch.setattr(sockets, "bind", lax)
    with pytest.raises(errors.NotAuthenticated, match="handler dead"):
        asyncio.run(security.prove_closed())


def test_one_function_makes_bound_sockets():
    """Every bound socket of the room that uses ZeroMQ comes from `sockets.bind`, with a domain and enforcement."""
    package = Path(sockets.__file__).parent
    found = [
        (path.name, line.strip())
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"\.bind(_to_random_port)?\(", line) and "sockets.bind(" not in line
    ]
    assert found == [("sockets.py", "socket.bind(address)")]
    context = sockets.new_context()
    for port in ("client", "peer", "bulk"):
        for keys in (None, new_key_pair()):
            bound = sockets.bind(context, port, "tcp://127.0.0.1:*", keys=keys)
            assert bound.getsockopt(zmq.ZAP_DOMAIN).strip(b"\0")
            assert bound.getsockopt(zmq.ZAP_ENFORCE_DOMAIN) == 1
            assert bound.getsockopt(zmq.MAXMSGSIZE) == sockets.FRAME_BYTES_MAX[port]
            assert bound.getsockopt(zmq.HANDSHAKE_IVL) == 2000
            bound.close(0)
    context.term()


def test_refusals_are_logged_but_not_for_ever(caplog):
    """F33: a thousand refusals are a few lines, each with port, address and key."""
    allowed = security.AllowList()
    stranger = new_key_pair().public
    with caplog.at_level(logging.WARNING, "srengine.security"):
        for _ in range(1000):
            assert not allowed.admit("client", "192.0.2.7", stranger)
    assert 1 <= len(caplog.records) <= 10
    assert stranger.hex() in caplog.text
    assert "192.0.2.7" in caplog.text
    assert allowed.refused == 1000


def test_streams_over_curve():
    """Bulk over CURVE arrives as without it."""

    async def scenario(node, allowed, keys):
        guest = new_key_pair()
        allowed.allow(guest.public, ["bulk"])
        caller = Endpoint(Identity(keys=guest))
        try:
            channel = caller.channel(node.addresses["bulk"], port="bulk", server_key=keys.public)
            sizes = [len(item) async for item in channel.stream(Count(20, 1_000_000), timeout_s=20)]
            assert sizes == [1_000_000] * 20
        finally:
            await caller.close()

    run(scenario)


def write_list(directory, text):
    directory.chmod(0o700)
    path = directory / "allowed"
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_the_allow_list_file(tmp_path):
    """keys/allowed: a key, its ports, perhaps a name; comments and empty lines."""
    one, two = new_key_pair().public, new_key_pair().public
    path = write_list(tmp_path, f"# comment\n\n{one.hex()} client reporting\n{two.hex()}  client,peer,bulk  # node-2\n")
    allowed = security.load_allow_list(path)
    assert len(allowed) == 2
    assert allowed.name_of(one) == "reporting"
    assert allowed.admit("client", "", one)
    assert not allowed.admit("peer", "", one)
    assert allowed.admit("bulk", "", two)
    assert not allowed.admit("client", "", None)


@pytest.mark.parametrize(
    "line", ["abc client", "00" * 32, "00" * 32 + " door", "00" * 32 + " client name more", "\x00"]
)
def test_bad_lines_are_named(tmp_path, line):
    """A wrong line is InvalidValue with its number; nothing of the file is used."""
    path = write_list(tmp_path, f"# first\n{line}\n")
    with pytest.raises(errors.InvalidValue, match="line 2"):
        security.load_allow_list(path)
