# The tree: leaves in blocks, built by a walk, brought up to date from notes.

cdef inline void add(Sum *total, const Sum *part) noexcept nogil:
    cdef uint64_t low = total.low + part.low
    total.high = total.high + part.high + (1 if low < part.low else 0)
    total.low = low


cdef inline void subtract(Sum *total, const Sum *part) noexcept nogil:
    total.high = total.high - part.high - (1 if total.low < part.low else 0)
    total.low = total.low - part.low


cdef inline uint64_t value_of(const Sum *digest) noexcept nogil:
    cdef uint64_t value = digest.low >> 24
    return value if value else 1


cdef extern from *:
    """
    static inline void sr_weigh(uint64_t value, uint64_t id, uint64_t *low, uint64_t *high) {
        sr_u128 product = (sr_u128)value * id;
        *low = (uint64_t)product;
        *high = (uint64_t)(product >> 64);
    }
    """
    void sr_weigh(uint64_t value, uint64_t id, uint64_t *low, uint64_t *high) noexcept nogil


cdef inline void count_bucket(int8_t *buckets, uint64_t id, int shift, uint64_t value, bint taken) noexcept nogil:
    """Add (or take) a record to the estimator. Buckets wrap modulo 256; unsigned arithmetic keeps that defined."""
    cdef uint64_t wide = id << shift >> 17
    cdef uint64_t at = (<uint64_t><uint32_t>wide * <uint64_t>BUCKETS) >> 32
    cdef uint8_t step = <uint8_t>(value & 1)
    if ((wide >> 46) & 1) != taken:
        step = <uint8_t>-step
    buckets[at] = <int8_t>(<uint8_t>buckets[at] + step)


cdef inline void leaf_add(Leaf *leaf, const Sum *digest, uint64_t id) noexcept nogil:
    cdef uint64_t value = value_of(digest)
    cdef Sum product
    add(&leaf.sum, digest)
    sr_weigh(value, id, &product.low, &product.high)
    add(&leaf.weighted, &product)
    leaf.value_sum += value
    leaf.count += 1


cdef inline void leaf_subtract(Leaf *leaf, const Sum *digest, uint64_t id) noexcept nogil:
    cdef uint64_t value = value_of(digest)
    cdef Sum product
    subtract(&leaf.sum, digest)
    sr_weigh(value, id, &product.low, &product.high)
    subtract(&leaf.weighted, &product)
    leaf.value_sum -= value
    leaf.count -= 1


cdef inline void leaf_join(Leaf *leaf, const Leaf *other) noexcept nogil:
    add(&leaf.sum, &other.sum)
    add(&leaf.weighted, &other.weighted)
    leaf.value_sum += other.value_sum
    leaf.count += other.count


cdef inline uint64_t prefix_of(const uint8_t *key, size_t size) noexcept nogil:
    cdef uint64_t prefix = 0
    memcpy(&prefix, key, size if size < 8 else 8)
    return bswap64(prefix)


cdef inline int order_of(const uint8_t *one, size_t one_bytes, const uint8_t *other, size_t other_bytes) noexcept nogil:
    cdef int order = memcmp(one, other, one_bytes if one_bytes < other_bytes else other_bytes)
    if order:
        return order
    return -1 if one_bytes < other_bytes else (1 if one_bytes > other_bytes else 0)


cdef struct Gather:              # what a walk sums up
    Leaf *leaves                 # closed ones; backward walks close them in falling order
    size_t used
    size_t room
    Leaf open                    # forward: the leaf being summed; backward: records before the last boundary met
    const State *state
    uint64_t seed
    uint64_t mask
    int64_t count
    int64_t live
    int64_t entries
    Sum total
    int8_t *buckets
    uint8_t *damaged             # u16 size and key of each record that cannot be read
    size_t damaged_used
    size_t damaged_count
    int shift
    bint backward


cdef bint gather_close(Gather *gather) noexcept nogil:
    cdef size_t room
    cdef Leaf *leaves
    if gather.used == gather.room:
        room = 2 * gather.room if gather.room else 1024
        leaves = <Leaf *>realloc(gather.leaves, room * sizeof(Leaf))
        if leaves is NULL:
            return False
        gather.leaves = leaves
        gather.room = room
    gather.leaves[gather.used] = gather.open
    gather.used += 1
    memset(&gather.open, 0, sizeof(Leaf))
    return True


