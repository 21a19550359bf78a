# Tracking: what each transaction changed, kept for a cache that stands beside the tablet (the Merkle tree's leaves).
#
# While `Environment.tracked` is on, the writer notes for each key that its transaction changed the record's digest before
# and after. When the transaction is durable its notes are published in the same instant as the new state, under
# queue_lock, as one group under the transaction's number:
#
#   group   u64 transaction number | u64 bytes that follow | notes
#   note    16 digest before | 16 digest after | u16 key bytes | u8 was there | u8 is there | 4 zero | key, padded to 8
#
# A reader of transaction T is brought up to date by exactly the groups up to T, whatever commits meanwhile. The buffer is
# bounded: when it overflows everything noted is dropped and `lost_txn` says that no cache from before it can go on.
# Writers never wait for any of it.

cdef enum:
    NOTES_BYTES_MAX = 33554432
    NOTE_HEADER = 40
    NOTE_GROUP = 16


cdef bint notes_reserve(Notes *notes, size_t more) noexcept nogil:
    cdef size_t room = notes.room if notes.room else 4096
    cdef uint8_t *data
    if notes.used + more > NOTES_BYTES_MAX:
        return False
    while room < notes.used + more:
        room *= 2
    if room != notes.room:
        data = <uint8_t *>realloc(notes.data, room)
        if data is NULL:
            return False
        notes.data = data
        notes.room = room
    return True


cdef void notes_free(Notes *notes) noexcept nogil:
    free(notes.data)
    memset(notes, 0, sizeof(Notes))


cdef void note(Environment env, Work *work, const uint8_t *key, size_t key_bytes, const Sum *before,
               const Sum *after) noexcept nogil:
    """Note one key's change in the writer's own buffer; ``before`` or ``after`` NULL: there was or is no record."""
    cdef size_t size = NOTE_HEADER + ((key_bytes + 7) & ~<size_t>7)
    cdef uint8_t *out
    cdef uint16_t short_bytes = <uint16_t>key_bytes
    if env.pending_lost:
        return
    if env.pending.used == 0:
        if not notes_reserve(&env.pending, NOTE_GROUP):
            env.pending_lost = True
            return
        env.pending.used = NOTE_GROUP
    if not notes_reserve(&env.pending, size):
        env.pending_lost = True
        return
    out = env.pending.data + env.pending.used
    memset(out, 0, size)
    if before is not NULL:
        memcpy(out, before, 16)
        out[34] = 1
    if after is not NULL:
        memcpy(out + 16, after, 16)
        out[35] = 1
    memcpy(out + 32, &short_bytes, 2)
    memcpy(out + NOTE_HEADER, key, key_bytes)
    env.pending.used += size


cdef void publish_notes(Environment env, const Work *work, uint64_t txn) noexcept nogil:
    """Publish the writer's notes; the caller holds queue_lock and the transaction is durable."""
    cdef Notes swap
    cdef uint64_t size
    env.noted_txn = txn
    if not env.tracked:
        return
    if not work.tracked or env.pending_lost:
        env.noted.used = 0
        env.lost_txn = txn
        return
    if env.pending.used <= NOTE_GROUP:
        return
    size = env.pending.used - NOTE_GROUP
    memcpy(env.pending.data, &txn, 8)
    memcpy(env.pending.data + 8, &size, 8)
    if env.noted.used == 0:
        swap = env.noted
        env.noted = env.pending
        env.pending = swap
    elif notes_reserve(&env.noted, env.pending.used):
        memcpy(env.noted.data + env.noted.used, env.pending.data, env.pending.used)
        env.noted.used += env.pending.used
    else:
        env.noted.used = 0
        env.lost_txn = txn
    env.pending.used = 0


cdef void track(Environment env, bint on) noexcept nogil:
    """Turn tracking on or off. One cache at a time: whoever turns it on takes all notes."""
    pthread_mutex_lock(&env.queue_lock)
    env.tracked = on
    env.noted.used = 0
    if not on:
        notes_free(&env.noted)
    pthread_mutex_unlock(&env.queue_lock)


