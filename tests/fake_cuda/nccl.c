/* NCCL between the threads of one process, over the fake driver's memory, which is the host's. A
 * collective is done when its call returns. Its behaviour is set by environment variables:
 *
 * FAKE_NCCL_VERSION      what ncclGetVersion says
 * FAKE_NCCL_ASYNC_ERROR  what ncclCommGetAsyncError says of every communicator that is made
 * FAKE_CUDA_LOG          a file that gets a line for each collective, and for each end of a
 * communicator
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
enum { MOST = 8, SUCCESS = 0, INVALID_ARGUMENT = 4, IN_PROGRESS = 7 };
enum { UINT8 = 1, FLOAT32 = 7, BFLOAT16 = 9 };

struct id {
    char bytes[128];
};
struct config {
    size_t size;
    unsigned magic, version;
    int blocking;
};
struct group {
    struct id id;
    int ranks, here, posted, done;
    const void *send[MOST];
    struct group *next;
};
struct comm {
    struct group *group;
    int rank;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct group *groups;

static void note(const char *what, size_t count, const void *stream) {
    const char *path = getenv("FAKE_CUDA_LOG");
    FILE *file = path != NULL ? fopen(path, "a") : NULL;
    if (file != NULL) {
        fprintf(file, "order %d %s %zu %p\n", (int)gettid(), what, count, stream);
        fclose(file);
    }
}

static int setting(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text != NULL ? atoi(text) : otherwise;
}

EXPORT int ncclGetVersion(int *version) {
    *version = setting("FAKE_NCCL_VERSION", 22703);
    return SUCCESS;
}

EXPORT const char *ncclGetErrorString(int result) {
    return result == 6 ? "remote process exited or there was a network error" : "an error";
}

EXPORT const char *ncclGetLastError(void *comm) { return comm != NULL ? "socket closed" : ""; }

EXPORT int ncclGetUniqueId(struct id *id) {
    static int made;
    memset(id, 0, sizeof *id);
    pthread_mutex_lock(&mutex);
    sprintf(id->bytes, "group %d", ++made);
    pthread_mutex_unlock(&mutex);
    return SUCCESS;
}

EXPORT int ncclCommInitRankConfig(struct comm **out, int ranks, struct id id, int rank,
                                  const struct config *config) {
    if (ranks > MOST || rank >= ranks || config->size != sizeof *config ||
        config->magic != 0xcafebeef || config->blocking != 0)
        return INVALID_ARGUMENT;
    pthread_mutex_lock(&mutex);
    struct group *group = groups;
    while (group != NULL && memcmp(&group->id, &id, sizeof id) != 0)
        group = group->next;
    if (group == NULL) {
        group = calloc(1, sizeof *group);
        group->id = id;
        group->ranks = ranks;
        group->next = groups;
        groups = group;
    }
    group->here++;
    pthread_mutex_unlock(&mutex);
    *out = malloc(sizeof **out);
    **out = (struct comm){group, rank};
    return IN_PROGRESS;
}

EXPORT int ncclCommGetAsyncError(const struct comm *comm, int *result) {
    pthread_mutex_lock(&mutex);
    const int made = comm->group->here == comm->group->ranks;
    *result = made ? setting("FAKE_NCCL_ASYNC_ERROR", SUCCESS) : IN_PROGRESS;
    pthread_mutex_unlock(&mutex);
    return SUCCESS;
}

EXPORT int ncclCommCount(const struct comm *comm, int *count) {
    *count = comm->group->ranks;
    return SUCCESS;
}

EXPORT int ncclCommUserRank(const struct comm *comm, int *rank) {
    *rank = comm->rank;
    return SUCCESS;
}

EXPORT int ncclCommFinalize(struct comm *comm) {
    (void)comm;
    return SUCCESS;
}

EXPORT int ncclCommDestroy(struct comm *comm) {
    note("destroy", 0, NULL);
    free(comm);
    return SUCCESS;
}

EXPORT int ncclCommAbort(struct comm *comm) {
    note("abort", 0, NULL);
    free(comm);
    return SUCCESS;
}

/* A rank that has failed leaves the others waiting: not for ever. */
static void pause_for_others(void) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 20;
    if (pthread_cond_timedwait(&changed, &mutex, &until) != 0) {
        fputs("fake NCCL: a rank did not come\n", stderr);
        _exit(3);
    }
}

/* Waits until all ranks have posted what they send. */
static struct group *meet(const struct comm *comm, const void *send) {
    struct group *group = comm->group;
    pthread_mutex_lock(&mutex);
    while (group->done != 0) /* the collective before */
        pause_for_others();
    group->send[comm->rank] = send;
    group->posted++;
    pthread_cond_broadcast(&changed);
    while (group->posted != group->ranks)
        pause_for_others();
    pthread_mutex_unlock(&mutex);
    return group;
}

