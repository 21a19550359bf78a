"""This node's copy of one tablet: open, missing, or damaged; trusted or not.

*Trust.* A copy is trusted when it is what this node last wrote. Three things must agree, each compared at the open:

* the boot number in the tablet is at least the one that the identity file calls stamped (an older state put back has a
  lower one);
* the data file is the very file that was noted when it was made (inode and birth time; a copied one has others);
* a tablet that was noted is there.

An untrusted copy is not thrown away: its history may be right and only end early. It counts for nothing when a leader
starts, and becomes trusted again when its root is proved against a leader that serves (a follower) or when it was
brought to the highest position (a leader); then it is stamped and noted anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import msgspec

from srengine import errors
from srengine.ha.metadata import Store as Rows
from srengine.storage import Store, Tablet
from srengine.sync.health import Health
from srengine.types import Position

TABLET_TABLE: Final = "local_tablets"
"""Local, in no digest: tablet id -> `Note`."""

_logger = logging.getLogger(__name__)


class FileId(msgspec.Struct, frozen=True):
    """Which file a file is: copies and restored ones differ. ``birth_ns`` is 0 where the file system does not tell."""

    inode: int
    birth_ns: int


class FileIds(Protocol):
    """Tells which file a file is, None when it is not there."""

    def __call__(self, path: Path) -> FileId | None:
        """Look at the file."""
        ...


@dataclass(frozen=True, slots=True)
class Spec:
    """What the catalog says of a tablet."""

    tablet_id: str
    table: str
    number: int
    lineage: str
    seed: bytes
    nodes: tuple[str, ...]

    @property
    def leader(self) -> str:
        """Name of the node that leads."""
        return self.nodes[0]


@dataclass(slots=True)
class Standing:
    """What this run of the node is: changed by the node when peers know better.

    ``boot_number``: of this run. ``stamped``: tablets with a lower number are an older state. ``distrusted``: the
    directory as a whole was put back or copied, so a tablet that is not there proves nothing either.
    """

    boot_number: int
    stamped: int
    distrusted: bool


class Slot:
    """One copy. ``tablet`` is None while there is none that opens; ``fault`` says why then."""

    def __init__(
        self, spec: Spec, *, store: Store, rows: Rows, standing: Standing, file_ids: FileIds, data: Path
    ) -> None:
        self.spec = spec
        self.tablet: Tablet | None = None
        self.fault = ""
        self.trusted = False
        self.created = False
        """Made or found missing in this run: whatever comes is a full copy."""
        self.writing = asyncio.Lock()
        """Held by whoever changes the tablet: the leader's commits, a delta, a copy, a switch, a repair."""
        self.health = Health()
        self._store = store
        self._rows = rows
        self._standing = standing
        self._file_ids = file_ids
        self._path = data / "tablets" / spec.tablet_id / "data.mdb"

    @property
    def store(self) -> Store:
        """The store that holds it."""
        return self._store

    def open(self) -> None:
        """Open the tablet, or make an empty one when there is none; decide whether it is trusted. Blocks."""
        note = self._note()
        try:
            self.tablet = self._store.open_tablet(self.spec.tablet_id)
        except errors.NotFound:
            self._make(wiped=note is not None)
            return
        except (errors.CorruptionError, errors.TabletFenced, errors.ForeignData) as error:
            self.fault = f"{error.code}: {error.message}"
            self.created = True
            _logger.warning("tablet %s does not open: %s", self.spec.tablet_id, self.fault)
            return
        tablet = self.tablet
        if note is None and tablet.boot_number == 0 and tablet.position.sequence == 0:
            # The crash came between making and noting it; nothing was ever written.
            self.trusted = not self._standing.distrusted
        else:
            same = note is not None and note == self._file_ids(self._path)
            self.trusted = same and tablet.boot_number >= self._standing.stamped and not self._standing.distrusted
        if tablet.position.lineage != self.spec.lineage:
            self.fault = f"lineage {tablet.position.lineage} is not the catalog's {self.spec.lineage}"
            self.trusted = False

    def _make(self, *, wiped: bool) -> None:
        self.tablet = self._store.create_tablet(self.spec.tablet_id, lineage=self.spec.lineage, seed=self.spec.seed)
        self.created = True
        self.trusted = not wiped and not self._standing.distrusted
        if self.trusted:
            self.stamp()

    def stamp(self) -> None:
        """Write down that this copy is what it should be, in this run. Blocks."""
        assert self.tablet is not None
        if self.tablet.boot_number != self._standing.boot_number:
            self.tablet.set_boot_number(self._standing.boot_number)
        note = self._file_ids(self._path)
        if note is not None and note != self._note():
            with self._rows.transaction() as transaction:
                transaction.put(TABLET_TABLE, self.spec.tablet_id.encode(), msgspec.msgpack.encode(note))
        self.trusted = True

    def _note(self) -> FileId | None:
        stored = self._rows.get(TABLET_TABLE, self.spec.tablet_id.encode())
        return None if stored is None else msgspec.msgpack.decode(stored, type=FileId)

    @property
    def position(self) -> Position:
        """Where the copy stands; sequence 0 of the catalog's lineage when nothing opens."""
        if self.tablet is None:
            return Position(self.spec.lineage, 0, bytes(16), 0)
        return self.tablet.position

    @property
    def filling(self) -> bool:
        """Whether the copy is none to build on: half applied, or it does not open at all."""
        return self.tablet is None or self.tablet.fill_mark is not None

    def root_at(self, sequence: int) -> bytes | None:
        """Return the own root after ``sequence``, None when it is not known any more."""
        return None if self.tablet is None else self.tablet.root_at(sequence)

    def opened(self) -> Tablet:
        """Return the tablet, or raise `NotReady` that says what is wrong."""
        if self.tablet is None:
            raise errors.NotReady(f"tablet {self.spec.tablet_id} does not open here: {self.fault}")
        return self.tablet


Slots = Callable[[str], Slot | None]
