"""The log as a machine sees it: what is durable, what has to become so, and an index of terms and configurations.

::

        trimmed      |  durable, in the `LogReader`    |  pending, in memory
    1 ... floor.index | floor.index+1 ... durable_index | durable_index+1 ... last_index

Terms are kept as runs and configurations as a list, so that neither asking for a term nor looking for the place where
two logs part reads the log. They are built by one pass over the kept entries when the machine starts.

Invariants: ``floor.index <= durable_index <= last_index``; terms never fall along the log; when entries replace durable
ones, ``durable_index`` goes back to before them at once: what is being replaced counts for nothing any more.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

from srengine.consensus.effects import LogReader
from srengine.consensus.entries import Configuration, Entry, Floor, bytes_of, entry_bytes
from srengine.limits import APPLY_BYTES_MAX


class Handed:
    """Entries that were handed out to be applied, and that the state machine does not hold durably yet."""

    def __init__(self) -> None:
        self.bytes = 0
        """Of all of them."""
        self._sizes: deque[tuple[int, int]] = deque()
        """(index, bytes), in order."""

    def add(self, entries: Sequence[Entry]) -> None:
        """Take note of what was handed out, behind all that was before."""
        for entry in entries:
            size = entry_bytes(entry)
            self._sizes.append((entry.index, size))
            self.bytes += size

    def drop(self, index: int) -> None:
        """Take note that everything up to ``index`` is durable."""
        while self._sizes and self._sizes[0][0] <= index:
            self.bytes -= self._sizes.popleft()[1]


class LogView:
    """One group's log. The driver changes what `LogReader` shows only as `Effects.persist` and trimming say."""

    def __init__(self, log: LogReader) -> None:
        self._log = log
        self.floor: Floor = log.floor
        self.durable_index: int = log.last_index
        self.last_index: int = log.last_index
        """Index of the last entry, durable or not."""
        self.configuration: Configuration = log.floor.configuration
        """The configuration in force: the last one in the log, committed or not."""
        self._pending: list[Entry] = []
        self._pending_bytes = 0
        self._starts: list[int] = []
        """First index of each run of equal terms; the first one is the floor's."""
        self._terms: list[int] = []
        self._configurations: list[tuple[int, Configuration]] = []
        """(index, configuration), the first one in force at the floor."""
        self._load()

    def _load(self) -> None:
        self.floor = self._log.floor
        self.durable_index = self.last_index = self._log.last_index
        self.configuration = self.floor.configuration
        self._pending, self._pending_bytes = [], 0
        self._starts, self._terms = [self.floor.index], [self.floor.term]
        self._configurations = [(self.floor.index, self.floor.configuration)]
        index = self.floor.index + 1
        while index <= self.durable_index:
            for entry in self._log.entries(index, self.durable_index + 1, APPLY_BYTES_MAX):
                assert entry.index == index, (entry.index, index)
                self._note(entry)
                index += 1

    def _note(self, entry: Entry) -> None:
        assert entry.term >= self._terms[-1], (entry.term, self._terms[-1])
        if entry.term != self._terms[-1]:
            self._starts.append(entry.index)
            self._terms.append(entry.term)
        if entry.configuration is not None:
            self._configurations.append((entry.index, entry.configuration))
            self.configuration = entry.configuration

    # --- looking -----------------------------------------------------------------------------------------------------

    @property
    def last_term(self) -> int:
        """Term of the last entry."""
        return self._terms[-1]

    @property
    def durable_term(self) -> int:
        """Term of the last durable entry."""
        return self._terms[self._run(self.durable_index)]

    @property
    def pending(self) -> tuple[Entry, ...]:
        """What is not durable."""
        return tuple(self._pending)

    @property
    def configuration_index(self) -> int:
        """Where it stands; the floor's index or less when it is that of the floor."""
        return self._configurations[-1][0]

    @property
    def configurations(self) -> tuple[tuple[int, Configuration], ...]:
        """All that the log knows, oldest first."""
        return tuple(self._configurations)

    def configuration_at(self, index: int) -> Configuration:
        """Return the configuration that was in force at ``index``, at or above the floor."""
        assert self.floor.index <= index <= self.last_index, (self.floor.index, index, self.last_index)
        position = bisect_right(self._configurations, index, key=lambda pair: pair[0]) - 1
        return self._configurations[max(position, 0)][1]

    def term_at(self, index: int) -> int | None:
        """Return the term at ``index``; None below the floor or above the last."""
        if not self.floor.index <= index <= self.last_index:
            return None
        return self._terms[self._run(index)]

    def _run(self, index: int) -> int:
        return bisect_right(self._starts, index) - 1

    def fitting(self, index: int, term: int) -> int:
        """Return the last place at or before ``index`` whose term is at most ``term``; the floor if there is none.

        What two logs have in common ends at or before it, when the other one has ``term`` at ``index``.
        """
        assert self.floor.index <= index <= self.last_index, (self.floor.index, index, self.last_index)
        run = self._run(index)
        while run > 0 and self._terms[run] > term:
            index = self._starts[run] - 1
            run -= 1
        return index

    def entries(self, start: int, stop: int, bytes_max: int) -> tuple[Entry, ...]:
        """Return entries in [start, stop), at least one if there is one, then up to ``bytes_max``."""
        assert self.floor.index < start, (self.floor.index, start)
        if start > self.durable_index and self._pending_bytes <= bytes_max:
            first = self.durable_index + 1
            return tuple(self._pending[start - first : stop - first])
        found: list[Entry] = []
        used = 0
        if start <= self.durable_index:
            held = self._log.entries(start, min(stop, self.durable_index + 1), bytes_max)
            if stop <= self.durable_index + 1 or start + len(held) <= self.durable_index:
                return held
            found = list(held)
            used = bytes_of(found)
        for entry in self._pending:
            if not start <= entry.index < stop:
                continue
            used += entry_bytes(entry)
            if found and used > bytes_max:
                break
            found.append(entry)
        return tuple(found)

    # --- changing ----------------------------------------------------------------------------------------------------

    def append(self, entries: Sequence[Entry]) -> None:
        """Cut the log before ``entries[0]`` and add them."""
        first = entries[0].index
        assert self.floor.index < first <= self.last_index + 1, (self.floor.index, first, self.last_index)
        if first <= self.last_index:
            self._pending = [entry for entry in self._pending if entry.index < first]
            self._pending_bytes = bytes_of(self._pending)
            self.durable_index = min(self.durable_index, first - 1)
            while self._starts[-1] >= first:
                del self._starts[-1], self._terms[-1]
            while len(self._configurations) > 1 and self._configurations[-1][0] >= first:
                del self._configurations[-1]
            self.configuration = self._configurations[-1][1]
        for entry in entries:
            self._note(entry)
        self._pending.extend(entries)
        self._pending_bytes += bytes_of(entries)
        self.last_index = entries[-1].index

    def persisted(self, last_index: int) -> None:
        """Take note that all of it is durable, as the driver says."""
        assert last_index == self.last_index == self._log.last_index, (
            last_index,
            self.last_index,
            self._log.last_index,
        )
        self.durable_index = last_index
        self._pending, self._pending_bytes = [], 0

    def trimmed(self, floor: Floor) -> None:
        """Take note that the log begins behind ``floor`` now."""
        if floor.index <= self.floor.index:
            return
        assert floor.index <= self.durable_index, (floor.index, self.durable_index)
        run = self._run(floor.index)
        assert self._terms[run] == floor.term, (self._terms[run], floor.term)
        self._starts[: run + 1], self._terms[: run + 1] = [floor.index], [floor.term]
        position = bisect_right(self._configurations, floor.index, key=lambda pair: pair[0]) - 1
        del self._configurations[: max(position, 0)]
        self.floor = floor

    def installed(self, floor: Floor) -> None:
        """Take note that the log was reset to ``floor``: entries after it stay where they match (design: rule 9)."""
        assert self._log.floor.index >= floor.index, (self._log.floor, floor)
        if floor.index <= self.floor.index:
            return
        if floor.index <= self.durable_index and self.term_at(floor.index) == floor.term:
            self.trimmed(floor)
            return
        matching = self.term_at(floor.index) == floor.term
        rest = [entry for entry in self._pending if entry.index > floor.index] if matching else []
        self._load()
        if rest and rest[0].index == self.last_index + 1:
            self.append(rest)
