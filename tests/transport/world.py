"""A node with services and a caller, over ZeroMQ or in memory, for the tests of this room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec

from srengine import errors
from srengine.codec import registry
from srengine.transport import Endpoint, Identity, Reply
from srengine.transport.memory import Network


class Echo(msgspec.Struct, frozen=True):
    """Answered by itself with the same attachments; some words have a meaning."""

    text: str = ""
    data: bytes = b""


class Count(msgspec.Struct, frozen=True):
    """Ask for a stream of ``items`` of ``size`` bytes; -1: no end."""

    items: int = 0
    size: int = 0
    fail_at: int = -1


registry.register("transport_test.echo", Echo)
registry.register("transport_test.count", Count)


@dataclass
class Node:
    """An endpoint that serves `Echo` and `Count`, and what it was asked."""

    endpoint: Endpoint
    addresses: dict[str, str] = field(default_factory=dict)
    asked: list[Echo] = field(default_factory=list)
    streamed: int = 0
    streams_closed: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def echo(self, peer, message, attachments):
        self.asked.append(message)
        match message.text:
            case "fail":
                raise errors.Conflict("the version is another", current_version=7)
            case "bug":
                raise RuntimeError("a secret of the node")
            case "wait":
                await self.gate.wait()
            case "who":
                return Reply(Echo(f"{peer.name}/{peer.port}", peer.public_key or b""))
            case "grow":
                return Reply(Echo(), [bytes(int(message.data))])
            case "no reply":
                return None
        return Reply(message, attachments)

    async def count(self, peer, message):
        try:
            number = 0
            while number != message.items:
                if number == message.fail_at:
                    raise errors.NotFound("no more of them", number=number)
                yield number.to_bytes(4, "big") + bytes(max(0, message.size - 4))
                number += 1
                self.streamed += 1
                await asyncio.sleep(0)
        finally:
            self.streams_closed += 1

    async def listen(self, *ports: str) -> None:
        self.endpoint.serve(Echo, self.echo, ports=("client", "peer", "bulk"))
        self.endpoint.serve_stream(Count, self.count)
        for port in ports:
            self.addresses[port] = await self.endpoint.listen(port, "tcp://127.0.0.1:0")

    def port(self, name: str) -> int:
        return int(self.addresses[name].rpartition(":")[2])


@dataclass
class World:
    node: Node
    caller: Endpoint
    network: Network | None


@asynccontextmanager
async def world(kind: str = "zmq", **options) -> AsyncIterator[World]:
    """Yield a node that listens at its three ports, and a caller; close both. ``options`` are the node's endpoint's."""
    network = Network(seed=1) if kind == "memory" else None
    make = network.endpoint if network is not None else Endpoint
    node = Node(make(Identity(node_id="1" * 32, name="node-1", cluster_id="c" * 32), **options))
    caller = make(Identity(name="caller"))
    try:
        await node.listen("client", "peer", "bulk")
        yield World(node, caller, network)
    finally:
        node.gate.set()
        await caller.close()
        await node.endpoint.close()


async def until(condition, seconds: float = 20.0) -> None:
    """Wait until ``condition()`` holds; fail after a generous while."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it never happened"
        await asyncio.sleep(0.005)


def total(endpoint, name: str) -> float:
    """Return a counter's sum over its labels."""
    return sum(endpoint.metrics.snapshot().get(f"srengine_transport_{name}_total", {}).values())
