# Apply: a group of entries, or raw rows of another replica, in one transaction, one fsync, all or nothing.
#
# The outcome depends on the entries and the tablet's own rows alone, and not on how entries are grouped:
#
# * sequences are fixed before anything is sorted; an operation keeps its own even when it changes nothing;
# * conditions are decided for each key in sequence order, against what stands after the operations before;
# * only the last effective operation on a key is written, but every one counts for the root at its entry's end:
#   differences are summed for each entry, then prefix-added, so that sorting by key does not matter;
# * request answers and sessions are rows of the tablet, decided in entry order before the records.

cdef enum:
    PUT = 0
    DELETE = 1
    RAW = 2
    REMOVE = 3                   # repair only: the record goes, without a tombstone
    CONDITION_NONE = 0
    IF_ABSENT = 1
    IF_VERSION = 2
    IF_PRESENT = 3
    APPLIED = 0
    CONDITION_FAILED = 1
    NOTHING_TO_DO = 2
    BATCH = 1
    OPEN_SESSION = 2
    PURGE = 3
    RUN = 0
    DUPLICATE = 1
    REFUSED = 2
    MODE_ENTRIES = 0
    MODE_RAW = 1
    MODE_META = 2
    CODE_CORRUPT = -40001
    CODE_ROOT_MISMATCH = -40002
    CODE_BASE_MISMATCH = -40003
    CODE_NO_MEMORY = -40004
    CODE_ROWS_MALFORMED = -40005
    CODE_CLOSED = -40006
    DATABASE_META = 0
    DATABASE_REQUESTS = 1
    DATABASE_SESSIONS = 2
    SESSION_ROW = 40
    SESSIONS_LIMIT = 1024
    REQUESTS_LIMIT = 4096
    SWEEP_SLACK = 1024
    ANSWER_UNIFORM = 0
    ANSWER_RAW = 1


cdef struct SessionRow:
    uint64_t opened              # sequence of the entry that opened it
    uint64_t last_number         # highest request number seen
    uint64_t touched             # sequence of its latest request: the least recently touched session is evicted first
    uint64_t changed             # sequence of the latest change of this row: a delta ships rows changed since
    uint64_t evicted             # highest request number whose answer was evicted: at or below it nothing is executed


cdef struct Work:
    MDB_txn *txn
    MDB_cursor *records
    MDB_cursor *changes
    State state
    Sum total                    # difference of raw rows
    bint appending               # every further key is beyond the last record
    bint has_last
    uint8_t last_key[KEY_MAX]
    size_t last_key_bytes
    Failure *failure
    bint append_changes
    bint repair
    bint tracked                 # note what changes
    uint64_t entries             # repair: records that have a change entry


cdef inline int fail(Failure *failure, int code, const char *what, const uint8_t *key, size_t key_bytes) noexcept nogil:
    failure.code = code
    failure.what = what
    failure.key_bytes = <uint16_t>(key_bytes if key_bytes <= KEY_MAX else KEY_MAX)
    if key_bytes:
        memcpy(failure.key, key, failure.key_bytes)
    return code


cdef inline bint has_change_entry(const State *state, const Header *header) noexcept nogil:
    return keeps_change_entry(state, header)


cdef inline Sum digest_of(Environment env, const uint8_t *key, size_t key_bytes, const Header *header) noexcept nogil:
    return record_digest(env.seed, key, key_bytes, header.flags, header.version_count, header.versions,
                         header.sequence, header.hybrid_clock, header.checksum)


