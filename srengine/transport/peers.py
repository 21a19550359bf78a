"""Who talks to whom: identity, peer, keys, and what the rest of the program hands to the transport."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import msgspec

from srengine import errors
from srengine.codec import frames
from srengine.transport.messages import Hello

Port = Literal["client", "peer", "bulk"]
Buffer = bytes | bytearray | memoryview

FEATURES: frozenset[str] = frozenset({"attachments", "posts", "streams"})
"""What this version of the transport can do; rooms add theirs to `Identity.features`."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair, 32 raw bytes each. The secret never shows up in a rendering."""

    public: bytes
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.public) != 32 or len(self.secret) != 32:
            raise errors.InvalidValue("a CURVE key has 32 bytes")


@dataclass(frozen=True, slots=True)
class Identity:
    """What this process says of itself. Clients leave ids and name None; without ``keys`` connections are not
    encrypted.

    ``features`` are offered; ``required`` must be offered by every peer.
    """

    node_id: str | None = None
    name: str | None = None
    cluster_id: str | None = None
    keys: KeyPair | None = None
    features: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    version: str = ""
    boot_nonce: bytes = field(default_factory=lambda: secrets.token_bytes(8))

    def hello(self) -> Hello:
        """Return the words for a new connection."""
        return Hello(
            version=self.version,
            cluster_id=self.cluster_id,
            node_id=self.node_id,
            name=self.name,
            boot_nonce=self.boot_nonce,
            features=tuple(sorted(self.features | FEATURES)),
            required=tuple(sorted(self.required)),
        )


@dataclass(frozen=True, slots=True)
class Peer:
    """The other side of one connection as it introduced itself. Only ``public_key`` is proved (by CURVE)."""

    node_id: str | None
    name: str | None
    cluster_id: str | None
    public_key: bytes | None
    features: frozenset[str]
    address: str
    port: str
    boot_nonce: bytes = b""
    version: str = ""
    protocol: int = frames.PROTOCOL_VERSION


class Reply(NamedTuple):
    """An answer: a message, and raw bytes beside it."""

    message: msgspec.Struct
    attachments: Sequence[Buffer] = ()


Handler = Callable[[Peer, "msgspec.Struct", Sequence[memoryview]], Awaitable[Reply]]
StreamHandler = Callable[[Peer, "msgspec.Struct"], AsyncIterator[Buffer]]
PostHandler = Callable[[Peer, "msgspec.Struct"], None]


class Authenticator(Protocol):
    """Decides who may connect, before the first byte of a frame is read. Named here, implemented in
    `srengine.security`.
    """

    def admit(self, port: str, address: str, public_key: bytes | None) -> bool:
        """Return whether a connection may be made.

        ``address`` is the peer's IP address ("" on ipc); ``public_key`` has 32 bytes, or None without CURVE. Called on
        the event loop for each handshake: it must not block.
        """
        ...


def meet(mine: Identity, theirs: Hello, address: str, port: str, public_key: bytes | None) -> Peer:
    """Return the peer that said ``theirs``, or raise why we do not talk to it.

    `ForeignData` when both belong to clusters and not to the same; `UnsupportedFeature`, naming both sides, when no
    protocol version is common or the peer requires a feature that is not offered here.
    """
    ours = mine.hello()
    if theirs.protocol < ours.protocol_min or theirs.protocol_min > ours.protocol:
        raise errors.UnsupportedFeature(
            f"the peer speaks protocol {theirs.protocol_min} to {theirs.protocol} "
            f"(version {theirs.version or 'unknown'}), "
            f"this side {ours.protocol_min} to {ours.protocol} (version {ours.version or 'unknown'})",
            theirs=[theirs.protocol_min, theirs.protocol],
            ours=[ours.protocol_min, ours.protocol],
        )
    _check_required("the peer", theirs, "this side", ours)
    _check_required("this side", ours, "the peer", theirs)
    if mine.cluster_id is not None and theirs.cluster_id is not None and mine.cluster_id != theirs.cluster_id:
        raise errors.ForeignData(
            f"{address} belongs to cluster {theirs.cluster_id[:64]}, not to {mine.cluster_id}",
            theirs=theirs.cluster_id[:64],
            ours=mine.cluster_id,
        )
    return Peer(
        node_id=theirs.node_id,
        name=theirs.name,
        cluster_id=theirs.cluster_id,
        public_key=public_key,
        features=frozenset(theirs.features),
        address=address,
        port=port,
        boot_nonce=theirs.boot_nonce,
        version=theirs.version,
        protocol=min(theirs.protocol, ours.protocol),
    )


def _check_required(who: str, asking: Hello, whom: str, offering: Hello) -> None:
    missing = sorted(set(asking.required) - set(offering.features))
    if missing:
        raise errors.UnsupportedFeature(
            f"{who} (protocol {asking.protocol}, version {asking.version or 'unknown'}) "
            f"requires {', '.join(missing[:8])}, "
            f"which {whom} (protocol {offering.protocol}, version {offering.version or 'unknown'}) does not have",
            missing=missing[:8],
            theirs=[offering.protocol, offering.version],
            ours=[asking.protocol, asking.version],
        )
