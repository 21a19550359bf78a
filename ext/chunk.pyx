# cython: language_level=3
"""The byte work of snapshots: heads, digests, bounded readers of rows and of zstd frames.

An item of a snapshot (manifest, chunk, trailer) is a head followed by stored bytes:

    head    fixed part (112 bytes, ends with the digest) | after key | last key
    digest  XXH3-128 of: fixed part without the digest | keys | XXH3-128 of the stored bytes

Every function that walks bytes does so without the GIL on pointers and sizes; the ``def`` functions check arguments.
Nothing here decides anything: the rules between items stand in srengine/snapshot/transfer_machine.py. The plain-Python
oracle is tests/reference/chunk.py.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from srengine._native.xxhash cimport XXH3_128bits, XXH128_hash_t

cdef extern from "xxh3_wide.h" nogil:
    XXH128_hash_t sr_xxh3_128(const void *data, size_t size)
    bint sr_xxh3_choose(bint wide)

from srengine.errors import SnapshotDamaged, UnsupportedFeature

cdef enum:
    FORMAT = 1
    FIXED = 112
    DIGEST_AT = 96
    SNAPSHOT_AT = 56
    SOURCE_AT = 72
    RESERVED_AT = 88
    KEY_MAX = 511
    VALUE_MAX = 67108864
    VERSIONS_MAX = 64
    ROW_HEADER = 24
    ROW_FLAGS_KNOWN = 1
    TOMBSTONE = 1
    KIND_MANIFEST = 1
    KIND_CHUNK = 2
    KIND_TRAILER = 3
    ENCODING_MAX = 1
    FLAGS_KNOWN = 3
    MANIFEST_MAX = 1048576
    CHUNK_MAX = 67174400          # VALUE_MAX + 64 KiB
    TRAILER_MAX = 67108864
    STORED_MAX = 67764736         # CHUNK_MAX + CHUNK_MAX // 128 + 64 KiB

cdef enum:                       # answers of read_fixed
    HEAD_OK = 0
    HEAD_MAGIC = 1
    HEAD_FORMAT = 2
    HEAD_FIELD = 3
    HEAD_SIZE = 4

HEAD_BYTES = FIXED

sr_xxh3_choose(True)

from srengine import limits

assert CHUNK_MAX == limits.CHUNK_BYTES_MAX, (CHUNK_MAX, limits.CHUNK_BYTES_MAX)
assert STORED_MAX == limits.CHUNK_COMPRESSED_BYTES_MAX, (STORED_MAX, limits.CHUNK_COMPRESSED_BYTES_MAX)
assert MANIFEST_MAX == limits.MANIFEST_BYTES_MAX, (MANIFEST_MAX, limits.MANIFEST_BYTES_MAX)
assert TRAILER_MAX == limits.TRAILER_BYTES_MAX, (TRAILER_MAX, limits.TRAILER_BYTES_MAX)
assert KEY_MAX == limits.KEY_BYTES_MAX and VALUE_MAX == limits.VALUE_BYTES_MAX, (KEY_MAX, VALUE_MAX)
assert VERSIONS_MAX == limits.VERSION_ENTRIES_MAX, (VERSIONS_MAX, limits.VERSION_ENTRIES_MAX)


cdef int read_fixed(const uint8_t *data, Head *out) noexcept nogil:
    """Decode the fixed part (FIXED bytes are there) and check every field that can be checked alone."""
    cdef uint64_t reserved
    cdef size_t limit
    if memcmp(data, b"SRSN", 4) != 0:
        return HEAD_MAGIC
    if data[4] != FORMAT:
        return HEAD_FORMAT
    out.kind = data[5]
    out.encoding = data[6]
    out.flags = data[7]
    memcpy(&out.ordinal, data + 8, 8)
    memcpy(&out.raw_bytes, data + 16, 4)
    memcpy(&out.stored_bytes, data + 20, 4)
    memcpy(&out.row_count, data + 24, 4)
    memcpy(&out.after_bytes, data + 28, 2)
    memcpy(&out.last_bytes, data + 30, 2)
    memcpy(&out.view_sequence, data + 32, 8)
    memcpy(&out.after_sequence, data + 40, 8)
    memcpy(&out.last_sequence, data + 48, 8)
    memcpy(&reserved, data + RESERVED_AT, 8)
    if out.kind < KIND_MANIFEST or out.kind > KIND_TRAILER or out.encoding > ENCODING_MAX or reserved != 0:
        return HEAD_FIELD
    if out.flags & ~FLAGS_KNOWN or out.after_bytes > KEY_MAX or out.last_bytes > KEY_MAX:
        return HEAD_FIELD
    if out.kind == KIND_CHUNK:
        limit = CHUNK_MAX
    elif out.kind == KIND_MANIFEST:
        limit = MANIFEST_MAX
    else:
        limit = TRAILER_MAX
    if out.raw_bytes > limit or out.stored_bytes > STORED_MAX:
        return HEAD_SIZE
    if out.encoding == 0 and out.stored_bytes != out.raw_bytes:
        return HEAD_SIZE
    if out.encoding != 0 and (out.kind != KIND_CHUNK or out.stored_bytes >= out.raw_bytes):
        return HEAD_SIZE
    if <uint64_t>out.row_count * (ROW_HEADER + 1) > out.raw_bytes:
        return HEAD_SIZE
    return HEAD_OK


cdef const char *walk_rows(Walk *walk) noexcept nogil:
    """Read rows to the end; NULL when all is well, else the broken rule, with the cursor at the row that broke it."""
    cdef const uint8_t *row
    cdef const uint8_t *key
    cdef uint16_t key_bytes
    cdef uint32_t value_bytes
    cdef uint64_t sequence
    cdef size_t left, need, shared
    cdef int order
    while walk.cursor < walk.end:
        row = walk.cursor
        left = <size_t>(walk.end - row)
        if left < ROW_HEADER:
            return "a row's header is cut off"
        memcpy(&key_bytes, row + 2, 2)
        memcpy(&value_bytes, row + 4, 4)
        memcpy(&sequence, row + 8, 8)
        if row[0] & ~ROW_FLAGS_KNOWN:
            return "a row has unknown flags"
        if row[1] > VERSIONS_MAX:
            return "a row has too many version entries"
        if key_bytes < 1 or key_bytes > KEY_MAX:
            return "a row's key has a forbidden length"
        if value_bytes > VALUE_MAX:
            return "a row's value is too large"
        if row[0] & TOMBSTONE and value_bytes != 0:
            return "a tombstone has a value"
        need = ROW_HEADER + <size_t>key_bytes + 16 * <size_t>row[1] + value_bytes
        if left < need:
            return "a row is cut off"
        if sequence == 0 or sequence > walk.sequence_max:
            return "a row's sequence is not one of its view"
        key = row + ROW_HEADER
        if walk.by_key:
            shared = key_bytes if key_bytes < walk.last_key_bytes else walk.last_key_bytes
            order = memcmp(key, walk.last_key, shared) if shared else 0
            if order < 0 or (order == 0 and key_bytes <= walk.last_key_bytes):
                return "keys do not rise"
        elif sequence <= walk.last_sequence:
            return "sequences do not rise"
        walk.last_key = key
        walk.last_key_bytes = key_bytes
        walk.last_sequence = sequence
        walk.count += 1
        walk.cursor = row + need
    return NULL


cdef void compute_digest(const uint8_t *fixed, const uint8_t *keys, size_t key_bytes, const uint8_t *stored,
                         size_t stored_bytes, uint8_t *out) noexcept nogil:
    cdef uint8_t joined[DIGEST_AT + 2 * KEY_MAX + 16]
    cdef XXH128_hash_t hashed = sr_xxh3_128(stored, stored_bytes)
    memcpy(joined, fixed, DIGEST_AT)
    if key_bytes:
        memcpy(joined + DIGEST_AT, keys, key_bytes)
    memcpy(joined + DIGEST_AT + key_bytes, &hashed.low64, 8)
    memcpy(joined + DIGEST_AT + key_bytes + 8, &hashed.high64, 8)
    hashed = XXH3_128bits(joined, DIGEST_AT + key_bytes + 16)
    memcpy(out, &hashed.low64, 8)
    memcpy(out + 8, &hashed.high64, 8)


cdef int frame_walk(const uint8_t *data, size_t size, uint64_t *used, uint64_t *window,
                    uint64_t *content) noexcept nogil:
    """Walk the first zstd frame (RFC 8878, 3.1.1) block by block; -1: not a whole frame. content 2^64-1: not declared."""
    cdef size_t at = 5
    cdef uint8_t descriptor
    cdef uint32_t block
    cdef uint64_t base
    cdef size_t content_bytes, dictionary_bytes
    cdef bint single, checksum
    cdef int kind
    if size < 6 or memcmp(data, b"\x28\xb5\x2f\xfd", 4) != 0:
        return -1
    descriptor = data[4]
    single = (descriptor >> 5) & 1
    checksum = (descriptor >> 2) & 1
    if descriptor & 8:                     # reserved bit
        return -1
    dictionary_bytes = (1 << (descriptor & 3)) >> 1
    content_bytes = 1 << (descriptor >> 6)
    if content_bytes == 1 and not single:
        content_bytes = 0
    window[0] = 0
    if not single:
        base = <uint64_t>1 << (10 + (data[at] >> 3))
        window[0] = base + (base >> 3) * (data[at] & 7)
        at += 1
    if size < at + dictionary_bytes + content_bytes:
        return -1
    at += dictionary_bytes
    content[0] = 0
    if content_bytes:
        memcpy(content, data + at, content_bytes)
        if content_bytes == 2:
            content[0] += 256
        at += content_bytes
    else:
        content[0] = <uint64_t>-1
    if single:
        window[0] = content[0]
    while True:
        if size < at + 3:
            return -1
        block = data[at] | (<uint32_t>data[at + 1] << 8) | (<uint32_t>data[at + 2] << 16)
        at += 3
        kind = (block >> 1) & 3
        if kind == 3:
            return -1
        at += 1 if kind == 1 else block >> 3
        if at > size:
            return -1
        if block & 1:
            break
    if checksum:
        at += 4
    if at > size:
        return -1
    used[0] = at
    return 0


cdef object refuse(int answer, const uint8_t *data):
    if answer == HEAD_MAGIC:
        raise SnapshotDamaged("the bytes are no item of a snapshot", found=PyBytes_FromStringAndSize(<char *>data, 4))
    if answer == HEAD_FORMAT:
        raise UnsupportedFeature(
            f"the snapshot has format {data[4]}, this version reads {FORMAT}", found=data[4], known=FORMAT
        )
    if answer == HEAD_SIZE:
        raise SnapshotDamaged("an item of a snapshot declares sizes beyond their limits")
    raise SnapshotDamaged("an item of a snapshot has a field that no version writes")


def choose_vectors(*, bint wide):
    """Hash with the widest vectors, or without; see chunk.pyi."""
    return sr_xxh3_choose(wide)


def seal(int kind, int encoding, int flags, uint64_t ordinal, uint32_t raw_bytes, uint32_t row_count,
         bytes after_key not None, bytes last_key not None, uint64_t view_sequence, uint64_t after_sequence,
         uint64_t last_sequence, bytes snapshot not None, bytes source not None, stored):
    """Return the head of an item with its digest; see chunk.pyi."""
    cdef size_t after_bytes = PyBytes_GET_SIZE(after_key)
    cdef size_t last_bytes = PyBytes_GET_SIZE(last_key)
    cdef uint16_t after_size = <uint16_t>after_bytes
    cdef uint16_t last_size = <uint16_t>last_bytes
    cdef uint32_t stored_bytes
    cdef Py_buffer view
    cdef Head head
    cdef bytes made
    cdef uint8_t *out
    cdef int answer
    if after_bytes > KEY_MAX or last_bytes > KEY_MAX:
        raise ValueError("a key is too long for a head")
    if PyBytes_GET_SIZE(snapshot) != 16 or PyBytes_GET_SIZE(source) != 16:
        raise ValueError("snapshot and source are 16 bytes each")
    PyObject_GetBuffer(stored, &view, PyBUF_SIMPLE)
    try:
        if view.len > STORED_MAX:
            raise ValueError(f"{view.len} stored bytes are more than an item may have")
        stored_bytes = <uint32_t>view.len
        made = PyBytes_FromStringAndSize(NULL, FIXED + after_bytes + last_bytes)
        out = <uint8_t *>PyBytes_AS_STRING(made)
        memset(out, 0, FIXED)
        memcpy(out, b"SRSN", 4)
        out[4] = FORMAT
        out[5] = <uint8_t>kind
        out[6] = <uint8_t>encoding
        out[7] = <uint8_t>flags
        memcpy(out + 8, &ordinal, 8)
        memcpy(out + 16, &raw_bytes, 4)
        memcpy(out + 20, &stored_bytes, 4)
        memcpy(out + 24, &row_count, 4)
        memcpy(out + 28, &after_size, 2)
        memcpy(out + 30, &last_size, 2)
        memcpy(out + 32, &view_sequence, 8)
        memcpy(out + 40, &after_sequence, 8)
        memcpy(out + 48, &last_sequence, 8)
        memcpy(out + SNAPSHOT_AT, PyBytes_AS_STRING(snapshot), 16)
        memcpy(out + SOURCE_AT, PyBytes_AS_STRING(source), 16)
        memcpy(out + FIXED, PyBytes_AS_STRING(after_key), after_bytes)
        memcpy(out + FIXED + after_bytes, PyBytes_AS_STRING(last_key), last_bytes)
        answer = read_fixed(out, &head)
        if answer != HEAD_OK or kind != head.kind or encoding != head.encoding or flags != head.flags:
            raise ValueError("a field of the head is out of range")
        with nogil:
            compute_digest(out, out + FIXED, after_bytes + last_bytes, <const uint8_t *>view.buf, stored_bytes,
                           out + DIGEST_AT)
        return made
    finally:
        PyBuffer_Release(&view)


def join(bytes head not None, stored):
    """Return head and stored bytes as one item; see chunk.pyi."""
    cdef Py_buffer view
    cdef size_t head_bytes = PyBytes_GET_SIZE(head)
    cdef const char *source = PyBytes_AS_STRING(head)
    cdef bytes made
    cdef char *out
    PyObject_GetBuffer(stored, &view, PyBUF_SIMPLE)
    try:
        made = PyBytes_FromStringAndSize(NULL, head_bytes + view.len)
        out = PyBytes_AS_STRING(made)
        with nogil:
            memcpy(out, source, head_bytes)
            memcpy(out + head_bytes, view.buf, view.len)
        return made
    finally:
        PyBuffer_Release(&view)


def measure(fixed):
    """Return (head bytes, stored bytes, raw bytes) as declared, checked against limits; see chunk.pyi."""
    cdef Py_buffer view
    cdef Head head
    cdef int answer
    PyObject_GetBuffer(fixed, &view, PyBUF_SIMPLE)
    try:
        if view.len < FIXED:
            raise SnapshotDamaged("an item of a snapshot is shorter than its head", bytes=view.len)
        answer = read_fixed(<const uint8_t *>view.buf, &head)
        if answer != HEAD_OK:
            refuse(answer, <const uint8_t *>view.buf)
        return FIXED + head.after_bytes + head.last_bytes, head.stored_bytes, head.raw_bytes
    finally:
        PyBuffer_Release(&view)


def read_head(head not None):
    """Decode a whole head; see chunk.pyi."""
    cdef Py_buffer view
    cdef Head fields
    cdef const char *start
    cdef int answer
    PyObject_GetBuffer(head, &view, PyBUF_SIMPLE)
    try:
        start = <const char *>view.buf
        if view.len < FIXED:
            raise SnapshotDamaged("an item of a snapshot is shorter than its head", bytes=view.len)
        answer = read_fixed(<const uint8_t *>start, &fields)
        if answer != HEAD_OK:
            refuse(answer, <const uint8_t *>start)
        if <size_t>view.len < <size_t>FIXED + fields.after_bytes + fields.last_bytes:
            raise SnapshotDamaged("an item of a snapshot is shorter than its head", bytes=view.len)
        return (
            fields.kind, fields.encoding, fields.flags, fields.ordinal,
            fields.raw_bytes, fields.stored_bytes, fields.row_count,
            PyBytes_FromStringAndSize(start + FIXED, fields.after_bytes),
            PyBytes_FromStringAndSize(start + FIXED + fields.after_bytes, fields.last_bytes),
            fields.view_sequence, fields.after_sequence, fields.last_sequence,
            PyBytes_FromStringAndSize(start + SNAPSHOT_AT, 16),
            PyBytes_FromStringAndSize(start + SOURCE_AT, 16),
            PyBytes_FromStringAndSize(start + DIGEST_AT, 16),
        )
    finally:
        PyBuffer_Release(&view)


def verify(head, stored):
    """Return whether the digest in the head holds; see chunk.pyi."""
    cdef Py_buffer view, body
    cdef uint16_t after_bytes, last_bytes
    cdef uint8_t found[16]
    cdef const uint8_t *start
    PyObject_GetBuffer(head, &view, PyBUF_SIMPLE)
    try:
        start = <const uint8_t *>view.buf
        if view.len < FIXED:
            return False
        memcpy(&after_bytes, start + 28, 2)
        memcpy(&last_bytes, start + 30, 2)
        if after_bytes > KEY_MAX or last_bytes > KEY_MAX:
            return False
        if <size_t>view.len < <size_t>FIXED + after_bytes + last_bytes:
            return False
        PyObject_GetBuffer(stored, &body, PyBUF_SIMPLE)
        try:
            with nogil:
                compute_digest(start, start + FIXED, <size_t>after_bytes + last_bytes, <const uint8_t *>body.buf,
                               <size_t>body.len, found)
        finally:
            PyBuffer_Release(&body)
        return memcmp(found, start + DIGEST_AT, 16) == 0
    finally:
        PyBuffer_Release(&view)


def fold(bytes running not None, bytes digest not None):
    """Return the running digest after one more item; see chunk.pyi."""
    cdef uint8_t joined[32]
    cdef XXH128_hash_t hashed
    if PyBytes_GET_SIZE(running) != 16 or PyBytes_GET_SIZE(digest) != 16:
        raise ValueError("both digests are 16 bytes")
    memcpy(joined, PyBytes_AS_STRING(running), 16)
    memcpy(joined + 16, PyBytes_AS_STRING(digest), 16)
    hashed = XXH3_128bits(joined, 32)
    memcpy(joined, &hashed.low64, 8)
    memcpy(joined + 8, &hashed.high64, 8)
    return PyBytes_FromStringAndSize(<char *>joined, 16)


def check_rows(rows, *, bint by_key, bytes after_key not None, uint64_t after_sequence, uint64_t sequence_max):
    """Read rows to the end; see chunk.pyi."""
    cdef Py_buffer view
    cdef Walk walk
    cdef const char *broken
    PyObject_GetBuffer(rows, &view, PyBUF_SIMPLE)
    try:
        walk.cursor = <const uint8_t *>view.buf
        walk.end = walk.cursor + view.len
        walk.last_key = <const uint8_t *>PyBytes_AS_STRING(after_key)
        walk.last_key_bytes = PyBytes_GET_SIZE(after_key)
        walk.last_sequence = after_sequence
        walk.sequence_max = sequence_max
        walk.count = 0
        walk.by_key = by_key
        with nogil:
            broken = walk_rows(&walk)
        if broken != NULL:
            raise SnapshotDamaged(
                f"{broken.decode('ascii')} (byte {walk.cursor - <const uint8_t *>view.buf} of a chunk's rows)"
            )
        if walk.count == 0:
            return 0, b"", 0
        return (
            walk.count, PyBytes_FromStringAndSize(<const char *>walk.last_key, walk.last_key_bytes), walk.last_sequence
        )
    finally:
        PyBuffer_Release(&view)


def zstd_frame(data):
    """Return (frame bytes, window bytes, content bytes or -1); see chunk.pyi."""
    cdef Py_buffer view
    cdef uint64_t used = 0
    cdef uint64_t window = 0
    cdef uint64_t content = 0
    cdef int answer
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            answer = frame_walk(<const uint8_t *>view.buf, <size_t>view.len, &used, &window, &content)
        if answer != 0:
            raise SnapshotDamaged("compressed bytes are no whole zstd frame")
        return used, window, -1 if content == <uint64_t>-1 else content
    finally:
        PyBuffer_Release(&view)
