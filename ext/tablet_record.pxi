# The record: header, checks, digests. Byte tables and test vectors: docs/formats.md.
#
#   header   0 u8 format | 1 u8 flags | 2 u16 version count n | 4 u64 sequence | 12 u64 hybrid clock
#            20 u64 content checksum | 28 n version entries of 16 bytes | 28+16n u32 check
#   digest   0 u8 domain | 1 u8 layout | 2 u16 key bytes | 4 u16 version count | 6 u8 flags | 7 u8 zero
#            8 u64 sequence | 16 u64 hybrid clock | 24 u64 content checksum | 32 key | version entries
#
# All numbers are little-endian, as are all platforms that setup.py accepts, so they are copied as they are.

cdef enum:
    RECORD_FORMAT = 1
    HEADER_FIXED = 28
    HEADER_MIN = 32
    TOMBSTONE = 1
    FLAGS_KNOWN = 1
    KEY_MAX = 511
    VALUE_MAX = 67108864
    VERSIONS_MAX = 64
    DIGEST_LAYOUT = 1
    DOMAIN_RECORD = 1
    DOMAIN_REQUEST = 2
    DOMAIN_SESSION = 3
    DOMAIN_META = 4
    STATE_CHECKED = 104
    ROW_HEADER = 24


cdef extern from * nogil:
    """
    /* A leaf keeps its records in the order of their insertion, so a walk in key order meets nearly every line of the
       page as a miss of its own. Asking for all of them at once costs about as much as one miss. */
    static inline void sr_prefetch_page(const void *inside) {
        const char *page = (const char *)((size_t)inside & ~(size_t)4095);
        for (int line = 0; line < 4096; line += 64) __builtin_prefetch(page + line, 0, 3);
    }
    /* The lines of a value while its header is being checked. */
    static inline void sr_prefetch_record(const void *data, size_t size) {
        const char *line = (const char *)data;
        const char *end = line + (size < 1024 ? size : 1024);
        for (; line < end; line += 64) __builtin_prefetch(line, 0, 3);
    }
    /* Copy in words: what is hashed right after is read in words, and is still on its way to memory then. */
    static inline void sr_copy_words(uint8_t *out, const uint8_t *in, size_t size) {
        size_t at = 0;
        for (; at + 8 <= size; at += 8) memcpy(out + at, in + at, 8);
        for (; at < size; at++) out[at] = in[at];
    }
    """
    void sr_copy_words(uint8_t *out, const uint8_t *data, size_t size)
    void sr_prefetch_page(const void *inside)
    void sr_prefetch_record(const void *data, size_t size)


cdef inline void sum_add(Sum *total, const Sum *part) noexcept nogil:
    cdef uint64_t low = total.low + part.low
    total.high = total.high + part.high + (1 if low < part.low else 0)
    total.low = low


cdef inline void sum_sub(Sum *total, const Sum *part) noexcept nogil:
    total.high = total.high - part.high - (1 if total.low < part.low else 0)
    total.low = total.low - part.low


cdef inline bint sum_equal(const Sum *one, const Sum *other) noexcept nogil:
    return one.low == other.low and one.high == other.high


cdef inline uint64_t content_checksum(const uint8_t *value, size_t size, uint8_t flags) noexcept nogil:
    if flags == 0:
        return XXH3_64bits(value, size)
    return XXH3_64bits_withSeed(value, size, flags)


cdef inline uint32_t header_check(const uint8_t *key, size_t key_bytes, const uint8_t *header,
                                  size_t header_bytes) noexcept nogil:
    cdef uint8_t joined[KEY_MAX + HEADER_FIXED + 16 * VERSIONS_MAX]
    if header == key + key_bytes:        # in a leaf the record follows its key: nothing to join
        return <uint32_t>XXH3_64bits(key, key_bytes + header_bytes)
    memcpy(joined, key, key_bytes)
    memcpy(joined + key_bytes, header, header_bytes)
    return <uint32_t>XXH3_64bits(joined, key_bytes + header_bytes)


cdef inline size_t header_write(uint8_t *out, const uint8_t *key, size_t key_bytes, uint8_t flags,
                                uint32_t version_count, const uint8_t *versions, uint64_t sequence,
                                uint64_t hybrid_clock, uint64_t checksum) noexcept nogil:
    cdef uint16_t count = <uint16_t>version_count
    cdef size_t size = HEADER_FIXED + 16 * version_count
    cdef uint32_t check
    out[0] = RECORD_FORMAT
    out[1] = flags
    memcpy(out + 2, &count, 2)
    memcpy(out + 4, &sequence, 8)
    memcpy(out + 12, &hybrid_clock, 8)
    memcpy(out + 20, &checksum, 8)
    if version_count:
        memcpy(out + HEADER_FIXED, versions, 16 * version_count)
    check = header_check(key, key_bytes, out, size)
    memcpy(out + size, &check, 4)
    return size + 4


