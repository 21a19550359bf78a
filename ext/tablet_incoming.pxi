# Rows and meta rows on their way into a transaction.

cdef class _Incoming:
    """A submission of rows, and what it points to: one owner. ``kept`` holds the objects whose bytes are borrowed.

    `add_rows` once at most, then `add_removed`, which fills what room was left for; `add_meta` once.
    """

    cdef Submission job
    cdef Operation *operations
    cdef MetaRow *made
    cdef size_t room
    cdef list kept

    def __cinit__(self):
        memset(&self.job, 0, sizeof(Submission))
        self.kept = []

    def __dealloc__(self):
        free(self.operations)
        free(self.made)

    cdef int begin_at(self, base, const Sum *standing) except -1:
        """Ask for the position (sequence, root) before; root None: the one that is ``standing``."""
        cdef bytes root
        sequence, root = base
        self.job.base.sequence = sequence
        if root is None and standing is not NULL:
            self.job.base.root = standing[0]
        elif root is None or len(root) != 16:
            raise errors.InvalidValue("a root has 16 bytes")
        else:
            memcpy(&self.job.base.root, PyBytes_AS_STRING(root), 16)
        self.job.check_base = True
        return 0

    cdef int end_at(self, bytes target) except -1:
        """Ask for root and count of a state row at the end."""
        load_state(target, &self.job.target)
        self.job.check_target = True
        return 0

    cdef int add_rows(self, const uint8_t[::1] rows, size_t more) except -1:
        """Read rows, and leave room for ``more`` operations. FrameError for anything that is not rows."""
        cdef size_t size = rows.shape[0]
        cdef const uint8_t *data = &rows[0] if size else NULL
        cdef size_t at = 0
        cdef size_t used = 0
        cdef size_t count = 0
        cdef size_t room
        cdef bint good = True
        with nogil:
            room = count_rows_unchecked(data, size)
            self.operations = <Operation *>malloc((room + more + 1) * sizeof(Operation))
            while self.operations is not NULL and good and at < size:
                good = count < room and row_read(data + at, data + size, &self.operations[count], &used)
                at += used
                count += 1
        if self.operations is NULL:
            raise MemoryError
        if not good:
            raise errors.FrameError(f"row {count} is malformed", ordinal=count)
        self.room = count + more
        self.job.bytes = size
        self.job.operations = self.operations
        self.job.operation_count = count
        return 0

    cdef int add_removed(self, list keys) except -1:
        """Take keys away, whatever stands at them."""
        cdef Operation *operation
        for key in keys:
            check_key(key)
            assert self.job.operation_count < self.room, (self.job.operation_count, self.room)
            operation = &self.operations[self.job.operation_count]
            memset(operation, 0, sizeof(Operation))
            set_operation(operation, REMOVE, key, None)
            self.kept.append(key)
            self.job.operation_count += 1
        return 0

    cdef int add_meta(self, rows) except -1:
        """Write [(database, name, value, or None to delete)]; those of DATABASE_META get their check here."""
        cdef MetaRow *row
        cdef bytes name, value
        self.made = <MetaRow *>calloc(len(rows) + 1, sizeof(MetaRow))
        if self.made is NULL:
            raise MemoryError
        self.job.rows = self.made
        for database, name, value in rows:
            if database == DATABASE_META and value is not None:
                value = with_check(name, value)
            self.kept.append((name, value))
            row = &self.made[self.job.row_count]
            row.database = database
            row.name = <const uint8_t *>PyBytes_AS_STRING(name)
            row.name_bytes = PyBytes_GET_SIZE(name)
            if value is not None:
                row.value = <const uint8_t *>PyBytes_AS_STRING(value)
                row.value_bytes = PyBytes_GET_SIZE(value)
            self.job.row_count += 1
        return 0


cdef size_t count_rows_unchecked(const uint8_t *data, size_t size) noexcept nogil:
    """At least as many rows as there are, if these are rows: by their declared sizes, or of few bytes by the smallest."""
    cdef size_t count = size // (ROW_HEADER + 1) + 1
    cdef size_t at = 0
    if count <= 4096:
        return count
    count = 0
    while at < size and size - at >= ROW_HEADER:
        at += row_size_unchecked(data + at)
        count += 1
    return count


cdef inline size_t row_size_unchecked(const uint8_t *row) noexcept nogil:
    cdef uint16_t key_bytes
    cdef uint32_t value_bytes
    memcpy(&key_bytes, row + 2, 2)
    memcpy(&value_bytes, row + 4, 4)
    return ROW_HEADER + <size_t>key_bytes + 16 * <size_t>row[1] + value_bytes
