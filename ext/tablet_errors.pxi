# What went wrong as errors with names, and what may be asked for at all.

cdef str strerror(int code):
    return (<bytes>mdb_strerror(code)).decode("utf-8", "replace")


cdef str show_key(bytes key):
    return repr(key) if len(key) <= 64 else repr(key[:61]) + "..."


cdef object error_of(Environment env, Failure *failure):
    """Return the typed error of a failure."""
    cdef int code = failure.code
    cdef bytes key = (<char *>failure.key)[:failure.key_bytes]
    where = env.path.decode("utf-8", "replace")
    what = (<bytes>failure.what).decode() if failure.what is not NULL else "tablet"
    if env.fence and what == "fenced" or code == env.fence and env.fence:
        return errors.TabletFenced(f"tablet {where} is fenced after an input/output error: {strerror(env.fence)}",
                                   tablet=where, reason=strerror(env.fence))
    if code == CODE_CORRUPT or code in (MDB_CORRUPTED, MDB_PAGE_NOTFOUND, MDB_INVALID, MDB_VERSION_MISMATCH):
        reason = what if code == CODE_CORRUPT else f"{what}: {strerror(code)}"
        suffix = f" of key {show_key(key)}" if key else ""
        return errors.CorruptionError(f"tablet {where}: {reason}{suffix} is damaged", tablet=where, key=key, what=reason)
    if code == CODE_BASE_MISMATCH:
        return errors.Diverged(f"tablet {where} does not stand at the base position of the delta", tablet=where)
    if code == CODE_ROOT_MISMATCH:
        return errors.Diverged(f"tablet {where} would not have the root or count that the source proved", tablet=where)
    if code == CODE_ROWS_MALFORMED:
        return errors.FrameError(f"rows for tablet {where} are malformed: {what}", tablet=where)
    if code == CODE_CLOSED:
        return errors.Closed("the tablet is closed")
    if code == CODE_NO_MEMORY:
        return MemoryError(what)
    if is_space(code):
        return errors.DiskFull(f"tablet {where} is read-only: {strerror(code)}", tablet=where)
    if code == MDB_READERS_FULL:
        return errors.QuotaExceeded(f"tablet {where} has too many open views", tablet=where)
    return errors.Error(f"tablet {where}: {what}: {strerror(code)}", tablet=where, errno=code)


cdef int raise_failure(Environment env, Failure *failure) except -1:
    raise error_of(env, failure)


cdef int check_key(object key) except -1:
    if not PyBytes_Check(key):
        raise TypeError(f"a key is bytes, not {type(key).__name__}")
    if not 1 <= PyBytes_GET_SIZE(key) <= KEY_MAX:
        raise errors.InvalidValue(f"a key has 1 to {KEY_MAX} bytes, not {PyBytes_GET_SIZE(key)}",
                                  limit=KEY_MAX, size=PyBytes_GET_SIZE(key))
    return 0


cdef int check_value(object value) except -1:
    if not PyBytes_Check(value):
        raise TypeError(f"a value is bytes, not {type(value).__name__}")
    if PyBytes_GET_SIZE(value) > VALUE_MAX:
        raise errors.InvalidValue(f"a value has at most {VALUE_MAX} bytes, not {PyBytes_GET_SIZE(value)}",
                                  limit=VALUE_MAX, size=PyBytes_GET_SIZE(value))
    return 0
