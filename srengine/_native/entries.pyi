"""Entries of the log of consensus as rows, chained (srengine/consensus/log_rows.py says what a row holds)."""

from collections.abc import Callable, Iterable
from typing import Any

def chained(chain: bytes, index: int, term: int, kind: int, configuration: bytes, data: bytes) -> bytes:
    """Return the chain with an entry, of that before it."""

def put_rows(
    changes: list[tuple[str, bytes, bytes | None]],
    table: str,
    prefix: bytes,
    entries: Iterable[Any],
    chain: bytes,
    encode: Callable[[Any], bytes],
) -> tuple[bytes, list[int]]:
    """Append (table, key, value) of each entry to ``changes``; return the chain with the last and the values' sizes.

    ``encode`` makes the bytes of a configuration.
    """
