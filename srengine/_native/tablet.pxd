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
    bint repair                  # RAW: the rows are an authority's: they replace whatever stands here
    bint replace_rows            # repair: request and session rows, too
    bint check_actual            # repair: `actual` was summed from the records and stands in for the carried state
    State actual
    uint64_t actual_entries      # records that have a change entry
    State base
    State target
    Failure failure
    bint done                    # guarded by `lock`, as is `promoted`
    bint promoted                # it is its caller's turn to write
    pthread_mutex_t lock
    pthread_cond_t woken
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

cdef struct Notes:               # bytes of notes, see ext/tablet_track.pxi
    uint8_t *data
    size_t used
    size_t room

cdef struct Range:               # which records a walk visits
    const uint8_t *start         # with start_bytes 0: from the first (backward: from the last) record
    const uint8_t *stop
    size_t start_bytes
    size_t stop_bytes
    int64_t *left                # shared by two walks from both ends: records that neither has taken
    bint has_stop
    bint backward
    bint unchecked               # headers are taken as they are: their digests tell, too

ctypedef int (*Visit)(void *context, const uint8_t *key, size_t key_bytes, const Header *header,
                      const Sum *digest) noexcept nogil

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
    cdef pthread_cond_t gathered          # signalled when `expected` falls to 0
    cdef size_t expected                  # of `let_go` by the last commit, so many are not back
    cdef size_t let_go
    cdef uint64_t gather_until_us         # how long it waits for them
    cdef unsigned int gather_pause        # commits that wait for nobody
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
    cdef bint tracked                     # the writer notes what it changes
    cdef bint pending_lost                # writer's own: the running transaction's notes do not fit
    cdef Notes pending                    # writer's own: notes of the running transaction
    cdef Notes noted                      # published, not yet taken
    cdef uint64_t noted_txn               # number of the latest published transaction
    cdef uint64_t lost_txn                # a cache of an earlier transaction than this cannot be brought up to date
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

cdef class Reader:
    cdef readonly Environment environment
    cdef ReaderLink *link
    cdef State state
    cdef MDB_txn *begin(self) except NULL
    cdef void end(self) noexcept

cdef void notes_free(Notes *notes) noexcept nogil
cdef void track(Environment env, bint on) noexcept nogil
cdef int take_notes(Environment env, uint64_t txn, Notes *out, uint64_t *lost) noexcept nogil
cdef uint64_t txn_number(Reader reader) noexcept nogil
cdef int64_t record_count(Environment env, MDB_txn *txn) noexcept nogil
cdef int walk_records(Environment env, MDB_txn *txn, const Range *bounds, Visit visit, void *context,
                      Failure *failure) noexcept nogil
cdef size_t row_size(size_t key_bytes, const Header *header) noexcept nogil
cdef size_t row_copy(uint8_t *out, const uint8_t *key, size_t key_bytes, const Header *header) noexcept nogil
cdef bint row_parse(const uint8_t *cursor, const uint8_t *end, Operation *out, size_t *used) noexcept nogil
cdef int row_is_here(Environment env, MDB_txn *txn, const Operation *row) noexcept nogil
cdef bint value_is_whole(const Header *header) noexcept nogil
cdef inline bint keeps_change_entry(const State *state, const Header *header) noexcept nogil:
    """Whether a record has a live entry in the change log: a tombstone, or above the log's floor."""
    return header.flags & 1 or header.sequence > state.log_floor

cdef int raise_walk(Environment env, Failure *failure) except -1
cdef Sum rows_digest(Environment env, MDB_txn *txn, const State *state, Failure *failure) noexcept nogil
