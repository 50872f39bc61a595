/* `fork` after the library was used, with a context that has threads: the child goes on with the
 * inherited objects, and so does its own child; none of them hangs, also when the fork comes while
 * other threads are inside the library. */

#define _POSIX_C_SOURCE 200809L

#include "small_net.h"

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BEFORE = 3, AFTER = 6, FORKS_UNDER_WAY = 30, SECONDS = 60 };

static net parent, expected;

/* Waits for a child; a hang becomes SIGALRM there, which is no exit. */
static void require_success(pid_t child) {
    int status = 0;
    REQUIRE(child > 0);
    REQUIRE(waitpid(child, &status, 0) == child);
    REQUIRE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void steps(net *n, forge_linear *linear, int first, int last) {
    for (int step = first; step <= last; step++) {
        net_step(n, linear, step);
    }
}

static int stop;
static pthread_mutex_t stop_lock = PTHREAD_MUTEX_INITIALIZER;

static int stopped(void) {
    pthread_mutex_lock(&stop_lock);
    const int result = stop;
    pthread_mutex_unlock(&stop_lock);
    return result;
}

static void *keep_busy(void *argument) {
    static net own;
    net_init(&own, 2);
    for (int step = 1; !stopped(); step++) {
        net_step(&own, argument, step);
        /* Fails, and is logged. */
        REQUIRE(forge_linear_check_step(argument, NULL) == FORGE_ERROR_NULL);
    }
    return NULL;
}

static void on_line(void *user, uint32_t level, const char *target, const char *message) {
    (void)user;
    (void)level;
    REQUIRE(strlen(target) > 0 && strlen(message) > 0);
}

int main(void) {
    forge_context *context = cpu_context(3);
    forge_linear *linear = net_linear(context);
    pthread_t busy;

    net_init(&expected, 1);
    steps(&expected, linear, 1, AFTER);
    net_init(&parent, 1);
    steps(&parent, linear, 1, BEFORE);

    /* The inherited linear goes on where it was, and so does a child of the child. */
    pid_t child = fork();
    if (child == 0) {
        alarm(SECONDS);
        steps(&parent, linear, BEFORE + 1, AFTER - 1);
        const pid_t grandchild = fork();
        if (grandchild == 0) {
            alarm(SECONDS);
            steps(&parent, linear, AFTER, AFTER);
            REQUIRE(net_equal(&parent, &expected));
            _exit(0);
        }
        require_success(grandchild);
        steps(&parent, linear, AFTER, AFTER);
        REQUIRE(net_equal(&parent, &expected));
        /* New objects as well, and all of them can be freed. */
        forge_context *own = cpu_context(2);
        forge_linear *second = net_linear(own);
        net_init(&parent, 1);
        steps(&parent, second, 1, AFTER);
        REQUIRE(net_equal(&parent, &expected));
        forge_linear_free(second);
        forge_context_free(own);
        forge_context_free(context);
        forge_linear_free(linear);
        _exit(0);
    }
    require_success(child);

    /* A child that does nothing but end, and free what it never used. */
    child = fork();
    if (child == 0) {
        alarm(SECONDS);
        forge_linear_free(linear);
        forge_context_free(context);
        _exit(0);
    }
    require_success(child);

    /* The parent's own threads are as they were. */
    steps(&parent, linear, BEFORE + 1, AFTER);
    REQUIRE(net_equal(&parent, &expected));

    /* Forks while another thread computes and logs. */
    OK(forge_set_log_callback(on_line, NULL, 5));
    REQUIRE(pthread_create(&busy, NULL, keep_busy, linear) == 0);
    for (int i = 0; i < FORKS_UNDER_WAY; i++) {
        child = fork();
        if (child == 0) {
            alarm(SECONDS);
            REQUIRE(forge_linear_check_step(linear, NULL) == FORGE_ERROR_NULL);
            OK(forge_set_log_callback(i % 2 == 0 ? on_line : NULL, NULL, 5));
            net_init(&parent, 1);
            steps(&parent, linear, 1, AFTER);
            REQUIRE(net_equal(&parent, &expected));
            forge_linear_free(linear);
            forge_context_free(context);
            _exit(0);
        }
        require_success(child);
    }
    pthread_mutex_lock(&stop_lock);
    stop = 1;
    pthread_mutex_unlock(&stop_lock);
    REQUIRE(pthread_join(busy, NULL) == 0);
    OK(forge_set_log_callback(NULL, NULL, 0));
    forge_linear_free(linear);
    forge_context_free(context);
    printf("fork: children and theirs have the parent's bits\n");
    return 0;
}
