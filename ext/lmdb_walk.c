/* LMDB, unchanged, and two functions beside it that need to see a cursor's inside: see lmdb_walk.h. */
#include "mdb.c"

#define SR_LMDB_WALK
#include "lmdb_walk.h"

/* Leaves asked for ahead of the one that is being read: one alone may not have arrived when its turn comes. */
#define LEAVES_AHEAD 2
/* Of each leaf: its whole page where pages are small, its index where they are large. */
#define AHEAD_BYTES 4096
#define LINE_BYTES 64
/* A processor waits for some twenty lines at a time, so a leaf is asked for a few lines with each record of another. */
#define STEP_BYTES (4 * LINE_BYTES)

/* Where a leaf lies that is so many behind the one that the cursor stands on (negative: before it), NULL when another
 * branch page holds it; nothing of it is read.
 * NB: nothing of the branch page is believed either. LMDB checks it when the cursor gets there. */
const void *sr_walk_leaf(const MDB_cursor *cursor, int leaves) {
    if (!(cursor->mc_flags & C_INITIALIZED) || cursor->mc_snum < 2) return NULL;
    const MDB_txn *txn = cursor->mc_txn;
    const size_t page_bytes = txn->mt_env->me_psize;
    MDB_page *branch = cursor->mc_pg[cursor->mc_top - 1];
    const unsigned index = cursor->mc_ki[cursor->mc_top - 1] + (unsigned)leaves;
    if (!IS_BRANCH(branch) || index >= NUMKEYS(branch) || PAGEHDRSZ + (index + 1) * sizeof(indx_t) > page_bytes)
        return NULL;
    const size_t at = (size_t)MP_PTRS(branch)[index] + PAGEBASE;
    if (at + NODESIZE > page_bytes) return NULL;
    const MDB_node *node = (const MDB_node *)((const char *)branch + at);
    const pgno_t number = NODEPGNO(node);
    return number < txn->mt_next_pgno ? txn->mt_env->me_map + page_bytes * number : NULL;
}

int sr_walk_stand(MDB_cursor *cursor, const void *page, unsigned index) {
    if (!(cursor->mc_flags & C_INITIALIZED) || cursor->mc_pg[cursor->mc_top] != page || index >= NUMKEYS((MDB_page *)page))
        return 0;
    cursor->mc_ki[cursor->mc_top] = index;
    return 1;
}

static void look_ahead(sr_walk_t *walk, int leaves) {
    walk->ahead = sr_walk_leaf(walk->cursor, leaves);
    walk->ahead_end = walk->ahead ? walk->ahead + AHEAD_BYTES : NULL;
}

static inline void ask(sr_walk_t *walk, size_t bytes_max) {
    for (size_t done = 0; done < bytes_max && walk->ahead < walk->ahead_end; done += LINE_BYTES) {
        __builtin_prefetch(walk->ahead, 0, 3);
        walk->ahead += LINE_BYTES;
    }
}

void sr_walk_begin(sr_walk_t *walk, MDB_cursor *cursor) {
    walk->cursor = cursor;
    for (int leaves = 0; leaves < LEAVES_AHEAD; leaves++) {
        look_ahead(walk, leaves);
        ask(walk, AHEAD_BYTES);
    }
    look_ahead(walk, LEAVES_AHEAD);
}

int sr_walk_next(sr_walk_t *walk, MDB_val *key, MDB_val *data) {
    MDB_cursor *cursor = walk->cursor;
    MDB_page *leaf = cursor->mc_pg[cursor->mc_top];
    const unsigned index = cursor->mc_ki[cursor->mc_top] + 1u;
    ask(walk, STEP_BYTES);
    /* Within a leaf, of a plain database, whose record lies in the leaf too: all that LMDB would do for it, with its own
     * checks. For whatever else LMDB does it. */
    if ((cursor->mc_flags & (C_INITIALIZED | C_EOF | C_DEL)) == C_INITIALIZED && !cursor->mc_xcursor &&
        !(cursor->mc_txn->mt_flags & MDB_TXN_BLOCKED) && index < NUMKEYS(leaf) && MP_FLAGS(leaf) & P_LEAF &&
        !(MP_FLAGS(leaf) & P_LEAF2)) {
        MDB_node *node = NODEPTR(leaf, index);
        const char *end = (const char *)leaf + cursor->mc_txn->mt_env->me_psize;
        if ((const char *)node + NODESIZE <= end && !(node->mn_flags & (F_BIGDATA | F_DUPDATA)) &&
            (const char *)NODEDATA(node) + NODEDSZ(node) <= end) {
            cursor->mc_ki[cursor->mc_top] = index;
            MDB_GET_KEY(node, key);
            data->mv_size = NODEDSZ(node);
            data->mv_data = NODEDATA(node);
            return MDB_SUCCESS;
        }
    }
    const int code = mdb_cursor_get(cursor, key, data, MDB_NEXT);
    if (code == MDB_SUCCESS && cursor->mc_ki[cursor->mc_top] == 0) {
        ask(walk, AHEAD_BYTES);
        look_ahead(walk, LEAVES_AHEAD);
    }
    return code;
}
