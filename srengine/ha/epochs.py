"""Epochs: who may act for the cluster, one record for each leadership, chained; an applier of the journal.

An election names a leader; an epoch makes it one. The newly elected proposes `Fence` with the number behind the newest
one that it has applied, and acts only when the entry is applied and was not refused. Whoever comes second finds the
number taken (`EpochTaken`), whatever the election told it. The newest epoch is what `metadata.MetadataMachine` compares
every later command with.

======================  =====================  ======================================================================
table                   key                    value
======================  =====================  ======================================================================
``epochs``              epoch, 8 bytes, big    `EpochRecord`, msgpack
                        endian
``epoch_state``         ``newest``             epoch, 8 bytes, big endian, and the digest of its record
======================  =====================  ======================================================================

Invariants, which `findings` looks for at every start and in ``srengine verify``:

* epochs are 1, 2, 3, …, without a gap, each under its own key; none is ever deleted or changed;
* the digest of a record is BLAKE2b-128 of its predecessor's digest and all its fields, so that changing or leaving out
  one shows in all that follow;
* ``newest`` names the last one with its digest: cutting off the end shows, too;
* terms never fall and journal indexes grow along the chain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec

from srengine import errors, types
from srengine.ha.journal import Command
from srengine.ha.tables import Readable, Tables

EPOCH_TABLE: Final = "epochs"
EPOCH_STATE_TABLE: Final = "epoch_state"
FENCE: Final = "ha.fence"
DIGEST_BYTES: Final = 16
FIRST_DIGEST: Final = bytes(DIGEST_BYTES)
"""Stands for the digest of the record before the first."""
NEWEST: Final = b"newest"
NUMBER_MAX: Final = 1 << 63
FINDINGS_MAX: Final = 100
"""Sentences about one broken chain; what is more says nothing new."""


class EpochRecord(msgspec.Struct, frozen=True):
    """One leadership. ``term``: of the election; ``index``: the journal's; ``predecessor``: the epoch before."""

    epoch: int
    node_id: str
    name: str
    term: int
    index: int
    predecessor: int
    digest: bytes


class Fence(msgspec.Struct, frozen=True):
    """Command: insert ``epoch`` for this node. ``predecessor`` and ``predecessor_digest`` are the newest record that
    the claimant has applied.
    """

    epoch: int
    node_id: str
    name: str
    term: int
    predecessor: int
    predecessor_digest: bytes


class EpochsApplier:
    """Applies `Fence`."""

    kinds: Sequence[str] = (FENCE,)
    tables: Sequence[str] = (EPOCH_TABLE, EPOCH_STATE_TABLE)

    def apply(self, tables: Tables, index: int, kind: str, body: bytes) -> None:
        """See `tables.Applier`. Raises `EpochTaken` unless the claim follows the newest epoch exactly."""
        del kind
        claim = msgspec.msgpack.decode(body, type=Fence)
        if not 0 <= claim.term < NUMBER_MAX:
            raise errors.InvalidValue(f"{claim.term} is no term", term=claim.term)
        types.check_name(claim.name, "node")
        newest, digest = newest_epoch(tables)
        if claim.epoch != newest + 1 or (claim.predecessor, claim.predecessor_digest) != (newest, digest):
            raise errors.EpochTaken(
                f"{claim.name} claims epoch {claim.epoch} behind {claim.predecessor}; the newest is {newest}",
                epoch=claim.epoch,
                newest=newest,
            )
        record = chained(claim, index)
        tables.put(EPOCH_TABLE, _key(record.epoch), msgspec.msgpack.encode(record))
        tables.put(EPOCH_STATE_TABLE, NEWEST, _key(record.epoch) + record.digest)


def _key(epoch: int) -> bytes:
    return epoch.to_bytes(8, "big")


def claim(rows: Readable, *, node_id: str, name: str, term: int) -> Command:
    """Return the command by which a node claims the epoch behind the newest one in ``rows``."""
    newest, digest = newest_epoch(rows)
    return Command(FENCE, msgspec.msgpack.encode(Fence(newest + 1, node_id, name, term, newest, digest)))


