# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, auto_pickle=False
"""The tablet kernel: one LMDB environment, its records, change log, root and count, applied in one transaction.

    caller threads ── submit ──> queue ──> writer ──> LMDB transaction ──> fsync ──> state, ring of roots
                                             │                                          │
    readers (pinned, bounded age) <── map ───┘                    wake the callers <────┘

The pieces, each in a file beside this one:

* ``tablet_record.pxi``: the bytes of a record, its checks, its digest; rows of the wire; sorting by key.
* ``tablet_apply.pxi``: entries and raw rows into one transaction: conditions, requests, change log, purge, root.
* ``tablet_writer.pxi``: group commit, growth of the map, expiry of readers, fences, forks, the SIGBUS marker.
* ``tablet_track.pxi``: notes of what changed, for the Merkle tree; walks for other kernels; repair by an authority's rows.
* ``tablet_reader.pxi``: pinned readers: pages for Python, rows for the wire, the full check.
* ``tablet_errors.pxi``: failures as errors with names, keys and values that are refused.
* ``tablet_bytes.pxi``: operations, rows, state and meta rows as bytes that Python sees.
* ``tablet_put.pxi``: operations of Python objects, submitted; ``tablet_incoming.pxi``: rows of other replicas.

Invariants:

* The root is the sum modulo 2^128 of the digests of all records and deterministic rows, kept in the same transaction.
* A change entry is live when its record's header carries its sequence; at most about as many are dead as live.
* What `Environment` shows as its state is durable.
* No pointer into the map outlives a call; the map moves only while nobody reads.

It does no policy and no logging, and knows no replicas: `srengine.storage.tablet` is its only caller.
"""

from cpython.bytes cimport (
    PyBytes_AS_STRING, PyBytes_Check, PyBytes_FromStringAndSize, PyBytes_GET_SIZE, _PyBytes_Resize,
)
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from cpython.tuple cimport PyTuple_CheckExact, PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc cimport errno
from libc.errno cimport EDQUOT, EFBIG, EIO, ENOMEM, ENOSPC
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove, memset, strncpy

from srengine._native.lmdb cimport *
from srengine._native.xxhash cimport *

from srengine import errors

cdef extern from * nogil:
    """
    #define sr_bswap64 __builtin_bswap64
    /* Take up to `wanted` of what is left; 0 or less: nothing is. */
    static inline long long sr_claim(int64_t *left, int64_t wanted) {
        int64_t found = __atomic_fetch_sub(left, wanted, __ATOMIC_RELAXED);
        return found < wanted ? found : wanted;
    }
    """
    int64_t sr_claim(int64_t *left, int64_t wanted)
    uint64_t bswap64 "sr_bswap64"(uint64_t value)

include "tablet_record.pxi"
include "tablet_apply.pxi"
include "tablet_writer.pxi"
include "tablet_track.pxi"
include "tablet_errors.pxi"
include "tablet_bytes.pxi"
include "tablet_put.pxi"
include "tablet_incoming.pxi"


def lmdb_version():
    """Return the version of the LMDB that is compiled in, as (major, minor, patch)."""
    cdef int major, minor, patch
    mdb_version(&major, &minor, &patch)
    return major, minor, patch


