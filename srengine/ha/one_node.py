"""The plain backend of the journal: the first member leads for ever, the others pull.

On the first member `LeadingJournal` appends a proposed command to its own log (fsync), lets the replicas pull it, and
answers when a majority holds it durably. Elsewhere `FollowingJournal` appends what it pulls, applies what is committed,
and passes proposals on. The machines and their rules (what counts as held, how a start goes on, restored disks) are
those of tablets.

What it does not do: elect. While the first member is down nothing can be proposed; everything applied stays readable. A
consensus group takes its place behind the same `Journal` interface.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from srengine import errors, limits
from srengine.ha import follower_machine as fm
from srengine.ha import leader_machine as lm
from srengine.ha import quorum
from srengine.ha.contact import Contact, answered
from srengine.ha.group import FollowerDriver, LeaderDriver, Surroundings
from srengine.ha.journal import Command, chained, decode_entries, encode_entries
from srengine.ha.journal_store import JournalStore
from srengine.ha.messages import JOURNAL_GROUP, Fetch, Propose, Proposed, Pull, PullReply
from srengine.ha.metadata import MetadataMachine
from srengine.types import Position

Answer = tuple[PullReply, Sequence[bytes]]


class _Applying:
    """Applies committed entries in order in one task, and tells who waits for an index."""

    def __init__(self, store: JournalStore, machine: MetadataMachine) -> None:
        self.store = store
        self.machine = machine
        self._applied = machine.applied_index
        self._target = self._applied
        self._changed = asyncio.Condition()
        self._wanted = asyncio.Event()
        self._refusals: dict[int, errors.Error] = {}
        self._proposed: set[int] = set()

    @property
    def applied_index(self) -> int:
        return self._applied

    def apply_up_to(self, index: int) -> None:
        """Entries up to ``index`` are committed and here."""
        if index > self._target:
            self._target = index
            self._wanted.set()

    async def run(self) -> None:
        """Apply until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            while self._applied < self._target:
                index = self._applied + 1
                entry = await asyncio.to_thread(self.store.entry, index)
                assert entry is not None, index
                outcome = await asyncio.to_thread(self.machine.apply, index, entry.term, entry.command)
                refusal = outcome.refusal
                if refusal is not None and index in self._proposed:
                    self._refusals[index] = refusal
                async with self._changed:
                    self._applied = index
                    self._changed.notify_all()

    async def wait_applied(self, index: int) -> None:
        """Return when ``index`` is applied here; raise its refusal if it was proposed here (`expect`)."""
        await self._reach_index(index)
        self._proposed.discard(index)
        refusal = self._refusals.pop(index, None)
        if refusal is not None:
            raise refusal

    async def _reach_index(self, index: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._applied >= index)

    def expect(self, index: int) -> None:
        """Keep the refusal of ``index`` for `wait_applied`."""
        self._proposed.add(index)

    async def subscribe(self, from_index: int) -> AsyncIterator[tuple[int, Command]]:
        """See `journal.Journal.subscribe`."""
        index = max(1, from_index)
        while True:
            await self._reach_index(index)
            entry = await asyncio.to_thread(self.store.entry, index)
            assert entry is not None, index
            yield index, entry.command
            index += 1


