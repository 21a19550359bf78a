"""The journal's state machine as consensus sees it: committed entries in, copies of the whole state in and out.

`JournalState` applies entries in the driver's apply thread; `StateCopies` serves and fetches copies. A copy is written
to a file first on both sides: the sender must not hold flushes back while a slow receiver reads, and the receiver
proves all of it before it touches what it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from srengine import errors, failpoints
from srengine.consensus.entries import Configuration, Entry, EntryKind, Floor
from srengine.ha import state
from srengine.ha.journal import Command, decode_command
from srengine.ha.members import membership_row, read_members
from srengine.ha.membership import configuration_of
from srengine.ha.messages import FetchState
from srengine.ha.metadata import Applying, MetadataMachine
from srengine.types import NodeId

if TYPE_CHECKING:
    from srengine.ha.backends import Wire

COPIES_NAME: Final = "copies"
"""Directory for files on their way; emptied at every start."""
SILENCE_S_MAX: Final = 10.0
"""A stream of state that brings nothing for so long is given up."""


ENTRIES_NOW_MAX: Final = 64
"""Entries applied on the event loop at a time: some milliseconds."""


class JournalState:
    """See `consensus.services.StateMachine`."""

    def __init__(self, machine: MetadataMachine) -> None:
        self.machine = machine
        self._membership: bytes | None = b""
        """Row of the membership that ``_configuration`` is made of; not one of any before the first look."""
        self._configuration = Configuration()
        self._visible = self._applied = self._floor(*self.machine.applied)
        self._changing = threading.Lock()
        """Held by whoever changes the state."""
        self._flushing = threading.Lock()
        """Held by whoever flushes or replaces it; after ``_changing``."""

    def _floor(self, index: int, term: int) -> Floor:
        membership = membership_row(self.machine.store)
        if membership != self._membership:
            self._configuration = configuration_of(read_members(self.machine.store))
            self._membership = membership
        return Floor(index, term, self._configuration)

    @property
    def applied(self) -> Floor:
        """See `consensus.services.StateMachine`."""
        return self._applied

    @property
    def visible_index(self) -> int:
        """Up to where readers see entries; `applied` follows with the next flush."""
        return self._visible.index

    def apply(self, entries: Sequence[Entry]) -> None:
        """See `consensus.services.StateMachine`."""
        failpoints.hit("journal.apply")
        with self._changing:
            self.machine.show_all(self._not_held(entries))
            self._visible = self._floor(entries[-1].index, entries[-1].term)

    def apply_now(self, entries: Sequence[Entry]) -> bool:
        """See `consensus.services.StateMachine`."""
        # The failpoint stands for a disk that does not give a row back; here none is asked for one.
        if len(entries) > ENTRIES_NOW_MAX or failpoints.planned("journal.apply"):
            return False
        if not self._changing.acquire(blocking=False):
            return False
        try:
            shown = self.machine.show_from_memory(self._not_held(entries))
            if shown:
                self._visible = self._floor(entries[-1].index, entries[-1].term)
            return shown
        finally:
            self._changing.release()

    def _not_held(self, entries: Sequence[Entry]) -> list[Applying]:
        # A state that was repaired may be ahead of what consensus has handed out.
        held = self.machine.applied_index
        return [
            Applying(entry.index, entry.term, _command(entry), entry.kind is EntryKind.CONFIGURATION)
            for entry in entries
            if entry.index > held
        ]

    def flush(self) -> None:
        """See `consensus.services.StateMachine`."""
        with self._flushing:
            visible = self._visible  # entries may be applied meanwhile
            if self.machine.flush():
                self._applied = visible

    def install(self, path: Path) -> Floor:
        """Put a copy in place; in the apply thread."""
        failpoints.hit("journal.apply")
        with self._changing, self._flushing:
            self.machine.install(path)
            self._visible = self._applied = self._floor(*self.machine.applied)
            return self._applied

    def replace(self, path: Path) -> None:
        """Put the right state in place of a wrong one, at the index of this node or a later one; in any thread."""
        with self._changing, self._flushing:
            self.machine.install(path)


def _command(entry: Entry) -> Command | None:
    """Return an entry's command; None for the first of a term. What cannot be read is a command that nobody applies."""
    if not entry.data:
        return None
    try:
        return decode_command(entry.data)
    except errors.FrameError:
        return Command("unreadable", b"")


class StateCopies:
    """Serves the state to others, and fetches it (`consensus.services.StateSink`)."""

    def __init__(self, directory: Path, journal: JournalState, wire: Wire) -> None:
        self._directory = directory
        self._journal = journal
        self._wire = wire
        self._serving = asyncio.Lock()
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(mode=0o700)

    def _path(self) -> Path:
        return self._directory / secrets.token_hex(8)

    async def serve(self, node: NodeId, message: msgspec.Struct) -> AsyncGenerator[bytes, None]:
        """Answer `FetchState`: one copy is written at a time."""
        del node
        assert isinstance(message, FetchState), message
        path = self._path()
        machine = self._journal.machine
        try:
            async with self._serving:
                if machine.applied_index < message.index:
                    raise errors.NotReady(f"this node has applied {machine.applied_index} only", index=message.index)
                await asyncio.to_thread(machine.export, path)
            with contextlib.closing(state.read_file(path)) as items:
                while (item := await asyncio.to_thread(next, items, None)) is not None:
                    yield item
        finally:
            path.unlink(missing_ok=True)

    async def fetch(self, source: NodeId, floor: Floor, reference: bytes) -> Callable[[], Floor]:
        """See `consensus.services.StateSink`."""
        del reference
        path = await self._fetch(source, floor)

        def put() -> Floor:
            try:
                return self._journal.install(path)
            finally:
                path.unlink(missing_ok=True)

        return put

    async def replace(self, source: NodeId, index: int) -> None:
        """Fetch the state of a node at ``index`` or later, and put it in place of the own one, which is wrong."""
        path = await self._fetch(source, Floor(index, 0))
        try:
            await asyncio.to_thread(self._journal.replace, path)
        finally:
            path.unlink(missing_ok=True)

    async def _fetch(self, source: NodeId, floor: Floor) -> Path:
        path = self._path()
        try:
            stream = self._wire.stream(source, FetchState(floor.index), timeout_s=SILENCE_S_MAX)
            with path.open("xb") as file:
                async with contextlib.aclosing(stream) as items:
                    async for item in items:
                        await asyncio.to_thread(state.write_item, file, bytes(item))
            described = await asyncio.to_thread(state.check_file, path, self._journal.machine.tables)
            _check_place(described, floor)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path


def _check_place(described: state.Described, floor: Floor) -> None:
    other_term = described.index == floor.index and floor.term not in {0, described.term}
    if described.index < floor.index or other_term:
        raise errors.SnapshotDamaged(
            f"a state at index {described.index}, term {described.term} came for {floor.index}, {floor.term}"
        )