cdef class Environment:
    """One open tablet. `srengine.storage.tablet.Tablet` is the face of it; all calls are thread-safe.

    path              directory of data.mdb, as the file system spells it
    map_bytes         address space to reserve at first
    view_ms_max       maximum age of a reader, milliseconds
    create            make the environment with ``meta`` rows when there is none
    meta              rows of a new tablet: {name: value}
    digests           False for one benchmark: no digests, no root
    """

    def __cinit__(self):
        pthread_mutex_init(&self.map_lock, NULL)
        pthread_mutex_init(&self.queue_lock, NULL)
        sr_timed_condition(&self.unpinned)
        sr_timed_condition(&self.gathered)
        self.generation = sr_generation
        self.is_closed = True
        self.ring_sequences = <uint64_t *>calloc(RING_ENTRIES, sizeof(uint64_t))
        self.ring_roots = <Sum *>calloc(RING_ENTRIES, sizeof(Sum))
        if self.ring_sequences is NULL or self.ring_roots is NULL:
            raise MemoryError

    def __init__(self, bytes path not None, *, size_t map_bytes, uint64_t view_ms_max, bint create=False,
                 dict meta=None, bint digests=True, unsigned int readers_max=1000):
        cdef MDB_txn *txn = NULL
        cdef MDB_val key, data
        cdef State state
        cdef Failure failure
        cdef int rc
        cdef unsigned int flags
        cdef const char *where
        if self.env is not NULL:
            raise errors.Error("an environment is opened once")
        failure.code = 0
        self.path = path
        self.view_ms_max = view_ms_max
        self.map_bytes = map_bytes
        self.digests = digests
        marker = path + b"/FENCED"
        if len(marker) >= sizeof(self.marker):
            raise errors.InvalidValue(f"a path has at most {sizeof(self.marker) - 1} bytes")
        strncpy(self.marker, marker, sizeof(self.marker))
        where = path
        rc = mdb_env_create(&self.env)
        if rc == 0:
            rc = mdb_env_set_maxdbs(self.env, 16)
        if rc == 0:
            rc = mdb_env_set_maxreaders(self.env, readers_max)
        if rc == 0:
            rc = mdb_env_set_mapsize(self.env, map_bytes)
        if rc == 0:
            with nogil:
                sr_enter(self.marker)
                rc = mdb_env_open(self.env, where, MDB_NOTLS, 0o600)
                if rc == 0:
                    rc = mdb_txn_begin(self.env, NULL, 0, &txn)
                sr_enter(NULL)
        if rc != 0:
            fail(&failure, rc, b"open", NULL, 0)
            self.abandon()
            raise_failure(self, &failure)
        try:
            flags = MDB_CREATE if create else 0
            for name, integer in ((b"records", 0), (b"changes", 1), (b"meta", 0), (b"requests", 1), (b"sessions", 0)):
                rc = self.open_database(txn, name, flags | (MDB_INTEGERKEY if integer else 0))
                if rc == MDB_NOTFOUND:
                    raise errors.ForeignData(f"{path.decode('utf-8', 'replace')} is no tablet: it has no database {name!r}",
                                             path=path.decode("utf-8", "replace"))
                if rc != 0:
                    fail(&failure, rc, b"open a database", NULL, 0)
                    raise_failure(self, &failure)
            rc = read_state(self, txn, &state, &failure)
            key.mv_data = <void *><const char *>b"state"
            key.mv_size = 5
            if mdb_get(txn, self.meta, &key, &data) == MDB_NOTFOUND and create:
                memset(&state, 0, sizeof(State))
                state.format = 1
                state.applied_term = 1
                state.check = XXH3_64bits(&state, STATE_CHECKED)
                data.mv_data = &state
                data.mv_size = sizeof(State)
                rc = mdb_put(txn, self.meta, &key, &data, 0)
                for name, value in (meta or {}).items():
                    if rc == 0:
                        checked = with_check(name, value)
                        key.mv_data = <void *><char *>name
                        key.mv_size = len(name)
                        data.mv_data = <void *><char *>checked
                        data.mv_size = len(checked)
                        rc = mdb_put(txn, self.meta, &key, &data, 0)
            if rc != 0:
                if failure.code == 0 or failure.code == MDB_NOTFOUND:
                    fail(&failure, rc, b"state", NULL, 0)
                raise_failure(self, &failure)
            self.state = state
            key.mv_data = <void *><const char *>b"seed"
            key.mv_size = 4
            rc = mdb_get(txn, self.meta, &key, &data)
            if rc != 0 or data.mv_size != 12:
                fail(&failure, rc if rc else CODE_CORRUPT, b"seed row", NULL, 0)
                raise_failure(self, &failure)
            check_row(b"seed", PyBytes_FromStringAndSize(<char *>data.mv_data, data.mv_size))
            memcpy(&self.seed, data.mv_data, 8)
        except BaseException:
            mdb_txn_abort(txn)
            self.abandon()
            raise
        with nogil:
            rc = mdb_txn_commit(txn)
            if rc == 0:
                rc = mdb_txn_begin(self.env, NULL, MDB_RDONLY, &self.get_txn)
            if rc == 0:
                self.noted_txn = mdb_txn_id(self.get_txn)
                mdb_txn_reset(self.get_txn)
                mdb_reader_check(self.env, NULL)
        if rc != 0:
            fail(&failure, rc, b"open", NULL, 0)
            self.abandon()
            raise_failure(self, &failure)
        ring_push(self, self.state.sequence, &self.state.root)
        self.is_closed = False

    cdef int open_database(self, MDB_txn *txn, bytes name, unsigned int flags) noexcept:
        cdef MDB_dbi dbi = 0
        cdef int rc = mdb_dbi_open(txn, name, flags, &dbi)
        if rc == 0:
            if name == b"records":
                self.records = dbi
            elif name == b"changes":
                self.changes = dbi
            elif name == b"meta":
                self.meta = dbi
            elif name == b"requests":
                self.requests = dbi
            else:
                self.sessions = dbi
        return rc

    cdef void abandon(self) noexcept:
        if self.env is not NULL and self.generation == sr_generation:
            mdb_env_close(self.env)
        self.env = NULL

    def __dealloc__(self):
        if not self.is_closed and self.generation == sr_generation:
            self.shut()
        notes_free(&self.pending)
        notes_free(&self.noted)
        free(self.ring_sequences)
        free(self.ring_roots)
        if self.generation != sr_generation:
            return
        pthread_mutex_destroy(&self.map_lock)
        pthread_mutex_destroy(&self.queue_lock)
        pthread_cond_destroy(&self.unpinned)
        pthread_cond_destroy(&self.gathered)

    cdef void shut(self) noexcept:
        cdef ReaderLink *link
        with nogil:
            pthread_mutex_lock(&self.queue_lock)
            if self.is_closed:
                # Another thread closes it at this moment.
                pthread_mutex_unlock(&self.queue_lock)
                return
            self.is_closed = True
            while self.writer_active:
                sr_wait_us(&self.unpinned, &self.queue_lock, 1000)
            link = self.readers
            while link is not NULL:
                if link.busy:
                    # NB: whoever uses it may free it while we wait, and its neighbours go, too: begin again.
                    pthread_cond_wait(&self.unpinned, &self.queue_lock)
                    link = self.readers
                    continue
                if link.txn is not NULL:
                    mdb_txn_abort(link.txn)
                    link.txn = NULL
                    link.is_expired = True
                    self.pinned -= 1
                link = link.following
            pthread_mutex_unlock(&self.queue_lock)
            pthread_mutex_lock(&self.map_lock)
            if self.get_txn is not NULL:
                mdb_txn_abort(self.get_txn)
                self.get_txn = NULL
            mdb_env_close(self.env)
            self.env = NULL
            pthread_mutex_unlock(&self.map_lock)

    def close(self):
        """Close the tablet; views of it expire. May be called twice; does nothing in a forked child."""
        if not self.is_closed and self.generation == sr_generation:
            self.shut()

    cdef int check_not_forked(self) except -1:
        # NB: also before any lock is taken: another thread of the parent may have held it at the fork.
        if self.generation != sr_generation:
            raise errors.ForkedEnvironment("the tablet was opened before a fork; open the store again in the child process")
        return 0

    cdef int check_usable(self) except -1:
        self.check_not_forked()
        if self.is_closed:
            raise errors.Closed("the tablet is closed")
        if self.fence:
            raise errors.TabletFenced(f"tablet {self.path.decode('utf-8', 'replace')} is fenced after an input/output "
                                      f"error: {strerror(self.fence)}", tablet=self.path.decode("utf-8", "replace"),
                                      reason=strerror(self.fence))
        return 0

    # --- what it shows ---------------------------------------------------------------------------------------------

    @property
    def closed(self):
        return self.is_closed

    @property
    def state_tuple(self):
        """(sequence, root, count, live count, index, term, clock, purge mark, log floor, dead); durable, consistent."""
        cdef State state
        self.check_not_forked()
        pthread_mutex_lock(&self.queue_lock)
        state = self.state
        pthread_mutex_unlock(&self.queue_lock)
        return state_as_tuple(&state)

    def stands_at(self, bytes where not None):
        """Whether the tablet stands at ``where``: root, count and sequence as 32 bytes (docs/formats-exchange.md)."""
        cdef uint64_t image[4]
        cdef bint equal
        if len(where) != 32:
            raise errors.FrameError(f"a comparison has 32 bytes, not {len(where)}")
        self.check_not_forked()
        memcpy(image, PyBytes_AS_STRING(where), 32)
        pthread_mutex_lock(&self.queue_lock)
        equal = image[0] == self.state.root.low and image[1] == self.state.root.high \
            and image[2] == self.state.count and image[3] == self.state.sequence
        pthread_mutex_unlock(&self.queue_lock)
        return equal

    @property
    def counters(self):
        """Counts since the open: commits, grown (of the map), expired (views), and the present map_bytes and pinned."""
        return {"commits": self.commits, "grown": self.grown, "expired": self.expired, "map_bytes": self.map_bytes,
                "pinned": self.pinned, "disk_full": self.disk_full, "fenced": bool(self.fence)}

    def file_bytes(self):
        """Return the bytes of pages in use by the environment's file, free pages inside it included."""
        cdef MDB_envinfo info
        cdef MDB_stat stat
        self.check_usable()
        pthread_mutex_lock(&self.map_lock)
        mdb_env_info(self.env, &info)
        mdb_env_stat(self.env, &stat)
        pthread_mutex_unlock(&self.map_lock)
        return (info.me_last_pgno + 1) * stat.ms_psize

    def root_at(self, uint64_t sequence):
        """Return the root (16 bytes) at the end of the entry that ends at ``sequence``, or None if not kept."""
        cdef Sum root
        cdef bint found
        self.check_not_forked()
        pthread_mutex_lock(&self.queue_lock)
        found = ring_find(self, sequence, &root)
        pthread_mutex_unlock(&self.queue_lock)
        return PyBytes_FromStringAndSize(<char *>&root, 16) if found else None

    # --- reads -----------------------------------------------------------------------------------------------------

    cdef int find(self, object key, MDB_val *data, Header *header) except -1:
        """Look a record up in the shared read transaction; the caller holds map_lock and has renewed it. 1: found."""
        cdef MDB_val k
        cdef Failure failure
        cdef int rc
        k.mv_data = PyBytes_AS_STRING(key)
        k.mv_size = PyBytes_GET_SIZE(key)
        rc = mdb_get(self.get_txn, self.records, &k, data)
        if rc == MDB_NOTFOUND:
            return 0
        failure.code = 0
        if rc == 0:
            sr_prefetch_record(data.mv_data, data.mv_size)
        if rc == 0 and not record_read(<const uint8_t *>k.mv_data, k.mv_size, <const uint8_t *>data.mv_data,
                                       data.mv_size, header):
            rc = CODE_CORRUPT
        if rc != 0:
            fail(&failure, rc, b"record", <const uint8_t *>k.mv_data, k.mv_size)
            raise_failure(self, &failure)
        return 1

    cdef int enter(self) except -1:
        cdef int rc
        cdef Failure failure
        if self.generation != sr_generation or self.is_closed or self.fence:
            self.check_usable()
        pthread_mutex_lock(&self.map_lock)
        rc = mdb_txn_renew(self.get_txn) if self.get_txn is not NULL else 22
        if rc != 0:
            pthread_mutex_unlock(&self.map_lock)
            self.check_usable()
            failure.code = 0
            fail(&failure, rc, b"read", NULL, 0)
            raise_failure(self, &failure)
        sr_enter(self.marker)
        return 0

    cdef void leave(self) noexcept:
        sr_enter(NULL)
        mdb_txn_reset(self.get_txn)
        pthread_mutex_unlock(&self.map_lock)

    def get(self, key):
        """Return the value of a key, or None; every check verified."""
        cdef MDB_val data
        cdef Header header
        check_key(key)
        self.enter()
        try:
            if not self.find(key, &data, &header) or header.flags & TOMBSTONE:
                return None
            return PyBytes_FromStringAndSize(<const char *>header.value, header.value_bytes)
        finally:
            self.leave()

    def get_record(self, key):
        """Return (value, sequence, hybrid clock, flags), tombstones included, or None."""
        cdef MDB_val data
        cdef Header header
        check_key(key)
        self.enter()
        try:
            if not self.find(key, &data, &header):
                return None
            return (PyBytes_FromStringAndSize(<const char *>header.value, header.value_bytes), header.sequence,
                    header.hybrid_clock, header.flags)
        finally:
            self.leave()

    def get_many(self, keys):
        """Return the values of keys, None for absent ones, all from one point in time."""
        cdef MDB_val data
        cdef Header header
        cdef list names = list(keys)
        cdef list result = []
        for key in names:
            check_key(key)
        self.enter()
        try:
            for key in names:
                if not self.find(key, &data, &header) or header.flags & TOMBSTONE:
                    result.append(None)
                else:
                    result.append(PyBytes_FromStringAndSize(<const char *>header.value, header.value_bytes))
            return result
        finally:
            self.leave()

    def reader(self, ms_max=None):
        """Return a new pinned `Reader`, of ``ms_max`` milliseconds of age at most."""
        return Reader(self, self.view_ms_max if ms_max is None else ms_max)

    def get_meta(self, bytes name not None):
        """Return a meta row's value, or None; raises CorruptionError if its check fails."""
        cdef MDB_val key, data
        cdef int rc
        self.enter()
        try:
            key.mv_data = <void *><char *>name
            key.mv_size = len(name)
            rc = mdb_get(self.get_txn, self.meta, &key, &data)
            if rc == MDB_NOTFOUND:
                return None
            if rc != 0:
                raise errors.CorruptionError(f"meta row {name!r}: {strerror(rc)}")
            return check_row(name, PyBytes_FromStringAndSize(<char *>data.mv_data, data.mv_size))
        finally:
            self.leave()

    # --- writes ----------------------------------------------------------------------------------------------------

    cdef int finish(self, Submission *job) except -1:
        """Submit, wait, raise what went wrong."""
        self.check_usable()
        with nogil:
            submit(self, job)
        if job.failure.code != 0:
            raise_failure(self, &job.failure)
        return 0

    def put(self, key, value, int condition=CONDITION_NONE, uint64_t expected=0):
        """Write one record durably; return (result, version now, version that stood)."""
        cdef Operation operation
        check_key(key)
        check_value(value)
        memset(&operation, 0, sizeof(Operation))
        set_operation(&operation, PUT, key, value)
        operation.condition = condition
        operation.expected = expected
        return write_one(self, &operation)

    def delete(self, key, int condition=CONDITION_NONE, uint64_t expected=0):
        """Delete one record durably; return (result, version now, version that stood)."""
        cdef Operation operation
        check_key(key)
        memset(&operation, 0, sizeof(Operation))
        set_operation(&operation, DELETE, key, None)
        operation.condition = condition
        operation.expected = expected
        return write_one(self, &operation)

    def put_many(self, pairs):
        """Write (key, value) pairs in one transaction; return the last sequence. A later pair of a key wins."""
        return put_pairs(self, pairs)

    def delete_many(self, keys):
        """Delete keys in one transaction; return how many records there were to delete."""
        return delete_keys(self, keys)

    def apply(self, list entries not None):
        """Apply entries in one transaction: [(kind, operations, session, number, argument)].

        Returns [(decision, first sequence, last sequence, root at its end, answer or results)]: for a duplicate the
        kept answer as stored, else one result byte an operation.
        """
        return apply_entries(self, entries)

    def apply_rows(self, const uint8_t[::1] rows not None, meta not None, bint append_changes, base, target):
        """Put rows of another replica, and meta rows [(database, name, value or None)], in one transaction.

        ``base`` (sequence, root or None) must be where the tablet stands, if given. With ``target``, the state row of
        the source, tombstones up to its purge mark are removed and root and count must be equal at the end.
        """
        cdef _Incoming work = _Incoming()
        work.job.mode = MODE_RAW
        work.job.append_changes = append_changes
        if target is not None:
            work.end_at(target)
        if base is not None:
            work.begin_at(base, &self.state.root)
        work.add_rows(rows, 0)
        work.add_meta(meta)
        self.finish(&work.job)

    def repair(self, const uint8_t[::1] rows not None, list removed not None, list meta not None, bint replace_rows, base,
               bytes target not None, actual):
        """Put an authority's rows over whatever stands here and take ``removed`` keys away, in one transaction.

        ``meta``: meta rows of its; with ``replace_rows`` its request and session rows replace all of ours. ``base``: (sequence,
        root) where the tablet must stand. ``target``: the state row of the authority; root and count must be equal at
        the end. ``actual``: (root, count, live count, records with a change entry) as summed from the records, which
        stand in for what the state row carries, or None.
        """
        cdef _Incoming work = _Incoming()
        cdef bytes root
        work.job.mode = MODE_RAW
        work.job.repair = True
        work.job.append_changes = True
        work.job.replace_rows = replace_rows
        work.end_at(target)
        work.begin_at(base, NULL)
        if actual is not None:
            root, work.job.actual.count, work.job.actual.live_count, work.job.actual_entries = actual
            memcpy(&work.job.actual.root, PyBytes_AS_STRING(root), 16)
            work.job.check_actual = True
        work.add_rows(rows, len(removed))
        work.add_removed(removed)
        work.add_meta(meta)
        self.finish(&work.job)

    def put_meta(self, dict rows not None):
        """Write meta rows durably: {name: value, or None to delete}."""
        cdef _Incoming work = _Incoming()
        work.job.mode = MODE_META
        work.add_meta([(DATABASE_META, name, value) for name, value in rows.items()])
        self.finish(&work.job)

    def adopt_seed(self, bytes seed not None):
        """Take over another tablet's seed, durably; only while nothing was ever written. See `Tablet.adopt_seed`."""
        if len(seed) != 8:
            raise errors.InvalidValue("a seed has 8 bytes")
        if self.state.sequence or self.state.count:
            raise errors.Conflict("only an empty tablet can take over a seed", sequence=self.state.sequence)
        self.put_meta({b"seed": seed})
        memcpy(&self.seed, PyBytes_AS_STRING(seed), 8)


include "tablet_reader.pxi"

if sr_process_setup() != 0:
    raise OSError("the SIGBUS handler cannot be installed")