cdef int store(Environment env, Work *work, Operation *operation, uint8_t flags, uint64_t checksum, Header *old,
               bint known_present, Sum *difference, bint account) noexcept nogil:
    """Write one record; account for what it replaces. ``old`` is filled when there was a record.

    With ``known_present`` the records cursor stands on the old record, whose header is in ``old`` already.
    """
    cdef uint8_t header[HEADER_FIXED + 16 * VERSIONS_MAX + 4]
    cdef size_t header_bytes
    cdef MDB_val key, data
    cdef Sum digest, before
    cdef int rc
    cdef unsigned int put_flags
    cdef bint replaced = known_present
    cdef bint legible = True
    if known_present and work.tracked:
        before = digest_of(env, operation.key, operation.key_bytes, old)
    header_bytes = header_write(header, operation.key, operation.key_bytes, flags, operation.version_count,
                                operation.versions, operation.sequence, operation.hybrid_clock, checksum)
    key.mv_data = <void *>operation.key
    key.mv_size = operation.key_bytes
    if not known_present:
        data.mv_size = header_bytes + operation.value_bytes
        data.mv_data = NULL
        put_flags = MDB_NOOVERWRITE | MDB_RESERVE
        if not work.appending and work.has_last:
            work.appending = compare_keys(operation.key, operation.key_bytes, work.last_key, work.last_key_bytes) > 0
        if work.appending:
            put_flags |= MDB_APPEND
        rc = mdb_cursor_put(work.records, &key, &data, put_flags)
        if rc == MDB_KEYEXIST:
            legible = header_read(operation.key, operation.key_bytes, <const uint8_t *>data.mv_data, data.mv_size, old)
            if not legible and not work.repair:
                return fail(work.failure, CODE_CORRUPT, b"record header", operation.key, operation.key_bytes)
            if operation.kind == RAW and not work.repair and old.sequence >= operation.sequence:
                return 0
            if legible and (account or work.tracked) and env.digests:
                before = digest_of(env, operation.key, operation.key_bytes, old)
                if account:
                    sum_sub(difference, &before)
            replaced = True
        elif rc != 0:
            return fail(work.failure, rc, b"put", operation.key, operation.key_bytes)
    if replaced:
        data.mv_size = header_bytes + operation.value_bytes
        data.mv_data = NULL
        rc = mdb_cursor_put(work.records, &key, &data, MDB_CURRENT | MDB_RESERVE)
        if rc != 0:
            return fail(work.failure, rc, b"overwrite", operation.key, operation.key_bytes)
    if replaced and legible:
        if has_change_entry(&work.state, old):
            work.state.dead += 1
            work.entries -= 1
        if old.flags & TOMBSTONE:
            work.state.live_count += 1
    else:
        work.state.count += 1
        work.state.live_count += 1
    if flags & TOMBSTONE:
        work.state.live_count -= 1
    memcpy(data.mv_data, header, header_bytes)
    if operation.value_bytes:
        memcpy(<uint8_t *>data.mv_data + header_bytes, operation.value, operation.value_bytes)
    if (account or work.tracked) and env.digests:
        digest = record_digest(env.seed, operation.key, operation.key_bytes, flags, operation.version_count,
                               operation.versions, operation.sequence, operation.hybrid_clock, checksum)
        if account:
            sum_add(difference, &digest)
        if work.tracked:
            note(env, work, operation.key, operation.key_bytes, &before if replaced and legible else NULL, &digest)
    operation.stored = 1
    return 0


cdef int apply_group(Environment env, Work *work, Operation *operations, Entry *entries, const SortItem *items,
                     size_t count) noexcept nogil:
    """Apply all operations of one transaction on one key, in sequence order."""
    cdef Operation *operation = &operations[items[0].index]
    cdef Operation *final = NULL
    cdef Header old, current
    cdef MDB_val key, data
    cdef Sum digest
    cdef Sum *difference
    cdef uint64_t checksum
    cdef uint64_t final_checksum = 0
    cdef uint8_t final_flags = 0
    cdef bint exists, absent
    cdef bint present_before
    cdef int rc
    cdef size_t i
    if count == 1 and operation.kind == PUT and operation.condition == CONDITION_NONE:
        if entries[operation.entry].decision != RUN:
            operation.result = NOTHING_TO_DO
            return 0
        operation.result = APPLIED
        return store(env, work, operation, 0, content_checksum(operation.value, operation.value_bytes, 0), &old,
                     False, &entries[operation.entry].difference, True)
    if operation.kind == RAW or operation.kind == REMOVE:
        if count != 1:
            return fail(work.failure, CODE_ROWS_MALFORMED, b"a key stands twice", operation.key, operation.key_bytes)
        if operation.kind == REMOVE:
            return remove_record(env, work, operation)
        operation.result = APPLIED
        return store(env, work, operation, operation.flags,
                     content_checksum(operation.value, operation.value_bytes, operation.flags), &old, False,
                     &work.total, True)
    key.mv_data = <void *>operation.key
    key.mv_size = operation.key_bytes
    rc = mdb_cursor_get(work.records, &key, &data, MDB_SET_KEY)
    if rc == 0:
        if not header_read(<const uint8_t *>key.mv_data, key.mv_size, <const uint8_t *>data.mv_data, data.mv_size, &old):
            return fail(work.failure, CODE_CORRUPT, b"record header", operation.key, operation.key_bytes)
        present_before = True
        current = old
    elif rc == MDB_NOTFOUND:
        present_before = False
    else:
        return fail(work.failure, rc, b"look up", operation.key, operation.key_bytes)
    exists = present_before
    for i in range(count):
        operation = &operations[items[i].index]
        if entries[operation.entry].decision != RUN:
            operation.result = NOTHING_TO_DO
            continue
        difference = &entries[operation.entry].difference
        absent = not exists or current.flags & TOMBSTONE
        operation.current = 0 if absent else current.sequence
        if (operation.condition == IF_ABSENT and not absent) or (operation.condition == IF_PRESENT and absent) \
                or (operation.condition == IF_VERSION and (absent or current.sequence != operation.expected)):
            operation.result = CONDITION_FAILED
            continue
        if operation.kind == DELETE and absent:
            operation.result = NOTHING_TO_DO
            continue
        operation.result = APPLIED
        if exists and env.digests:
            digest = digest_of(env, operation.key, operation.key_bytes, &current)
            sum_sub(difference, &digest)
        current.flags = TOMBSTONE if operation.kind == DELETE else 0
        if operation.kind == DELETE:
            operation.value_bytes = 0
        current.checksum = content_checksum(operation.value, operation.value_bytes, current.flags)
        current.version_count = 0
        current.versions = NULL
        current.sequence = operation.sequence
        current.hybrid_clock = operation.hybrid_clock
        exists = True
        if env.digests:
            digest = digest_of(env, operation.key, operation.key_bytes, &current)
            sum_add(difference, &digest)
        final = operation
        final_flags = current.flags
        final_checksum = current.checksum
    if final is NULL:
        return 0
    # The digests are accounted for above, one by one; only the record itself is left to write.
    return store(env, work, final, final_flags, final_checksum, &old, present_before,
                 &work.total, False)


