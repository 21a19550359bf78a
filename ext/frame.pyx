# cython: language_level=3
"""The head of a frame: made and proved in one call. What it holds stands in srengine/codec/frames.py, its oracle too.

`proved` says only "this is whole"; for everything else frames.py looks at the same bytes and says what is wrong.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from srengine._native.xxhash cimport XXH3_64bits, XXH3_64bits_withSeed

cdef enum:
    FORMAT = 1

cdef packed struct Head:
    uint8_t magic[4]
    uint16_t format
    uint16_t zero
    uint32_t body_bytes
    uint32_t data_bytes
    uint64_t data_checksum

cdef enum:
    CHECKED_BYTES = 24            # of the head that its checksum covers
    HEAD_BYTES = 32


cdef inline uint64_t checksum_of(const Head *head, const uint8_t *body, size_t body_bytes) noexcept nogil:
    return XXH3_64bits_withSeed(body, body_bytes, XXH3_64bits(head, CHECKED_BYTES))


def sealed(bytes body not None, uint32_t data_bytes, uint64_t data_checksum):
    """Return head and ``body`` in one piece."""
    cdef size_t body_bytes = <size_t>PyBytes_GET_SIZE(body)
    cdef const uint8_t *source = <const uint8_t *>PyBytes_AS_STRING(body)
    cdef bytes whole
    cdef uint8_t *target
    cdef Head head
    cdef uint64_t checksum
    if body_bytes > 0xFFFFFFFF:
        raise OverflowError(body_bytes)
    memcpy(head.magic, b"srEf", 4)
    head.format = FORMAT
    head.zero = 0
    head.body_bytes = <uint32_t>body_bytes
    head.data_bytes = data_bytes
    head.data_checksum = data_checksum
    checksum = checksum_of(&head, source, body_bytes)
    whole = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(HEAD_BYTES + body_bytes))
    target = <uint8_t *>PyBytes_AS_STRING(whole)
    memcpy(target, &head, CHECKED_BYTES)
    memcpy(target + CHECKED_BYTES, &checksum, 8)
    memcpy(target + HEAD_BYTES, source, body_bytes)
    return whole


def proved(bytes first not None, uint64_t data_bytes):
    """Return the checksum that the head declares for the data; -1 unless head and body are whole and declare
    ``data_bytes``.
    """
    cdef size_t size = <size_t>PyBytes_GET_SIZE(first)
    cdef const uint8_t *source = <const uint8_t *>PyBytes_AS_STRING(first)
    cdef Head head
    cdef uint64_t checksum
    if size < HEAD_BYTES:
        return -1
    memcpy(&head, source, CHECKED_BYTES)
    memcpy(&checksum, source + CHECKED_BYTES, 8)
    if memcmp(head.magic, b"srEf", 4) != 0 or head.format != FORMAT or head.zero != 0:
        return -1
    if head.body_bytes != size - HEAD_BYTES or head.data_bytes != data_bytes:
        return -1
    if checksum_of(&head, source + HEAD_BYTES, head.body_bytes) != checksum:
        return -1
    return head.data_checksum
