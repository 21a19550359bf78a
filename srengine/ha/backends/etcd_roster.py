"""The members as this node's agreed state has them: who is who, whether this node still is one; the wire is told."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from srengine import errors
from srengine.ha.members import Member, RemovedMember, find_removed, read_members, was_removed
from srengine.types import NodeId

if TYPE_CHECKING:
    from srengine.ha.backends import Surroundings

_logger = logging.getLogger(__name__)


class EtcdRoster:
    """`read` after every change of the agreed state.

    ``members``: in the order of joining; ``own``: this node, None while it is no member; ``removed``: set for ever once
    the state says that it was removed.
    """

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._rows = around.machine.store
        self.members: list[Member] = []
        self.own: Member | None = None
        self.removed: RemovedMember | None = None

    def read(self) -> None:
        """Take the members over, and tell the wire where they are."""
        members = read_members(self._rows)
        if members == self.members:
            return
        before, self.members = self.members, members
        self.own = next((member for member in members if member.node_id == self._around.node_id), None)
        removed = None if self.own is not None else find_removed(self._rows, self._around.node_id)
        if removed is not None and self.removed is None:
            self.removed = removed
            _logger.error(
                "this node was removed in epoch %d",
                removed.epoch,
                extra={"event": "removed", "epoch": removed.epoch, "index": removed.index},
            )
            self._around.alarm("removed", f"this node was removed from the cluster in epoch {removed.epoch}")
        there = {member.node_id for member in members}
        for member in members:
            if member.node_id and member.node_id != self._around.node_id and member not in before:
                self._around.wire.know(NodeId(member.node_id), member.name, member.address, member.public_key)
        for member in before:
            if member.node_id and member.node_id not in there:
                self._around.wire.forget(NodeId(member.node_id))

    def find(self, name: str) -> Member:
        """Return a member by its name; `MemberNotFound`."""
        for member in self.members:
            if member.name == name:
                return member
        raise errors.MemberNotFound(f"{name[:128]} is no member", name=name[:128])

    def by_id(self, node_id: str) -> Member | None:
        """Return a member by its id, None without one."""
        return next((member for member in self.members if member.node_id == node_id), None)

    def check_sender(self, node: NodeId) -> None:
        """Refuse a node that was removed, and tell it so."""
        removed = find_removed(self._rows, node)
        if removed is not None:
            raise was_removed(removed)
