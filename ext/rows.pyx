# cython: language_level=3
"""Rows of named tables in one LMDB environment, for the metadata store: what LMDB gives, in few calls.

The interpreter is let go around everything that may take a disk's time, once a call and not once a row. Threads share an
`Environment`; a `Writer` belongs to the thread that began it.

`srengine.storage.metadata` is its only caller, and sees to what LMDB asks for: one writer at a time, nobody reading while
the map moves or the environment is closed, no call in a forked child.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EINVAL, ENOMEM
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free, qsort, realloc
from libc.string cimport memcmp, memcpy

from srengine._native.lmdb cimport *
from srengine._native.xxhash cimport XXH3_64bits

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

cdef extern from "unistd.h" nogil:
    int getpid()


class RowsError(Exception):
    """LMDB refused something: ``code`` is errno (positive) or one of LMDB's own (negative)."""

    def __init__(self, code):
        super().__init__((<bytes>mdb_strerror(code)).decode("utf-8", "replace"))
        self.code = code


MAP_FULL = MDB_MAP_FULL
PANIC = MDB_PANIC
DAMAGED = (MDB_CORRUPTED, MDB_PAGE_NOTFOUND, MDB_INVALID)
STRANGE = (MDB_VERSION_MISMATCH,)


cdef int check(int rc) except -1:
    if rc != 0:
        raise RowsError(rc)
    return 0


cdef enum:
    SEAL = 8                      # bytes of a checksum behind a value; see srengine/storage/metadata_rows.py

cdef struct Change:
    MDB_dbi table
    MDB_val key
    MDB_val value
    const char *name              # the table's, for the seal; NULL: the value is stored as it is
    size_t name_bytes
    Py_ssize_t place              # among the changes given
    bint deletes


@cython.internal
cdef class Changes:
    """Changes in C, which point into what the rows that they were made of hold. Those stay as they are meanwhile."""

    cdef list rows
    cdef Change *array
    cdef Py_ssize_t count
    cdef Py_ssize_t room

    def __cinit__(self, list rows not None, dict tables):
        cdef Py_ssize_t name_bytes = 0
        cdef const char *name = NULL
        cdef MDB_dbi handle = 0
        cdef object last = None
        self.rows = rows
        for row in rows:
            self.room += len(<dict?>row[1]) if len(row) == 2 else 1
        if self.room == 0:
            return
        self.array = <Change *>calloc(<size_t>self.room, sizeof(Change))
        if self.array is NULL:
            raise MemoryError
        for row in rows:
            table = row[0]
            if table is not last:
                last = table
                if isinstance(table, str):
                    handle = tables[table]
                    name = PyUnicode_AsUTF8AndSize(table, &name_bytes)
                    if name_bytes > 0xFFFF:
                        raise ValueError("a table's name is too long")
                else:
                    handle = table
                    name = NULL
            if len(row) == 2:
                for key, value in (<dict>row[1]).items():
                    self.add(handle, name, <size_t>name_bytes, key, value)
            else:
                _, key, value = row
                self.add(handle, name, <size_t>name_bytes, key, value)

    def __dealloc__(self):
        free(self.array)

    cdef int add(self, MDB_dbi handle, const char *name, size_t name_bytes, key, value) except -1:
        cdef Change *change = &self.array[self.count]
        if not PyBytes_Check(key) or not (value is None or PyBytes_Check(value)):
            raise TypeError("keys and values are bytes")
        if self.count == self.room:
            raise RuntimeError("the rows grow while they are read")
        change.table = handle
        change.name = name
        change.name_bytes = name_bytes
        change.place = self.count
        change.key.mv_size = <size_t>PyBytes_GET_SIZE(key)
        change.key.mv_data = PyBytes_AS_STRING(key)
        if value is None:
            change.deletes = True
        else:
            change.value.mv_size = <size_t>PyBytes_GET_SIZE(value)
            change.value.mv_data = PyBytes_AS_STRING(value)
        self.count += 1
        return 0


cdef int order_of(const void *left, const void *right) noexcept nogil:
    """Compare changes by table and key; those of one key stay in the order in which they were given."""
    cdef const Change *one = <const Change *>left
    cdef const Change *other = <const Change *>right
    cdef int order
    if one.table != other.table:
        return 1 if one.table > other.table else -1
    order = memcmp(one.key.mv_data, other.key.mv_data, min(one.key.mv_size, other.key.mv_size))
    if order != 0:
        return order
    if one.key.mv_size != other.key.mv_size:
        return 1 if one.key.mv_size > other.key.mv_size else -1
    return 1 if one.place > other.place else -1


