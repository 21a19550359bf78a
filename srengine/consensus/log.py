"""The node-wide log: entries and hard state of all groups of a node, in an environment of their own.

::

    data directory
      log/wal           the newest turns, each durable by one write and one sync   (docs/formats-log.md)
      log/data.mdb      entries, hard states, floors and tails of every group      (log_rows.py)

    loop thread                                a thread of the kernel (begin, finish), or the log thread (append)
      machines drain            Persist          one transaction of the logged store, one turn:
      of many groups  ------------------------->   cut suffixes (saved first), new entries, tails, hard states
      Persisted for each  <---------------------   durable

* **One turn, one transaction.** `NodeLog.append` takes what all groups have to say and returns when all of it is
  durable, or raises and nothing of it happened: `DiskFull` (may be tried again as it is), `TabletFenced` (the disk
  failed: nothing may be written any more, see storage/fences.py).
* **Sound or named.** `NodeLog.open` reads every row of every group and tests that each entry continues the one before
  it and that the last is the one of the tail row. A group that does not fit opens with `GroupLog.damage` set and shows
  only the sound beginning of its log: it holds less than it promised, so its node promises nothing in it (no vote, no
  lease) until it has caught up with a leader and `NodeLog.heal` is called. The mark is durable: a second start does not
  forget it.
* **Cut by rule.** Nothing is thrown away at start. Entries go when a leader's entries take their place
  (``entries[0].index`` of a `Persist` at or below the last index), when the log is trimmed to a floor that the state
  machine has applied, or when a state is installed. What a leader's entries replace is copied to the table ``saved``
  first, bounded by `SAVED_SUFFIXES_MAX` and `SAVED_BYTES_MAX` for each group.
* **Reading.** `GroupLog` is what a machine is given. Terms, configurations and the newest entries are in memory; older
  entries are read from the file.

Writers call one at a time (turns.py sees to that); reading is safe beside it for every group that is not
part of the write, which is the driver's duty anyway (effects.py).
"""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from srengine import errors, failpoints, limits, types
from srengine.consensus import log_rows as rows
from srengine.consensus.effects import Persist
from srengine.consensus.entries import Configuration, Entry, EntryKind, Floor, HardState, bytes_of, entry_bytes
from srengine.storage import wal
from srengine.storage.logged import Change, LoggedStore, LoggedTransaction
from srengine.storage.metadata import MetadataStore
from srengine.storage.pages import DATA_NAME, walk

LOG_NAME: Final = "log"
"""The environment's name in a data directory."""
FORMAT: Final = b"2"
_FORMAT_WITHOUT_WAL: Final = b"1"
CACHE_BYTES: Final = 32 * limits.MIB
"""Entries of all groups kept in memory, the newest of each: what followers in contact and the state machine read."""
SAVED_SUFFIXES_MAX: Final = 16
SAVED_BYTES_MAX: Final = 16 * limits.MIB
TRIM_ROWS: Final = 1000
"""Entries deleted in one transaction, so that a turn never waits long behind a trim."""

_OWN_TABLE: Final = "log"
_FORMAT_KEY: Final = b"format"
_BOOT_KEY: Final = b"boot"


