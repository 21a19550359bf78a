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

cdef enum:
    OPERATION_HEADER = 16


cdef str strerror(int code):
    return (<bytes>mdb_strerror(code)).decode("utf-8", "replace")


cdef str show_key(bytes key):
    return repr(key) if len(key) <= 64 else repr(key[:61]) + "..."


cdef object error_of(Environment env, Failure *failure):
    """Return the typed error of a failure."""
    cdef int code = failure.code
    cdef bytes key = (<char *>failure.key)[:failure.key_bytes]
    where = env.path.decode("utf-8", "replace")
    what = (<bytes>failure.what).decode() if failure.what is not NULL else "tablet"
    if env.fence and what == "fenced" or code == env.fence and env.fence:
        return errors.TabletFenced(f"tablet {where} is fenced after an input/output error: {strerror(env.fence)}",
                                   tablet=where, reason=strerror(env.fence))
    if code == CODE_CORRUPT or code in (MDB_CORRUPTED, MDB_PAGE_NOTFOUND, MDB_INVALID, MDB_VERSION_MISMATCH):
        reason = what if code == CODE_CORRUPT else f"{what}: {strerror(code)}"
        suffix = f" of key {show_key(key)}" if key else ""
        return errors.CorruptionError(f"tablet {where}: {reason}{suffix} is damaged", tablet=where, key=key, what=reason)
    if code == CODE_BASE_MISMATCH:
        return errors.Diverged(f"tablet {where} does not stand at the base position of the delta", tablet=where)
    if code == CODE_ROOT_MISMATCH:
        return errors.Diverged(f"tablet {where} would not have the root or count that the source proved", tablet=where)
    if code == CODE_ROWS_MALFORMED:
        return errors.FrameError(f"rows for tablet {where} are malformed: {what}", tablet=where)
    if code == CODE_CLOSED:
        return errors.Closed("the tablet is closed")
    if code == CODE_NO_MEMORY:
        return MemoryError(what)
    if is_space(code):
        return errors.DiskFull(f"tablet {where} is read-only: {strerror(code)}", tablet=where)
    if code == MDB_READERS_FULL:
        return errors.QuotaExceeded(f"tablet {where} has too many open views", tablet=where)
    return errors.Error(f"tablet {where}: {what}: {strerror(code)}", tablet=where, errno=code)


cdef int raise_failure(Environment env, Failure *failure) except -1:
    raise error_of(env, failure)


cdef int check_key(object key) except -1:
    if not PyBytes_Check(key):
        raise TypeError(f"a key is bytes, not {type(key).__name__}")
    if not 1 <= PyBytes_GET_SIZE(key) <= KEY_MAX:
        raise errors.InvalidValue(f"a key has 1 to {KEY_MAX} bytes, not {PyBytes_GET_SIZE(key)}",
                                  limit=KEY_MAX, size=PyBytes_GET_SIZE(key))
    return 0


cdef int check_value(object value) except -1:
    if not PyBytes_Check(value):
        raise TypeError(f"a value is bytes, not {type(value).__name__}")
    if PyBytes_GET_SIZE(value) > VALUE_MAX:
        raise errors.InvalidValue(f"a value has at most {VALUE_MAX} bytes, not {PyBytes_GET_SIZE(value)}",
                                  limit=VALUE_MAX, size=PyBytes_GET_SIZE(value))
    return 0


cdef inline void set_operation(Operation *operation, uint8_t kind, object key, object value) noexcept:
    operation.key = <const uint8_t *>PyBytes_AS_STRING(key)
    operation.key_bytes = <uint16_t>PyBytes_GET_SIZE(key)
    if value is not None:
        operation.value = <const uint8_t *>PyBytes_AS_STRING(value)
        operation.value_bytes = <uint32_t>PyBytes_GET_SIZE(value)
    operation.kind = kind


cdef tuple state_as_tuple(const State *state):
    cdef uint64_t root[2]
    root[0] = state.root.low
    root[1] = state.root.high
    return (state.sequence, PyBytes_FromStringAndSize(<char *>root, 16), state.count, state.live_count,
            state.applied_index, state.applied_term, state.hybrid_clock, state.purge_mark, state.log_floor, state.dead)


def decode_state(bytes image not None):
    """Return the fields of a state row: (sequence, root, count, live count, index, term, clock, purge, floor, dead)."""
    cdef State state
    load_state(image, &state)
    return state_as_tuple(&state)


