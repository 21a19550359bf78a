"""What a group's committed entries become: applied, visible, durable, trimmed; or a whole state in their place.

::

    committed entries --> to_apply --> StateMachine.apply   visible: proposals and reads end
                                            |
                                  a little later, or at once when there is much
                                            v
                                      StateMachine.flush    durable: the machine hears of it, the log is trimmed

    InstallState --> StateSink.fetch --> put, when everything before is applied --> the log begins behind it

What may take a disk's time runs in one thread, one job after the other: applying what memory alone cannot answer,
flushes, whole states. Everything else runs on the loop, few entries that need nothing but memory included: to hand them
to a thread and back would cost more than they do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Final, Protocol

from srengine import errors, limits
from srengine.consensus.effects import Applied, Input, Installed, InstallFailed, InstallState
from srengine.consensus.entries import Entry, Floor, bytes_of
from srengine.consensus.hosting import Group, typed
from srengine.consensus.log import TRIM_ROWS, NodeLog
from srengine.consensus.services import Bounds, Health
from srengine.consensus.worker import Done, Job, Worker
from srengine.metrics import Metrics

_logger = logging.getLogger(__name__)

APPLY_ENTRIES_MAX: Final = 1024
"""Entries handed to the state machine at a time."""
FLUSH_S: Final = 4.0
"""How long what the state machine shows may stay in memory: the log has it, and a start applies it again. In a shorter
time the disk, which the log waits for, would write the same rows again and again; a flush each second shows in the 99th
percentile of writes."""
FLUSH_BYTES: Final = 4 * limits.MIB
"""Entries of that size are flushed at once; less than the machine hands out before it waits."""
RETRY_S: Final = 0.5
"""Pause before a write that met a full disk is tried again, and before a state is fetched again."""


class Host(Protocol):
    """What this part needs of the driver."""

    stopped: bool

    def step(self, group: Group, arrived: Input) -> None:
        """Hand an input to the group's machine, in its turn."""
        ...

    def write(self, group: Group, job: Job, done: Done) -> None:
        """Run a job of a group on the log, in its turn."""
        ...

    def set_health(self, health: Health, error: errors.Error | None, *, of: str) -> None:
        """Say how the disk is under the state of the group ``of``."""
        ...

    def fail_group(self, group: Group, error: errors.Error) -> None:
        """End a group on this node, for this process."""
        ...


