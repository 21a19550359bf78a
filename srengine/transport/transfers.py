"""Bytes too large for one frame: cut into pieces, moved under credit, put together within bounds.

The receiver decides. It learns the sizes first, reserves room for the whole (`Budget`), and only then grants credit, a
few pieces at a time; the sender sends a piece for each credit and nothing more. So memory is bounded at the receiver by
what it reserved, at the sender by what the caller handed over, and small messages pass between the pieces.

A transfer that has its room never waits for another one, so transfers cannot block each other for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from srengine import errors, limits
from srengine.codec.envelopes import Data
from srengine.transport.peers import Buffer

GRANT_PIECES: Final = limits.CREDIT_FRAMES // 2
"""Credit is given back in groups, so that grants are few."""


class Reservation:
    """Room for ``amount`` bytes: waiting, held, or released. Made by `Budget.reserve`."""

    __slots__ = ("_budgets", "_granted", "amount", "state")

    def __init__(self, amount: int, budgets: Sequence[Budget], granted: Callable[[], None]) -> None:
        self.amount = amount
        self._granted = granted
        self._budgets = list(budgets)
        self.state: str = "waiting"
        self._advance(0)

    def _advance(self, index: int) -> None:
        # Narrow budget first (a connection's), then the wide one: who waits for the wide one keeps the narrow one's
        # room.
        if index == len(self._budgets):
            self.state = "held"
            self._granted()
            return
        self._budgets[index].queue(self, lambda: self._advance(index + 1))

    def release(self) -> None:
        """Give the room back, or stop waiting for it. Idempotent."""
        if self.state == "released":
            return
        self.state = "released"
        for budget in self._budgets:
            budget.give_back(self)


class Budget:
    """Bytes that may be held at one time; who does not fit waits in order."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.used = 0
        """0 <= used <= bytes_max"""
        self._holders: set[Reservation] = set()
        self._waiting: deque[tuple[Reservation, Callable[[], None]]] = deque()

    def queue(self, reservation: Reservation, granted: Callable[[], None]) -> None:
        """Call ``granted`` as soon as there is room, perhaps now."""
        assert reservation.amount <= self.bytes_max, (reservation.amount, self.bytes_max)
        self._waiting.append((reservation, granted))
        self._serve()

    def give_back(self, reservation: Reservation) -> None:
        """Take the reservation's bytes off, if it has any here."""
        if reservation in self._holders:
            self._holders.discard(reservation)
            self.used -= reservation.amount
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            reservation, granted = self._waiting[0]
            if reservation.state == "released":
                self._waiting.popleft()
                continue
            if self.used + reservation.amount > self.bytes_max:
                return
            self._waiting.popleft()
            self._holders.add(reservation)
            self.used += reservation.amount
            granted()


class Assembly:
    """Attachments that arrive in pieces. ``done`` is called with all of them, in order, when the last byte is there."""

    __slots__ = ("_current", "_done", "_next", "_number", "_parts", "_since_grant", "_sizes", "reservation")

    def __init__(self, sizes: Sequence[int], done: Callable[[list[memoryview]], None]) -> None:
        self._sizes = sizes
        self._done = done
        self._parts: list[memoryview] = []
        self._current = bytearray()
        self._next = 0
        self._number = 0
        self._since_grant = 0
        self.reservation: Reservation | None = None
        self._skip_empty()

    def add(self, data: Data, piece: memoryview) -> int:
        """Take one piece; return how much credit to grant now. Raises `FrameError` for a piece out of place."""
        if data.number < self._number:
            return 0  # a repeated frame
        if self.reservation is None or self.reservation.state != "held":
            raise errors.FrameError("a piece that nobody asked for")
        if data.number != self._number or self._next >= len(self._sizes):
            raise errors.FrameError(f"piece {data.number} where {self._number} belongs")
        wanted = self._sizes[self._next] - len(self._current)
        if piece.nbytes > wanted or data.last != (piece.nbytes == wanted) or not piece.nbytes:
            raise errors.FrameError(f"a piece of {piece.nbytes} bytes where {wanted} are missing")
        self._number += 1
        self._current += piece
        if data.last:
            self._parts.append(memoryview(self._current).toreadonly())
            self._current = bytearray()
            self._next += 1
            self._skip_empty()
            if self._next == len(self._sizes):
                self._done(self._parts)
                return 0
        self._since_grant += 1
        if self._since_grant < GRANT_PIECES:
            return 0
        self._since_grant = 0
        return GRANT_PIECES

    def _skip_empty(self) -> None:
        while self._next < len(self._sizes) and self._sizes[self._next] == 0:
            self._parts.append(memoryview(b""))
            self._next += 1


class Outgoing:
    """Attachments that wait for credit. `grant` returns the pieces that may go now."""

    __slots__ = ("_credit", "_number", "_pieces", "_request", "finished")

    def __init__(self, request: int, attachments: Sequence[Buffer]) -> None:
        self._request = request
        self._pieces = _cut_all(attachments)
        self._number = 0
        self._credit = 0
        self.finished = False

    def grant(self, pieces: int) -> Iterator[tuple[Data, memoryview]]:
        """Yield what the new credit allows."""
        # A peer cannot bank credit: more than a window at a time is not meant seriously.
        self._credit = min(self._credit + pieces, limits.CREDIT_FRAMES)
        while self._credit:
            step = next(self._pieces, None)
            if step is None:
                self.finished = True
                return
            piece, last = step
            self._credit -= 1
            yield Data(self._request, self._number, piece.nbytes, last), piece
            self._number += 1


def cut(buffer: Buffer, bytes_max: int) -> Iterator[tuple[memoryview, bool]]:
    """Yield ``(piece, last)`` over the buffer without copying; an empty buffer is one empty last piece."""
    view = memoryview(buffer).cast("B")
    size = view.nbytes
    if size <= bytes_max:
        yield view, True
        return
    for start in range(0, size, bytes_max):
        yield view[start : start + bytes_max], start + bytes_max >= size


def _cut_all(attachments: Sequence[Buffer]) -> Iterator[tuple[memoryview, bool]]:
    for attachment in attachments:
        if len(attachment):
            yield from cut(attachment, limits.PART_BYTES_MAX)


def sizes_of(attachments: Sequence[Buffer]) -> tuple[tuple[int, ...], int]:
    """Return the size of each attachment, and of all together; `InvalidValue` beyond the bounds."""
    if not attachments:
        return (), 0
    sizes = tuple(map(len, attachments))
    return sizes, check_sizes(sizes)


def check_sizes(sizes: Sequence[int]) -> int:
    """Return the sum of the sizes of attachments; `InvalidValue` beyond the bounds."""
    total = sum(sizes)
    if len(sizes) > limits.ATTACHMENTS_MAX or total > limits.CONNECTION_BYTES_MAX:
        raise errors.InvalidValue(
            f"{len(sizes)} attachments of {total} bytes; at most {limits.ATTACHMENTS_MAX} of "
            f"{limits.CONNECTION_BYTES_MAX} bytes together",
            bytes=total,
        )
    return total