class GroupLog:
    """One group's log as its machine reads it (`effects.LogReader`); changed by `NodeLog` alone."""

    def __init__(self, log: NodeLog, name: str, found: rows.Survey) -> None:
        self.name = name
        self.damage: rows.Damage | None = found.damage
        """Set: this node may promise nothing in the group until it has caught up; see `NodeLog.heal`."""
        self.hard_state = found.hard_state if found.hard_state is not None else HardState()
        self.prefix, _ = rows.group_range(name)
        """Of the keys of its entries."""
        self.tail_key = rows.group_key(name, rows.TAIL)
        self._log = log
        self._floor = found.floor
        self._floor_chain = found.floor_chain
        self._last = found.last
        self.last_index = found.last.index
        """See `effects.LogReader`."""
        self._highest = found.highest
        """>= last index; greater only while rows beyond a damaged place are still there."""
        self._terms = found.terms
        self._configurations = found.configurations
        self._sizes = found.sizes
        """Bytes of the value of each entry behind the floor."""
        self.bytes = sum(found.sizes)
        """Of the entries that are there."""
        self._is_clear = False
        """Whether nothing lies at or below the floor, where damage may have left rows."""
        self._cache: list[Entry] = []
        """The newest entries without a gap up to the last index; empty: none is held."""
        self._cache_bytes = 0

    @property
    def floor(self) -> Floor:
        """See `effects.LogReader`."""
        return self._floor

    @property
    def last_term(self) -> int:
        """Return the term of the last entry, the floor's when there is none."""
        return self._last.term

    @property
    def configuration(self) -> Configuration:
        """Return the configuration in force: the last one in the log, committed or not."""
        return self._configurations[-1][1] if self._configurations else self._floor.configuration

    def _move_to(self, last: rows.Place) -> None:
        self._last, self.last_index = last, last.index

    def term_at(self, index: int) -> int | None:
        """See `effects.LogReader`."""
        if index == self._floor.index:
            return self._floor.term
        if not self._floor.index < index <= self._last.index:
            return None
        return self._terms[bisect.bisect_right(self._terms, index, key=_first) - 1][1]

    def entries(self, start: int, stop: int, bytes_max: int) -> tuple[Entry, ...]:
        """See `effects.LogReader`. `CorruptionError` when an entry was damaged since it was written."""
        start = max(start, self._floor.index + 1)
        stop = min(stop, self._last.index + 1)
        if start >= stop:
            return ()
        with self._log.cache_lock:
            first = self._last.index + 1 - len(self._cache)
            cached = self._cache[start - first : stop - first] if start >= first else None
        if cached is None:
            return self._log.read(self, start, stop, bytes_max)
        size = 0
        for count, entry in enumerate(cached):
            size += entry_bytes(entry)
            if size > bytes_max and count:
                return tuple(cached[:count])
        return tuple(cached)

    def floor_at(self, index: int) -> Floor:
        """Return what a floor at ``index`` would be; ``floor.index <= index <= last_index``."""
        term = self.term_at(index)
        assert term is not None, (self.name, index, self._floor.index, self._last.index)
        before = bisect.bisect_right(self._configurations, index, key=_first)
        configuration = self._configurations[before - 1][1] if before else self._floor.configuration
        return Floor(index, term, configuration)


def _first(pair: tuple[int, object]) -> int:
    return pair[0]


