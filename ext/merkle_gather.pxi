# Building: what a walk over all records, or two from both ends, sums up.

cdef struct Gather:              # what a walk sums up
    Leaf *leaves                 # closed ones; backward walks close them in falling order
    size_t used
    size_t room
    Leaf open                    # forward: the leaf being summed; backward: records before the last boundary met
    const State *state
    uint64_t seed
    uint64_t mask
    int64_t live
    int64_t entries
    int8_t *buckets
    uint8_t *damaged             # u16 size and key of each record that cannot be read
    size_t damaged_used
    size_t damaged_count
    int shift
    bint backward
    uint8_t apart[APART_BYTES]


cdef bint gather_open(Gather *gather, Tree tree, Reader reader) noexcept:
    memset(gather, 0, sizeof(Gather))
    gather.seed = tree.environment.seed
    gather.mask = tree.mask
    gather.shift = tree.id_shift
    gather.state = &reader.state
    gather.buckets = <int8_t *>calloc(BUCKETS + APART_BYTES, 1)
    return gather.buckets is not NULL


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
    count_bucket(gather.buckets, id, gather.shift, value_of(digest), False)
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


cdef list damaged_keys(const Gather *gather):
    cdef size_t at = 0
    cdef uint16_t size
    result = []
    while at < gather.damaged_used:
        memcpy(&size, gather.damaged + at, 2)
        result.append(PyBytes_FromStringAndSize(<char *>gather.damaged + at + 2, size))
        at += 2 + size
    return result
