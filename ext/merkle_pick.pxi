# Reading: the records of a range, all or those with wanted ids, and which two of them explain a difference.

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
    size_t bytes_max             # CODE_ENOUGH beyond it: of rows, and PICKED_BYTES for what each becomes as objects


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
    pick.bytes += row_size(key_bytes, header) + PICKED_BYTES
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
    # Sparse where it stays small: it is asked for every record there is, and a place that is taken costs a wrong guess.
    while room < <uint64_t>len(ids) * (32 if len(ids) < SPARSE_MAX else 2):
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
