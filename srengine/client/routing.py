"""Which node to ask for what: endpoints as the user gave them, the catalog as some node told it, and redirects since.

Routes are hints. A wrong one costs a redirect or a retry, never a wrong answer, because every node checks for itself
whether it may answer. So nothing here expires by time: an entry is replaced when a node contradicts it.

Order of candidates::

    quorum, all     the tablet's leader, its other replicas, then any endpoint (each may forward or redirect)
    one             the tablet's replicas in random order, then any endpoint
    local           only the endpoints that the user gave, in that order: "local" is about that very node
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from typing import Final, Literal, get_args

import xxhash

from srengine import errors, limits
from srengine.client import messages

ReadConsistency = Literal["local", "one", "quorum", "all"]
WriteConsistency = Literal["quorum", "all"]
READ_CONSISTENCIES: Final[tuple[str, ...]] = get_args(ReadConsistency)
WRITE_CONSISTENCIES: Final[tuple[str, ...]] = get_args(WriteConsistency)

DEFAULT_ENDPOINT: Final = "tcp://127.0.0.1:7400"
_ENDPOINT: Final = re.compile(
    r"(?P<address>tcp://(?:\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})|(?:ipc|inproc|memory)://[^#\s,]+)"
    r"(?:#(?P<key>[0-9A-Fa-f]{64}))?",
    re.ASCII,
)


def parse_endpoints(endpoints: str | Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Return addresses in order, and the server key (hexadecimal) of those written ``tcp://host:port#HEXKEY``.

    ``endpoints``: one text, in which commas separate several, or several texts. `InvalidValue` names what is wrong.
    """
    texts = [endpoints] if isinstance(endpoints, str) else list(endpoints)
    addresses: list[str] = []
    keys: dict[str, str] = {}
    for text in (part.strip() for given in texts for part in given.split(",")):
        match = _ENDPOINT.fullmatch(text)
        if match is None or (match["port"] is not None and not 0 < int(match["port"]) < 65536):
            raise errors.InvalidValue(f"{text!r} is not an endpoint such as tcp://127.0.0.1:7400", endpoint=text)
        if match["address"] not in addresses:
            addresses.append(match["address"])
        if match["key"]:
            keys[match["address"]] = match["key"].lower()
    if len(addresses) > limits.ENDPOINTS_MAX:
        raise errors.InvalidValue(f"{len(addresses)} endpoints; at most {limits.ENDPOINTS_MAX} are tried")
    return addresses, keys


def tablet_of(key: bytes, tablets: int) -> int:
    """Return the index of the tablet that holds ``key`` among ``tablets``: XXH3-64(key, seed 0) mod tablets."""
    return xxhash.xxh3_64_intdigest(key, 0) % tablets


def check_read_consistency(consistency: str) -> str:
    """Return ``consistency`` if reads know it; `InvalidValue` otherwise."""
    return _check_consistency(consistency, READ_CONSISTENCIES, "read")


def check_write_consistency(consistency: str) -> str:
    """Return ``consistency`` if writes know it; `InvalidValue` otherwise."""
    return _check_consistency(consistency, WRITE_CONSISTENCIES, "write")


def _check_consistency(consistency: str, known: tuple[str, ...], what: str) -> str:
    if consistency not in known:
        raise errors.InvalidValue(f"{what} consistency {consistency!r} is none of {', '.join(known)}")
    return consistency


class Routes:
    """What the client knows about the cluster. Not thread-safe: it belongs to the client's loop."""

    def __init__(self, endpoints: Sequence[str], server_keys: dict[str, str]) -> None:
        assert endpoints, endpoints
        self.endpoints = list(endpoints)
        """Addresses as given by the user; the first that answered last stands first."""
        self.server_keys = dict(server_keys)
        """Address -> CURVE key of that node, hexadecimal; nodes of the catalog are added."""
        self.catalog: messages.ClusterInfoReply | None = None
        """None until some node has answered."""
        self._tables: dict[str, messages.TableInfo] = {}
        self._leaders: dict[tuple[str, int], str] = {}
        """Redirects learnt since the catalog was read."""

    def learn(self, catalog: messages.ClusterInfoReply) -> None:
        """Take over what a node told; an older catalog version than the known one is ignored."""
        if self.catalog is not None and self.catalog.cluster_id != catalog.cluster_id:
            raise errors.ForeignData(
                f"the endpoints belong to two clusters, {self.catalog.cluster_id} and {catalog.cluster_id}"
            )
        if self.catalog is not None and catalog.catalog_version < self.catalog.catalog_version:
            return
        self.catalog = catalog
        self._tables = {table.name: table for table in catalog.tables}
        self._leaders.clear()
        for node in catalog.nodes:
            if node.public_key:
                self.server_keys.setdefault(node.address, node.public_key)

    def table(self, name: str) -> messages.TableInfo | None:
        """Return the table as the catalog knows it, or None."""
        return self._tables.get(name)

    def add_table(self, table: messages.TableInfo) -> None:
        """Take over one table that a node described."""
        self._tables[table.name] = table

    def forget_leader(self, table: str, tablet: int) -> None:
        """Drop a redirect that led nowhere."""
        self._leaders.pop((table, tablet), None)

    def set_leader(self, table: str, tablet: int, address: str) -> None:
        """Remember a redirect."""
        self._leaders[table, tablet] = address

    def answered(self, address: str) -> None:
        """Put an endpoint that answers first, so that the next request does not begin with a dead one."""
        if self.endpoints[0] != address and address in self.endpoints:
            self.endpoints.remove(address)
            self.endpoints.insert(0, address)

    def anybody(self) -> list[str]:
        """Return every known address, the user's endpoints first."""
        nodes = [node.address for node in self.catalog.nodes] if self.catalog is not None else []
        return _unique([*self.endpoints, *nodes])

    def candidates(self, table: str, tablet: int, consistency: str) -> list[str]:
        """Return the addresses to try for one tablet, the best first; never empty."""
        if consistency == "local":
            return list(self.endpoints)
        known = self._tables.get(table)
        if known is None or tablet >= len(known.tablets):
            return self.anybody()
        info = known.tablets[tablet]
        replicas = list(info.replicas)
        if consistency == "one":
            random.shuffle(replicas)
            return _unique([*replicas, *self.anybody()])
        leader = self._leaders.get((table, tablet), info.leader)
        return _unique([leader, *replicas, *self.anybody()])


def _unique(addresses: Iterable[str]) -> list[str]:
    """Return the addresses in order, each once, without those that nobody can connect to (unknown, or port 0)."""
    return [address for address in dict.fromkeys(addresses) if address and not address.endswith(":0")]
