# cython: language_level=3
"""The quick look at msgpack: is this certainly one value within the bounds of srengine/codec/scanner.py?

`is_plain` walks the bytes once, without the GIL, without recursion and without memory of its own, and says True for
what every message of ours looks like. False means "look closely": scanner.py then walks the same bytes in Python,
accepts the rest of what may pass (text beyond ASCII, maps with many keys) and says what is wrong with the others. So
this file never refuses anything; scanner.py is its oracle.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp

cdef enum:
    DEPTH_MAX = 128               # arrays and maps open at a time
    KEYS_MAX = 512                # keys of all open maps together
    MAP_KEYS_MAX = 32             # keys of one map: each is compared with those before it

cdef struct Open:
    uint64_t left                 # values still to come; in a map, keys count too
    uint32_t first_key            # where the map's keys begin in the list of keys
    bint is_map

cdef struct Key:
    const uint8_t *start
    size_t size


cdef uint64_t big_endian(const uint8_t *start, size_t size) noexcept nogil:
    cdef uint64_t value = 0
    cdef size_t i
    for i in range(size):
        value = value << 8 | start[i]
    return value


cdef bint is_ascii(const uint8_t *start, uint64_t size) noexcept nogil:
    cdef uint8_t seen = 0
    cdef uint64_t i
    for i in range(size):
        seen |= start[i]
    return seen < 0x80


cdef bint is_finite(const uint8_t *start, size_t size) noexcept nogil:
    if size == 4:
        return (big_endian(start, 2) & 0x7F80) != 0x7F80
    return (big_endian(start, 2) & 0x7FF0) != 0x7FF0


cdef bint is_new_key(Key *keys, uint32_t first, uint32_t count) noexcept nogil:
    """Return whether the last of ``count`` keys is not among those from ``first`` on before it."""
    cdef Key *last = &keys[count - 1]
    cdef uint32_t i
    if count - first > MAP_KEYS_MAX:
        return False
    for i in range(first, count - 1):
        if keys[i].size == last.size and memcmp(keys[i].start, last.start, last.size) == 0:
            return False
    return True


cdef bint walk(const uint8_t *data, size_t end, uint32_t depth_max) noexcept nogil:
    cdef Open stack[DEPTH_MAX + 1]
    cdef Key keys[KEYS_MAX]
    cdef uint32_t depth = 0, key_count = 0
    cdef size_t at = 0, width
    cdef uint64_t size
    cdef uint8_t first, kind       # kind: 0 scalar, 1 bytes, 2 text, 3 array, 4 map, 5 float
    cdef bint key_next
    if depth_max > DEPTH_MAX:
        return False
    stack[0] = Open(1, 0, False)
    while True:
        if stack[depth].left == 0:
            if stack[depth].is_map:
                key_count = stack[depth].first_key
            if depth == 0:
                return at == end
            depth -= 1
            continue
        if at >= end:
            return False
        key_next = stack[depth].is_map and stack[depth].left % 2 == 0
        stack[depth].left -= 1
        first = data[at]
        at += 1
        size = 0
        width = 0
        kind = 0
        if first < 0x80 or first >= 0xE0:
            pass
        elif first < 0x90:
            kind = 4
            size = first & 0x0F
        elif first < 0xA0:
            kind = 3
            size = first & 0x0F
        elif first < 0xC0:
            kind = 2
            size = first & 0x1F
        elif first == 0xC0 or first == 0xC2 or first == 0xC3:
            pass
        elif 0xC4 <= first <= 0xC6:
            kind = 1
            width = <size_t>1 << (first - 0xC4)
        elif first == 0xCA or first == 0xCB:
            kind = 5
            size = 4 if first == 0xCA else 8
        elif 0xCC <= first <= 0xD3:
            size = <uint64_t>1 << ((first - 0xCC) % 4)
        elif 0xD9 <= first <= 0xDB:
            kind = 2
            width = <size_t>1 << (first - 0xD9)
        elif first == 0xDC or first == 0xDD:
            kind = 3
            width = 2 if first == 0xDC else 4
        elif first == 0xDE or first == 0xDF:
            kind = 4
            width = 2 if first == 0xDE else 4
        else:
            return False
        if width:
            if width > end - at:
                return False
            size = big_endian(data + at, width)
            at += width
        if key_next and kind != 2:
            return False
        if kind == 3 or kind == 4:
            if kind == 4:
                size *= 2
            # One entry of the stack is the message itself.
            if size > end - at or depth + 1 > depth_max:
                return False
            depth += 1
            stack[depth] = Open(size, key_count, kind == 4)
            continue
        if size > end - at:
            return False
        if kind == 2:
            if not is_ascii(data + at, size):
                return False
            if key_next:
                if key_count == KEYS_MAX:
                    return False
                keys[key_count] = Key(data + at, size)
                key_count += 1
                if not is_new_key(keys, stack[depth].first_key, key_count):
                    return False
        elif kind == 5 and not is_finite(data + at, size):
            return False
        at += size


def is_plain(data, int depth_max):
    """Return True if ``data`` is certainly one msgpack value within the bounds, nested at most ``depth_max`` deep."""
    cdef Py_buffer view
    cdef bint plain
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            plain = depth_max >= 0 and walk(<const uint8_t *>view.buf, <size_t>view.len, <uint32_t>depth_max)
        return plain
    finally:
        PyBuffer_Release(&view)
