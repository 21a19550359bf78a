"""Leaves of a tablet and sketches over them. See the top of ext/merkle.pyx and docs/formats-exchange.md."""

from typing import Final, Self

from typing_extensions import Buffer

from srengine._native.tablet import Environment, Reader

ESTIMATOR_BYTES: Final[int]
"""Size of the estimator: one signed byte a bucket."""

def peel(sketches: list[Sketch], id_bits: int = 47) -> list[tuple[int, int, int]] | None:
    """Read (id, value, weighted) of what differs from tables of the same differences; None: too small for them.

    The tables stay as they are. Work is bounded by the number of cells, whatever they hold.
    """

class Sketch:
    """``ways`` (3 to 5) subtables of ``width`` cells over leaves (30 bytes each on the wire) or records (17)."""

    def __new__(cls, width: int, seed: int, *, by_leaf: bool, ways: int = 3) -> Self: ...
    width: int
    ways: int
    seed: int
    by_leaf: bool
    def __len__(self) -> int: ...
    def add(self, item: int, value: int, weighted: int = 0) -> None:
        """Add one item; a negative value takes it away."""

    def add_leaves(self, tree: Tree) -> None:
        """Add every leaf of a tree that is up to date, else `NotReady`. Several trees may share a sketch."""

    def encode(self) -> bytes:
        """Return the cells as they travel."""

    def subtract(self, cells: Buffer) -> None:
        """Subtract the other side's cells. Raises `FrameError` for another number of cells."""

    def minus(self, cells: Buffer) -> Sketch:
        """Return a new table: this one without the other side's cells. Raises as `subtract`."""

class Tree:
    """The leaves of one tablet: a cache. One tree an environment; the caller serializes its calls."""

    def __new__(cls, environment: Environment, *, boundary_bits: int = 5, id_bits: int = 47) -> Self: ...
    environment: Environment
    leaf_count: int
    count: int
    live_count: int
    entries: int
    damaged: list[bytes]
    walked: int
    txn: int
    @property
    def warm(self) -> bool: ...
    @property
    def sum(self) -> bytes: ...
    @property
    def estimator(self) -> bytes: ...
    @property
    def memory_bytes(self) -> int: ...
    def start_tracking(self) -> None:
        """Have the writer note what it changes, from the next transaction on."""

    def drop(self) -> None:
        """Forget the leaves and stop tracking."""

    def build(self, reader: Reader, other: Reader | None = None) -> bool:
        """Sum up all records of a view; with a second reader of it in two threads. False: not the same transaction."""

    def advance(self, reader: Reader) -> bool:
        """Bring the leaves to the reader's transaction; False: build again."""

    def leaf_key(self, ordinal: int) -> bytes | None: ...
    def leaves(self) -> list[tuple[bytes, int, bytes, int, int, int]]: ...
    def digests(self) -> bytes:
        """Return 14 bytes a leaf: id and the first 8 bytes of its sum."""

    def find_leaves(self, ids: list[int]) -> dict[int, int]: ...
    def leaves_at(self, positions: list[int]) -> list[int]: ...
    def records(
        self,
        reader: Reader,
        first: int,
        last: int,
        ids: list[int] | None,
        with_rows: bool,
        bytes_max: int | None = None,
    ) -> list[tuple[int, int, bytes, bytes, bytes | None, int]]:
        """Return (id, value, key, digest, row, bytes of the row) of the records in leaves [first, last).

        Raises `CorruptionError`, `QuotaExceeded` past ``bytes_max``.
        """

    def records_of(
        self, reader: Reader, ordinals: list[int], ids: list[int], with_rows: bool
    ) -> list[tuple[int, int, bytes, bytes | None]]:
        """Return (leaf ordinal, id, key, row) of the records with one of ``ids`` in these leaves, which rise."""

    def records_between(
        self,
        reader: Reader,
        start: bytes,
        stop: bytes | None,
        ids: list[int] | None,
        with_rows: bool,
        bytes_max: int | None = None,
    ) -> list[tuple[int, int, bytes, bytes, bytes | None, int]]:
        """Return as `records` does, of keys in [start, stop)."""

    def two_records(
        self, reader: Reader, ordinal: int, value: int, weighted: int, records_max: int
    ) -> tuple[int, int] | None:
        """Return the key ids of the two records that make a leaf differ by (value, weighted), or None."""

    def compare_rows(self, reader: Reader, rows: Buffer) -> list[tuple[bytes, bool, int, int]]:
        """Return (key, whether the record here is the same, start, end in ``rows``). Raises `FrameError`."""

    def rows_digest(self, reader: Reader) -> bytes:
        """Return the root without its records: requests, sessions, purge mark."""

class Records:
    """Where every record is in key order. Raises `QuotaExceeded` for more than ``records_max``.

    With another reader of the same transaction in two threads; of another transaction it is left aside. ``table``, over
    records and empty, gets each of them on the way.
    """

    def __new__(
        cls,
        tree: Tree,
        reader: Reader,
        records_max: int,
        other: Reader | None = None,
        table: Sketch | None = None,
    ) -> Self: ...
    count: int
    def find(self, ids: list[int]) -> list[int]:
        """Return the positions of the records that may have these ids, rising: those that share half of one."""

def differing_ranges(here: Tree, there: Tree) -> list[tuple[bytes, bytes | None]]:
    """Return the key ranges between boundaries common to both trees whose sums differ; both stand at their readers."""