# --- sessions and requests ---------------------------------------------------------------------------------------------

cdef int session_put(Environment env, Work *work, const uint8_t *session, SessionRow *row, Sum *difference) noexcept nogil:
    """Write a session's row and adjust the root for what it replaces."""
    cdef MDB_val key, data
    cdef uint8_t image[SESSION_ROW + 4]
    cdef uint32_t check
    cdef Sum digest
    cdef int rc
    key.mv_data = <void *>session
    key.mv_size = 16
    rc = mdb_get(work.txn, env.sessions, &key, &data)
    if rc == 0:
        digest = row_digest(env.seed, DOMAIN_SESSION, session, 16, <const uint8_t *>data.mv_data, SESSION_ROW)
        sum_sub(difference, &digest)
    elif rc != MDB_NOTFOUND:
        return fail(work.failure, rc, b"session", session, 16)
    memcpy(image, row, SESSION_ROW)
    check = header_check(session, 16, NULL, 0) ^ <uint32_t>XXH3_64bits(image, SESSION_ROW)
    memcpy(image + SESSION_ROW, &check, 4)
    digest = row_digest(env.seed, DOMAIN_SESSION, session, 16, image, SESSION_ROW)
    sum_add(difference, &digest)
    data.mv_data = image
    data.mv_size = SESSION_ROW + 4
    rc = mdb_put(work.txn, env.sessions, &key, &data, 0)
    return 0 if rc == 0 else fail(work.failure, rc, b"session", session, 16)


cdef int session_get(Environment env, MDB_txn *txn, const uint8_t *session, SessionRow *row, Failure *failure) noexcept nogil:
    cdef MDB_val key, data
    cdef uint32_t check
    cdef int rc
    key.mv_data = <void *>session
    key.mv_size = 16
    rc = mdb_get(txn, env.sessions, &key, &data)
    if rc == MDB_NOTFOUND:
        return rc
    if rc != 0:
        return fail(failure, rc, b"session", session, 16)
    if data.mv_size != SESSION_ROW + 4:
        return fail(failure, CODE_CORRUPT, b"session row", session, 16)
    memcpy(&check, <uint8_t *>data.mv_data + SESSION_ROW, 4)
    if check != (header_check(session, 16, NULL, 0) ^ <uint32_t>XXH3_64bits(data.mv_data, SESSION_ROW)):
        return fail(failure, CODE_CORRUPT, b"session row", session, 16)
    memcpy(row, data.mv_data, SESSION_ROW)
    return 0


cdef int evict_session(Environment env, Work *work, Sum *difference) noexcept nogil:
    """Drop the least recently touched session when there are too many."""
    cdef MDB_stat stat
    cdef MDB_cursor *cursor
    cdef MDB_val key, data
    cdef SessionRow row
    cdef uint64_t lowest = <uint64_t>-1
    cdef uint8_t victim[16]
    cdef Sum digest
    cdef int rc
    while True:
        rc = mdb_stat(work.txn, env.sessions, &stat)
        if rc != 0:
            return fail(work.failure, rc, b"session", NULL, 0)
        if stat.ms_entries <= SESSIONS_LIMIT:
            return 0
        rc = mdb_cursor_open(work.txn, env.sessions, &cursor)
        if rc != 0:
            return fail(work.failure, rc, b"session", NULL, 0)
        lowest = <uint64_t>-1
        rc = mdb_cursor_get(cursor, &key, &data, MDB_FIRST)
        while rc == 0:
            if data.mv_size != SESSION_ROW + 4 or key.mv_size != 16:
                mdb_cursor_close(cursor)
                return fail(work.failure, CODE_CORRUPT, b"session row", NULL, 0)
            memcpy(&row, data.mv_data, SESSION_ROW)
            if row.touched < lowest:
                lowest = row.touched
                memcpy(victim, key.mv_data, 16)
            rc = mdb_cursor_get(cursor, &key, &data, MDB_NEXT)
        mdb_cursor_close(cursor)
        if rc != MDB_NOTFOUND:
            return fail(work.failure, rc, b"session", NULL, 0)
        key.mv_data = victim
        key.mv_size = 16
        rc = mdb_get(work.txn, env.sessions, &key, &data)
        if rc == 0:
            digest = row_digest(env.seed, DOMAIN_SESSION, victim, 16, <const uint8_t *>data.mv_data, SESSION_ROW)
            sum_sub(difference, &digest)
            rc = mdb_del(work.txn, env.sessions, &key, NULL)
        if rc != 0:
            return fail(work.failure, rc, b"session", victim, 16)


