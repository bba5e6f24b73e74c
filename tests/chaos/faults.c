/* Preloaded into a run: makes the Nth call of one kind on files under a folder fail, or kills the process there.
 *
 * Read from the environment, once, at the first call after CHAOS_SPEC was set (a forked child sets its own):
 *   CHAOS_ROOT=/path   files under it are concerned
 *   CHAOS_SPEC=KIND:NUMBER:COUNT:ERRNO   KIND write, fsync or rename; from the NUMBERth call (1 is the first) COUNT calls fail
 *                                        with ERRNO; ERRNO 0: the process is killed there (SIGKILL), half of a write done
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { WRITE, FSYNC, RENAME };
static const char *names[] = {"write", "fsync", "rename"};
static int kind = -2, number, count, fault, calls;
static char root[PATH_MAX];
static pid_t owner;

static void read_spec(void) {
    if (kind != -2 && owner == getpid()) return;
    owner = getpid();
    kind = -1;
    calls = 0;
    const char *spec = getenv("CHAOS_SPEC"), *where = getenv("CHAOS_ROOT");
    char word[16];
    if (!spec || !where || sscanf(spec, "%15[a-z]:%d:%d:%d", word, &number, &count, &fault) != 4) return;
    strncpy(root, where, sizeof root - 1);
    for (int i = 0; i < 3; i++)
        if (!strcmp(word, names[i])) kind = i;
}

static int due(int which, const char *path) {
    read_spec();
    if (which != kind || strncmp(path, root, strlen(root))) return 0;
    calls++;
    return calls >= number && calls < number + count;
}

static const char *path_of(int descriptor, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, buffer, PATH_MAX - 1);
    buffer[length < 0 ? 0 : length] = 0;
    return buffer;
}

ssize_t write(int descriptor, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    char path[PATH_MAX];
    if (due(WRITE, path_of(descriptor, path))) {
        if (size > 1) real(descriptor, data, size / 2);
        if (!fault) kill(getpid(), SIGKILL);
        errno = fault;
        return -1;
    }
    return real(descriptor, data, size);
}

int fsync(int descriptor) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "fsync");
    char path[PATH_MAX];
    if (due(FSYNC, path_of(descriptor, path))) {
        if (!fault) kill(getpid(), SIGKILL);
        errno = fault;
        return -1;
    }
    return real(descriptor);
}

int rename(const char *from, const char *to) {
    static int (*real)(const char *, const char *);
    if (!real) real = dlsym(RTLD_NEXT, "rename");
    if (due(RENAME, to)) {
        if (!fault) kill(getpid(), SIGKILL);
        errno = fault;
        return -1;
    }
    return real(from, to);
}