cdef bint leaf_begin(Leaf *leaf, const uint8_t *key, size_t key_bytes, uint64_t id) noexcept nogil:
    leaf.key = <uint8_t *>malloc(key_bytes)
    if leaf.key is NULL:
        return False
    memcpy(leaf.key, key, key_bytes)
    leaf.key_bytes = <uint16_t>key_bytes
    leaf.id = id
    return True


cdef int visit_gather(void *context, const uint8_t *key, size_t key_bytes, const Header *header,
                      const Sum *digest) noexcept nogil:
    cdef Gather *gather = <Gather *>context
    cdef uint64_t hashed, id
    cdef uint16_t size
    cdef bint boundary
    if header is NULL:
        gather.damaged_count += 1
        if gather.damaged_count <= DAMAGED_MAX:
            if gather.damaged is NULL:
                gather.damaged = <uint8_t *>malloc(DAMAGED_MAX * 514)
                if gather.damaged is NULL:
                    return CODE_NO_MEMORY
            size = <uint16_t>key_bytes
            memcpy(gather.damaged + gather.damaged_used, &size, 2)
            memcpy(gather.damaged + gather.damaged_used + 2, key, key_bytes)
            gather.damaged_used += 2 + key_bytes
        return 0
    hashed = XXH3_64bits_withSeed(key, key_bytes, gather.seed)
    id = hashed >> gather.shift
    boundary = (hashed & gather.mask) == 0
    if boundary and not gather.backward:
        if not gather_close(gather) or not leaf_begin(&gather.open, key, key_bytes, id):
            return CODE_NO_MEMORY
    leaf_add(&gather.open, digest, id)
    if boundary and gather.backward:
        if not leaf_begin(&gather.open, key, key_bytes, id) or not gather_close(gather):
            return CODE_NO_MEMORY
    add(&gather.total, digest)
    count_bucket(gather.buckets, id, gather.shift, value_of(digest), False)
    gather.count += 1
    if not header.flags & TOMBSTONE:
        gather.live += 1
    if keeps_change_entry(gather.state, header):
        gather.entries += 1
    return 0


cdef void gather_free(Gather *gather) noexcept nogil:
    cdef size_t i
    for i in range(gather.used):
        free(gather.leaves[i].key)
    free(gather.leaves)
    free(gather.open.key)
    free(gather.buckets)
    free(gather.damaged)
    memset(gather, 0, sizeof(Gather))


cdef struct Half:                # one of two walks from both ends
    void *environment
    MDB_txn *txn
    Range bounds
    Gather gather
    Failure failure
    int rc


cdef void *run_half(void *context) noexcept nogil:
    cdef Half *half = <Half *>context
    half.rc = sr_walk_half(half)
    return NULL


cdef int sr_walk_half(Half *half) noexcept nogil:
    with gil:
        environment = <Environment>half.environment
        with nogil:
            return walk_records(environment, half.txn, &half.bounds, visit_gather, &half.gather, &half.failure)


cdef struct Picked:
    const uint8_t *key
    size_t key_bytes
    Header header
    Sum digest
    uint64_t id


cdef struct Pick:
    Picked *found
    size_t used
    size_t room
    uint64_t *wanted             # open addressing; 0 is an empty place, so ids are kept plus one
    uint64_t wanted_mask
    uint64_t seed
    int shift
    bint every
    size_t bytes
    size_t bytes_max             # CODE_ENOUGH beyond it


cdef int visit_pick(void *context, const uint8_t *key, size_t key_bytes, const Header *header,
                    const Sum *digest) noexcept nogil:
    cdef Pick *pick = <Pick *>context
    cdef Picked *found
    cdef uint64_t id, at
    cdef size_t room
    if header is NULL:
        return 0
    id = XXH3_64bits_withSeed(key, key_bytes, pick.seed) >> pick.shift
    if not pick.every:
        at = (id * <uint64_t>0x9E3779B97F4A7C15 >> 20) & pick.wanted_mask
        while pick.wanted[at] and pick.wanted[at] != id + 1:
            at = (at + 1) & pick.wanted_mask
        if not pick.wanted[at]:
            return 0
    pick.bytes += row_size(key_bytes, header)
    if pick.bytes > pick.bytes_max:
        return CODE_ENOUGH
    if pick.used == pick.room:
        room = 2 * pick.room if pick.room else 64
        found = <Picked *>realloc(pick.found, room * sizeof(Picked))
        if found is NULL:
            return CODE_NO_MEMORY
        pick.found = found
        pick.room = room
    found = &pick.found[pick.used]
    found.key = key
    found.key_bytes = key_bytes
    found.header = header[0]
    found.digest = digest[0]
    found.id = id
    pick.used += 1
    return 0


