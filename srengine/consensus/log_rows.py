r"""The rows of the node-wide log, as bytes and back, and the check that they fit each other.

Three tables of the metadata store in ``log/`` (docs/formats-log.md); every value there carries a checksum of table, key
and value, so a row in the wrong place is damage too::

    entries   group \0 index            ->  term, kind, chain, configuration, data
    groups    group \0 h                ->  hard state
              group \0 f                ->  floor, with the chain at it
              group \0 t                ->  tail: last index, its term, the chain at it
              group \0 d                ->  what was found damaged and is not made good yet
    saved     group \0 number index     ->  an entry that was cut off, or its raw bytes

The *chain* of an entry is a digest of the chain of the one before it and of everything in the entry; it begins at the
floor. The tail row is written in the transaction that writes the last entries. So whatever is lost, put in, replaced or
cut off shows when the rows are read in order (`survey`)::

    floor 2 --- 3 --- 4 --- 5 --- 6 --- 7       tail: 7, term, chain(7)
                            ^ damaged: the log is sound up to 4; 5 to 7 may not be believed

What it cannot show: a file that was put back whole as it was earlier. That is what claims of the peers are for.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec
import xxhash

from srengine import errors
from srengine._native import entries as kernel
from srengine.consensus.entries import Configuration, Entry, EntryKind, Floor, HardState
from srengine.storage.logged import Change
from srengine.storage.metadata_rows import Row

ENTRIES: Final = "entries"
GROUPS: Final = "groups"
SAVED: Final = "saved"

HARD_STATE: Final = b"h"
FLOOR: Final = b"f"
TAIL: Final = b"t"
DAMAGE: Final = b"d"

CHAIN_BYTES: Final = 16
_ENTRY: Final = struct.Struct("<QB3xI16s")
"""term, kind, bytes of the configuration, chain; then the configuration and the data."""
_ENTRY_BYTES: Final = _ENTRY.size
_CHAINED: Final = struct.Struct("<QQBI")
_PLACE: Final = struct.Struct("<QQ16s")
"""index, term, chain: the tail; the floor, with its configuration behind."""
_TERM: Final = struct.Struct("<Q")

_encode: Final = msgspec.msgpack.Encoder().encode
_decode_configuration: Final = msgspec.msgpack.Decoder(Configuration).decode
_KINDS: Final = {kind.value: kind for kind in EntryKind}


class Place(NamedTuple):
    """A point of a group's log: its entry's index and term, and the chain up to it."""

    index: int  # type: ignore[assignment]  # a tuple's own index() is not missed
    term: int
    chain: bytes


NOWHERE: Final = Place(0, 0, bytes(CHAIN_BYTES))


class Damage(msgspec.Struct, frozen=True):
    """Why a group's log may not be believed: a node that holds it promises nothing until it has caught up.

    ``index``: the first one that is not sound; ``last_index`` and ``last_term``: how far the log once went, as far as
    known. ``lost``: the hard state itself is gone, so it is not known what was promised in which term.
    """

    kind: str
    detail: str
    index: int
    last_index: int = 0
    last_term: int = 0
    lost: bool = False


class SavedSuffix(msgspec.Struct, frozen=True):
    """Entries that were cut off because a leader has others there. ``damaged``: how many of them cannot be read."""

    number: int
    first_index: int
    last_index: int
    complete: bool = True
    """False: it was larger than what is kept of one; its end is missing."""
    damaged: int = 0


# --- keys ------------------------------------------------------------------------------------------------------------


def group_range(name: str) -> tuple[bytes, bytes]:
    """Return start and stop of the keys of a group."""
    encoded = name.encode()
    return encoded + b"\0", encoded + b"\1"


def group_key(name: str, row: bytes) -> bytes:
    """Return the key of one of the group's own rows."""
    return name.encode() + b"\0" + row


def entry_key(prefix: bytes, index: int) -> bytes:
    """Return the key of an entry; ``prefix`` is the start of the group's range."""
    return prefix + index.to_bytes(8, "big")


