# Records one by one: sketches over them, and where each of them is.

cdef struct Scan:                # where a walk writes: rising from the front, or, backward, falling from the end
    uint32_t *marks
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
    cdef uint64_t id
    if header is NULL:
        return 0
    if scan.used == scan.room:
        return CODE_ENOUGH
    id = XXH3_64bits_withSeed(key, key_bytes, scan.seed) >> scan.shift
    if scan.cells is not NULL:
        sr_add_record(scan.cells, scan.table_width, scan.table_ways, scan.table_seed, id, value_of(digest))
    scan.marks[scan.at] = <uint32_t>id
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
    """Where every record is in key order, by half of its id, from one walk (two with another reader): 4 bytes a record.

    ``table``, over records and empty, gets each of them on the way.
    """

    def __cinit__(self, Tree tree not None, Reader reader not None, size_t records_max, Reader other=None,
                  Sketch table=None):
        cdef MDB_txn *txn
        cdef int64_t count
        if table is not None and table.by_leaf:
            raise errors.InvalidValue("a sketch over leaves takes leaves")
        txn = reader.begin()
        count = record_count(tree.environment, txn)
        reader.end()
        self.room = <size_t>(count + 1 if count >= 0 else 1)
        if self.room > records_max + 1:
            raise errors.QuotaExceeded(f"at most {records_max} records are held in memory", limit=records_max)
        self.marks = <uint32_t *>sr_large(self.room * sizeof(uint32_t))
        if self.marks is NULL:
            raise MemoryError
        self.walk(tree, reader, other, table, True)
        if <int64_t>self.count != tree.count:
            # The leaves leave out what was damaged when they were built, and positions are counted by them.
            if table is not None:
                memset(table.cells, 0, len(table) * sizeof(Cell))
            self.walk(tree, reader, other, table, False)

    cdef int walk(self, Tree tree, Reader reader, Reader other, Sketch table, bint unchecked) except -1:
        cdef Half one, two
        cdef Scan first, second
        cdef Sketch twin
        cdef size_t i
        memset(&one, 0, sizeof(Half))
        memset(&two, 0, sizeof(Half))
        memset(&first, 0, sizeof(Scan))
        first.marks = self.marks
        first.room = self.room
        first.seed = tree.environment.seed
        first.shift = tree.id_shift
        first.step = 1
        second = first
        second.step = -1
        second.at = <int64_t>self.room - 1
        if table is not None:
            fill_on_the_way(&first, table)
            twin = Sketch(table.width if other is not None else 1, table.seed, by_leaf=False, ways=table.ways)
            fill_on_the_way(&second, twin)
        one.visit = two.visit = visit_record
        one.context = &first
        two.context = &second
        one.bounds.unchecked = two.bounds.unchecked = unchecked
        if walk_both(tree, reader, other, &one, &two) == 0:
            walk_both(tree, reader, None, &one, &two)
        # The gap between the two is what was damaged, and the place to spare.
        memmove(self.marks + first.used, self.marks + self.room - second.used, second.used * sizeof(uint32_t))
        self.count = first.used + second.used
        if table is not None and second.used:
            for i in range(<size_t>twin.ways * twin.width):
                sr_join(&table.cells[i], &twin.cells[i])
        return 0

    def __dealloc__(self):
        free(self.marks)

    def find(self, list ids not None):
        """Return the positions of the records that may have these ids, rising: those that share half of one."""
        cdef uint64_t mask = 0
        cdef uint64_t at
        cdef size_t i = 0
        cdef uint64_t *table = wanted_table([item & 0xffffffff for item in ids], &mask)
        result = []
        while True:
            with nogil:
                while i < self.count:
                    at = (<uint64_t>self.marks[i] * <uint64_t>0x9E3779B97F4A7C15 >> 20) & mask
                    while table[at] and table[at] != <uint64_t>self.marks[i] + 1:
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
