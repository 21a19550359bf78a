# Reading: pinned readers, pages of records for Python, rows for the wire, and the full check.
#
# Whatever loops runs without the GIL and looks at every record's checks before it hands anything out. No pointer into
# the map outlives a call: results are copied into Python objects or the caller's buffer before the reader is released.

cdef struct Found:
    const uint8_t *key
    size_t key_bytes
    Header header


cdef enum:
    PAGE_RECORDS_MAX = 1024


cdef int read_state(Environment env, MDB_txn *txn, State *state, Failure *failure) noexcept nogil:
    cdef MDB_val key, data
    cdef int rc
    key.mv_data = <void *><const char *>b"state"
    key.mv_size = 5
    rc = mdb_get(txn, env.meta, &key, &data)
    if rc != 0:
        return fail(failure, rc if rc != MDB_NOTFOUND else CODE_CORRUPT, b"state", NULL, 0)
    if data.mv_size != sizeof(State):
        return fail(failure, CODE_CORRUPT, b"state row", NULL, 0)
    memcpy(state, data.mv_data, sizeof(State))
    if state.format != 1 or state.check != XXH3_64bits(state, STATE_CHECKED):
        return fail(failure, CODE_CORRUPT, b"state row", NULL, 0)
    return 0


cdef int find_page(Environment env, MDB_txn *txn, const uint8_t *start, size_t start_bytes, bint has_start,
                   bint after_start, const uint8_t *stop, size_t stop_bytes, bint has_stop, bint reverse,
                   size_t limit, size_t bytes_max, bint tombstones, Found *found, size_t *count, bint *done,
                   Failure *failure) noexcept nogil:
    """Find up to ``limit`` records in key order (or against it) and check them.

    The range is [start, stop) in key order whatever the direction. Forward: ``after_start`` excludes the start.
    Reverse: going down from below ``stop``.
    """
    cdef MDB_cursor *cursor
    cdef MDB_val key, data
    cdef size_t size = 0
    cdef size_t used = 0
    cdef size_t page = 0
    cdef int rc
    done[0] = False
    count[0] = 0
    rc = mdb_cursor_open(txn, env.records, &cursor)
    if rc != 0:
        return fail(failure, rc, b"cursor", NULL, 0)
    if not reverse:
        if has_start:
            key.mv_data = <void *>start
            key.mv_size = start_bytes
            if start_bytes == 0:
                rc = mdb_cursor_get(cursor, &key, &data, MDB_FIRST)
            else:
                rc = mdb_cursor_get(cursor, &key, &data, MDB_SET_RANGE)
            if rc == 0 and after_start and compare_keys(<const uint8_t *>key.mv_data, key.mv_size, start, start_bytes) == 0:
                rc = mdb_cursor_get(cursor, &key, &data, MDB_NEXT)
        else:
            rc = mdb_cursor_get(cursor, &key, &data, MDB_FIRST)
    elif has_stop:
        key.mv_data = <void *>stop
        key.mv_size = stop_bytes
        rc = MDB_NOTFOUND if stop_bytes == 0 else mdb_cursor_get(cursor, &key, &data, MDB_SET_RANGE)
        if rc == 0:
            rc = mdb_cursor_get(cursor, &key, &data, MDB_PREV)
        elif rc == MDB_NOTFOUND and stop_bytes:
            rc = mdb_cursor_get(cursor, &key, &data, MDB_LAST)
    else:
        rc = mdb_cursor_get(cursor, &key, &data, MDB_LAST)
    while rc == 0:
        if <size_t>key.mv_data >> 12 != page:
            page = <size_t>key.mv_data >> 12
            sr_prefetch_page(key.mv_data)
        if key.mv_size > KEY_MAX:
            rc = fail(failure, CODE_CORRUPT, b"key size", NULL, 0)
            break
        if not reverse and has_stop and compare_keys(<const uint8_t *>key.mv_data, key.mv_size, stop, stop_bytes) >= 0:
            rc = MDB_NOTFOUND
            break
        if reverse and has_start:
            rc = compare_keys(<const uint8_t *>key.mv_data, key.mv_size, start, start_bytes)
            if rc < 0:
                rc = MDB_NOTFOUND
                break
            rc = 0
        if used >= limit or size >= bytes_max:
            break
        if not record_read(<const uint8_t *>key.mv_data, key.mv_size, <const uint8_t *>data.mv_data, data.mv_size,
                           &found[used].header):
            rc = fail(failure, CODE_CORRUPT, b"record", <const uint8_t *>key.mv_data, key.mv_size)
            break
        if tombstones or not found[used].header.flags & TOMBSTONE:
            found[used].key = <const uint8_t *>key.mv_data
            found[used].key_bytes = key.mv_size
            size += key.mv_size + found[used].header.value_bytes
            used += 1
        rc = mdb_cursor_get(cursor, &key, &data, MDB_PREV if reverse else MDB_NEXT)
    mdb_cursor_close(cursor)
    count[0] = used
    if rc == MDB_NOTFOUND:
        done[0] = True
        rc = 0
    if rc != 0 and failure.code == 0:
        fail(failure, rc, b"scan", NULL, 0)
    return rc