def saved_key(prefix: bytes, number: int, index: int) -> bytes:
    """Return the key of a saved entry; index 0: the row that describes the suffix."""
    return prefix + number.to_bytes(8, "big") + index.to_bytes(8, "big")


# --- values ----------------------------------------------------------------------------------------------------------


def first_chain(name: str, floor: Floor) -> bytes:
    """Return the chain at a floor that no entry of ours stood at."""
    return xxhash.xxh3_128_digest(
        b"srengine-log\0" + name.encode() + b"\0" + _CHAINED.pack(floor.index, floor.term, 0, 0)
    )


def put_entries(
    changes: list[Change], prefix: bytes, entries: Sequence[Entry], chain: bytes
) -> tuple[Place, list[int]]:
    """Append the rows of entries behind ``chain`` to ``changes``; return the tail with them and their values' sizes.

    ``prefix`` as for `entry_key`.
    """
    chain, sizes = kernel.put_rows(changes, ENTRIES, prefix, entries, chain, _encode)
    last = entries[-1]
    return Place(last.index, last.term, chain), sizes


def decode_entry(index: int, value: bytes) -> Entry:
    """Return the entry in a value whose checksum was tested; `CorruptionError` when it is none of ours all the same."""
    entry, _ = _decode(index, value)
    return entry


def chain_of(value: bytes) -> bytes:
    """Return the chain that an entry's value carries."""
    return bytes(value[_ENTRY_BYTES - CHAIN_BYTES : _ENTRY_BYTES])


def _decode(index: int, value: bytes) -> tuple[Entry, bytes]:
    """Return the entry and its configuration's bytes."""
    try:
        term, kind, configuration_bytes, _ = _ENTRY.unpack_from(value)
        end = _ENTRY_BYTES + configuration_bytes
        encoded = value[_ENTRY_BYTES:end]
        configuration = _decode_configuration(encoded) if configuration_bytes else None
        return Entry(index, term, _KINDS[kind], value[end:], configuration), encoded
    except (struct.error, KeyError, ValueError, msgspec.MsgspecError) as error:
        raise errors.CorruptionError(f"the value of entry {index} is none: {error}", index=index) from error


def encode_hard_state(state: HardState) -> bytes:
    """Return the value of the row `HARD_STATE`."""
    return _TERM.pack(state.term) + state.vote.encode()


def decode_hard_state(value: bytes) -> HardState:
    """Return the hard state in a value whose checksum was tested."""
    try:
        return HardState(_TERM.unpack_from(value)[0], value[_TERM.size :].decode())
    except (struct.error, ValueError) as error:
        raise errors.CorruptionError(f"a hard state that is none: {error}") from error


def encode_place(place: Place) -> bytes:
    """Return the value of the row `TAIL`."""
    return _PLACE.pack(*place)


def decode_place(value: bytes) -> Place:
    """Return the tail in a value whose checksum was tested."""
    try:
        return Place(*_PLACE.unpack_from(value))
    except struct.error as error:
        raise errors.CorruptionError(f"a tail that is none: {error}") from error


def encode_floor(floor: Floor, chain: bytes) -> bytes:
    """Return the value of the row `FLOOR`."""
    return _PLACE.pack(floor.index, floor.term, chain) + _encode(floor.configuration)


def decode_floor(value: bytes) -> tuple[Floor, bytes]:
    """Return floor and chain in a value whose checksum was tested."""
    try:
        index, term, chain = _PLACE.unpack_from(value)
        return Floor(index, term, _decode_configuration(value[_PLACE.size :])), chain
    except (struct.error, msgspec.MsgspecError) as error:
        raise errors.CorruptionError(f"a floor that is none: {error}") from error


def encode_damage(damage: Damage) -> bytes:
    """Return the value of the row `DAMAGE`."""
    return _encode(damage)