cdef void bring_in_order(Change *changes, Py_ssize_t count) noexcept nogil:
    """Put changes into the order in which LMDB has the rows: neighbours are on one page."""
    cdef Py_ssize_t i
    for i in range(1, count):
        if order_of(&changes[i - 1], &changes[i]) > 0:
            qsort(changes, <size_t>count, sizeof(Change), order_of)
            return


cdef struct Scratch:
    uint8_t *bytes_
    size_t size


cdef int put_sealed(MDB_txn *txn, Change *change, Scratch *scratch) noexcept nogil:
    """Put a value with the checksum of its table, key and bytes behind it."""
    cdef size_t name_bytes = change.name_bytes, key_bytes = change.key.mv_size, value_bytes = change.value.mv_size
    cdef size_t size = 4 + name_bytes + key_bytes + value_bytes
    cdef MDB_val stored
    cdef uint8_t *target
    cdef uint64_t digest
    cdef int i, rc
    if scratch.size < size:
        target = <uint8_t *>realloc(scratch.bytes_, 2 * size)
        if target is NULL:
            return ENOMEM
        scratch.bytes_ = target
        scratch.size = 2 * size
    target = scratch.bytes_
    target[0] = <uint8_t>name_bytes
    target[1] = <uint8_t>(name_bytes >> 8)
    memcpy(target + 2, change.name, name_bytes)
    target += 2 + name_bytes
    target[0] = <uint8_t>key_bytes
    target[1] = <uint8_t>(key_bytes >> 8)
    memcpy(target + 2, change.key.mv_data, key_bytes)
    memcpy(target + 2 + key_bytes, change.value.mv_data, value_bytes)
    digest = XXH3_64bits(scratch.bytes_, size)
    stored.mv_size = value_bytes + SEAL
    stored.mv_data = NULL
    rc = mdb_put(txn, change.table, &change.key, &stored, MDB_RESERVE)
    if rc == 0:
        target = <uint8_t *>stored.mv_data
        memcpy(target, change.value.mv_data, value_bytes)
        for i in range(SEAL):
            target[value_bytes + <size_t>i] = <uint8_t>(digest >> (56 - 8 * i))
    return rc


cdef int make_changes(MDB_txn *txn, Change *changes, Py_ssize_t count) noexcept nogil:
    cdef Scratch scratch
    cdef Py_ssize_t i
    cdef int rc = 0
    scratch.bytes_ = NULL
    scratch.size = 0
    bring_in_order(changes, count)
    for i in range(count):
        if changes[i].deletes:
            rc = mdb_del(txn, changes[i].table, &changes[i].key, NULL)
            if rc == MDB_NOTFOUND:
                rc = 0
        elif changes[i].name is NULL:
            rc = mdb_put(txn, changes[i].table, &changes[i].key, &changes[i].value, 0)
        else:
            rc = put_sealed(txn, &changes[i], &scratch)
        if rc != 0:
            break
    free(scratch.bytes_)
    return rc


cdef struct Found:
    MDB_val key
    MDB_val value


cdef bint is_behind(const MDB_val *key, const MDB_val *other) noexcept nogil:
    """Return whether ``key >= other``."""
    cdef int order = memcmp(key.mv_data, other.mv_data, min(key.mv_size, other.mv_size))
    return order > 0 or (order == 0 and key.mv_size >= other.mv_size)


cdef int gather(MDB_txn *txn, MDB_dbi table, const MDB_val *start, bint after, const MDB_val *stop, size_t rows_max,
                size_t bytes_max, Found **found, size_t *count) noexcept nogil:
    """Find rows of a range; NULL: no bound. ``found[0]`` is the caller's to free, what it points to is LMDB's.

    Return MDB_NOTFOUND when these are the last of the range, 0 when there may be more, or what went wrong.
    """
    cdef MDB_cursor *cursor = NULL
    cdef MDB_val key, value
    cdef Found *larger
    cdef size_t room = 0, size = 0
    cdef int rc = mdb_cursor_open(txn, table, &cursor)
    if rc != 0:
        return rc
    if start is not NULL:
        key = start[0]
    rc = mdb_cursor_get(cursor, &key, &value, MDB_FIRST if start is NULL else MDB_SET_RANGE)
    # What stands there is ``start`` itself, or behind it.
    if rc == 0 and after and start is not NULL and is_behind(start, &key):
        rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)
    while rc == 0:
        if stop is not NULL and is_behind(&key, stop):
            rc = MDB_NOTFOUND
            break
        if count[0] >= rows_max or size >= bytes_max:
            break
        if count[0] == room:
            room = 2 * room + 64
            larger = <Found *>realloc(found[0], room * sizeof(Found))
            if larger is NULL:
                rc = ENOMEM
                break
            found[0] = larger
        found[0][count[0]] = Found(key, value)
        count[0] += 1
        size += value.mv_size
        rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)
    mdb_cursor_close(cursor)
    return rc


