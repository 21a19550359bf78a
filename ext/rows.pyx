# cython: language_level=3
"""Rows of named tables in one LMDB environment, for the metadata store: what LMDB gives, in few calls.

The interpreter is let go around everything that may take a disk's time, once a call and not once a row. Threads share an
`Environment`; a `Writer` belongs to the thread that began it.

`srengine.storage.metadata` is its only caller, and sees to what LMDB asks for: one writer at a time, nobody reading while
the map moves or the environment is closed, no call in a forked child.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EINVAL, ENOMEM
from libc.stddef cimport size_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp

from srengine._native.lmdb cimport *

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


cdef struct Change:
    MDB_dbi table
    MDB_val key
    MDB_val value
    bint deletes


cdef Change *changes_of(list rows) except? NULL:
    """Return an array that points into the rows' bytes, which the caller keeps; NULL for no rows."""
    cdef Py_ssize_t count = len(rows), i
    cdef Change *changes
    if count == 0:
        return NULL
    changes = <Change *>calloc(<size_t>count, sizeof(Change))
    if changes is NULL:
        raise MemoryError
    try:
        for i in range(count):
            table, key, value = rows[i]
            if not PyBytes_Check(key) or not (value is None or PyBytes_Check(value)):
                raise TypeError("keys and values are bytes")
            changes[i].table = table
            changes[i].key.mv_size = <size_t>PyBytes_GET_SIZE(key)
            changes[i].key.mv_data = PyBytes_AS_STRING(key)
            if value is None:
                changes[i].deletes = True
            else:
                changes[i].value.mv_size = <size_t>PyBytes_GET_SIZE(value)
                changes[i].value.mv_data = PyBytes_AS_STRING(value)
    except BaseException:
        free(changes)
        raise
    return changes


cdef int make_changes(MDB_txn *txn, Change *changes, Py_ssize_t count) noexcept nogil:
    cdef Py_ssize_t i
    cdef int rc
    for i in range(count):
        if changes[i].deletes:
            rc = mdb_del(txn, changes[i].table, &changes[i].key, NULL)
            if rc == MDB_NOTFOUND:
                rc = 0
        else:
            rc = mdb_put(txn, changes[i].table, &changes[i].key, &changes[i].value, 0)
        if rc != 0:
            return rc
    return 0


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

    def change(self, list rows not None):
        """Put each (table, key, value), or delete the key where the value is None, in one durable transaction."""
        cdef MDB_env *env = self.opened()
        cdef MDB_txn *txn = NULL
        cdef Py_ssize_t count = len(rows)
        cdef Change *changes = changes_of(rows)
        cdef int rc
        with nogil:
            rc = mdb_txn_begin(env, NULL, 0, &txn)
            if rc == 0:
                rc = make_changes(txn, changes, count)
                if rc == 0:
                    rc = mdb_txn_commit(txn)
                else:
                    mdb_txn_abort(txn)
            free(changes)
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

    def change(self, list rows not None):
        """See `Environment.change`; after an error this can only be aborted."""
        cdef MDB_txn *txn = self.opened()
        cdef Py_ssize_t count = len(rows)
        cdef Change *changes = changes_of(rows)
        cdef int rc
        with nogil:
            rc = make_changes(txn, changes, count)
            free(changes)
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