cdef int take_notes(Environment env, uint64_t txn, Notes *out, uint64_t *lost) noexcept nogil:
    """Move the groups up to transaction ``txn`` to ``out`` (emptied first). 0; 1: not published yet; 2: no memory."""
    cdef Notes swap
    cdef size_t at = 0
    cdef uint64_t number, size
    cdef int rc = 0
    out.used = 0
    pthread_mutex_lock(&env.queue_lock)
    lost[0] = env.lost_txn
    if env.noted_txn < txn:
        rc = 1
    elif env.noted_txn == txn:
        swap = out[0]
        out[0] = env.noted
        env.noted = swap
    else:
        while at < env.noted.used:
            memcpy(&number, env.noted.data + at, 8)
            memcpy(&size, env.noted.data + at + 8, 8)
            if number > txn:
                break
            at += NOTE_GROUP + size
        if at:
            if notes_reserve(out, at):
                memcpy(out.data, env.noted.data, at)
                out.used = at
                memmove(env.noted.data, env.noted.data + at, env.noted.used - at)
                env.noted.used -= at
            else:
                rc = 2
    pthread_mutex_unlock(&env.queue_lock)
    return rc


# --- walking for other kernels -------------------------------------------------------------------------------------------

cdef uint64_t txn_number(Reader reader) noexcept nogil:
    """Number of the transaction that the reader sees; the reader is inside a call."""
    return mdb_txn_id(reader.link.txn)


cdef int64_t record_count(Environment env, MDB_txn *txn) noexcept nogil:
    cdef MDB_stat stat
    if mdb_stat(txn, env.records, &stat) != 0:
        return -1
    return <int64_t>stat.ms_entries


cdef extern from * nogil:
    """
    /* Leaf pages of LMDB 0.9, as srengine/storage/pages.py reads them, too: u64 number, u16 pad, u16 flags (2: a leaf),
       u16 lower, u16 upper, then u16 offsets of the nodes in key order; a node is u16 low, u16 high of the value's size,
       u16 flags (1: the value is elsewhere), u16 key size, key, value. */
    static inline const uint8_t *sr_page_of(const void *inside, size_t page_bytes) {
        return (const uint8_t *)((size_t)inside & ~(page_bytes - 1));
    }
    static inline int sr_leaf_count(const uint8_t *page, size_t page_bytes) {
        uint16_t flags, lower;
        memcpy(&flags, page + 10, 2);
        memcpy(&lower, page + 12, 2);
        return flags != 2 || lower < 16 || lower > page_bytes ? 0 : (lower - 16) >> 1;
    }
    /* 1: key and value; 2: the key alone, the value is elsewhere; 0: no node that this can read. */
    static inline int sr_leaf_node(const uint8_t *page, size_t page_bytes, int at, MDB_val *key, MDB_val *data) {
        uint16_t offset, node[4];
        memcpy(&offset, page + 16 + 2 * at, 2);
        if (offset < 16 || (size_t)offset + 8 > page_bytes) return 0;
        memcpy(node, page + offset, 8);
        size_t room = page_bytes - offset - 8, size = node[0] | (size_t)node[1] << 16;
        if (node[2] > 1 || node[3] > room || (node[2] == 0 && size > room - node[3])) return 0;
        key->mv_size = node[3];
        key->mv_data = (void *)(page + offset + 8);
        data->mv_size = size;
        data->mv_data = (void *)(page + offset + 8 + node[3]);
        return node[2] ? 2 : 1;
    }
    /* Ask for the first two lines of a node: key and header of all but long keys. Values are not walked over. */
    static inline void sr_prefetch_node(const uint8_t *page, size_t page_bytes, int at) {
        uint16_t offset;
        memcpy(&offset, page + 16 + 2 * at, 2);
        __builtin_prefetch(page + offset, 0, 3);
        __builtin_prefetch(page + offset + 64, 0, 3);
    }
    /* Its head and the offsets of up to 88 nodes. */
    static inline void sr_prefetch_index(const uint8_t *page) {
        for (int line = 0; line < 192; line += 64) __builtin_prefetch(page + line, 0, 3);
    }
    static inline int sr_leaf_find(const uint8_t *page, size_t page_bytes, int count, const MDB_val *key) {
        for (int at = 0; at < count; at++) {
            uint16_t offset;
            memcpy(&offset, page + 16 + 2 * at, 2);
            if (page + offset + 8 == (const uint8_t *)key->mv_data) return at;
        }
        return -1;
    }
    """
    const uint8_t *sr_page_of(const void *inside, size_t page_bytes)
    int sr_leaf_count(const uint8_t *page, size_t page_bytes)
    int sr_leaf_node(const uint8_t *page, size_t page_bytes, int at, MDB_val *key, MDB_val *data)
    void sr_prefetch_node(const uint8_t *page, size_t page_bytes, int at)
    void sr_prefetch_index(const uint8_t *page)
    int sr_leaf_find(const uint8_t *page, size_t page_bytes, int count, const MDB_val *key)


