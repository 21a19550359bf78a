/* Records, breaks and delays the writes of a process to its data files. Preloaded (LD_PRELOAD) by the crash and fault
 * tests; Linux only.
 *
 * Files are followed from the moment they are opened for writing with a name that contains $SRENGINE_TRACK, one of
 * several pieces separated by ':' (say "data.mdb:wal"); a piece without '/' is looked for in the last component alone.
 * Each call on one of them counts as an event: a write (pwrite, pwritev, write, writev), a sync (fsync, fdatasync) or a
 * truncation. Events are numbered from 1 in the order in which they enter; calls are made under one lock, so that the
 * order of the record is the order in which they happened.
 *
 *   SRENGINE_RECORD=FILE       append every event with its bytes to FILE (see record.py for the layout), and the path of
 *                              a followed file whenever one is opened, which is no event to count
 *   SRENGINE_ACK_FD=N          writes to descriptor N are recorded too, as acknowledgements
 *   SRENGINE_KILL_AT=N         SIGKILL the process before its event N
 *   SRENGINE_BREAK=KIND        which events to break: write, sync, meta (a write through an O_DSYNC descriptor), any
 *   SRENGINE_BREAK_AT=N        the first to break, counted among those of that kind; 0: none yet
 *   SRENGINE_BREAK_COUNT=N     how many to break; default 1
 *   SRENGINE_BREAK_ERRNO=N     the errno to return; 0: make the call, but only half of a write (a short write)
 *   SRENGINE_BREAK_DELAY_MS=N  instead of failing, wait this long before the call (a slow disk)
 *
 * A program finds recorder_break(kind, at, count, errno, delay_ms) by dlsym and may set the breaking at run time;
 * recorder_events() says how many events there were. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { WRITE = 1, SYNC = 2, TRUNCATE = 3, ACKNOWLEDGE = 4, OPEN = 5 };
enum { ANY = 0, KIND_WRITE = 1, KIND_SYNC = 2, KIND_META = 3 };
enum { DESCRIPTORS = 4096 };

struct event {
    uint32_t kind, file, synchronous, error;
    uint64_t offset, length;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint32_t followed[DESCRIPTORS]; /* 0: not followed, else the file's number */
static unsigned char synchronous[DESCRIPTORS];
static uint64_t inodes[DESCRIPTORS];
static uint32_t files_known;
static int record_fd = -1, acknowledge_fd = -1;
static long events, kill_at, break_at, break_count = 1, break_errno, break_delay_ms, broken_kind_events;
static int break_kind;
static const char *track;
static int ready;

static long number(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtol(text, NULL, 10) : otherwise;
}

static int kind_of(const char *text) {
    if (!text || !strcmp(text, "any")) return ANY;
    if (!strcmp(text, "write")) return KIND_WRITE;
    if (!strcmp(text, "sync")) return KIND_SYNC;
    if (!strcmp(text, "meta")) return KIND_META;
    return ANY;
}

__attribute__((constructor)) static void start(void) {
    const char *path;
    if (ready) return;
    ready = 1;
    track = getenv("SRENGINE_TRACK");
    path = getenv("SRENGINE_RECORD");
    if (path && *path) record_fd = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    acknowledge_fd = number("SRENGINE_ACK_FD", -1);
    kill_at = number("SRENGINE_KILL_AT", 0);
    break_kind = kind_of(getenv("SRENGINE_BREAK"));
    break_at = number("SRENGINE_BREAK_AT", 0);
    break_count = number("SRENGINE_BREAK_COUNT", 1);
    break_errno = number("SRENGINE_BREAK_ERRNO", 0);
    break_delay_ms = number("SRENGINE_BREAK_DELAY_MS", 0);
}

/* For programs: break events from now on; `at` counts from the call. */
void recorder_break(int kind, long at, long count, int code, long delay_ms) {
    pthread_mutex_lock(&lock);
    break_kind = kind;
    break_at = at;
    break_count = count;
    break_errno = code;
    break_delay_ms = delay_ms;
    broken_kind_events = 0;
    pthread_mutex_unlock(&lock);
}

long recorder_events(void) {
    return events;
}

