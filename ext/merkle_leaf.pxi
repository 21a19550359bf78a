# A leaf's arithmetic: sums that records are added to and taken from, the estimator's buckets, the order of keys.

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


cdef extern from * nogil:
    """
    static inline uint32_t sr_spread(uint32_t bits) { return bits * 0x00204081u & 0x01010101u; }  /* bit i to byte i */
    /* Four lanes at once: a byte of each gets a bit of the value, with a sign of the id; then one record in 64 once more. */
    static inline void sr_count(uint8_t *buckets, uint64_t wide, uint32_t value, uint32_t taken) {
        uint32_t ones = sr_spread(value & 15);
        uint32_t step = ones | (sr_spread((uint32_t)(wide >> 43 & 15) ^ (taken ? 15 : 0)) & ones) * 255;
        uint8_t *lanes = buckets + 4 * ((wide & 0xffffffff) * 40 >> 32);
        uint32_t old;
        memcpy(&old, lanes, 4);
        old = ((old & 0x7f7f7f7fu) + (step & 0x7f7f7f7fu)) ^ ((old ^ step) & 0x80808080u);
        memcpy(lanes, &old, 4);
        if ((wide >> 37 & 63) == 0)
            buckets[160 + (wide >> 32 & 31)] += (wide >> 46 & 1) != taken ? -(value & 1) : value & 1;
    }
    """
    void sr_count(uint8_t *buckets, uint64_t wide, uint32_t value, uint32_t taken)


cdef inline void count_bucket(int8_t *buckets, uint64_t id, int shift, uint64_t value, bint taken) noexcept nogil:
    """Add (or take) a record to the estimator. Buckets wrap modulo 256; unsigned arithmetic keeps that defined."""
    sr_count(<uint8_t *>buckets, id << shift >> 17, <uint32_t>value, taken)


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


cdef bint leaf_begin(Leaf *leaf, const uint8_t *key, size_t key_bytes, uint64_t id) noexcept nogil:
    leaf.key = <uint8_t *>malloc(key_bytes)
    if leaf.key is NULL:
        return False
    memcpy(leaf.key, key, key_bytes)
    leaf.key_bytes = <uint16_t>key_bytes
    leaf.id = id
    return True
