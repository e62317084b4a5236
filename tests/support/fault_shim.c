/* A preloaded library that lets one change of the files below a folder fail, or ends the process there.
 *
 * Changes are counted from fault_arm() on: files created or opened for writing, writes, syncs, renames, links, removals,
 * folders, modes and lengths. Each is noted in a file, and the one whose number was asked for meets the fault.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum fault { NONE, KILL, TORN, ENOSPC_ONCE, FULL, EIO_ONCE, DEAD, STOP, TERM, LOST_SYNC };
enum kind { OTHER = 0, TAKES_SPACE = 1, WRITES = 2, SYNCS = 4 };

static char folder[PATH_MAX];
static size_t folder_length;
static int armed, note_to = -1;
static long count, wanted;
static enum fault fault;

#define NEXT(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

/* Counts from here on what happens below `below`, an absolute path without links; `at` is 1 for the first change. */
void fault_arm(const char *below, long at, int which, int log) {
    snprintf(folder, sizeof folder, "%s", below);
    folder_length = strlen(folder);
    count = 0, wanted = at, fault = which, note_to = log, armed = 1;
}

static int is_below(const char *path) {
    return !strncmp(path, folder, folder_length) && (path[folder_length] == '/' || !path[folder_length]);
}

/* Whether `path`, as given with the descriptor of a folder, lies below `folder`; writes the whole of it to `out`. */
static int resolve(int at, const char *path, char *out, size_t size) {
    char base[PATH_MAX] = "", link[64];
    if (path[0] == '/') {
        snprintf(out, size, "%s", path);
    } else {
        ssize_t length = -1;
        if (at == AT_FDCWD) {
            if (getcwd(base, sizeof base)) length = (ssize_t)strlen(base);
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", at);
            length = readlink(link, base, sizeof base - 1);
        }
        if (length < 0) return 0;
        base[length] = 0;
        if (*path) snprintf(out, size, "%s/%s", base, path);
        else snprintf(out, size, "%s", base);
    }
    return is_below(out);
}

/* The errno that this change meets, -1 if only half of it is written before the end, 0 if nothing happens to it. */
static int meet(const char *what, int kind, int at, const char *path) {
    char where[2 * PATH_MAX], line[2 * PATH_MAX + 64];
    if (!armed || !resolve(at, path, where, sizeof where)) return 0;
    count++;
    int length = snprintf(line, sizeof line, "%s %s\n", what, where + folder_length);
    armed = 0;
    if (note_to >= 0 && NEXT(write)(note_to, line, (size_t)length) != length) abort();
    armed = 1;
    if (fault == LOST_SYNC) return kind & SYNCS ? -1 : 0;
    if (count < wanted || !wanted) return 0;
    if (fault == FULL) return kind & TAKES_SPACE ? ENOSPC : 0;
    if (fault == DEAD) return EIO;
    if (count > wanted) return 0;
    if (fault == KILL) kill(getpid(), SIGKILL);
    if (fault == TORN) {
        if (kind & WRITES) return -1;
        kill(getpid(), SIGKILL);
    }
    if (fault == STOP) kill(getpid(), SIGSTOP);
    if (fault == TERM) kill(getpid(), SIGTERM);
    return fault == ENOSPC_ONCE ? ENOSPC : fault == EIO_ONCE ? EIO : 0;
}

static int refused(int code) {
    errno = code;
    return -1;
}

#define MEET(what, kind, at, path)                            \
    do {                                                      \
        int code = meet(what, kind, at, path);                \
        if (code > 0) return refused(code);                   \
    } while (0)

static int creates(int flags) { return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE; }

#define OPEN(name)                                                                      \
    int name(const char *path, int flags, ...) {                                        \
        va_list more;                                                                   \
        va_start(more, flags);                                                          \
        mode_t mode = creates(flags) ? va_arg(more, mode_t) : 0;                        \
        va_end(more);                                                                   \
        if (creates(flags) || flags & O_TRUNC) MEET("open", TAKES_SPACE, AT_FDCWD, path);                  \
        return NEXT(name)(path, flags, mode);                                           \
    }