cdef int load_state(bytes image, State *state) except -1:
    if len(image) != sizeof(State):
        raise errors.FrameError(f"a state row has {sizeof(State)} bytes, not {len(image)}")
    memcpy(state, PyBytes_AS_STRING(image), sizeof(State))
    if state.format != 1 or state.check != XXH3_64bits(state, STATE_CHECKED):
        raise errors.FrameError("a state row is damaged or of another format")
    return 0


# --- operations as bytes -----------------------------------------------------------------------------------------------
#
#   operation  0 u8 kind | 1 u8 condition | 2 u16 key bytes | 4 u32 value bytes | 8 u64 version | 16 key | value

def encode_operations(operations):
    """Encode [(kind, key, value, condition, version)]; value None for a delete. See docs/formats.md."""
    cdef list parts = []
    cdef uint8_t header[OPERATION_HEADER]
    cdef uint16_t key_bytes
    cdef uint32_t value_bytes
    cdef uint64_t version
    for kind, key, value, condition, expected in operations:
        check_key(key)
        if kind == PUT:
            check_value(value)
        elif kind != DELETE:
            raise errors.InvalidValue(f"unknown kind of operation {kind!r}")
        if condition not in (CONDITION_NONE, IF_ABSENT, IF_VERSION, IF_PRESENT):
            raise errors.InvalidValue(f"unknown condition {condition!r}")
        header[0] = kind
        header[1] = condition
        key_bytes = <uint16_t>len(key)
        value_bytes = <uint32_t>len(value) if kind == PUT else 0
        version = expected or 0
        memcpy(header + 2, &key_bytes, 2)
        memcpy(header + 4, &value_bytes, 4)
        memcpy(header + 8, &version, 8)
        parts.append(PyBytes_FromStringAndSize(<char *>header, OPERATION_HEADER))
        parts.append(key)
        if value_bytes:
            parts.append(value)
    return b"".join(parts)


cdef bint operation_read(const uint8_t *cursor, const uint8_t *end, Operation *out, size_t *used) noexcept nogil:
    cdef size_t available = <size_t>(end - cursor)
    cdef uint16_t key_bytes
    cdef uint32_t value_bytes
    if available < OPERATION_HEADER:
        return False
    memcpy(&key_bytes, cursor + 2, 2)
    memcpy(&value_bytes, cursor + 4, 4)
    memset(out, 0, sizeof(Operation))
    out.kind = cursor[0]
    out.condition = cursor[1]
    if out.kind > DELETE or out.condition > IF_PRESENT or key_bytes < 1 or key_bytes > KEY_MAX \
            or value_bytes > VALUE_MAX or (out.kind == DELETE and value_bytes):
        return False
    used[0] = OPERATION_HEADER + <size_t>key_bytes + value_bytes
    if used[0] > available:
        return False
    memcpy(&out.expected, cursor + 8, 8)
    out.key = cursor + OPERATION_HEADER
    out.key_bytes = key_bytes
    out.value = out.key + key_bytes
    out.value_bytes = value_bytes
    return True


cdef int64_t count_operations(const uint8_t *data, size_t size) noexcept nogil:
    cdef Operation operation
    cdef size_t used = 0
    cdef size_t at = 0
    cdef int64_t count = 0
    while at < size:
        if not operation_read(data + at, data + size, &operation, &used):
            return -1
        at += used
        count += 1
    return count


def check_operations(const uint8_t[::1] data not None):
    """Return the number of operations encoded; raises FrameError for anything else. Never reads past the end."""
    cdef int64_t count = count_operations(&data[0], data.shape[0]) if data.shape[0] else 0
    if count < 0:
        raise errors.FrameError("the bytes are no sequence of operations")
    return count