cdef int find_answer(Environment env, Work *work, Entry *entry) noexcept nogil:
    """Look for the kept answer of a repeated request, newest first; MDB_NOTFOUND when there is none."""
    cdef MDB_cursor *cursor
    cdef MDB_val key, data
    cdef uint64_t number
    cdef int rc = mdb_cursor_open(work.txn, env.requests, &cursor)
    if rc != 0:
        return fail(work.failure, rc, b"request", NULL, 0)
    rc = mdb_cursor_get(cursor, &key, &data, MDB_LAST)
    while rc == 0:
        if data.mv_size < 32:
            mdb_cursor_close(cursor)
            return fail(work.failure, CODE_CORRUPT, b"request row", NULL, 0)
        memcpy(&number, <uint8_t *>data.mv_data + 16, 8)
        if number == entry.number and memcmp(data.mv_data, entry.session, 16) == 0:
            entry.answer = <uint8_t *>malloc(data.mv_size - 4)
            if entry.answer is NULL:
                rc = fail(work.failure, CODE_NO_MEMORY, b"request", NULL, 0)
            else:
                memcpy(entry.answer, data.mv_data, data.mv_size - 4)
                entry.answer_bytes = data.mv_size - 4
            break
        rc = mdb_cursor_get(cursor, &key, &data, MDB_PREV)
    mdb_cursor_close(cursor)
    if rc != 0 and rc != MDB_NOTFOUND and work.failure.code == 0:
        return fail(work.failure, rc, b"request", NULL, 0)
    return rc


cdef int admit(Environment env, Work *work, Entry *entries, size_t index) noexcept nogil:
    """Decide whether an entry runs, repeats an answer or is refused, and record its number in its session."""
    cdef Entry *entry = &entries[index]
    cdef SessionRow row
    cdef size_t i
    cdef int rc
    entry.decision = RUN
    if entry.kind == OPEN_SESSION:
        memset(&row, 0, sizeof(SessionRow))
        row.opened = row.touched = row.changed = entry.first_sequence
        rc = session_put(env, work, entry.session, &row, &entry.difference)
        if rc == 0:
            rc = evict_session(env, work, &entry.difference)
        return rc
    if entry.number == 0:
        return 0
    rc = session_get(env, work.txn, entry.session, &row, work.failure)
    if rc == MDB_NOTFOUND:
        entry.decision = REFUSED
        return 0
    if rc != 0:
        return rc
    if entry.number <= row.evicted:
        entry.decision = REFUSED
        return 0
    if entry.number <= row.last_number:
        for i in range(index):
            if entries[i].number == entry.number and memcmp(entries[i].session, entry.session, 16) == 0:
                entry.decision = DUPLICATE
                entry.argument = i + 1       # the answer is copied once it is known
                return 0
        rc = find_answer(env, work, entry)
        if rc == 0:
            entry.decision = DUPLICATE
            return 0
        if rc != MDB_NOTFOUND:
            return rc
    else:
        row.last_number = entry.number
    row.touched = row.changed = entry.first_sequence
    return session_put(env, work, entry.session, &row, &entry.difference)


cdef int evict_requests(Environment env, Work *work, Sum *difference, uint64_t sequence) noexcept nogil:
    """Keep the newest answers; the sessions of evicted ones remember up to which number nothing may be executed."""
    cdef MDB_stat stat
    cdef MDB_cursor *cursor
    cdef MDB_val key, data
    cdef SessionRow row
    cdef uint64_t number
    cdef uint8_t session[16]
    cdef Sum digest
    cdef int rc
    rc = mdb_stat(work.txn, env.requests, &stat)
    while rc == 0 and stat.ms_entries > REQUESTS_LIMIT:
        rc = mdb_cursor_open(work.txn, env.requests, &cursor)
        if rc != 0:
            break
        rc = mdb_cursor_get(cursor, &key, &data, MDB_FIRST)
        if rc != 0 or data.mv_size < 32:
            mdb_cursor_close(cursor)
            return fail(work.failure, rc if rc else CODE_CORRUPT, b"request row", NULL, 0)
        memcpy(session, data.mv_data, 16)
        memcpy(&number, <uint8_t *>data.mv_data + 16, 8)
        digest = row_digest(env.seed, DOMAIN_REQUEST, <const uint8_t *>key.mv_data, 8,
                            <const uint8_t *>data.mv_data, data.mv_size - 4)
        sum_sub(difference, &digest)
        rc = mdb_cursor_del(cursor, 0)
        mdb_cursor_close(cursor)
        if rc != 0:
            break
        if sequence:
            rc = session_get(env, work.txn, session, &row, work.failure)
            if rc == 0 and number > row.evicted:
                row.evicted = number
                row.changed = sequence
                rc = session_put(env, work, session, &row, difference)
            elif rc == MDB_NOTFOUND:
                rc = 0
            if rc != 0:
                return rc
        rc = mdb_stat(work.txn, env.requests, &stat)
    return 0 if rc == 0 else fail(work.failure, rc, b"request", NULL, 0)


