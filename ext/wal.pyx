# cython: language_level=3
"""The sectors of a write-ahead log: sealed, written and synced in one call, and told apart when they are read back.

What a sector holds, and what it means when one is missing, stands in srengine/storage/wal.py. A record is written and
made durable without the interpreter: its thread works beside a busy event loop.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.errno cimport EINTR, EIO, errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from srengine._native.xxhash cimport XXH3_64bits, XXH3_64bits_withSeed

cdef extern from "signal.h" nogil:
    ctypedef struct sigset_t:
        pass
    int sigfillset(sigset_t *signals)

cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    enum:
        SIG_SETMASK
    int pthread_create(pthread_t *thread, const void *attributes, void *(*start)(void *) noexcept nogil, void *given)
    int pthread_join(pthread_t thread, void **ended)
    int pthread_detach(pthread_t thread)
    int pthread_sigmask(int how, const sigset_t *signals, sigset_t *before)
    int pthread_mutex_init(pthread_mutex_t *lock, const void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *lock)
    int pthread_mutex_unlock(pthread_mutex_t *lock)
    int pthread_cond_init(pthread_cond_t *bell, const void *attributes)
    int pthread_cond_signal(pthread_cond_t *bell)
    int pthread_cond_broadcast(pthread_cond_t *bell)
    int pthread_cond_wait(pthread_cond_t *bell, pthread_mutex_t *lock)

cdef extern from "unistd.h" nogil:
    ctypedef long ssize_t
    ssize_t pwrite(int fd, const void *buffer, size_t size, int64_t offset)
    ssize_t write(int fd, const void *buffer, size_t size)
    int getpid()

cdef extern from *:
    """
    #include <unistd.h>
    #if defined(__APPLE__)
    #include <fcntl.h>
    static int sr_sync_data(int fd) { return fcntl(fd, F_FULLFSYNC); }
    #else
    static int sr_sync_data(int fd) { return fdatasync(fd); }
    #endif
    """
    int sr_sync_data(int fd) nogil

cdef enum:
    SECTOR = 512
    HEAD = 32
    ROOM = 480                    # bytes of a record in one sector

SECTOR_BYTES = SECTOR
ROOM_BYTES = ROOM

cdef packed struct Head:
    uint64_t checksum             # of the sector behind it
    uint64_t digest               # of the whole record
    uint32_t generation
    uint32_t record
    uint32_t place
    uint32_t total


cdef inline uint64_t checksum_of(const uint8_t *sector, uint64_t identity, uint64_t number) noexcept nogil:
    return XXH3_64bits_withSeed(sector + 8, SECTOR - 8, identity + number)


cdef void seal(uint8_t *sectors, const uint8_t *record, uint32_t total, uint64_t first, uint64_t identity,
               uint32_t generation, uint32_t number) noexcept nogil:
    """Spread a record over zeroed sectors."""
    cdef Head head
    cdef uint8_t *sector = sectors
    cdef uint32_t done = 0, some
    cdef uint64_t checksum
    head.digest = XXH3_64bits(record, total)
    head.generation = generation
    head.record = number
    head.place = 0
    head.total = total
    while done < total or head.place == 0:
        some = min(total - done, <uint32_t>ROOM)
        memcpy(sector, &head, HEAD)
        memcpy(sector + HEAD, record + done, some)
        checksum = checksum_of(sector, identity, first + head.place)
        memcpy(sector, &checksum, 8)
        done += some
        head.place += 1
        sector += SECTOR


cdef int write_out(int fd, const uint8_t *bytes_, size_t size, int64_t offset) noexcept nogil:
    cdef ssize_t done
    while size:
        done = pwrite(fd, bytes_, size, offset)
        if done < 0:
            if errno == EINTR:
                continue
            return errno
        if done == 0:
            return EIO
        bytes_ += done
        offset += done
        size -= <size_t>done
    return 0


cdef uint8_t *sealed(bytes record, uint64_t first, uint64_t identity, uint32_t generation, uint32_t number,
                     size_t *size) except NULL:
    """Return a record as sectors, ``size`` bytes, which the caller frees."""
    cdef Py_ssize_t total = PyBytes_GET_SIZE(record)
    cdef const uint8_t *source = <const uint8_t *>PyBytes_AS_STRING(record)
    cdef uint8_t *sectors
    if total > 0x7FFFFFFF:
        raise OverflowError(total)
    size[0] = max(<size_t>1, (<size_t>total + ROOM - 1) // ROOM) * SECTOR
    sectors = <uint8_t *>calloc(size[0], 1)
    if sectors is NULL:
        raise MemoryError
    with nogil:
        seal(sectors, source, <uint32_t>total, first, identity, generation, number)
    return sectors


cdef int make_durable(int fd, const uint8_t *sectors, size_t size, int64_t offset) noexcept nogil:
    cdef int code = write_out(fd, sectors, size, offset)
    if code == 0 and sr_sync_data(fd) != 0:
        code = errno
    return code


def append(int fd, uint64_t first, uint64_t identity, uint32_t generation, uint32_t number, bytes record not None):
    """Write a record from sector ``first`` on and make it durable; return 0, or the errno of what failed."""
    cdef size_t size
    cdef uint8_t *sectors = sealed(record, first, identity, generation, number, &size)
    cdef int code
    with nogil:
        code = make_durable(fd, sectors, size, <int64_t>(first * SECTOR))
        free(sectors)
    return code


cdef enum:
    IDLE = 0
    GIVEN = 1
    DONE = 2


cdef struct Work:
    pthread_mutex_t lock
    pthread_cond_t bell           # rung when `state` or `ends` changes
    int state
    bint ends
    bint orphan                   # nobody waits for the thread: this is its own, and nobody is told
    int notify                    # gets a byte whenever something is done
    int fd
    uint8_t *sectors
    size_t size
    int64_t offset
    int code


cdef void *work_off(void *given) noexcept nogil:
    """What the thread does: one record after the other, never the interpreter."""
    cdef Work *work = <Work *>given
    cdef sigset_t signals
    cdef int code
    cdef bint orphan
    sigfillset(&signals)
    pthread_sigmask(SIG_SETMASK, &signals, NULL)
    pthread_mutex_lock(&work.lock)
    while True:
        while work.state != GIVEN and not work.ends:
            pthread_cond_wait(&work.bell, &work.lock)
        if work.state != GIVEN:
            break
        pthread_mutex_unlock(&work.lock)
        code = make_durable(work.fd, work.sectors, work.size, work.offset)
        pthread_mutex_lock(&work.lock)
        free(work.sectors)
        work.sectors = NULL
        work.code = code
        work.state = DONE
        orphan = work.orphan
        pthread_cond_broadcast(&work.bell)
        # NB: not under the lock, which whoever is woken takes at once. Who ends this thread waits for it meanwhile.
        pthread_mutex_unlock(&work.lock)
        if not orphan:
            write(work.notify, "!", 1)
        pthread_mutex_lock(&work.lock)
    orphan = work.orphan
    pthread_mutex_unlock(&work.lock)
    if orphan:
        free(work)
    return NULL


cdef class Appender:
    """A thread that makes one record after the other durable, and says so by a byte on the descriptor ``notify``.

    For one event loop: nobody who works on a record needs the interpreter, so neither end waits for it.
    """

    cdef Work *work
    cdef pthread_t thread
    cdef int process

    def __cinit__(self, int notify):
        cdef Work *work = <Work *>calloc(1, sizeof(Work))
        cdef int code
        if work is NULL:
            raise MemoryError
        work.notify = notify
        pthread_mutex_init(&work.lock, NULL)
        pthread_cond_init(&work.bell, NULL)
        code = pthread_create(&self.thread, NULL, work_off, work)
        if code != 0:
            free(work)
            raise OSError(code, "cannot start a thread")
        self.process = getpid()
        self.work = work

    def __dealloc__(self):
        # Whoever wants to wait for a disk closes it: a process whose disk hangs has to be able to end.
        self.end(False)

    cdef void end(self, bint waits) noexcept:
        cdef Work *work = self.work
        cdef bint orphan
        # A forked child has no such thread.
        if work is NULL or self.process != getpid():
            return
        self.work = NULL
        with nogil:
            pthread_mutex_lock(&work.lock)
            work.ends = True
            orphan = work.state == GIVEN and not waits
            work.orphan = orphan
            pthread_cond_broadcast(&work.bell)
            pthread_mutex_unlock(&work.lock)
            if orphan:
                pthread_detach(self.thread)
            else:
                pthread_join(self.thread, NULL)
                free(work)

    def begin(self, int fd, uint64_t first, uint64_t identity, uint32_t generation, uint32_t number,
              bytes record not None):
        """`append` in the thread; the one before was taken."""
        cdef size_t size
        cdef uint8_t *sectors
        if self.work is NULL or self.work.state != IDLE:
            raise ValueError("the thread has ended, or has something to do")
        sectors = sealed(record, first, identity, generation, number, &size)
        self.work.fd = fd
        self.work.sectors = sectors
        self.work.size = size
        self.work.offset = <int64_t>(first * SECTOR)
        with nogil:
            pthread_mutex_lock(&self.work.lock)
            self.work.state = GIVEN
            pthread_mutex_unlock(&self.work.lock)
            pthread_cond_signal(&self.work.bell)

    def take(self):
        """Wait for what was begun and return what `append` would have."""
        cdef int code
        if self.work is NULL or self.work.state == IDLE:
            raise ValueError("nothing was begun")
        if self.process != getpid():
            raise ValueError("the thread is that of another process")
        with nogil:
            pthread_mutex_lock(&self.work.lock)
            while self.work.state != DONE:
                pthread_cond_wait(&self.work.bell, &self.work.lock)
            code = self.work.code
            self.work.state = IDLE
            pthread_mutex_unlock(&self.work.lock)
        return code

    @property
    def busy(self):
        """Whether something was begun and not taken."""
        return self.work is not NULL and self.work.state != IDLE

    def close(self):
        """End the thread after what was begun; a second call does nothing."""
        self.end(True)


def heads(const uint8_t[::1] content not None, uint64_t identity):
    """Return what the sectors of a file say, and the numbers of those that are not sound.

    [(sector, generation, record, place, total, digest), ...]; sectors of zeros alone are neither.
    """
    cdef Py_ssize_t count = content.shape[0] // SECTOR, i, k
    cdef const uint8_t *sector
    cdef const uint64_t *words
    cdef uint64_t any_
    cdef Head head
    found = []
    unsound = []
    for i in range(count):
        sector = &content[i * SECTOR]
        words = <const uint64_t *>sector
        any_ = 0
        for k in range(SECTOR // 8):
            any_ |= words[k]
        if any_ == 0:
            continue
        memcpy(&head, sector, HEAD)
        if head.checksum != checksum_of(sector, identity, <uint64_t>i):
            unsound.append(i)
        else:
            found.append((i, head.generation, head.record, head.place, head.total, head.digest))
    return found, unsound