def check_rows(const uint8_t[::1] data not None, int sorted_by=0):
    """Return (count, first, last) of encoded rows; raises FrameError for anything else.

    ``sorted_by`` 1: keys must rise, first and last are keys; 2: sequences must rise, first and last are sequences;
    0: no order is asked for and both are None.
    """
    cdef Operation row, previous
    cdef size_t used = 0
    cdef size_t at = 0
    cdef size_t size = data.shape[0]
    cdef size_t count = 0
    cdef bint good = True
    first = last = None
    if size == 0:
        return 0, None, None
    with nogil:
        while at < size:
            if not row_read(&data[at], &data[0] + size, &row, &used):
                good = False
                break
            if count:
                if sorted_by == 1 and compare_keys(row.key, row.key_bytes, previous.key, previous.key_bytes) <= 0:
                    good = False
                    break
                if sorted_by == 2 and row.sequence <= previous.sequence:
                    good = False
                    break
            previous = row
            at += used
            count += 1
    if not good:
        raise errors.FrameError(f"row {count} is malformed or out of order", ordinal=count)
    if sorted_by == 1:
        row_read(&data[0], &data[0] + size, &row, &used)
        first = PyBytes_FromStringAndSize(<char *>row.key, row.key_bytes)
        last = PyBytes_FromStringAndSize(<char *>previous.key, previous.key_bytes)
    elif sorted_by == 2:
        row_read(&data[0], &data[0] + size, &row, &used)
        first, last = row.sequence, previous.sequence
    return count, first, last


def decode_rows(data not None):
    """Return rows as [(key, value, sequence, hybrid clock, flags)]; for tests and tools, not for the hot path."""
    cdef const uint8_t[::1] view = data
    cdef Operation row
    cdef size_t used = 0
    cdef size_t at = 0
    cdef size_t size = view.shape[0]
    result = []
    while at < size:
        if not row_read(&view[at], &view[0] + size, &row, &used):
            raise errors.FrameError(f"row {len(result)} is malformed", ordinal=len(result))
        result.append((PyBytes_FromStringAndSize(<char *>row.key, row.key_bytes),
                       PyBytes_FromStringAndSize(<char *>row.value, row.value_bytes),
                       row.sequence, row.hybrid_clock, row.flags))
        at += used
    return result