cdef MDB_val *bound_of(bytes key, MDB_val *place):
    """Return ``place``, pointing to a key that the caller keeps, or NULL for None."""
    if key is None:
        return NULL
    place.mv_size = <size_t>PyBytes_GET_SIZE(key)
    place.mv_data = PyBytes_AS_STRING(key)
    return place


cdef bytes bytes_of(const MDB_val *value):
    return PyBytes_FromStringAndSize(<const char *>value.mv_data, <Py_ssize_t>value.mv_size)


cdef bytes look_up(MDB_txn *txn, MDB_dbi table, bytes key):
    cdef MDB_val wanted, found
    cdef int rc
    bound_of(key, &wanted)
    with nogil:
        rc = mdb_get(txn, table, &wanted, &found)
    if rc == MDB_NOTFOUND:
        return None
    check(rc)
    return bytes_of(&found)


cdef tuple look_through(MDB_txn *txn, MDB_dbi table, bytes start, bint after, bytes stop, size_t rows_max,
                        size_t bytes_max):
    cdef MDB_val first, last
    cdef MDB_val *first_bound = bound_of(start, &first)
    cdef MDB_val *last_bound = bound_of(stop, &last)
    cdef Found *found = NULL
    cdef size_t count = 0, i
    cdef int rc
    try:
        with nogil:
            rc = gather(txn, table, first_bound, after, last_bound, rows_max, bytes_max, &found, &count)
        if rc != MDB_NOTFOUND:
            check(rc)
        return [(bytes_of(&found[i].key), bytes_of(&found[i].value)) for i in range(count)], rc == MDB_NOTFOUND
    finally:
        free(found)


cdef class Environment:
    """One open environment. All calls raise `RowsError`.

    path              directory of data.mdb, as the file system spells it; the file may be missing
    map_bytes         address space to reserve, a multiple of the page size
    tables_max        named tables that may be opened
    mode              of files that are made
    """

    cdef MDB_env *env
    cdef int process

    def __cinit__(self):
        self.process = getpid()

    def __init__(self, bytes path not None, size_t map_bytes, unsigned int tables_max, int mode):
        cdef const char *where = path
        cdef int rc
        if self.env is not NULL:
            raise RowsError(EINVAL)
        rc = mdb_env_create(&self.env)
        if rc == 0:
            rc = mdb_env_set_maxdbs(self.env, tables_max)
        if rc == 0:
            rc = mdb_env_set_mapsize(self.env, map_bytes)
        if rc == 0:
            with nogil:
                rc = mdb_env_open(self.env, where, MDB_NOTLS, mode)
        if rc != 0:
            self.close()
            check(rc)

    def __dealloc__(self):
        # A forked child leaves what is the parent's alone.
        if self.env is not NULL and self.process == getpid():
            mdb_env_close(self.env)

    cdef MDB_env *opened(self) except NULL:
        if self.env is NULL:
            raise RowsError(EINVAL)
        return self.env

    cdef MDB_txn *reader(self) except NULL:
        cdef MDB_env *env = self.opened()
        cdef MDB_txn *txn = NULL
        cdef int rc
        with nogil:
            rc = mdb_txn_begin(env, NULL, MDB_RDONLY, &txn)
        check(rc)
        return txn

    def close(self):
        """Close it; a second call does nothing."""
        cdef MDB_env *env = self.env
        self.env = NULL
        if env is not NULL:
            with nogil:
                mdb_env_close(env)

    def tables(self):
        """Return {name: handle} of all tables, opened."""
        cdef MDB_txn *txn = self.reader()
        cdef MDB_dbi main, handle
        cdef dict found = {}
        cdef const char *name
        try:
            check(mdb_dbi_open(txn, NULL, 0, &main))
            rows, _ = look_through(txn, main, None, False, None, 1 << 30, <size_t>1 << 60)
            for key, _ in rows:
                name = key
                check(mdb_dbi_open(txn, name, 0, &handle))
                found[key] = handle
            # Handles that a transaction has opened are for all of them once it is committed, a reader's, too.
            check(mdb_txn_commit(txn))
            txn = NULL
            return found
        finally:
            if txn is not NULL:
                mdb_txn_abort(txn)

    def get(self, MDB_dbi table, bytes key not None):
        """Return the committed value, None without one."""
        cdef MDB_txn *txn = self.reader()
        try:
            return look_up(txn, table, key)
        finally:
            mdb_txn_abort(txn)

    def page(self, MDB_dbi table, bytes start, bint after, bytes stop, size_t rows_max, size_t bytes_max):
        """Return committed rows, [(key, value), ...], and whether they are the last: keys from ``start`` (None: the
        first) to before ``stop`` (None: the last), without ``start`` itself if ``after``; as many as the bounds allow.
        """
        cdef MDB_txn *txn = self.reader()
        try:
            return look_through(txn, table, start, after, stop, rows_max, bytes_max)
        finally:
            mdb_txn_abort(txn)

    def change(self, list rows not None, dict tables=None):
        """Put each (table, key, value), or delete the key where the value is None, in one durable transaction. Of two
        for one key the later one holds. Many of one table: (table, {key: value}).

        A table is a handle: the value is stored as it is. Or it is a name, with its handle in ``tables``: the value is
        stored with its seal.
        """
        cdef MDB_env *env = self.opened()
        cdef MDB_txn *txn = NULL
        cdef Changes changes = Changes.__new__(Changes, rows, tables)
        cdef int rc
        with nogil:
            rc = mdb_txn_begin(env, NULL, 0, &txn)
            if rc == 0:
                rc = make_changes(txn, changes.array, changes.count)
                if rc == 0:
                    rc = mdb_txn_commit(txn)
                else:
                    mdb_txn_abort(txn)
        check(rc)

    def begin(self):
        """Begin a transaction that changes something; waits while another one runs."""
        cdef Writer writer = Writer.__new__(Writer)
        cdef MDB_env *env = self.opened()
        cdef int rc
        with nogil:
            rc = mdb_txn_begin(env, NULL, 0, &writer.txn)
        check(rc)
        writer.environment = self
        return writer

    def sizes(self):
        """Return (bytes of a page, pages in use from the beginning of the file)."""
        cdef MDB_stat stat
        cdef MDB_envinfo info
        check(mdb_env_stat(self.opened(), &stat))
        check(mdb_env_info(self.opened(), &info))
        return stat.ms_psize, info.me_last_pgno + 1

    def last_transaction(self):
        """Return the number of the last committed transaction that changed something."""
        cdef MDB_envinfo info
        check(mdb_env_info(self.opened(), &info))
        return info.me_last_txnid

    def set_map_bytes(self, size_t size):
        """Move the map; no transaction may be open."""
        cdef MDB_env *env = self.opened()
        cdef int rc
        with nogil:
            rc = mdb_env_set_mapsize(env, size)
        check(rc)


