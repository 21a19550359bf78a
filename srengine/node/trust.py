"""Whether this node's directory is what the node last wrote, and what follows when it is not.

The signs come from three sides: the identity file (a copy, see identity.py), the metadata store (an older state, see
`Trust.open`), and peers that have seen a later run. A distrusted directory is used, but counts for nothing, until the
journal is current and every tablet's copy was proved; then it is trusted again. docs/decisions/0013-restored-disks.md
has the reasons.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from srengine import errors, limits
from srengine.ha.roster_machine import Process, Verdict
from srengine.node.identity import raised
from srengine.sync.slots import Standing

if TYPE_CHECKING:
    from srengine.node.runtime import Runtime

_logger = logging.getLogger(__name__)

NODE_TABLE: Final = "node"
"""Local, in no digest: ``boot`` -> the boot number that was last written here."""
_BOOT: Final = b"boot"
LOOK_AGAIN_S: Final = 0.2
PROVE_TIMEOUT_S: Final = 5.0


class Trust:
    """What the directory is worth. ``standing`` is shared with the tablets' slots, which read it."""

    def __init__(self, node: Runtime) -> None:
        self._node = node
        self._refused_since: float | None = None
        self.standing = Standing(0, 0, distrusted=False)

    def open(self) -> None:
        """Begin this run: its boot number becomes durable, in the identity and in the metadata store."""
        node = self._node
        stored = node.metadata.get(NODE_TABLE, _BOOT)
        written = 0 if stored is None else int.from_bytes(stored, "little")
        identity = node.identity
        if identity.boot_number == 0:
            identity = replace(identity, boot_number=1)
        elif written < identity.stamped:
            node.alarm(
                "metadata_restored", f"meta/ is of start {written}, the node of {identity.stamped}: an older state"
            )
            identity = replace(identity, stamped=identity.boot_number, distrusted=True)
        node.adopt(identity)
        self._write_boot_number()
        if identity.distrusted:
            node.alarm(
                "directory_distrusted",
                f"{node.options.data} was copied or put back to an older state: nothing counts until it is proved",
            )
        self.standing = Standing(identity.boot_number, identity.stamped, identity.distrusted)

    def compare_log(self, written: int) -> None:
        """Take note of the boot number that the log of groups carries: one below the stamped is an older state."""
        stamped = self._node.identity.stamped
        if written < stamped:
            self.distrust_state(f"log/ is of start {written}, the node of {stamped}")

    def distrust_state(self, reason: str) -> None:
        """Take note, before coordination starts, that log and state are not what this node last wrote."""
        node = self._node
        if self.standing.distrusted:
            return
        node.alarm("log_restored", f"{node.options.data} is an older state: {reason}")
        node.adopt(replace(node.identity, stamped=node.identity.boot_number, distrusted=True))
        self.standing.stamped = node.identity.stamped
        self.standing.distrusted = True

    def opened(self) -> None:
        """Every tablet is open, and those that are trusted carry this run's boot number: older states show from here
        on.
        """
        node = self._node
        if self.standing.distrusted:
            node.supervisor.spawn(self._regain(), "regain trust")
            return
        node.adopt(replace(node.identity, stamped=node.identity.boot_number))
        self.standing.stamped = node.identity.stamped

    def trusted(self) -> bool:
        """Return whether the directory counts."""
        return not self.standing.distrusted

    def _write_boot_number(self) -> None:
        with self._node.metadata.transaction() as transaction:
            transaction.put(NODE_TABLE, _BOOT, self._node.identity.boot_number.to_bytes(8, "little"))

    # --- what peers say ----------------------------------------------------------------------------------------------

    def restored(self, seen: Process) -> None:
        """Take note that a replica knows a later run of this node: the directory was put back."""
        self._distrust(seen.boot_number, f"start {seen.boot_number} of this node was seen by others")

    def refused(self, verdict: Verdict, highest: int) -> None:
        """Take note that the leader would not have this process."""
        node = self._node
        # NB: an older directory may have been accepted by a peer whose own one is older, too.
        restored = verdict is Verdict.STALE_BOOT and self.standing.distrusted
        if node.contact.accepted and not restored:
            node.supervisor.fail(
                errors.Conflict(f"another process runs as {node.name} ({node.identity.node_id}); this one stops")
            )
            return
        if verdict is Verdict.STALE_BOOT:
            if highest >= node.identity.boot_number:
                self._distrust(highest, f"start {highest} of this node was seen by {node.first}")
            return
        now = node.clock.boottime_s()
        if self._refused_since is None:
            self._refused_since = now
        if now - self._refused_since > limits.DUPLICATE_PATIENCE_S:
            node.supervisor.fail(
                errors.Conflict(
                    f"another process runs as {node.name}; this directory is a copy or a second start of it"
                )
            )

    def _distrust(self, highest: int, reason: str) -> None:
        node = self._node
        node.alarm("directory_restored", f"{node.options.data} is an older state: {reason}")
        node.adopt(raised(node.identity, highest))
        node.copied = True
        self._write_boot_number()
        before = self.standing.distrusted
        self.standing.boot_number = node.identity.boot_number
        self.standing.stamped = node.identity.stamped
        self.standing.distrusted = True
        node.distrust_groups(reason)
        if not before:
            node.supervisor.spawn(self._regain(), "regain trust")

    # --- and back ----------------------------------------------------------------------------------------------------

    async def _regain(self) -> None:
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            if await self._proved():
                break
        node = self._node
        self.standing.distrusted = False
        self.standing.stamped = node.identity.boot_number
        node.copied = False
        node.adopt(replace(node.identity, stamped=node.identity.boot_number, distrusted=False))
        _logger.info("the directory is proved and trusted again", extra={"event": "directory_trusted"})

    async def _proved(self) -> bool:
        """Return whether this node has applied all that was acknowledged, and every tablet that should be here was
        proved.
        """
        node = self._node
        try:
            await node.wait_catalog(PROVE_TIMEOUT_S)
        except (errors.NoQuorum, errors.TimedOut):
            return False
        slots = [leader.slot for leader in node.sync.leaders.values()]
        slots += [follower.slot for follower in node.sync.followers.values()]
        expected = {
            tablet.id for table in node.tables.values() for tablet in table.tablets if node.name in tablet.nodes
        }
        return all(slot.trusted for slot in slots) and expected == {slot.spec.tablet_id for slot in slots}