cdef inline int visit_one(Environment env, const MDB_val *key, const MDB_val *data, Visit visit, void *context,
                          bint unchecked) noexcept nogil:
    cdef const uint8_t *name = <const uint8_t *>key.mv_data
    cdef const uint8_t *record = <const uint8_t *>data.mv_data
    cdef Header header
    cdef Sum digest
    if (header_parse(name, key.mv_size, record, data.mv_size, &header) if unchecked else
            header_read(name, key.mv_size, record, data.mv_size, &header)):
        digest = digest_of(env, <const uint8_t *>key.mv_data, key.mv_size, &header)
        return visit(context, <const uint8_t *>key.mv_data, key.mv_size, &header, &digest)
    return visit(context, <const uint8_t *>key.mv_data, key.mv_size, NULL, NULL)


cdef inline int stand_at(MDB_cursor *cursor, const uint8_t *page, int at, MDB_val *key, MDB_val *data,
                         Failure *failure) noexcept nogil:
    """Move a cursor to a key that its leaf holds. NB: not to find it is damage, never the end of a walk."""
    cdef int rc
    if sr_walk_stand(cursor, page, <unsigned int>at):
        return mdb_cursor_get(cursor, key, data, MDB_GET_CURRENT)
    rc = mdb_cursor_get(cursor, key, data, MDB_SET_KEY)
    return fail(failure, CODE_CORRUPT, b"key order", NULL, 0) if rc == MDB_NOTFOUND else rc


