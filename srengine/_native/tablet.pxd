# Header of the tablet kernel: its structures, for the kernel itself and for kernels that stand on it.
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from srengine._native.lmdb cimport MDB_dbi, MDB_env, MDB_txn, MDB_val

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass

cdef struct Sum:                 # an element of the additive group modulo 2^128
    uint64_t low
    uint64_t high

cdef struct Header:              # a record's header, decoded
    const uint8_t *value
    const uint8_t *versions
    uint64_t sequence
    uint64_t hybrid_clock
    uint64_t checksum            # XXH3-64 of the value, seeded with the flags
    size_t value_bytes
    uint32_t version_count
    uint8_t flags

cdef struct Operation:
    const uint8_t *key
    const uint8_t *value
    const uint8_t *versions
    uint64_t sequence            # fixed by the log before anything is sorted
    uint64_t hybrid_clock
    uint64_t expected            # IF_VERSION: the version that must stand
    uint64_t current             # out: the version that stood when the condition was decided (0: none)
    uint32_t value_bytes
    uint32_t entry               # index of its entry in the transaction
    uint16_t key_bytes
    uint8_t kind
    uint8_t condition
    uint8_t flags
    uint8_t version_count
    uint8_t result
    uint8_t stored               # 1: this operation's record is the one in the tree after the transaction

cdef struct Entry:
    uint64_t first_sequence
    uint64_t last_sequence
    uint64_t hybrid_clock
    uint64_t number              # request number; 0: no request id
    uint64_t argument            # PURGE: the new purge mark
    size_t operation_start
    size_t operation_end
    Sum difference               # what the entry adds to the root
    Sum root                     # the root at its end
    uint8_t *answer              # duplicate: the kept answer, malloc'ed
    size_t answer_bytes
    uint8_t session[16]
    uint8_t kind
    uint8_t decision             # RUN, DUPLICATE, REFUSED

cdef struct State:               # the tablet's row "state", one a transaction; its image is in docs/formats.md
    uint64_t format
    uint64_t applied_index
    uint64_t applied_term
    uint64_t sequence
    Sum root
    uint64_t count               # records, tombstones included
    uint64_t live_count          # records that are no tombstones
    uint64_t hybrid_clock
    uint64_t purge_mark
    uint64_t log_floor           # records at or below it have no change entry unless they are tombstones
    uint64_t dead                # change entries that no record points back to
    uint64_t sweep               # sequence up to which the current sweep for dead entries came
    uint64_t check

cdef struct MetaRow:
    const uint8_t *name
    const uint8_t *value
    size_t name_bytes
    size_t value_bytes           # NB: with value NULL the row is deleted
    uint8_t database

cdef struct Failure:             # what went wrong inside a nogil section
    int code                     # an LMDB code, an errno, or one of ours
    uint8_t key[512]
    uint16_t key_bytes
    const char *what

cdef struct Submission:          # one caller's work for the writer
    Operation *operations
    size_t operation_count
    Entry *entries
    size_t entry_count
    MetaRow *rows
    size_t row_count
    size_t bytes
    int mode
    bint append_changes          # RAW: write change entries
    bint check_base
    bint check_target
    State base
    State target
    Failure failure
    bint done
    bint promoted
    pthread_cond_t wake
    Submission *next

cdef struct ReaderLink:          # a pinned reader in its environment's list; guarded by queue_lock
    MDB_txn *txn                 # NULL once closed or expired
    uint64_t opened_ms
    uint64_t ms_max
    bint busy                    # a call is inside it: it cannot be expired now
    bint is_expired
    bint is_closed
    ReaderLink *previous
    ReaderLink *following

cdef class Environment:
    cdef MDB_env *env
    cdef MDB_dbi records, changes, meta, requests, sessions
    cdef MDB_txn *get_txn                 # reset between gets; used under map_lock only
    cdef pthread_mutex_t map_lock         # held by a short read, and while the map moves
    cdef pthread_mutex_t queue_lock       # everything below
    cdef pthread_cond_t unpinned          # signalled when `pinned` falls
    cdef Submission *queue_head
    cdef Submission *queue_tail
    cdef bint writer_active
    cdef bint growing                     # a writer waits for the pinned readers to go: no new ones
    cdef int pinned                       # readers whose transaction is open
    cdef ReaderLink *readers              # pinned readers, newest first
    cdef State state
    cdef uint64_t seed
    cdef uint64_t view_ms_max
    cdef size_t map_bytes
    cdef uint64_t generation
    cdef int fence                        # 0, or the errno that fenced the tablet
    cdef bint disk_full
    cdef bint is_closed
    cdef bint digests
    cdef bint writable
    cdef uint64_t commits
    cdef uint64_t grown
    cdef uint64_t expired
    cdef uint64_t *ring_sequences
    cdef Sum *ring_roots
    cdef size_t ring_start, ring_count
    cdef char marker[4096]
    cdef readonly bytes path
    cdef int check_not_forked(self) except -1
    cdef int check_usable(self) except -1
    cdef int open_database(self, MDB_txn *txn, bytes name, unsigned int flags) noexcept
    cdef void abandon(self) noexcept
    cdef void shut(self) noexcept
    cdef int find(self, object key, MDB_val *data, Header *header) except -1
    cdef int enter(self) except -1
    cdef void leave(self) noexcept
    cdef int finish(self, Submission *job) except -1
    cdef tuple one(self, Operation *operation)
    cdef uint64_t many(self, Operation *operations, Py_ssize_t count) except? 0

cdef class Reader:
    cdef readonly Environment environment
    cdef ReaderLink *link
    cdef State state
    cdef MDB_txn *begin(self) except NULL
    cdef void end(self) noexcept
