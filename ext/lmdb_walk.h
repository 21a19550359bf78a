/* Walk a database in key order as fast as memory allows.
 *
 *   sr_walk_begin(walk, cursor)      the cursor stands on a record, and a walk goes on from there
 *   sr_walk_next(walk, key, data)    as mdb_cursor_get(cursor, key, data, MDB_NEXT)
 *   sr_walk_leaf(cursor, leaves)     where a leaf is that lies so many behind (negative: before) the cursor's; NULL: unknown
 *   sr_walk_stand(cursor, page, at)  move the cursor within the leaf that it stands on; 0: that is another page
 *
 * LMDB's cursor finds each leaf as a page anywhere in the file, and in it each record anywhere in the page, so a walk stands
 * still at nearly every line until memory answers; and it takes three calls to go to the neighbour in the same leaf. Only
 * the branch page above knows where the next leaves are, and LMDB shows it to nobody. So the vendored LMDB is compiled as a
 * part of lmdb_walk.c, which may look: it asks for whole leaves ahead, and steps within a leaf itself.
 *
 * On a system's LMDB (SRENGINE_SYSTEM_LIBS) SR_LMDB_WALK is not defined: walks are slower, and nothing else changes.
 */
#ifndef SR_LMDB_WALK_H
#define SR_LMDB_WALK_H

#include "lmdb.h"

typedef struct {
    MDB_cursor *cursor;
    const char *ahead; /* what of a later leaf has not been asked for; NULL: nothing */
    const char *ahead_end;
} sr_walk_t;

#ifdef SR_LMDB_WALK
void sr_walk_begin(sr_walk_t *walk, MDB_cursor *cursor);
int sr_walk_next(sr_walk_t *walk, MDB_val *key, MDB_val *data);
const void *sr_walk_leaf(const MDB_cursor *cursor, int leaves);
int sr_walk_stand(MDB_cursor *cursor, const void *page, unsigned index);
#else
static inline void sr_walk_begin(sr_walk_t *walk, MDB_cursor *cursor) { walk->cursor = cursor; }
static inline int sr_walk_next(sr_walk_t *walk, MDB_val *key, MDB_val *data) {
    return mdb_cursor_get(walk->cursor, key, data, MDB_NEXT);
}
static inline const void *sr_walk_leaf(const MDB_cursor *cursor, int leaves) { return NULL; }
static inline int sr_walk_stand(MDB_cursor *cursor, const void *page, unsigned index) { return 0; }
#endif

#endif