cdef uint64_t *wanted_table(list ids, uint64_t *mask) except NULL:
    cdef uint64_t room = 16
    cdef uint64_t at, id
    cdef uint64_t *table
    while room < 2 * <uint64_t>len(ids):
        room *= 2
    table = <uint64_t *>calloc(room, sizeof(uint64_t))
    if table is NULL:
        raise MemoryError
    mask[0] = room - 1
    for id in ids:
        at = (id * <uint64_t>0x9E3779B97F4A7C15 >> 20) & mask[0]
        while table[at] and table[at] != id + 1:
            at = (at + 1) & mask[0]
        table[at] = id + 1
    return table


cdef extern from *:
    """
    /* Which two records make a difference (value, weighted), given ours: 1 when found.
       Either one of ours is missing there and one of theirs here; or both are ours, missing there or of another value,
       and then their two shares follow from two equations, which rarely have whole solutions for the wrong two. */
    static int sr_two(int64_t value, sr_i128 weighted, const uint64_t *ids, const uint64_t *values, size_t count,
                      uint64_t id_limit, uint64_t *one, uint64_t *two) {
        const sr_i128 limit = (sr_i128)1 << 40;
        for (size_t i = 0; i < count; i++) {
            sr_i128 rest = (sr_i128)value - (sr_i128)values[i];
            sr_i128 wide = weighted - (sr_i128)values[i] * (sr_i128)ids[i];
            if (rest >= 0 || rest <= -limit || wide > 0 || wide % rest) continue;
            sr_i128 other = wide / rest;
            if (other < 0 || other > (sr_i128)id_limit) continue;
            int ours = 0;
            for (size_t k = 0; k < count; k++) ours |= ids[k] == (uint64_t)other;
            if (ours) continue;
            *one = ids[i];
            *two = (uint64_t)other;
            return 1;
        }
        for (size_t i = 0; i < count; i++) {
            sr_i128 rest = weighted - (sr_i128)value * (sr_i128)ids[i];
            for (size_t k = i + 1; k < count; k++) {
                sr_i128 apart = (sr_i128)ids[k] - (sr_i128)ids[i];
                if (!apart) continue;
                /* Nearly all are ruled out by size, before the slow division: the share is less than 2^40. */
                sr_i128 bound = apart < 0 ? -apart * limit : apart * limit;
                if (rest >= bound || rest <= -bound || rest % apart) continue;
                sr_i128 share = rest / apart;
                if (!share || share == value || (sr_i128)value - share >= limit || (sr_i128)value - share <= -limit) continue;
                *one = ids[i];
                *two = ids[k];
                return 1;
            }
        }
        return 0;
    }
    static inline sr_i128 sr_signed(uint64_t low, uint64_t high) { return (sr_i128)sr_wide(low, high); }
    static inline int sr_two_of(int64_t value, uint64_t low, uint64_t high, const uint64_t *ids, const uint64_t *values,
                                size_t count, uint64_t id_limit, uint64_t *one, uint64_t *two) {
        return sr_two(value, sr_signed(low, high), ids, values, count, id_limit, one, two);
    }
    """
    int sr_two_of(int64_t value, uint64_t low, uint64_t high, const uint64_t *ids, const uint64_t *values, size_t count,
                  uint64_t id_limit, uint64_t *one, uint64_t *two) noexcept nogil


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
        """Append a leaf while building; the tree owns its key from then on."""
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
        return True

    # --- building --------------------------------------------------------------------------------------------------

    def build(self, Reader reader not None, Reader other=None):
        """Sum up all records of a reader's view; a second reader of the same transaction takes half of the work.

        Tracking is on from here. Returns False when the two readers do not see the same transaction. Raises
        CorruptionError when a page is damaged; records that are damaged alone are left out and named in ``damaged``.
        """
        cdef Half one, two
        cdef pthread_t thread
        cdef bint threaded = False
        cdef Environment env = self.environment
        cdef int64_t left = 0
        cdef int64_t i
        cdef size_t at, b
        cdef uint16_t size
        cdef bint good
        cdef uint64_t empty
        if reader.environment is not env or (other is not None and other.environment is not env):
            raise errors.InvalidValue("the reader is of another tablet")
        self.clear()
        if not env.tracked:
            raise errors.NotReady("tracking is turned on before the reader is opened")
        memset(&one, 0, sizeof(Half))
        memset(&two, 0, sizeof(Half))
        one.gather.seed = two.gather.seed = env.seed
        one.gather.mask = two.gather.mask = self.mask
        one.gather.shift = two.gather.shift = self.id_shift
        one.gather.state = &reader.state
        two.gather.state = &reader.state
        one.gather.buckets = <int8_t *>calloc(BUCKETS, 1)
        two.gather.buckets = <int8_t *>calloc(BUCKETS, 1)
        one.environment = two.environment = <void *>env
        two.gather.backward = two.bounds.backward = True
        empty = XXH3_64bits_withSeed(b"", 0, env.seed) >> self.id_shift
        one.gather.open.id = empty
        try:
            if one.gather.buckets is NULL or two.gather.buckets is NULL:
                raise MemoryError
            one.txn = reader.begin()
            try:
                if other is not None:
                    two.txn = other.begin()
                try:
                    if other is not None:
                        if txn_number(reader) != txn_number(other):
                            return False
                        left = record_count(env, one.txn)
                        one.bounds.left = two.bounds.left = &left
                    with nogil:
                        if two.txn is not NULL:
                            threaded = pthread_create(&thread, NULL, run_half, &two) == 0
                            if not threaded:
                                one.bounds.left = NULL
                        one.rc = walk_records(env, one.txn, &one.bounds, visit_gather, &one.gather, &one.failure)
                        if threaded:
                            pthread_join(thread, NULL)
                    self.txn = txn_number(reader)
                finally:
                    if other is not None:
                        other.end()
            finally:
                reader.end()
            if one.rc != 0:
                self.txn = 0
                raise_walk(env, &one.failure)
            if two.rc != 0:
                self.txn = 0
                raise_walk(env, &two.failure)
            with nogil:
                leaf_join(&one.gather.open, &two.gather.open)
                good = gather_close(&one.gather)
                at = 0
                while good and at < one.gather.used:
                    good = self.put_leaf(&one.gather.leaves[at])
                    if good:
                        one.gather.leaves[at].key = NULL
                        at += 1
                at = two.gather.used
                while good and at:
                    good = self.put_leaf(&two.gather.leaves[at - 1])
                    if good:
                        two.gather.leaves[at - 1].key = NULL
                        at -= 1
                self.total = one.gather.total
                add(&self.total, &two.gather.total)
                for b in range(BUCKETS):
                    self.buckets[b] = <int8_t>(<uint8_t>one.gather.buckets[b] + <uint8_t>two.gather.buckets[b])
            if not good:
                self.clear()
                raise MemoryError
            self.count = one.gather.count + two.gather.count
            self.live_count = one.gather.live + two.gather.live
            self.entries = one.gather.entries + two.gather.entries
            self.damaged = damaged_keys(&one.gather) + damaged_keys(&two.gather)[::-1]
            return True
        finally:
            gather_free(&one.gather)
            gather_free(&two.gather)

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
        """Return as `records` does, of keys in [start, stop); stop None: to the end. QuotaExceeded past ``bytes_max``."""
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


