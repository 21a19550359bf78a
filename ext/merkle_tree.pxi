# The tree: leaves in blocks, built by a walk, brought up to date from notes; what they locate.

cdef class Tree:
    """The leaves of one tablet. One tree an environment; calls are serialized by the caller.

    ``boundary_bits`` and ``id_bits`` other than 5 and 47 are for tests that want rare things often.
    """

    def __cinit__(self, Environment environment not None, *, int boundary_bits=BOUNDARY_BITS, int id_bits=ID_BITS):
        if not 0 <= boundary_bits <= 16 or not 1 <= id_bits <= ID_BITS:
            raise errors.InvalidValue("a tree has 0 to 16 boundary bits and ids of 1 to 47 bits")
        self.environment = environment
        self.mask = (<uint64_t>1 << boundary_bits) - 1
        self.id_shift = 64 - id_bits
        self.damaged = []
        self.buckets = <int8_t *>calloc(BUCKETS, 1)
        if self.buckets is NULL:
            raise MemoryError

    def __dealloc__(self):
        self.clear()
        notes_free(&self.taken)
        free(self.buckets)

    cdef void clear(self) noexcept nogil:
        cdef size_t i, k
        for i in range(self.block_count):
            for k in range(self.blocks[i].used):
                free(self.blocks[i].leaves[k].key)
            free(self.blocks[i].leaves)
            free(self.blocks[i].prefixes)
            free(self.blocks[i])
        free(self.blocks)
        self.blocks = NULL
        self.block_count = self.block_room = self.leaf_count = self.dirty = 0
        self.txn = 0

    def drop(self):
        """Forget the leaves and stop tracking: the tree is cold."""
        self.clear()
        track(self.environment, False)

    @property
    def warm(self):
        """Whether there are leaves that notes can bring up to date."""
        return self.txn != 0

    @property
    def sum(self):
        """The sum of the digests of all records, 16 bytes: the root without the deterministic rows."""
        return PyBytes_FromStringAndSize(<char *>&self.total, 16)

    @property
    def estimator(self):
        """The buckets, ESTIMATOR_BYTES."""
        return PyBytes_FromStringAndSize(<char *>self.buckets, BUCKETS)

    @property
    def memory_bytes(self):
        """Bytes of the leaves, without their keys."""
        return self.block_count * BLOCK_LEAVES * (sizeof(Leaf) + 8) + self.taken.room

    # --- blocks ----------------------------------------------------------------------------------------------------

    cdef bint put_leaf(self, const Leaf *leaf) noexcept nogil:
        """Append a leaf while building and add it to sum and count; the tree owns its key from then on."""
        cdef Block *block
        if self.block_count == 0 or self.blocks[self.block_count - 1].used >= BLOCK_FILL:
            block = new_block(self, self.block_count)
            if block is NULL:
                return False
        block = self.blocks[self.block_count - 1]
        block.leaves[block.used] = leaf[0]
        block.prefixes[block.used] = prefix_of(leaf.key, leaf.key_bytes) if leaf.key is not NULL else 0
        block.used += 1
        self.leaf_count += 1
        add(&self.total, &leaf.sum)
        self.count += leaf.count
        return True

    # --- building --------------------------------------------------------------------------------------------------

    def build(self, Reader reader not None, Reader other=None):
        """Sum up all records of a reader's view; a second reader of the same transaction takes half of the work.

        Tracking is on from here. Returns False when the two readers do not see the same transaction. Raises
        CorruptionError when a page is damaged; records that are damaged alone are left out and named in ``damaged``.
        """
        cdef Half one, two
        cdef Gather first, second
        cdef Environment env = self.environment
        cdef size_t at, b
        cdef bint good
        self.clear()
        if not env.tracked:
            raise errors.NotReady("tracking is turned on before the reader is opened")
        memset(&one, 0, sizeof(Half))
        memset(&two, 0, sizeof(Half))
        try:
            if not gather_open(&first, self, reader) or not gather_open(&second, self, reader):
                raise MemoryError
            second.backward = True
            first.open.id = XXH3_64bits_withSeed(b"", 0, env.seed) >> self.id_shift
            one.visit = two.visit = visit_gather
            one.context = &first
            two.context = &second
            if walk_both(self, reader, other, &one, &two) == 0:
                return False
            self.txn = one.number
            with nogil:
                leaf_join(&first.open, &second.open)
                good = gather_close(&first)
                self.total.low = self.total.high = 0
                self.count = 0
                at = 0
                while good and at < first.used:
                    good = self.put_leaf(&first.leaves[at])
                    if good:
                        first.leaves[at].key = NULL
                        at += 1
                at = second.used
                while good and at:
                    good = self.put_leaf(&second.leaves[at - 1])
                    if good:
                        second.leaves[at - 1].key = NULL
                        at -= 1
                for b in range(BUCKETS):
                    self.buckets[b] = <int8_t>(<uint8_t>first.buckets[b] + <uint8_t>second.buckets[b])
            if not good:
                self.clear()
                raise MemoryError
            self.walked += self.count
            self.live_count = first.live + second.live
            self.entries = first.entries + second.entries
            self.damaged = damaged_keys(&first) + damaged_keys(&second)[::-1]
            return True
        finally:
            gather_free(&first)
            gather_free(&second)

    def start_tracking(self):
        """Turn tracking on; the reader to build from is opened after it."""
        track(self.environment, True)

    # --- keeping up ------------------------------------------------------------------------------------------------

    def advance(self, Reader reader not None):
        """Bring the leaves to the reader's transaction; False: they cannot be (cold, notes lost), build again."""
        cdef Environment env = self.environment
        cdef uint64_t txn, lost
        cdef MDB_txn *raw
        cdef Failure failure
        cdef int rc = 1
        cdef bint good = True
        if reader.environment is not env:
            raise errors.InvalidValue("the reader is of another tablet")
        if self.txn == 0:
            return False
        failure.code = 0
        raw = reader.begin()
        try:
            with nogil:
                txn = txn_number(reader)
                while True:
                    # A commit that the reader sees is published an instant later, by the thread that made it.
                    rc = take_notes(env, txn, &self.taken, &lost)
                    if rc != 1:
                        break
                    sr_yield()
                if rc != 0 or lost > self.txn or txn < self.txn:
                    self.clear()
                    good = False
                else:
                    good = apply_notes(self)
                    self.txn = txn
                    if good and self.dirty:
                        rc = rescan(self, raw, &failure)
        finally:
            reader.end()
        if not good:
            self.clear()
            return False
        if rc != 0:
            self.clear()
            raise_walk(env, &failure)
        return True

    # --- looking -----------------------------------------------------------------------------------------------------

    def leaf_key(self, size_t ordinal):
        """Return the first key of a leaf, b"" for the first; None past the last."""
        cdef size_t b = 0
        if ordinal >= self.leaf_count:
            return None
        while ordinal >= self.blocks[b].used:
            ordinal -= self.blocks[b].used
            b += 1
        return PyBytes_FromStringAndSize(<char *>self.blocks[b].leaves[ordinal].key,
                                         self.blocks[b].leaves[ordinal].key_bytes)

    def leaves(self):
        """Return [(first key, id, sum, value sum, weighted sum, count)]; for tests and the dump of leaf digests."""
        cdef size_t b, k
        cdef Leaf *leaf
        result = []
        for b in range(self.block_count):
            for k in range(self.blocks[b].used):
                leaf = &self.blocks[b].leaves[k]
                result.append((PyBytes_FromStringAndSize(<char *>leaf.key, leaf.key_bytes), leaf.id,
                               PyBytes_FromStringAndSize(<char *>&leaf.sum, 16), leaf.value_sum,
                               (<object>leaf.weighted.high << 64) | leaf.weighted.low, leaf.count))
        return result

    def digests(self):
        """Return the dump of leaf digests: 6 bytes id and 8 bytes of the sum for each leaf, in key order."""
        cdef size_t b, k
        cdef Leaf *leaf
        cdef bytes out = PyBytes_FromStringAndSize(NULL, 14 * self.leaf_count)
        cdef uint8_t *data = <uint8_t *>PyBytes_AS_STRING(out)
        with nogil:
            for b in range(self.block_count):
                for k in range(self.blocks[b].used):
                    leaf = &self.blocks[b].leaves[k]
                    memcpy(data, &leaf.id, 6)
                    memcpy(data + 6, &leaf.sum, 8)
                    data += 14
        return out

    def find_leaves(self, list ids not None):
        """Return {id: ordinal} of the leaves with these ids."""
        cdef uint64_t mask = 0
        cdef uint64_t at
        cdef size_t b, k
        cdef size_t ordinal = 0
        cdef uint64_t *table = wanted_table(ids, &mask)
        result = {}
        for b in range(self.block_count):
            for k in range(self.blocks[b].used):
                at = (self.blocks[b].leaves[k].id * <uint64_t>0x9E3779B97F4A7C15 >> 20) & mask
                while table[at]:
                    if table[at] == self.blocks[b].leaves[k].id + 1:
                        result[self.blocks[b].leaves[k].id] = ordinal
                        break
                    at = (at + 1) & mask
                ordinal += 1
        free(table)
        return result

    def leaves_at(self, list positions not None):
        """Return the ordinals of the leaves that hold the records at these positions, which rise; each leaf once."""
        cdef size_t b, k
        cdef size_t ordinal = 0
        cdef uint64_t seen = 0
        cdef Py_ssize_t i = 0
        cdef Py_ssize_t count = len(positions)
        cdef uint64_t position
        result = []
        if count == 0:
            return result
        position = positions[0]
        for b in range(self.block_count):
            for k in range(self.blocks[b].used):
                seen += self.blocks[b].leaves[k].count
                if position < seen:
                    result.append(ordinal)
                    while i < count:
                        position = positions[i]
                        if position >= seen:
                            break
                        i += 1
                    if i == count:
                        return result
                ordinal += 1
        return result

    def records(self, Reader reader not None, size_t first, size_t last, list ids, bint with_rows, bytes_max=None):
        """Return [(id, value, key, digest, row or None, bytes of the row)] of the records in leaves [first, last), those of ``ids`` or all.

        The reader is the one that the leaves stand at. Rows are checked: CorruptionError for a value that is damaged.
        """
        start = self.leaf_key(first)
        stop = self.leaf_key(last)
        return self.records_between(reader, start, stop, ids, with_rows, bytes_max)

    def records_of(self, Reader reader not None, list ordinals not None, list ids not None, bint with_rows):
        """Return [(leaf ordinal, id, key, row or None)] of the records with one of ``ids`` in these leaves, which rise."""
        cdef Environment env = self.environment
        cdef Pick pick
        cdef Failure failure
        cdef Range bounds
        cdef Picked *found
        cdef MDB_txn *txn
        cdef size_t b = 0
        cdef size_t before = 0
        cdef size_t ordinal, k, i
        cdef int rc = 0
        cdef bytes row
        memset(&pick, 0, sizeof(Pick))
        failure.code = 0
        pick.seed = env.seed
        pick.shift = self.id_shift
        pick.bytes_max = <size_t>-1
        pick.wanted = wanted_table(ids, &pick.wanted_mask)
        result = []
        try:
            txn = reader.begin()
            try:
                for ordinal in ordinals:
                    if ordinal >= self.leaf_count or ordinal < before:
                        raise errors.InvalidValue("leaf ordinals rise and are below their number")
                    while ordinal - before >= self.blocks[b].used:
                        before += self.blocks[b].used
                        b += 1
                    k = ordinal - before
                    memset(&bounds, 0, sizeof(Range))
                    bounds.start = self.blocks[b].leaves[k].key
                    bounds.start_bytes = self.blocks[b].leaves[k].key_bytes
                    if ordinal + 1 < self.leaf_count:
                        found_next(self, b, k, &bounds)
                    pick.used = 0
                    with nogil:
                        rc = walk_records(env, txn, &bounds, visit_pick, &pick, &failure)
                    if rc != 0:
                        raise_walk(env, &failure)
                    for i in range(pick.used):
                        found = &pick.found[i]
                        row = picked_row(env, found) if with_rows else None
                        result.append((ordinal, found.id, PyBytes_FromStringAndSize(<char *>found.key, found.key_bytes),
                                       row))
            finally:
                reader.end()
        finally:
            free(pick.found)
            free(pick.wanted)
        return result

    def records_between(self, Reader reader not None, bytes start, bytes stop, list ids, bint with_rows, bytes_max=None):
        """Return as `records` does, of keys in [start, stop); stop None: to the end.

        QuotaExceeded when rows and what they take as objects are more than ``bytes_max``.
        """
        cdef Environment env = self.environment
        cdef Range bounds
        cdef Pick pick
        cdef Failure failure
        cdef Picked *found
        cdef MDB_txn *txn
        cdef size_t i
        cdef int rc
        cdef bytes row
        memset(&bounds, 0, sizeof(Range))
        memset(&pick, 0, sizeof(Pick))
        failure.code = 0
        bounds.start = <const uint8_t *><const char *>start
        bounds.start_bytes = len(start)
        if stop is not None:
            bounds.stop = <const uint8_t *><const char *>stop
            bounds.stop_bytes = len(stop)
            bounds.has_stop = True
        pick.seed = env.seed
        pick.shift = self.id_shift
        pick.every = ids is None
        pick.bytes_max = <size_t>-1 if bytes_max is None else max(bytes_max, 0)
        if ids is not None:
            pick.wanted = wanted_table(ids, &pick.wanted_mask)
        result = []
        try:
            txn = reader.begin()
            try:
                with nogil:
                    rc = walk_records(env, txn, &bounds, visit_pick, &pick, &failure)
                if rc == CODE_ENOUGH:
                    raise errors.QuotaExceeded(f"more than {bytes_max} bytes of records", limit=bytes_max)
                if rc != 0:
                    raise_walk(env, &failure)
                for i in range(pick.used):
                    found = &pick.found[i]
                    row = picked_row(env, found) if with_rows else None
                    result.append((found.id, value_of(&found.digest),
                                   PyBytes_FromStringAndSize(<char *>found.key, found.key_bytes),
                                   PyBytes_FromStringAndSize(<char *>&found.digest, 16), row,
                                   row_size(found.key_bytes, &found.header)))
            finally:
                reader.end()
        finally:
            free(pick.found)
            free(pick.wanted)
        return result

    def two_records(self, Reader reader not None, size_t ordinal, int64_t value, weighted, size_t records_max):
        """Return the key ids of the two records that make a leaf differ by (value, weighted), or None.

        None also for a leaf of more than ``records_max`` records: the work is their number squared.
        """
        cdef Pick pick
        cdef Range bounds
        cdef Failure failure
        cdef MDB_txn *txn
        cdef uint64_t *ids = NULL
        cdef uint64_t one = 0
        cdef uint64_t two = 0
        cdef uint64_t low, high
        cdef size_t i
        cdef int rc
        cdef int found = 0
        wide = weighted & ((1 << 128) - 1)
        low = wide & 0xffffffffffffffff
        high = wide >> 64
        start, stop = self.leaf_key(ordinal), self.leaf_key(ordinal + 1)
        memset(&pick, 0, sizeof(Pick))
        memset(&bounds, 0, sizeof(Range))
        failure.code = 0
        bounds.start = <const uint8_t *><const char *>start
        bounds.start_bytes = len(start)
        if stop is not None:
            bounds.stop = <const uint8_t *><const char *>stop
            bounds.stop_bytes = len(stop)
            bounds.has_stop = True
        pick.seed = self.environment.seed
        pick.shift = self.id_shift
        pick.every = True
        pick.bytes_max = <size_t>-1
        try:
            txn = reader.begin()
            try:
                with nogil:
                    rc = walk_records(self.environment, txn, &bounds, visit_pick, &pick, &failure)
            finally:
                reader.end()
            if rc != 0:
                raise_walk(self.environment, &failure)
            if not 0 < pick.used <= records_max:
                return None
            ids = <uint64_t *>malloc(2 * pick.used * sizeof(uint64_t))
            if ids is NULL:
                raise MemoryError
            with nogil:
                for i in range(pick.used):
                    ids[i] = pick.found[i].id
                    ids[pick.used + i] = value_of(&pick.found[i].digest)
                found = sr_two_of(value, low, high, ids, ids + pick.used, pick.used,
                                  (<uint64_t>1 << (64 - self.id_shift)) - 1, &one, &two)
            return (one, two) if found else None
        finally:
            free(pick.found)
            free(ids)

    def compare_rows(self, Reader reader not None, const uint8_t[::1] rows not None):
        """Return [(key, whether the record here is the same, start, end)] of encoded rows; FrameError if malformed."""
        cdef Operation row
        cdef Failure failure
        cdef size_t size = rows.shape[0]
        cdef size_t at = 0
        cdef size_t used = 0
        cdef MDB_txn *txn
        cdef int here
        result = []
        if size == 0:
            return result
        txn = reader.begin()
        try:
            while at < size:
                if not row_parse(&rows[at], &rows[0] + size, &row, &used):
                    raise errors.FrameError(f"row {len(result)} is malformed", ordinal=len(result))
                here = row_is_here(self.environment, txn, &row)
                if here not in (0, 1):
                    memset(&failure, 0, sizeof(Failure))
                    failure.code = here
                    raise_walk(self.environment, &failure)
                result.append((PyBytes_FromStringAndSize(<char *>row.key, row.key_bytes), bool(here), at, at + used))
                at += used
        finally:
            reader.end()
        return result

    def rows_digest(self, Reader reader not None):
        """Return the sum of the digests of requests, sessions and purge mark: the root without its records."""
        cdef Failure failure
        cdef Sum total
        cdef MDB_txn *txn
        failure.code = 0
        txn = reader.begin()
        try:
            total = rows_digest(self.environment, txn, &reader.state, &failure)
        finally:
            reader.end()
        if failure.code != 0:
            raise_walk(self.environment, &failure)
        return PyBytes_FromStringAndSize(<char *>&total, 16)


