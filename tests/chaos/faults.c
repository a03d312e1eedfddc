/* Preloaded into a process, fails its n-th write under some folders, or kills it in the middle of one.
 *
 * CHAOS_UNDER    folders and files, absolute, with ':' between them; without it nothing is done
 * CHAOS_PROCESS  only in processes whose command line has these words
 * CHAOS_NTH      which call fails, from 1; 0: none
 * CHAOS_FAULT    ENOSPC, EIO, or KILL: the process gets SIGKILL
 * CHAOS_LATER    1: all later calls fail too, as on a full disk
 * CHAOS_REPORT   file that gets a line when a call fails, and the numbers of calls at the end
 *
 * Calls are those that change files: open with O_CREAT, write, pwrite, writev, sendfile,
 * copy_file_range, fsync, fdatasync, rename. A write of more than one byte leaves half of it in the file first.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PLACES = 16, KILL = -1 };

static char *places[PLACES];
static atomic_long counts[PLACES];
static atomic_long total;
static atomic_int half_done;
static int num_places, fault, later;
static long nth;
static const char *report;
static char command[4096];

/* By system calls alone, so that what is said here is not counted. */
static void say(const char *line)
{
    int fd = report ? (int)syscall(SYS_openat, AT_FDCWD, report, O_WRONLY | O_CREAT | O_APPEND, 0666) : -1;
    if (fd < 0)
        return;
    syscall(SYS_write, fd, line, strlen(line));
    syscall(SYS_close, fd);
}

static int is_wanted(void)
{
    const char *words = getenv("CHAOS_PROCESS");
    int fd = (int)syscall(SYS_openat, AT_FDCWD, "/proc/self/cmdline", O_RDONLY, 0);
    long size = fd < 0 ? 0 : syscall(SYS_read, fd, command, sizeof command - 1);
    if (fd >= 0)
        syscall(SYS_close, fd);
    for (long i = 0; i + 1 < size; i++)
        if (command[i] == '\0' || command[i] == '\n')
            command[i] = ' ';
    return !words || strstr(command, words) != NULL;
}

__attribute__((constructor)) static void begin(void)
{
    const char *under = getenv("CHAOS_UNDER"), *name = getenv("CHAOS_FAULT");
    if (!under || !is_wanted())
        return;
    report = getenv("CHAOS_REPORT");
    nth = atol(getenv("CHAOS_NTH") ? getenv("CHAOS_NTH") : "0");
    later = getenv("CHAOS_LATER") && *getenv("CHAOS_LATER") == '1';
    fault = !name ? 0 : !strcmp(name, "KILL") ? KILL : !strcmp(name, "EIO") ? EIO : ENOSPC;
    char *rest = strdup(under), *place;
    while ((place = strsep(&rest, ":")) && num_places < PLACES)
        places[num_places++] = place;
}

__attribute__((destructor)) static void end(void)
{
    char line[sizeof command + PATH_MAX];
    for (int i = 0; i < num_places; i++) {
        snprintf(line, sizeof line, "count\t%s\t%ld\t%s\n", places[i], (long)counts[i], command);
        if (counts[i])
            say(line);
    }
}

/* Count a call on `path`. 0: let it through; 1: it fails; 2: it fails after half of it. */
static int hit(const char *call, const char *path)
{
    for (int i = 0; i < num_places; i++) {
        size_t length = strlen(places[i]);
        if (strncmp(path, places[i], length) || (path[length] && path[length] != '/'))
            continue;
        counts[i]++;
        long number = ++total;
        if (!nth || number < nth)
            return 0;
        if (number == nth) {
            char line[PATH_MAX + 64];
            snprintf(line, sizeof line, "hit\t%s\t%s\n", call, path);
            say(line);
            half_done = 1;
            return 2;
        }
        return later || atomic_exchange(&half_done, 0);
    }
    return 0;
}

/* A call that has no half. */
static int fails(const char *call, const char *path)
{
    if (!hit(call, path))
        return 0;
    half_done = 0;
    if (fault == KILL)
        kill(getpid(), SIGKILL);
    errno = fault;
    return 1;
}