cdef inline bint header_parse(const uint8_t *key, size_t key_bytes, const uint8_t *data, size_t size,
                              Header *out) noexcept nogil:
    """Decode a header; False when it cannot be one. Neither its check nor the value is looked at."""
    cdef uint16_t count
    cdef size_t fixed
    if size < HEADER_MIN or data[0] != RECORD_FORMAT or key_bytes > KEY_MAX:
        return False
    memcpy(&count, data + 2, 2)
    if count > VERSIONS_MAX:
        return False
    fixed = HEADER_FIXED + 16 * <size_t>count
    if size < fixed + 4:
        return False
    out.flags = data[1]
    out.version_count = count
    memcpy(&out.sequence, data + 4, 8)
    memcpy(&out.hybrid_clock, data + 12, 8)
    memcpy(&out.checksum, data + 20, 8)
    out.versions = data + HEADER_FIXED
    out.value = data + fixed + 4
    out.value_bytes = size - fixed - 4
    return True


cdef inline bint header_read(const uint8_t *key, size_t key_bytes, const uint8_t *data, size_t size,
                             Header *out) noexcept nogil:
    """Decode and check a header; False when it is damaged. The value is not looked at."""
    cdef uint32_t check
    if not header_parse(key, key_bytes, data, size, out):
        return False
    memcpy(&check, out.value - 4, 4)
    return check == header_check(key, key_bytes, data, HEADER_FIXED + 16 * <size_t>out.version_count)


cdef inline bint record_read(const uint8_t *key, size_t key_bytes, const uint8_t *data, size_t size,
                             Header *out) noexcept nogil:
    """Decode a record and check header and value; False when either is damaged."""
    if not header_read(key, key_bytes, data, size, out):
        return False
    return content_checksum(out.value, out.value_bytes, out.flags) == out.checksum


cdef inline Sum record_digest(uint64_t seed, const uint8_t *key, size_t key_bytes, uint8_t flags,
                              uint32_t version_count, const uint8_t *versions, uint64_t sequence,
                              uint64_t hybrid_clock, uint64_t checksum) noexcept nogil:
    cdef uint8_t layout[32 + KEY_MAX + 16 * VERSIONS_MAX]
    cdef uint64_t head = (DOMAIN_RECORD | DIGEST_LAYOUT << 8 | <uint64_t>key_bytes << 16 | <uint64_t>version_count << 32
                          | <uint64_t>flags << 48)
    cdef XXH128_hash_t hashed
    cdef Sum total
    memcpy(layout, &head, 8)
    memcpy(layout + 8, &sequence, 8)
    memcpy(layout + 16, &hybrid_clock, 8)
    memcpy(layout + 24, &checksum, 8)
    sr_copy_words(layout + 32, key, key_bytes)
    if version_count:
        memcpy(layout + 32 + key_bytes, versions, 16 * version_count)
    hashed = XXH3_128bits_withSeed(layout, 32 + key_bytes + 16 * version_count, seed)
    total.low = hashed.low64
    total.high = hashed.high64
    return total


cdef Sum row_digest(uint64_t seed, uint8_t domain, const uint8_t *name, size_t name_bytes,
                    const uint8_t *value, size_t value_bytes) noexcept nogil:
    """Digest of a deterministic row: XXH3-128 of domain, layout, sizes, then the digest of name and value."""
    cdef uint8_t layout[32]
    cdef uint32_t size
    cdef XXH128_hash_t hashed
    cdef uint64_t part
    cdef Sum total
    layout[0] = domain
    layout[1] = DIGEST_LAYOUT
    layout[2] = 0
    layout[3] = 0
    size = <uint32_t>name_bytes
    memcpy(layout + 4, &size, 4)
    size = <uint32_t>value_bytes
    memcpy(layout + 8, &size, 4)
    memset(layout + 12, 0, 4)
    part = XXH3_64bits_withSeed(name, name_bytes, seed)
    memcpy(layout + 16, &part, 8)
    part = XXH3_64bits_withSeed(value, value_bytes, seed)
    memcpy(layout + 24, &part, 8)
    hashed = XXH3_128bits_withSeed(layout, 32, seed)
    total.low = hashed.low64
    total.high = hashed.high64
    return total


cdef inline int compare_keys(const uint8_t *one, size_t one_bytes, const uint8_t *other,
                             size_t other_bytes) noexcept nogil:
    cdef size_t shared = one_bytes if one_bytes < other_bytes else other_bytes
    cdef int order = memcmp(one, other, shared)
    if order:
        return order
    return -1 if one_bytes < other_bytes else (1 if one_bytes > other_bytes else 0)


cdef inline uint64_t key_prefix(const uint8_t *key, size_t size) noexcept nogil:
    """The first eight bytes as a big-endian number, so that numbers order as the keys do."""
    cdef uint64_t prefix = 0
    if size >= 8:
        memcpy(&prefix, key, 8)
    else:
        memcpy(&prefix, key, size)
    return bswap64(prefix)


