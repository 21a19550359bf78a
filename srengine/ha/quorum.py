"""The arithmetic of majorities: what is durable, and when a leader knows enough to serve.

Used for the journal and for every tablet, so that there is one place to check. Let a group have ``n`` replicas, of
which the first member always is one and leads. A write is acknowledged when a *majority* ``m = n // 2 + 1`` holds it
durably, the leader included.

*What is durable.* Sorted from the highest, the ``m``-th of the sequences that replicas hold is held by a majority.

*When a leader may serve after a start.* It must know of every acknowledged write.

* Its own disk is what it was: it holds every acknowledged write itself. It still asks until a majority (itself
  included) has told where it stands, because "my disk is what it was" is a belief, and a replica that is ahead refutes
  it.
* Its own disk is not what it was (wiped, or put back to an older state): its own position counts for nothing. An
  acknowledged write is at ``m - 1`` of the others at least, so any ``n - m + 1`` of the others contain one that has it,
  provided their disks are what they were.
* All others have told: nothing better exists anywhere; waiting would not help. What may be missing then is the caller's
  to say aloud (`Knowledge.COMPLETE_UNTRUSTED`).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable


def majority(replicas: int) -> int:
    """Return how many of ``replicas`` make a majority.

    >>> [majority(n) for n in (1, 2, 3, 4, 5)]
    [1, 2, 2, 3, 3]
    """
    assert replicas >= 1, replicas
    return replicas // 2 + 1


def held_by_majority(sequences: Iterable[int], replicas: int) -> int:
    """Return the highest sequence that a majority of ``replicas`` holds; those not listed hold nothing.

    >>> held_by_majority([7, 5, 3], 3), held_by_majority([7], 3), held_by_majority([7, 6], 5)
    (5, 0, 0)
    """
    held = sorted(sequences, reverse=True)
    assert len(held) <= replicas, (held, replicas)
    needed = majority(replicas)
    return held[needed - 1] if len(held) >= needed else 0


def others_needed(replicas: int) -> int:
    """Return how many of the others any acknowledged write must meet when the leader's own copy does not count.

    >>> [others_needed(n) for n in (2, 3, 4, 5)]
    [1, 2, 2, 3]
    """
    return replicas - majority(replicas) + 1


class Knowledge(enum.Enum):
    """What a leader knows from the positions told to it."""

    TOO_LITTLE = "too little"
    """Keep asking."""
    ENOUGH = "enough"
    """Every acknowledged write is at one of those that told (or at the leader itself)."""
    COMPLETE = "complete"
    """As ENOUGH, and everybody has told."""
    COMPLETE_UNTRUSTED = "complete, but untrusted"
    """Everybody has told, yet too many disks are not what they were: acknowledged writes may be missing everywhere."""


def knowledge(*, replicas: int, own_trusted: bool, told_trusted: int, told_untrusted: int) -> Knowledge:
    """Return what is known when these many other replicas have told their position.

    >>> knowledge(replicas=3, own_trusted=True, told_trusted=1, told_untrusted=0).name
    'ENOUGH'
    >>> knowledge(replicas=3, own_trusted=False, told_trusted=1, told_untrusted=0).name
    'TOO_LITTLE'
    >>> knowledge(replicas=3, own_trusted=False, told_trusted=1, told_untrusted=1).name
    'COMPLETE_UNTRUSTED'
    """
    told = told_trusted + told_untrusted
    assert told <= replicas - 1, (told, replicas)
    if own_trusted:
        enough = told + 1 >= majority(replicas)
    else:
        enough = told_trusted >= others_needed(replicas)
    if told == replicas - 1:
        return Knowledge.COMPLETE if enough else Knowledge.COMPLETE_UNTRUSTED
    return Knowledge.ENOUGH if enough else Knowledge.TOO_LITTLE
