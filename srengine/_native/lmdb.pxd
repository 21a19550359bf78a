# LMDB as the kernels `tablet` and `rows` see it; each has a copy of its own, for environments of its own.

cdef extern from "lmdb.h" nogil:
    ctypedef struct MDB_env:
        pass
    ctypedef struct MDB_txn:
        pass
    ctypedef struct MDB_cursor:
        pass
    ctypedef unsigned int MDB_dbi
    ctypedef struct MDB_val:
        size_t mv_size
        void *mv_data
    ctypedef struct MDB_stat:
        unsigned int ms_psize
        unsigned int ms_depth
        size_t ms_branch_pages
        size_t ms_leaf_pages
        size_t ms_overflow_pages
        size_t ms_entries
    ctypedef struct MDB_envinfo:
        void *me_mapaddr
        size_t me_mapsize
        size_t me_last_pgno
        size_t me_last_txnid
        unsigned int me_maxreaders
        unsigned int me_numreaders
    ctypedef enum MDB_cursor_op:
        MDB_FIRST
        MDB_GET_CURRENT
        MDB_LAST
        MDB_NEXT
        MDB_PREV
        MDB_SET
        MDB_SET_KEY
        MDB_SET_RANGE

    unsigned int MDB_RDONLY
    unsigned int MDB_NOTLS
    unsigned int MDB_NORDAHEAD
    unsigned int MDB_CREATE
    unsigned int MDB_INTEGERKEY
    unsigned int MDB_NOOVERWRITE
    unsigned int MDB_CURRENT
    unsigned int MDB_RESERVE
    unsigned int MDB_APPEND
    int MDB_SUCCESS
    int MDB_KEYEXIST
    int MDB_NOTFOUND
    int MDB_PAGE_NOTFOUND
    int MDB_CORRUPTED
    int MDB_PANIC
    int MDB_VERSION_MISMATCH
    int MDB_INVALID
    int MDB_MAP_FULL
    int MDB_READERS_FULL
    int MDB_MAP_RESIZED
    int MDB_TXN_FULL
    int MDB_BAD_TXN

    char *mdb_version(int *major, int *minor, int *patch)
    char *mdb_strerror(int code)
    int mdb_env_create(MDB_env **env)
    int mdb_env_open(MDB_env *env, const char *path, unsigned int flags, int mode)
    int mdb_env_stat(MDB_env *env, MDB_stat *stat)
    int mdb_env_info(MDB_env *env, MDB_envinfo *stat)
    void mdb_env_close(MDB_env *env)
    int mdb_env_set_mapsize(MDB_env *env, size_t size)
    int mdb_env_set_maxreaders(MDB_env *env, unsigned int readers)
    int mdb_env_set_maxdbs(MDB_env *env, MDB_dbi dbs)
    int mdb_txn_begin(MDB_env *env, MDB_txn *parent, unsigned int flags, MDB_txn **txn)
    int mdb_txn_commit(MDB_txn *txn)
    void mdb_txn_abort(MDB_txn *txn)
    size_t mdb_txn_id(MDB_txn *txn)
    void mdb_txn_reset(MDB_txn *txn)
    int mdb_txn_renew(MDB_txn *txn)
    int mdb_dbi_open(MDB_txn *txn, const char *name, unsigned int flags, MDB_dbi *dbi)
    int mdb_stat(MDB_txn *txn, MDB_dbi dbi, MDB_stat *stat)
    int mdb_get(MDB_txn *txn, MDB_dbi dbi, MDB_val *key, MDB_val *data)
    int mdb_put(MDB_txn *txn, MDB_dbi dbi, MDB_val *key, MDB_val *data, unsigned int flags)
    int mdb_drop(MDB_txn *txn, MDB_dbi dbi, int delete)
    int mdb_del(MDB_txn *txn, MDB_dbi dbi, MDB_val *key, MDB_val *data)
    int mdb_cursor_open(MDB_txn *txn, MDB_dbi dbi, MDB_cursor **cursor)
    void mdb_cursor_close(MDB_cursor *cursor)
    int mdb_cursor_renew(MDB_txn *txn, MDB_cursor *cursor)
    int mdb_cursor_get(MDB_cursor *cursor, MDB_val *key, MDB_val *data, MDB_cursor_op op)
    int mdb_cursor_put(MDB_cursor *cursor, MDB_val *key, MDB_val *data, unsigned int flags)
    int mdb_cursor_del(MDB_cursor *cursor, unsigned int flags)
    int mdb_reader_check(MDB_env *env, int *dead)

cdef extern from "lmdb_walk.h" nogil:
    ctypedef struct sr_walk_t:
        pass
    void sr_walk_begin(sr_walk_t *walk, MDB_cursor *cursor)
    int sr_walk_next(sr_walk_t *walk, MDB_val *key, MDB_val *data)
    const void *sr_walk_leaf(const MDB_cursor *cursor, int leaves)
    int sr_walk_stand(MDB_cursor *cursor, const void *page, unsigned index)