cdef bytes picked_row(Environment env, const Picked *found):
    """Return a record as a row of the wire; CorruptionError for a damaged value."""
    cdef bytes row
    if not value_is_whole(&found.header):
        raise errors.CorruptionError("the value of a record is damaged",
                                     key=PyBytes_FromStringAndSize(<char *>found.key, found.key_bytes),
                                     tablet=env.path.decode("utf-8", "replace"), what="record")
    row = PyBytes_FromStringAndSize(NULL, row_size(found.key_bytes, &found.header))
    row_copy(<uint8_t *>PyBytes_AS_STRING(row), found.key, found.key_bytes, &found.header)
    return row


cdef void found_next(Tree tree, size_t block, size_t index, Range *bounds) noexcept nogil:
    """End a range where the following leaf begins."""
    cdef Leaf *following
    if index + 1 < tree.blocks[block].used:
        following = &tree.blocks[block].leaves[index + 1]
    elif block + 1 < tree.block_count:
        following = &tree.blocks[block + 1].leaves[0]
    else:
        return
    bounds.stop = following.key
    bounds.stop_bytes = following.key_bytes
    bounds.has_stop = True


cdef list damaged_keys(const Gather *gather):
    cdef size_t at = 0
    cdef uint16_t size
    result = []
    while at < gather.damaged_used:
        memcpy(&size, gather.damaged + at, 2)
        result.append(PyBytes_FromStringAndSize(<char *>gather.damaged + at + 2, size))
        at += 2 + size
    return result