def differing_ranges(Tree here not None, Tree there not None):
    """Return [(start, stop or None)]: the key ranges between boundaries common to both trees whose sums differ."""
    cdef size_t here_block = 0
    cdef size_t here_index = 0
    cdef size_t there_block = 0
    cdef size_t there_index = 0
    cdef Leaf *one
    cdef Leaf *other
    cdef Leaf *start = NULL
    cdef Sum difference
    cdef int64_t count = 0
    cdef int order
    if here.dirty or there.dirty or here.txn == 0 or there.txn == 0:
        raise errors.NotReady("the trees are not up to date")
    difference.low = difference.high = 0
    result = []
    while True:
        one = &here.blocks[here_block].leaves[here_index] if here_block < here.block_count else NULL
        other = &there.blocks[there_block].leaves[there_index] if there_block < there.block_count else NULL
        order = 0
        if one is not NULL and other is not NULL:
            order = order_of(one.key, one.key_bytes, other.key, other.key_bytes)
        elif one is not NULL:
            order = -1
        elif other is not NULL:
            order = 1
        if order == 0:
            if start is not NULL and (difference.low or difference.high or count):
                result.append((PyBytes_FromStringAndSize(<char *>start.key, start.key_bytes), None if one is NULL else
                               PyBytes_FromStringAndSize(<char *>one.key, one.key_bytes)))
            difference.low = difference.high = 0
            count = 0
            start = one
            if one is NULL:
                return result
        if order <= 0:
            add(&difference, &one.sum)
            count += one.count
            here_index += 1
            if here_index == here.blocks[here_block].used:
                here_index = 0
                here_block += 1
        if order >= 0:
            subtract(&difference, &other.sum)
            count -= other.count
            there_index += 1
            if there_index == there.blocks[there_block].used:
                there_index = 0
                there_block += 1