cdef int request_put(Environment env, Work *work, uint64_t sequence, const uint8_t *value, size_t size,
                     Sum *difference) noexcept nogil:
    """Write a request row (``value`` without its check) and adjust the root."""
    cdef MDB_val key, data
    cdef uint32_t check
    cdef Sum digest
    cdef int rc
    key.mv_data = &sequence
    key.mv_size = 8
    data.mv_data = NULL
    data.mv_size = size + 4
    rc = mdb_put(work.txn, env.requests, &key, &data, MDB_RESERVE | MDB_NOOVERWRITE)
    if rc == MDB_KEYEXIST:
        return 0
    if rc != 0:
        return fail(work.failure, rc, b"request", NULL, 0)
    memcpy(data.mv_data, value, size)
    check = <uint32_t>XXH3_64bits_withSeed(value, size, sequence)
    memcpy(<uint8_t *>data.mv_data + size, &check, 4)
    digest = row_digest(env.seed, DOMAIN_REQUEST, <const uint8_t *>&sequence, 8, value, size)
    sum_add(difference, &digest)
    return 0


cdef int keep_answer(Environment env, Work *work, Operation *operations, Entry *entry) noexcept nogil:
    """Build an entry's answer: session, number, last sequence, then its results (one byte when all are alike)."""
    cdef size_t count = entry.operation_end - entry.operation_start
    cdef size_t i
    cdef bint uniform = True
    cdef uint32_t size = <uint32_t>count
    cdef int rc
    for i in range(1, count):
        if operations[entry.operation_start + i].result != operations[entry.operation_start].result:
            uniform = False
            break
    entry.answer_bytes = 37 + (1 if uniform else count)
    entry.answer = <uint8_t *>malloc(entry.answer_bytes)
    if entry.answer is NULL:
        return fail(work.failure, CODE_NO_MEMORY, b"request", NULL, 0)
    memcpy(entry.answer, entry.session, 16)
    memcpy(entry.answer + 16, &entry.number, 8)
    memcpy(entry.answer + 24, &entry.last_sequence, 8)
    entry.answer[32] = ANSWER_UNIFORM if uniform else ANSWER_RAW
    memcpy(entry.answer + 33, &size, 4)
    if uniform:
        entry.answer[37] = operations[entry.operation_start].result if count else APPLIED
    else:
        for i in range(count):
            entry.answer[37 + i] = operations[entry.operation_start + i].result
    rc = request_put(env, work, entry.first_sequence, entry.answer, entry.answer_bytes, &entry.difference)
    if rc == 0:
        rc = evict_requests(env, work, &entry.difference, entry.first_sequence)
    return rc


# --- change log --------------------------------------------------------------------------------------------------------

cdef int append_changes(Environment env, Work *work, const Operation *operations, size_t count) noexcept nogil:
    cdef MDB_val key, data
    cdef size_t i
    cdef unsigned int flags
    cdef int rc
    for i in range(count):
        if not operations[i].stored:
            continue
        if not work.append_changes and not operations[i].flags & TOMBSTONE:
            continue
        key.mv_data = <void *>&operations[i].sequence
        key.mv_size = 8
        data.mv_data = <void *>operations[i].key
        data.mv_size = operations[i].key_bytes
        flags = MDB_APPEND if work.append_changes else 0
        rc = mdb_cursor_put(work.changes, &key, &data, flags)
        if rc == MDB_KEYEXIST:
            rc = mdb_cursor_put(work.changes, &key, &data, 0)
        if rc != 0:
            return fail(work.failure, rc, b"change log", operations[i].key, operations[i].key_bytes)
    return 0


cdef int change_is_live(Environment env, Work *work, MDB_cursor *records, uint64_t sequence, const MDB_val *name,
                        Header *header) noexcept nogil:
    """1: the record points back to this change entry; 0: the entry is dead; negative: failure. Moves ``records``."""
    cdef MDB_val key, data
    cdef int rc
    key = name[0]
    rc = mdb_cursor_get(records, &key, &data, MDB_SET_KEY)
    if rc == MDB_NOTFOUND:
        return 0
    if rc != 0:
        fail(work.failure, rc, b"look up", <const uint8_t *>name.mv_data, name.mv_size)
        return -1
    if not header_read(<const uint8_t *>key.mv_data, key.mv_size, <const uint8_t *>data.mv_data, data.mv_size, header):
        fail(work.failure, CODE_CORRUPT, b"record header", <const uint8_t *>name.mv_data, name.mv_size)
        return -1
    return 1 if header.sequence == sequence else 0