cdef int rows_in_key_order(Environment env, MDB_txn *txn, const uint8_t *after, size_t after_bytes, uint8_t *out,
                           size_t room, size_t *used, size_t *count, uint8_t *last, size_t *last_bytes, size_t *needed,
                           bint *done, Failure *failure) noexcept nogil:
    """Write rows of all records after a key until the room is used; ``needed`` is set when not even one fits."""
    cdef MDB_cursor *cursor
    cdef MDB_val key, data
    cdef sr_walk_t walk
    cdef Header header
    cdef size_t size
    cdef const uint8_t *last_key = NULL
    cdef size_t last_size = 0
    cdef int rc
    used[0] = count[0] = needed[0] = 0
    done[0] = False
    rc = mdb_cursor_open(txn, env.records, &cursor)
    if rc != 0:
        return fail(failure, rc, b"cursor", NULL, 0)
    if after_bytes:
        key.mv_data = <void *>after
        key.mv_size = after_bytes
        rc = mdb_cursor_get(cursor, &key, &data, MDB_SET_RANGE)
        if rc == 0 and compare_keys(<const uint8_t *>key.mv_data, key.mv_size, after, after_bytes) == 0:
            rc = mdb_cursor_get(cursor, &key, &data, MDB_NEXT)
    else:
        rc = mdb_cursor_get(cursor, &key, &data, MDB_FIRST)
    sr_walk_begin(&walk, cursor)
    while rc == 0:
        if not record_read(<const uint8_t *>key.mv_data, key.mv_size, <const uint8_t *>data.mv_data, data.mv_size,
                           &header):
            rc = fail(failure, CODE_CORRUPT, b"record", <const uint8_t *>key.mv_data, key.mv_size)
            break
        size = row_bytes(key.mv_size, &header)
        if size > room - used[0]:
            if count[0] == 0:
                needed[0] = size
            break
        used[0] += row_write(out + used[0], <const uint8_t *>key.mv_data, key.mv_size, &header)
        count[0] += 1
        last_key = <const uint8_t *>key.mv_data
        last_size = key.mv_size
        rc = sr_walk_next(&walk, &key, &data)
    if count[0]:
        memcpy(last, last_key, last_size)
        last_bytes[0] = last_size
    mdb_cursor_close(cursor)
    if rc == MDB_NOTFOUND:
        done[0] = True
        rc = 0
    if rc != 0 and failure.code == 0:
        fail(failure, rc, b"scan", NULL, 0)
    return rc