cdef int walk_records(Environment env, MDB_txn *txn, const Range *bounds, Visit visit, void *context,
                      Failure *failure) noexcept nogil:
    """Call ``visit`` for every record of a range, in key order or against it, header checked, digest computed.

    A record whose header is damaged is visited with ``header`` NULL; with ``bounds.unchecked`` it counts for what it is,
    unless it cannot be read at all. ``visit`` ends the walk by a code other than 0.
    With ``bounds.left`` two walks from both ends share the records: each takes a portion at a time until none is left.

    The cursor goes from leaf to leaf; the records of a leaf are read from its page, which costs a tenth of a cursor's
    step. Nodes that this cannot make sense of are left to the cursor, whose errors are the ones that are told.
    """
    cdef MDB_cursor *cursor
    cdef MDB_val key, data
    cdef MDB_stat stat
    cdef const uint8_t *page
    cdef const uint8_t *following = NULL
    cdef const uint8_t *far
    cdef int asked = 0
    cdef const void *stands
    cdef int64_t portion = 0
    cdef int step = -1 if bounds.backward else 1
    cdef int at, count, kind
    cdef bint ended = False
    cdef int rc = mdb_stat(txn, env.records, &stat)
    if rc == 0:
        rc = mdb_cursor_open(txn, env.records, &cursor)
    if rc != 0:
        return fail(failure, rc, b"cursor", NULL, 0)
    if bounds.start_bytes:
        key.mv_data = <void *>bounds.start
        key.mv_size = bounds.start_bytes
        rc = mdb_cursor_get(cursor, &key, &data, MDB_SET_RANGE)
    else:
        rc = mdb_cursor_get(cursor, &key, &data, MDB_LAST if bounds.backward else MDB_FIRST)
    while rc == 0 and not ended:
        page = sr_page_of(key.mv_data, stat.ms_psize)
        while asked and following == page:
            asked -= 1
            sr_prefetch_node(page, stat.ms_psize, asked)
        if following != page:
            sr_prefetch_page(key.mv_data)
        asked = 0
        if not bounds.start_bytes and not bounds.has_stop:
            # Worth its cost where many leaves are walked through, not for the few records between two boundaries.
            following = <const uint8_t *>sr_walk_leaf(cursor, step)
            far = <const uint8_t *>sr_walk_leaf(cursor, 2 * step)
            if following is not NULL:
                asked = sr_leaf_count(following, stat.ms_psize)
            if far is not NULL:
                sr_prefetch_index(far)
        stands = key.mv_data
        count = sr_leaf_count(page, stat.ms_psize)
        at = sr_leaf_find(page, stat.ms_psize, count, &key)
        while True:
            if bounds.left is not NULL:
                if portion == 0:
                    portion = sr_claim(bounds.left, 2048)
                    if portion <= 0:
                        ended = True
                        break
                portion -= 1
            if key.mv_size > KEY_MAX or key.mv_size == 0:
                rc = fail(failure, CODE_CORRUPT, b"key size", NULL, 0)
                break
            if bounds.has_stop and compare_keys(<const uint8_t *>key.mv_data, key.mv_size, bounds.stop,
                                                bounds.stop_bytes) >= 0:
                ended = True
                break
            if asked:
                asked -= 1
                sr_prefetch_node(following, stat.ms_psize, asked)
            rc = visit_one(env, &key, &data, visit, context, bounds.unchecked)
            if rc != 0:
                fail(failure, rc, b"walk", NULL, 0)
                break
            if at < 0:
                break
            at += step
            if at < 0 or at >= count:
                break
            kind = sr_leaf_node(page, stat.ms_psize, at, &key, &data)
            if kind == 2:
                stands = key.mv_data
                rc = stand_at(cursor, page, at, &key, &data, failure)
            if kind == 0 or rc != 0:
                break
        if rc == 0 and not ended:
            if key.mv_data != stands:
                rc = stand_at(cursor, page, at - step, &key, &data, failure)
            if rc == 0:
                rc = mdb_cursor_get(cursor, &key, &data, MDB_PREV if bounds.backward else MDB_NEXT)
    mdb_cursor_close(cursor)
    if rc == MDB_NOTFOUND:
        rc = 0
    if rc != 0 and failure.code == 0:
        fail(failure, rc, b"walk", NULL, 0)
    return rc


cdef size_t row_size(size_t key_bytes, const Header *header) noexcept nogil:
    return row_bytes(key_bytes, header)


cdef size_t row_copy(uint8_t *out, const uint8_t *key, size_t key_bytes, const Header *header) noexcept nogil:
    return row_write(out, key, key_bytes, header)


cdef bint row_parse(const uint8_t *cursor, const uint8_t *end, Operation *out, size_t *used) noexcept nogil:
    return row_read(cursor, end, out, used)


