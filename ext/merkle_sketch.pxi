# Sketches: tables of sums from which few differing items can be read back, whatever the number of equal ones.
#
# An item has an id (47 bits) and a value; it is added to one cell in each of three to five subtables (`ways`; the
# smaller the table, the better more of them peel), chosen by its id and the table's seed. Subtracting the table of the other side leaves the sums of what differs. A cell is *pure* when its product
# is a multiple of its value and the quotient is an id that belongs into this cell: then it holds one item, which is taken
# out of its other cells, which makes more cells pure ("peeling"). An updated item is one unknown: value new - old.
#
#   cell on the wire   leaves   6 sum of values | 12 sum of value x id | 12 sum of weighted sums        30 bytes
#                      records  6 sum of values | 11 sum of value x id                                  17 bytes
#   places             h = XXH3-128(id as 8 bytes, seed): subtable 0 by h's bits 0..31, 1 by 32..63, 2 by 64..95, 3 by
#                      96..127, 4 by bits 32..63 of low half + high half x 0x9E3779B97F4A7C15; each number x cells of a subtable / 2^32
#
# NB: the quotient test replaces a checksum: a cell with two items passes it with a chance of about 2^-40.

cdef extern from *:
    """
    static inline void sr_places(uint64_t id, uint64_t seed, uint64_t width, int ways, uint64_t *out) {
        XXH128_hash_t h = XXH3_128bits_withSeed(&id, 8, seed);
        out[0] = ((h.low64 & 0xffffffffu) * width) >> 32;
        out[1] = width + (((h.low64 >> 32) * width) >> 32);
        out[2] = 2 * width + (((h.high64 & 0xffffffffu) * width) >> 32);
        out[3] = 3 * width + (((h.high64 >> 32) * width) >> 32);
        if (ways > 4) out[4] = 4 * width + ((((h.low64 + h.high64 * 0x9E3779B97F4A7C15ull) >> 32) * width) >> 32);
    }
    static inline sr_u128 sr_wide(uint64_t low, uint64_t high) { return ((sr_u128)high << 64) | low; }
    static inline void sr_add(sr_cell *cells, uint64_t width, int ways, uint64_t seed, uint64_t id, uint64_t value,
                              uint64_t weighted_low, uint64_t weighted_high) {
        uint64_t at[5];
        /* The value is signed: its product must be taken modulo 2^128 of the signed number. */
        sr_u128 product = (sr_u128)((sr_i128)(int64_t)value * (sr_i128)id);
        sr_u128 weighted = sr_wide(weighted_low, weighted_high);
        sr_places(id, seed, width, ways, at);
        for (int i = 0; i < ways; i++) {
            cells[at[i]].value += value;
            cells[at[i]].product += product;
            cells[at[i]].weighted += weighted;
        }
    }
    /* The same for a record, whose value is not negative and which has no weighted sum. */
    static inline void sr_add_record(sr_cell *cells, uint64_t width, int ways, uint64_t seed, uint64_t id, uint64_t value) {
        uint64_t at[5];
        sr_u128 product = (sr_u128)value * id;
        sr_places(id, seed, width, ways, at);
        for (int i = 0; i < ways; i++) {
            cells[at[i]].value += value;
            cells[at[i]].product += product;
        }
    }
    static inline void sr_join(sr_cell *cell, const sr_cell *other) {
        cell->value += other->value;
        cell->product += other->product;
        cell->weighted += other->weighted;
    }
    static inline int64_t sr_value(const sr_cell *cell) { return (int64_t)(cell->value << 16) >> 16; }
    static inline sr_i128 sr_narrow(sr_u128 sum, int bits) { return (sr_i128)(sum << (128 - bits)) >> (128 - bits); }
    static inline int sr_pure(const sr_cell *cell, int bits, uint64_t id_limit, uint64_t *id) {
        int64_t value = sr_value(cell);
        if (value == 0) return 0;
        sr_i128 product = sr_narrow(cell->product, bits);
        uint64_t divisor = value < 0 ? -(uint64_t)value : (uint64_t)value;
        if (value < 0) product = -product;
        if (product < 0 || (uint64_t)((sr_u128)product >> 64) >= divisor) return 0;
        sr_u128 quotient = (sr_u128)product / divisor;
        if (quotient * divisor != (sr_u128)product || quotient > id_limit) return 0;
        *id = (uint64_t)quotient;
        return 1;
    }
    static inline void sr_take(sr_cell *cells, int ways, const uint64_t *at, uint64_t id, int64_t value, sr_i128 weighted) {
        sr_u128 product = (sr_u128)((sr_i128)value * (sr_i128)id);
        for (int i = 0; i < ways; i++) {
            cells[at[i]].value -= (uint64_t)value;
            cells[at[i]].product -= product;
            cells[at[i]].weighted -= (sr_u128)weighted;
        }
    }
    typedef struct { uint64_t id; int64_t value; uint64_t weighted_low; int64_t weighted_high; } sr_item;
    typedef struct { sr_cell *cells; uint64_t width; uint64_t seed; int ways; } sr_table;

    /* Peel tables of the same items together. Returns the number of items, -1: stuck, -2: no memory. Destroys the cells.
       Work is bounded: an item taken out twice too often ends it. */
    static long long sr_peel(sr_table *tables, int count, int bits, int by_leaf, uint64_t id_limit, sr_item *out,
                             uint64_t room) {
        uint64_t total = 0, used = 0, head = 0, tail = 0, queue_room, at[5], id;
        for (int t = 0; t < count; t++) total += tables[t].ways * tables[t].width;
        queue_room = 6 * total + 16;
        uint64_t *queue = (uint64_t *)malloc(queue_room * sizeof(uint64_t));
        if (!queue) return -2;
        for (int t = 0; t < count; t++)
            for (uint64_t i = 0; i < tables[t].ways * tables[t].width; i++)
                if (sr_pure(&tables[t].cells[i], bits, id_limit, &id)) queue[tail++] = ((uint64_t)t << 56) | i;
        while (head < tail) {
            uint64_t entry = queue[head++];
            sr_table *table = &tables[entry >> 56];
            uint64_t i = entry & ((1ull << 56) - 1);
            if (!sr_pure(&table->cells[i], bits, id_limit, &id)) continue;
            sr_places(id, table->seed, table->width, table->ways, at);
            if (at[i / table->width] != i) continue;
            if (used == room) { free(queue); return -1; }
            int64_t value = sr_value(&table->cells[i]);
            sr_i128 weighted = by_leaf ? sr_narrow(table->cells[i].weighted, 96) : 0;
            out[used].id = id;
            out[used].value = value;
            out[used].weighted_low = (uint64_t)weighted;
            out[used].weighted_high = (int64_t)(weighted >> 64);
            used++;
            for (int t = 0; t < count; t++) {
                sr_places(id, tables[t].seed, tables[t].width, tables[t].ways, at);
                sr_take(tables[t].cells, tables[t].ways, at, id, value, weighted);
                for (int j = 0; j < tables[t].ways; j++) {
                    uint64_t other;
                    if (tail < queue_room && sr_pure(&tables[t].cells[at[j]], bits, id_limit, &other))
                        queue[tail++] = ((uint64_t)t << 56) | at[j];
                }
            }
        }
        free(queue);
        for (int t = 0; t < count; t++)
            for (uint64_t i = 0; i < tables[t].ways * tables[t].width; i++) {
                const sr_cell *cell = &tables[t].cells[i];
                if (sr_value(cell) || sr_narrow(cell->product, bits) || (by_leaf && sr_narrow(cell->weighted, 96)))
                    return -1;
            }
        return (long long)used;
    }
    static inline void sr_pack(const sr_cell *cell, int by_leaf, uint8_t *out) {
        memcpy(out, &cell->value, 6);
        if (by_leaf) { memcpy(out + 6, &cell->product, 12); memcpy(out + 18, &cell->weighted, 12); }
        else memcpy(out + 6, &cell->product, 11);
    }
    static inline void sr_unpack_subtract(sr_cell *cell, int by_leaf, const uint8_t *in) {
        uint64_t value = 0;
        sr_u128 product = 0, weighted = 0;
        memcpy(&value, in, 6);
        if (by_leaf) { memcpy(&product, in + 6, 12); memcpy(&weighted, in + 18, 12); }
        else memcpy(&product, in + 6, 11);
        cell->value -= value;
        cell->product -= product;
        cell->weighted -= weighted;
    }
    """
    ctypedef struct Item "sr_item":
        uint64_t id
        int64_t value
        uint64_t weighted_low
        int64_t weighted_high
    ctypedef struct Table "sr_table":
        Cell *cells
        uint64_t width
        uint64_t seed
        int ways
    void sr_add(Cell *cells, uint64_t width, int ways, uint64_t seed, uint64_t id, uint64_t value,
                uint64_t weighted_low, uint64_t weighted_high) noexcept nogil
    void sr_add_record(Cell *cells, uint64_t width, int ways, uint64_t seed, uint64_t id, uint64_t value) noexcept nogil
    void sr_join(Cell *cell, const Cell *other) noexcept nogil
    long long sr_peel(Table *tables, int count, int bits, int by_leaf, uint64_t id_limit, Item *out,
                      uint64_t room) noexcept nogil
    void sr_pack(const Cell *cell, int by_leaf, uint8_t *out) noexcept nogil
    void sr_unpack_subtract(Cell *cell, int by_leaf, const uint8_t *data) noexcept nogil