cdef Block *new_block(Tree tree, size_t at) noexcept nogil:
    """Insert an empty block at a place among the blocks."""
    cdef Block **blocks
    cdef Block *block
    cdef size_t room
    if tree.block_count == tree.block_room:
        room = 2 * tree.block_room if tree.block_room else 64
        blocks = <Block **>realloc(tree.blocks, room * sizeof(Block *))
        if blocks is NULL:
            return NULL
        tree.blocks = blocks
        tree.block_room = room
    block = <Block *>calloc(1, sizeof(Block))
    if block is NULL:
        return NULL
    block.leaves = <Leaf *>malloc(BLOCK_LEAVES * sizeof(Leaf))
    block.prefixes = <uint64_t *>malloc(BLOCK_LEAVES * sizeof(uint64_t))
    if block.leaves is NULL or block.prefixes is NULL:
        free(block.leaves)
        free(block.prefixes)
        free(block)
        return NULL
    memmove(&tree.blocks[at + 1], &tree.blocks[at], (tree.block_count - at) * sizeof(Block *))
    tree.blocks[at] = block
    tree.block_count += 1
    return block


cdef inline bint begins_after(const Block *block, size_t i, uint64_t prefix, const uint8_t *key,
                              size_t key_bytes) noexcept nogil:
    """Whether leaf i of the block begins after a key."""
    if block.prefixes[i] != prefix:
        return block.prefixes[i] > prefix
    return order_of(block.leaves[i].key, block.leaves[i].key_bytes, key, key_bytes) > 0


cdef void find_leaf(Tree tree, const uint8_t *key, size_t key_bytes, size_t *block, size_t *index) noexcept nogil:
    """Find the leaf that a key belongs to: the last one that does not begin after it."""
    cdef uint64_t prefix = prefix_of(key, key_bytes)
    cdef size_t low = 0
    cdef size_t high = tree.block_count - 1
    cdef size_t middle
    while low < high:
        middle = (low + high + 1) // 2
        if begins_after(tree.blocks[middle], 0, prefix, key, key_bytes):
            high = middle - 1
        else:
            low = middle
    block[0] = low
    low = 0
    high = tree.blocks[block[0]].used - 1
    while low < high:
        middle = (low + high + 1) // 2
        if begins_after(tree.blocks[block[0]], middle, prefix, key, key_bytes):
            high = middle - 1
        else:
            low = middle
    index[0] = low


cdef bint insert_leaf(Tree tree, size_t block, size_t index, const Leaf *leaf) noexcept nogil:
    """Insert a leaf behind another one, splitting a full block."""
    cdef Block *full = tree.blocks[block]
    cdef Block *right
    cdef size_t half = BLOCK_LEAVES // 2
    if full.used == BLOCK_LEAVES:
        right = new_block(tree, block + 1)
        if right is NULL:
            return False
        memcpy(right.leaves, full.leaves + half, (BLOCK_LEAVES - half) * sizeof(Leaf))
        memcpy(right.prefixes, full.prefixes + half, (BLOCK_LEAVES - half) * sizeof(uint64_t))
        right.used = BLOCK_LEAVES - half
        full.used = half
        if index >= half:
            full = right
            index -= half
    memmove(&full.leaves[index + 2], &full.leaves[index + 1], (full.used - index - 1) * sizeof(Leaf))
    memmove(&full.prefixes[index + 2], &full.prefixes[index + 1], (full.used - index - 1) * sizeof(uint64_t))
    full.leaves[index + 1] = leaf[0]
    full.prefixes[index + 1] = prefix_of(leaf.key, leaf.key_bytes)
    full.used += 1
    tree.leaf_count += 1
    return True


