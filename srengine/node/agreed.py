"""What this node shows of the agreed state: members and tables, as of an index of the journal.

The metadata machine applies entries to rows; this module follows it: reads members and tables again after every entry
that may have changed them, tells the ways where members are, and opens the tablets that have a replica here. `index`
never runs ahead of what is shown.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from srengine import errors
from srengine.cluster import catalog
from srengine.ha.epochs import FENCE
from srengine.ha.members import Member, read_members, read_membership, read_tickets
from srengine.ha.protocol import HAProtocol
from srengine.ha.registers import REGISTER_PUT
from srengine.ha.tables import Store
from srengine.node.wire import NodeWire
from srengine.types import NodeId

_logger = logging.getLogger(__name__)

LOOK_AGAIN_S: Final = 1.0
"""However quiet the journal is, what is shown is compared with what is applied this often: a whole state may have
come.
"""

_SHOWN_ELSEWHERE: Final = frozenset({FENCE, REGISTER_PUT})
"""Commands that change neither members nor tables."""


class Tablets(Protocol):
    """Who opens tablets: `sync.SyncService`."""

    async def open_tables(self, tables: Sequence[catalog.Table]) -> None:
        """Open every tablet that has a replica here and is not open yet."""
        ...


class Agreed:
    """Members and tables of the cluster, on this node."""

    def __init__(self, store: Store, backend: HAProtocol, wire: NodeWire, expect: Callable[[str, str], None]) -> None:
        """``expect(name, public_key)``: a node that may join has this key."""
        self._expect = expect
        self._store = store
        self._backend = backend
        self._wire = wire
        self.members: list[Member] = []
        self.tables: dict[str, catalog.Table] = {}
        self.index = 0
        self._version = -1
        """Of the membership that ``members`` shows."""
        self._known: set[NodeId] = set()
        self._reading = asyncio.Lock()
        self._changed = asyncio.Condition()

    # --- reading -----------------------------------------------------------------------------------------------------

    def read_members(self) -> None:
        """Read the members, unless they are the same as before, and tell the ways where they are."""
        version = read_membership(self._store).version
        if version == self._version:
            return
        self._version = version
        self.members = read_members(self._store)
        now = {NodeId(member.node_id) for member in self.members if member.node_id}
        for member in self.members:
            if member.node_id:
                self._wire.know(NodeId(member.node_id), member.name, member.address, member.public_key)
        for gone in self._known - now:
            self._wire.forget(gone)
        self._known = now

    async def refresh(self, tablets: Tablets) -> None:
        """Show what is applied by now."""
        async with self._reading:
            index = self._backend.applied_index
            if index == self.index:
                return
            self.read_members()
            for ticket in read_tickets(self._store):
                self._expect(ticket.name, ticket.public_key)
            tables = await asyncio.to_thread(catalog.read_tables, self._store)
            await tablets.open_tables(tables)
            async with self._changed:
                self.tables = {table.name: table for table in tables}
                self.index = index
                self._changed.notify_all()

    async def follow(self, tablets: Tablets) -> None:
        """Refresh after every applied entry, until cancelled."""
        following = self.index + 1
        while True:
            try:
                async for _, command in self._backend.subscribe(following):
                    if command.kind not in _SHOWN_ELSEWHERE:
                        await self.refresh(tablets)
            except errors.BelowPurgeMark as gone:
                # Entries were trimmed, or a whole state was installed: what is applied holds them.
                await self.refresh(tablets)
                following = int(gone.details.get("floor", self.index)) + 1

    async def look_again(self, tablets: Tablets) -> None:
        """Refresh now and then, until cancelled: entries that nobody is told of (a whole state) count too."""
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            await self.refresh(tablets)

    # --- waiting -----------------------------------------------------------------------------------------------------

    async def wait_current(self, tablets: Tablets, timeout_s: float) -> None:
        """Return when what is shown here holds all that was acknowledged before the call. Raises as `read_barrier`."""
        index = await self._backend.read_barrier(timeout_s=timeout_s)
        if self.index < index:
            await self.refresh(tablets)

    async def wait_for_table(self, name: str, timeout_s: float) -> None:
        """Return when the table is shown here and its tablets are open; `TimedOut`."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: name in self.tables)
        except TimeoutError:
            raise errors.TimedOut(f"table {name} is not known here yet", name=name) from None

    # --- asking ------------------------------------------------------------------------------------------------------

    def member(self, name: str) -> Member | None:
        """Return a member by name."""
        return next((member for member in self.members if member.name == name), None)

    def by_id(self, node_id: str) -> Member | None:
        """Return a member by id."""
        return next((member for member in self.members if member.node_id == node_id), None)

    @property
    def first(self) -> str:
        """Name of the first member, which leads every tablet for now; empty before anything is known."""
        return self.members[0].name if self.members else ""