static int under(const char *call, int fd, int (*decide)(const char *, const char *))
{
    char link[64], path[PATH_MAX];
    if (!num_places)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long size = readlink(link, path, sizeof path - 1);
    if (size <= 0)
        return 0;
    path[size] = '\0';
    return decide(call, path);
}

static int named(const char *call, int folder, const char *path)
{
    char link[64], whole[2 * PATH_MAX];
    if (!num_places)
        return 0;
    if (*path == '/')
        return fails(call, path);
    snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    long size = readlink(link, whole, PATH_MAX);
    if (size <= 0)
        return 0;
    snprintf(whole + size, sizeof whole - (size_t)size, "/%s", path);
    return fails(call, whole);
}

/* How much of a write of `size` bytes is done: all, half (then comes the fault), or -1. */
static long allowed(const char *call, int fd, size_t size)
{
    int decided = under(call, fd, hit);
    if (!decided)
        return (long)size;
    if (decided == 2 && size > 1)
        return (long)(size / 2);
    half_done = 0;
    if (fault == KILL)
        kill(getpid(), SIGKILL);
    errno = fault;
    return -1;
}

static ssize_t after(ssize_t done, size_t size, long part)
{
    if (part != (long)size && fault == KILL)
        kill(getpid(), SIGKILL);
    return done;
}

ssize_t write(int fd, const void *content, size_t size)
{
    long part = allowed("write", fd, size);
    return part < 0 ? -1 : after(syscall(SYS_write, fd, content, part), size, part);
}

ssize_t pwrite(int fd, const void *content, size_t size, off_t at)
{
    long part = allowed("pwrite", fd, size);
    return part < 0 ? -1 : after(syscall(SYS_pwrite64, fd, content, part, at), size, part);
}

/* Calls on an open file that have no half. */
#define CALL(type, name, parameters, fd, ...) \
    type name parameters { return under(#name, fd, fails) ? -1 : (type)syscall(SYS_##name, __VA_ARGS__); }
CALL(ssize_t, writev, (int fd, const struct iovec *parts, int count), fd, fd, parts, count)
CALL(ssize_t, sendfile, (int to, int from, off_t *at, size_t size), to, to, from, at, size)
CALL(ssize_t, copy_file_range, (int from, off_t *here, int to, off_t *there, size_t size, unsigned flags), to,
     from, here, to, there, size, flags)
CALL(int, fsync, (int fd), fd, fd)
CALL(int, fdatasync, (int fd), fd, fd)

static int open_at(int folder, const char *path, int flags, mode_t mode)
{
    if ((flags & O_CREAT) && named("open", folder, path))
        return -1;
    return (int)syscall(SYS_openat, folder, path, flags, mode);
}

static mode_t mode_of(int flags, va_list rest)
{
    return (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(rest, mode_t) : 0;
}

int open(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    mode_t mode = mode_of(flags, rest);
    va_end(rest);
    return open_at(AT_FDCWD, path, flags, mode);
}

int openat(int folder, const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    mode_t mode = mode_of(flags, rest);
    va_end(rest);
    return open_at(folder, path, flags, mode);
}

/* The same on x86-64, under the names by which programs call them that ask for large files. */
int open64(const char *path, int flags, ...) __attribute__((alias("open")));
int openat64(int folder, const char *path, int flags, ...) __attribute__((alias("openat")));
ssize_t pwrite64(int fd, const void *content, size_t size, off_t at) __attribute__((alias("pwrite")));
ssize_t sendfile64(int to, int from, off_t *at, size_t size) __attribute__((alias("sendfile")));

int rename(const char *from, const char *to)
{
    return named("rename", AT_FDCWD, to) ? -1 : (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

int renameat(int folder, const char *from, int target, const char *to)
{
    return named("rename", target, to) ? -1 : (int)syscall(SYS_renameat2, folder, from, target, to, 0);
}
