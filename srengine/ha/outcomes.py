"""What became of each proposal, by its request id: why a command that is sent again is applied once.

A proposer that lost the answer (the leader died, the connection broke) sends the same request again, perhaps to another
leader; so a command may stand in the journal twice. The first time decides, and the outcome is kept in a table of the
agreed state: the second time, the same answer is given on every node and nothing changes.

=============  ========================  ==============================================================================
table          key                       value
=============  ========================  ==============================================================================
``outcomes``   ``r`` + request           `Outcome`, msgpack
``outcomes``   ``s`` + slot, 2 bytes,    the request that has the slot: the outcome's number modulo `OUTCOMES_KEPT`
               big endian
``outcomes``   ``n``                     how many outcomes were ever kept, 8 bytes, little endian
=============  ========================  ==============================================================================

The ring forgets the oldest: a request that is sent again after `OUTCOMES_KEPT` others is a new one. A proposer repeats
itself for seconds, and journals change slowly.

A command that was refused because its epoch was over (`StaleEpoch`) leaves no outcome: it counts as never proposed, so
the same request under the new leader's epoch is applied, once.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from srengine import errors, limits
from srengine.ha.tables import Batch, Readable

OUTCOME_TABLE: Final = "outcomes"
OUTCOMES_KEPT: Final = 4096
_COUNT: Final = b"n"


class Outcome(msgspec.Struct, frozen=True):
    """What a command came to. ``index``: of the journal, where it was decided. ``code``: empty when it was applied,
    else the refusal's; ``message`` and ``details`` are the refusal's, too.
    """

    index: int
    code: str = ""
    message: str = ""
    details: dict[str, Any] = {}

    @property
    def refusal(self) -> errors.Error | None:
        """A fresh exception that says why the command was refused; None when it was applied."""
        return errors.from_code(self.code, self.message, self.details) if self.code else None


def refused(index: int, error: errors.Error) -> Outcome:
    """Return the outcome of a command that its applier refused; overlong facts are left out."""
    details = error.details
    if len(msgspec.msgpack.encode(details)) > limits.FAILURE_BYTES_MAX:
        details = {}
    return Outcome(index, error.code, error.message[: limits.FAILURE_BYTES_MAX], details)


def find_outcome(rows: Readable, request: bytes) -> Outcome | None:
    """Return what an earlier command with this request id came to; None when none is known."""
    stored = rows.get(OUTCOME_TABLE, b"r" + request)
    return None if stored is None else msgspec.msgpack.decode(stored, type=Outcome)


def keep_outcome(tables: Batch, request: bytes, outcome: Outcome) -> None:
    """Keep an outcome, and forget the one that is `OUTCOMES_KEPT` older."""
    stored = tables.get(OUTCOME_TABLE, _COUNT)
    count = 0 if stored is None else int.from_bytes(stored, "little")
    slot = b"s" + (count % OUTCOMES_KEPT).to_bytes(2, "big")
    changes: dict[bytes, bytes | None] = {}
    oldest = tables.get(OUTCOME_TABLE, slot)
    if oldest is not None:
        changes[b"r" + oldest] = None
    changes[slot] = request
    changes[b"r" + request] = msgspec.msgpack.encode(outcome)
    changes[_COUNT] = (count + 1).to_bytes(8, "little")
    tables.change({OUTCOME_TABLE: changes})
