"""Rows of named tables in one LMDB environment; see ext/rows.pyx."""

from collections.abc import Sequence
from typing import Final, TypeAlias

MAP_FULL: Final[int]
PANIC: Final[int]
DAMAGED: Final[tuple[int, ...]]
STRANGE: Final[tuple[int, ...]]

_Change: TypeAlias = tuple[int | str, bytes, bytes | None] | tuple[int | str, dict[bytes, bytes | None]]
"""(table, key, value), or many of a table; None: the key is deleted. A table's handle, or its name."""
_Page: TypeAlias = tuple[list[tuple[bytes, bytes]], bool]
"""Rows, and whether they are the last."""

class RowsError(Exception):
    """LMDB refused something: ``code`` is errno (positive) or one of LMDB's own (negative)."""

    code: int
    def __init__(self, code: int) -> None: ...

class Environment:
    """One open environment. All calls raise `RowsError`."""

    def __init__(self, path: bytes, map_bytes: int, tables_max: int, mode: int) -> None: ...
    def close(self) -> None:
        """Close it; a second call does nothing."""

    def tables(self) -> dict[bytes, int]:
        """Return {name: handle} of all tables, opened."""

    def get(self, table: int, key: bytes) -> bytes | None:
        """Return the committed value, None without one."""

    def page(
        self, table: int, start: bytes | None, after: bool, stop: bytes | None, rows_max: int, bytes_max: int
    ) -> _Page:
        """Return committed rows and whether they are the last: keys from ``start`` (None: the first) to before
        ``stop`` (None: the last), without ``start`` itself if ``after``; as many as the bounds allow.
        """

    def change(self, rows: Sequence[_Change], tables: dict[str, int] | None = None) -> None:
        """Put each row, or delete the key where the value is None, in one durable transaction; of two for one key the
        later one holds. ``rows`` is a list; neither it nor a dictionary in it may be changed meanwhile.

        A table is a handle: the value is stored as it is. Or it is a name, with its handle in ``tables``: the value is
        stored with its seal.
        """

    def begin(self) -> Writer:
        """Begin a transaction that changes something; waits while another one runs."""

    def sizes(self) -> tuple[int, int]:
        """Return (bytes of a page, pages in use from the beginning of the file)."""

    def last_transaction(self) -> int:
        """Return the number of the last committed transaction that changed something."""

    def set_map_bytes(self, size: int) -> None:
        """Move the map; no transaction may be open."""

class Writer:
    """A transaction that changes something; ended by `commit` or `abort`, in the thread that began it."""

    def open_table(self, name: bytes) -> int:
        """Return the handle of a table, made when there is none; it is good outside once this is committed."""

    def get(self, table: int, key: bytes) -> bytes | None:
        """See `Environment.get`; sees the changes of this transaction."""

    def page(
        self, table: int, start: bytes | None, after: bool, stop: bytes | None, rows_max: int, bytes_max: int
    ) -> _Page:
        """See `Environment.page`; sees the changes of this transaction."""

    def change(self, rows: Sequence[_Change], tables: dict[str, int] | None = None) -> None:
        """See `Environment.change`; after an error this can only be aborted."""

    def empty(self, table: int) -> None:
        """Delete all rows of a table."""

    def commit(self) -> None:
        """Make it durable; this ends it, with or without an error."""

    def abort(self) -> None:
        """Take it back; nothing happens when it has ended."""
