# cython: language_level=3
"""Waiting for the descriptors of an event loop, busily for a moment before it sleeps. See srengine/node/loop.py.

Linux only: elsewhere `Poller` raises OSError (ENOSYS).
"""

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport free, realloc

cdef extern from *:
    """
    #include <errno.h>
    #include <sched.h>
    #include <stdint.h>
    #include <time.h>
    #if defined(__linux__)
    #include <sys/epoll.h>
    #else
    struct epoll_event { uint32_t events; struct { int fd; } data; };
    static int epoll_wait(int fd, struct epoll_event *found, int room, int ms) { errno = ENOSYS; return -1; }
    #endif
    typedef struct epoll_event sr_event;

    static int64_t sr_now_ns(void)
    {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    }

    static int sr_waits_on(const sr_event *event) { return event->data.fd; }
    """
    ctypedef struct sr_event:
        uint32_t events
    int64_t sr_now_ns() nogil
    int sr_waits_on(const sr_event *event) nogil
    int epoll_wait(int fd, sr_event *found, int room, int ms) nogil
    int sched_yield() nogil

cdef enum:
    ROOM_MIN = 64
    MS_MAX = 0x7FFFFFFF


cdef int wait(int fd, sr_event *found, int room, int64_t timeout_ns, int64_t busy_ns, bint *slept) noexcept nogil:
    """Return how many descriptors are ready, or -1 with errno. ``timeout_ns`` below 0: for ever."""
    cdef int64_t start, end, left
    cdef int count
    if timeout_ns == 0:
        return epoll_wait(fd, found, room, 0)
    start = sr_now_ns()
    if busy_ns > 0:
        end = start + (busy_ns if timeout_ns < 0 or busy_ns < timeout_ns else timeout_ns)
        while True:
            count = epoll_wait(fd, found, room, 0)
            if count != 0 or sr_now_ns() >= end:
                break
            # Whoever else has something to do on this processor does it now.
            sched_yield()
        if count != 0:
            return count
    if timeout_ns < 0:
        slept[0] = True
        return epoll_wait(fd, found, room, -1)
    left = timeout_ns - (sr_now_ns() - start)
    if left <= 0:
        return 0
    slept[0] = True
    # Never too early: whoever waits would ask again and again for the rest of a millisecond.
    left = (left + 999999) // 1000000
    return epoll_wait(fd, found, room, <int>left if left < MS_MAX else MS_MAX)


cdef class Poller:
    """Waits on one epoll descriptor, which stays its caller's.

    ``busy_s``: how long to wait busily at most. It does so only after a wait that took no longer: whatever comes
    rarely is waited for asleep.
    """

    cdef int fd
    cdef int64_t busy_ns
    cdef bint is_busy
    cdef sr_event *found
    cdef int room
    cdef readonly unsigned long long sleeps
    """How often it has slept so far."""
    cdef readonly unsigned long long busy_waits
    """How often it has waited busily so far, whether that ended asleep or not."""

    def __init__(self, int fd, double busy_s):
        if not 0 <= busy_s <= 1:
            raise ValueError("a wait is busy for at most a second")
        self.fd = fd
        self.busy_ns = <int64_t>(busy_s * 1e9)
        self.enlarge(ROOM_MIN)

    def __dealloc__(self):
        free(self.found)

    cdef int enlarge(self, int room) except -1:
        cdef sr_event *larger = <sr_event *>realloc(self.found, <size_t>room * sizeof(sr_event))
        if larger is NULL:
            raise MemoryError
        self.found = larger
        self.room = room
        return 0

    def wait(self, double timeout_s):
        """Return [(descriptor, epoll's event mask), ...] as soon as some are ready; [] after ``timeout_s`` (below 0:
        never), and when a signal was handled.
        """
        cdef int64_t timeout_ns = -1
        cdef int64_t start
        cdef bint slept = False
        cdef int count, i, code = 0
        if timeout_s >= 0:
            timeout_ns = <int64_t>min(timeout_s * 1e9, 9e18)
        if self.is_busy and timeout_ns != 0:
            self.busy_waits += 1
        with nogil:
            start = sr_now_ns()
            count = wait(self.fd, self.found, self.room, timeout_ns, self.busy_ns if self.is_busy else 0, &slept)
            if count < 0:
                code = errno
            if timeout_ns != 0:
                self.is_busy = sr_now_ns() - start < self.busy_ns
        self.sleeps += slept
        if count < 0:
            if code != EINTR:
                raise OSError(code, "cannot wait for descriptors")
            PyErr_CheckSignals()
            return []
        ready = [(sr_waits_on(&self.found[i]), self.found[i].events) for i in range(count)]
        if count == self.room:
            self.enlarge(2 * self.room)
        return ready