cdef int row_is_here(Environment env, MDB_txn *txn, const Operation *row) noexcept nogil:
    """1: the record that stands here has the row's digest; 0: it has not, or there is none; else an LMDB code."""
    cdef MDB_val key, data
    cdef Header header
    cdef Sum here, there
    cdef int rc
    key.mv_data = <void *>row.key
    key.mv_size = row.key_bytes
    rc = mdb_get(txn, env.records, &key, &data)
    if rc == MDB_NOTFOUND:
        return 0
    if rc != 0:
        return rc if rc != 1 else EIO
    if not header_read(row.key, row.key_bytes, <const uint8_t *>data.mv_data, data.mv_size, &header):
        return 0
    here = digest_of(env, row.key, row.key_bytes, &header)
    there = record_digest(env.seed, row.key, row.key_bytes, row.flags, row.version_count, row.versions, row.sequence,
                          row.hybrid_clock, content_checksum(row.value, row.value_bytes, row.flags))
    return 1 if sum_equal(&here, &there) else 0


cdef bint value_is_whole(const Header *header) noexcept nogil:
    return content_checksum(header.value, header.value_bytes, header.flags) == header.checksum


cdef int raise_walk(Environment env, Failure *failure) except -1:
    return raise_failure(env, failure)


# --- repair --------------------------------------------------------------------------------------------------------------

cdef int remove_record(Environment env, Work *work, Operation *operation) noexcept nogil:
    """Take a record away that the authority does not have; its change entry is dead from then on."""
    cdef MDB_val key, data
    cdef Header old
    cdef Sum digest
    cdef int rc
    key.mv_data = <void *>operation.key
    key.mv_size = operation.key_bytes
    operation.result = NOTHING_TO_DO
    rc = mdb_cursor_get(work.records, &key, &data, MDB_SET_KEY)
    if rc == MDB_NOTFOUND:
        return 0
    if rc != 0:
        return fail(work.failure, rc, b"look up", operation.key, operation.key_bytes)
    if header_read(operation.key, operation.key_bytes, <const uint8_t *>data.mv_data, data.mv_size, &old):
        digest = digest_of(env, operation.key, operation.key_bytes, &old)
        sum_sub(&work.total, &digest)
        if has_change_entry(&work.state, &old):
            work.entries -= 1
        if not old.flags & TOMBSTONE:
            work.state.live_count -= 1
        work.state.count -= 1
        if work.tracked:
            note(env, work, operation.key, operation.key_bytes, &digest, NULL)
    rc = mdb_cursor_del(work.records, 0)
    if rc != 0:
        return fail(work.failure, rc, b"remove", operation.key, operation.key_bytes)
    operation.result = APPLIED
    return 0


cdef int repair_changes(Environment env, Work *work, const Operation *operations, size_t count,
                        uint64_t target) noexcept nogil:
    """Bring the change log in line with repaired records: their entries, and none past the target's sequence.

    An entry that is replaced was dead: no two records of the authority share a sequence, and whatever stood here under
    that sequence is repaired in this transaction. How many are dead is counted afterwards (`settle_dead`).
    """
    cdef MDB_val key, data
    cdef uint64_t sequence = target + 1
    cdef size_t i
    cdef int rc
    for i in range(count):
        if not operations[i].stored or operations[i].kind != RAW:
            continue
        if not operations[i].flags & TOMBSTONE and operations[i].sequence <= work.state.log_floor:
            continue
        key.mv_data = <void *>&operations[i].sequence
        key.mv_size = 8
        data.mv_data = <void *>operations[i].key
        data.mv_size = operations[i].key_bytes
        rc = mdb_cursor_put(work.changes, &key, &data, 0)
        if rc != 0:
            return fail(work.failure, rc, b"change log", operations[i].key, operations[i].key_bytes)
        work.entries += 1
    key.mv_data = &sequence
    key.mv_size = 8
    rc = mdb_cursor_get(work.changes, &key, &data, MDB_SET_RANGE)
    while rc == 0:
        rc = mdb_cursor_del(work.changes, 0)
        if rc == 0:
            key.mv_data = &sequence
            key.mv_size = 8
            rc = mdb_cursor_get(work.changes, &key, &data, MDB_SET_RANGE)
    return 0 if rc == MDB_NOTFOUND else fail(work.failure, rc, b"change log", NULL, 0)


