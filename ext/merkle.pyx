# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, auto_pickle=False
"""The merkle kernel: a tablet's records summed up in leaves, and sketches that tell two tablets apart.

    records in key order    k1 k2 K3 k4 k5 k6 K7 k8 ...        a capital: its hash ends in five zero bits
    leaves                 [k1 k2][K3 k4 k5 k6][K7 k8 ...      mean 32 records, the same on both sides by themselves
    of each leaf            sum of digests, of values, of value x key id; count
    sketch                  every leaf (or record) added into three cells of a small table

* **key hash** XXH3-64 of the key with the tablet's seed: its low bits say whether the key begins a leaf, its upper 47 bits
  are the **key id**. A leaf's id is that of its first key; the first leaf, which begins with no key, has that of b"".
* **value** of a record: the upper 40 bits of the low half of its digest, or 1 for zero.
* All sums are linear, so the difference of two leaves is the sum over the records that differ; when there is one, its key
  id is (difference of weighted sums) / (difference of values).

The leaves are a cache: built by one walk without the GIL, brought up to date from what the tablet's writer noted
(ext/tablet_track.pxi), dropped at will, never a truth. Leaves that a new boundary splits are walked again before use.
The estimator, summed over records, says how many records differ: 40 groups of four byte lanes, the group by the key id,
in each lane a bit of the value with a sign of the id; the squares of the differences add up to twice the number of
differing records, missing and updated ones alike, to about a tenth. Bytes wrap, so 32 more buckets count one record in 64.

It decides nothing: `srengine.storage.merkle` drives it. Its plain-Python oracle is tests/reference/merkle.py.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove, memset

from srengine._native.tablet cimport *
from srengine._native.lmdb cimport MDB_txn
from srengine._native.xxhash cimport *

from srengine import errors

cdef enum:
    BLOCK_LEAVES = 512
    BLOCK_FILL = 384
    BUCKETS = 192
    ID_BITS = 47
    BOUNDARY_BITS = 5
    DAMAGED_MAX = 4096
    PICKED_BYTES = 160
    SPARSE_MAX = 1024
    TOMBSTONE = 1
    CODE_NO_MEMORY = -40004
    CODE_ENOUGH = -40100

ESTIMATOR_BYTES = BUCKETS

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    int pthread_create(pthread_t *thread, void *attributes, void *(*run)(void *), void *context)
    int pthread_join(pthread_t thread, void **result)

cdef extern from *:
    """
    #include <sched.h>
    static inline void sr_yield(void) { sched_yield(); }
    """
    void sr_yield() noexcept nogil
    uint64_t bswap64 "__builtin_bswap64"(uint64_t value) noexcept nogil

include "merkle_leaf.pxi"
include "merkle_sketch.pxi"
include "merkle_walk.pxi"
include "merkle_gather.pxi"
include "merkle_pick.pxi"
include "merkle_blocks.pxi"
include "merkle_notes.pxi"
include "merkle_records.pxi"
include "merkle_tree.pxi"