cdef enum:
    LEAF_CELL = 30
    RECORD_CELL = 17
    TABLES_MAX = 4
    WIDTH_MAX = 16777216


cdef class Sketch:
    """A table of ``ways`` x ``width`` cells over leaves or records. See the top of ext/merkle_sketch.pxi."""

    def __cinit__(self, size_t width, uint64_t seed, *, bint by_leaf, int ways=3):
        if not 1 <= width <= WIDTH_MAX or ways not in (3, 4, 5):
            raise errors.InvalidValue(f"a sketch has 3 to 5 subtables of 1 to {WIDTH_MAX} cells, not {ways} of {width}")
        self.width = width
        self.ways = ways
        self.seed = seed
        self.by_leaf = by_leaf
        self.cells = <Cell *>calloc(ways * width, sizeof(Cell))
        if self.cells is NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.cells)

    def __len__(self):
        return self.ways * self.width

    def add(self, uint64_t item, int64_t value, weighted=0):
        """Add one item; ``value`` negative takes it away. For tests and simulations."""
        cdef object wide = weighted & ((1 << 128) - 1)
        sr_add(self.cells, self.width, self.ways, self.seed, item, <uint64_t>value, wide & 0xffffffffffffffff, wide >> 64)

    def add_leaves(self, Tree tree not None):
        """Add every leaf of a tree that is up to date."""
        cdef size_t i, k
        cdef Leaf *leaf
        if not self.by_leaf:
            raise errors.InvalidValue("a sketch over records takes records")
        if tree.dirty or tree.txn == 0:
            raise errors.NotReady("the tree is not up to date")
        with nogil:
            for i in range(tree.block_count):
                for k in range(tree.blocks[i].used):
                    leaf = &tree.blocks[i].leaves[k]
                    sr_add(self.cells, self.width, self.ways, self.seed, leaf.id, leaf.value_sum, leaf.weighted.low,
                           leaf.weighted.high)

    def encode(self):
        """Return the cells as they travel."""
        cdef size_t i
        cdef size_t size = LEAF_CELL if self.by_leaf else RECORD_CELL
        cdef bytes out = PyBytes_FromStringAndSize(NULL, self.ways * self.width * size)
        cdef uint8_t *data = <uint8_t *>PyBytes_AS_STRING(out)
        with nogil:
            for i in range(self.ways * self.width):
                sr_pack(&self.cells[i], self.by_leaf, data + i * size)
        return out

    def subtract(self, const uint8_t[::1] cells not None):
        """Subtract the other side's cells; raises FrameError when there are not as many as here."""
        cdef size_t i
        cdef size_t size = LEAF_CELL if self.by_leaf else RECORD_CELL
        if <size_t>cells.shape[0] != len(self) * size:
            raise errors.FrameError(f"{len(self)} cells have {len(self) * size} bytes, not {cells.shape[0]}")
        with nogil:
            for i in range(self.ways * self.width):
                sr_unpack_subtract(&self.cells[i], self.by_leaf, &cells[i * size])

    def minus(self, const uint8_t[::1] cells not None):
        """Return a new table: this one without the other side's cells."""
        cdef Sketch result = Sketch(self.width, self.seed, by_leaf=self.by_leaf, ways=self.ways)
        memcpy(result.cells, self.cells, len(self) * sizeof(Cell))
        result.subtract(cells)
        return result


