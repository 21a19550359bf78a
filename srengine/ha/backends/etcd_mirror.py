"""What etcd says of the cluster, followed on this node: who holds the election, who is alive, and the journal.

::

    read everything but the journal, at one revision R
    read the journal from the first entry that is not here, page by page
    watch all keys from R + 1 on                           ... until the stream breaks, then again from the top

One range is watched, so changes come in the order in which they happened. A revision that etcd has compacted away, a
server that is lost, one that has lost its leader: all lead back to the top, where nothing is taken for known but the
entries delivered so far.

Beside it a *beat* asks etcd, by a linearizable read, who leads and where the journal ends. Its answer is what *contact*
means; and if the watch has not delivered within `STALLED_S` what the beat knows, the watch is broken though its
connection is not, and starts again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from srengine import errors
from srengine.ha.backends import etcd_client as ec
from srengine.ha.backends.etcd_client import Event, KeyValue, prefix_end
from srengine.ha.backends.etcd_journal import BelowFloor, EtcdEntry, EtcdJournal, EtcdPlace
from srengine.ha.backends.etcd_keys import (
    Candidacy,
    CopyRecord,
    FloorRecord,
    SessionRecord,
    decode,
    read_number,
)
from srengine.ha.backends.etcd_session import TRANSIENT

_logger = logging.getLogger(__name__)

BEAT_S: Final = 0.5
CONTACT_S: Final = 3.0
"""Without an answer of etcd for so long, this node knows nothing."""
STALLED_S: Final = 2.0
BEATS_KEPT: Final = 16
RETRY_S_MIN: Final = 0.05
RETRY_S_MAX: Final = 1.0

assert BEAT_S < STALLED_S, (BEAT_S, STALLED_S)
assert 2 * BEAT_S < CONTACT_S, (BEAT_S, CONTACT_S)


class EtcdMirror:
    """The newest known state. `run` and `beat` in tasks.

    ``deliver`` gets entries in order, each once, from the one behind ``applied()`` at the start; it may wait.
    ``fetch`` is called when the entries that are needed were trimmed; it must bring the state up to the floor or raise.
    ``changed`` is called when the election or contact may have changed.
    """

    def __init__(
        self,
        place: EtcdPlace,
        journal: EtcdJournal,
        *,
        delivered: int,
        deliver: Callable[[Sequence[EtcdEntry]], Awaitable[None]],
        fetch: Callable[[], Awaitable[int]],
        changed: Callable[[], None],
    ) -> None:
        self._client = place.client
        self._keys = place.keys
        self._journal = journal
        self._clock = place.clock
        self._deliver = deliver
        self._fetch = fetch
        self._changed = changed
        self.delivered = delivered
        """Index of the last entry given to ``deliver``."""
        self.election: KeyValue | None = None
        self.head = 0
        """Index of the last entry in etcd, as far as heard."""
        self.floor: FloorRecord | None = None
        self.sessions: dict[str, KeyValue] = {}
        """By node id: keys of the nodes that are alive."""
        self.states: dict[str, KeyValue] = {}
        """By node id: keys that say which state a node holds."""
        self.restarts = 0
        """How often it began again; 1 is the first time."""
        self._known = 0
        """Revision up to which ``election`` is known."""
        self._contact_until = 0.0
        self._behind: tuple[float, int] | None = None
        """Since when nothing was delivered though there is more, and which entry was the last one."""
        self._beats: deque[tuple[float, int]] = deque(maxlen=BEATS_KEPT)
        """Moments of asking, and where the journal ended then."""
        self._broken = asyncio.Event()

    # --- what is known -----------------------------------------------------------------------------------------------

    @property
    def contact_until(self) -> float:
        """Moment (boottime) at which what is known here counts as unknown, unless etcd answers before."""
        return self._contact_until

    @property
    def candidacy(self) -> Candidacy | None:
        """Who holds the election."""
        return None if self.election is None else decode(self.election.value, Candidacy)

    @property
    def term(self) -> int:
        """Revision at which the election was last decided; 0 before the first time."""
        return 0 if self.election is None else self.election.mod_revision

    def session(self, node_id: str) -> SessionRecord | None:
        """Return what an alive node says of itself."""
        found = self.sessions.get(node_id)
        return None if found is None else decode(found.value, SessionRecord)

    def copies(self) -> list[tuple[CopyRecord, KeyValue]]:
        """Return who holds which state."""
        return [(decode(kv.value, CopyRecord), kv) for _, kv in sorted(self.states.items())]

    def see_election(self, revision: int, election: KeyValue | None) -> None:
        """Take note of who holds the election as of ``revision``; older news change nothing."""
        if revision < self._known:
            return
        self._known = revision
        if self.election != election:
            self.election = election
            self._changed()

    # --- following ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Follow until cancelled; raises only what is no matter of a moment (damage, another cluster's data)."""
        pause = RETRY_S_MIN
        while True:
            started = self._clock.boottime_s()
            try:
                await self._follow()
            except (*TRANSIENT, ec.Compacted, errors.FrameError) as error:
                _logger.info("following etcd starts again: %s", error)
            except BelowFloor as error:
                _logger.warning("%s", error.message)
                try:
                    self.delivered = await self._fetch()
                    continue
                except (*TRANSIENT, errors.NotReady, errors.SnapshotDamaged, errors.Closed) as failure:
                    _logger.warning("the state could not be copied: %s", failure)
            lasted = self._clock.boottime_s() - started
            pause = RETRY_S_MIN if lasted > RETRY_S_MAX else min(RETRY_S_MAX, 2 * pause)
            await asyncio.sleep(pause)

    async def _follow(self) -> None:
        self.restarts += 1
        revision = await self._read_all()
        self._broken.clear()
        await self._catch_up()
        watching = asyncio.ensure_future(self._watch(revision + 1))
        broken = asyncio.ensure_future(self._broken.wait())
        try:
            await asyncio.wait({watching, broken}, return_when=asyncio.FIRST_COMPLETED)
            if not watching.done():
                raise errors.Unreachable("the watch has fallen silent")
            watching.result()
        finally:
            for task in (watching, broken):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, errors.Error):
                    await task

    async def _read_all(self) -> int:
        keys = self._keys
        reply = await self._client.read(
            [
                ec.get(keys.election),
                ec.get(keys.head),
                ec.get(keys.floor),
                ec.get(keys.sessions, prefix_end(keys.sessions)),
                ec.get(keys.states, prefix_end(keys.states)),
            ]
        )
        election, head, floor, sessions, states = (part.range for part in reply.responses)
        if head.first is None:
            raise errors.NotReady(f"etcd knows no cluster {keys.cluster_id} any more")
        self.head = max(self.head, read_number(head.first.value))
        self.floor = None if floor.first is None else decode(floor.first.value, FloorRecord)
        self.sessions = {kv.key[len(keys.sessions) :].decode(): kv for kv in sessions.kvs}
        self.states = {kv.key[len(keys.states) :].decode(): kv for kv in states.kvs}
        self.see_election(reply.header.revision, election.first)
        self._changed()
        return reply.header.revision

    async def _catch_up(self) -> None:
        floor = self.floor
        if floor is not None and self.delivered < floor.index:
            raise BelowFloor(
                f"entries up to {floor.index} are trimmed and {self.delivered + 1} is needed", index=floor.index
            )
        async with contextlib.aclosing(self._journal.entries(self.delivered + 1)) as pages:
            async for page in pages:
                await self._give(page)

    async def _watch(self, revision: int) -> None:
        replies = self._client.watch(self._keys.base, self._keys.base_end, start_revision=revision)
        async with contextlib.aclosing(replies):
            async for reply in replies:
                await self._take(reply.events)

    async def _take(self, events: Sequence[Event]) -> None:
        keys = self._keys
        entries: list[EtcdEntry] = []
        noteworthy = False
        for event in events:
            kv, gone = event.kv, event.type == "DELETE"
            if kv.key.startswith(keys.journals):
                if not gone and keys.index_of(kv.key) > self.delivered + len(entries):
                    entries.append(await self._journal.entry(kv, self.delivered + len(entries) + 1))
                continue
            noteworthy = True
            if kv.key == keys.election:
                self.see_election(kv.mod_revision, None if gone else kv)
            elif kv.key == keys.head and not gone:
                self.head = max(self.head, read_number(kv.value))
                noteworthy = False
            elif kv.key == keys.floor and not gone:
                self.floor = decode(kv.value, FloorRecord)
            elif kv.key.startswith(keys.sessions):
                _set(self.sessions, kv.key[len(keys.sessions) :].decode(), None if gone else kv)
            elif kv.key.startswith(keys.states):
                _set(self.states, kv.key[len(keys.states) :].decode(), None if gone else kv)
        if entries:
            await self._give(entries)
        if noteworthy:
            self._changed()

    async def _give(self, entries: Sequence[EtcdEntry]) -> None:
        await self._deliver(entries)
        self.delivered = entries[-1].index
        self.head = max(self.head, self.delivered)

    # --- the beat ----------------------------------------------------------------------------------------------------

    async def beat(self) -> None:
        """Ask etcd again and again, until cancelled."""
        while True:
            with contextlib.suppress(*TRANSIENT, errors.FrameError):
                await self.ask()
            await asyncio.sleep(BEAT_S)

    async def ask(self) -> None:
        """Ask etcd who leads and where the journal ends."""
        sent = self._clock.boottime_s()
        reply = await self._client.read([ec.get(self._keys.election), ec.get(self._keys.head)], timeout_s=CONTACT_S)
        until = sent + CONTACT_S
        fresh = self._contact_until <= self._clock.boottime_s() < until
        self._contact_until = max(self._contact_until, until)
        election, head = (part.range.first for part in reply.responses)
        self.see_election(reply.header.revision, election)
        if head is not None:
            index = read_number(head.value)
            self.head = max(self.head, index)
            self._beats.append((sent, index))
        self._look_at_the_watch(sent)
        if fresh:
            self._changed()

    def _look_at_the_watch(self, now: float) -> None:
        if self.delivered >= self.head:
            self._behind = None
        elif self._behind is None or self._behind[1] != self.delivered:
            self._behind = now, self.delivered
        elif now - self._behind[0] > STALLED_S:
            self._behind = None
            self._broken.set()

    def fresh(self, applied: int, within_s: float) -> bool:
        """Return whether ``applied`` is all that the journal held when etcd was asked, ``within_s`` ago at most."""
        oldest = self._clock.boottime_s() - within_s
        return any(asked >= oldest and applied >= head for asked, head in self._beats)


def _set(where: dict[str, KeyValue], name: str, kv: KeyValue | None) -> None:
    if kv is None:
        where.pop(name, None)
    else:
        where[name] = kv
