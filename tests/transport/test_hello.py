"""Hello: the first words, checked on both sides, before anything else is read."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from srengine import errors
from srengine.codec import envelopes, frames
from srengine.transport import Endpoint, Identity, Reply
from srengine.transport.memory import Network
from srengine.transport.messages import Hello
from srengine.transport.peers import meet
from tests.transport.world import Echo, total, until, world


@pytest.fixture(params=["zmq", "memory"])
def kind(request):
    return request.param


def ask_with(kind, node_identity, caller_identity, admit=None):
    """Return what a request between two identities gives: the echo, or the error."""

    async def scenario():
        network = Network()
        make = network.endpoint if kind == "memory" else Endpoint
        node, caller = make(node_identity, admit=admit), make(caller_identity)

        async def echo(peer, message, attachments):
            return Reply(Echo(str(peer.node_id)))

        node.serve(Echo, echo)
        try:
            channel = caller.channel(await node.listen("client", "tcp://127.0.0.1:0"))
            return (await channel.request(Echo(), timeout_s=10)).message.text
        except errors.Error as error:
            return error
        finally:
            await caller.close()
            await node.close()

    return asyncio.run(scenario())


def test_another_cluster_is_foreign(kind):
    """A node of another cluster is refused on both sides as FOREIGN_DATA; a client without a cluster is welcome."""
    one, other = Identity(node_id="a", cluster_id="c1"), Identity(node_id="b", cluster_id="c2")
    error = ask_with(kind, one, other)
    assert isinstance(error, errors.ForeignData)
    assert {error.theirs, error.ours} == {"c1", "c2"}
    assert ask_with(kind, one, Identity()) == "None"
    assert ask_with(kind, one, Identity(node_id="b", cluster_id="c1")) == "b"
    assert ask_with(kind, Identity(node_id="a"), other) == "b"


def test_required_features(kind):
    """F44: a feature that one side requires and the other lacks refuses the connection, naming both versions."""
    plain = Identity(version="1.0")
    wants = Identity(version="2.0", required=frozenset({"future"}))
    for node, caller in ((plain, wants), (wants, plain)):
        error = ask_with(kind, node, caller)
        assert isinstance(error, errors.UnsupportedFeature)
        assert "future" in str(error)
        assert "1.0" in str(error)
        assert "2.0" in str(error)
    assert ask_with(kind, Identity(features=frozenset({"future"})), wants) == "None"


def test_the_node_may_refuse_a_peer(kind):
    """``admit`` sees each peer after its hello; its typed error reaches the caller."""

    def admit(peer):
        if peer.name == "removed":
            raise errors.Removed("removed in epoch 3", epoch=3)

    assert ask_with(kind, Identity(), Identity(name="welcome"), admit) == "None"
    error = ask_with(kind, Identity(), Identity(name="removed"), admit)
    assert isinstance(error, errors.Removed)
    assert error.epoch == 3


@pytest.mark.parametrize(("oldest", "newest", "meets"), [(1, 1, True), (1, 9, True), (2, 9, False), (0, 0, False)])
def test_protocol_versions_overlap_or_refuse(oldest, newest, meets):
    """F44: a common protocol version is needed; without one both ranges are named."""
    hello = Hello(protocol=newest, protocol_min=oldest, features=("attachments", "streams"))
    if meets:
        assert meet(Identity(), hello, "there", "peer", None).protocol == 1
        return
    with pytest.raises(errors.UnsupportedFeature) as caught:
        meet(Identity(), hello, "there", "peer", None)
    assert caught.value.theirs == [oldest, newest]
    assert caught.value.ours == [1, 1]


def test_nothing_is_read_before_hello():
    """A connection whose first frame is no hello is closed, and nothing was asked."""
    import zmq

    async def scenario():
        async with world() as found:
            context = zmq.Context()
            raw = context.socket(zmq.DEALER)
            raw.linger = 0
            try:
                raw.connect(found.node.addresses["client"])
                body = msgspec.Raw(msgspec.msgpack.encode(Echo("sneaked in")))
                raw.send_multipart(frames.pack([envelopes.Ask(1, "transport_test.echo", body)]))
                await until(lambda: total(found.node.endpoint, "frames_refused") == 1)
                assert found.node.asked == []
                channel = found.caller.channel(found.node.addresses["client"])
                await channel.request(Echo("honest"), timeout_s=10)
            finally:
                raw.close()
                context.term()

    asyncio.run(scenario())
