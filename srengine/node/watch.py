"""Looks at what runs out: space on the disk, room in the journal's queue, time to the other members.

Every `WATCH_S` each is measured, put into a metric, and compared with its bound (an option of the node). What is beyond
it is an alarm, said again once a minute while it stays so.

=================================  =============================================================  ==================
metric                             what                                                           bound (option)
=================================  =============================================================  ==================
``srengine_node_disk_free_bytes``  free space of the data directory's file system                 ``disk_free_min``
``srengine_ha_waiting``            proposals and reads of this node that wait for their end       ``waiting_max``
``srengine_node_rtt_seconds``      a question to each other member and its answer {peer}          ``rtt_s_max``
``srengine_node_sleeps``           how often the event loop has slept, see loop.py
``srengine_node_busy_waits``       how often it has waited busily
=================================  =============================================================  ==================
"""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING, Final

from srengine import errors
from srengine.ha.backends.raft import RaftBackend
from srengine.ha.messages import JOURNAL_GROUP, Ping
from srengine.node.loop import waits_of

if TYPE_CHECKING:
    from srengine.node.runtime import Runtime

WATCH_S: Final = 2.0
PING_TIMEOUT_S: Final = 2.0


class Watch:
    """The watchman of one node."""

    def __init__(self, node: Runtime) -> None:
        self._node = node

    async def run(self) -> None:
        """Look around until cancelled."""
        while True:
            self._disk()
            self._queue()
            self._loop()
            others = [member.name for member in self._node.members if self._node.wire.connected(member.name)]
            await asyncio.gather(*(self._ping(name) for name in others))
            await asyncio.sleep(WATCH_S)

    def _disk(self) -> None:
        node = self._node
        free = shutil.disk_usage(node.options.data).free
        node.metrics.set("srengine_node_disk_free_bytes", free)
        if free < node.options.disk_free_min:
            node.alarm("disk_low", f"{node.options.data} has less than {node.options.disk_free_min} bytes left")

    def _queue(self) -> None:
        node = self._node
        if not isinstance(node.backend, RaftBackend):
            return
        waiting = node.backend.driver.status(JOURNAL_GROUP).waiting
        node.metrics.set("srengine_ha_waiting", waiting)
        if waiting > node.options.waiting_max:
            node.alarm("journal_busy", f"more than {node.options.waiting_max} proposals and reads wait")

    def _loop(self) -> None:
        waits = waits_of(asyncio.get_running_loop())
        if waits is not None:
            self._node.metrics.set("srengine_node_sleeps", waits[0])
            self._node.metrics.set("srengine_node_busy_waits", waits[1])

    async def _ping(self, name: str) -> None:
        node = self._node
        began = node.clock.monotonic_s()
        try:
            await node.ways[name].request(Ping(), timeout_s=PING_TIMEOUT_S)
        except (errors.Unreachable, errors.TimedOut, errors.Closed):
            # That a member is away is said by others; here only how long the way to it is.
            return
        took = node.clock.monotonic_s() - began
        node.metrics.set("srengine_node_rtt_seconds", took, peer=name)
        if took > node.options.rtt_s_max:
            node.alarm("peer_slow", f"{name} took longer than {node.options.rtt_s_max:g} s to answer")
