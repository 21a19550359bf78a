"""Settings of the backend ``etcd``, and how a cluster is founded and found there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from srengine import errors
from srengine.clock import SystemClock
from srengine.ha.backends.etcd_client import EtcdClient, EtcdOptions
from srengine.ha.backends.etcd_journal import EtcdJournal, EtcdPlace
from srengine.ha.backends.etcd_keys import Keys
from srengine.ha.journal import Command, encode_command
from srengine.ha.members import BOOTSTRAP, Bootstrap
from srengine.types import check_name

LEASE_S: Final = 3
"""Default time of a lease: longer than etcd takes to elect its own leader (1 to 2 s), so that this costs us none."""
LEASE_S_MIN: Final = 2
"""Etcd with its own defaults grants none that is shorter."""
LEASE_S_MAX: Final = 600
KEPT: Final = 10_000


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """Settings of the backend, by the names under which `HAOptions.settings` has them.

    ``cluster_id``: needed while the node's own state does not say it yet. ``kept``: entries that stay in etcd when the
    journal is trimmed. ``unstable_grace_s``: a follower that has caught up stays unstable for so long at least.
    ``catch_up_s``: how fast it must be to count as caught up.
    """

    etcd: EtcdOptions
    cluster_id: str = ""
    lease_s: int = LEASE_S
    kept: int = KEPT
    unstable_grace_s: float = 0.0
    catch_up_s: float = 1.0

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> EtcdSettings:
        """Check and return them; `errors.InvalidValue` for an unknown name or an impossible value."""
        known = {"servers", "user", "password", "ca_file", "cert_file", "key_file"}
        own = {"cluster_id", "lease_s", "kept", "unstable_grace_s", "catch_up_s"}
        unknown = sorted(set(settings) - known - own)
        if unknown:
            raise errors.InvalidValue(f"the etcd backend has no setting {unknown[0]!r}", name=unknown[0])
        servers = settings.get("servers", ())
        more = {name: value for name, value in settings.items() if name in known and name != "servers"}
        if isinstance(servers, str):
            options = EtcdOptions.parse(servers, **more)
        else:
            options = EtcdOptions(tuple(servers), **more)
        made = cls(options, **{name: value for name, value in settings.items() if name in own})
        if not isinstance(made.lease_s, int) or not LEASE_S_MIN <= made.lease_s <= LEASE_S_MAX:
            raise errors.InvalidValue(f"lease_s is {made.lease_s!r}; whole seconds, {LEASE_S_MIN} to {LEASE_S_MAX}")
        if not isinstance(made.kept, int) or made.kept < 1:
            raise errors.InvalidValue(f"kept is {made.kept!r}; 1 or more entries")
        for name, least in (("unstable_grace_s", 0.0), ("catch_up_s", 0.001)):
            value = getattr(made, name)
            if not isinstance(value, int | float) or not least <= value <= LEASE_S_MAX:
                raise errors.InvalidValue(f"{name} is {value!r}; seconds, {least:g} to {LEASE_S_MAX}")
        return made


async def found_cluster(options: EtcdOptions, bootstrap: Bootstrap, *, timeout_s: float = 10.0) -> str:
    """Found a cluster in etcd unless its name is taken; return the cluster id that the name has.

    When it is not that of ``bootstrap``, another node was first and nothing was changed: adopt the id that is returned,
    or refuse. All first members may call this at once, again and again.
    """
    client = EtcdClient(options)
    try:
        check_name(bootstrap.cluster.name, "cluster")
        place = EtcdPlace(client, Keys(bootstrap.cluster.cluster_id), "", "", SystemClock())
        journal = EtcdJournal(place)
        first = encode_command(Command(BOOTSTRAP, msgspec.msgpack.encode(bootstrap)))
        return await journal.bootstrap(bootstrap.cluster.name, first, timeout_s=timeout_s)
    finally:
        client.close()


async def find_cluster(options: EtcdOptions, name: str, *, timeout_s: float = 10.0) -> str | None:
    """Return the cluster id that a name has in etcd, None when it has none."""
    client = EtcdClient(options)
    try:
        found = (await client.range(Keys.name(check_name(name, "cluster")), timeout_s=timeout_s)).first
        return None if found is None else found.value.decode(errors="replace")
    finally:
        client.close()