cdef int rows_in_sequence_order(Environment env, MDB_txn *txn, uint64_t since, uint8_t *out, size_t room, size_t *used,
                                size_t *count, uint64_t *last, size_t *needed, bint *done, Failure *failure) noexcept nogil:
    """Write rows of the live change entries after a sequence until the room is used."""
    cdef MDB_cursor *changes
    cdef MDB_cursor *records
    cdef MDB_val key, name, record_key, data
    cdef Header header
    cdef uint64_t sequence = since + 1
    cdef size_t size
    cdef int rc
    used[0] = count[0] = needed[0] = 0
    done[0] = False
    last[0] = since
    rc = mdb_cursor_open(txn, env.changes, &changes)
    if rc != 0:
        return fail(failure, rc, b"cursor", NULL, 0)
    rc = mdb_cursor_open(txn, env.records, &records)
    if rc != 0:
        mdb_cursor_close(changes)
        return fail(failure, rc, b"cursor", NULL, 0)
    key.mv_data = &sequence
    key.mv_size = 8
    rc = mdb_cursor_get(changes, &key, &name, MDB_SET_RANGE)
    while rc == 0:
        memcpy(&sequence, key.mv_data, 8)
        record_key = name
        rc = mdb_cursor_get(records, &record_key, &data, MDB_SET_KEY)
        if rc == 0:
            if not header_read(<const uint8_t *>record_key.mv_data, record_key.mv_size, <const uint8_t *>data.mv_data,
                               data.mv_size, &header):
                rc = fail(failure, CODE_CORRUPT, b"record header", <const uint8_t *>name.mv_data, name.mv_size)
                break
            if header.sequence == sequence:
                if content_checksum(header.value, header.value_bytes, header.flags) != header.checksum:
                    rc = fail(failure, CODE_CORRUPT, b"record", <const uint8_t *>name.mv_data, name.mv_size)
                    break
                size = row_bytes(record_key.mv_size, &header)
                if size > room - used[0]:
                    if count[0] == 0:
                        needed[0] = size
                    break
                used[0] += row_write(out + used[0], <const uint8_t *>record_key.mv_data, record_key.mv_size, &header)
                count[0] += 1
        elif rc != MDB_NOTFOUND:
            break
        last[0] = sequence
        rc = mdb_cursor_get(changes, &key, &name, MDB_NEXT)
    mdb_cursor_close(changes)
    mdb_cursor_close(records)
    if rc == MDB_NOTFOUND:
        done[0] = True
        rc = 0
    if rc != 0 and failure.code == 0:
        fail(failure, rc, b"change log", NULL, 0)
    return rc


