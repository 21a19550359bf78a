# Leaves in blocks: inserting and removing one moves a block's worth, never all.

cdef void found_next(Tree tree, size_t block, size_t index, Range *bounds) noexcept nogil:
    """End a range where the following leaf begins."""
    cdef Leaf *following
    if index + 1 < tree.blocks[block].used:
        following = &tree.blocks[block].leaves[index + 1]
    elif block + 1 < tree.block_count:
        following = &tree.blocks[block + 1].leaves[0]
    else:
        return
    bounds.stop = following.key
    bounds.stop_bytes = following.key_bytes
    bounds.has_stop = True


cdef Block *new_block(Tree tree, size_t at) noexcept nogil:
    """Insert an empty block at a place among the blocks."""
    cdef Block **blocks
    cdef Block *block
    cdef size_t room
    if tree.block_count == tree.block_room:
        room = 2 * tree.block_room if tree.block_room else 64
        blocks = <Block **>realloc(tree.blocks, room * sizeof(Block *))
        if blocks is NULL:
            return NULL
        tree.blocks = blocks
        tree.block_room = room
    block = <Block *>calloc(1, sizeof(Block))
    if block is NULL:
        return NULL
    block.leaves = <Leaf *>malloc(BLOCK_LEAVES * sizeof(Leaf))
    block.prefixes = <uint64_t *>malloc(BLOCK_LEAVES * sizeof(uint64_t))
    if block.leaves is NULL or block.prefixes is NULL:
        free(block.leaves)
        free(block.prefixes)
        free(block)
        return NULL
    memmove(&tree.blocks[at + 1], &tree.blocks[at], (tree.block_count - at) * sizeof(Block *))
    tree.blocks[at] = block
    tree.block_count += 1
    return block


cdef inline bint begins_after(const Block *block, size_t i, uint64_t prefix, const uint8_t *key,
                              size_t key_bytes) noexcept nogil:
    """Whether leaf i of the block begins after a key."""
    if block.prefixes[i] != prefix:
        return block.prefixes[i] > prefix
    return order_of(block.leaves[i].key, block.leaves[i].key_bytes, key, key_bytes) > 0


cdef void find_leaf(Tree tree, const uint8_t *key, size_t key_bytes, size_t *block, size_t *index) noexcept nogil:
    """Find the leaf that a key belongs to: the last one that does not begin after it."""
    cdef uint64_t prefix = prefix_of(key, key_bytes)
    cdef size_t low = 0
    cdef size_t high = tree.block_count - 1
    cdef size_t middle
    while low < high:
        middle = (low + high + 1) // 2
        if begins_after(tree.blocks[middle], 0, prefix, key, key_bytes):
            high = middle - 1
        else:
            low = middle
    block[0] = low
    low = 0
    high = tree.blocks[block[0]].used - 1
    while low < high:
        middle = (low + high + 1) // 2
        if begins_after(tree.blocks[block[0]], middle, prefix, key, key_bytes):
            high = middle - 1
        else:
            low = middle
    index[0] = low


cdef bint insert_leaf(Tree tree, size_t block, size_t index, const Leaf *leaf) noexcept nogil:
    """Insert a leaf behind another one, splitting a full block."""
    cdef Block *full = tree.blocks[block]
    cdef Block *right
    cdef size_t half = BLOCK_LEAVES // 2
    if full.used == BLOCK_LEAVES:
        right = new_block(tree, block + 1)
        if right is NULL:
            return False
        memcpy(right.leaves, full.leaves + half, (BLOCK_LEAVES - half) * sizeof(Leaf))
        memcpy(right.prefixes, full.prefixes + half, (BLOCK_LEAVES - half) * sizeof(uint64_t))
        right.used = BLOCK_LEAVES - half
        full.used = half
        if index >= half:
            full = right
            index -= half
    memmove(&full.leaves[index + 2], &full.leaves[index + 1], (full.used - index - 1) * sizeof(Leaf))
    memmove(&full.prefixes[index + 2], &full.prefixes[index + 1], (full.used - index - 1) * sizeof(uint64_t))
    full.leaves[index + 1] = leaf[0]
    full.prefixes[index + 1] = prefix_of(leaf.key, leaf.key_bytes)
    full.used += 1
    tree.leaf_count += 1
    return True


cdef void remove_leaf(Tree tree, size_t block, size_t index) noexcept nogil:
    """Remove a leaf (never the first) whose records its left neighbour has taken over."""
    cdef Block *where = tree.blocks[block]
    free(where.leaves[index].key)
    memmove(&where.leaves[index], &where.leaves[index + 1], (where.used - index - 1) * sizeof(Leaf))
    memmove(&where.prefixes[index], &where.prefixes[index + 1], (where.used - index - 1) * sizeof(uint64_t))
    where.used -= 1
    tree.leaf_count -= 1
    if where.used == 0:
        free(where.leaves)
        free(where.prefixes)
        free(where)
        memmove(&tree.blocks[block], &tree.blocks[block + 1], (tree.block_count - block - 1) * sizeof(Block *))
        tree.block_count -= 1