cdef void remove_leaf(Tree tree, size_t block, size_t index) noexcept nogil:
    """Remove a leaf (never the first) whose records its left neighbour has taken over."""
    cdef Block *where = tree.blocks[block]
    free(where.leaves[index].key)
    memmove(&where.leaves[index], &where.leaves[index + 1], (where.used - index - 1) * sizeof(Leaf))
    memmove(&where.prefixes[index], &where.prefixes[index + 1], (where.used - index - 1) * sizeof(uint64_t))
    where.used -= 1
    tree.leaf_count -= 1
    if where.used == 0:
        free(where.leaves)
        free(where.prefixes)
        free(where)
        memmove(&tree.blocks[block], &tree.blocks[block + 1], (tree.block_count - block - 1) * sizeof(Block *))
        tree.block_count -= 1


cdef inline void mark_dirty(Tree tree, Leaf *leaf) noexcept nogil:
    if not leaf.dirty:
        leaf.dirty = 1
        tree.dirty += 1


cdef bint apply_notes(Tree tree) noexcept nogil:
    """Adjust leaves, sum, count and estimator by what the writer noted; False: no memory, or the notes contradict."""
    cdef size_t at = 0
    cdef size_t end
    cdef size_t block, index, left_block, left_index
    cdef uint64_t size, hashed, id
    cdef uint16_t key_bytes
    cdef Sum before, after
    cdef bint was, is_there
    cdef const uint8_t *data = tree.taken.data
    cdef const uint8_t *key
    cdef Leaf *leaf
    cdef Leaf *left
    cdef Leaf fresh
    while at < tree.taken.used:
        memcpy(&size, data + at + 8, 8)
        at += 16
        end = at + size
        while at < end:
            memcpy(&before, data + at, 16)
            memcpy(&after, data + at + 16, 16)
            memcpy(&key_bytes, data + at + 32, 2)
            was = data[at + 34]
            is_there = data[at + 35]
            key = data + at + 40
            at += 40 + ((<size_t>key_bytes + 7) & ~<size_t>7)
            hashed = XXH3_64bits_withSeed(key, key_bytes, tree.environment.seed)
            id = hashed >> tree.id_shift
            find_leaf(tree, key, key_bytes, &block, &index)
            leaf = &tree.blocks[block].leaves[index]
            if was:
                subtract(&tree.total, &before)
                count_bucket(tree.buckets, id, tree.id_shift, value_of(&before), True)
                tree.count -= 1
            if is_there:
                add(&tree.total, &after)
                count_bucket(tree.buckets, id, tree.id_shift, value_of(&after), False)
                tree.count += 1
            if (hashed & tree.mask) == 0 and was != is_there:
                if is_there:
                    if leaf.key_bytes == key_bytes and memcmp(leaf.key, key, key_bytes) == 0:
                        return False
                    memset(&fresh, 0, sizeof(Leaf))
                    if not leaf_begin(&fresh, key, key_bytes, id):
                        return False
                    mark_dirty(tree, leaf)
                    fresh.dirty = 1
                    tree.dirty += 1
                    if not insert_leaf(tree, block, index, &fresh):
                        free(fresh.key)
                        tree.dirty -= 1
                        return False
                else:
                    if leaf.key_bytes != key_bytes or memcmp(leaf.key, key, key_bytes) != 0:
                        return False
                    if index:
                        left_block = block
                        left_index = index - 1
                    else:
                        left_block = block - 1
                        left_index = tree.blocks[left_block].used - 1
                    left = &tree.blocks[left_block].leaves[left_index]
                    if leaf.dirty:
                        tree.dirty -= 1
                        mark_dirty(tree, left)
                    elif not left.dirty:
                        leaf_subtract(leaf, &before, id)
                        leaf_join(left, leaf)
                    remove_leaf(tree, block, index)
            elif not leaf.dirty:
                if was:
                    leaf_subtract(leaf, &before, id)
                if is_there:
                    leaf_add(leaf, &after, id)
    tree.taken.used = 0
    return True


