"""Somebody changes who belongs to a group: adds a machine, makes it count, takes one out, replaces a dead one."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from srengine.consensus.entries import Configuration
from srengine.types import NodeId
from tests.simulator.host import Host

if TYPE_CHECKING:
    from tests.simulator.world import World

VOTERS_MAX = 5


def propose_change(world: World, source: random.Random) -> bool:
    """Ask the leader of any group for a sensible change; sometimes for two at once, or with no regard to who leads."""
    group = source.choice(world.groups)
    host = _somebody(world, source, group)
    if host is None or host.process is None:
        return False
    now = host.newest_configuration(group)
    if not now.voters:
        return False
    changed = _change(world, source, group, now)
    if changed is not None and source.random() < 0.1:
        changed = _change(world, source, group, changed) or changed  # two steps: must be refused
    if changed is None or not world.may_become(group, changed):
        return False
    number = world.schedule.moment()
    world.trace.note(f"{host.id} {group} is asked for {changed.voters} {changed.learners}")
    host.process.change(group, changed, f"member.{number}".encode())
    return True


def _somebody(world: World, source: random.Random, group: str) -> Host | None:
    hosts = [host for host in world.hosts.values() if host.running and host.process is not None]
    leading = [host for host in hosts if host.epoch(group)]
    if leading:
        return source.choice(leading)
    return source.choice(hosts) if hosts and source.random() < 0.2 else None


def _change(world: World, source: random.Random, group: str, now: Configuration) -> Configuration | None:
    """Return a configuration one step away."""
    voters, learners = set(now.voters), set(now.learners)
    dead = [node for node in now.nodes if world.host_of(node) is None]
    strangers = [host.id for host in world.hosts.values() if host.id not in voters | learners]
    steps: list[tuple[set[NodeId], set[NodeId]]] = []
    for node in dead:
        steps += [(voters - {node}, learners - {node})] * 3
    for node in strangers:
        steps += [(voters, learners | {node})] * 2
    for node in sorted(learners - set(dead)):
        if len(voters) < VOTERS_MAX:
            steps += [(voters | {node}, learners - {node})] * 3
        steps.append((voters, learners - {node}))
    if len(voters) > 1:
        for node in sorted(voters - set(dead)):
            steps += [(voters - {node}, learners), (voters - {node}, learners | {node})]
    if not steps:
        return None
    chosen_voters, chosen_learners = source.choice(steps)
    if not chosen_voters:
        return None
    return Configuration(tuple(sorted(chosen_voters)), tuple(sorted(chosen_learners)))