def newest_epoch(rows: Readable) -> tuple[int, bytes]:
    """Return the newest epoch and the digest of its record; (0, `FIRST_DIGEST`) before the first."""
    stored = rows.get(EPOCH_STATE_TABLE, NEWEST)
    return (0, FIRST_DIGEST) if stored is None else (int.from_bytes(stored[:8], "big"), stored[8:])


def read_epoch(rows: Readable, epoch: int) -> EpochRecord | None:
    """Return one record; None when there is none."""
    stored = rows.get(EPOCH_TABLE, _key(epoch)) if epoch > 0 else None
    return None if stored is None else msgspec.msgpack.decode(stored, type=EpochRecord)


def chained(claimed: Fence, index: int) -> EpochRecord:
    """Return the record of a claim that was accepted at ``index`` of the journal.

    >>> chained(Fence(1, "a" * 32, "n1", 3, 0, bytes(16)), 2).digest.hex()
    '75f04a161622eeafa42261229d1736e7'
    """
    digest = _digest(
        claimed.predecessor_digest,
        (claimed.epoch, claimed.term, index, claimed.predecessor),
        (claimed.node_id, claimed.name),
    )
    return EpochRecord(claimed.epoch, claimed.node_id, claimed.name, claimed.term, index, claimed.predecessor, digest)


def _digest(before: bytes, numbers: tuple[int, ...], names: tuple[str, ...]) -> bytes:
    state = hashlib.blake2b(before, digest_size=DIGEST_BYTES, person=b"srengine-epoch")
    for number in numbers:
        state.update(number.to_bytes(8, "little"))
    for name in names:
        encoded = name.encode()
        state.update(len(encoded).to_bytes(4, "little"))
        state.update(encoded)
    return state.digest()


def check_epochs(rows: Readable) -> int:
    """Return the newest epoch, or raise `CorruptionError` when the chain is broken (B05). For every start of a node."""
    found = findings(rows.scan(EPOCH_TABLE), rows.get(EPOCH_STATE_TABLE, NEWEST))
    first = next(found, None)
    if first is not None:
        raise errors.CorruptionError(f"the chain of epochs is broken: {first}", table=EPOCH_TABLE)
    return newest_epoch(rows)[0]


def findings(records: Iterable[tuple[bytes, bytes]], newest: bytes | None) -> Iterator[str]:
    """Yield a sentence for each break of the invariants, at most `FINDINGS_MAX`.

    ``records``: rows of the table in key order; ``newest``: the value of its row of state.
    """
    for number, text in enumerate(_findings(records, newest)):
        if number == FINDINGS_MAX:
            return
        yield text


def _findings(records: Iterable[tuple[bytes, bytes]], newest: bytes | None) -> Iterator[str]:
    before = EpochRecord(0, "", "", 0, 0, 0, FIRST_DIGEST)
    for key, stored in records:
        try:
            record = msgspec.msgpack.decode(stored, type=EpochRecord)
        except (msgspec.MsgspecError, RecursionError) as error:
            yield f"the record under {key.hex()} cannot be read: {error}"
            continue
        if key != _key_of(record):
            yield f"the record under {key.hex()} is that of epoch {record.epoch}"
            continue
        if record.epoch != before.epoch + 1:
            yield f"epoch {before.epoch} is followed by {record.epoch}"
        elif record.predecessor != before.epoch or record.digest != _digest_of(record, before.digest):
            yield f"epoch {record.epoch} does not continue epoch {before.epoch}"
        elif record.term < before.term or record.index <= before.index:
            yield (
                f"epoch {record.epoch} (term {record.term}, index {record.index}) is not later than {before.epoch} "
                f"(term {before.term}, index {before.index})"
            )
        before = record
    expected = None if before.epoch == 0 else _key(before.epoch) + before.digest
    if newest != expected:
        said = "none" if newest is None else f"{int.from_bytes(newest[:8], 'big')}"
        yield f"the newest epoch is said to be {said}, and the last record is that of {before.epoch}"


def _key_of(record: EpochRecord) -> bytes | None:
    return _key(record.epoch) if 0 < record.epoch < NUMBER_MAX else None


def _digest_of(record: EpochRecord, before: bytes) -> bytes | None:
    numbers = (record.epoch, record.term, record.index, record.predecessor)
    if not all(0 <= number < NUMBER_MAX for number in numbers):
        return None
    return _digest(before, numbers, (record.node_id, record.name))