cdef struct SortItem:
    uint64_t prefix
    uint64_t index


cdef bint comes_after(const SortItem *one, const SortItem *other, const Operation *operations) noexcept nogil:
    if one.prefix != other.prefix:
        return one.prefix > other.prefix
    cdef const Operation *a = &operations[one.index]
    cdef const Operation *b = &operations[other.index]
    return compare_keys(a.key, a.key_bytes, b.key, b.key_bytes) > 0


cdef SortItem *sort_operations(const Operation *operations, size_t count, SortItem *items,
                               SortItem *spare) noexcept nogil:
    """Sort by key, stable (equal keys stay in sequence order); returns whichever array holds the result.

    A bottom-up merge sort on (prefix, index) pairs: runs of 16 by insertion, then merges.
    """
    cdef size_t i, j, k, left, middle, right, width, end
    cdef SortItem moving
    cdef SortItem *swap
    for i in range(count):
        items[i].prefix = key_prefix(operations[i].key, operations[i].key_bytes)
        items[i].index = i
    i = 1
    while i < count and not comes_after(&items[i - 1], &items[i], operations):
        i += 1
    if i >= count:
        return items
    left = 0
    while left < count:
        end = left + 16 if left + 16 < count else count
        for i in range(left + 1, end):
            moving = items[i]
            j = i
            while j > left and comes_after(&items[j - 1], &moving, operations):
                items[j] = items[j - 1]
                j -= 1
            items[j] = moving
        left += 16
    width = 16
    while width < count:
        left = 0
        while left < count:
            middle = left + width if left + width < count else count
            right = left + 2 * width if left + 2 * width < count else count
            i = left
            j = middle
            k = left
            while i < middle and j < right:
                if comes_after(&items[i], &items[j], operations):
                    spare[k] = items[j]
                    j += 1
                else:
                    spare[k] = items[i]
                    i += 1
                k += 1
            if i < middle:
                memcpy(&spare[k], &items[i], (middle - i) * sizeof(SortItem))
            if j < right:
                memcpy(&spare[k], &items[j], (right - j) * sizeof(SortItem))
            left += 2 * width
        swap = items
        items = spare
        spare = swap
        width *= 2
    return items


cdef inline bint row_read(const uint8_t *cursor, const uint8_t *end, Operation *out, size_t *used) noexcept nogil:
    """Read one row of the wire form into a RAW operation; False when it is malformed. Never reads past ``end``."""
    cdef uint16_t key_bytes
    cdef uint32_t value_bytes
    cdef size_t available = <size_t>(end - cursor)
    cdef size_t need
    if available < ROW_HEADER:
        return False
    memcpy(&key_bytes, cursor + 2, 2)
    memcpy(&value_bytes, cursor + 4, 4)
    out.flags = cursor[0]
    out.version_count = cursor[1]
    if key_bytes < 1 or key_bytes > KEY_MAX or value_bytes > VALUE_MAX or out.version_count > VERSIONS_MAX:
        return False
    if out.flags & ~FLAGS_KNOWN or (out.flags & TOMBSTONE and value_bytes):
        return False
    need = ROW_HEADER + <size_t>key_bytes + 16 * <size_t>out.version_count + value_bytes
    if available < need:
        return False
    memcpy(&out.sequence, cursor + 8, 8)
    memcpy(&out.hybrid_clock, cursor + 16, 8)
    if out.sequence == 0:
        return False
    out.key = cursor + ROW_HEADER
    out.key_bytes = key_bytes
    out.versions = out.key + key_bytes
    out.value = out.versions + 16 * <size_t>out.version_count
    out.value_bytes = value_bytes
    out.kind = RAW
    out.condition = 0
    out.entry = 0
    out.result = 0
    out.stored = 0
    out.expected = 0
    out.current = 0
    used[0] = need
    return True


cdef inline size_t row_bytes(size_t key_bytes, const Header *header) noexcept nogil:
    return ROW_HEADER + key_bytes + 16 * <size_t>header.version_count + header.value_bytes


cdef inline size_t row_write(uint8_t *out, const uint8_t *key, size_t key_bytes, const Header *header) noexcept nogil:
    cdef uint16_t key_size = <uint16_t>key_bytes
    cdef uint32_t value_size = <uint32_t>header.value_bytes
    cdef size_t at
    out[0] = header.flags
    out[1] = <uint8_t>header.version_count
    memcpy(out + 2, &key_size, 2)
    memcpy(out + 4, &value_size, 4)
    memcpy(out + 8, &header.sequence, 8)
    memcpy(out + 16, &header.hybrid_clock, 8)
    memcpy(out + ROW_HEADER, key, key_bytes)
    at = ROW_HEADER + key_bytes
    if header.version_count:
        memcpy(out + at, header.versions, 16 * header.version_count)
        at += 16 * header.version_count
    memcpy(out + at, header.value, header.value_bytes)
    return at + header.value_bytes
