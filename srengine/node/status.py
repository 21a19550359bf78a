"""What status shows: the answers of all nodes put together into the JSON of docs/cli.md (State)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srengine import errors
from srengine.ha import epochs
from srengine.ha.members import read_membership
from srengine.sync.messages import ReplicaState, ReplicaStatesReply

if TYPE_CHECKING:
    from srengine.node.runtime import Runtime

_ORDER = ("SYNCED", "SYNCING", "SEEDING", "STALE", "UNKNOWN")
States = Mapping[str, "ReplicaStatesReply | None"]


def directory_bytes(path: Path) -> int:
    """Return the bytes that the files below ``path`` take on the disk; files that vanish meanwhile count nothing."""
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                total += (Path(directory) / name).lstat().st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def cluster_status(node: Runtime, states: States, chosen: str = "") -> dict[str, Any]:
    """Return the cluster at a glance; ``chosen``: of one node only."""
    if chosen and chosen not in states:
        raise errors.NotFound(f"there is no node {chosen}", name=chosen)
    journal_head = max((told.journal_index for told in states.values() if told is not None), default=0)
    observed = node.backend.observed
    nodes = []
    for member in node.members:
        if chosen and member.name != chosen:
            continue
        told = states.get(member.name)
        nodes.append(
            {
                "name": member.name,
                "id": told.node_id if told is not None else member.node_id,
                "address": node.address_of(member.name),
                "role": member.role,
                "state": told.state if told is not None else "UNKNOWN",
                "alive": told is not None,
                "ready": told is not None and told.ready,
                "why_not_ready": told.why if told is not None else "it does not answer",
                "stable": member.stable,
                "journal_lag": journal_head - told.journal_index if told is not None else None,
                "sync": _worst(told),
                "disk_used": told.disk_used if told is not None else None,
                "disk_free": told.disk_free if told is not None else None,
                "alarms": list(told.alarms) if told is not None else [],
            }
        )
    return {
        "cluster": {"id": node.identity.cluster_id, "name": node.identity.cluster_name},
        "leader": observed.leader,
        "epoch": epochs.newest_epoch(node.machine.store)[0],
        "term": observed.term,
        "membership_version": read_membership(node.machine.store).version,
        "config_version": 0,
        "nodes": nodes,
        "tables": _tables(node, states),
    }


def _worst(told: ReplicaStatesReply | None) -> str:
    if told is None:
        return "STALE"
    return max((replica.state for replica in told.replicas), key=_ORDER.index, default="SYNCED")


def _tables(node: Runtime, states: States) -> list[dict[str, Any]]:
    by_tablet: dict[str, list[ReplicaState]] = {}
    for told in states.values():
        for replica in told.replicas if told is not None else ():
            by_tablet.setdefault(replica.tablet, []).append(replica)
    tables = []
    for name in sorted(node.tables):
        table = node.tables[name]
        records = under = 0
        for tablet in table.tablets:
            replicas = by_tablet.get(tablet.id, [])
            # The leader's count, or that of the replica that is furthest when the leader does not answer.
            best = max(replicas, key=lambda each: (each.node == each.leader, each.sequence), default=None)
            records += best.live_count if best is not None else 0
            under += sum(each.state == "SYNCED" for each in replicas) < table.replicas
        tables.append(
            {
                "name": name,
                "tablets": len(table.tablets),
                "replicas": table.replicas,
                "records": records,
                "under_replicated": under,
            }
        )
    return tables


def replica_status(node: Runtime, states: States, table: str = "") -> list[dict[str, Any]]:
    """Return one object for each replica of each tablet, also of nodes that do not answer."""
    found: dict[tuple[str, str], ReplicaState] = {}
    for told in states.values():
        for replica in told.replicas if told is not None else ():
            found[replica.tablet, replica.node] = replica
    rows: list[dict[str, Any]] = []
    for name in sorted(node.tables):
        if table and name != table:
            continue
        for tablet in node.tables[name].tablets:
            leader = found.get((tablet.id, tablet.leader))
            for member in tablet.nodes:
                here = found.get((tablet.id, member))
                rows.append(_row(name, tablet.number, tablet.id, member, tablet.leader, here, leader))
    return rows


def _row(
    table: str,
    number: int,
    tablet_id: str,
    member: str,
    leader: str,
    replica: ReplicaState | None,
    led: ReplicaState | None,
) -> dict[str, Any]:
    row: dict[str, Any] = {"table": table, "tablet": number, "tablet_id": tablet_id, "node": member, "leader": leader}
    if replica is None:
        return row | {
            "term": 1,
            "state": "UNKNOWN",
            "sequence": None,
            "behind": None,
            "root": None,
            "count": None,
            "verified_at": None,
            "bytes_received": None,
            "bytes_received_total": None,
            "path": None,
            "reason": "the node does not answer",
            "scrubbed_at": None,
            "scrub_records": None,
            "repairs": None,
            "quarantined": [],
        }
    behind = max(0, led.sequence - replica.sequence) if led is not None else replica.behind
    return row | {
        "term": replica.term,
        "state": replica.state,
        "sequence": replica.sequence,
        "behind": behind,
        "root": replica.root.hex(),
        "count": replica.count,
        "verified_at": replica.verified_at or None,
        "bytes_received": replica.bytes_received,
        "bytes_received_total": replica.bytes_received_total,
        "path": replica.path,
        "reason": replica.reason,
        "scrubbed_at": replica.scrubbed_at or None,
        "scrub_records": replica.scrub_records,
        "repairs": replica.repairs,
        "quarantined": list(replica.quarantined),
    }
