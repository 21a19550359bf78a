"""Logs for the tests of this room: entries by number, damage by hand."""

from __future__ import annotations

from srengine.consensus.effects import Persist
from srengine.consensus.entries import Configuration, Entry, EntryKind, HardState
from srengine.consensus.log import NodeLog
from srengine.storage.metadata import MetadataStore

NODES = ("a" * 32, "b" * 32, "c" * 32)
FIRST = Entry(1, 1, EntryKind.CONFIGURATION, b"bootstrap", Configuration(NODES))


def entry(index, term=1, data=None):
    return Entry(index, term, EntryKind.COMMAND, b"data of %d" % index if data is None else data)


def entries(start, stop, term=1):
    return tuple(entry(index, term) for index in range(start, stop))


def append(log, group, items, term=None):
    """Append in one turn; with ``term`` the hard state, too."""
    log.append({group: Persist(None if term is None else HardState(term), tuple(items))})


def filled(path, group="journal", last=9, floor=0):
    """Make a log with entries 1 to ``last`` of one group, trimmed to ``floor``; closed."""
    with NodeLog.open(path) as log:
        log.bootstrap(group, FIRST)
        append(log, group, entries(2, last + 1))
        if floor:
            log.trim(group, log.group(group).floor_at(floor))


def read(group):
    """Return all entries of a group's log."""
    found = []
    while group.floor.index + 1 + len(found) <= group.last_index:
        found += group.entries(group.floor.index + 1 + len(found), group.last_index + 1, 1 << 20)
    return found


class Raw:
    """The rows of a closed log, as stored, to be changed behind its back; use as a context."""

    def __init__(self, path):
        self._store = MetadataStore(path, create=False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._store.close()

    def stored(self, table):
        rows, last = self._store._environment.page(self._store._tables[table], None, False, None, 1 << 20, 1 << 30)
        assert last
        return dict(rows)

    def put(self, table, key, stored):
        """Put bytes as they are, check included."""
        self._store._environment.change([(self._store._tables[table], key, stored)])

    def seal(self, table, key, value):
        """Put a value with the right check of its place."""
        with self._store.transaction() as transaction:
            transaction.put(table, key, value)

    def delete(self, table, key):
        assert key in self.stored(table)
        self._store._environment.change([(self._store._tables[table], key, None)])
