"""What an exchange needs of a tablet: a `Side`, and its `Moment` at which sums and reads agree.

`srengine.storage.merkle` has both; the machine knows these protocols alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from srengine._native import merkle
from srengine.sync.exchange_messages import PREFIX_WAYS, PREFIX_WIDTH, Shape
from srengine.types import Actual, Found, Item, Listed, Located, Repair

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

NOTHING: Final = Located([], [], [])


class Moment(Protocol):
    """A tablet at one moment: the arithmetic and the reads that `srengine.storage.merkle.Moment` does for a side."""

    sequence: int
    root: bytes
    count: int

    @property
    def state(self) -> bytes:
        """The state row."""
        ...

    @property
    def leaf_count(self) -> int:
        """How many leaves there are."""
        ...

    @property
    def estimator(self) -> bytes:
        """The estimator's buckets."""
        ...

    @property
    def rows_digest(self) -> bytes:
        """The root without its records."""
        ...

    @property
    def actual(self) -> Actual:
        """What the records add up to."""
        ...

    @property
    def dump(self) -> bytes:
        """All leaf digests."""
        ...

    def sketch(self, *, by_leaf: bool, ways: int, width: int, seed: int) -> merkle.Sketch:
        """Return a table of all leaves or records."""
        ...

    def prepare(self, *, ways: int, width: int, seed: int) -> None:
        """Make a table over records now; `sketch` returns it when it is asked for at this moment's transaction."""
        ...

    def fill(self, table: merkle.Sketch) -> None:
        """Add all leaves to a table that other tablets' leaves stand in, too."""
        ...

    def own_leaves(self, items: list[Item]) -> set[int]:
        """Return the ids of those items that are leaves here."""
        ...

    def peel(self, sketches: list[merkle.Sketch]) -> list[Item] | None:
        """Read what differs, or None."""
        ...

    def resolve(self, items: list[Item]) -> Located:
        """Locate the records behind differing leaves."""
        ...

    def list_ranges(self, located: Located) -> Located:
        """List ranges in place of shipping them."""
        ...

    def compare_listed(self, listed: tuple[Listed, ...]) -> tuple[list[bytes], tuple[Listed, ...]]:
        """Return our keys beyond the lists, and the lists of what is not here."""
        ...

    def differing_leaves(self, dump: bytes) -> Located:
        """Return what a dump shows to differ."""
        ...

    def rows_of(self, located: Located, since: int | None, *, bytes_max: int) -> Found:
        """Return the rows to ship."""
        ...

    def meta(self, *, with_rows: bool) -> bytes:
        """Return the meta rows to ship."""
        ...

    def settle(self, rows: bytes, absent: Located, extra: list[bytes]) -> Repair:
        """Work out the repair."""
        ...

    @staticmethod
    def sequence_of(state: bytes) -> int:
        """Return the sequence of a state row."""
        ...

    @staticmethod
    def merge_rows(older: bytes, newer: bytes) -> bytes:
        """Return rows of both, newer ones over older."""
        ...


class Side(Protocol):
    """What the machine needs of a tablet. `srengine.storage.Tablet.leaves` and its position give it."""

    @property
    def place(self) -> tuple[bytes, int, int]:
        """(root, count, sequence), without touching a record."""
        ...

    def stands_at(self, where: bytes) -> bool:
        """Whether it is there; costs nothing."""
        ...

    def moment(self, *, recount: bool = False) -> AbstractContextManager[Moment]:
        """Bring the leaves up to date and pin the view."""
        ...


def prefix_of(moment: Moment, root: bytes) -> merkle.Sketch:
    """Return the six cells over leaves; their seed is the root that the initiator showed."""
    return moment.sketch(by_leaf=True, ways=PREFIX_WAYS, width=PREFIX_WIDTH, seed=int.from_bytes(root[:8], "little"))


def table_of(moment: Moment, shape: Shape) -> merkle.Sketch:
    """Return a table of that shape over all leaves or all records."""
    return moment.sketch(by_leaf=shape.by_leaf, ways=shape.ways, width=shape.width, seed=shape.seed)


def located_by(moment: Moment, items: list[Item], *, by_leaf: bool) -> Located:
    """Return the records that peeled items stand for."""
    return moment.resolve(items) if by_leaf else Located([], sorted(item for item, _, _ in items), [])