def digest_vector(uint64_t seed, bytes key not None, bytes value not None, uint8_t flags, uint64_t sequence,
                  uint64_t hybrid_clock):
    """Return (stored record, record digest) for the test vectors in docs/formats.md."""
    cdef uint8_t header[HEADER_FIXED + 4]
    cdef uint64_t checksum
    cdef Sum digest
    cdef uint64_t pair[2]
    check_key(key)
    checksum = content_checksum(<const uint8_t *>PyBytes_AS_STRING(value), len(value), flags)
    header_write(header, <const uint8_t *>PyBytes_AS_STRING(key), len(key), flags, 0, NULL, sequence, hybrid_clock, checksum)
    digest = record_digest(seed, <const uint8_t *>PyBytes_AS_STRING(key), len(key), flags, 0, NULL, sequence,
                           hybrid_clock, checksum)
    pair[0] = digest.low
    pair[1] = digest.high
    return PyBytes_FromStringAndSize(<char *>header, HEADER_MIN) + value, PyBytes_FromStringAndSize(<char *>pair, 16)


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
        pthread_cond_init(&self.unpinned, NULL)
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
                sr_wait_ms(&self.unpinned, &self.queue_lock, 1)
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
        return self.one(&operation)

    def delete(self, key, int condition=CONDITION_NONE, uint64_t expected=0):
        """Delete one record durably; return (result, version now, version that stood)."""
        cdef Operation operation
        check_key(key)
        memset(&operation, 0, sizeof(Operation))
        set_operation(&operation, DELETE, key, None)
        operation.condition = condition
        operation.expected = expected
        return self.one(&operation)

    cdef tuple one(self, Operation *operation):
        cdef Submission job
        cdef Entry entry
        memset(&job, 0, sizeof(Submission))
        memset(&entry, 0, sizeof(Entry))
        entry.kind = BATCH
        entry.operation_end = 1
        job.operations = operation
        job.operation_count = 1
        job.entries = &entry
        job.entry_count = 1
        job.bytes = operation.value_bytes + operation.key_bytes
        self.finish(&job)
        return operation.result, operation.sequence, operation.current

    def put_many(self, pairs):
        """Write (key, value) pairs in one transaction; return the last sequence. A later pair of a key wins."""
        cdef list items = list(pairs)
        cdef Py_ssize_t count = len(items)
        cdef Py_ssize_t i
        cdef list kept
        cdef object pair, key, value
        cdef Operation *operations
        if count == 0:
            return self.state.sequence
        # NB: the tuples keep keys and values alive while the GIL is released; `kept` keeps the tuples.
        kept = [None] * count
        operations = <Operation *>calloc(count, sizeof(Operation))
        if operations is NULL:
            raise MemoryError
        try:
            for i in range(count):
                pair = items[i]
                if not PyTuple_CheckExact(pair):
                    pair = tuple(pair)
                if PyTuple_GET_SIZE(pair) != 2:
                    raise errors.InvalidValue("put_many takes pairs (key, value)")
                kept[i] = pair
                key = <object>PyTuple_GET_ITEM(pair, 0)
                value = <object>PyTuple_GET_ITEM(pair, 1)
                if not PyBytes_Check(key) or not 1 <= PyBytes_GET_SIZE(key) <= KEY_MAX:
                    check_key(key)
                if not PyBytes_Check(value) or PyBytes_GET_SIZE(value) > VALUE_MAX:
                    check_value(value)
                operations[i].key = <const uint8_t *>PyBytes_AS_STRING(key)
                operations[i].key_bytes = <uint16_t>PyBytes_GET_SIZE(key)
                operations[i].value = <const uint8_t *>PyBytes_AS_STRING(value)
                operations[i].value_bytes = <uint32_t>PyBytes_GET_SIZE(value)
            return self.many(operations, count)
        finally:
            free(operations)

    def delete_many(self, keys):
        """Delete keys in one transaction; return how many records there were to delete."""
        cdef list names = list(keys)
        cdef Py_ssize_t count = len(names)
        cdef Py_ssize_t i
        cdef Py_ssize_t deleted = 0
        cdef Operation *operations
        if count == 0:
            return 0
        for key in names:
            check_key(key)
        operations = <Operation *>calloc(count, sizeof(Operation))
        if operations is NULL:
            raise MemoryError
        try:
            for i in range(count):
                set_operation(&operations[i], DELETE, names[i], None)
            self.many(operations, count)
            for i in range(count):
                deleted += operations[i].result == APPLIED
            return deleted
        finally:
            free(operations)

    cdef uint64_t many(self, Operation *operations, Py_ssize_t count) except? 0:
        cdef Submission job
        cdef Entry entry
        cdef Py_ssize_t i
        memset(&job, 0, sizeof(Submission))
        memset(&entry, 0, sizeof(Entry))
        entry.kind = BATCH
        entry.operation_end = count
        job.operations = operations
        job.operation_count = count
        job.entries = &entry
        job.entry_count = 1
        for i in range(count):
            job.bytes += operations[i].key_bytes + operations[i].value_bytes
        self.finish(&job)
        return entry.last_sequence

    def apply(self, list entries not None):
        """Apply entries in one transaction: [(kind, operations, session, number, argument)].

        Returns [(decision, first sequence, last sequence, root at its end, answer or results)]: for a duplicate the
        kept answer as stored, else one result byte an operation.
        """
        cdef Py_ssize_t count = len(entries)
        cdef Py_ssize_t i
        cdef int64_t here
        cdef size_t total = 0
        cdef size_t at, used
        cdef size_t used_operations = 0
        cdef Submission job
        cdef Entry *made = NULL
        cdef Operation *operations = NULL
        cdef const uint8_t *data
        cdef bytes body, session
        cdef size_t size
        if count == 0:
            return []
        memset(&job, 0, sizeof(Submission))
        for kind, body, session, _number, _argument in entries:
            if kind not in (BATCH, OPEN_SESSION, PURGE):
                raise errors.InvalidValue(f"unknown kind of entry {kind!r}")
            if session is not None and len(session) not in (0, 16):
                raise errors.InvalidValue("a session id has 16 bytes")
            here = count_operations(<const uint8_t *>PyBytes_AS_STRING(body), len(body))
            if here < 0:
                raise errors.FrameError("the bytes are no sequence of operations")
            total += here
            job.bytes += len(body)
        made = <Entry *>calloc(count, sizeof(Entry))
        operations = <Operation *>malloc((total + 1) * sizeof(Operation))
        try:
            if made is NULL or operations is NULL:
                raise MemoryError
            for i in range(count):
                kind, body, session, number, argument = entries[i]
                made[i].kind = kind
                made[i].number = number or 0
                made[i].argument = argument or 0
                if session:
                    memcpy(made[i].session, PyBytes_AS_STRING(session), 16)
                made[i].operation_start = used_operations
                data = <const uint8_t *>PyBytes_AS_STRING(body)
                size = len(body)
                at = 0
                while at < size:
                    operation_read(data + at, data + size, &operations[used_operations], &used)
                    operations[used_operations].entry = <uint32_t>i
                    used_operations += 1
                    at += used
                made[i].operation_end = used_operations
            job.operations = operations
            job.operation_count = total
            job.entries = made
            job.entry_count = count
            self.finish(&job)
            result = []
            for i in range(count):
                if made[i].decision == DUPLICATE:
                    if made[i].answer is NULL:
                        raise errors.RequestExpired("the repeated request has no kept answer")
                    answer = PyBytes_FromStringAndSize(<char *>made[i].answer, made[i].answer_bytes)
                else:
                    answer = bytes([operations[k].result
                                    for k in range(made[i].operation_start, made[i].operation_end)])
                result.append((made[i].decision, made[i].first_sequence, made[i].last_sequence,
                               PyBytes_FromStringAndSize(<char *>&made[i].root, 16), answer))
            return result
        finally:
            if made is not NULL:
                for i in range(count):
                    free(made[i].answer)
            free(made)
            free(operations)

    def apply_rows(self, const uint8_t[::1] rows not None, meta not None, bint append_changes, base, target):
        """Put rows of another replica, and meta rows [(database, name, value or None)], in one transaction.

        ``base`` (sequence, root or None) must be where the tablet stands, if given. With ``target``, the state row of
        the source, tombstones up to its purge mark are removed and root and count must be equal at the end.
        """
        cdef Submission job
        cdef Operation *operations = NULL
        cdef MetaRow *made = NULL
        cdef size_t size = rows.shape[0]
        cdef size_t room = size // (ROW_HEADER + 1) + 1
        cdef size_t at = 0
        cdef size_t used = 0
        cdef size_t count = 0
        cdef bint good = True
        cdef Py_ssize_t i
        cdef bytes root
        memset(&job, 0, sizeof(Submission))
        job.mode = MODE_RAW
        job.append_changes = append_changes
        job.bytes = size
        if target is not None:
            load_state(target, &job.target)
            job.check_target = True
        if base is not None:
            sequence, root = base
            job.base.sequence = sequence
            if root is not None:
                if len(root) != 16:
                    raise errors.InvalidValue("a root has 16 bytes")
                memcpy(&job.base.root, PyBytes_AS_STRING(root), 16)
            else:
                job.base.root = self.state.root
            job.check_base = True
        kept = []
        try:
            if size:
                if room > 4096:
                    room = 0
                    while at < size:
                        good = size - at >= ROW_HEADER
                        if not good:
                            break
                        at += row_size_unchecked(&rows[at])
                        room += 1
                    at = 0
                operations = <Operation *>malloc((room + 1) * sizeof(Operation))
                if operations is NULL:
                    raise MemoryError
                while good and at < size:
                    good = count < room and row_read(&rows[at], &rows[0] + size, &operations[count], &used)
                    at += used
                    count += 1
                if not good:
                    raise errors.FrameError(f"row {count} is malformed", ordinal=count)
            made = <MetaRow *>calloc(len(meta) + 1, sizeof(MetaRow))
            if made is NULL:
                raise MemoryError
            i = 0
            for database, name, value in meta:
                if database == DATABASE_META and value is not None:
                    value = with_check(name, value)
                kept.append((name, value))
                made[i].database = database
                made[i].name = <const uint8_t *><char *>name
                made[i].name_bytes = len(name)
                if value is not None:
                    made[i].value = <const uint8_t *><char *>value
                    made[i].value_bytes = len(value)
                i += 1
            job.operations = operations
            job.operation_count = count
            job.rows = made
            job.row_count = len(meta)
            self.finish(&job)
        finally:
            free(operations)
            free(made)

    def repair(self, const uint8_t[::1] rows not None, list removed not None, list meta not None, bint replace_rows, base,
               bytes target not None, actual):
        """Put an authority's rows over whatever stands here and take ``removed`` keys away, in one transaction.

        ``meta``: meta rows of its; with ``replace_rows`` its request and session rows replace all of ours. ``base``: (sequence,
        root) where the tablet must stand. ``target``: the state row of the authority; root and count must be equal at
        the end. ``actual``: (root, count, live count, records with a change entry) as summed from the records, which
        stand in for what the state row carries, or None.
        """
        cdef Submission job
        cdef Operation *operations = NULL
        cdef MetaRow *made = NULL
        cdef size_t size = rows.shape[0]
        cdef size_t at = 0
        cdef size_t used = 0
        cdef size_t count = 0
        cdef size_t room
        cdef Py_ssize_t i
        cdef bytes root
        cdef list kept = []
        memset(&job, 0, sizeof(Submission))
        job.mode = MODE_RAW
        job.repair = True
        job.append_changes = True
        job.bytes = size
        job.check_target = True
        load_state(target, &job.target)
        sequence, root = base
        if len(root) != 16:
            raise errors.InvalidValue("a root has 16 bytes")
        job.check_base = True
        job.base.sequence = sequence
        memcpy(&job.base.root, PyBytes_AS_STRING(root), 16)
        if actual is not None:
            root, job.actual.count, job.actual.live_count, job.actual_entries = actual
            memcpy(&job.actual.root, PyBytes_AS_STRING(root), 16)
            job.check_actual = True
        for key in removed:
            check_key(key)
        try:
            room = len(removed) + check_rows(rows)[0]
            operations = <Operation *>calloc(room + 1, sizeof(Operation))
            made = <MetaRow *>calloc(len(meta) + 1, sizeof(MetaRow))
            if operations is NULL or made is NULL:
                raise MemoryError
            while at < size and count < room:
                row_read(&rows[at], &rows[0] + size, &operations[count], &used)
                at += used
                count += 1
            for key in removed:
                set_operation(&operations[count], REMOVE, key, None)
                count += 1
            i = 0
            for database, name, value in meta:
                if database == DATABASE_META:
                    value = with_check(name, value)
                    kept.append(value)
                made[i].database = database
                made[i].name = <const uint8_t *><char *>name
                made[i].name_bytes = len(name)
                made[i].value = <const uint8_t *><char *>value
                made[i].value_bytes = len(value)
                i += 1
            job.operations = operations
            job.operation_count = count
            job.rows = made
            job.row_count = i
            job.replace_rows = replace_rows
            self.finish(&job)
        finally:
            free(operations)
            free(made)

    def put_meta(self, dict rows not None):
        """Write meta rows durably: {name: value, or None to delete}."""
        cdef Submission job
        cdef MetaRow *made = <MetaRow *>calloc(len(rows) + 1, sizeof(MetaRow))
        cdef Py_ssize_t i = 0
        if made is NULL:
            raise MemoryError
        memset(&job, 0, sizeof(Submission))
        job.mode = MODE_META
        kept = []
        try:
            for name, value in rows.items():
                if value is not None:
                    value = with_check(name, value)
                kept.append((name, value))
                made[i].database = DATABASE_META
                made[i].name = <const uint8_t *><char *>name
                made[i].name_bytes = len(name)
                if value is not None:
                    made[i].value = <const uint8_t *><char *>value
                    made[i].value_bytes = len(value)
                i += 1
            job.rows = made
            job.row_count = i
            self.finish(&job)
        finally:
            free(made)

    def adopt_seed(self, bytes seed not None):
        """Take over another tablet's seed, durably; only while nothing was ever written. See `Tablet.adopt_seed`."""
        if len(seed) != 8:
            raise errors.InvalidValue("a seed has 8 bytes")
        if self.state.sequence or self.state.count:
            raise errors.Conflict("only an empty tablet can take over a seed", sequence=self.state.sequence)
        self.put_meta({b"seed": seed})
        memcpy(&self.seed, PyBytes_AS_STRING(seed), 8)

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


cdef inline size_t row_size_unchecked(const uint8_t *row) noexcept nogil:
    cdef uint16_t key_bytes
    cdef uint32_t value_bytes
    memcpy(&key_bytes, row + 2, 2)
    memcpy(&value_bytes, row + 4, 4)
    return ROW_HEADER + <size_t>key_bytes + 16 * <size_t>row[1] + value_bytes


def with_check(bytes name not None, bytes value not None):
    """Return a meta row as stored: the value and the low half of XXH3-64 of name and value."""
    cdef bytes joined = name + value
    cdef uint32_t check = <uint32_t>XXH3_64bits(PyBytes_AS_STRING(joined), len(joined))
    return value + PyBytes_FromStringAndSize(<char *>&check, 4)


def check_row(bytes name not None, bytes stored not None):
    """Return the value of a stored meta row; raises CorruptionError if its check fails."""
    if len(stored) < 4 or with_check(name, stored[: len(stored) - 4]) != stored:
        raise errors.CorruptionError(f"meta row {name!r} is damaged", what="meta row")
    return stored[: len(stored) - 4]


include "tablet_reader.pxi"

if sr_process_setup() != 0:
    raise OSError("the SIGBUS handler cannot be installed")
