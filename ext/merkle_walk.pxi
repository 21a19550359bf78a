# Walking all records: by one thread, or by two from both ends that meet where the work is done.

cdef enum:
    APART_BYTES = 128            # so that what two threads write does not share a line of the cache

cdef struct Half:                # one of two walks; zeroed before use
    void *environment
    MDB_txn *txn
    Range bounds
    Visit visit
    void *context                # of visit
    Failure failure
    uint64_t number              # of the transaction that was walked
    int rc
    uint8_t apart[APART_BYTES]


cdef void *run_half(void *context) noexcept nogil:
    cdef Half *half = <Half *>context
    half.rc = walk_half(half)
    return NULL


cdef int walk_half(Half *half) noexcept nogil:
    with gil:
        environment = <Environment>half.environment
        with nogil:
            return walk_records(environment, half.txn, &half.bounds, half.visit, half.context, &half.failure)


cdef int walk_both(Tree tree, Reader reader, Reader other, Half *one, Half *two) except -1:
    """Walk all records of ``reader``'s view by ``one``; with another reader of that view by both, each in a thread.

    Returns 0 (and walks nothing) when the two readers do not see the same transaction, else how many halves there were.
    Raises what goes wrong on the way.
    """
    cdef Environment env = tree.environment
    cdef pthread_t thread
    cdef bint threaded = False
    cdef int64_t left = 0
    if reader.environment is not env or (other is not None and other.environment is not env):
        raise errors.InvalidValue("the reader is of another tablet")
    one.environment = two.environment = <void *>env
    two.bounds.backward = True
    two.txn = NULL
    one.txn = reader.begin()
    one.number = txn_number(reader)
    try:
        if other is not None:
            two.txn = other.begin()
        try:
            if other is not None:
                if one.number != txn_number(other):
                    return 0
                left = record_count(env, one.txn)
                one.bounds.left = two.bounds.left = &left
            with nogil:
                if two.txn is not NULL:
                    threaded = pthread_create(&thread, NULL, run_half, <void *>two) == 0
                    if not threaded:
                        one.bounds.left = NULL
                one.rc = walk_records(env, one.txn, &one.bounds, one.visit, one.context, &one.failure)
                if threaded:
                    pthread_join(thread, NULL)
        finally:
            if other is not None:
                other.end()
    finally:
        reader.end()
    if one.rc != 0:
        raise_walk(env, &one.failure)
    if two.rc != 0:
        raise_walk(env, &two.failure)
    return 2 if threaded else 1
