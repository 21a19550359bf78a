# cython: language_level=3, boundscheck=False, wraparound=False, auto_pickle=False
"""The yardstick: the tablet's work as plain C loops on the same LMDB and the same xxHash, and nothing else.

What a tablet does besides (views, conditions, request ids, errors, a Python face) is missing on purpose: a ratio against
these loops says what all of that costs. They are as fast as we know to make them: keys and values arrive as two packed
arrays, records are written straight into LMDB's pages (MDB_RESERVE), one cursor a database, no Python object a record.

Layout of a record, as in the tablet (docs/formats.md)::

    u8 format | u8 flags | u16 versions | u64 sequence | u64 hybrid clock | u64 content checksum | u32 check | value

``changes`` maps the sequence (a native 64-bit integer) to the key. Keys and values have one size each in a store.

Every method releases the GIL while it works, and raises `LmdbError` with LMDB's words when a call fails.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, qsort
from libc.string cimport memcmp, memcpy  # no-cython-lint (memcmp: in the C text below)
from cpython.bytes cimport PyBytes_FromStringAndSize

import os


cdef extern from "lmdb.h" nogil:
    ctypedef struct MDB_env:
        pass
    ctypedef struct MDB_txn:
        pass
    ctypedef struct MDB_cursor:
        pass
    ctypedef unsigned int MDB_dbi
    ctypedef struct MDB_val:
        size_t mv_size
        void *mv_data
    ctypedef enum MDB_cursor_op:
        MDB_FIRST
        MDB_NEXT
        MDB_SET_KEY
    enum:
        MDB_CREATE
        MDB_INTEGERKEY
        MDB_NOOVERWRITE
        MDB_CURRENT
        MDB_RESERVE
        MDB_APPEND
        MDB_RDONLY
        MDB_NOTLS
        MDB_NORDAHEAD
        MDB_KEYEXIST
        MDB_NOTFOUND
        MDB_SUCCESS
    char *mdb_strerror(int err)
    int mdb_env_create(MDB_env **env)
    int mdb_env_set_mapsize(MDB_env *env, size_t size)
    int mdb_env_set_maxdbs(MDB_env *env, MDB_dbi dbs)
    int mdb_env_open(MDB_env *env, const char *path, unsigned int flags, int mode)
    void mdb_env_close(MDB_env *env)
    int mdb_txn_begin(MDB_env *env, MDB_txn *parent, unsigned int flags, MDB_txn **txn)
    int mdb_txn_commit(MDB_txn *txn)
    void mdb_txn_abort(MDB_txn *txn)
    int mdb_dbi_open(MDB_txn *txn, const char *name, unsigned int flags, MDB_dbi *dbi)
    int mdb_cursor_open(MDB_txn *txn, MDB_dbi dbi, MDB_cursor **cursor)
    void mdb_cursor_close(MDB_cursor *cursor)
    int mdb_cursor_get(MDB_cursor *cursor, MDB_val *key, MDB_val *data, MDB_cursor_op op)
    int mdb_cursor_put(MDB_cursor *cursor, MDB_val *key, MDB_val *data, unsigned int flags)


cdef extern from "xxhash.h" nogil:
    ctypedef struct XXH128_hash_t:
        uint64_t low64
        uint64_t high64
    uint64_t XXH3_64bits(const void *data, size_t size)
    uint64_t XXH3_64bits_withSeed(const void *data, size_t size, uint64_t seed)
    XXH128_hash_t XXH3_128bits_withSeed(const void *data, size_t size, uint64_t seed)


cdef extern from *:
    """
    #define REFERENCE_HEADER_BYTES 32
    #define REFERENCE_ROW_BYTES 24

    typedef struct { uint64_t prefix; const unsigned char *key; size_t index; size_t key_bytes; } reference_sort_t;

    static int reference_compare(const void *left, const void *right) {
        const reference_sort_t *a = (const reference_sort_t *)left, *b = (const reference_sort_t *)right;
        if (a->prefix != b->prefix) return a->prefix < b->prefix ? -1 : 1;
        return memcmp(a->key, b->key, a->key_bytes);
    }

    static uint64_t reference_prefix(const unsigned char *key, size_t size) {
        uint64_t prefix = 0;
        memcpy(&prefix, key, size < 8 ? size : 8);
    #if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        prefix = __builtin_bswap64(prefix);
    #endif
        return prefix;
    }
    """
    enum:
        REFERENCE_HEADER_BYTES
        REFERENCE_ROW_BYTES
    ctypedef struct reference_sort_t:
        uint64_t prefix
        const unsigned char *key
        size_t index
        size_t key_bytes
    int reference_compare(const void *left, const void *right) noexcept nogil
    uint64_t reference_prefix(const unsigned char *key, size_t size) noexcept nogil


class LmdbError(Exception):
    """An LMDB call of the reference failed."""


cdef int check(int code) except -1:
    if code != MDB_SUCCESS:
        raise LmdbError(mdb_strerror(code).decode())
    return 0


cdef struct Root:
    uint64_t low
    uint64_t high


cdef inline void header_write(
    uint8_t *header, const uint8_t *key, size_t key_bytes, uint64_t sequence, const uint8_t *value, size_t value_bytes,
    uint64_t seed, bint digests, Root *root,
) noexcept nogil:
    """Fill a record's header; with ``digests`` also its checksum and check, and add its digest to ``root``."""
    cdef uint64_t content = 0
    cdef uint32_t header_check = 0
    cdef uint8_t scratch[640]
    header[0] = 1
    header[1] = 0
    header[2] = 0
    header[3] = 0
    memcpy(header + 4, &sequence, 8)
    memcpy(header + 12, &sequence, 8)
    if digests:
        content = XXH3_64bits_withSeed(value, value_bytes, 0)
    memcpy(header + 20, &content, 8)
    if digests:
        memcpy(scratch, key, key_bytes)
        memcpy(scratch + key_bytes, header, 28)
        header_check = <uint32_t>XXH3_64bits(scratch, key_bytes + 28)
        digest_add(root, key, key_bytes, header, seed, 1)
    memcpy(header + 28, &header_check, 4)