def peel(list sketches not None, int id_bits=ID_BITS):
    """Read the items of tables that hold the same differences; the tables stay as they are.

    Returns [(id, value, weighted)], or None when the tables are too small for what differs. The work is bounded by the
    number of cells, whatever they hold.
    """
    cdef Table tables[TABLES_MAX]
    cdef Sketch sketch
    cdef Item *items = NULL
    cdef long long found
    cdef long long i
    cdef size_t total = 0
    cdef int count = len(sketches)
    cdef int k
    cdef bint by_leaf
    if not 1 <= count <= TABLES_MAX:
        raise errors.InvalidValue(f"1 to {TABLES_MAX} tables are peeled together, not {count}")
    by_leaf = (<Sketch?>sketches[0]).by_leaf
    memset(tables, 0, sizeof(tables))
    try:
        for k in range(count):
            sketch = <Sketch?>sketches[k]
            if sketch.by_leaf != by_leaf:
                raise errors.InvalidValue("tables over leaves and over records are not peeled together")
            total += sketch.ways * sketch.width
            tables[k].width = sketch.width
            tables[k].ways = sketch.ways
            tables[k].seed = sketch.seed
            tables[k].cells = <Cell *>malloc(sketch.ways * sketch.width * sizeof(Cell))
            if tables[k].cells is NULL:
                raise MemoryError
            memcpy(tables[k].cells, sketch.cells, sketch.ways * sketch.width * sizeof(Cell))
        items = <Item *>malloc((total + 1) * sizeof(Item))
        if items is NULL:
            raise MemoryError
        with nogil:
            found = sr_peel(tables, count, 96 if by_leaf else 88, by_leaf, (<uint64_t>1 << id_bits) - 1, items, total)
        if found == -2:
            raise MemoryError
        if found < 0:
            return None
        result = []
        for i in range(found):
            result.append((items[i].id, items[i].value, ((<object>items[i].weighted_high) << 64) | items[i].weighted_low))
        return result
    finally:
        free(items)
        for k in range(count):
            free(tables[k].cells)
