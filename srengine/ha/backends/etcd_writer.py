"""What a leader writes: commands of one leadership, in order, one transaction at a time, many commands in each.

A writer exists from the moment its epoch is applied until its leadership ends, however that happens. It knows where the
journal ends because nobody else may append under its term; it stops for good at the first answer that says otherwise.

What becomes of a command:

=====================================  =========================================================================
appended and applied                   its outcome; a refusal is raised
leadership ended before it was sent    `errors.StaleEpoch`: it was not done and never will be
sent, and no answer within the lease   `errors.TimedOut`: unknown; the same request may be proposed again
=====================================  =========================================================================
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from srengine import errors, limits
from srengine.clock import Clock
from srengine.ha.backends.etcd_applying import ENTRY_OVERHEAD_BYTES, EtcdApplying
from srengine.ha.backends.etcd_journal import BATCH_ENTRIES_MAX, PART_BYTES, EtcdJournal
from srengine.ha.journal import Command, encode_command
from srengine.ha.outcomes import Outcome

WAITING_BYTES_MAX: Final = 64 * limits.MIB
"""Commands that wait to be written; beyond it proposers wait."""

assert WAITING_BYTES_MAX >= 2 * limits.JOURNAL_ENTRY_BYTES_MAX, WAITING_BYTES_MAX


@dataclass(slots=True)
class _Waiting:
    data: bytes
    outcome: asyncio.Future[Outcome]

    @property
    def bytes(self) -> int:
        return len(self.data) + ENTRY_OVERHEAD_BYTES


class EtcdWriter:
    """Commands of (``term``, ``epoch``); the journal ends at ``head``. `run` in a task.

    ``lease_until``: moment (boottime) up to which this node believes in its lease. ``lost`` is called, once, when the
    leadership turns out to be over.
    """

    def __init__(
        self,
        journal: EtcdJournal,
        applying: EtcdApplying,
        *,
        term: int,
        epoch: int,
        head: int,
        clock: Clock,
        lease_until: Callable[[], float],
        lost: Callable[[str], None],
    ) -> None:
        self.term = term
        self.epoch = epoch
        self._journal = journal
        self._applying = applying
        self._head = head
        self._clock = clock
        self._lease_until = lease_until
        self._lost = lost
        self._queue: deque[_Waiting] = deque()
        self._bytes = 0
        self._moved = asyncio.Condition()
        self._sending: list[_Waiting] = []
        self._closed = ""
        """Why, once it is."""
        self.ended = asyncio.Event()

    @property
    def head(self) -> int:
        """Index of the last entry of the journal."""
        return self._head

    def propose(self, command: Command) -> Command:
        """Return the command as it will be written; `errors.StaleEpoch` if it states another epoch."""
        if command.epoch not in {0, self.epoch}:
            raise errors.StaleEpoch(
                f"{command.kind} was proposed in epoch {command.epoch}, the newest is {self.epoch}",
                epoch=command.epoch,
                newest=self.epoch,
            )
        return msgspec.structs.replace(command, epoch=self.epoch)

    async def write(self, command: Command) -> Outcome:
        """Return what the command came to when it is applied here; see the module's table."""
        data = encode_command(self.propose(command))
        if len(data) > limits.JOURNAL_ENTRY_BYTES_MAX:
            raise errors.InvalidValue(f"a command of {len(data)} bytes is too large", bytes=len(data))
        waiting = _Waiting(data, asyncio.get_running_loop().create_future())
        async with self._moved:
            await self._moved.wait_for(lambda: self._closed or self._bytes < WAITING_BYTES_MAX)
            self._check_open()
            self._queue.append(waiting)
            self._bytes += waiting.bytes
            self._moved.notify_all()
        return await waiting.outcome

    def _check_open(self) -> None:
        if self._closed:
            raise errors.StaleEpoch(f"epoch {self.epoch} is over here: {self._closed}", epoch=self.epoch)

    async def run(self) -> None:
        """Write until the leadership ends."""
        while True:
            async with self._moved:
                await self._moved.wait_for(lambda: self._closed or self._queue)
                self._sending = self._batch()
            if not self._sending:
                return  # closed: nothing waits any more
            await self._send()

    def _batch(self) -> list[_Waiting]:
        """Take what fits in one transaction off the queue: one command at least."""
        batch: list[_Waiting] = []
        size = 0
        while self._queue and len(batch) < BATCH_ENTRIES_MAX:
            size += self._queue[0].bytes
            if batch and size > PART_BYTES:
                break
            batch.append(self._queue.popleft())
        return batch

    async def _send(self) -> None:
        batch = self._sending
        # The mirror may deliver and apply before the answer is here.
        outcomes = [self._applying.expect(index) for index in range(self._head + 1, self._head + len(batch) + 1)]
        try:
            await self._journal.append(
                self._head, self.term, [waiting.data for waiting in batch], deadline=self._deadline
            )
        except asyncio.CancelledError:
            for expected in outcomes:
                expected.cancel()
            raise
        except errors.Error as error:
            for expected in outcomes:
                expected.cancel()
            if not isinstance(error, errors.TimedOut):
                error = errors.StaleEpoch(f"epoch {self.epoch} is over here: {error.message}", epoch=self.epoch)
            self.close(str(error), sent=error)
            self._lost(str(error))
            return
        self._head += len(batch)
        for waiting, expected in zip(batch, outcomes, strict=True):
            _pass_on(expected, waiting.outcome)
        async with self._moved:
            self._sending = []
            self._bytes -= sum(waiting.bytes for waiting in batch)
            self._moved.notify_all()

    def _deadline(self) -> float:
        return self._clock.monotonic_s() + self._lease_until() - self._clock.boottime_s()

    async def drained(self) -> None:
        """Return when nothing waits to be written; those who propose meanwhile are written as well."""
        async with self._moved:
            await self._moved.wait_for(lambda: self._closed or not self._bytes)

    def close(self, reason: str, *, sent: errors.Error | None = None) -> None:
        """End it: what waits is refused; ``sent`` is what becomes of what was sent, unknown if there is none."""
        if self._closed:
            return
        self._closed = reason
        self.ended.set()
        unknown = errors.TimedOut(f"whether the command will stand is unknown: {reason}")
        for waiting in self._sending:
            _refuse(waiting.outcome, sent or unknown)
        for waiting in self._queue:
            _refuse(waiting.outcome, errors.StaleEpoch(f"epoch {self.epoch} is over here: {reason}", epoch=self.epoch))
        self._queue.clear()
        asyncio.get_running_loop().create_task(self._tell_closed())

    async def _tell_closed(self) -> None:
        async with self._moved:
            self._moved.notify_all()


def _refuse(outcome: asyncio.Future[Outcome], error: errors.Error) -> None:
    if not outcome.done():
        outcome.set_exception(error)
        outcome.exception()  # whoever waited may be gone


def _pass_on(source: asyncio.Future[Outcome], target: asyncio.Future[Outcome]) -> None:
    def done(finished: asyncio.Future[Outcome]) -> None:
        if target.done() or finished.cancelled():
            return
        error = finished.exception()
        if error is None:
            target.set_result(finished.result())
        else:
            target.set_exception(error)
            target.exception()

    source.add_done_callback(done)
