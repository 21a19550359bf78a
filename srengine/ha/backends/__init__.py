"""Backends of coordination by name: built-in ones, and those of other packages by entry point.

A backend is a callable that takes `Surroundings` and returns a `protocol.HAProtocol`, not started yet. ``raft`` and
``etcd`` are here; another package names its own in the entry point group ``srengine.ha``::

    [project.entry-points."srengine.ha"]
    mine = "my_package.coordination:Backend"

The names of the built-in ones cannot be taken. Modules are imported when their backend is asked for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from srengine import errors
from srengine.clock import Clock
from srengine.consensus.services import PostChannel
from srengine.ha.fencing import FencingOptions
from srengine.ha.group import AlarmSink, Spawn
from srengine.ha.metadata import MetadataMachine
from srengine.ha.protocol import ENTRY_POINTS, HAProtocol
from srengine.metrics import Metrics
from srengine.transport.peers import PostHandler
from srengine.types import NodeId

BUILT_IN: Final[Mapping[str, str]] = {
    "raft": "srengine.ha.backends.raft:RaftBackend",
    "etcd": "srengine.ha.backends.etcd:EtcdBackend",
}

Attachments = Sequence[bytes | bytearray | memoryview]
Answer = tuple[msgspec.Struct, Attachments]
Handler = Callable[[NodeId, msgspec.Struct, Attachments], Awaitable[Answer]]
"""Answer a message of a node (checked: it is the one that it says); an `errors.Error` travels to the asker."""
StreamHandler = Callable[[NodeId, msgspec.Struct], AsyncGenerator[bytes, None]]


class Wire(Protocol):
    """Ways between the nodes of a cluster, by node id; the node's endpoint behind it."""

    async def request(self, target: NodeId, message: msgspec.Struct, *, timeout_s: float) -> Answer:
        """Ask at the peer port. `Unreachable`, `TimedOut`, and what the handler raised."""
        ...

    def stream(self, target: NodeId, message: msgspec.Struct, *, timeout_s: float) -> AsyncGenerator[memoryview, None]:
        """Yield the items of a stream from the bulk port."""
        ...

    def serve(self, message_type: type[msgspec.Struct], handler: Handler) -> None:
        """Answer such messages of other nodes from now on."""
        ...

    def serve_stream(self, message_type: type[msgspec.Struct], handler: StreamHandler) -> None:
        """Answer such messages by a stream."""
        ...

    def serve_posts(self, message_type: type[msgspec.Struct], handler: PostHandler) -> None:
        """Hand on such posts of other nodes at the peer port."""
        ...

    def channel(self, node: NodeId) -> PostChannel | None:
        """Return the way for posts to a node; None while its address is not known."""
        ...

    def know(self, node_id: NodeId, name: str, address: str, public_key: str) -> None:
        """Learn where a node is (again: it moved). Members of the metadata tables are told as they change."""
        ...

    def forget(self, node_id: NodeId) -> None:
        """Drop the ways to a node that belongs to the cluster no more."""
        ...


@dataclass(frozen=True, slots=True)
class HAOptions:
    """Settings of coordination on this node, the same for every backend.

    ``settings``: of the backend alone, by its own names; unknown ones are refused by it (`InvalidValue`).
    """

    fencing: FencingOptions = field(default_factory=FencingOptions)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a backend is given.

    ``machine``: the agreed state; the backend alone applies to it, in order. ``data_dir``: the node's directory; a
    backend keeps what is its own in a directory with its name, or in ``log/``. ``spawn`` starts a task under the node's
    supervisor; ``alarm`` says what a person must see. ``trusted``: the directory is known not to be behind what this
    node once promised. ``insecure`` and ``allow_remote_fs``: for stores that the backend opens, as of
    `srengine.storage.MetadataStore`.
    """

    name: str
    node_id: NodeId
    address: str
    data_dir: Path
    machine: MetadataMachine
    wire: Wire
    clock: Clock
    spawn: Spawn
    alarm: AlarmSink
    metrics: Metrics
    options: HAOptions
    trusted: bool = False
    insecure: bool = False
    allow_remote_fs: bool = False


Factory = Callable[[Surroundings], HAProtocol]


def names() -> list[str]:
    """Return the names of all backends that can be asked for, sorted."""
    return sorted({*BUILT_IN, *(point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS))})


def find_backend(name: str) -> Factory:
    """Return a backend by its name.

    Raises `InvalidValue` for an unknown one, one that two packages claim, or one that cannot be loaded.
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        factory: Factory = getattr(importlib.import_module(module), attribute)
        return factory
    points = {point.value: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name)}
    if not points:
        raise errors.InvalidValue(f"there is no backend {name[:80]!r}; known: {', '.join(names())}", name=name[:80])
    if len(points) > 1:
        raise errors.InvalidValue(f"two packages offer a backend {name!r}: {', '.join(sorted(points))}", name=name)
    (point,) = points.values()
    try:
        loaded = point.load()
    except (ImportError, AttributeError) as error:
        raise errors.InvalidValue(f"the backend {name} ({point.value}) cannot be loaded: {error}") from error
    if not callable(loaded):
        raise errors.InvalidValue(f"the backend {name} ({point.value}) is not callable", name=name)
    found: Factory = loaded
    return found
