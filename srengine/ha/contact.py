"""Contact between nodes: every question carries who asks, every answer who answers, and both sides remember.

`Contact.ask` is how a replica of any group asks the leader; `Contact.judge` is what the leader does first with a
question. Both keep the roster (roster_machine.py) durable before anything is done with what was heard.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Final, Protocol

import msgspec

from srengine import errors
from srengine.clock import Clock
from srengine.ha import follower_machine as fm
from srengine.ha.messages import ProcessId, Pull, PullReply
from srengine.ha.metadata import Store
from srengine.ha.roster_machine import Hello, Judged, Process, RosterMachine, Verdict
from srengine.types import Position

PEER_TABLE: Final = "peers_seen"
"""Local, in no digest: name -> the highest process seen of the node that last bore it."""


class Channel(Protocol):
    """The way to another node, both its ports; `srengine.node.reach.Way`."""

    async def request(
        self, message: msgspec.Struct, attachments: Sequence[bytes] = (), *, timeout_s: float
    ) -> tuple[msgspec.Struct, Sequence[bytes | bytearray | memoryview]]:
        """Send one message to the peer port and return the answer with its attachments."""
        ...

    def stream(
        self, message: msgspec.Struct, *, timeout_s: float, proved: bool = False
    ) -> AsyncGenerator[memoryview, None]:
        """Yield the items of a stream from the bulk port."""
        ...


Reach = Callable[[str], Awaitable[Channel]]
"""Return the way to a member, by name; `Unreachable` for a stranger."""


class Contact:
    """This node among the others.

    ``process()`` and ``copied()``: this run, which may change its boot number when peers have seen a higher one.
    ``on_refused(verdict, highest)``: a leader would not have us. ``on_restored(seen)``: a replica has seen a later run
    of this node than this one: the disk was put back. ``on_foreign(error)``: the leader belongs to another cluster.
    """

    def __init__(
        self,
        *,
        name: str,
        process: Callable[[], Process],
        copied: Callable[[], bool],
        store: Store,
        clock: Clock,
        on_refused: Callable[[Verdict, int], None],
        on_restored: Callable[[Process], None],
        on_foreign: Callable[[errors.ForeignData], None],
    ) -> None:
        self.name = name
        self.accepted = False
        """Whether a leader has accepted this run."""
        self._process = process
        self._copied = copied
        self._store = store
        self._clock = clock
        self._on_refused = on_refused
        self._on_restored = on_restored
        self._on_foreign = on_foreign
        self._numbers = itertools.count(1)
        self._on_new_leader: list[Callable[[], None]] = []
        self._leader_process: Process | None = None
        seen = []
        for key, value in store.scan(PEER_TABLE):
            process_id = msgspec.msgpack.decode(value, type=ProcessId)
            seen.append((key.decode(), _process(process_id)))
        self._roster = RosterMachine(seen)

    @property
    def process_id(self) -> ProcessId:
        """This run, as messages carry it."""
        return _process_id(self._process())

    def on_new_leader(self, callback: Callable[[], None]) -> None:
        """Call back when an answer shows that the leader is another process than before."""
        self._on_new_leader.append(callback)

    def leader_called(self) -> None:
        """Let everybody ask again at once: the leader has just introduced itself."""
        for callback in self._on_new_leader:
            callback()

    def alive(self, name: str) -> bool:
        """Return whether the node asked something lately."""
        return self._roster.alive(name, self._clock.boottime_s())

    def node_id(self, name: str) -> str | None:
        """Return the id under which the node was last heard in this run."""
        return self._roster.node_id(name)

    # --- asking ------------------------------------------------------------------------------------------------------

    async def ask(
        self, channel: Channel, leader: str, group: str, ask: fm.Ask, *, trusted: bool, timeout_s: float
    ) -> tuple[PullReply, Sequence[bytes | bytearray | memoryview]]:
        """Ask the leader of ``group`` for what comes after the own position.

        Raises what the transport raises, and `Conflict` when the leader refuses this process.
        """
        seen = self._roster.seen(leader)
        pull = Pull(
            group=group,
            replica=self.name,
            process=self.process_id,
            number=next(self._numbers),
            position=ask.position,
            copied=self._copied(),
            trusted=trusted,
            filling=ask.filling,
            committed_known=ask.committed_known,
            leader_seen=None if seen is None else _process_id(seen),
            check=ask.check.value,
        )
        try:
            reply, attachments = await channel.request(pull, timeout_s=timeout_s)
        except errors.ForeignData as error:
            # Only a leader that says which other cluster it belongs to: a wiped one belongs to none yet.
            if not self.accepted and error.details.get("theirs"):
                self._on_foreign(error)
            raise
        if not isinstance(reply, PullReply):
            raise errors.FrameError(f"{leader} answered a pull with {type(reply).__name__}")
        self._learn(leader, _process(reply.process))
        if reply.state in {Verdict.STALE_BOOT.value, Verdict.DUPLICATE.value}:
            if pull.process == self.process_id:
                # Else the number was raised since the question left, and the refusal is of the past.
                self._on_refused(Verdict(reply.state), reply.highest)
            raise errors.Conflict(f"{leader} refuses this process ({reply.state}): {reply.reason}")
        self.accepted = True
        return reply, attachments

    def _learn(self, name: str, process: Process) -> None:
        if self._roster.learn(name, process):
            self._persist(name, process)
        if self._leader_process != process:
            known = self._leader_process is not None
            self._leader_process = process
            if known:
                self.leader_called()

    # --- being asked -------------------------------------------------------------------------------------------------

    def judge(self, pull: Pull, position: Position) -> PullReply | None:
        """Return the refusal of a question's sender, or None when it is accepted (and noted as alive)."""
        seen, own = pull.leader_seen, self._process()
        if seen is not None and seen.node_id == own.node_id:
            later = seen.boot_number > own.boot_number
            if later or (seen.boot_number == own.boot_number and seen.nonce != own.nonce):
                self._on_restored(_process(seen))
        judged = self._roster.hear(Hello(pull.replica, _process(pull.process), pull.copied), self._clock.boottime_s())
        if judged.persist is not None:
            self._persist(pull.replica, judged.persist)
        if judged.verdict is Verdict.ACCEPTED:
            return None
        why = (
            "another process with this name or id is alive"
            if judged.verdict is Verdict.DUPLICATE
            else f"boot number {judged.highest} of this node was seen before: its directory is an older state"
        )
        return PullReply(judged.verdict.value, position, self.process_id, highest=judged.highest, reason=why)

    def meet(self, name: str, process_id: ProcessId, *, copied: bool) -> Judged:
        """Judge a node that has just started and says so, and remember it durably; it counts as heard if accepted."""
        judged = self._roster.hear(Hello(name, _process(process_id), copied), self._clock.boottime_s())
        if judged.persist is not None:
            self._persist(name, judged.persist)
        return judged

    def _persist(self, name: str, process: Process) -> None:
        with self._store.transaction() as transaction:
            transaction.put(PEER_TABLE, name.encode(), msgspec.msgpack.encode(_process_id(process)))


def answered(number: int, reply: PullReply, bytes_received: int) -> fm.Answered:
    """Return a reply as the follower's machine takes it; `FrameError` for a state that does not exist."""
    try:
        state = fm.SourceState(reply.state)
    except ValueError:
        raise errors.FrameError(f"a pull cannot be answered with {reply.state[:64]!r}") from None
    if state is fm.SourceState.DELTA and reply.target is None:
        raise errors.FrameError("a delta must say where it ends")
    return fm.Answered(
        number,
        state,
        reply.source,
        reply.committed,
        target=reply.target,
        bytes_received=bytes_received,
        reason=reply.reason,
    )


def _process(process_id: ProcessId) -> Process:
    return Process(process_id.node_id, process_id.boot_number, process_id.nonce)


def _process_id(process: Process) -> ProcessId:
    return ProcessId(process.node_id, process.boot_number, process.nonce)
