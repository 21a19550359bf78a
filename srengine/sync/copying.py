"""Deltas and copies between two nodes: what a source answers, and what a receiver does with it.

A delta that fits into an answer travels as three attachments (rows, meta, state) and is applied in one transaction. A
larger one, and a full copy, travels over the bulk port as the items of `srengine.snapshot`: a delta into the tablet
itself (marked half applied first), a full copy into a stage beside it that takes its place only when its root is
proved, and only when it is not older than what it replaces.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from contextlib import aclosing
from typing import Final, NamedTuple

from srengine import errors, limits
from srengine.ha import follower_machine as fm
from srengine.ha.contact import Channel, Reach
from srengine.ha.messages import Fetch, ProcessId, PullReply
from srengine.snapshot import SnapshotSink, SnapshotSource, Staged
from srengine.snapshot.compression import Compressor, Decompressor
from srengine.snapshot.format import Encoding, Manifest
from srengine.storage import Delta, Tablet
from srengine.sync.hops import made_ahead, use_all
from srengine.sync.messages import Copy
from srengine.sync.slots import Slot
from srengine.types import Position

Buffer = bytes | bytearray | memoryview
COPY_PROGRESS_S: Final = 30.0
"""A copy that brings nothing for so long is given up (and resumed by the next)."""


class Rows(NamedTuple):
    """A reply and what travels beside it."""

    reply: PullReply
    attachments: tuple[bytes, ...] = ()


# --- the source ------------------------------------------------------------------------------------------------------


def rows_after(tablet: Tablet, position: Position, process: ProcessId, *, committed: int = 0) -> Rows:
    """Answer what comes after ``position`` from this copy. Blocks."""
    own = tablet.position

    def plain(state: fm.SourceState, reason: str = "") -> Rows:
        return Rows(PullReply(state.value, own, process, committed, reason=reason))

    if tablet.fill_mark is not None:
        return plain(fm.SourceState.STARTING, "the source is half copied itself")
    if position.lineage != own.lineage:
        if position.sequence:
            return plain(fm.SourceState.FOREIGN, f"lineage {position.lineage} is not {own.lineage}")
        return plain(fm.SourceState.COPY, "an empty copy of another lineage")
    if position.sequence > own.sequence:
        return plain(fm.SourceState.DIVERGED, f"{position.sequence} is ahead of the source at {own.sequence}")
    root = tablet.root_at(position.sequence)
    if root is not None and root != position.root:
        return plain(fm.SourceState.DIVERGED, f"another root at sequence {position.sequence}")
    if position.sequence == own.sequence:
        return plain(fm.SourceState.NOTHING)
    try:
        delta = tablet.delta_since(position.sequence, bytes_max=limits.PULL_BYTES_MAX)
    except errors.BelowPurgeMark as error:
        return plain(fm.SourceState.EXCHANGE, f"below the purge mark or log floor: {error.message}")
    if delta is None:
        return plain(fm.SourceState.TOO_LARGE)
    # Request rows differ in their numbers only; without this they would outweigh small records.
    encoding, meta = Compressor(active=True).encode(delta.meta)
    reply = PullReply(
        fm.SourceState.DELTA.value,
        own if own.sequence >= delta.position.sequence else delta.position,
        process,
        committed,
        target=delta.position,
        base_sequence=delta.base_sequence,
        base_root=delta.base_root,
        meta_raw_bytes=len(delta.meta) if encoding is Encoding.ZSTD else 0,
    )
    return Rows(reply, (delta.rows, bytes(meta), delta.state))


def stream_copy(tablet: Tablet, request: Copy) -> AsyncGenerator[bytes, None]:
    """Return the items of the snapshot that ``request`` asks for; they are read and compressed in threads."""
    return made_ahead(
        lambda: iter(SnapshotSource(tablet, since=request.since, resume=request.resume, compression="auto"))
    )


# --- the receiver ----------------------------------------------------------------------------------------------------


def delta_of(reply: PullReply, attachments: Sequence[Buffer]) -> Delta:
    """Return the delta that came with a reply; `FrameError` when it is incomplete."""
    if reply.target is None or len(attachments) != 3:
        raise errors.FrameError(f"a delta has three attachments and a target, not {len(attachments)}")
    rows, meta, state = (bytes(attachment) for attachment in attachments)
    if reply.meta_raw_bytes:
        if not 0 < reply.meta_raw_bytes <= limits.TRAILER_BYTES_MAX:
            raise errors.FrameError(
                f"a delta with {reply.meta_raw_bytes} bytes of meta rows", bytes=reply.meta_raw_bytes
            )
        meta = bytes(Decompressor().decode(Encoding.ZSTD, meta, reply.meta_raw_bytes))
    return Delta(reply.base_sequence, reply.base_root, rows, meta, state, reply.target)


class _Guarded(Staged):
    """A target that refuses what must not replace the own copy."""

    def __init__(self, slot: Slot) -> None:
        super().__init__(slot.store, slot.spec.tablet_id, tablet=slot.tablet)
        self._slot = slot
        self._own = slot.position

    def begin(self, manifest: Manifest, *, resumed: bool) -> Tablet:
        lineage = self._slot.spec.lineage
        if manifest.lineage != lineage:
            raise errors.ForeignData(
                f"the source sends lineage {manifest.lineage}, this tablet is of {lineage}",
                tablet=self._slot.spec.tablet_id,
            )
        return super().begin(manifest, resumed=resumed)

    def complete(self, tablet: Tablet) -> Tablet:
        reached = tablet.position
        if reached.sequence < self._own.sequence or (reached.sequence == 0 and self._own.sequence):
            raise errors.Diverged(
                f"the copy ends at {reached.sequence}, the own one stands at {self._own.sequence}; it stays",
                own=self._own.sequence,
                source=reached.sequence,
            )
        return super().complete(tablet)


class Copier:
    """Copies one tablet from one node over the bulk port. ``bytes_received`` counts also when it fails."""

    def __init__(self, slot: Slot, replica: str) -> None:
        self.bytes_received = 0
        self._slot = slot
        self._replica = replica

    async def run(self, channel: Channel, path: fm.Path) -> Position:
        """Copy, prove, switch; return the position reached. Raises `errors.Error`; what was begun is resumed later."""
        slot = self._slot
        loop = asyncio.get_running_loop()
        async with slot.writing:
            with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="srengine-fill") as thread:
                sink = await loop.run_in_executor(thread, lambda: SnapshotSink(_Guarded(slot)))
                try:
                    to_build_on = path is fm.Path.DELTA and not slot.filling and sink.mark is None
                    since = slot.position if to_build_on else None
                    request = Copy(slot.spec.tablet_id, self._replica, since=since, resume=sink.mark)
                    async with aclosing(channel.stream(request, timeout_s=COPY_PROGRESS_S, proved=True)) as items:
                        await use_all(self._counted(items), sink.accept, thread)
                    await loop.run_in_executor(thread, sink.finish)
                finally:
                    await loop.run_in_executor(thread, sink.close)
                    # A switch closed the old tablet, also when what came after it failed.
                    await loop.run_in_executor(thread, self._reopen)
        return slot.position

    async def _counted(self, items: AsyncIterable[memoryview]) -> AsyncGenerator[memoryview, None]:
        async for item in items:
            self.bytes_received += len(item)
            yield item

    def _reopen(self) -> None:
        slot = self._slot
        if slot.tablet is None or slot.tablet.closed:
            try:
                slot.tablet = slot.store.open_tablet(slot.spec.tablet_id)
                slot.fault = ""
            except (errors.NotFound, errors.CorruptionError, errors.TabletFenced, errors.ForeignData) as error:
                slot.tablet = None
                slot.fault = f"{error.code}: {error.message}"


async def bring_up_to(slot: Slot, target: Position, source: str, replica: str, reach: Reach) -> Position:
    """Bring the own copy at least to ``target`` from one node, by deltas or a copy; for a leader that recovers."""
    while slot.filling or slot.position.sequence < target.sequence:
        fetch = Fetch(slot.spec.tablet_id, replica, slot.position, filling=slot.filling)
        channel = await reach(source)
        reply, attachments = await channel.request(fetch, timeout_s=COPY_PROGRESS_S)
        if not isinstance(reply, PullReply):
            raise errors.FrameError(f"{source} answered a fetch with {type(reply).__name__}")
        match reply.state:
            case fm.SourceState.DELTA.value if not slot.filling:
                delta = delta_of(reply, attachments)
                async with slot.writing:
                    await asyncio.to_thread(slot.opened().apply_delta, delta)
            case (
                fm.SourceState.TOO_LARGE.value
                | fm.SourceState.COPY.value
                | fm.SourceState.EXCHANGE.value
                | fm.SourceState.DELTA.value
            ):
                worth = reply.state == fm.SourceState.TOO_LARGE.value and slot.position.count > 0
                path = fm.Path.DELTA if worth else fm.Path.FULL
                await Copier(slot, replica).run(channel, path)
            case fm.SourceState.DIVERGED.value | fm.SourceState.FOREIGN.value:
                raise errors.Diverged(f"{source}: {reply.reason}")
            case _:
                raise errors.NotReady(f"{source} answers {reply.state}: {reply.reason}")
    return slot.position
