"""The ports of a node and who may use them: keys, the list of those that are let in, the endpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from srengine import errors
from srengine.metrics import Metrics
from srengine.node.identity import Identity
from srengine.node.options import NodeOptions
from srengine.security import AllowList, ensure_node_keys, load_allow_list, prove_closed
from srengine.transport import Endpoint, Peer
from srengine.transport import Identity as TransportIdentity
from srengine.transport.addresses import stays_on_this_machine
from srengine.transport.peers import KeyPair, Port

ALL_PORTS: Final[tuple[Port, ...]] = ("client", "peer", "bulk")


class Ports:
    """Makes the endpoint; `listen` opens the three ports. ``admit`` looks at each peer behind its hello."""

    def __init__(
        self, options: NodeOptions, identity: Identity, metrics: Metrics, admit: Callable[[Peer], None]
    ) -> None:
        self.options = options
        self.keys: KeyPair | None = None
        self.allowed: AllowList | None = None
        self.addresses: dict[str, str] = {}
        """Real addresses, by port."""
        self._identity = identity
        self._metrics = metrics
        self._admit = admit

    async def open(self) -> Endpoint:
        """Prepare keys where they are needed; return the endpoint, which listens nowhere yet."""
        options = self.options
        listens = (options.listen, options.peer_listen, options.bulk_listen)
        routable = not all(stays_on_this_machine(address) for address in listens)
        keyed = any(member.public_key for member in options.initial) or "#" in options.join
        if keyed or (routable and not options.insecure):
            await prove_closed()
            self.keys = ensure_node_keys(options.data, insecure=options.insecure)
            allowed_file = options.data / "keys" / "allowed"
            self.allowed = (
                load_allow_list(allowed_file, insecure=options.insecure) if allowed_file.exists() else AllowList()
            )
            self.allow(options.name, self.keys.public.hex())
            for member in options.initial:
                if member.name == options.name and member.public_key not in {"", self.keys.public.hex()}:
                    raise errors.Conflict(f"--initial gives {options.name} another key than {options.data}/keys holds")
                self.allow(member.name, member.public_key)
        return Endpoint(
            self.transport_identity(self._identity),
            authenticator=self.allowed,
            admit=self._admit,
            insecure=options.insecure,
            metrics=self._metrics,
        )

    def allow(self, name: str, public_key: str) -> None:
        """Let a member in by its key, where keys are used."""
        if self.allowed is not None and public_key:
            self.allowed.allow(bytes.fromhex(public_key), ALL_PORTS, name)

    async def listen(self, endpoint: Endpoint) -> None:
        """Open the three ports; `AddressInUse`, `InvalidValue`."""
        options = self.options
        self.addresses["client"] = await endpoint.listen("client", options.listen)
        self.addresses["peer"] = await endpoint.listen("peer", options.peer_listen)
        self.addresses["bulk"] = await endpoint.listen("bulk", options.bulk_listen)

    def transport_identity(self, identity: Identity) -> TransportIdentity:
        """Return what this node says of itself on every connection."""
        return TransportIdentity(
            node_id=identity.node_id, name=identity.name, cluster_id=identity.cluster_id or None, keys=self.keys
        )

    @property
    def public_key(self) -> str:
        """The own public key in hexadecimal, empty where none is used."""
        return self.keys.public.hex() if self.keys is not None else ""
