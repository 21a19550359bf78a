"""The sectors of a write-ahead log: written and synced in one call, and read back."""

from typing import Final, Self

from typing_extensions import Buffer

SECTOR_BYTES: Final[int]
ROOM_BYTES: Final[int]
"""Bytes of a record in one sector."""

def append(fd: int, first: int, identity: int, generation: int, number: int, record: bytes) -> int:
    """Write a record from sector ``first`` on and make it durable; return 0, or the errno of what failed."""

def heads(content: Buffer, identity: int) -> tuple[list[tuple[int, int, int, int, int, int]], list[int]]:
    """Return (sector, generation, record, place, total, digest) of every sound sector that was ever written, and the
    numbers of those that are not sound.
    """

class Appender:
    """A thread that makes one record after the other durable, and says so by a byte on the descriptor ``notify``.

    For one event loop: nobody who works on a record needs the interpreter, so neither end waits for it.
    """

    busy: bool
    """Whether something was begun and not taken."""

    def __new__(cls, notify: int) -> Self: ...
    def begin(self, fd: int, first: int, identity: int, generation: int, number: int, record: bytes) -> None:
        """`append` in the thread; the one before was taken."""

    def take(self) -> int:
        """Wait for what was begun and return what `append` would have."""

    def close(self) -> None:
        """End the thread after what was begun; a second call does nothing."""