def decode_damage(value: bytes) -> Damage:
    """Return the mark in a value whose checksum was tested."""
    try:
        return msgspec.msgpack.decode(value, type=Damage)
    except msgspec.MsgspecError as error:
        raise errors.CorruptionError(f"a mark that is none: {error}") from error


# --- do they fit? ----------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """One thing that is wrong with a group's log. ``index``: of an entry, None for another row.

    ``kind``: hard-state, floor, tail, mark, entry (cannot be read), missing-entry, replaced-entry, stray-entry.
    """

    kind: str
    index: int | None  # type: ignore[assignment]
    detail: str


@dataclass(slots=True)
class Survey:
    """What a group's rows say. Everything but ``findings`` and ``highest`` is of the sound beginning of the log."""

    hard_state: HardState | None = None
    floor: Floor = field(default_factory=Floor)
    floor_chain: bytes = bytes(CHAIN_BYTES)
    last: Place = NOWHERE
    terms: list[tuple[int, int]] = field(default_factory=list)
    """(first index, term) of each run of entries of one term."""
    configurations: list[tuple[int, Configuration]] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("I"))
    """Bytes of the value of each entry."""
    highest: int = 0
    """The last index that has a row, sound or not; the floor's when there is none."""
    tail: Place | None = None
    mark: Damage | None = None
    findings: list[Finding] = field(default_factory=list)
    broken_at: int | None = None
    """The first index that is not sound; None when the log is whole."""

    @property
    def damage(self) -> Damage | None:
        """Why the log may not be believed: an earlier mark, or the first finding that matters; None when sound."""
        found = None
        if self.broken_at is not None or self.hard_state is None:
            first = next(finding for finding in self.findings if finding.kind != "stray-entry")
            tail = self.tail if self.tail is not None else Place(self.highest, 0, b"")
            index = self.broken_at if self.broken_at is not None else self.last.index + 1
            found = Damage(first.kind, first.detail, index, tail.index, tail.term, lost=self.hard_state is None)
        if self.mark is None or found is None:
            return found if self.mark is None else self.mark
        return msgspec.structs.replace(
            self.mark,
            index=min(self.mark.index, found.index),
            last_index=max(self.mark.last_index, found.last_index),
            last_term=max(self.mark.last_term, found.last_term),
            lost=self.mark.lost or found.lost,
        )

    def note(self, kind: str, index: int | None, detail: str, *, broken_at: int | None = None) -> None:
        """Record a finding; ``broken_at``: from where on nothing may be believed because of it."""
        self.findings.append(Finding(kind, index, detail))
        if broken_at is not None:
            self.broken_at = broken_at if self.broken_at is None else min(self.broken_at, broken_at)


def survey(name: str, own: Mapping[bytes, Row], entries: Iterable[Row]) -> Survey:
    """Read a group's rows in order and say what is sound and what is not. ``own``: the group's rows by their letter."""
    found = Survey()
    _read_own(name, own, found)
    floor_is_known = not any(finding.kind == "floor" for finding in found.findings)
    prefix_bytes = len(name.encode()) + 1
    expected = found.floor.index + 1
    found.highest = found.floor.index
    chain: bytes | None = found.floor_chain if floor_is_known else None
    for row in entries:
        index = int.from_bytes(row.key[prefix_bytes:], "big")
        if index <= found.floor.index or len(row.key) != prefix_bytes + 8:
            found.note("stray-entry", index, f"entry {index} of {name} lies at or below the floor {found.floor.index}")
            continue
        found.highest = index
        if index > expected and floor_is_known:
            missing = f"entry {expected}" if index == expected + 1 else f"entries {expected} to {index - 1}"
            found.note("missing-entry", expected, f"{missing} of {name} missing", broken_at=expected)
            chain = None
        expected = index + 1
        chain = _read_entry(name, index, row, chain, found)
    _compare_with_tail(name, chain, found)
    if found.hard_state is not None and found.last.term > found.hard_state.term:
        detail = f"{name} holds entries of term {found.last.term} and says that its term is {found.hard_state.term}"
        found.note("hard-state", None, detail)
        found.hard_state = None
    return found