cdef int sweep(Environment env, Work *work, size_t budget) noexcept nogil:
    """Drop dead change entries, ``budget`` steps at most, going on where the last sweep stopped."""
    cdef MDB_val key, data, from_key
    cdef uint64_t sequence = work.state.sweep + 1
    cdef Header header
    cdef int rc, live
    from_key.mv_data = &sequence
    from_key.mv_size = 8
    key = from_key
    rc = mdb_cursor_get(work.changes, &key, &data, MDB_SET_RANGE)
    while budget and work.state.dead:
        if rc == MDB_NOTFOUND:
            work.state.sweep = 0
            return 0
        if rc != 0:
            return fail(work.failure, rc, b"change log", NULL, 0)
        memcpy(&sequence, key.mv_data, 8)
        live = change_is_live(env, work, work.records, sequence, &data, &header)
        if live < 0:
            return work.failure.code
        work.state.sweep = sequence
        if not live:
            rc = mdb_cursor_del(work.changes, 0)
            if rc != 0:
                return fail(work.failure, rc, b"change log", NULL, 0)
            work.state.dead -= 1
            rc = mdb_cursor_get(work.changes, &key, &data, MDB_GET_CURRENT)
            # NB: after a delete LMDB's cursor stands on the following entry, except at the end.
            if rc == 22:
                rc = mdb_cursor_get(work.changes, &key, &data, MDB_NEXT)
            elif rc == 0 and (<uint64_t *>key.mv_data)[0] == sequence:
                rc = mdb_cursor_get(work.changes, &key, &data, MDB_NEXT)
        else:
            rc = mdb_cursor_get(work.changes, &key, &data, MDB_NEXT)
        budget -= 1
    return 0


cdef int purge(Environment env, Work *work, uint64_t mark, Sum *difference) noexcept nogil:
    """Remove tombstones up to ``mark`` with their change entries, and raise the purge mark."""
    cdef MDB_val key, data
    cdef uint64_t sequence = work.state.purge_mark + 1
    cdef Header header
    cdef Sum digest
    cdef uint8_t name[KEY_MAX]
    cdef size_t name_bytes
    cdef uint64_t image
    cdef bint removed
    cdef int rc, live
    if mark <= work.state.purge_mark:
        return 0
    if work.state.purge_mark:
        image = work.state.purge_mark
        digest = row_digest(env.seed, DOMAIN_META, b"purge", 5, <const uint8_t *>&image, 8)
        sum_sub(difference, &digest)
    key.mv_data = &sequence
    key.mv_size = 8
    rc = mdb_cursor_get(work.changes, &key, &data, MDB_SET_RANGE)
    while rc == 0:
        memcpy(&sequence, key.mv_data, 8)
        if sequence > mark:
            break
        name_bytes = data.mv_size
        memcpy(name, data.mv_data, name_bytes)
        live = change_is_live(env, work, work.records, sequence, &data, &header)
        if live < 0:
            return work.failure.code
        removed = False
        if live == 0:
            work.state.dead -= 1
            removed = True
        elif header.flags & TOMBSTONE:
            digest = digest_of(env, name, name_bytes, &header)
            sum_sub(difference, &digest)
            work.state.count -= 1
            work.entries -= 1
            if work.tracked:
                note(env, work, name, name_bytes, &digest, NULL)
            rc = mdb_cursor_del(work.records, 0)
            if rc != 0:
                return fail(work.failure, rc, b"purge", name, name_bytes)
            removed = True
        if removed:
            rc = mdb_cursor_del(work.changes, 0)
            if rc != 0:
                return fail(work.failure, rc, b"purge", name, name_bytes)
            sequence += 1
            key.mv_data = &sequence
            key.mv_size = 8
            rc = mdb_cursor_get(work.changes, &key, &data, MDB_SET_RANGE)
        else:
            rc = mdb_cursor_get(work.changes, &key, &data, MDB_NEXT)
    if rc != 0 and rc != MDB_NOTFOUND:
        return fail(work.failure, rc, b"purge", NULL, 0)
    work.state.purge_mark = mark
    digest = row_digest(env.seed, DOMAIN_META, b"purge", 5, <const uint8_t *>&mark, 8)
    sum_add(difference, &digest)
    return 0


# --- the transaction ---------------------------------------------------------------------------------------------------

