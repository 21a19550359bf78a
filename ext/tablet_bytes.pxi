# Bytes that Python sees: operations, rows of the wire, state rows and meta rows. Byte tables: docs/formats.md.
#
#   operation  0 u8 kind | 1 u8 condition | 2 u16 key bytes | 4 u32 value bytes | 8 u64 version | 16 key | value
#
# Whatever is read comes from anywhere: every reader is bounded, and says FrameError or CorruptionError.

cdef enum:
    OPERATION_HEADER = 16


cdef inline void set_operation(Operation *operation, uint8_t kind, object key, object value) noexcept:
    operation.key = <const uint8_t *>PyBytes_AS_STRING(key)
    operation.key_bytes = <uint16_t>PyBytes_GET_SIZE(key)
    if value is not None:
        operation.value = <const uint8_t *>PyBytes_AS_STRING(value)
        operation.value_bytes = <uint32_t>PyBytes_GET_SIZE(value)
    operation.kind = kind


# --- operations and rows -----------------------------------------------------------------------------------------------

def encode_operations(operations):
    """Encode [(kind, key, value, condition, version)]; value None for a delete. See docs/formats.md."""
    cdef list parts = []
    cdef uint8_t header[OPERATION_HEADER]
    cdef uint16_t key_bytes
    cdef uint32_t value_bytes
    cdef uint64_t version
    for kind, key, value, condition, expected in operations:
        check_key(key)
        if kind == PUT:
            check_value(value)
        elif kind != DELETE:
            raise errors.InvalidValue(f"unknown kind of operation {kind!r}")
        if condition not in (CONDITION_NONE, IF_ABSENT, IF_VERSION, IF_PRESENT):
            raise errors.InvalidValue(f"unknown condition {condition!r}")
        header[0] = kind
        header[1] = condition
        key_bytes = <uint16_t>len(key)
        value_bytes = <uint32_t>len(value) if kind == PUT else 0
        version = expected or 0
        memcpy(header + 2, &key_bytes, 2)
        memcpy(header + 4, &value_bytes, 4)
        memcpy(header + 8, &version, 8)
        parts.append(PyBytes_FromStringAndSize(<char *>header, OPERATION_HEADER))
        parts.append(key)
        if value_bytes:
            parts.append(value)
    return b"".join(parts)


cdef bint operation_read(const uint8_t *cursor, const uint8_t *end, Operation *out, size_t *used) noexcept nogil:
    cdef size_t available = <size_t>(end - cursor)
    cdef uint16_t key_bytes
    cdef uint32_t value_bytes
    if available < OPERATION_HEADER:
        return False
    memcpy(&key_bytes, cursor + 2, 2)
    memcpy(&value_bytes, cursor + 4, 4)
    memset(out, 0, sizeof(Operation))
    out.kind = cursor[0]
    out.condition = cursor[1]
    if out.kind > DELETE or out.condition > IF_PRESENT or key_bytes < 1 or key_bytes > KEY_MAX \
            or value_bytes > VALUE_MAX or (out.kind == DELETE and value_bytes):
        return False
    used[0] = OPERATION_HEADER + <size_t>key_bytes + value_bytes
    if used[0] > available:
        return False
    memcpy(&out.expected, cursor + 8, 8)
    out.key = cursor + OPERATION_HEADER
    out.key_bytes = key_bytes
    out.value = out.key + key_bytes
    out.value_bytes = value_bytes
    return True


cdef int64_t count_operations(const uint8_t *data, size_t size) noexcept nogil:
    cdef Operation operation
    cdef size_t used = 0
    cdef size_t at = 0
    cdef int64_t count = 0
    while at < size:
        if not operation_read(data + at, data + size, &operation, &used):
            return -1
        at += used
        count += 1
    return count


def check_operations(const uint8_t[::1] data not None):
    """Return the number of operations encoded; raises FrameError for anything else. Never reads past the end."""
    cdef int64_t count = count_operations(&data[0], data.shape[0]) if data.shape[0] else 0
    if count < 0:
        raise errors.FrameError("the bytes are no sequence of operations")
    return count


