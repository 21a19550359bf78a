"""From the journal in etcd into the agreed state: entries that the mirror delivers, applied in order, many at a time.

What was proposed here waits for its outcome (`expect`); what others want to follow is kept for a while (`recent`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from srengine import errors, limits
from srengine.ha.backends.etcd_journal import EtcdEntry
from srengine.ha.journal import Command, decode_command
from srengine.ha.metadata import Applying, MetadataMachine
from srengine.ha.outcomes import Outcome

GROUP_ENTRIES_MAX: Final = 512
"""Entries of one durable transaction."""
WAITING_BYTES_MAX: Final = 8 * limits.MIB
"""Delivered and not applied; beyond it etcd waits."""
RECENT_BYTES_MAX: Final = 4 * limits.MIB
RECENT_ENTRIES_MAX: Final = 4096
ENTRY_OVERHEAD_BYTES: Final = 200
FULL_RETRY_S: Final = 1.0


class EtcdApplying:
    """`run` in a task. ``applied`` is called after each transaction, ``stuck`` when the disk takes nothing."""

    def __init__(
        self, machine: MetadataMachine, *, applied: Callable[[], None], stuck: Callable[[errors.Error], None]
    ) -> None:
        self._machine = machine
        self._told = applied
        self._stuck = stuck
        self._closed = False
        self._index = machine.applied_index
        self._waiting: deque[EtcdEntry] = deque()
        self._waiting_bytes = 0
        self._moved = asyncio.Condition()
        self._expected: dict[int, asyncio.Future[Outcome]] = {}
        self._recent: deque[tuple[int, Command, int]] = deque()
        self._recent_bytes = 0

    @property
    def index(self) -> int:
        """Index of the last applied entry."""
        return self._index

    def expect(self, index: int) -> asyncio.Future[Outcome]:
        """Return what the entry at ``index`` will come to; call it before the entry can be applied."""
        assert index > self._index, (index, self._index)
        assert index not in self._expected, index
        future = self._expected[index] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: self._expected.pop(index, None))
        return future

    async def deliver(self, entries: Sequence[EtcdEntry]) -> None:
        """Take the next entries; waits while too much waits already."""
        async with self._moved:
            await self._wait(lambda: self._waiting_bytes < WAITING_BYTES_MAX)
            self._waiting.extend(entries)
            self._waiting_bytes += sum(len(entry.data) + ENTRY_OVERHEAD_BYTES for entry in entries)
            self._moved.notify_all()

    async def _wait(self, condition: Callable[[], bool]) -> None:
        await self._moved.wait_for(lambda: self._closed or condition())
        if self._closed:
            raise errors.Closed("this node follows the journal no more")

    async def run(self) -> None:
        """Apply until cancelled; raises what the store raises, but waits for a full disk to have room again."""
        while True:
            async with self._moved:
                await self._moved.wait_for(lambda: self._waiting)
                group = [self._waiting.popleft() for _ in range(min(len(self._waiting), GROUP_ENTRIES_MAX))]
            commands = [_command(entry) for entry in group]
            outcomes = await self._apply(
                [Applying(entry.index, entry.term, command) for entry, command in zip(group, commands, strict=True)]
            )
            self._keep(group, commands)
            for entry, outcome in zip(group, outcomes, strict=True):
                future = self._expected.get(entry.index)
                if future is not None and not future.done():
                    future.set_result(outcome)
            await self._move(group[-1].index, sum(len(entry.data) + ENTRY_OVERHEAD_BYTES for entry in group))

    async def _apply(self, group: list[Applying]) -> list[Outcome]:
        while True:
            try:
                return await asyncio.to_thread(self._machine.apply_all, group)
            except errors.DiskFull as error:
                self._stuck(error)
                await asyncio.sleep(FULL_RETRY_S)

    def _keep(self, group: Sequence[EtcdEntry], commands: Sequence[Command]) -> None:
        for entry, command in zip(group, commands, strict=True):
            size = len(entry.data) + ENTRY_OVERHEAD_BYTES
            self._recent.append((entry.index, command, size))
            self._recent_bytes += size
        while self._recent_bytes > RECENT_BYTES_MAX or len(self._recent) > RECENT_ENTRIES_MAX:
            self._recent_bytes -= self._recent.popleft()[2]

    async def _move(self, index: int, bytes_done: int) -> None:
        async with self._moved:
            self._index = index
            self._waiting_bytes -= bytes_done
            self._moved.notify_all()
        self._told()

    def recent(self, first: int) -> list[tuple[int, Command]] | None:
        """Return the applied entries from ``first`` on; None when they are not kept here."""
        if first > self._index:
            return []
        if not self._recent or first < self._recent[0][0]:
            return None
        skipped = first - self._recent[0][0]
        return [(index, command) for index, command, _ in list(self._recent)[skipped:]]

    async def reach(self, index: int) -> None:
        """Return when ``index`` is applied."""
        async with self._moved:
            await self._wait(lambda: self._index >= index)

    async def settle(self) -> None:
        """Return when everything delivered is applied."""
        async with self._moved:
            await self._wait(lambda: not self._waiting_bytes)

    async def replaced(self) -> int:
        """Take note that the whole state was replaced (nothing was waiting); return its index."""
        assert not self._waiting_bytes, self._waiting_bytes
        self._recent.clear()
        self._recent_bytes = 0
        await self._move(self._machine.applied_index, 0)
        return self._index

    async def close(self) -> None:
        """Tell whoever waits that nothing comes any more."""
        async with self._moved:
            self._closed = True
            self._moved.notify_all()
        for future in list(self._expected.values()):
            if not future.done():
                future.set_exception(errors.Closed("the journal is closed; whether the command will stand is unknown"))
                future.exception()  # whoever waited may be gone


def _command(entry: EtcdEntry) -> Command:
    try:
        return decode_command(entry.data)
    except errors.FrameError as error:
        raise errors.CorruptionError(
            f"entry {entry.index} in etcd is whole but no command: {error.message}", index=entry.index
        ) from error