static void put(const void *bytes, size_t length) {
    const char *at = bytes;
    while (length) {
        ssize_t done = syscall(SYS_write, record_fd, at, length);
        if (done <= 0) _exit(90);
        at += done;
        length -= done;
    }
}

static void record(uint32_t kind, int fd, uint64_t offset, uint64_t length, int code) {
    struct event event = {kind, fd >= 0 && fd < DESCRIPTORS ? followed[fd] : 0,
                          fd >= 0 && fd < DESCRIPTORS ? synchronous[fd] : 0, code, offset, length};
    if (record_fd >= 0) put(&event, sizeof event);
}

static void record_parts(const struct iovec *parts, int count, size_t length) {
    int i;
    if (record_fd < 0) return;
    for (i = 0; i < count && length; i++) {
        size_t some = parts[i].iov_len < length ? parts[i].iov_len : length;
        put(parts[i].iov_base, some);
        length -= some;
    }
}

static int is_followed(int fd) {
    return ready && fd >= 0 && fd < DESCRIPTORS && followed[fd];
}

/* Count an event. Returns 1 if it has to be broken. Called under the lock. */
static int enter(int kind, int fd) {
    int meta = kind == WRITE && synchronous[fd], wanted;
    if (++events == kill_at) syscall(SYS_kill, getpid(), SIGKILL);
    wanted = break_kind == ANY || (break_kind == KIND_WRITE && kind == WRITE && !meta) ||
             (break_kind == KIND_SYNC && kind == SYNC) || (break_kind == KIND_META && meta);
    if (!wanted || break_at <= 0) return 0;
    broken_kind_events++;
    if (broken_kind_events < break_at || broken_kind_events >= break_at + break_count) return 0;
    if (break_delay_ms) {
        struct timespec wait = {break_delay_ms / 1000, break_delay_ms % 1000 * 1000000};
        nanosleep(&wait, NULL);
        return 0;
    }
    return 1;
}

/* Say whether a path contains one of the pieces of SRENGINE_TRACK. */
static int is_tracked(const char *path) {
    const char *piece = track, *slash = strrchr(path, '/');
    const char *last = slash ? slash + 1 : path;
    while (*piece) {
        size_t length = strcspn(piece, ":");
        const char *within = memchr(piece, '/', length) ? path : last;
        if (length && memmem(within, strlen(within), piece, length)) return 1;
        piece += length + (piece[length] == ':');
    }
    return 0;
}

static void follow(int fd, const char *path, int flags) {
    uint32_t i;
    uint64_t inode = 0;
    struct { uint64_t words[32]; } status;
    if (!ready) start();
    if (fd < 0 || fd >= DESCRIPTORS || !track || !*track) return;
    followed[fd] = 0;
    if (!is_tracked(path) || (flags & O_ACCMODE) == O_RDONLY || (flags & O_DIRECTORY)) return;
    /* struct stat: device, then inode, on every 64-bit Linux. */
    if (syscall(SYS_newfstatat, fd, "", &status, 0x1000 /* AT_EMPTY_PATH */) == 0) inode = status.words[1];
    pthread_mutex_lock(&lock);
    for (i = 1; i <= files_known; i++)
        if (inodes[i] == inode) break;
    if (i > files_known && files_known + 1 < DESCRIPTORS) inodes[++files_known] = inode;
    followed[fd] = i;
    synchronous[fd] = (flags & O_DSYNC) != 0;
    record(OPEN, fd, 0, strlen(path), 0);
    if (record_fd >= 0) put(path, strlen(path));
    pthread_mutex_unlock(&lock);
}

static int open_any(int directory, const char *path, int flags, mode_t mode) {
    int fd = syscall(SYS_openat, directory, path, flags, mode);
    if (fd >= 0) follow(fd, path, flags);
    return fd;
}

#define WITH_MODE                                                  \
    mode_t mode = 0;                                               \
    if (flags & (O_CREAT | O_TMPFILE)) {                           \
        va_list more;                                              \
        va_start(more, flags);                                     \
        mode = va_arg(more, mode_t);                               \
        va_end(more);                                              \
    }

