"""One group on this node, as the driver runs it: its machine, its log, its state machine, and who waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from srengine import errors
from srengine.consensus.effects import Input, RoleChanged, Trimmed
from srengine.consensus.entries import Entry
from srengine.consensus.log import GroupLog
from srengine.consensus.services import Machine, StateMachine, StateSink, StateSource
from srengine.consensus.waiting import WaitingRoom

_logger = logging.getLogger(__name__)

NEVER: Final = float("inf")


@dataclass(slots=True, eq=False)
class Group:
    """One group on this node."""

    name: str
    machine: Machine
    log: GroupLog
    state: StateMachine
    source: StateSource | None
    sink: StateSink | None
    role: RoleChanged
    visible: int
    """Index up to which the state machine shows entries; not less than what it holds durably."""
    waiting: WaitingRoom
    inbox: deque[Input] = field(default_factory=deque)
    inbox_messages: int = 0
    inbox_bytes: int = 0
    busy: bool = False
    """Its effects wait for the disk: nothing is stepped into it."""
    lone: bool = False
    """The last proposal found nobody else waiting: whoever writes one after the other need not wait for company."""
    locked: bool = False
    """Its log is being trimmed, reset or healed under the machine, which is left alone meanwhile."""
    deadline: float = NEVER
    """When the machine is due if nothing comes before."""
    to_apply: deque[Entry] = field(default_factory=deque)
    applying: bool = False
    """The state machine works."""
    unflushed_bytes: int = 0
    """Of the entries that are visible and may not be durable."""
    flush_timer: asyncio.TimerHandle | None = None
    flushing: bool = False
    installing: bool = False
    put: Callable[[], None] | None = None
    """Puts a fetched state in place as soon as everything handed out is applied."""
    trimming: bool = False
    healing: bool = False
    watchers: list[Callable[[RoleChanged], None]] = field(default_factory=list)
    on_visible: Callable[[int], None] | None = None
    failed: errors.Error | None = None

    @property
    def trimmed(self) -> Trimmed:
        """What tells the machine where its log begins, and where others fetch what came before."""
        floor = self.log.floor
        return Trimmed(floor, self.source.reference(floor) if self.source is not None else None)


def typed(error: BaseException, what: str) -> errors.Error:
    """Return an error as one of ours; one that nobody foresaw is logged with where it came from."""
    if isinstance(error, errors.Error):
        return error
    _logger.error(what, exc_info=error)
    return errors.Error(f"{what}: {error!r}")