/* Waits until all ranks have read. */
static void part(struct group *group) {
    pthread_mutex_lock(&mutex);
    if (++group->done == group->ranks)
        group->posted = group->done = 0;
    pthread_cond_broadcast(&changed);
    while (group->done != 0)
        pause_for_others();
    pthread_mutex_unlock(&mutex);
}

static size_t bytes_of(int dtype) { return dtype == FLOAT32 ? 4 : dtype == UINT8 ? 1 : 2; }

static float element(const void *data, int dtype, size_t at) {
    if (dtype == FLOAT32)
        return ((const float *)data)[at];
    const uint32_t bits = (uint32_t)((const uint16_t *)data)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The sum over ranks of `count` elements from `first` on; bf16 is cut, so sums must be exact. */
static void sum(const struct group *group, int dtype, size_t first, size_t count, void *out) {
    for (size_t i = 0; i < count; i++) {
        float total = 0.0f;
        for (int rank = 0; rank < group->ranks; rank++)
            total += element(group->send[rank], dtype, first + i);
        uint32_t bits;
        memcpy(&bits, &total, sizeof bits);
        if (dtype == FLOAT32)
            ((float *)out)[i] = total;
        else
            ((uint16_t *)out)[i] = (uint16_t)(bits >> 16);
    }
}

EXPORT int ncclAllGather(const void *send, void *recv, size_t count, int dtype, struct comm *comm,
                         void *stream) {
    note("ncclAllGather", count, stream);
    struct group *group = meet(comm, send);
    const size_t bytes = count * bytes_of(dtype);
    for (int rank = 0; rank < group->ranks; rank++)
        memmove((char *)recv + rank * bytes, group->send[rank], bytes);
    part(group);
    return SUCCESS;
}

static int reduced(const void *send, void *recv, size_t first, size_t count, int dtype, int op,
                   struct comm *comm) {
    if (op != 0 || (dtype != FLOAT32 && dtype != BFLOAT16))
        return INVALID_ARGUMENT;
    struct group *group = meet(comm, send);
    void *out = malloc(count * bytes_of(dtype) + 1);
    sum(group, dtype, first, count, out);
    part(group);
    memcpy(recv, out, count * bytes_of(dtype));
    free(out);
    return SUCCESS;
}

EXPORT int ncclReduceScatter(const void *send, void *recv, size_t count, int dtype, int op,
                             struct comm *comm, void *stream) {
    note("ncclReduceScatter", count, stream);
    return reduced(send, recv, comm->rank * count, count, dtype, op, comm);
}

EXPORT int ncclAllReduce(const void *send, void *recv, size_t count, int dtype, int op,
                         struct comm *comm, void *stream) {
    note("ncclAllReduce", count, stream);
    return reduced(send, recv, 0, count, dtype, op, comm);
}

/* --- sends and receives, in one group of each thread --- */

struct exchange {
    const void *send[MOST];
    void *recv[MOST];
    size_t bytes[MOST];
    struct comm *comm;
    void *stream;
    int open;
};
static __thread struct exchange exchange;

EXPORT int ncclGroupStart(void) {
    memset(&exchange, 0, sizeof exchange);
    exchange.open = 1;
    return SUCCESS;
}

EXPORT int ncclSend(const void *send, size_t count, int dtype, int peer, struct comm *comm,
                    void *stream) {
    (void)count, (void)dtype;
    if (!exchange.open || peer >= comm->group->ranks)
        return INVALID_ARGUMENT;
    exchange.send[peer] = send;
    exchange.comm = comm;
    exchange.stream = stream;
    return IN_PROGRESS;
}

EXPORT int ncclRecv(void *recv, size_t count, int dtype, int peer, struct comm *comm,
                    void *stream) {
    (void)stream;
    if (!exchange.open || peer >= comm->group->ranks)
        return INVALID_ARGUMENT;
    exchange.recv[peer] = recv;
    exchange.bytes[peer] = count * bytes_of(dtype);
    return IN_PROGRESS;
}

EXPORT int ncclGroupEnd(void) {
    struct comm *comm = exchange.comm;
    if (!exchange.open || comm == NULL)
        return INVALID_ARGUMENT;
    exchange.open = 0;
    note("ncclGroupEnd", exchange.bytes[0], exchange.stream);
    struct group *group = meet(comm, exchange.send);
    for (int peer = 0; peer < group->ranks; peer++) {
        const void *const *sent = group->send[peer];
        memcpy(exchange.recv[peer], sent[comm->rank], exchange.bytes[peer]);
    }
    part(group);
    return IN_PROGRESS;
}
