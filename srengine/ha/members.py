"""Members of the cluster: names, addresses and the identity that each name has now; an applier of the journal.

A member is named at bootstrap (``--initial``) and stays. Its directory may be lost: then another random node id, with a
higher *incarnation*, takes the name, and whoever holds the old id is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from srengine import errors, types
from srengine.ha.metadata import Store, Tables

MEMBER_TABLE: Final = "members"
CLUSTER_TABLE: Final = "cluster"
BOOTSTRAP: Final = "ha.bootstrap"
IDENTIFY: Final = "ha.identify"
_CLUSTER: Final = b"cluster"


class Member(msgspec.Struct, frozen=True):
    """One member. ``address``: client port. ``node_id`` is empty until the node has shown itself; ``number``: its place
    in ``--initial``, 0 leads.
    """

    name: str
    address: str
    number: int
    node_id: str = ""
    incarnation: int = 0
    public_key: str = ""
    role: str = "follower"


class Cluster(msgspec.Struct, frozen=True):
    """Name and id of the cluster; minted once."""

    cluster_id: str
    name: str


class Bootstrap(msgspec.Struct, frozen=True):
    """The first entry of every journal."""

    cluster: Cluster
    members: tuple[Member, ...]


class Identify(msgspec.Struct, frozen=True):
    """A member shows itself with an id that is not the recorded one."""

    name: str
    node_id: str


class MembersApplier:
    """Applies `Bootstrap` and `Identify`."""

    kinds: Sequence[str] = (BOOTSTRAP, IDENTIFY)
    tables: Sequence[str] = (MEMBER_TABLE, CLUSTER_TABLE)

    def apply(self, tables: Tables, index: int, kind: str, body: bytes) -> None:
        """See `metadata.Applier`."""
        if kind == BOOTSTRAP:
            self._bootstrap(tables, index, msgspec.msgpack.decode(body, type=Bootstrap))
        else:
            self._identify(tables, msgspec.msgpack.decode(body, type=Identify))

    def _bootstrap(self, tables: Tables, index: int, command: Bootstrap) -> None:
        if index != 1:
            raise errors.Conflict("the cluster exists already", index=index)
        types.check_name(command.cluster.name, "cluster")
        for member in command.members:
            tables.put(MEMBER_TABLE, types.check_name(member.name, "node").encode(), msgspec.msgpack.encode(member))
        tables.put(CLUSTER_TABLE, _CLUSTER, msgspec.msgpack.encode(command.cluster))

    def _identify(self, tables: Tables, command: Identify) -> None:
        stored = tables.get(MEMBER_TABLE, command.name.encode())
        if stored is None:
            raise errors.NotFound(f"{command.name} is no member", name=command.name)
        member = msgspec.msgpack.decode(stored, type=Member)
        if member.node_id == command.node_id:
            return
        changed = msgspec.structs.replace(member, node_id=command.node_id, incarnation=member.incarnation + 1)
        tables.put(MEMBER_TABLE, command.name.encode(), msgspec.msgpack.encode(changed))


def read_members(store: Store) -> list[Member]:
    """Return the members in the order of ``--initial``."""
    members = [msgspec.msgpack.decode(value, type=Member) for _, value in store.scan(MEMBER_TABLE)]
    return sorted(members, key=lambda member: member.number)


def read_cluster(store: Store) -> Cluster | None:
    """Return the cluster, None before the bootstrap."""
    stored = store.get(CLUSTER_TABLE, _CLUSTER)
    return None if stored is None else msgspec.msgpack.decode(stored, type=Cluster)