int open(const char *path, int flags, ...) {
    WITH_MODE
    return open_any(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    WITH_MODE
    return open_any(AT_FDCWD, path, flags | O_LARGEFILE, mode);
}

int openat(int directory, const char *path, int flags, ...) {
    WITH_MODE
    return open_any(directory, path, flags, mode);
}

int openat64(int directory, const char *path, int flags, ...) {
    WITH_MODE
    return open_any(directory, path, flags | O_LARGEFILE, mode);
}

int close(int fd) {
    if (fd >= 0 && fd < DESCRIPTORS) followed[fd] = 0;
    return syscall(SYS_close, fd);
}

static ssize_t write_any(int fd, const struct iovec *parts, int count, off_t offset, int at_offset) {
    ssize_t done;
    size_t total = 0;
    int i, code;
    for (i = 0; i < count; i++) total += parts[i].iov_len;
    if (ready && fd >= 0 && fd == acknowledge_fd) {
        pthread_mutex_lock(&lock);
        record(ACKNOWLEDGE, fd, 0, total, 0);
        record_parts(parts, count, total);
        pthread_mutex_unlock(&lock);
        return syscall(SYS_writev, fd, parts, count);
    }
    if (!is_followed(fd)) {
        if (at_offset) return syscall(SYS_pwritev, fd, parts, count, offset, 0L);
        return syscall(SYS_writev, fd, parts, count);
    }
    pthread_mutex_lock(&lock);
    if (!at_offset) offset = syscall(SYS_lseek, fd, 0, SEEK_CUR);
    if (enter(WRITE, fd)) {
        if (break_errno) {
            done = -1;
            errno = break_errno;
        } else {
            /* A short write, as a disk that fills up makes it. */
            struct iovec half = {parts[0].iov_base, parts[0].iov_len / 2};
            done = syscall(SYS_pwritev, fd, &half, 1, offset, 0L);
        }
    } else if (at_offset) {
        done = syscall(SYS_pwritev, fd, parts, count, offset, 0L);
    } else {
        done = syscall(SYS_writev, fd, parts, count);
    }
    code = errno;
    record(WRITE, fd, offset, done > 0 ? done : 0, done < 0 ? code : 0);
    if (done > 0) record_parts(parts, count, done);
    pthread_mutex_unlock(&lock);
    errno = code;
    return done;
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset) {
    struct iovec part = {(void *)bytes, length};
    return write_any(fd, &part, 1, offset, 1);
}

ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t offset) {
    struct iovec part = {(void *)bytes, length};
    return write_any(fd, &part, 1, offset, 1);
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
    return write_any(fd, parts, count, offset, 1);
}

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset) {
    return write_any(fd, parts, count, offset, 1);
}

ssize_t write(int fd, const void *bytes, size_t length) {
    struct iovec part = {(void *)bytes, length};
    return write_any(fd, &part, 1, 0, 0);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    return write_any(fd, parts, count, 0, 0);
}

static int sync_any(int fd, long call) {
    int done, code;
    if (!is_followed(fd)) return syscall(call, fd);
    pthread_mutex_lock(&lock);
    if (enter(SYNC, fd) && break_errno) {
        done = -1;
        errno = break_errno;
    } else {
        done = syscall(call, fd);
    }
    code = errno;
    record(SYNC, fd, 0, 0, done < 0 ? code : 0);
    pthread_mutex_unlock(&lock);
    errno = code;
    return done;
}

int fsync(int fd) {
    return sync_any(fd, SYS_fsync);
}

int fdatasync(int fd) {
    return sync_any(fd, SYS_fdatasync);
}

static int truncate_any(int fd, off_t length) {
    int done, code;
    if (!is_followed(fd)) return syscall(SYS_ftruncate, fd, length);
    pthread_mutex_lock(&lock);
    if (enter(TRUNCATE, fd) && break_errno) {
        done = -1;
        errno = break_errno;
    } else {
        done = syscall(SYS_ftruncate, fd, length);
    }
    code = errno;
    record(TRUNCATE, fd, length, 0, done < 0 ? code : 0);
    pthread_mutex_unlock(&lock);
    errno = code;
    return done;
}

int ftruncate(int fd, off_t length) {
    return truncate_any(fd, length);
}

int ftruncate64(int fd, off64_t length) {
    return truncate_any(fd, length);
}
