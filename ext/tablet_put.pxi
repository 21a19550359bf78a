# Writing: operations made of Python objects, submitted, waited for.
#
# A call of `Environment` makes a `Submission`, waits until the writer has made it durable, and reads the results out of it.
# What a submission points to (operations, keys, values) outlives that: a local for one operation, arrays for many.

cdef tuple write_one(Environment env, Operation *operation):
    cdef Submission job
    cdef Entry entry
    memset(&job, 0, sizeof(Submission))
    memset(&entry, 0, sizeof(Entry))
    entry.kind = BATCH
    entry.operation_end = 1
    job.operations = operation
    job.operation_count = 1
    job.entries = &entry
    job.entry_count = 1
    job.bytes = operation.value_bytes + operation.key_bytes
    env.finish(&job)
    return operation.result, operation.sequence, operation.current


cdef uint64_t write_many(Environment env, Operation *operations, Py_ssize_t count) except? 0:
    cdef Submission job
    cdef Entry entry
    cdef Py_ssize_t i
    memset(&job, 0, sizeof(Submission))
    memset(&entry, 0, sizeof(Entry))
    entry.kind = BATCH
    entry.operation_end = count
    job.operations = operations
    job.operation_count = count
    job.entries = &entry
    job.entry_count = 1
    for i in range(count):
        job.bytes += operations[i].key_bytes + operations[i].value_bytes
    env.finish(&job)
    return entry.last_sequence


cdef object put_pairs(Environment env, pairs):
    cdef list items = list(pairs)
    cdef Py_ssize_t count = len(items)
    cdef Py_ssize_t i
    cdef list kept
    cdef object pair, key, value
    cdef Operation *operations
    if count == 0:
        return env.state.sequence
    # NB: the tuples keep keys and values alive while the GIL is released; `kept` keeps the tuples.
    kept = [None] * count
    operations = <Operation *>calloc(count, sizeof(Operation))
    if operations is NULL:
        raise MemoryError
    try:
        for i in range(count):
            pair = items[i]
            if not PyTuple_CheckExact(pair):
                pair = tuple(pair)
            if PyTuple_GET_SIZE(pair) != 2:
                raise errors.InvalidValue("put_many takes pairs (key, value)")
            kept[i] = pair
            key = <object>PyTuple_GET_ITEM(pair, 0)
            value = <object>PyTuple_GET_ITEM(pair, 1)
            if not PyBytes_Check(key) or not 1 <= PyBytes_GET_SIZE(key) <= KEY_MAX:
                check_key(key)
            if not PyBytes_Check(value) or PyBytes_GET_SIZE(value) > VALUE_MAX:
                check_value(value)
            operations[i].key = <const uint8_t *>PyBytes_AS_STRING(key)
            operations[i].key_bytes = <uint16_t>PyBytes_GET_SIZE(key)
            operations[i].value = <const uint8_t *>PyBytes_AS_STRING(value)
            operations[i].value_bytes = <uint32_t>PyBytes_GET_SIZE(value)
        return write_many(env, operations, count)
    finally:
        free(operations)


cdef object delete_keys(Environment env, keys):
    cdef list names = list(keys)
    cdef Py_ssize_t count = len(names)
    cdef Py_ssize_t i
    cdef Py_ssize_t deleted = 0
    cdef Operation *operations
    if count == 0:
        return 0
    for key in names:
        check_key(key)
    operations = <Operation *>calloc(count, sizeof(Operation))
    if operations is NULL:
        raise MemoryError
    try:
        for i in range(count):
            set_operation(&operations[i], DELETE, names[i], None)
        write_many(env, operations, count)
        for i in range(count):
            deleted += operations[i].result == APPLIED
        return deleted
    finally:
        free(operations)


cdef list apply_entries(Environment env, list entries):
    cdef Py_ssize_t count = len(entries)
    cdef Py_ssize_t i
    cdef int64_t here
    cdef size_t total = 0
    cdef size_t at, used
    cdef size_t used_operations = 0
    cdef Submission job
    cdef Entry *made = NULL
    cdef Operation *operations = NULL
    cdef const uint8_t *data
    cdef bytes body, session
    cdef size_t size
    if count == 0:
        return []
    memset(&job, 0, sizeof(Submission))
    for kind, body, session, _number, _argument in entries:
        if kind not in (BATCH, OPEN_SESSION, PURGE):
            raise errors.InvalidValue(f"unknown kind of entry {kind!r}")
        if session is not None and len(session) not in (0, 16):
            raise errors.InvalidValue("a session id has 16 bytes")
        here = count_operations(<const uint8_t *>PyBytes_AS_STRING(body), len(body))
        if here < 0:
            raise errors.FrameError("the bytes are no sequence of operations")
        total += here
        job.bytes += len(body)
    made = <Entry *>calloc(count, sizeof(Entry))
    operations = <Operation *>malloc((total + 1) * sizeof(Operation))
    try:
        if made is NULL or operations is NULL:
            raise MemoryError
        for i in range(count):
            kind, body, session, number, argument = entries[i]
            made[i].kind = kind
            made[i].number = number or 0
            made[i].argument = argument or 0
            if session:
                memcpy(made[i].session, PyBytes_AS_STRING(session), 16)
            made[i].operation_start = used_operations
            data = <const uint8_t *>PyBytes_AS_STRING(body)
            size = len(body)
            at = 0
            while at < size:
                operation_read(data + at, data + size, &operations[used_operations], &used)
                operations[used_operations].entry = <uint32_t>i
                used_operations += 1
                at += used
            made[i].operation_end = used_operations
        job.operations = operations
        job.operation_count = total
        job.entries = made
        job.entry_count = count
        env.finish(&job)
        result = []
        for i in range(count):
            if made[i].decision == DUPLICATE:
                if made[i].answer is NULL:
                    raise errors.RequestExpired("the repeated request has no kept answer")
                answer = PyBytes_FromStringAndSize(<char *>made[i].answer, made[i].answer_bytes)
            else:
                answer = bytes([operations[k].result
                                for k in range(made[i].operation_start, made[i].operation_end)])
            result.append((made[i].decision, made[i].first_sequence, made[i].last_sequence,
                           PyBytes_FromStringAndSize(<char *>&made[i].root, 16), answer))
        return result
    finally:
        if made is not NULL:
            for i in range(count):
                free(made[i].answer)
        free(made)
        free(operations)