def _read_own(name: str, own: Mapping[bytes, Row], found: Survey) -> None:
    hard_state = _sound(own, HARD_STATE)
    if hard_state is None:
        found.note("hard-state", None, f"term and vote of {name} cannot be read")
    else:
        found.hard_state = decode_hard_state(hard_state)
    floor = _sound(own, FLOOR)
    if floor is None:
        found.note("floor", None, f"the floor of {name} cannot be read", broken_at=1)
    else:
        found.floor, found.floor_chain = decode_floor(floor)
        found.last = Place(found.floor.index, found.floor.term, found.floor_chain)
    tail = _sound(own, TAIL)
    if tail is not None:
        found.tail = decode_place(tail)
    mark = own.get(DAMAGE)
    if mark is not None and mark.sound:
        found.mark = decode_damage(mark.value)
    elif mark is not None:
        # It says that something was wrong, if no longer what.
        found.note("mark", None, f"the mark of a damage of {name} cannot be read", broken_at=found.floor.index + 1)


def _sound(own: Mapping[bytes, Row], letter: bytes) -> bytes | None:
    row = own.get(letter)
    return row.value if row is not None and row.sound else None


def _read_entry(name: str, index: int, row: Row, chain: bytes | None, found: Survey) -> bytes | None:
    """Look at one entry behind ``chain`` (None: not known); return the chain with it, None when it cannot be read."""
    if not row.sound:
        found.note("entry", index, f"entry {index} of {name} is damaged", broken_at=index)
        return None
    try:
        entry, configuration = _decode(index, row.value)
    except errors.CorruptionError as error:
        found.note("entry", index, f"{name}: {error.message}", broken_at=index)
        return None
    carried = chain_of(row.value)
    if chain is not None:
        if kernel.chained(chain, index, entry.term, entry.kind, configuration, entry.data) != carried:
            detail = f"entry {index} of {name} does not continue the one before it"
            found.note("replaced-entry", index, detail, broken_at=index)
        elif entry.term < found.last.term and found.broken_at is None:
            detail = f"entry {index} of {name} is of term {entry.term}, behind one of {found.last.term}"
            found.note("replaced-entry", index, detail, broken_at=index)
    if found.broken_at is None or index < found.broken_at:
        found.last = Place(index, entry.term, carried)
        found.sizes.append(len(row.value))
        if not found.terms or found.terms[-1][1] != entry.term:
            found.terms.append((index, entry.term))
        if entry.configuration is not None:
            found.configurations.append((index, entry.configuration))
    return carried


def _compare_with_tail(name: str, chain: bytes | None, found: Survey) -> None:
    tail = found.tail
    if tail is None:
        found.note("tail", None, f"the tail of {name} cannot be read", broken_at=found.highest + 1)
    elif tail.index > found.highest:
        detail = f"the log of {name} ends at {found.highest}; it went to {tail.index}"
        found.note("missing-entry", found.highest + 1, detail, broken_at=max(found.highest, found.floor.index) + 1)
    elif tail.index < found.highest:
        detail = f"the log of {name} was written to {tail.index}, and goes to {found.highest}"
        found.note("tail", None, detail, broken_at=tail.index + 1)
        _cut_back(tail.index, found)
    elif chain is not None and chain != tail.chain:
        detail = f"the entries of {name} up to {tail.index} are not the ones that were written"
        found.note("replaced-entry", None, detail, broken_at=found.floor.index + 1)
        _cut_back(found.floor.index, found)


def _cut_back(index: int, found: Survey) -> None:
    """Take back what was believed beyond ``index``: all of it, because the chain there is not known any more."""
    if found.last.index > index:
        found.last = Place(found.floor.index, found.floor.term, found.floor_chain)
        found.terms.clear()
        found.configurations.clear()
        del found.sizes[:]
        found.broken_at = found.floor.index + 1
