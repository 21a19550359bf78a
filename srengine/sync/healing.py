"""Put single records right from another replica: values that rotted under a sound header, lost change entries.

A row heals only when its digest is what the header here says, so neither root nor position changes and it does not
matter where the other replica stands. What cannot be healed so (a header that rotted, a record that is missing or too
many) is for an exchange.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable, Sequence

from srengine import errors, limits
from srengine.ha.contact import Reach
from srengine.metrics import Metrics
from srengine.storage.checking import heal, sound_rows
from srengine.sync.messages import FetchRows, FoundRows
from srengine.sync.slots import Slot

FETCH_TIMEOUT_S = 10.0


async def heal_records(
    slot: Slot, keys: Iterable[bytes], sources: Sequence[str], reach: Reach, metrics: Metrics
) -> list[bytes]:
    """Replace damaged values from the first of ``sources`` that has them; return the keys that are right now."""
    left = sorted(set(keys))
    healed: list[bytes] = []
    for source in sources:
        for first in range(0, len(left), limits.FETCH_ROWS_KEYS_MAX):
            wanted = left[first : first + limits.FETCH_ROWS_KEYS_MAX]
            try:
                rows = await _fetch(slot.spec.tablet_id, wanted, source, reach)
                healed += await _put(slot, rows)
            except (errors.Unreachable, errors.TimedOut, errors.NotReady, errors.FrameError, errors.Diverged):
                # The next replica may do better.
                break
        done = set(healed)
        left = [key for key in left if key not in done]
        if not left:
            break
    metrics.add("srengine_repair_records_total", len(healed), kind="value")
    return healed


async def heal_changes(slot: Slot, keys: Iterable[bytes], metrics: Metrics) -> list[bytes]:
    """Write the change entries of sound records again; return the keys that are right now."""
    healed: list[bytes] = []
    left = sorted(set(keys))
    while left:
        rows, _ = await asyncio.to_thread(sound_rows, slot.opened(), left, bytes_max=limits.FETCH_ROWS_BYTES_MAX)
        done = await _put(slot, rows, recount=True)
        if not done:
            break
        healed += done
        left = [key for key in left if key not in set(done)]
    metrics.add("srengine_repair_records_total", len(healed), kind="change")
    return healed


async def _fetch(tablet_id: str, keys: Sequence[bytes], source: str, reach: Reach) -> bytes:
    channel = await reach(source)
    reply, attachments = await channel.request(FetchRows(tablet_id, tuple(keys)), timeout_s=FETCH_TIMEOUT_S)
    if not isinstance(reply, FoundRows) or len(attachments) != 1:
        raise errors.FrameError(f"{source} answered a request for rows with {type(reply).__name__}")
    return bytes(attachments[0])


async def _put(slot: Slot, rows: bytes, *, recount: bool = False) -> list[bytes]:
    """Put rows into the own copy, which may be written at the same time."""
    if not rows:
        return []
    for attempt in range(limits.HEAL_ATTEMPTS_MAX):
        async with slot.writing:
            try:
                return await asyncio.to_thread(functools.partial(heal, slot.opened(), rows, recount=recount))
            except errors.Diverged:
                if attempt == limits.HEAL_ATTEMPTS_MAX - 1:
                    raise
    raise AssertionError(limits.HEAL_ATTEMPTS_MAX)
