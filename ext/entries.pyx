# cython: language_level=3
"""Entries of the log of consensus as rows, chained: all rows of a turn in one call.

What a row holds stands in srengine/consensus/log_rows.py and docs/formats-log.md, the oracle in tests/reference/log.py.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from srengine._native.xxhash cimport XXH3_128bits, XXH128_hash_t

cdef enum:
    CHAIN = 16
    CHAINED_HEAD = 37             # what is digested before configuration and data: chain, index, term, kind, size
    VALUE_HEAD = 32               # term, kind, zeros, size of the configuration, chain


cdef inline void store32(uint8_t *target, uint32_t value) noexcept nogil:
    cdef int i
    for i in range(4):
        target[i] = <uint8_t>(value >> (8 * i))


cdef inline void store64(uint8_t *target, uint64_t value) noexcept nogil:
    cdef int i
    for i in range(8):
        target[i] = <uint8_t>(value >> (8 * i))


cdef inline void store64_big(uint8_t *target, uint64_t value) noexcept nogil:
    cdef int i
    for i in range(8):
        target[i] = <uint8_t>(value >> (56 - 8 * i))


cdef int chain_on(uint8_t *chain, uint64_t index, uint64_t term, uint8_t kind, bytes configuration,
                  bytes data) except -1:
    """Put the chain with an entry in the place of that before it."""
    cdef size_t configuration_bytes = <size_t>PyBytes_GET_SIZE(configuration)
    cdef size_t data_bytes = <size_t>PyBytes_GET_SIZE(data)
    cdef size_t size = CHAINED_HEAD + configuration_bytes + data_bytes
    cdef XXH128_hash_t digest
    cdef uint8_t *whole = <uint8_t *>malloc(size)
    if whole is NULL:
        raise MemoryError
    memcpy(whole, chain, CHAIN)
    store64(whole + 16, index)
    store64(whole + 24, term)
    whole[32] = kind
    store32(whole + 33, <uint32_t>configuration_bytes)
    memcpy(whole + CHAINED_HEAD, PyBytes_AS_STRING(configuration), configuration_bytes)
    memcpy(whole + CHAINED_HEAD + configuration_bytes, PyBytes_AS_STRING(data), data_bytes)
    digest = XXH3_128bits(whole, size)
    free(whole)
    store64_big(chain, digest.high64)
    store64_big(chain + 8, digest.low64)
    return 0


def chained(bytes chain not None, uint64_t index, uint64_t term, uint8_t kind, bytes configuration not None,
            bytes data not None):
    """Return the chain with an entry, of that before it."""
    cdef uint8_t after[CHAIN]
    if PyBytes_GET_SIZE(chain) != CHAIN:
        raise ValueError("a chain of another size")
    memcpy(after, PyBytes_AS_STRING(chain), CHAIN)
    chain_on(after, index, term, kind, configuration, data)
    return PyBytes_FromStringAndSize(<char *>after, CHAIN)


def put_rows(list changes not None, str table not None, bytes prefix not None, entries, bytes chain not None, encode):
    """Append (table, key, value) of each entry to ``changes``; return the chain with the last and the values' sizes.

    ``encode`` makes the bytes of a configuration.
    """
    cdef uint8_t after[CHAIN]
    cdef size_t prefix_bytes = <size_t>PyBytes_GET_SIZE(prefix)
    cdef size_t configuration_bytes, data_bytes
    cdef uint64_t index, term
    cdef uint8_t kind
    cdef bytes configuration, data, key, value
    cdef uint8_t *target
    cdef list sizes = []
    if PyBytes_GET_SIZE(chain) != CHAIN:
        raise ValueError("a chain of another size")
    memcpy(after, PyBytes_AS_STRING(chain), CHAIN)
    for entry in entries:
        index = entry.index
        term = entry.term
        kind = entry.kind
        data = entry.data
        configuration = b"" if entry.configuration is None else encode(entry.configuration)
        if data is None or configuration is None:
            raise TypeError("data and configurations are bytes")
        chain_on(after, index, term, kind, configuration, data)
        configuration_bytes = <size_t>PyBytes_GET_SIZE(configuration)
        data_bytes = <size_t>PyBytes_GET_SIZE(data)
        value = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(VALUE_HEAD + configuration_bytes + data_bytes))
        target = <uint8_t *>PyBytes_AS_STRING(value)
        store64(target, term)
        target[8] = kind
        target[9] = target[10] = target[11] = 0
        store32(target + 12, <uint32_t>configuration_bytes)
        memcpy(target + 16, after, CHAIN)
        memcpy(target + VALUE_HEAD, PyBytes_AS_STRING(configuration), configuration_bytes)
        memcpy(target + VALUE_HEAD + configuration_bytes, PyBytes_AS_STRING(data), data_bytes)
        key = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(prefix_bytes + 8))
        memcpy(PyBytes_AS_STRING(key), PyBytes_AS_STRING(prefix), prefix_bytes)
        store64_big(<uint8_t *>PyBytes_AS_STRING(key) + prefix_bytes, index)
        changes.append((table, key, value))
        sizes.append(PyBytes_GET_SIZE(value))
    return PyBytes_FromStringAndSize(<char *>after, CHAIN), sizes
