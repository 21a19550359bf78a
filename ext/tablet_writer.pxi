# The writer: group commit, growth of the map, readers that pin it, fences.
#
# Whoever has work appends it to the queue. If no writer is active the caller becomes the writer, takes all that is
# queued, commits it in one transaction and wakes the others; otherwise it sleeps until it is done, or until it is
# promoted to write what has queued up meanwhile. All of it runs without the GIL.
#
# Callers who write again and again would fall into two halves that wait for each other's commit. So after a commit that
# others waited for, the next writer waits, for a part of the time that it took, until as many are back as it let go. Who
# is alone never waits, and after a wait for few there is none for a while.
#
#   queue_lock   guards the queue, the state that Python reads, and the list of readers
#   map_lock     held by a short read, and while the map moves: growing under an open read is a crash
#
# Growing: at the first instant without pinned readers once three quarters are used; only a full map makes the writer
# wait for them, and then only until they are done or past their maximum age.

cdef enum:
    GROUP_OPERATIONS_MAX = 200000
    GROUP_BYTES_LIMIT = 268435456
    RING_ENTRIES = 65536
    GATHER_US_MIN = 100          # a commit shorter than this is not worth a wait
    GATHER_US_MAX = 5000
    GATHER_SHARE = 2             # a wait lasts at most one part of so many of the commit before
    GATHER_PAUSE = 16            # commits without a wait, after one for few


cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <pthread.h>
    #include <signal.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <time.h>
    #include <unistd.h>

    static volatile unsigned long long sr_generation = 1;

    static void sr_forked(void) { sr_generation++; }

    /* The marker file of the tablet that this thread is reading or writing; a SIGBUS leaves a note there.
     * NB: volatile, or the compiler drops a store that only the signal handler reads. */
    static __thread const char *volatile sr_marker = NULL;
    static inline void sr_enter(const char *marker) { sr_marker = marker; }
    static struct sigaction sr_previous_sigbus;

    static void sr_write_marker(const char *path, const char *text) {
        int fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (fd >= 0) {
            ssize_t written = write(fd, text, strlen(text));
            (void)written;
            fsync(fd);
            close(fd);
        }
    }

    static void sr_on_sigbus(int number, siginfo_t *info, void *context) {
        (void)info; (void)context;
        if (sr_marker && sr_marker[0]) sr_write_marker(sr_marker, "SIGBUS while reading the mapped file\\n");
        /* Hand over to whoever was there before (default: death); the faulting instruction runs again. */
        sigaction(number, &sr_previous_sigbus, NULL);
    }

    static int sr_process_setup(void) {
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_sigaction = sr_on_sigbus;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        if (sigaction(SIGBUS, &action, &sr_previous_sigbus)) return errno;
        return pthread_atfork(NULL, NULL, sr_forked);
    }

    /* Is there address space for a map of this size? LMDB gives the old map up before it asks for the new one. */
    static int sr_can_map(size_t size) {
        void *probe = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (probe == MAP_FAILED) return 0;
        munmap(probe, size);
        return 1;
    }

    static unsigned long long sr_now_ms(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (unsigned long long)now.tv_sec * 1000 + now.tv_nsec / 1000000;
    }

    static unsigned long long sr_wall_ms(void) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        return (unsigned long long)now.tv_sec * 1000 + now.tv_nsec / 1000000;
    }

    static unsigned long long sr_now_us(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (unsigned long long)now.tv_sec * 1000000 + now.tv_nsec / 1000;
    }

    /* A condition to wait on with `sr_wait_us`, which no step of the wall clock prolongs. */
    static void sr_timed_condition(pthread_cond_t *condition) {
        pthread_condattr_t attributes;
        pthread_condattr_init(&attributes);
    #ifndef __APPLE__
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    #endif
        pthread_cond_init(condition, &attributes);
        pthread_condattr_destroy(&attributes);
    }

    static void sr_wait_us(pthread_cond_t *condition, pthread_mutex_t *lock, unsigned long us) {
        struct timespec until = {0, 0};
    #ifndef __APPLE__
        clock_gettime(CLOCK_MONOTONIC, &until);
    #endif
        until.tv_nsec += (long)(us % 1000000) * 1000;
        until.tv_sec += us / 1000000 + until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
    #ifdef __APPLE__
        pthread_cond_timedwait_relative_np(condition, lock, &until);
    #else
        pthread_cond_timedwait(condition, lock, &until);
    #endif
    }
    """
    uint64_t sr_generation
    void sr_enter(const char *marker) noexcept nogil
    int sr_process_setup() noexcept nogil
    void sr_write_marker(const char *path, const char *text) noexcept nogil
    bint sr_can_map(size_t size) noexcept nogil
    uint64_t sr_now_ms() noexcept nogil
    uint64_t sr_wall_ms() noexcept nogil
    uint64_t sr_now_us() noexcept nogil
    void sr_timed_condition(pthread_cond_t *condition) noexcept nogil
    void sr_wait_us(pthread_cond_t *condition, pthread_mutex_t *lock, unsigned long us) noexcept nogil


cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *lock, void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *lock)
    int pthread_mutex_lock(pthread_mutex_t *lock)
    int pthread_mutex_unlock(pthread_mutex_t *lock)
    int pthread_cond_init(pthread_cond_t *condition, void *attributes)
    int pthread_cond_destroy(pthread_cond_t *condition)
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *lock)
    int pthread_cond_signal(pthread_cond_t *condition)
    int pthread_cond_broadcast(pthread_cond_t *condition)


cdef void ring_push(Environment env, uint64_t sequence, const Sum *root) noexcept nogil:
    cdef size_t at
    if env.ring_count == RING_ENTRIES:
        env.ring_start = (env.ring_start + 1) % RING_ENTRIES
        env.ring_count -= 1
    at = (env.ring_start + env.ring_count) % RING_ENTRIES
    env.ring_sequences[at] = sequence
    env.ring_roots[at] = root[0]
    env.ring_count += 1


cdef bint ring_find(Environment env, uint64_t sequence, Sum *root) noexcept nogil:
    """Binary search in the ring of (sequence, root); the caller holds queue_lock."""
    cdef size_t low = 0
    cdef size_t high = env.ring_count
    cdef size_t middle
    while low < high:
        middle = (low + high) // 2
        if env.ring_sequences[(env.ring_start + middle) % RING_ENTRIES] < sequence:
            low = middle + 1
        else:
            high = middle
    if low == env.ring_count or env.ring_sequences[(env.ring_start + low) % RING_ENTRIES] != sequence:
        return False
    root[0] = env.ring_roots[(env.ring_start + low) % RING_ENTRIES]
    return True


cdef void expire_readers(Environment env) noexcept nogil:
    """Close readers past their maximum age that are not inside a call; the caller holds queue_lock."""
    cdef uint64_t now = sr_now_ms()
    cdef ReaderLink *link = env.readers
    cdef ReaderLink *reader
    while link is not NULL:
        reader = link
        link = reader.following
        if reader.txn is not NULL and not reader.busy and now - reader.opened_ms > reader.ms_max:
            mdb_txn_abort(reader.txn)
            reader.txn = NULL
            reader.is_expired = True
            env.pinned -= 1
            env.expired += 1
    if env.pinned == 0:
        pthread_cond_broadcast(&env.unpinned)


cdef int grow(Environment env, bint wait) noexcept nogil:
    """Double the map. Without ``wait`` only if no reader is pinned at this instant.

    ENOMEM without address space for it; the map then stays as it is.
    """
    cdef size_t wanted = 2 * env.map_bytes
    cdef int rc
    if not sr_can_map(wanted):
        return ENOMEM
    pthread_mutex_lock(&env.queue_lock)
    expire_readers(env)
    if env.pinned and not wait:
        pthread_mutex_unlock(&env.queue_lock)
        return 0
    env.growing = True
    while env.pinned:
        sr_wait_us(&env.unpinned, &env.queue_lock, 20000)
        expire_readers(env)
    pthread_mutex_lock(&env.map_lock)
    rc = mdb_env_set_mapsize(env.env, wanted)
    if rc == ENOMEM:
        # Lost to another thread after all. The old map is gone, too: this process is done with the tablet.
        env.fence = ENOMEM
    if rc == 0:
        env.map_bytes = wanted
        env.grown += 1
    pthread_mutex_unlock(&env.map_lock)
    env.growing = False
    pthread_cond_broadcast(&env.unpinned)
    pthread_mutex_unlock(&env.queue_lock)
    return rc


cdef bint is_space(int rc) noexcept nogil:
    return rc == ENOSPC or rc == EDQUOT or rc == EFBIG


cdef void fence(Environment env, int rc) noexcept nogil:
    env.fence = rc if rc else EIO
    sr_write_marker(env.marker, b"input/output error while committing\n")


cdef int run(Environment env, Submission *job) noexcept nogil:
    """One transaction, with growth of the map as often as needed."""
    cdef MDB_envinfo info
    cdef int rc
    cdef bint counted
    while True:
        if env.fence:
            return fail(&job.failure, env.fence, b"fenced", NULL, 0)
        sr_enter(env.marker)
        errno.errno = 0
        rc = transact(env, job)
        sr_enter(NULL)
        if rc == EIO and errno.errno != EIO:
            # LMDB says EIO for a write that was cut short, too; no system call failed: the disk filled up inside it.
            rc = job.failure.code = ENOSPC
        if rc == MDB_MAP_FULL:
            rc = grow(env, True)
            if rc == 0:
                continue
            if rc != ENOMEM:
                fence(env, rc)
                return fail(&job.failure, rc, b"growing the map", NULL, 0)
        break
    if rc == 0:
        env.disk_full = False
        if env.pinned:
            pthread_mutex_lock(&env.queue_lock)
            expire_readers(env)
            pthread_mutex_unlock(&env.queue_lock)
        mdb_env_info(env.env, &info)
        if (info.me_last_pgno + 1) * 4096 > env.map_bytes // 4 * 3:
            rc = grow(env, False)
            if rc != 0 and rc != ENOMEM:
                fence(env, rc)
            rc = 0
    elif is_space(rc):
        env.disk_full = True
    elif rc == ENOMEM:
        # The transaction is taken back; nothing is wrong with the disk.
        rc = job.failure.code = CODE_NO_MEMORY
    elif rc > 0 or rc == MDB_PANIC:
        # An errno out of LMDB: the kernel may have marked pages clean that never reached the disk.
        fence(env, rc)
    return rc


cdef void run_group(Environment env, Submission *first, size_t jobs) noexcept nogil:
    """Run ``jobs`` queued submissions of entries in one transaction; one that fails alone fails alone."""
    cdef Submission group
    cdef Submission *job
    cdef size_t operations = 0
    cdef size_t entries = 0
    cdef size_t i, k
    cdef uint32_t entry_base = 0
    cdef int rc
    if jobs == 1:
        run(env, first)
        return
    job = first
    for k in range(jobs):
        operations += job.operation_count
        entries += job.entry_count
        job = job.next
    memset(&group, 0, sizeof(Submission))
    group.operations = <Operation *>malloc((operations + 1) * sizeof(Operation))
    group.entries = <Entry *>malloc((entries + 1) * sizeof(Entry))
    rc = CODE_NO_MEMORY
    if group.operations is not NULL and group.entries is not NULL:
        job = first
        for k in range(jobs):
            if job.operation_count:
                memcpy(group.operations + group.operation_count, job.operations,
                       job.operation_count * sizeof(Operation))
            for i in range(job.operation_count):
                group.operations[group.operation_count + i].entry += entry_base
            memcpy(group.entries + group.entry_count, job.entries, job.entry_count * sizeof(Entry))
            for i in range(job.entry_count):
                group.entries[group.entry_count + i].operation_start += group.operation_count
                group.entries[group.entry_count + i].operation_end += group.operation_count
            group.operation_count += job.operation_count
            group.entry_count += job.entry_count
            entry_base += <uint32_t>job.entry_count
            job = job.next
        number_entries(env, &group)
        rc = run(env, &group)
    if rc == 0:
        operations = 0
        entries = 0
        job = first
        for k in range(jobs):
            for i in range(job.operation_count):
                job.operations[i].result = group.operations[operations + i].result
                job.operations[i].current = group.operations[operations + i].current
                job.operations[i].sequence = group.operations[operations + i].sequence
            for i in range(job.entry_count):
                job.entries[i] = group.entries[entries + i]
                job.entries[i].operation_start -= operations
                job.entries[i].operation_end -= operations
            operations += job.operation_count
            entries += job.entry_count
            job.failure.code = 0
            job = job.next
    else:
        if group.entries is not NULL:
            for i in range(group.entry_count):
                if group.entries[i].answer is not NULL:
                    free(group.entries[i].answer)
        job = first
        for k in range(jobs):
            number_entries(env, job)
            run(env, job)
            job = job.next
    free(group.operations)
    free(group.entries)


cdef void number_entries(Environment env, Submission *job) noexcept nogil:
    """Fix sequences and clocks: every operation takes one, every entry at least one."""
    cdef uint64_t sequence = env.state.sequence
    cdef uint64_t clock = env.state.hybrid_clock
    cdef uint64_t now = sr_wall_ms() << 16
    cdef Entry *entry
    cdef size_t i, k
    for i in range(job.entry_count):
        entry = &job.entries[i]
        clock = now if now > clock else clock + 1
        entry.hybrid_clock = clock
        entry.first_sequence = sequence + 1
        for k in range(entry.operation_start, entry.operation_end):
            sequence += 1
            job.operations[k].sequence = sequence
            job.operations[k].hybrid_clock = clock
        if entry.operation_start == entry.operation_end:
            sequence += 1
        entry.last_sequence = sequence


cdef void wake(Submission *job, bint promoted) noexcept nogil:
    """Let a waiting caller go on; its submission is gone as soon as it does."""
    pthread_mutex_lock(&job.lock)
    job.promoted = promoted
    job.done = not promoted
    pthread_cond_signal(&job.woken)
    pthread_mutex_unlock(&job.lock)


cdef void gather(Environment env) noexcept nogil:
    """Wait until those whom the last commit let go are back, or the time for it is over; the caller holds queue_lock."""
    cdef uint64_t now
    while env.expected:
        now = sr_now_us()
        if now >= env.gather_until_us:
            if 4 * env.expected > env.let_go:
                env.gather_pause = GATHER_PAUSE
            env.expected = 0
            break
        sr_wait_us(&env.gathered, &env.queue_lock, env.gather_until_us - now)


cdef void submit(Environment env, Submission *job) noexcept nogil:
    """Hand work to the writer and return when it is durable, or failed."""
    cdef Submission *first
    cdef Submission *last
    cdef Submission *following
    cdef size_t jobs, operations, size
    cdef uint64_t spent_us
    job.done = False
    job.promoted = False
    job.next = NULL
    pthread_mutex_lock(&env.queue_lock)
    if env.is_closed:
        pthread_mutex_unlock(&env.queue_lock)
        fail(&job.failure, CODE_CLOSED, b"closed", NULL, 0)
        return
    pthread_mutex_init(&job.lock, NULL)
    pthread_cond_init(&job.woken, NULL)
    if env.queue_tail is NULL:
        env.queue_head = job
    else:
        env.queue_tail.next = job
    env.queue_tail = job
    if env.expected:
        env.expected -= 1
        if not env.expected:
            pthread_cond_signal(&env.gathered)
    if env.writer_active:
        # Not on the lock that all share: whoever is woken would wait for it until the last of them is.
        pthread_mutex_unlock(&env.queue_lock)
        pthread_mutex_lock(&job.lock)
        while not job.done and not job.promoted:
            pthread_cond_wait(&job.woken, &job.lock)
        pthread_mutex_unlock(&job.lock)
        if job.done:
            pthread_cond_destroy(&job.woken)
            pthread_mutex_destroy(&job.lock)
            return
        pthread_mutex_lock(&env.queue_lock)
    env.writer_active = True
    if job.mode == MODE_ENTRIES:
        gather(env)
    # Take what has queued up: a run of entries shares a transaction, anything else goes alone.
    first = env.queue_head
    last = first
    jobs = 1
    operations = first.operation_count
    size = first.bytes
    while first.mode == MODE_ENTRIES and last.next is not NULL and last.next.mode == MODE_ENTRIES \
            and operations + last.next.operation_count <= GROUP_OPERATIONS_MAX \
            and size + last.next.bytes <= GROUP_BYTES_LIMIT:
        last = last.next
        jobs += 1
        operations += last.operation_count
        size += last.bytes
    env.queue_head = last.next
    if env.queue_head is NULL:
        env.queue_tail = NULL
    pthread_mutex_unlock(&env.queue_lock)
    spent_us = sr_now_us()
    if jobs == 1:
        if first.mode == MODE_ENTRIES:
            number_entries(env, first)
        run(env, first)
    else:
        run_group(env, first, jobs)
    spent_us = sr_now_us() - spent_us
    pthread_mutex_lock(&env.queue_lock)
    following = env.queue_head
    env.expected = 0
    if job.mode == MODE_ENTRIES and spent_us >= GATHER_US_MIN and (jobs > 1 or following is not NULL):
        if env.gather_pause:
            env.gather_pause -= 1
        else:
            env.expected = env.let_go = jobs
            spent_us = spent_us // GATHER_SHARE
            env.gather_until_us = sr_now_us() + (spent_us if spent_us < GATHER_US_MAX else GATHER_US_MAX)
    env.writer_active = following is not NULL
    pthread_mutex_unlock(&env.queue_lock)
    # NB: the next writer before all others: the disk is idle until it runs.
    if following is not NULL:
        wake(following, True)
    while jobs:
        following = first.next
        jobs -= 1
        if first is not job:
            wake(first, False)
        first = following
    pthread_cond_destroy(&job.woken)
    pthread_mutex_destroy(&job.lock)
