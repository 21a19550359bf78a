"""A look-up at `all`: every replica reads the keys, too, puts right what rotted, and says whether it found the same.

Only replicas at one sequence are compared; a replica that moved on meanwhile has read its records all the same, which
is what finds rot. A difference at one sequence makes both sides prove their copies, and the look-up is to be tried
again.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import Final

from srengine import errors, limits
from srengine.ha.contact import Reach
from srengine.sync.following import TabletFollower
from srengine.sync.messages import CheckedKeys, CheckKeys
from srengine.sync.reading import Found, read_keys

CHECK_TIMEOUT_S: Final = 10.0


async def differences(
    tablet_id: str, sequence: int, keys: Sequence[bytes], found: Found, replicas: Sequence[str], reach: Reach
) -> list[str]:
    """Return the replicas that have other records under ``keys`` than were ``found`` at ``sequence``.

    Raises what the transport raises.
    """
    versions = tuple(0 if record is None else record.version for record in found.records)

    async def ask(replica: str) -> bool:
        channel = await reach(replica)
        different = 0
        for first in range(0, len(versions), limits.FETCH_ROWS_KEYS_MAX):
            last = first + limits.FETCH_ROWS_KEYS_MAX
            message = CheckKeys(tablet_id, sequence, tuple(keys[first:last]), versions[first:last])
            try:
                reply, _ = await channel.request(message, timeout_s=CHECK_TIMEOUT_S)
            except errors.CorruptionError:
                # It could not put its record right; its copy is in doubt from now on.
                return True
            if not isinstance(reply, CheckedKeys):
                raise errors.FrameError(f"{replica} answered a check of keys with {type(reply).__name__}")
            different += reply.different
        return different > 0

    answers = await asyncio.gather(*(ask(replica) for replica in replicas))
    return [replica for replica, different in zip(replicas, answers, strict=True) if different]


async def checked(follower: TabletFollower, message: CheckKeys) -> CheckedKeys:
    """Answer a leader's check of keys. Raises `FrameError`, `NotReady`, `CorruptionError`."""
    count = len(message.keys)
    if not 1 <= count <= limits.FETCH_ROWS_KEYS_MAX or count != len(message.versions):
        raise errors.FrameError(f"a check of {count} keys with {len(message.versions)} versions")
    tablet = follower.slot.opened()
    before = tablet.position.sequence
    read = functools.partial(read_keys, tablet, message.keys, bytes_max=limits.FETCH_ROWS_BYTES_MAX)
    found = await follower.keeper.sound(read)
    if not before == tablet.position.sequence == message.sequence:
        return CheckedKeys(0, compared=False)
    versions = [0 if record is None else record.version for record in found.records]
    # Values beyond the bound are not read; those keys are not compared.
    different = sum(one != other for one, other in zip(versions, message.versions, strict=False))
    if different:
        follower.damaged(f"a look-up at all found {different} other records than the leader's at {before}")
    return CheckedKeys(different, compared=True)