cdef inline void digest_add(
    Root *root, const uint8_t *key, size_t key_bytes, const uint8_t *header, uint64_t seed, int sign
) noexcept nogil:
    """Add (or take off, ``sign`` -1) the digest of the record with this header, mod 2^128."""
    cdef uint8_t scratch[640]
    cdef XXH128_hash_t digest
    cdef uint64_t before = root.low
    memcpy(scratch, key, key_bytes)
    memcpy(scratch + key_bytes, header + 1, 27)
    digest = XXH3_128bits_withSeed(scratch, key_bytes + 27, seed)
    if sign > 0:
        root.low += digest.low64
        root.high += digest.high64 + (root.low < before)
    else:
        root.low -= digest.low64
        root.high -= digest.high64 + (before < digest.low64)


cdef class Store:
    """An LMDB environment with the databases ``records`` and ``changes``, and loops over it. One user at a time."""

    cdef MDB_env *environment
    cdef MDB_dbi records
    cdef MDB_dbi changes
    cdef Root root
    cdef uint64_t sequence
    cdef size_t key_bytes
    cdef size_t value_bytes

    def __cinit__(self, path, size_t key_bytes, size_t value_bytes, size_t map_bytes):
        cdef MDB_txn *txn = NULL
        cdef bytes name = os.fsencode(path)
        if not 1 <= key_bytes <= 511:
            raise ValueError(f"key_bytes is {key_bytes}, must be 1..511")
        os.makedirs(path, exist_ok=True)
        self.key_bytes = key_bytes
        self.value_bytes = value_bytes
        check(mdb_env_create(&self.environment))
        check(mdb_env_set_mapsize(self.environment, map_bytes))
        check(mdb_env_set_maxdbs(self.environment, 4))
        check(mdb_env_open(self.environment, name, MDB_NOTLS | MDB_NORDAHEAD, 0o600))
        check(mdb_txn_begin(self.environment, NULL, 0, &txn))
        check(mdb_dbi_open(txn, b"records", MDB_CREATE, &self.records))
        check(mdb_dbi_open(txn, b"changes", MDB_CREATE | MDB_INTEGERKEY, &self.changes))
        check(mdb_txn_commit(txn))

    def __dealloc__(self):
        if self.environment != NULL:
            mdb_env_close(self.environment)
            self.environment = NULL

    def close(self):
        """Close the environment. No other call afterwards."""
        if self.environment != NULL:
            mdb_env_close(self.environment)
            self.environment = NULL

    cdef size_t pairs(self, const uint8_t[::1] keys, const uint8_t[::1] values) except? 0:
        cdef size_t count = keys.shape[0] // self.key_bytes
        if self.environment == NULL:
            raise ValueError("the store is closed")
        if count * self.key_bytes != <size_t>keys.shape[0] or count * self.value_bytes != <size_t>values.shape[0]:
            raise ValueError(f"{keys.shape[0]} bytes of keys and {values.shape[0]} of values are no pairs")
        if count == 0:
            raise ValueError("an empty batch")
        return count

    def put_batch(self, const uint8_t[::1] keys, const uint8_t[::1] values, *, bint digests=True):
        """Put one batch: sort by key, look at the old header, put, append the change; one transaction, one fsync.

        An insert is tried first (MDB_NOOVERWRITE); where the key exists the cursor stands on it, so its header is read
        there and the record replaced in place (MDB_CURRENT). Both arrays are packed.
        """
        cdef size_t count = self.pairs(keys, values)
        cdef int code
        with nogil:
            code = self.put_batch_nogil(&keys[0], &values[0], count, digests)
        check(code)

    cdef int put_batch_nogil(self, const uint8_t *keys, const uint8_t *values, size_t count, bint digests) noexcept nogil:
        cdef MDB_txn *txn = NULL
        cdef MDB_cursor *records = NULL
        cdef MDB_cursor *changes = NULL
        cdef MDB_val key, data, change_key
        cdef uint64_t sequence = self.sequence
        cdef Root root = self.root
        cdef uint64_t old_sequence = 0
        cdef size_t position
        cdef const uint8_t *value
        cdef int code
        cdef reference_sort_t *order = <reference_sort_t *>malloc(count * sizeof(reference_sort_t))
        if order == NULL:
            return 12
        for position in range(count):
            order[position].key = keys + position * self.key_bytes
            order[position].prefix = reference_prefix(order[position].key, self.key_bytes)
            order[position].key_bytes = self.key_bytes
            order[position].index = position
        qsort(order, count, sizeof(reference_sort_t), &reference_compare)
        code = mdb_txn_begin(self.environment, NULL, 0, &txn)
        if code:
            free(order)
            return code
        code = mdb_cursor_open(txn, self.records, &records)
        if code == 0:
            code = mdb_cursor_open(txn, self.changes, &changes)
        position = 0
        while code == 0 and position < count:
            key.mv_data = <void *>order[position].key
            key.mv_size = self.key_bytes
            value = values + order[position].index * self.value_bytes
            data.mv_data = NULL
            data.mv_size = REFERENCE_HEADER_BYTES + self.value_bytes
            code = mdb_cursor_put(records, &key, &data, MDB_NOOVERWRITE | MDB_RESERVE)
            if code == MDB_KEYEXIST:
                memcpy(&old_sequence, <uint8_t *>data.mv_data + 4, 8)
                if digests:
                    digest_add(&root, order[position].key, self.key_bytes, <uint8_t *>data.mv_data, 7, -1)
                data.mv_data = NULL
                data.mv_size = REFERENCE_HEADER_BYTES + self.value_bytes
                code = mdb_cursor_put(records, &key, &data, MDB_CURRENT | MDB_RESERVE)
            if code:
                break
            sequence += 1
            header_write(
                <uint8_t *>data.mv_data, order[position].key, self.key_bytes, sequence, value, self.value_bytes, 7,
                digests, &root,
            )
            memcpy(<uint8_t *>data.mv_data + REFERENCE_HEADER_BYTES, value, self.value_bytes)
            change_key.mv_data = &sequence
            change_key.mv_size = 8
            data.mv_data = <void *>order[position].key
            data.mv_size = self.key_bytes
            code = mdb_cursor_put(changes, &change_key, &data, MDB_APPEND)
            position += 1
        free(order)
        if records != NULL:
            mdb_cursor_close(records)
        if changes != NULL:
            mdb_cursor_close(changes)
        if code:
            mdb_txn_abort(txn)
            return code
        code = mdb_txn_commit(txn)
        if code == 0:
            self.sequence = sequence
            self.root = root
        return code

    def append_load(self, const uint8_t[::1] keys, const uint8_t[::1] values, size_t transaction_records):
        """Load records that are sorted by key into the empty store with MDB_APPEND, and the log with them.

        No checksums, one fsync for each ``transaction_records`` records.
        """
        cdef size_t count = self.pairs(keys, values)
        cdef size_t first = 0
        cdef size_t size
        cdef int code = 0
        with nogil:
            while code == 0 and first < count:
                size = min(transaction_records, count - first)
                code = self.append_nogil(
                    &keys[0] + first * self.key_bytes, &values[0] + first * self.value_bytes, size
                )
                first += size
        check(code)

    cdef int append_nogil(self, const uint8_t *keys, const uint8_t *values, size_t count) noexcept nogil:
        cdef MDB_txn *txn = NULL
        cdef MDB_cursor *records = NULL
        cdef MDB_cursor *changes = NULL
        cdef MDB_val key, data, change_key
        cdef uint64_t sequence = self.sequence
        cdef size_t position = 0
        cdef int code = mdb_txn_begin(self.environment, NULL, 0, &txn)
        if code:
            return code
        code = mdb_cursor_open(txn, self.records, &records)
        if code == 0:
            code = mdb_cursor_open(txn, self.changes, &changes)
        while code == 0 and position < count:
            key.mv_data = <void *>(keys + position * self.key_bytes)
            key.mv_size = self.key_bytes
            data.mv_data = NULL
            data.mv_size = REFERENCE_HEADER_BYTES + self.value_bytes
            code = mdb_cursor_put(records, &key, &data, MDB_APPEND | MDB_RESERVE)
            if code:
                break
            sequence += 1
            header_write(
                <uint8_t *>data.mv_data, <const uint8_t *>key.mv_data, self.key_bytes, sequence, NULL, 0, 7, 0, NULL
            )
            memcpy(<uint8_t *>data.mv_data + REFERENCE_HEADER_BYTES, values + position * self.value_bytes, self.value_bytes)
            change_key.mv_data = &sequence
            change_key.mv_size = 8
            data.mv_data = key.mv_data
            data.mv_size = self.key_bytes
            code = mdb_cursor_put(changes, &change_key, &data, MDB_APPEND)
            position += 1
        if records != NULL:
            mdb_cursor_close(records)
        if changes != NULL:
            mdb_cursor_close(changes)
        if code:
            mdb_txn_abort(txn)
            return code
        code = mdb_txn_commit(txn)
        if code == 0:
            self.sequence = sequence
        return code

    def scan_copy(self, size_t buffer_bytes=1 << 20):
        """Walk all records with a cursor and copy each key and value into a buffer that is used again and again.

        Return (records, bytes copied).
        """
        cdef uint64_t records = 0
        cdef uint64_t total = 0
        cdef int code
        cdef uint8_t *buffer = <uint8_t *>malloc(buffer_bytes)
        if buffer == NULL:
            raise MemoryError
        with nogil:
            code = self.scan_nogil(buffer, buffer_bytes, 0, &records, &total, NULL)
        free(buffer)
        check(code)
        return records, total

    def scan_headers(self):
        """Walk all records with a cursor and read every header: the sum of all sequences and checksums, modulo 2^64."""
        cdef MDB_txn *txn = NULL
        cdef MDB_cursor *cursor = NULL
        cdef MDB_val key, data
        cdef uint64_t total = 0
        cdef uint64_t sequence, checksum
        cdef int code
        with nogil:
            code = mdb_txn_begin(self.environment, NULL, MDB_RDONLY, &txn)
            if code == MDB_SUCCESS:
                code = mdb_cursor_open(txn, self.records, &cursor)
                if code == MDB_SUCCESS:
                    code = mdb_cursor_get(cursor, &key, &data, MDB_FIRST)
                    while code == MDB_SUCCESS:
                        memcpy(&sequence, <uint8_t *>data.mv_data + 4, 8)
                        memcpy(&checksum, <uint8_t *>data.mv_data + 20, 8)
                        total += sequence + checksum
                        code = mdb_cursor_get(cursor, &key, &data, MDB_NEXT)
                    mdb_cursor_close(cursor)
                mdb_txn_abort(txn)
        if code != MDB_NOTFOUND:
            check(code)
        return total

    def scan_blocks(self, size_t block_bytes=1 << 20, *, bint keep=False):
        """Walk all records and copy them as rows (24 bytes of header, key, value) into blocks.

        Return the number of bytes, or the blocks themselves as a list of bytes with ``keep`` (those make Python objects,
        one a block; the walk without them is the yardstick).
        """
        cdef uint64_t records = 0
        cdef uint64_t total = 0
        cdef int code
        cdef uint8_t *buffer = <uint8_t *>malloc(block_bytes)
        blocks = [] if keep else None
        if buffer == NULL:
            raise MemoryError
        if keep:
            code = self.scan_nogil(buffer, block_bytes, 1, &records, &total, <void *>blocks)
        else:
            with nogil:
                code = self.scan_nogil(buffer, block_bytes, 1, &records, &total, NULL)
        free(buffer)
        check(code)
        return blocks if keep else total

    cdef int scan_nogil(
        self, uint8_t *buffer, size_t buffer_bytes, bint rows, uint64_t *records, uint64_t *total, void *blocks
    ) noexcept nogil:
        cdef MDB_txn *txn = NULL
        cdef MDB_cursor *cursor = NULL
        cdef MDB_val key, data
        cdef size_t used = 0
        cdef size_t value_bytes, needed
        cdef uint16_t key_bytes
        cdef uint32_t length
        cdef uint8_t *place
        cdef int code = mdb_txn_begin(self.environment, NULL, MDB_RDONLY, &txn)
        if code:
            return code
        code = mdb_cursor_open(txn, self.records, &cursor)
        if code == 0:
            code = mdb_cursor_get(cursor, &key, &data, MDB_FIRST)
        while code == 0:
            value_bytes = data.mv_size - REFERENCE_HEADER_BYTES
            needed = key.mv_size + value_bytes + (REFERENCE_ROW_BYTES if rows else 0)
            if used + needed > buffer_bytes:
                total[0] += used
                if blocks != NULL:
                    keep_block(blocks, buffer, used)
                used = 0
            place = buffer + used
            if rows:
                key_bytes = <uint16_t>key.mv_size
                length = <uint32_t>value_bytes
                place[0] = (<uint8_t *>data.mv_data)[1]
                place[1] = 0
                memcpy(place + 2, &key_bytes, 2)
                memcpy(place + 4, &length, 4)
                memcpy(place + 8, <uint8_t *>data.mv_data + 4, 16)
                place += REFERENCE_ROW_BYTES
            memcpy(place, key.mv_data, key.mv_size)
            memcpy(place + key.mv_size, <uint8_t *>data.mv_data + REFERENCE_HEADER_BYTES, value_bytes)
            used += needed
            records[0] += 1
            code = mdb_cursor_get(cursor, &key, &data, MDB_NEXT)
        total[0] += used
        if blocks != NULL and used:
            keep_block(blocks, buffer, used)
        if cursor != NULL:
            mdb_cursor_close(cursor)
        mdb_txn_abort(txn)
        return 0 if code == MDB_NOTFOUND else code


cdef void keep_block(void *blocks, const uint8_t *buffer, size_t size) noexcept with gil:
    (<list>blocks).append(PyBytes_FromStringAndSize(<const char *>buffer, size))


def hash_64_bytes(size_t times):
    """Take XXH3-64 of 64 bytes so many times, each depending on the one before; return the last."""
    cdef uint8_t data[64]
    cdef uint64_t hashed = 0
    cdef size_t i, _i
    for i in range(64):
        data[i] = <uint8_t>i
    with nogil:
        for _i in range(times):
            memcpy(data, &hashed, 8)
            hashed = XXH3_64bits(data, 64)
    return hashed
