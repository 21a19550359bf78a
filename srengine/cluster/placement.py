"""Which members hold a tablet: rendezvous hashing, the first member always among them.

Each (tablet, member) pair has a hash; a tablet lives at the members with the highest ones. So a member more or less
moves only the tablets that it gains or loses, and nobody has to agree on anything but the members. Until tablets are
consensus groups the first member leads all of them, so it holds all of them: it takes one place of every replica set,
the hash gives the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from srengine import errors


def weight(tablet_id: str, member: str) -> int:
    """Return the rendezvous hash of a pair: equal everywhere and for ever.

    >>> weight("00" * 16, "node-1") == weight("00" * 16, "node-1") != weight("00" * 16, "node-2")
    True
    """
    digest = hashlib.blake2b(digest_size=8, person=b"srengine-placing")
    digest.update(tablet_id.encode())
    digest.update(b"\x00")
    digest.update(member.encode())
    return int.from_bytes(digest.digest(), "big")


def place(tablet_id: str, members: Sequence[str], replicas: int) -> tuple[str, ...]:
    """Return the members that hold the tablet, the leader (the first member) first, the others by weight.

    Raises `InvalidValue` when there are fewer members than replicas.
    """
    if not 1 <= replicas <= len(members):
        raise errors.InvalidValue(
            f"{replicas} replicas cannot be placed on {len(members)} members", replicas=replicas, members=len(members)
        )
    first, others = members[0], members[1:]
    by_weight = sorted(others, key=lambda member: (weight(tablet_id, member), member), reverse=True)
    return (first, *by_weight[: replicas - 1])