cdef int put_rows(Environment env, Work *work, const MetaRow *rows, size_t count, Sum *difference) noexcept nogil:
    """Write meta rows (value with its check appended by the caller) and rows that a delta carried."""
    cdef MDB_val key, data
    cdef SessionRow session
    cdef uint64_t sequence
    cdef size_t i
    cdef int rc = 0
    for i in range(count):
        if rows[i].database == DATABASE_META:
            key.mv_data = <void *>rows[i].name
            key.mv_size = rows[i].name_bytes
            if rows[i].value is NULL:
                rc = mdb_del(work.txn, env.meta, &key, NULL)
                if rc == MDB_NOTFOUND:
                    rc = 0
            else:
                data.mv_data = <void *>rows[i].value
                data.mv_size = rows[i].value_bytes
                rc = mdb_put(work.txn, env.meta, &key, &data, 0)
            if rc != 0:
                return fail(work.failure, rc, b"meta row", rows[i].name, rows[i].name_bytes)
        elif rows[i].database == DATABASE_SESSIONS:
            if rows[i].name_bytes != 16 or rows[i].value_bytes != SESSION_ROW:
                return fail(work.failure, CODE_ROWS_MALFORMED, b"session row", NULL, 0)
            memcpy(&session, rows[i].value, SESSION_ROW)
            rc = session_put(env, work, rows[i].name, &session, difference)
            if rc != 0:
                return rc
        else:
            if rows[i].name_bytes != 8 or rows[i].value_bytes < 32:
                return fail(work.failure, CODE_ROWS_MALFORMED, b"request row", NULL, 0)
            memcpy(&sequence, rows[i].name, 8)
            rc = request_put(env, work, sequence, rows[i].value, rows[i].value_bytes, difference)
            if rc != 0:
                return rc
    return 0


cdef int run_operations(Environment env, Work *work, Operation *operations, size_t count, Entry *entries) noexcept nogil:
    cdef SortItem *items
    cdef SortItem *sorted_items
    cdef MDB_val key, data
    cdef size_t i, j
    cdef Operation *one
    cdef Operation *other
    cdef int rc = 0
    if count == 0:
        return 0
    items = <SortItem *>malloc(2 * count * sizeof(SortItem))
    if items is NULL:
        return fail(work.failure, CODE_NO_MEMORY, b"sort", NULL, 0)
    sorted_items = sort_operations(operations, count, items, items + count)
    rc = mdb_cursor_get(work.records, &key, &data, MDB_LAST)
    if rc == MDB_NOTFOUND:
        work.appending = True
    elif rc != 0:
        free(items)
        return fail(work.failure, rc, b"last record", NULL, 0)
    elif key.mv_size > KEY_MAX:
        free(items)
        return fail(work.failure, CODE_CORRUPT, b"key size", NULL, 0)
    else:
        work.appending = False
        work.has_last = True
        work.last_key_bytes = key.mv_size
        memcpy(work.last_key, key.mv_data, key.mv_size)
    rc = 0
    i = 0
    while i < count and rc == 0:
        one = &operations[sorted_items[i].index]
        j = i + 1
        while j < count and sorted_items[j].prefix == sorted_items[i].prefix:
            other = &operations[sorted_items[j].index]
            if compare_keys(one.key, one.key_bytes, other.key, other.key_bytes):
                break
            j += 1
        rc = apply_group(env, work, operations, entries, &sorted_items[i], j - i)
        i = j
    free(items)
    return rc


cdef int write_state(Environment env, Work *work) noexcept nogil:
    cdef MDB_val key, data
    cdef int rc
    work.state.format = 1
    work.state.check = XXH3_64bits(&work.state, STATE_CHECKED)
    key.mv_data = <void *><const char *>b"state"
    key.mv_size = 5
    data.mv_data = &work.state
    data.mv_size = sizeof(State)
    rc = mdb_put(work.txn, env.meta, &key, &data, 0)
    return 0 if rc == 0 else fail(work.failure, rc, b"state", NULL, 0)