def check_rows(const uint8_t[::1] data not None, int sorted_by=0):
    """Return (count, first, last) of encoded rows; raises FrameError for anything else.

    ``sorted_by`` 1: keys must rise, first and last are keys; 2: sequences must rise, first and last are sequences;
    0: no order is asked for and both are None.
    """
    cdef Operation row, previous
    cdef size_t used = 0
    cdef size_t at = 0
    cdef size_t size = data.shape[0]
    cdef size_t count = 0
    cdef bint good = True
    first = last = None
    if size == 0:
        return 0, None, None
    with nogil:
        while at < size:
            if not row_read(&data[at], &data[0] + size, &row, &used):
                good = False
                break
            if count:
                if sorted_by == 1 and compare_keys(row.key, row.key_bytes, previous.key, previous.key_bytes) <= 0:
                    good = False
                    break
                if sorted_by == 2 and row.sequence <= previous.sequence:
                    good = False
                    break
            previous = row
            at += used
            count += 1
    if not good:
        raise errors.FrameError(f"row {count} is malformed or out of order", ordinal=count)
    if sorted_by == 1:
        row_read(&data[0], &data[0] + size, &row, &used)
        first = PyBytes_FromStringAndSize(<char *>row.key, row.key_bytes)
        last = PyBytes_FromStringAndSize(<char *>previous.key, previous.key_bytes)
    elif sorted_by == 2:
        row_read(&data[0], &data[0] + size, &row, &used)
        first, last = row.sequence, previous.sequence
    return count, first, last


def decode_rows(data not None):
    """Return rows as [(key, value, sequence, hybrid clock, flags)]; for tests and tools, not for the hot path."""
    cdef const uint8_t[::1] view = data
    cdef Operation row
    cdef size_t used = 0
    cdef size_t at = 0
    cdef size_t size = view.shape[0]
    result = []
    while at < size:
        if not row_read(&view[at], &view[0] + size, &row, &used):
            raise errors.FrameError(f"row {len(result)} is malformed", ordinal=len(result))
        result.append((PyBytes_FromStringAndSize(<char *>row.key, row.key_bytes),
                       PyBytes_FromStringAndSize(<char *>row.value, row.value_bytes),
                       row.sequence, row.hybrid_clock, row.flags))
        at += used
    return result


def digest_vector(uint64_t seed, bytes key not None, bytes value not None, uint8_t flags, uint64_t sequence,
                  uint64_t hybrid_clock):
    """Return (stored record, record digest) for the test vectors in docs/formats.md."""
    cdef uint8_t header[HEADER_FIXED + 4]
    cdef uint64_t checksum
    cdef Sum digest
    cdef uint64_t pair[2]
    check_key(key)
    checksum = content_checksum(<const uint8_t *>PyBytes_AS_STRING(value), len(value), flags)
    header_write(header, <const uint8_t *>PyBytes_AS_STRING(key), len(key), flags, 0, NULL, sequence, hybrid_clock, checksum)
    digest = record_digest(seed, <const uint8_t *>PyBytes_AS_STRING(key), len(key), flags, 0, NULL, sequence,
                           hybrid_clock, checksum)
    pair[0] = digest.low
    pair[1] = digest.high
    return PyBytes_FromStringAndSize(<char *>header, HEADER_MIN) + value, PyBytes_FromStringAndSize(<char *>pair, 16)


# --- state rows and meta rows ------------------------------------------------------------------------------------------

cdef tuple state_as_tuple(const State *state):
    cdef uint64_t root[2]
    root[0] = state.root.low
    root[1] = state.root.high
    return (state.sequence, PyBytes_FromStringAndSize(<char *>root, 16), state.count, state.live_count,
            state.applied_index, state.applied_term, state.hybrid_clock, state.purge_mark, state.log_floor, state.dead)


def decode_state(bytes image not None):
    """Return the fields of a state row: (sequence, root, count, live count, index, term, clock, purge, floor, dead)."""
    cdef State state
    load_state(image, &state)
    return state_as_tuple(&state)


cdef int load_state(bytes image, State *state) except -1:
    if len(image) != sizeof(State):
        raise errors.FrameError(f"a state row has {sizeof(State)} bytes, not {len(image)}")
    memcpy(state, PyBytes_AS_STRING(image), sizeof(State))
    if state.format != 1 or state.check != XXH3_64bits(state, STATE_CHECKED):
        raise errors.FrameError("a state row is damaged or of another format")
    return 0


def with_check(bytes name not None, bytes value not None):
    """Return a meta row as stored: the value and the low half of XXH3-64 of name and value."""
    cdef bytes joined = name + value
    cdef uint32_t check = <uint32_t>XXH3_64bits(PyBytes_AS_STRING(joined), len(joined))
    return value + PyBytes_FromStringAndSize(<char *>&check, 4)


def check_row(bytes name not None, bytes stored not None):
    """Return the value of a stored meta row; raises CorruptionError if its check fails."""
    if len(stored) < 4 or with_check(name, stored[: len(stored) - 4]) != stored:
        raise errors.CorruptionError(f"meta row {name!r} is damaged", what="meta row")
    return stored[: len(stored) - 4]