cdef int settle_dead(Environment env, Work *work) noexcept nogil:
    cdef MDB_stat stat
    cdef int rc = mdb_stat(work.txn, env.changes, &stat)
    if rc != 0:
        return fail(work.failure, rc, b"change log", NULL, 0)
    work.state.dead = stat.ms_entries - work.entries if stat.ms_entries > work.entries else 0
    return 0


cdef int drop_rows(Environment env, Work *work, MDB_dbi database, uint8_t domain) noexcept nogil:
    """Remove all request or session rows; the authority's take their place."""
    cdef MDB_cursor *cursor
    cdef MDB_val key, data
    cdef Sum digest
    cdef int rc = mdb_cursor_open(work.txn, database, &cursor)
    if rc != 0:
        return fail(work.failure, rc, b"rows", NULL, 0)
    rc = mdb_cursor_get(cursor, &key, &data, MDB_FIRST)
    while rc == 0:
        if data.mv_size < 5:
            rc = CODE_CORRUPT
            break
        digest = row_digest(env.seed, domain, <const uint8_t *>key.mv_data, key.mv_size,
                            <const uint8_t *>data.mv_data, data.mv_size - 4)
        sum_sub(&work.total, &digest)
        rc = mdb_cursor_del(cursor, 0)
        if rc == 0:
            rc = mdb_cursor_get(cursor, &key, &data, MDB_FIRST)
    mdb_cursor_close(cursor)
    return 0 if rc == MDB_NOTFOUND else fail(work.failure, rc, b"rows", NULL, 0)


cdef int settle_purge_mark(Environment env, Work *work, uint64_t mark) noexcept nogil:
    """Take over a purge mark below this tablet's; a higher one is taken over by `purge`."""
    cdef Sum digest
    cdef uint64_t image = work.state.purge_mark
    if mark >= image:
        return 0
    digest = row_digest(env.seed, DOMAIN_META, b"purge", 5, <const uint8_t *>&image, 8)
    sum_sub(&work.total, &digest)
    if mark:
        digest = row_digest(env.seed, DOMAIN_META, b"purge", 5, <const uint8_t *>&mark, 8)
        sum_add(&work.total, &digest)
    work.state.purge_mark = mark
    return 0


cdef Sum rows_digest(Environment env, MDB_txn *txn, const State *state, Failure *failure) noexcept nogil:
    """Sum of the digests of all deterministic rows: the root without its records."""
    cdef MDB_cursor *cursor
    cdef MDB_val key, data
    cdef Sum total, digest
    cdef uint64_t image
    cdef int rc = 0
    cdef int i
    total.low = total.high = 0
    for i in range(2):
        rc = mdb_cursor_open(txn, env.sessions if i else env.requests, &cursor)
        if rc != 0:
            fail(failure, rc, b"rows", NULL, 0)
            return total
        rc = mdb_cursor_get(cursor, &key, &data, MDB_FIRST)
        while rc == 0 and data.mv_size > 4:
            digest = row_digest(env.seed, DOMAIN_SESSION if i else DOMAIN_REQUEST, <const uint8_t *>key.mv_data,
                                key.mv_size, <const uint8_t *>data.mv_data, data.mv_size - 4)
            sum_add(&total, &digest)
            rc = mdb_cursor_get(cursor, &key, &data, MDB_NEXT)
        mdb_cursor_close(cursor)
        if rc != MDB_NOTFOUND:
            fail(failure, rc if rc else CODE_CORRUPT, b"rows", NULL, 0)
            return total
    if state.purge_mark:
        image = state.purge_mark
        digest = row_digest(env.seed, DOMAIN_META, b"purge", 5, <const uint8_t *>&image, 8)
        sum_add(&total, &digest)
    return total
