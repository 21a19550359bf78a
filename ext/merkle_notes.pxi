# Keeping up: leaves adjusted by what the writer noted (ext/tablet_track.pxi), walked again where a boundary came.

cdef inline void mark_dirty(Tree tree, Leaf *leaf) noexcept nogil:
    if not leaf.dirty:
        leaf.dirty = 1
        tree.dirty += 1


cdef bint apply_notes(Tree tree) noexcept nogil:
    """Adjust leaves, sum, count and estimator by what the writer noted; False: no memory, or the notes contradict."""
    cdef size_t at = 0
    cdef size_t end
    cdef size_t block, index, left_block, left_index
    cdef uint64_t size, hashed, id
    cdef uint16_t key_bytes
    cdef Sum before, after
    cdef bint was, is_there
    cdef const uint8_t *data = tree.taken.data
    cdef const uint8_t *key
    cdef Leaf *leaf
    cdef Leaf *left
    cdef Leaf fresh
    while at < tree.taken.used:
        memcpy(&size, data + at + 8, 8)
        at += 16
        end = at + size
        while at < end:
            memcpy(&before, data + at, 16)
            memcpy(&after, data + at + 16, 16)
            memcpy(&key_bytes, data + at + 32, 2)
            was = data[at + 34]
            is_there = data[at + 35]
            key = data + at + 40
            at += 40 + ((<size_t>key_bytes + 7) & ~<size_t>7)
            hashed = XXH3_64bits_withSeed(key, key_bytes, tree.environment.seed)
            id = hashed >> tree.id_shift
            find_leaf(tree, key, key_bytes, &block, &index)
            leaf = &tree.blocks[block].leaves[index]
            if was:
                subtract(&tree.total, &before)
                count_bucket(tree.buckets, id, tree.id_shift, value_of(&before), True)
                tree.count -= 1
            if is_there:
                add(&tree.total, &after)
                count_bucket(tree.buckets, id, tree.id_shift, value_of(&after), False)
                tree.count += 1
            if (hashed & tree.mask) == 0 and was != is_there:
                if is_there:
                    if leaf.key_bytes == key_bytes and memcmp(leaf.key, key, key_bytes) == 0:
                        return False
                    memset(&fresh, 0, sizeof(Leaf))
                    if not leaf_begin(&fresh, key, key_bytes, id):
                        return False
                    mark_dirty(tree, leaf)
                    fresh.dirty = 1
                    tree.dirty += 1
                    if not insert_leaf(tree, block, index, &fresh):
                        free(fresh.key)
                        tree.dirty -= 1
                        return False
                else:
                    if leaf.key_bytes != key_bytes or memcmp(leaf.key, key, key_bytes) != 0:
                        return False
                    if index:
                        left_block = block
                        left_index = index - 1
                    else:
                        left_block = block - 1
                        left_index = tree.blocks[left_block].used - 1
                    left = &tree.blocks[left_block].leaves[left_index]
                    if leaf.dirty:
                        tree.dirty -= 1
                        mark_dirty(tree, left)
                    elif not left.dirty:
                        leaf_subtract(leaf, &before, id)
                        leaf_join(left, leaf)
                    remove_leaf(tree, block, index)
            elif not leaf.dirty:
                if was:
                    leaf_subtract(leaf, &before, id)
                if is_there:
                    leaf_add(leaf, &after, id)
    tree.taken.used = 0
    return True


cdef struct Rescan:
    Leaf *leaf
    uint64_t seed
    uint64_t mask
    int shift


cdef int visit_rescan(void *context, const uint8_t *key, size_t key_bytes, const Header *header,
                      const Sum *digest) noexcept nogil:
    cdef Rescan *work = <Rescan *>context
    if header is not NULL:
        leaf_add(work.leaf, digest, XXH3_64bits_withSeed(key, key_bytes, work.seed) >> work.shift)
    return 0


cdef int rescan(Tree tree, MDB_txn *txn, Failure *failure) noexcept nogil:
    """Walk the records of every dirty leaf again."""
    cdef size_t b, k
    cdef Leaf *leaf
    cdef Range bounds
    cdef Rescan work
    cdef int rc
    work.seed = tree.environment.seed
    work.shift = tree.id_shift
    for b in range(tree.block_count):
        for k in range(tree.blocks[b].used):
            leaf = &tree.blocks[b].leaves[k]
            if not leaf.dirty:
                continue
            memset(&bounds, 0, sizeof(Range))
            bounds.start = leaf.key
            bounds.start_bytes = leaf.key_bytes
            found_next(tree, b, k, &bounds)
            memset(&leaf.sum, 0, sizeof(Sum))
            memset(&leaf.weighted, 0, sizeof(Sum))
            leaf.value_sum = 0
            leaf.count = 0
            work.leaf = leaf
            rc = walk_records(tree.environment, txn, &bounds, visit_rescan, &work, failure)
            if rc != 0:
                return rc
            tree.walked += leaf.count
            leaf.dirty = 0
            tree.dirty -= 1
            if tree.dirty == 0:
                return 0
    return 0