class LeadingJournal:
    """The journal on the first member."""

    def __init__(
        self,
        store: JournalStore,
        machine: MetadataMachine,
        *,
        others: Sequence[str],
        trusted: bool,
        around: Surroundings,
    ) -> None:
        self._store = store
        self._contact = around.contact
        self._reach = around.reach
        self._spawn = around.spawn
        self._appending = asyncio.Lock()
        self._applying = _Applying(store, machine)
        self._others = tuple(others)
        self._name = around.name
        self.driver = LeaderDriver(
            lm.LeaderMachine(
                name=around.name,
                others=others,
                own=store.position,
                own_trusted=trusted,
                root_at=store.root_at,
                now=around.clock.boottime_s(),
            ),
            around=around,
            recover=self._recover,
            committed=self._applying.apply_up_to,
        )

    def start(self) -> None:
        """Begin to lead."""
        self._spawn(self._applying.run(), "journal: apply")
        self.driver.start()

    def distrust(self, reason: str) -> None:
        """Take note that the disk turned out to be an older state."""
        self.driver.step(lm.Distrusted(reason))

    def close(self) -> None:
        """Stop; whoever waits gets `Closed`."""
        self.driver.close()

    @property
    def applied_index(self) -> int:
        """See `journal.Journal`."""
        return self._applying.applied_index

    @property
    def current(self) -> bool:
        """Whether this node has applied all that may have been acknowledged before it began to serve."""
        machine = self.driver.machine
        return machine.serving and self.applied_index >= machine.served_from

    @property
    def quorum_in_contact(self) -> bool:
        """Whether a majority, this node included, was heard lately."""
        alive = 1 + sum(self._contact.alive(other) for other in self._others)
        return alive >= quorum.majority(len(self._others) + 1)

    async def propose(self, command: Command, *, timeout_s: float = 10.0) -> int:
        """See `journal.Journal`."""
        if len(command.body) > limits.JOURNAL_ENTRY_BYTES_MAX:
            raise errors.InvalidValue(f"a command of {len(command.body)} bytes is too large", bytes=len(command.body))
        try:
            async with asyncio.timeout(timeout_s):
                await self.driver.wait_serving(timeout_s)
                if not self.quorum_in_contact:
                    raise errors.NoQuorum("a majority of the members cannot be reached; nothing was proposed")
                async with self._appending:
                    before = self._store.position
                    entry = chained(before.root, before.sequence + 1, command)
                    self._applying.expect(entry.index)
                    position = await asyncio.to_thread(self._store.append, [entry])
                    self.driver.step(lm.Applied(position))
                await self.driver.wait(entry.index, lm.Need.QUORUM, timeout_s)
                await self._applying.wait_applied(entry.index)
        except TimeoutError:
            raise errors.TimedOut("the command is not acknowledged by a majority yet; it may still be") from None
        return entry.index

    def subscribe(self, from_index: int) -> AsyncIterator[tuple[int, Command]]:
        """See `journal.Journal`."""
        return self._applying.subscribe(from_index)

    async def wait_applied(self, index: int, timeout_s: float) -> None:
        """Return when this node has applied ``index``; `TimedOut`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._applying.wait_applied(index)
        except TimeoutError:
            raise errors.TimedOut(f"journal index {index} is not applied here yet", index=index) from None

    async def answer(self, pull: Pull) -> Answer:
        """Answer a replica's question; it was judged already."""
        claim = lm.Claim(pull.position, pull.trusted, pull.filling, pull.committed_known)
        answer = await self.driver.pulled(pull.replica, claim, pull.process, pull.number)
        if answer.kind is not lm.AnswerKind.ROWS:
            return PullReply(
                answer.kind.value, answer.leader, self._contact.process_id, answer.committed, reason=answer.reason
            ), ()
        reply, attachments = await entries_after(self._store, pull.position, self._contact)
        # The committed sequence of the answer, not of now: the entries may end before it, which the receiver allows
        # for.
        return PullReply(
            reply.state,
            reply.source,
            reply.process,
            answer.committed,
            target=reply.target,
            base_sequence=reply.base_sequence,
            base_root=reply.base_root,
            reason=reply.reason,
        ), attachments

    async def _recover(self, effect: lm.Recover) -> Position:
        channel = await self._reach(effect.replica)
        while self._store.position.sequence < effect.target.sequence:
            fetch = Fetch(JOURNAL_GROUP, self._name, self._store.position)
            reply, attachments = await channel.request(fetch, timeout_s=limits.PULL_TIMEOUT_S)
            if not isinstance(reply, PullReply) or reply.state != fm.SourceState.DELTA.value or len(attachments) != 1:
                why = reply.reason if isinstance(reply, PullReply) else type(reply).__name__
                raise errors.NotReady(f"{effect.replica} gives no entries: {why}")
            await asyncio.to_thread(self._store.append, decode_entries(bytes(attachments[0])))
        return self._store.position