cdef int transact(Environment env, Submission *job) noexcept nogil:
    """Run one submission's work inside one transaction; on any failure nothing has happened."""
    cdef Work work
    cdef MDB_stat stat
    cdef size_t i
    cdef Entry *entry
    cdef Sum root
    cdef uint64_t number
    cdef int rc
    job.failure.code = 0
    memset(&work, 0, sizeof(Work))
    work.failure = &job.failure
    work.state = env.state
    work.append_changes = True
    work.repair = job.repair
    pthread_mutex_lock(&env.queue_lock)
    work.tracked = env.tracked and env.digests
    pthread_mutex_unlock(&env.queue_lock)
    env.pending.used = 0
    env.pending_lost = False
    if job.mode == MODE_RAW:
        work.append_changes = job.append_changes
    if job.check_base and (env.state.sequence != job.base.sequence or not sum_equal(&env.state.root, &job.base.root)):
        return fail(&job.failure, CODE_BASE_MISMATCH, b"base position", NULL, 0)
    if job.check_actual:
        work.state.root = job.actual.root
        work.state.count = job.actual.count
        work.state.live_count = job.actual.live_count
        work.entries = job.actual_entries
    rc = mdb_txn_begin(env.env, NULL, 0, &work.txn)
    if rc != 0:
        return fail(&job.failure, rc, b"begin", NULL, 0)
    rc = mdb_cursor_open(work.txn, env.records, &work.records)
    if rc == 0:
        rc = mdb_cursor_open(work.txn, env.changes, &work.changes)
    if rc != 0:
        mdb_txn_abort(work.txn)
        return fail(&job.failure, rc, b"cursor", NULL, 0)
    if rc == 0 and job.repair and not job.check_actual:
        rc = mdb_stat(work.txn, env.changes, &stat)
        work.entries = stat.ms_entries - work.state.dead
    for i in range(job.entry_count):
        job.entries[i].difference.low = 0
        job.entries[i].difference.high = 0
        if job.entries[i].answer is not NULL:        # left by an attempt that the map was too small for
            free(job.entries[i].answer)
            job.entries[i].answer = NULL
    for i in range(job.operation_count):
        job.operations[i].stored = 0
    if job.mode == MODE_RAW and not job.append_changes:
        work.state.log_floor = <uint64_t>-1
    for i in range(job.entry_count):
        if rc == 0:
            rc = admit(env, &work, job.entries, i)
    if rc == 0:
        rc = run_operations(env, &work, job.operations, job.operation_count, job.entries)
    if rc == 0 and job.repair:
        rc = repair_changes(env, &work, job.operations, job.operation_count, job.target.sequence)
    elif rc == 0:
        rc = append_changes(env, &work, job.operations, job.operation_count)
    for i in range(job.entry_count):
        if rc != 0:
            break
        entry = &job.entries[i]
        if entry.kind == PURGE and entry.decision == RUN:
            rc = purge(env, &work, entry.argument, &entry.difference)
        if rc == 0 and entry.number and entry.decision == RUN:
            rc = keep_answer(env, &work, job.operations, entry)
    if rc == 0:
        root = work.state.root
        for i in range(job.entry_count):
            sum_add(&root, &job.entries[i].difference)
            job.entries[i].root = root
            work.state.sequence = job.entries[i].last_sequence
            work.state.hybrid_clock = job.entries[i].hybrid_clock
        work.state.applied_index += job.entry_count
        work.state.root = root
    if rc == 0 and job.replace_rows:
        rc = drop_rows(env, &work, env.requests, DOMAIN_REQUEST)
        if rc == 0:
            rc = drop_rows(env, &work, env.sessions, DOMAIN_SESSION)
    if rc == 0 and job.row_count:
        rc = put_rows(env, &work, job.rows, job.row_count, &work.total)
    if rc == 0 and job.mode == MODE_RAW:
        if job.check_target:
            if job.target.purge_mark > work.state.purge_mark:
                rc = purge(env, &work, job.target.purge_mark, &work.total)
            if rc == 0:
                rc = evict_requests(env, &work, &work.total, 0)
            if rc == 0:
                rc = evict_session(env, &work, &work.total)
        if rc == 0 and job.repair:
            rc = settle_purge_mark(env, &work, job.target.purge_mark)
        if rc == 0 and job.repair:
            rc = settle_dead(env, &work)
        sum_add(&work.state.root, &work.total)
        for i in range(job.operation_count):
            if job.operations[i].sequence > work.state.sequence:
                work.state.sequence = job.operations[i].sequence
        if rc == 0 and job.check_target:
            if not sum_equal(&work.state.root, &job.target.root) or work.state.count != job.target.count:
                rc = fail(&job.failure, CODE_ROOT_MISMATCH, b"root after the last row", NULL, 0)
            work.state.sequence = job.target.sequence
            work.state.applied_index = job.target.applied_index
            work.state.applied_term = job.target.applied_term
            work.state.hybrid_clock = job.target.hybrid_clock
            if work.state.log_floor == <uint64_t>-1:
                work.state.log_floor = job.target.sequence
    if rc == 0 and job.mode != MODE_META:
        rc = mdb_stat(work.txn, env.changes, &stat)
        if rc == 0 and work.state.dead > (stat.ms_entries + SWEEP_SLACK) // 2:
            rc = sweep(env, &work, 4 * job.operation_count + 64)
    if rc == 0:
        rc = write_state(env, &work)
    if rc != 0:
        mdb_txn_abort(work.txn)
        if job.failure.code == 0:
            fail(&job.failure, rc, b"transaction", NULL, 0)
        return rc
    number = mdb_txn_id(work.txn)
    rc = mdb_txn_commit(work.txn)
    if rc != 0:
        return fail(&job.failure, rc, b"commit", NULL, 0)
    # Duplicates of a request in the same transaction get its answer.
    for i in range(job.entry_count):
        entry = &job.entries[i]
        if entry.decision == DUPLICATE and entry.answer is NULL and entry.argument:
            entry.answer_bytes = job.entries[entry.argument - 1].answer_bytes
            entry.answer = <uint8_t *>malloc(entry.answer_bytes)
            if entry.answer is not NULL:
                memcpy(entry.answer, job.entries[entry.argument - 1].answer, entry.answer_bytes)
    pthread_mutex_lock(&env.queue_lock)
    env.state = work.state
    env.commits += 1
    publish_notes(env, &work, number)
    if job.repair:
        env.ring_count = 0       # what the ring says of the history before is not the authority's
    for i in range(job.entry_count):
        ring_push(env, job.entries[i].last_sequence, &job.entries[i].root)
    if job.mode == MODE_RAW and job.check_target:
        ring_push(env, work.state.sequence, &work.state.root)
    pthread_mutex_unlock(&env.queue_lock)
    return 0
