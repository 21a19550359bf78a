# Records one by one: id and value of each, for sketches over records.

cdef int visit_record(void *context, const uint8_t *key, size_t key_bytes, const Header *header,
                      const Sum *digest) noexcept nogil:
    cdef Scan *scan = <Scan *>context
    if header is NULL:
        return 0
    if scan.used == scan.room:
        return CODE_ENOUGH
    scan.ids[scan.used] = XXH3_64bits_withSeed(key, key_bytes, scan.seed) >> scan.shift
    scan.values[scan.used] = value_of(digest)
    scan.used += 1
    return 0


cdef struct Scan:
    uint64_t *ids
    uint64_t *values
    size_t used
    size_t room
    uint64_t seed
    int shift


cdef class Records:
    """Id and value of every record in key order, from one walk: 16 bytes a record."""

    def __cinit__(self, Tree tree not None, Reader reader not None, size_t records_max):
        cdef Scan scan
        cdef Range bounds
        cdef Failure failure
        cdef MDB_txn *txn
        cdef int rc
        memset(&scan, 0, sizeof(Scan))
        memset(&bounds, 0, sizeof(Range))
        failure.code = 0
        self.room = <size_t>(tree.count + 1 if tree.count >= 0 else 1)
        if self.room > records_max + 1:
            raise errors.QuotaExceeded(f"at most {records_max} records are held in memory", limit=records_max)
        self.ids = <uint64_t *>malloc(self.room * sizeof(uint64_t))
        self.values = <uint64_t *>malloc(self.room * sizeof(uint64_t))
        if self.ids is NULL or self.values is NULL:
            raise MemoryError
        scan.ids = self.ids
        scan.values = self.values
        scan.room = self.room
        scan.seed = tree.environment.seed
        scan.shift = tree.id_shift
        txn = reader.begin()
        try:
            with nogil:
                rc = walk_records(tree.environment, txn, &bounds, visit_record, &scan, &failure)
        finally:
            reader.end()
        if rc != 0:
            raise_walk(tree.environment, &failure)
        self.count = scan.used

    def __dealloc__(self):
        free(self.ids)
        free(self.values)

    def find(self, list ids not None):
        """Return the positions of the records with these ids, rising."""
        cdef uint64_t mask = 0
        cdef uint64_t at
        cdef size_t i
        cdef uint64_t *table = wanted_table(ids, &mask)
        result = []
        for i in range(self.count):
            at = (self.ids[i] * <uint64_t>0x9E3779B97F4A7C15 >> 20) & mask
            while table[at]:
                if table[at] == self.ids[i] + 1:
                    result.append(i)
                    break
                at = (at + 1) & mask
        free(table)
        return result
