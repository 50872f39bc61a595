/* Threads: two contexts on two threads, one context on two threads, and one linear that two threads
 * share. All must end with the bits of the same work done by one thread; and when a context is
 * freed its threads have ended. POSIX threads. */

#define _POSIX_C_SOURCE 200809L

#include "small_net.h"

#include <dirent.h>
#include <pthread.h>

enum { WORKERS = 2, ROUNDS = 40 };

typedef struct {
    forge_linear *linear; /* shared, or this thread's own */
    forge_context *context;
    net net;
    unsigned refused;
} worker;

/* Every round is also a wrong call: errors are a thread's own. */
static void *work(void *argument) {
    worker *w = argument;
    for (int step = 1; step <= ROUNDS; step++) {
        net_step(&w->net, w->linear, step);
        const uint32_t status =
            (uint32_t)forge_linear_check_step(w->linear, (const forge_step *)NULL);
        REQUIRE(status == FORGE_ERROR_NULL);
        REQUIRE(strstr(forge_last_error(), "step") != NULL);
        w->refused++;
    }
    return NULL;
}

static void *make_work_and_free(void *argument) {
    worker *w = argument;
    for (int round = 0; round < 8; round++) {
        forge_context *context = cpu_context(1 + (uint32_t)round % 3);
        forge_linear *linear = net_linear(context);
        /* Destroyed in the middle: the linear keeps what it needs. */
        forge_context_free(context);
        net_init(&w->net, 1);
        for (int step = 1; step <= 5; step++) {
            net_step(&w->net, linear, step);
        }
        forge_linear_free(linear);
    }
    return NULL;
}

static void run(worker *workers, void *(*body)(void *)) {
    pthread_t threads[WORKERS];
    for (int i = 0; i < WORKERS; i++) {
        REQUIRE(pthread_create(&threads[i], NULL, body, &workers[i]) == 0);
    }
    for (int i = 0; i < WORKERS; i++) {
        REQUIRE(pthread_join(threads[i], NULL) == 0);
    }
}

/* Threads of this process; 0 where the system does not say. */
static int threads_alive(void) {
    DIR *tasks = opendir("/proc/self/task");
    int count = 0;
    if (tasks == NULL) {
        return 0;
    }
    while (readdir(tasks) != NULL) {
        count++;
    }
    closedir(tasks);
    return count - 2;
}

int main(void) {
    static net expected;
    static worker workers[WORKERS];
    const int before = threads_alive();

    /* One thread, a context without threads of its own. */
    forge_context *context = cpu_context(1);
    forge_linear *linear = net_linear(context);
    net_init(&expected, 1);
    for (int step = 1; step <= ROUNDS; step++) {
        net_step(&expected, linear, step);
    }
    forge_linear_free(linear);
    forge_context_free(context);

    /* Two contexts on two threads. */
    for (int i = 0; i < WORKERS; i++) {
        workers[i].context = cpu_context(2);
        workers[i].linear = net_linear(workers[i].context);
        net_init(&workers[i].net, 1);
    }
    run(workers, work);
    for (int i = 0; i < WORKERS; i++) {
        REQUIRE(net_equal(&workers[i].net, &expected) && workers[i].refused == ROUNDS);
        forge_linear_free(workers[i].linear);
        forge_context_free(workers[i].context);
    }

    /* One context on two threads, whose linears are their own. */
    context = cpu_context(3);
    for (int i = 0; i < WORKERS; i++) {
        workers[i].linear = net_linear(context);
        net_init(&workers[i].net, 1);
    }
    run(workers, work);
    for (int i = 0; i < WORKERS; i++) {
        REQUIRE(net_equal(&workers[i].net, &expected));
        forge_linear_free(workers[i].linear);
    }

    /* One linear on two threads, which write arrays of their own. The context is freed before. */
    linear = net_linear(context);
    forge_context_free(context);
    for (int i = 0; i < WORKERS; i++) {
        workers[i].linear = linear;
        net_init(&workers[i].net, 1);
    }
    run(workers, work);
    for (int i = 0; i < WORKERS; i++) {
        REQUIRE(net_equal(&workers[i].net, &expected));
    }
    forge_linear_free(linear);

    /* Objects made and freed on both threads at once. */
    run(workers, make_work_and_free);
    REQUIRE(net_equal(&workers[0].net, &workers[1].net));
    REQUIRE(!net_equal(&workers[0].net, &expected)); /* after 5 steps, not 40 */

    /* No thread of a context outlives its last object. */
    REQUIRE(threads_alive() == before);
    printf("threads: the same bits by %d threads and by one\n", WORKERS);
    return 0;
}