cdef class Reader:
    """A pinned point-in-time reader. Closed by `close`, by its environment, or by the writer once past its age."""

    def __cinit__(self, Environment environment not None, uint64_t ms_max):
        cdef ReaderLink *link
        cdef Failure failure
        cdef int rc = 0
        self.environment = environment
        environment.check_usable()
        link = <ReaderLink *>calloc(1, sizeof(ReaderLink))
        if link is NULL:
            raise MemoryError
        link.ms_max = ms_max
        failure.code = 0
        with nogil:
            pthread_mutex_lock(&environment.queue_lock)
            while environment.growing:
                pthread_cond_wait(&environment.unpinned, &environment.queue_lock)
            rc = CODE_CLOSED if environment.is_closed else mdb_txn_begin(environment.env, NULL, MDB_RDONLY, &link.txn)
            if rc == MDB_READERS_FULL:
                expire_readers(environment)
                mdb_reader_check(environment.env, NULL)
                rc = mdb_txn_begin(environment.env, NULL, MDB_RDONLY, &link.txn)
            if rc == 0:
                link.opened_ms = sr_now_ms()
                link.following = environment.readers
                if link.following is not NULL:
                    link.following.previous = link
                environment.readers = link
                environment.pinned += 1
                # Nobody expires it, or closes the tablet, while its state is being read.
                link.busy = True
            pthread_mutex_unlock(&environment.queue_lock)
            if rc == 0:
                sr_enter(environment.marker)
                rc = read_state(environment, link.txn, &self.state, &failure)
                sr_enter(NULL)
                pthread_mutex_lock(&environment.queue_lock)
                link.busy = False
                pthread_cond_broadcast(&environment.unpinned)
                pthread_mutex_unlock(&environment.queue_lock)
        self.link = link
        if rc != 0:
            if failure.code == 0:
                fail(&failure, rc, b"view", NULL, 0)
            self.close()
            raise_failure(environment, &failure)

    def __dealloc__(self):
        # NB: the link lives as long as the object: another thread may be about to enter a reader that is being closed.
        self.close()
        if self.environment is not None and self.environment.generation == sr_generation:
            free(self.link)

    def close(self):
        """Release the reader; may be called twice, from any thread."""
        cdef ReaderLink *link = self.link
        cdef Environment env = self.environment
        if link is NULL or env is None or env.generation != sr_generation:
            return
        with nogil:
            pthread_mutex_lock(&env.queue_lock)
            while link.busy:
                pthread_cond_wait(&env.unpinned, &env.queue_lock)
            if not link.is_closed:
                link.is_closed = True
                if link.txn is not NULL:
                    mdb_txn_abort(link.txn)
                    link.txn = NULL
                    env.pinned -= 1
                if link.previous is not NULL:
                    link.previous.following = link.following
                elif env.readers == link:
                    env.readers = link.following
                if link.following is not NULL:
                    link.following.previous = link.previous
                if env.pinned == 0:
                    pthread_cond_broadcast(&env.unpinned)
            pthread_mutex_unlock(&env.queue_lock)

    cdef MDB_txn *begin(self) except NULL:
        """Enter a call: the reader cannot be expired until `end`. One call at a time; a second waits."""
        cdef ReaderLink *link = self.link
        cdef Environment env = self.environment
        cdef bint expired
        env.check_usable()
        if link is NULL:
            raise errors.Closed("the view is closed")
        with nogil:
            pthread_mutex_lock(&env.queue_lock)
            while link.busy:
                pthread_cond_wait(&env.unpinned, &env.queue_lock)
            if link.txn is not NULL and sr_now_ms() - link.opened_ms > link.ms_max:
                expire_readers(env)
            expired = link.txn is NULL
            if not expired:
                link.busy = True
            pthread_mutex_unlock(&env.queue_lock)
        if expired:
            if link.is_closed:
                raise errors.Closed("the view is closed")
            raise errors.ViewExpired(f"the view is older than its maximum age of {link.ms_max} ms",
                                     age_ms_max=link.ms_max)
        sr_enter(env.marker)
        return link.txn

    cdef void end(self) noexcept:
        cdef Environment env = self.environment
        sr_enter(NULL)
        pthread_mutex_lock(&env.queue_lock)
        self.link.busy = False
        pthread_cond_broadcast(&env.unpinned)
        pthread_mutex_unlock(&env.queue_lock)

    @property
    def is_open(self):
        return self.link is not NULL and self.link.txn is not NULL

    @property
    def state_image(self):
        """The state row of this point in time, 112 bytes."""
        return PyBytes_FromStringAndSize(<char *>&self.state, sizeof(State))

    @property
    def state_tuple(self):
        return state_as_tuple(&self.state)

    def get(self, key not None):
        """Return (value, sequence, hybrid clock, flags) of a record, a tombstone included, or None."""
        cdef MDB_txn *txn
        cdef const uint8_t[::1] name
        cdef MDB_val k, data
        cdef Header header
        cdef Failure failure
        cdef int rc
        check_key(key)
        txn = self.begin()
        try:
            k.mv_data = <void *><const char *>key
            k.mv_size = len(key)
            rc = mdb_get(txn, self.environment.records, &k, &data)
            if rc == MDB_NOTFOUND:
                return None
            failure.code = 0
            if rc != 0:
                fail(&failure, rc, b"get", <const uint8_t *><const char *>key, len(key))
                raise_failure(self.environment, &failure)
            if not record_read(<const uint8_t *><const char *>key, len(key), <const uint8_t *>data.mv_data,
                               data.mv_size, &header):
                fail(&failure, CODE_CORRUPT, b"record", <const uint8_t *><const char *>key, len(key))
                raise_failure(self.environment, &failure)
            return (PyBytes_FromStringAndSize(<const char *>header.value, header.value_bytes), header.sequence,
                    header.hybrid_clock, header.flags)
        finally:
            self.end()

    def page(self, bytes start, bytes stop, bint after_start, bint reverse, size_t limit, size_t bytes_max,
             bint headers, bint tombstones):
        """Return (records, done): pairs (key, value), or with ``headers`` (key, value, sequence, clock, flags)."""
        cdef Found *found
        cdef size_t count = 0
        cdef size_t i
        cdef bint done = False
        cdef Failure failure
        cdef Environment env = self.environment
        cdef MDB_txn *txn
        cdef int rc
        cdef const uint8_t *start_data = NULL
        cdef const uint8_t *stop_data = NULL
        cdef size_t start_bytes = 0
        cdef size_t stop_bytes = 0
        cdef bint has_start = start is not None
        cdef bint has_stop = stop is not None
        if limit > PAGE_RECORDS_MAX:
            limit = PAGE_RECORDS_MAX
        if has_start:
            start_data = <const uint8_t *><const char *>start
            start_bytes = len(start)
        if has_stop:
            stop_data = <const uint8_t *><const char *>stop
            stop_bytes = len(stop)
        if (has_start and start_bytes > KEY_MAX) or (has_stop and stop_bytes > KEY_MAX):
            raise errors.InvalidValue(f"a bound of a scan has at most {KEY_MAX} bytes")
        found = <Found *>malloc((limit + 1) * sizeof(Found))
        if found is NULL:
            raise MemoryError
        failure.code = 0
        try:
            txn = self.begin()
        except BaseException:
            free(found)
            raise
        try:
            with nogil:
                rc = find_page(env, txn, start_data, start_bytes, has_start, after_start, stop_data, stop_bytes,
                               has_stop, reverse, limit, bytes_max, tombstones, found, &count, &done, &failure)
            if rc != 0:
                raise_failure(env, &failure)
            result = []
            for i in range(count):
                key = PyBytes_FromStringAndSize(<const char *>found[i].key, found[i].key_bytes)
                value = PyBytes_FromStringAndSize(<const char *>found[i].header.value, found[i].header.value_bytes)
                if headers:
                    result.append((key, value, found[i].header.sequence, found[i].header.hybrid_clock,
                                   found[i].header.flags))
                else:
                    result.append((key, value))
            return result, done
        finally:
            self.end()
            free(found)

    def check_all(self):
        """Check every record; return (records, bytes of keys and values). Raises CorruptionError at the first damage."""
        cdef Environment env = self.environment
        cdef MDB_cursor *cursor
        cdef MDB_val key, data
        cdef sr_walk_t walk
        cdef Header header
        cdef Failure failure
        cdef size_t count = 0
        cdef size_t size = 0
        cdef int rc
        cdef MDB_txn *txn = self.begin()
        failure.code = 0
        try:
            with nogil:
                rc = mdb_cursor_open(txn, env.records, &cursor)
                if rc == 0:
                    rc = mdb_cursor_get(cursor, &key, &data, MDB_FIRST)
                    sr_walk_begin(&walk, cursor)
                    while rc == 0:
                        if not record_read(<const uint8_t *>key.mv_data, key.mv_size, <const uint8_t *>data.mv_data,
                                           data.mv_size, &header):
                            rc = fail(&failure, CODE_CORRUPT, b"record", <const uint8_t *>key.mv_data, key.mv_size)
                            break
                        count += 1
                        size += key.mv_size + header.value_bytes
                        rc = sr_walk_next(&walk, &key, &data)
                    mdb_cursor_close(cursor)
            if rc != MDB_NOTFOUND:
                if failure.code == 0:
                    fail(&failure, rc, b"scan", NULL, 0)
                raise_failure(env, &failure)
            return count, size
        finally:
            self.end()

    def rows_by_key(self, bytes after, size_t bytes_max, buffer):
        """Return (rows or bytes used in ``buffer``, count, last key, done); see `View.rows_by_key`."""
        cdef Environment env = self.environment
        cdef uint8_t[::1] view
        cdef uint8_t *out
        cdef bytes made = None
        cdef PyObject *whole
        cdef uint8_t last[KEY_MAX]
        cdef size_t last_bytes = 0
        cdef size_t used = 0
        cdef size_t count = 0
        cdef size_t needed = 0
        cdef size_t room
        cdef bint done = False
        cdef Failure failure
        cdef const uint8_t *after_data = NULL
        cdef size_t after_bytes = 0
        cdef MDB_txn *txn
        cdef int rc
        if after is not None:
            after_data = <const uint8_t *><const char *>after
            after_bytes = len(after)
        txn = self.begin()
        try:
            room = bytes_max
            while True:
                failure.code = 0
                if buffer is not None and needed == 0:
                    view = buffer
                    if <size_t>view.shape[0] < room:
                        room = view.shape[0]
                    out = &view[0]
                else:
                    room = needed if needed else bytes_max
                    made = PyBytes_FromStringAndSize(NULL, room)
                    out = <uint8_t *><char *>made
                with nogil:
                    rc = rows_in_key_order(env, txn, after_data, after_bytes, out, room, &used, &count, last,
                                           &last_bytes, &needed, &done, &failure)
                if rc != 0:
                    raise_failure(env, &failure)
                if not needed:
                    break
            if made is None:
                return used, count, last[:last_bytes] if count else None, done
            # NB: cut where it stands, not copied: a chunk's rows are a MiB. Only `whole` refers to them here.
            whole = <PyObject *>made
            Py_INCREF(made)
            made = None
            _PyBytes_Resize(&whole, used)
            made = <bytes>whole
            Py_DECREF(made)
            return made, count, last[:last_bytes] if count else None, done
        finally:
            self.end()

    def rows_since(self, uint64_t sequence, size_t bytes_max):
        """Return (rows, count, last sequence, done); live rows only, in sequence order, at least one unless done."""
        cdef Environment env = self.environment
        cdef uint8_t *out
        cdef uint64_t last = 0
        cdef size_t used = 0
        cdef size_t count = 0
        cdef size_t needed = 0
        cdef size_t room = bytes_max
        cdef bint done = False
        cdef Failure failure
        cdef int rc
        cdef MDB_txn *txn = self.begin()
        try:
            while True:
                failure.code = 0
                out = <uint8_t *>malloc(room + 1)
                if out is NULL:
                    raise MemoryError
                try:
                    with nogil:
                        rc = rows_in_sequence_order(env, txn, sequence, out, room, &used, &count, &last, &needed, &done,
                                                    &failure)
                    if rc != 0:
                        raise_failure(env, &failure)
                    if not needed:
                        return PyBytes_FromStringAndSize(<char *>out, used), count, last, done
                    room = needed
                finally:
                    free(out)
        finally:
            self.end()

    def meta_rows(self, uint64_t since):
        """Return the request rows after ``since`` and the session rows changed after it: [(database, name, value)]."""
        cdef Environment env = self.environment
        cdef MDB_cursor *cursor
        cdef MDB_val key, data
        cdef uint64_t sequence = since + 1
        cdef SessionRow row
        cdef Failure failure
        cdef int rc
        cdef MDB_txn *txn = self.begin()
        result = []
        failure.code = 0
        try:
            rc = mdb_cursor_open(txn, env.requests, &cursor)
            if rc == 0:
                key.mv_data = &sequence
                key.mv_size = 8
                rc = mdb_cursor_get(cursor, &key, &data, MDB_SET_RANGE)
                while rc == 0 and data.mv_size > 4:
                    result.append((DATABASE_REQUESTS, PyBytes_FromStringAndSize(<char *>key.mv_data, 8),
                                   PyBytes_FromStringAndSize(<char *>data.mv_data, data.mv_size - 4)))
                    rc = mdb_cursor_get(cursor, &key, &data, MDB_NEXT)
                mdb_cursor_close(cursor)
            if rc == MDB_NOTFOUND:
                rc = mdb_cursor_open(txn, env.sessions, &cursor)
                if rc == 0:
                    rc = mdb_cursor_get(cursor, &key, &data, MDB_FIRST)
                    while rc == 0:
                        if key.mv_size != 16 or session_get(env, txn, <const uint8_t *>key.mv_data, &row, &failure) != 0:
                            rc = CODE_CORRUPT
                            break
                        if row.changed > since:
                            result.append((DATABASE_SESSIONS, PyBytes_FromStringAndSize(<char *>key.mv_data, 16),
                                           PyBytes_FromStringAndSize(<char *>&row, SESSION_ROW)))
                        rc = mdb_cursor_get(cursor, &key, &data, MDB_NEXT)
                    mdb_cursor_close(cursor)
            if rc != MDB_NOTFOUND:
                if failure.code == 0:
                    fail(&failure, rc if rc else CODE_CORRUPT, b"meta rows", NULL, 0)
                raise_failure(env, &failure)
            return result
        finally:
            self.end()

    def meta(self):
        """Return every row of the meta database as stored: {name: value with its check}."""
        cdef MDB_cursor *cursor
        cdef MDB_val key, data
        cdef Failure failure
        cdef int rc
        cdef MDB_txn *txn = self.begin()
        result = {}
        try:
            rc = mdb_cursor_open(txn, self.environment.meta, &cursor)
            if rc == 0:
                rc = mdb_cursor_get(cursor, &key, &data, MDB_FIRST)
                while rc == 0:
                    result[PyBytes_FromStringAndSize(<char *>key.mv_data, key.mv_size)] = \
                        PyBytes_FromStringAndSize(<char *>data.mv_data, data.mv_size)
                    rc = mdb_cursor_get(cursor, &key, &data, MDB_NEXT)
                mdb_cursor_close(cursor)
            if rc != MDB_NOTFOUND:
                failure.code = 0
                fail(&failure, rc, b"meta", NULL, 0)
                raise_failure(self.environment, &failure)
            return result
        finally:
            self.end()

    def verify(self, size_t damages_max):
        """Check everything in this view; return (records, damages), damages as (what, key or None) tuples.

        Every record's checks, the root and both counts against the records and the deterministic rows, every change
        entry against its record and every record against its change entry.
        """
        cdef Environment env = self.environment
        cdef MDB_cursor *cursor
        cdef MDB_cursor *changes
        cdef MDB_val key, data, name, position
        cdef Header header
        cdef Failure failure
        cdef Sum root, digest
        cdef uint64_t count = 0
        cdef uint64_t live = 0
        cdef uint64_t sequence, image, entries
        cdef uint32_t check
        cdef int rc, found
        cdef size_t steps
        cdef Work work
        cdef bint damaged
        cdef MDB_txn *txn = self.begin()
        root.low = root.high = 0
        damages = []
        try:
            memset(&work, 0, sizeof(Work))
            failure.code = 0
            work.failure = &failure
            rc = mdb_cursor_open(txn, env.records, &cursor)
            if rc == 0:
                rc = mdb_cursor_open(txn, env.changes, &changes)
            if rc != 0:
                fail(&failure, rc, b"verify", NULL, 0)
                raise_failure(env, &failure)
            rc = mdb_cursor_get(cursor, &key, &data, MDB_FIRST)
            while rc == 0 and <size_t>len(damages) < damages_max:
                damaged = False
                steps = 0
                with nogil:
                    while rc == 0 and steps < 100000:
                        steps += 1
                        count += 1
                        if not record_read(<const uint8_t *>key.mv_data, key.mv_size, <const uint8_t *>data.mv_data,
                                           data.mv_size, &header):
                            damaged = True
                            break
                        if not header.flags & TOMBSTONE:
                            live += 1
                        digest = digest_of(env, <const uint8_t *>key.mv_data, key.mv_size, &header)
                        sum_add(&root, &digest)
                        if has_change_entry(&self.state, &header):
                            sequence = header.sequence
                            position.mv_data = &sequence
                            position.mv_size = 8
                            found = mdb_cursor_get(changes, &position, &name, MDB_SET)
                            if found != 0 or compare_keys(<const uint8_t *>name.mv_data, name.mv_size,
                                                          <const uint8_t *>key.mv_data, key.mv_size):
                                damaged = True
                                break
                        rc = mdb_cursor_get(cursor, &key, &data, MDB_NEXT)
                if damaged:
                    what = "record" if not record_read(<const uint8_t *>key.mv_data, key.mv_size,
                                                       <const uint8_t *>data.mv_data, data.mv_size, &header) \
                        else "change entry missing"
                    damages.append((what, PyBytes_FromStringAndSize(<char *>key.mv_data, key.mv_size)))
                    rc = mdb_cursor_get(cursor, &key, &data, MDB_NEXT)
            mdb_cursor_close(cursor)
            mdb_cursor_close(changes)
            if rc != MDB_NOTFOUND and rc != 0:
                damages.append((f"records: {strerror(rc)}", None))
            # Change entries: each names a record; those that the record does not point back to are dead.
            entries = 0
            image = 0
            rc = mdb_cursor_open(txn, env.changes, &changes)
            if rc == 0:
                rc = mdb_cursor_open(txn, env.records, &cursor)
            if rc == 0:
                rc = mdb_cursor_get(changes, &key, &name, MDB_FIRST)
            while rc == 0:
                with nogil:
                    steps = 0
                    while rc == 0 and steps < 100000:
                        steps += 1
                        memcpy(&sequence, key.mv_data, 8)
                        found = change_is_live(env, &work, cursor, sequence, &name, &header)
                        if found < 0:
                            failure.code = 0
                        elif found == 0:
                            image += 1
                        entries += 1
                        rc = mdb_cursor_get(changes, &key, &name, MDB_NEXT)
            mdb_cursor_close(cursor)
            mdb_cursor_close(changes)
            if rc != MDB_NOTFOUND:
                damages.append((f"changes: {strerror(rc)}", None))
            elif not damages and image != self.state.dead:
                damages.append((f"dead change entries: {image} found, {self.state.dead} recorded", None))
            # Deterministic rows.
            for database, domain, tail in ((env.requests, DOMAIN_REQUEST, 4), (env.sessions, DOMAIN_SESSION, 4)):
                rc = mdb_cursor_open(txn, database, &cursor)
                if rc == 0:
                    rc = mdb_cursor_get(cursor, &key, &data, MDB_FIRST)
                    while rc == 0:
                        if data.mv_size < 5:
                            damages.append(("request or session row", None))
                            break
                        digest = row_digest(env.seed, domain, <const uint8_t *>key.mv_data, key.mv_size,
                                            <const uint8_t *>data.mv_data, data.mv_size - 4)
                        sum_add(&root, &digest)
                        rc = mdb_cursor_get(cursor, &key, &data, MDB_NEXT)
                    mdb_cursor_close(cursor)
                if rc != MDB_NOTFOUND and rc != 0:
                    damages.append((f"requests: {strerror(rc)}", None))
            if self.state.purge_mark:
                image = self.state.purge_mark
                digest = row_digest(env.seed, DOMAIN_META, b"purge", 5, <const uint8_t *>&image, 8)
                sum_add(&root, &digest)
            if not damages:
                if count != self.state.count or live != self.state.live_count:
                    damages.append((f"count: {count} records of which {live} live found, {self.state.count} and "
                                    f"{self.state.live_count} recorded", None))
                elif env.digests and not sum_equal(&root, &self.state.root):
                    damages.append(("root: the records do not add up to it", None))
            return count, damages
        finally:
            self.end()
