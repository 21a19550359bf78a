"""Entries of the log of consensus as rows in plain Python, from docs/formats-log.md alone.

Slow and obvious. The kernel must agree with it byte for byte.
"""

from __future__ import annotations

import xxhash


def little(number: int, size: int) -> bytes:
    return number.to_bytes(size, "little")


def chained(chain: bytes, index: int, term: int, kind: int, configuration: bytes, data: bytes) -> bytes:
    """Return the chain with an entry, of that before it."""
    head = little(index, 8) + little(term, 8) + little(kind, 1) + little(len(configuration), 4)
    return xxhash.xxh3_128_digest(chain + head + configuration + data)


def row(prefix: bytes, chain: bytes, index: int, term: int, kind: int, configuration: bytes, data: bytes):
    """Return key, value and chain of an entry."""
    after = chained(chain, index, term, kind, configuration, data)
    head = little(term, 8) + little(kind, 1) + bytes(3) + little(len(configuration), 4) + after
    return prefix + index.to_bytes(8, "big"), head + configuration + data, after