class Applying:
    """The state machines of all groups of a driver."""

    def __init__(
        self, host: Host, log: NodeLog, bounds: Bounds, metrics: Metrics, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._host = host
        self._log = log
        self._bounds = bounds
        self._metrics = metrics
        self._loop = loop
        self._tasks: set[asyncio.Task[None]] = set()
        self.worker = Worker("srengine-apply", loop)

    # --- applying ----------------------------------------------------------------------------------------------------

    def apply(self, group: Group) -> None:
        """Hand the next committed entries to the state machine, unless it works already."""
        if group.applying or group.failed is not None or self._host.stopped:
            return
        if not group.to_apply:
            if group.put is not None:
                group.put()
            return
        # How many bytes they may have is seen to by the machine, which hands out no more before some are durable.
        entries = [group.to_apply.popleft() for _ in range(min(len(group.to_apply), APPLY_ENTRIES_MAX))]
        first, last = entries[0].index, entries[-1].index
        assert (first, last) == (group.visible + 1, group.visible + len(entries)), (group.name, first, last)
        group.applying = True
        group.unflushed_bytes += bytes_of(entries)
        try:
            done = group.state.apply_now(entries)
        except Exception as error:  # noqa: BLE001  (judged there, as what the thread raises)
            self._applied(group, entries, error)
            return
        if done:
            self._applied(group, entries, None)
        else:
            self._submit_apply(group, entries)

    def _submit_apply(self, group: Group, entries: list[Entry]) -> None:
        if not self._host.stopped:
            self.worker.submit(lambda: group.state.apply(entries), lambda error: self._applied(group, entries, error))

    def _applied(self, group: Group, entries: list[Entry], error: BaseException | None) -> None:
        if self._host.stopped or group.failed is not None:
            return
        if isinstance(error, errors.DiskFull):
            self._host.set_health(Health.FULL, error, of=group.name)
            self._loop.call_later(RETRY_S, self._submit_apply, group, entries)
            return
        if error is not None:
            self._host.fail_group(group, typed(error, f"an entry of {group.name} cannot be applied"))
            return
        group.applying = False
        group.visible = entries[-1].index
        if group.waiting:
            for entry in entries:
                group.waiting.applied(entry)
            group.waiting.visible(group.visible)
        if group.on_visible is not None:
            group.on_visible(group.visible)
        if group.state.applied.index == group.visible:
            self._durable(group, advanced=True)
        else:
            self._plan_flush(group)
        self.apply(group)

    def _plan_flush(self, group: Group) -> None:
        """See to it that what is visible becomes durable, soon or at once."""
        if group.flushing:
            return
        if group.unflushed_bytes >= FLUSH_BYTES:
            self._flush(group)
        elif group.flush_timer is None:
            group.flush_timer = self._loop.call_later(FLUSH_S, self._flush, group)

    def _flush(self, group: Group) -> None:
        if group.flush_timer is not None:
            group.flush_timer.cancel()
            group.flush_timer = None
        before = group.state.applied.index
        if before < group.visible and not self._host.stopped and group.failed is None:
            group.flushing = True
            group.unflushed_bytes = 0
            self.worker.submit(group.state.flush, lambda error: self._flushed(group, before, error))

    def _flushed(self, group: Group, before: int, error: BaseException | None) -> None:
        group.flushing = False
        if self._host.stopped or group.failed is not None:
            return
        if isinstance(error, errors.DiskFull):
            self._host.set_health(Health.FULL, error, of=group.name)
            group.flush_timer = self._loop.call_later(RETRY_S, self._flush, group)
            return
        if error is not None:
            self._host.fail_group(group, typed(error, f"the state of {group.name} cannot be written"))
            return
        self._durable(group, advanced=group.state.applied.index > before)
        if group.state.applied.index < group.visible:
            self._plan_flush(group)

    def _durable(self, group: Group, *, advanced: bool) -> None:
        """Tell the machine how far the state is durable, and let the log go that is not needed for it any more.
        ``advanced``: the disk has just taken something.

        NB: a state that was put in place right after a flush may be there already; the machine hears of it later.
        """
        if advanced:
            self._host.set_health(Health.OK, None, of=group.name)
        self._host.step(group, Applied(min(group.state.applied.index, group.visible)))
        self._maybe_trim(group)

    # --- trims and installs ------------------------------------------------------------------------------------------

    def _maybe_trim(self, group: Group) -> None:
        """Trim the log behind what is applied durably, when more is kept than need be."""
        if group.trimming or group.installing or group.log.damage is not None:
            return
        log, bounds = group.log, self._bounds
        applied = min(group.state.applied.index, log.last_index)
        kept = applied - log.floor.index
        wanted = bounds.entries_kept
        if log.bytes > bounds.bytes_kept + bounds.bytes_kept // 8 and kept > 1:
            wanted = min(wanted, kept * bounds.bytes_kept // log.bytes)
        else:
            # Else who fetches the whole state would find, each time it has it, that what comes after it is gone.
            awaited = group.machine.awaited_index
            if awaited is not None:
                wanted = max(wanted, applied - awaited)
        # In steps, so that a trim is not one entry each time.
        if kept <= wanted + max(1, min(wanted // 10, 1000)):
            return
        group.trimming = True
        self._trim(group, applied - wanted)

    def _trim(self, group: Group, index: int) -> None:
        """Trim the log up to ``index`` in steps, between which others write it."""
        floor = group.log.floor_at(min(index, group.log.floor.index + TRIM_ROWS))

        def trimmed(error: BaseException | None) -> None:
            if error is None:
                group.inbox.appendleft(group.trimmed)
            if error is None and group.log.floor.index < index and not group.installing:
                self._trim(group, index)
            else:
                group.trimming = False

        self._host.write(group, lambda: self._log.trim(group.name, floor), trimmed)

    def install(self, group: Group, install: InstallState) -> None:
        """Fetch a whole state, and put it in place after everything that was handed out before."""
        assert not group.installing, (group.name, install)
        group.installing = True
        task = self._loop.create_task(self._fetch(group, install))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fetch(self, group: Group, install: InstallState) -> None:
        try:
            if group.sink is None:
                raise errors.NotFound(f"nothing here can fetch a state of {group.name}", group=group.name)
            put = await group.sink.fetch(install.source, install.floor, install.reference)
        except errors.Error as error:
            _logger.warning("the state of %s cannot be fetched: %s", group.name, error.message)
            await asyncio.sleep(RETRY_S)
            self._install_failed(group, install)
            return
        floors: list[Floor] = []

        def begin() -> None:
            group.put = None
            group.applying = True
            self.worker.submit(
                lambda: floors.append(put()), lambda error: self._put_done(group, install, floors, error)
            )

        group.put = begin
        self.apply(group)

    def _install_failed(self, group: Group, install: InstallState) -> None:
        group.installing = False
        self._host.step(group, InstallFailed(install.floor.index))

    def _put_done(self, group: Group, install: InstallState, floors: list[Floor], error: BaseException | None) -> None:
        if self._host.stopped or group.failed is not None:
            return
        group.applying = False
        if isinstance(error, errors.DiskFull):
            self._host.set_health(Health.FULL, error, of=group.name)
            self._loop.call_later(RETRY_S, self._install_failed, group, install)
            return
        if error is not None:
            # It is not known what is in place now.
            self._host.fail_group(group, typed(error, f"the state of {group.name} cannot be put in place"))
            return
        floor = floors[0]
        assert floor.index >= install.floor.index, (group.name, floor, install)
        self._metrics.add("srengine_consensus_installs_total")
        group.visible = floor.index
        group.waiting.replaced(floor.index)
        group.waiting.visible(floor.index)
        if group.on_visible is not None:
            group.on_visible(group.visible)

        def installed(failure: BaseException | None) -> None:
            if failure is not None:
                # The state is in place already; the log follows when there is space.
                self._host.set_health(Health.FULL, typed(failure, "the log"), of=group.name)
                self._loop.call_later(RETRY_S, self._reset_log, group, floor, installed)
                return
            group.installing = False
            self._host.set_health(Health.OK, None, of=group.name)
            group.inbox.extendleft((group.trimmed, Installed(floor)))

        self._reset_log(group, floor, installed)

    def _reset_log(self, group: Group, floor: Floor, installed: Done) -> None:
        self._host.write(group, lambda: self._log.install(group.name, floor), installed)

    # --- the end -----------------------------------------------------------------------------------------------------

    async def stop(self, groups: Iterable[Group]) -> None:
        """Fetch nothing more; flush what is visible, and end the thread after that."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for group in groups:
            if group.failed is None and group.state.applied.index < group.visible:
                # Spares the next start the entries; if it fails, they are in the log.
                self.worker.submit(group.state.flush, lambda _: None)
        self.worker.stop()