#define OPENAT(name)                                                                    \
    int name(int at, const char *path, int flags, ...) {                                \
        va_list more;                                                                   \
        va_start(more, flags);                                                          \
        mode_t mode = creates(flags) ? va_arg(more, mode_t) : 0;                        \
        va_end(more);                                                                   \
        if (creates(flags) || flags & O_TRUNC) MEET("open", TAKES_SPACE, at, path);                        \
        return NEXT(name)(at, path, flags, mode);                                       \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

/* Writes half, then ends the process: what a kill in the middle of a long write leaves. */
#define WRITE(what, result, call, half)                                                 \
    do {                                                                                \
        int code = meet(what, TAKES_SPACE | WRITES, file, "");                          \
        if (code > 0) return refused(code);                                             \
        if (code < 0) {                                                                 \
            (void)!(half);                                                              \
            kill(getpid(), SIGKILL);                                                    \
        }                                                                               \
        return call;                                                                    \
    } while (0)

ssize_t write(int file, const void *data, size_t size) {
    WRITE("write", ssize_t, NEXT(write)(file, data, size), NEXT(write)(file, data, size / 2));
}
ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
    WRITE("write", ssize_t, NEXT(pwrite)(file, data, size, at), NEXT(pwrite)(file, data, size / 2, at));
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    WRITE("write", ssize_t, NEXT(pwrite64)(file, data, size, at), NEXT(pwrite64)(file, data, size / 2, at));
}
ssize_t writev(int file, const struct iovec *parts, int number) {
    WRITE("write", ssize_t, NEXT(writev)(file, parts, number), NEXT(writev)(file, parts, number / 2));
}
ssize_t sendfile(int file, int from, off_t *at, size_t size) {
    WRITE("write", ssize_t, NEXT(sendfile)(file, from, at, size), NEXT(sendfile)(file, from, at, size / 2));
}
ssize_t sendfile64(int file, int from, off64_t *at, size_t size) {
    WRITE("write", ssize_t, NEXT(sendfile64)(file, from, at, size), NEXT(sendfile64)(file, from, at, size / 2));
}
ssize_t copy_file_range(int from, off64_t *at, int file, off64_t *to, size_t size, unsigned flags) {
    WRITE("write", ssize_t, NEXT(copy_file_range)(from, at, file, to, size, flags),
          NEXT(copy_file_range)(from, at, file, to, size / 2, flags));
}

#define SYNC(name)                                                                      \
    int name(int file) {                                                                \
        int code = meet(#name, TAKES_SPACE | SYNCS, file, "");                          \
        return code > 0 ? refused(code) : code < 0 && fault == LOST_SYNC ? 0 : NEXT(name)(file); \
    }
SYNC(fsync)
SYNC(fdatasync)

int rename(const char *from, const char *to) {
    MEET("rename", OTHER, AT_FDCWD, to);
    return NEXT(rename)(from, to);
}
int renameat(int from_at, const char *from, int to_at, const char *to) {
    MEET("rename", OTHER, to_at, to);
    return NEXT(renameat)(from_at, from, to_at, to);
}
int unlink(const char *path) {
    MEET("unlink", OTHER, AT_FDCWD, path);
    return NEXT(unlink)(path);
}
int unlinkat(int at, const char *path, int flags) {
    MEET(flags & AT_REMOVEDIR ? "rmdir" : "unlink", OTHER, at, path);
    return NEXT(unlinkat)(at, path, flags);
}
int rmdir(const char *path) {
    MEET("rmdir", OTHER, AT_FDCWD, path);
    return NEXT(rmdir)(path);
}
int mkdir(const char *path, mode_t mode) {
    MEET("mkdir", TAKES_SPACE, AT_FDCWD, path);
    return NEXT(mkdir)(path, mode);
}
int mkdirat(int at, const char *path, mode_t mode) {
    MEET("mkdir", TAKES_SPACE, at, path);
    return NEXT(mkdirat)(at, path, mode);
}
int symlink(const char *target, const char *path) {
    MEET("symlink", TAKES_SPACE, AT_FDCWD, path);
    return NEXT(symlink)(target, path);
}
int symlinkat(const char *target, int at, const char *path) {
    MEET("symlink", TAKES_SPACE, at, path);
    return NEXT(symlinkat)(target, at, path);
}
int link(const char *target, const char *path) {
    MEET("link", TAKES_SPACE, AT_FDCWD, path);
    return NEXT(link)(target, path);
}
int linkat(int from_at, const char *target, int at, const char *path, int flags) {
    MEET("link", TAKES_SPACE, at, path);
    return NEXT(linkat)(from_at, target, at, path, flags);
}
int chmod(const char *path, mode_t mode) {
    MEET("chmod", OTHER, AT_FDCWD, path);
    return NEXT(chmod)(path, mode);
}
int fchmod(int file, mode_t mode) {
    MEET("chmod", OTHER, file, "");
    return NEXT(fchmod)(file, mode);
}
int fchmodat(int at, const char *path, mode_t mode, int flags) {
    MEET("chmod", OTHER, at, path);
    return NEXT(fchmodat)(at, path, mode, flags);
}
int ftruncate(int file, off_t size) {
    MEET("truncate", TAKES_SPACE, file, "");
    return NEXT(ftruncate)(file, size);
}
int ftruncate64(int file, off64_t size) {
    MEET("truncate", TAKES_SPACE, file, "");
    return NEXT(ftruncate64)(file, size);
}
int truncate(const char *path, off_t size) {
    MEET("truncate", TAKES_SPACE, AT_FDCWD, path);
    return NEXT(truncate)(path, size);
}
int truncate64(const char *path, off64_t size) {
    MEET("truncate", TAKES_SPACE, AT_FDCWD, path);
    return NEXT(truncate64)(path, size);
}
int posix_fallocate64(int file, off64_t at, off64_t size) { /* returns the errno itself */
    int code = meet("allocate", TAKES_SPACE, file, "");
    return code > 0 ? code : NEXT(posix_fallocate64)(file, at, size);
}