cdef class Writer:
    """A transaction that changes something; made by `Environment.begin`, ended by `commit` or `abort`."""

    cdef Environment environment
    cdef MDB_txn *txn

    cdef MDB_txn *opened(self) except NULL:
        if self.txn is NULL:
            raise RowsError(EINVAL)
        return self.txn

    def open_table(self, bytes name not None):
        """Return the handle of a table, made when there is none; it is good outside once this is committed."""
        cdef MDB_dbi handle = 0
        cdef const char *text = name
        check(mdb_dbi_open(self.opened(), text, MDB_CREATE, &handle))
        return handle

    def get(self, MDB_dbi table, bytes key not None):
        """See `Environment.get`; sees the changes of this transaction."""
        return look_up(self.opened(), table, key)

    def page(self, MDB_dbi table, bytes start, bint after, bytes stop, size_t rows_max, size_t bytes_max):
        """See `Environment.page`; sees the changes of this transaction."""
        return look_through(self.opened(), table, start, after, stop, rows_max, bytes_max)

    def change(self, list rows not None, dict tables=None):
        """See `Environment.change`; after an error this can only be aborted."""
        cdef MDB_txn *txn = self.opened()
        cdef Changes changes = Changes.__new__(Changes, rows, tables)
        cdef int rc
        with nogil:
            rc = make_changes(txn, changes.array, changes.count)
        check(rc)

    def empty(self, MDB_dbi table):
        """Delete all rows of a table."""
        cdef MDB_txn *txn = self.opened()
        cdef int rc
        with nogil:
            rc = mdb_drop(txn, table, 0)
        check(rc)

    def commit(self):
        """Make it durable; this ends it, with or without an error."""
        cdef MDB_txn *txn = self.opened()
        cdef int rc
        self.txn = NULL
        with nogil:
            rc = mdb_txn_commit(txn)
        check(rc)

    def abort(self):
        """Take it back; nothing happens when it has ended."""
        cdef MDB_txn *txn = self.txn
        self.txn = NULL
        if txn is not NULL:
            with nogil:
                mdb_txn_abort(txn)