class NodeLog:
    """The log of all groups of a node; made by `open`."""

    def __init__(self, store: LoggedStore, groups: dict[str, GroupLog], *, cache_bytes: int) -> None:
        self._store = store
        self._groups = groups
        self.cache_lock = threading.Lock()
        self._begun: list[_Change] = []
        """What was begun and is not finished."""
        self._cached: OrderedDict[str, GroupLog] = OrderedDict()
        """Groups with cached entries, the one that was written longest ago first."""
        self._cache_bytes = 0
        self._cache_bytes_max = cache_bytes

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        cache_bytes: int = CACHE_BYTES,
        wal_bytes: int = wal.CAPACITY,
        insecure: bool = False,
        allow_remote_fs: bool = False,
    ) -> NodeLog:
        """Open the log in the directory ``path``, made when it is not there, and test all of it.

        ``wal_bytes``: the size of a new write-ahead log; one that is there keeps its own.

        What is wrong with one group's entries is in its `GroupLog.damage`. Raises what `LoggedStore` raises;
        `CorruptionError` naming the page when the file itself is damaged, `ForeignData`, `UnsupportedFeature`.
        """
        if (path / DATA_NAME).exists():
            _check_pages(path)
        store = LoggedStore.open(
            path, prepare=_check_format, capacity=wal_bytes, insecure=insecure, allow_remote_fs=allow_remote_fs
        )
        try:
            log = cls(store, {}, cache_bytes=cache_bytes)
            for name in _group_names(store):
                log._groups[name] = GroupLog(log, name, survey_group(store, name))
            log._mark_damaged()
        except BaseException:
            store.close()
            raise
        return log

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the environment after the running transaction. Idempotent."""
        self._store.close()

    def _mark_damaged(self) -> None:
        """Make durable what was found: the rows that show it may be overwritten before the node has caught up."""
        found = [group for group in self._groups.values() if group.damage is not None]
        if found:
            with self._store.transaction() as transaction:
                for group in found:
                    assert group.damage is not None, group.name
                    key = rows.group_key(group.name, rows.DAMAGE)
                    transaction.put(rows.GROUPS, key, rows.encode_damage(group.damage))

    # --- what is there -----------------------------------------------------------------------------------------------

    def groups(self) -> list[str]:
        """Return the names of the groups, sorted."""
        return sorted(self._groups)

    def group(self, name: str) -> GroupLog:
        """Return a group's log. `NotFound`."""
        group = self._groups.get(name)
        if group is None:
            raise errors.NotFound(f"the log holds no group {name}", group=name)
        return group

    @property
    def boot_number(self) -> int:
        """Return the boot number of the node as the log knows it, 0 when it was never noted."""
        value = self._store.get(_OWN_TABLE, _BOOT_KEY)
        return int.from_bytes(value, "big") if value is not None else 0

    def note_boot(self, number: int) -> None:
        """Keep the boot number of this start, durably, so that a log put back from an earlier one shows."""
        with self._store.transaction() as transaction:
            transaction.put(_OWN_TABLE, _BOOT_KEY, number.to_bytes(8, "big"))

    def read(self, group: GroupLog, start: int, stop: int, bytes_max: int) -> tuple[Entry, ...]:
        """Read entries [start, stop) from the file, at least one, then up to ``bytes_max``."""
        prefix, _ = rows.group_range(group.name)
        found: list[Entry] = []
        size = 0
        for key, value in self._store.scan(rows.ENTRIES, rows.entry_key(prefix, start), rows.entry_key(prefix, stop)):
            entry = rows.decode_entry(int.from_bytes(key[len(prefix) :], "big"), value)
            if entry.index != start + len(found):
                break
            size += entry_bytes(entry)
            if found and size > bytes_max:
                break
            found.append(entry)
        if not found:
            raise errors.CorruptionError(f"entry {start} of {group.name} is missing", group=group.name, index=start)
        return tuple(found)

    # --- a turn ------------------------------------------------------------------------------------------------------

    def append(self, turn: Mapping[str, Persist]) -> None:
        """Make what the groups drained durable: all of it when this returns, nothing when it raises.

        Each `Persist`: entries from ``entries[0].index`` on are cut off (and saved), then the new ones appended;
        ``entries[0].index`` is above the floor and at most one above the last index.
        """
        changes = self._changes(turn)
        with self._store.transaction() as transaction:
            for change in changes:
                change.write(transaction)
            failpoints.hit("log.append.written")
        failpoints.hit("log.append.committed")
        self._adopt(changes)

    def begin(self, turn: Mapping[str, Persist]) -> bool:
        """Begin `append` without waiting for the disk; return False, and begin nothing, if it has to wait.

        It has ended when the descriptor `done` can be read; `finish` has to follow then, in the same thread. Nothing
        else is done with the log meanwhile.
        """
        if failpoints.planned("log.append.written", "log.append.committed"):
            return False
        changes = self._changes(turn)
        made: list[Change] = []
        for change in changes:
            if change.cuts:
                return False
            change.put(made)
        if not self._store.begin(made):
            return False
        self._begun = changes
        return True

    @property
    def done(self) -> int:
        """See `LoggedStore.done`."""
        return self._store.done

    def finish(self) -> None:
        """Wait until what was begun is durable. Raises as `append`."""
        changes, self._begun = self._begun, []
        self._store.finish()
        self._adopt(changes)

    def _changes(self, turn: Mapping[str, Persist]) -> list[_Change]:
        return [_Change(self, self._groups[name], persist) for name, persist in sorted(turn.items())]

    def _adopt(self, changes: Sequence[_Change]) -> None:
        with self.cache_lock:
            for change in changes:
                change.adopt()
            if self._cache_bytes > self._cache_bytes_max:
                self._evict()

    # --- the ends of a group's log -----------------------------------------------------------------------------------

    def bootstrap(self, name: str, entry: Entry | None = None) -> GroupLog:
        """Begin a group: with ``entry`` at index 1 (the same one on all its first nodes), or empty on a joining node.

        The same call again changes nothing; `Conflict` when the group is there and began with something else.
        """
        types.check_name(name, "group")
        assert entry is None or entry.index == 1, entry
        existing = self._groups.get(name)
        if existing is not None:
            if entry is None or (existing.floor.index == 0 and existing.entries(1, 2, 0)[:1] == (entry,)):
                return existing
            raise errors.Conflict(f"the group {name} exists and does not begin with this entry", group=name)
        floor = Floor()
        chain = rows.first_chain(name, floor)
        found = rows.Survey(HardState(), floor, chain, rows.Place(0, 0, chain))
        group = GroupLog(self, name, found)
        change = _Change(
            self, group, Persist(HardState(entry.term if entry is not None else 0), (entry,) if entry else ())
        )
        with self._store.transaction() as transaction:
            transaction.put(rows.GROUPS, rows.group_key(name, rows.FLOOR), rows.encode_floor(floor, chain))
            transaction.put(rows.GROUPS, rows.group_key(name, rows.TAIL), rows.encode_place(found.last))
            change.write(transaction)
        with self.cache_lock:
            self._groups[name] = group
            change.adopt()
        return group

    def trim(self, name: str, floor: Floor) -> None:
        """Drop the entries up to ``floor.index``, which the state machine has applied durably.

        ``floor`` is `GroupLog.floor_at` of an index of the log. In steps, each whole: a crash leaves a floor between.
        """
        group = self._groups[name]
        assert group.damage is None or group.last_index >= floor.index, (name, floor, group.damage)
        while group.floor.index < floor.index:
            index = min(floor.index, group.floor.index + TRIM_ROWS)
            self._raise_floor(group, group.floor_at(index) if index < floor.index else floor)
            failpoints.hit("log.trim.step")

    def _raise_floor(self, group: GroupLog, floor: Floor) -> None:
        assert group.term_at(floor.index) == floor.term, (group.name, floor, group.term_at(floor.index))
        prefix, _ = rows.group_range(group.name)
        chain = self._chain_at(group, floor.index)
        stop = floor.index + 1
        if group._is_clear:
            # Which rows there are is known: to read them would cost more than to write them did.
            keys = [rows.entry_key(prefix, index) for index in range(group.floor.index + 1, stop)]
        else:
            keys = [row.key for row in self._store.survey(rows.ENTRIES, prefix, rows.entry_key(prefix, stop))]
        with self._store.transaction() as transaction:
            transaction.discard(rows.ENTRIES, *keys)
            transaction.put(rows.GROUPS, rows.group_key(group.name, rows.FLOOR), rows.encode_floor(floor, chain))
        with self.cache_lock:
            keep = group._last.index - floor.index
            if len(group._cache) > keep:
                dropped_entries = group._cache[: len(group._cache) - keep]
                del group._cache[: len(dropped_entries)]
                self._account(group, -bytes_of(dropped_entries))
            dropped = floor.index - group.floor.index
            group.bytes -= sum(group._sizes[:dropped])
            del group._sizes[:dropped]
            group._is_clear = True
            group._floor, group._floor_chain = floor, chain
            group._terms = _from(group._terms, floor.index + 1)
            if group._terms and group._terms[0][0] <= floor.index:
                group._terms[0] = (floor.index + 1, group._terms[0][1])
            group._configurations = [pair for pair in group._configurations if pair[0] > floor.index]

    def install(self, name: str, floor: Floor) -> None:
        """Begin the log behind a state that is in place at ``floor``.

        Entries after it stay when the entry at it is the same; otherwise all go (those beyond it are saved). Nothing
        happens when the floor is not above the log's own. Cf. design rule 9.
        """
        group = self._groups[name]
        if floor.index <= group.floor.index:
            return
        if group.term_at(floor.index) == floor.term:
            self._raise_floor(group, floor)
            return
        prefix, stop = rows.group_range(name)
        chain = rows.first_chain(name, floor)
        last = rows.Place(floor.index, floor.term, chain)
        saving = _Saving(self._store, group, floor.index + 1) if group._highest > floor.index else None
        with self._store.transaction() as transaction:
            if saving is not None:
                saving.write(transaction)
            transaction.discard(rows.ENTRIES, *(row.key for row in self._store.survey(rows.ENTRIES, prefix, stop)))
            transaction.put(rows.GROUPS, rows.group_key(name, rows.FLOOR), rows.encode_floor(floor, chain))
            transaction.put(rows.GROUPS, rows.group_key(name, rows.TAIL), rows.encode_place(last))
            failpoints.hit("log.install.written")
        with self.cache_lock:
            self._drop_cache(group)
            group._floor, group._floor_chain = floor, chain
            group._move_to(last)
            group._highest = floor.index
            group._terms, group._configurations, group.bytes = [], [], 0
            del group._sizes[:]
            group._is_clear = True

    def heal(self, name: str) -> None:
        """Forget a damage: the node has caught up with a leader that led without it. Rows beyond the log are saved."""
        group = self._groups[name]
        if group.damage is None:
            return
        if group.damage.lost:
            raise errors.CorruptionError(
                f"term and vote of {name} are lost: {group.damage.detail}", group=name, kind=group.damage.kind
            )
        saving = _Saving(self._store, group, group.last_index + 1) if group._highest > group.last_index else None
        with self._store.transaction() as transaction:
            if saving is not None:
                saving.write(transaction)
                saving.cut(transaction)
            transaction.put(rows.GROUPS, rows.group_key(name, rows.TAIL), rows.encode_place(group._last))
            floor_row = rows.encode_floor(group._floor, group._floor_chain)
            transaction.put(rows.GROUPS, rows.group_key(name, rows.FLOOR), floor_row)
            transaction.discard(rows.GROUPS, rows.group_key(name, rows.DAMAGE))
        group._highest = group.last_index
        group.damage = None

    def saved(self, name: str) -> list[tuple[rows.SavedSuffix, tuple[Entry, ...]]]:
        """Return the suffixes that were cut off, oldest first, with those of their entries that can be read."""
        prefix, stop = rows.group_range(name)
        found: list[tuple[rows.SavedSuffix, list[Entry]]] = []
        for key, value in self._store.scan(rows.SAVED, prefix, stop):
            index = int.from_bytes(key[-8:], "big")
            if index == 0:
                found.append((msgspec.msgpack.decode(value, type=rows.SavedSuffix), []))
            elif value[:1] == _SOUND:
                found[-1][1].append(rows.decode_entry(index, value[1:]))
        return [(suffix, tuple(entries)) for suffix, entries in found]

    # --- help --------------------------------------------------------------------------------------------------------

    def _chain_at(self, group: GroupLog, index: int) -> bytes:
        if index == group._last.index:
            return group._last.chain
        if index == group._floor.index:
            return group._floor_chain
        prefix, _ = rows.group_range(group.name)
        value = self._store.get(rows.ENTRIES, rows.entry_key(prefix, index))
        if value is None:
            raise errors.CorruptionError(f"entry {index} of {group.name} is missing", group=group.name, index=index)
        return rows.chain_of(value)

    def _account(self, group: GroupLog, difference: int) -> None:
        group._cache_bytes += difference
        self._cache_bytes += difference
        if not group._cache:
            self._cached.pop(group.name, None)

    def _drop_cache(self, group: GroupLog) -> None:
        group._cache = []
        self._account(group, -group._cache_bytes)

    def _evict(self) -> None:
        """Make room: from the group that was written longest ago, its older half."""
        while self._cache_bytes > self._cache_bytes_max:
            group = next(iter(self._cached.values()))
            dropped = group._cache[: (len(group._cache) + 1) // 2]
            del group._cache[: len(dropped)]
            self._account(group, -bytes_of(dropped))


_SOUND: Final = b"\0"
_RAW: Final = b"\1"


class _Saving:
    """Copies a group's rows from ``first`` on to the table of saved ones, and takes them off."""

    def __init__(self, store: LoggedStore, group: GroupLog, first: int) -> None:
        self._store = store
        self._prefix, stop = rows.group_range(group.name)
        self._stop = stop
        self._kept: list[tuple[bytes, bytes]] = []
        self._keys: list[bytes] = []
        size = damaged = 0
        complete = True
        for row in store.survey(rows.ENTRIES, rows.entry_key(self._prefix, first), stop):
            self._keys.append(row.key)
            size += len(row.value)
            complete = complete and size <= SAVED_BYTES_MAX
            if complete:
                damaged += not row.sound
                self._kept.append((row.key, (_SOUND if row.sound else _RAW) + row.value))
        self._bytes = min(size, SAVED_BYTES_MAX)
        self._number = 1
        self._drop: list[bytes] = []
        self._make_room()
        last = int.from_bytes(self._keys[-1][len(self._prefix) :], "big") if self._keys else first - 1
        self._header = rows.SavedSuffix(self._number, first, last, complete, damaged)

    def _make_room(self) -> None:
        """Choose the number of this suffix and the older ones that go for it."""
        older: dict[int, tuple[list[bytes], int]] = {}
        for row in self._store.survey(rows.SAVED, self._prefix, self._stop):
            number = int.from_bytes(row.key[len(self._prefix) : len(self._prefix) + 8], "big")
            keys, size = older.get(number, ([], 0))
            keys.append(row.key)
            older[number] = (keys, size + len(row.value))
        self._number = max(older, default=0) + 1
        count, total = len(older), self._bytes + sum(size for _, size in older.values())
        for number in sorted(older):
            if count < SAVED_SUFFIXES_MAX and total <= SAVED_BYTES_MAX:
                break
            keys, size = older[number]
            self._drop += keys
            count -= 1
            total -= size

    def write(self, transaction: LoggedTransaction) -> None:
        """Save the rows."""
        if not self._keys:
            return
        transaction.discard(rows.SAVED, *self._drop)
        header = msgspec.msgpack.encode(self._header)
        transaction.put(rows.SAVED, rows.saved_key(self._prefix, self._number, 0), header)
        for key, value in self._kept:
            index = int.from_bytes(key[len(self._prefix) :], "big")
            transaction.put(rows.SAVED, rows.saved_key(self._prefix, self._number, index), value)

    def cut(self, transaction: LoggedTransaction) -> None:
        """Take the rows off the log."""
        transaction.discard(rows.ENTRIES, *self._keys)


class _Change:
    """What one turn does to one group: `write` inside the transaction, `adopt` once it is durable."""

    __slots__ = ("_entries", "_group", "_hard_state", "_last", "_log", "_sizes", "cuts")

    def __init__(self, log: NodeLog, group: GroupLog, persist: Persist) -> None:
        self._log = log
        self._group = group
        self._hard_state = persist.hard_state
        self._entries = persist.entries
        self.cuts = False
        """Whether entries are replaced, which are saved first."""
        self._last = group._last
        self._sizes: list[int] = []
        if persist.entries:
            first = persist.entries[0].index
            assert group._floor.index < first <= self._last.index + 1, (group.name, first, group._floor, self._last)
            self.cuts = first <= group._highest

    def write(self, transaction: LoggedTransaction) -> None:
        """Put the rows into the turn's transaction."""
        if self.cuts:
            saving = _Saving(self._log._store, self._group, self._entries[0].index)
            saving.write(transaction)
            saving.cut(transaction)
        changes: list[Change] = []
        self.put(changes)
        transaction.change(changes)

    def put(self, changes: list[Change]) -> None:
        """Append the rows of what becomes part of the log."""
        group, entries = self._group, self._entries
        if self._hard_state is not None:
            value = rows.encode_hard_state(self._hard_state)
            changes.append((rows.GROUPS, rows.group_key(group.name, rows.HARD_STATE), value))
        if entries:
            chain = self._log._chain_at(group, entries[0].index - 1)
            self._last, self._sizes = rows.put_entries(changes, group.prefix, entries, chain)
            changes.append((rows.GROUPS, group.tail_key, rows.encode_place(self._last)))

    def adopt(self) -> None:
        """Take over into memory what is durable now; the cache is locked."""
        group, log, entries = self._group, self._log, self._entries
        if self._hard_state is not None:
            group.hard_state = self._hard_state
        if not entries:
            return
        if entries[0].index <= group.last_index:
            self._cut_memory(entries[0].index)
        group._move_to(self._last)
        group._highest = self._last.index
        group._sizes.extend(self._sizes)
        group.bytes += sum(self._sizes)
        term = group._terms[-1][1] if group._terms else None
        for entry in entries:
            if entry.term != term:
                term = entry.term
                group._terms.append((entry.index, term))
            if entry.kind is EntryKind.CONFIGURATION:
                assert entry.configuration is not None, entry
                group._configurations.append((entry.index, entry.configuration))
        group._cache.extend(entries)
        size = bytes_of(entries)
        group._cache_bytes += size
        log._cache_bytes += size
        log._cached[group.name] = group
        log._cached.move_to_end(group.name)

    def _cut_memory(self, first: int) -> None:
        group = self._group
        keep = first - 1 - group.floor.index
        group.bytes -= sum(group._sizes[keep:])
        del group._sizes[keep:]
        group._terms = [pair for pair in group._terms if pair[0] < first]
        group._configurations = [pair for pair in group._configurations if pair[0] < first]
        keep = len(group._cache) - (group.last_index + 1 - first)
        if keep > 0:
            dropped = group._cache[keep:]
            del group._cache[keep:]
            self._log._account(group, -bytes_of(dropped))
        else:
            self._log._drop_cache(group)


def _from(runs: list[tuple[int, int]], index: int) -> list[tuple[int, int]]:
    """Return the runs of terms from the one that holds ``index`` on."""
    return runs[max(0, bisect.bisect_right(runs, index, key=_first) - 1) :]


# --- reading at start ------------------------------------------------------------------------------------------------


def survey_group(store: LoggedStore, name: str) -> rows.Survey:
    """Read a group's rows and say what is sound."""
    start, stop = rows.group_range(name)
    own = {row.key[len(start) :]: row for row in store.survey(rows.GROUPS, start, stop)}
    return rows.survey(name, own, store.survey(rows.ENTRIES, start, stop))


def _group_names(store: LoggedStore) -> list[str]:
    names: set[str] = set()
    for table in (rows.GROUPS, rows.ENTRIES):
        position: bytes | None = None
        while (row := next(iter(store.survey(table, position)), None)) is not None:
            encoded, _, _ = row.key.partition(b"\0")
            names.add(encoded.decode("utf-8", "backslashreplace"))
            position = encoded + b"\1"
    return sorted(names)


def _check_pages(path: Path) -> None:
    """Raise `CorruptionError` unless every page of the file is whole: LMDB itself would not notice."""
    report = walk(path / DATA_NAME)
    if not report.clean:
        worst = report.damages[0]
        raise errors.CorruptionError(
            f"the log {path} is damaged: {worst.detail}", file=str(path / DATA_NAME), page=worst.page
        )


def _check_format(store: MetadataStore) -> None:
    """Refuse a store that is none of ours, and say in a new one, or in one from before the write-ahead log, what it is.

    Before there is a write-ahead log: a release that does not know it must refuse what has one.
    """
    found = store.get(_OWN_TABLE, _FORMAT_KEY)
    if found is None and store.tables():
        raise errors.ForeignData(f"{store.path} is no log of srengine", path=str(store.path))
    if found is None or found == _FORMAT_WITHOUT_WAL:
        with store.transaction() as transaction:
            transaction.put(_OWN_TABLE, _FORMAT_KEY, FORMAT)
    elif found != FORMAT:
        raise errors.UnsupportedFeature(
            f"{store.path} has log format {found[:16]!r}; this version reads {FORMAT!r}", path=str(store.path)
        )
