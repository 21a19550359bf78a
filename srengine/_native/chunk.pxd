# Header of the chunk kernel: the head of an item, decoded. Its bytes stand in docs/formats-snapshot.md.
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef struct Head:
    uint64_t ordinal
    uint64_t view_sequence
    uint64_t after_sequence
    uint64_t last_sequence
    uint32_t raw_bytes
    uint32_t stored_bytes
    uint32_t row_count
    uint16_t after_bytes
    uint16_t last_bytes
    uint8_t kind
    uint8_t encoding
    uint8_t flags

cdef struct Walk:                # the bounded reader of rows: what it was asked, what it found
    const uint8_t *cursor        # next unread byte; at a failure, the row that broke a rule
    const uint8_t *end
    const uint8_t *last_key      # borrowed: the key to lie behind, then the last one read
    size_t last_key_bytes
    uint64_t last_sequence
    uint64_t sequence_max
    uint64_t count
    bint by_key

cdef int read_fixed(const uint8_t *data, Head *out) noexcept nogil
cdef const char *walk_rows(Walk *walk) noexcept nogil
