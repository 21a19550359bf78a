# Header of the merkle kernel: leaves of a tablet, and sketches over leaves or records.
from libc.stddef cimport size_t
from libc.stdint cimport int8_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from srengine._native.tablet cimport Environment, Notes, Reader, Sum

cdef struct Leaf:
    Sum sum                      # of the digests of its records
    Sum weighted                 # of value times key id of its records, modulo 2^128
    uint64_t value_sum           # of their 40-bit values, modulo 2^64
    uint64_t id                  # 47 bits of the hash of its first key; of no key: the first leaf
    uint8_t *key                 # its first key (NULL: the first leaf), owned
    uint32_t count
    uint16_t key_bytes
    uint8_t dirty                # to be scanned again before it is used

cdef struct Block:               # a run of leaves, so that an insertion moves little
    Leaf *leaves
    uint64_t *prefixes           # first eight bytes of each leaf's key, big-endian, for searching
    uint32_t used

cdef extern from *:
    """
    typedef unsigned __int128 sr_u128;
    typedef __int128 sr_i128;
    /* Sums modulo 2^64 and 2^128; on the wire modulo 2^48 and 2^96 or 2^88. See ext/merkle_sketch.pxi. */
    typedef struct {
        uint64_t value;
        sr_u128 product;
        sr_u128 weighted;
    } sr_cell;
    """
    ctypedef struct Cell "sr_cell":
        uint64_t value           # of values

cdef class Tree:
    cdef readonly Environment environment
    cdef Block **blocks
    cdef size_t block_count
    cdef size_t block_room
    cdef readonly size_t leaf_count
    cdef readonly int64_t count
    cdef readonly int64_t live_count       # as of the build
    cdef readonly int64_t entries          # records with a change entry, as of the build
    cdef readonly list damaged             # keys of records whose header was damaged at the build
    cdef readonly uint64_t walked          # records that were read to build and to keep up, since it was made
    cdef readonly uint64_t txn             # the transaction that the leaves describe; 0: cold
    cdef Sum total
    cdef uint64_t mask
    cdef int id_shift
    cdef int8_t *buckets
    cdef Notes taken
    cdef size_t dirty
    cdef void clear(self) noexcept nogil
    cdef bint put_leaf(self, const Leaf *leaf) noexcept nogil

cdef class Sketch:
    cdef Cell *cells
    cdef readonly size_t width             # cells of each subtable
    cdef readonly int ways                 # subtables: 3 to 5
    cdef readonly uint64_t seed
    cdef readonly bint by_leaf

cdef class Records:
    cdef uint32_t *marks         # the lower half of each id
    cdef readonly size_t count
    cdef size_t room
    cdef int walk(self, Tree tree, Reader reader, Reader other, Sketch table, bint unchecked) except -1