class FollowingJournal:
    """The journal on every other member."""

    def __init__(
        self,
        store: JournalStore,
        machine: MetadataMachine,
        *,
        leader: str,
        trusted: Callable[[], bool],
        around: Surroundings,
    ) -> None:
        self._store = store
        self._leader = leader
        self._trusted = trusted
        self._contact = around.contact
        self._reach = around.reach
        self._spawn = around.spawn
        self._applying = _Applying(store, machine)
        self._clock = around.clock
        self._entries: bytes | None = None
        self.driver = FollowerDriver(
            fm.FollowerMachine(
                own=store.position, filling=False, created=store.position.sequence == 0, now=around.clock.boottime_s()
            ),
            self,
            around=around,
            committed=self._applying.apply_up_to,
        )

    def start(self) -> None:
        """Begin to follow."""
        self._spawn(self._applying.run(), "journal: apply")
        self._spawn(self.driver.run(), "journal: follow")
        self._contact.on_new_leader(self.driver.kick)

    def close(self) -> None:
        """Nothing to do: the tasks are cancelled by their supervisor."""

    @property
    def applied_index(self) -> int:
        """See `journal.Journal`."""
        return self._applying.applied_index

    @property
    def current(self) -> bool:
        """Whether this node has lately held all that the leader called committed."""
        return self.driver.machine.synced(self._clock.boottime_s())

    async def propose(self, command: Command, *, timeout_s: float = 10.0) -> int:
        """See `journal.Journal`: passed on to the first member."""
        channel = await self._reach(self._leader)
        reply, _ = await channel.request(Propose(command.kind, command.body, timeout_s), timeout_s=timeout_s + 1)
        if not isinstance(reply, Proposed):
            raise errors.FrameError(f"a proposal was answered with {type(reply).__name__}")
        await self.wait_applied(reply.index, timeout_s)
        return reply.index

    def subscribe(self, from_index: int) -> AsyncIterator[tuple[int, Command]]:
        """See `journal.Journal`."""
        return self._applying.subscribe(from_index)

    async def wait_applied(self, index: int, timeout_s: float) -> None:
        """Return when this node has applied ``index``; `TimedOut`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._applying.wait_applied(index)
        except TimeoutError:
            raise errors.TimedOut(f"journal index {index} is not applied here yet", index=index) from None

    # --- FollowerActions ---------------------------------------------------------------------------------------------

    async def ask(self, ask: fm.Ask) -> fm.Answered:
        """See `group.FollowerActions`."""
        channel = await self._reach(self._leader)
        reply, attachments = await self._contact.ask(
            channel, self._leader, JOURNAL_GROUP, ask, trusted=self._trusted(), timeout_s=limits.PULL_TIMEOUT_S
        )
        self._entries = bytes(attachments[0]) if attachments else None
        return answered(ask.number, reply, len(self._entries or b""))

    async def apply_delta(self) -> Position:
        """See `group.FollowerActions`."""
        if self._entries is None:
            raise errors.FrameError("the answer holds no entries")
        entries = decode_entries(self._entries)
        return await asyncio.to_thread(self._store.append, entries)

    async def copy(self, copy: fm.Copy) -> tuple[Position, int]:
        """Refuse: the journal is kept whole, so there is always a delta."""
        raise errors.NotReady(f"the journal is never copied as a whole (asked for {copy.path.value})")

    def own(self) -> tuple[Position, bool]:
        """See `group.FollowerActions`."""
        return self._store.position, False

    def bytes_copied(self) -> int:
        """See `group.FollowerActions`."""
        return 0


async def entries_after(store: JournalStore, position: Position, contact: Contact) -> Answer:
    """Answer a `Fetch` (or the rows of a `Pull`) from this node's journal."""
    own = store.position

    def refused(state: fm.SourceState, reason: str) -> Answer:
        return PullReply(state.value, own, contact.process_id, reason=reason), ()

    if position.lineage != own.lineage:
        return refused(fm.SourceState.FOREIGN, "a journal of another cluster")
    if await asyncio.to_thread(store.root_at, position.sequence) != position.root:
        return refused(fm.SourceState.DIVERGED, f"journal entry {position.sequence} is another one here")
    entries = await asyncio.to_thread(store.entries_after, position.sequence)
    if not entries:
        return refused(fm.SourceState.NOTHING, "")
    last = entries[-1]
    return PullReply(
        fm.SourceState.DELTA.value,
        own,
        contact.process_id,
        target=Position(own.lineage, last.index, last.digest, last.index),
        base_sequence=position.sequence,
        base_root=position.root,
    ), (encode_entries(entries),)