cdef struct Rescan:
    Leaf *leaf
    uint64_t seed
    uint64_t mask
    int shift


cdef int visit_rescan(void *context, const uint8_t *key, size_t key_bytes, const Header *header,
                      const Sum *digest) noexcept nogil:
    cdef Rescan *work = <Rescan *>context
    if header is not NULL:
        leaf_add(work.leaf, digest, XXH3_64bits_withSeed(key, key_bytes, work.seed) >> work.shift)
    return 0


cdef int rescan(Tree tree, MDB_txn *txn, Failure *failure) noexcept nogil:
    """Walk the records of every dirty leaf again."""
    cdef size_t b, k
    cdef Leaf *leaf
    cdef Range bounds
    cdef Rescan work
    cdef int rc
    work.seed = tree.environment.seed
    work.shift = tree.id_shift
    for b in range(tree.block_count):
        for k in range(tree.blocks[b].used):
            leaf = &tree.blocks[b].leaves[k]
            if not leaf.dirty:
                continue
            memset(&bounds, 0, sizeof(Range))
            bounds.start = leaf.key
            bounds.start_bytes = leaf.key_bytes
            found_next(tree, b, k, &bounds)
            memset(&leaf.sum, 0, sizeof(Sum))
            memset(&leaf.weighted, 0, sizeof(Sum))
            leaf.value_sum = 0
            leaf.count = 0
            work.leaf = leaf
            rc = walk_records(tree.environment, txn, &bounds, visit_rescan, &work, failure)
            if rc != 0:
                return rc
            leaf.dirty = 0
            tree.dirty -= 1
            if tree.dirty == 0:
                return 0
    return 0


cdef int visit_record(void *context, const uint8_t *key, size_t key_bytes, const Header *header,
                      const Sum *digest) noexcept nogil:
    cdef Scan *scan = <Scan *>context
    if header is NULL:
        return 0
    if scan.used == scan.room:
        return CODE_ENOUGH
    scan.ids[scan.used] = XXH3_64bits_withSeed(key, key_bytes, scan.seed) >> scan.shift
    scan.values[scan.used] = value_of(digest)
    scan.used += 1
    return 0


cdef struct Scan:
    uint64_t *ids
    uint64_t *values
    size_t used
    size_t room
    uint64_t seed
    int shift


cdef class Records:
    """Id and value of every record in key order, from one walk: 16 bytes a record."""

    def __cinit__(self, Tree tree not None, Reader reader not None, size_t records_max):
        cdef Scan scan
        cdef Range bounds
        cdef Failure failure
        cdef MDB_txn *txn
        cdef int rc
        memset(&scan, 0, sizeof(Scan))
        memset(&bounds, 0, sizeof(Range))
        failure.code = 0
        self.room = <size_t>(tree.count + 1 if tree.count >= 0 else 1)
        if self.room > records_max + 1:
            raise errors.QuotaExceeded(f"at most {records_max} records are held in memory", limit=records_max)
        self.ids = <uint64_t *>malloc(self.room * sizeof(uint64_t))
        self.values = <uint64_t *>malloc(self.room * sizeof(uint64_t))
        if self.ids is NULL or self.values is NULL:
            raise MemoryError
        scan.ids = self.ids
        scan.values = self.values
        scan.room = self.room
        scan.seed = tree.environment.seed
        scan.shift = tree.id_shift
        txn = reader.begin()
        try:
            with nogil:
                rc = walk_records(tree.environment, txn, &bounds, visit_record, &scan, &failure)
        finally:
            reader.end()
        if rc != 0:
            raise_walk(tree.environment, &failure)
        self.count = scan.used

    def __dealloc__(self):
        free(self.ids)
        free(self.values)

    def find(self, list ids not None):
        """Return the positions of the records with these ids, rising."""
        cdef uint64_t mask = 0
        cdef uint64_t at
        cdef size_t i
        cdef uint64_t *table = wanted_table(ids, &mask)
        result = []
        for i in range(self.count):
            at = (self.ids[i] * <uint64_t>0x9E3779B97F4A7C15 >> 20) & mask
            while table[at]:
                if table[at] == self.ids[i] + 1:
                    result.append(i)
                    break
                at = (at + 1) & mask
        free(table)
        return result


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
