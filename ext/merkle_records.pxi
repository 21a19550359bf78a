# Records one by one: id and value of each, for sketches over records.

cdef struct Scan:                # where a walk writes: rising from the front, or, backward, falling from the end
    uint64_t *ids
    uint64_t *values
    int64_t at
    int64_t step
    size_t used
    size_t room
    uint64_t seed
    int shift
    Cell *cells                  # of the table that is filled on the way, or NULL
    uint64_t table_width
    uint64_t table_seed
    int table_ways
    uint8_t apart[APART_BYTES]


cdef int visit_record(void *context, const uint8_t *key, size_t key_bytes, const Header *header,
                      const Sum *digest) noexcept nogil:
    cdef Scan *scan = <Scan *>context
    cdef uint64_t id, value
    if header is NULL:
        return 0
    if scan.used == scan.room:
        return CODE_ENOUGH
    id = XXH3_64bits_withSeed(key, key_bytes, scan.seed) >> scan.shift
    value = value_of(digest)
    if scan.cells is not NULL:
        sr_add_record(scan.cells, scan.table_width, scan.table_ways, scan.table_seed, id, value)
    scan.ids[scan.at] = id
    scan.values[scan.at] = value
    scan.at += scan.step
    scan.used += 1
    return 0


cdef extern from *:
    """
    #include <stdlib.h>
    #include <sys/mman.h>
    /* Memory that is written once from end to end: by large pages, or each four kilobytes cost a fault. */
    static inline void *sr_large(size_t size) {
        void *memory = NULL;
    #ifdef MADV_HUGEPAGE
        const size_t large = (size_t)1 << 21;
        if (size >= 2 * large) {
            if (posix_memalign(&memory, large, size) != 0) return NULL;
            madvise(memory, size, MADV_HUGEPAGE);
            return memory;
        }
    #endif
        return malloc(size);
    }
    """
    void *sr_large(size_t size) noexcept nogil


cdef void fill_on_the_way(Scan *scan, Sketch table) noexcept:
    scan.cells = table.cells
    scan.table_width = table.width
    scan.table_seed = table.seed
    scan.table_ways = table.ways


cdef class Records:
    """Id and value of every record in key order, from one walk (two with another reader): 16 bytes a record.

    ``table``, over records, is filled on the way.
    """

    def __cinit__(self, Tree tree not None, Reader reader not None, size_t records_max, Reader other=None,
                  Sketch table=None):
        cdef Half one, two
        cdef Scan first, second
        cdef MDB_txn *txn
        cdef int64_t count
        cdef Sketch twin
        cdef size_t i
        memset(&one, 0, sizeof(Half))
        memset(&two, 0, sizeof(Half))
        memset(&first, 0, sizeof(Scan))
        txn = reader.begin()
        count = record_count(tree.environment, txn)
        reader.end()
        self.room = <size_t>(count + 1 if count >= 0 else 1)
        if self.room > records_max + 1:
            raise errors.QuotaExceeded(f"at most {records_max} records are held in memory", limit=records_max)
        self.ids = <uint64_t *>sr_large(self.room * sizeof(uint64_t))
        self.values = <uint64_t *>sr_large(self.room * sizeof(uint64_t))
        if self.ids is NULL or self.values is NULL:
            raise MemoryError
        first.ids = self.ids
        first.values = self.values
        first.room = self.room
        first.seed = tree.environment.seed
        first.shift = tree.id_shift
        first.step = 1
        second = first
        second.step = -1
        second.at = <int64_t>self.room - 1
        if table is not None:
            if table.by_leaf:
                raise errors.InvalidValue("a sketch over leaves takes leaves")
            fill_on_the_way(&first, table)
            twin = Sketch(table.width if other is not None else 1, table.seed, by_leaf=False, ways=table.ways)
            fill_on_the_way(&second, twin)
        one.visit = two.visit = visit_record
        one.context = &first
        two.context = &second
        if walk_both(tree, reader, other, &one, &two) == 0:
            walk_both(tree, reader, None, &one, &two)
        # The gap between the two is what was damaged, and the place to spare.
        memmove(self.ids + first.used, self.ids + self.room - second.used, second.used * sizeof(uint64_t))
        memmove(self.values + first.used, self.values + self.room - second.used, second.used * sizeof(uint64_t))
        self.count = first.used + second.used
        if table is not None and second.used:
            for i in range(<size_t>twin.ways * twin.width):
                sr_join(&table.cells[i], &twin.cells[i])

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
        i = 0
        while True:
            with nogil:
                while i < self.count:
                    at = (self.ids[i] * <uint64_t>0x9E3779B97F4A7C15 >> 20) & mask
                    while table[at] and table[at] != self.ids[i] + 1:
                        at = (at + 1) & mask
                    if table[at]:
                        break
                    i += 1
            if i == self.count:
                break
            result.append(i)
            i += 1
        free(table)
        return result
