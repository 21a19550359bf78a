"""Coordination on this node: the backend that was chosen, the role that follows from it, and whether it may vote.

::

    options --ha NAME --> backend (ha/backends) --observe--> RoleService --open/close--> this module
                             |
                             +-- raft only: Claims (claims.py) asks the other voters whether this node may vote

What only the leader does (it makes voters of unstable nodes that have caught up, and ends tickets that nobody used) is
the backend's. What the node adds is admission: `epoch` is what this node acts for, 0 when it acts for nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from srengine import errors
from srengine.consensus.effects import Persist
from srengine.consensus.entries import HardState
from srengine.consensus.log import LOG_NAME, NodeLog
from srengine.ha import backends
from srengine.ha.backends.raft import RaftBackend, first_entry
from srengine.ha.fencing import FencingOptions
from srengine.ha.journal import Command
from srengine.ha.members import BOOTSTRAP, Bootstrap
from srengine.ha.messages import JOURNAL_GROUP, ClaimVote
from srengine.ha.protocol import HAProtocol, Role
from srengine.ha.role_machine import Policy, RoleOptions
from srengine.ha.roles import RoleService
from srengine.node.claims import Claims
from srengine.types import NodeId

if TYPE_CHECKING:
    from srengine.node.runtime import Runtime

_logger = logging.getLogger(__name__)

HAND_OVER_S: Final = 5.0
REMOVED_LOOK_S: Final = 0.1


class Coordination:
    """Backend, role and claims of one node."""

    def __init__(self, node: Runtime) -> None:
        self._node = node
        self.epoch = 0
        options = node.options
        around = backends.Surroundings(
            name=node.name,
            node_id=NodeId(node.identity.node_id),
            address=node.advertised,
            data_dir=options.data,
            machine=node.machine,
            wire=node.wire,
            clock=node.clock,
            spawn=node.supervisor.spawn,
            alarm=node.alarm,
            metrics=node.metrics,
            trusted=False,
            options=backends.HAOptions(
                fencing=FencingOptions(options.fence_tries, options.fence_delay_s, options.fence_exponential),
                settings=settings_of(node),
            ),
        )
        self._begin_log()
        self.backend: HAProtocol = backends.find_backend(options.ha)(around)
        policy = Policy.EXIT if options.demotion == "exit" else Policy.DEMOTE
        self.roles = RoleService(
            self.backend,
            self,
            clock=node.clock,
            metrics=node.metrics,
            on_exit=node.supervisor.fail,
            options=RoleOptions(promotion=policy, demotion=policy, drain_s=options.transition_s_max),
        )
        self.claims: Claims | None = None

    def _make_claims(self) -> None:
        node = self._node
        if isinstance(self.backend, RaftBackend):
            self.claims = Claims(
                boot_number=lambda: node.identity.boot_number,
                distrusted=lambda: node.identity.distrusted,
                copied=lambda: node.copied,
                contact=node.contact,
                wire=node.wire,
                group=JournalVotes(self.backend),
                alarm=node.alarm,
                refused=node.trust.refused,
                foreign=node.supervisor.fail,
            )
            node.endpoint.serve(ClaimVote, self.claims.answer, ports=("peer",))

    def _begin_log(self) -> None:
        """Make the log fit the state and the identity: begun with the cluster's first entry, not older than either.

        What is older than it should be (put back, lost, or beside a state that was) is not refused: the node is
        distrusted, so it promises nothing before it has caught up, and fetches what it lacks. Blocks.
        """
        node = self._node
        if node.options.ha != "raft":
            return
        path = node.options.data / LOG_NAME
        index, term = node.machine.applied
        with self._open_log(path) as log:
            node.trust.compare_log(log.boot_number)
            group = log.group(JOURNAL_GROUP) if JOURNAL_GROUP in log.groups() else None
            promised = HardState() if group is None else group.hard_state
            gap = group is not None and group.floor.index > index
        if gap:
            # The state was lost or put back, and the log does not reach back to it: the leader sends a whole state.
            node.trust.distrust_state(f"the state ends at {index}, the log begins behind it")
            shutil.rmtree(path)
        if term > promised.term:
            node.trust.distrust_state(f"the state is of term {term}, the log of {promised.term}")
            promised = HardState(term)
        body = node.settling.first_entry()
        with self._open_log(path) as log:
            if JOURNAL_GROUP not in log.groups():
                whole = first_entry(Command(BOOTSTRAP, body)) if body and not gap else None
                log.bootstrap(JOURNAL_GROUP, whole)
            if log.group(JOURNAL_GROUP).hard_state.term < promised.term:
                log.append({JOURNAL_GROUP: Persist(promised)})
            log.note_boot(node.identity.boot_number)

    def _open_log(self, path: Path) -> NodeLog:
        options = self._node.options
        return NodeLog.open(path, insecure=options.insecure, allow_remote_fs=options.allow_remote_fs)

    async def _found_in_etcd(self) -> None:
        node = self._node
        body = node.settling.first_entry()
        if node.options.ha != "etcd" or not body:
            return
        from srengine.ha.backends.etcd_settings import EtcdSettings, found_cluster

        settings = EtcdSettings.read(settings_of(node))
        cluster_id = await found_cluster(settings.etcd, msgspec.msgpack.decode(body, type=Bootstrap))
        if cluster_id != node.identity.cluster_id:
            raise errors.ForeignData(
                f"in this etcd cluster {node.identity.cluster_name} is {cluster_id}, here {node.identity.cluster_id}",
                cluster_id=cluster_id,
            )

    async def start(self) -> None:
        """Begin to take part."""
        await self._found_in_etcd()
        await self.backend.start()
        self._make_claims()
        spawn = self._node.supervisor.spawn
        spawn(self.roles.run(), "role")
        spawn(self._end_when_removed(), "removal")
        if self.claims is not None:
            spawn(self.claims.run(), "claims")

    async def _end_when_removed(self) -> None:
        """Stop the node once the cluster has removed it."""
        # Looked at, not waited for: a removal is applied, or heard of from a peer, and changes nothing that is observed
        # when no leader was known anyway.
        while self.backend.removed is None:  # noqa: ASYNC110
            await asyncio.sleep(REMOVED_LOOK_S)
        self._node.supervisor.fail(self.backend.removed)

    @property
    def role(self) -> Role:
        """The role that status shows: LEADER only once this node may act."""
        return self.roles.role

    def distrust(self) -> None:
        """Take note that the directory is an older state: this node votes no more until it has caught up."""
        if self.claims is not None:
            self.claims.begin_again()

    async def hand_over(self) -> None:
        """Give leadership to another node before this one ends, if it has it and somebody can take it."""
        if self.backend.observed.role is not Role.LEADER:
            return
        with contextlib.suppress(errors.Error, TimeoutError):
            async with asyncio.timeout(HAND_OVER_S):
                leader = await self.backend.transfer_leader(timeout_s=HAND_OVER_S)
                _logger.info("%s leads now", leader, extra={"event": "leader_transferred", "leader": leader})

    async def stop(self) -> None:
        """Stop taking part."""
        await self.backend.stop()

    # --- roles.Leadership --------------------------------------------------------------------------------------------

    async def open(self, epoch: int) -> None:
        """See `roles.Leadership`."""
        self.epoch = epoch

    async def close(self) -> None:
        """See `roles.Leadership`."""
        self.epoch = 0

    async def drain(self) -> None:
        """See `roles.Leadership`: proposals that were begun end by themselves, in the backend."""

    async def drop(self) -> None:
        """See `roles.Leadership`: there is nothing that only a leader remembers here."""


class JournalVotes:
    """The journal's group, as `Claims` sees it."""

    def __init__(self, backend: RaftBackend) -> None:
        self._backend = backend

    @property
    def voters(self) -> tuple[NodeId, ...]:
        """See `claims.Group`."""
        return self._backend.machine.configuration.voters

    @property
    def promised(self) -> tuple[int, int]:
        """See `claims.Group`."""
        return self._backend.machine.term, self._backend.machine.last_index

    @property
    def held(self) -> tuple[int, int]:
        """See `claims.Group`."""
        return self._backend.machine.held

    def remembered(self, node: NodeId) -> tuple[int, int]:
        """See `claims.Group`. Only a leader knows what others acknowledged."""
        peer = self._backend.machine.progress.get(node)
        return (0, 0) if peer is None or not peer.match_index else (self._backend.machine.term, peer.match_index)

    def trust(self, *, trusted: bool, held: tuple[int, int] = (0, 0)) -> None:
        """See `claims.Group`."""
        self._backend.trust(trusted=trusted, held=held)


def settings_of(node: Runtime) -> dict[str, object]:
    """Return what the options say to the backend alone."""
    options = node.options
    match options.ha:
        case "raft":
            return {
                "heartbeat_s": options.heartbeat_s,
                "lease_s": options.lease_s,
                "election_s_min": options.election_s_min,
                "election_s_max": options.election_s_max,
                "unstable_grace_s": options.unstable_grace_s,
                "entries_kept": options.journal_kept,
            }
        case "etcd":
            servers = tuple(server.strip() for server in options.etcd.split(",") if server.strip())
            return {"servers": servers, "cluster_id": node.identity.cluster_id}
        case _:
            return {}
