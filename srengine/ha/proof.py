"""What a replica says of its own records when roots disagree, and how a group decides which copy is right.

Two replicas of one lineage that stand at one sequence have one root. When they do not, one of them is wrong, and the
roots alone do not say which. So both *prove* themselves: they add their records up again and compare with the root that
they carry.

* The sums do not give it: the copy is **damaged**, and is repaired from the other.
* Both give theirs: the copies are whole and tell different histories. Two that agree outvote a third. With nobody to
  outvote, nothing is served, nothing is deleted, an alarm names both, and a person decides.

The same proof is asked for when rows that follow a position do not reach the root that was promised with them: then
either the base is wrong, or the rows are.
"""

from __future__ import annotations

import enum


class Check(enum.Enum):
    """What the last proof of a copy at its present position said."""

    NONE = ""
    """Not proved: nobody doubts it, or the proof is on its way."""
    WHOLE = "whole"
    """The records give the root that the copy carries, and still something does not fit."""
    DAMAGED = "damaged"
    """They do not."""
