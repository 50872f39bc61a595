/* `fork` after the library was used, with a context that has threads: the child goes on with the
 * inherited objects, and so does its own child; none of them hangs, also when the fork comes while
 * another thread is inside the library: computes and logs, or registers rules. */

#define _POSIX_C_SOURCE 200809L

#include "small_net.h"

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BEFORE = 3, AFTER = 6, RULES = 2000, SECONDS = 60 };

static net parent, expected;
static forge_context *context;
static forge_linear *linear;

/* Waits for a child; a hang becomes SIGALRM there, which is no exit. */
static void require_success(pid_t child) {
    int status = 0;
    REQUIRE(child > 0);
    REQUIRE(waitpid(child, &status, 0) == child);
    REQUIRE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void steps(net *n, forge_linear *with, int first, int last) {
    for (int step = first; step <= last; step++) {
        net_step(n, with, step);
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

/* Forks while another thread is busy; each child does its work, which is told its number, and ends.
 */
static void fork_while(void *(*busy)(void *), int forks, void (*work)(int)) {
    pthread_t thread;
    stop = 0;
    REQUIRE(pthread_create(&thread, NULL, busy, NULL) == 0);
    for (int i = 0; i < forks; i++) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(SECONDS);
            work(i);
            _exit(0);
        }
        require_success(child);
    }
    pthread_mutex_lock(&stop_lock);
    stop = 1;
    pthread_mutex_unlock(&stop_lock);
    REQUIRE(pthread_join(thread, NULL) == 0);
}

static void *compute_and_log(void *argument) {
    static net own;
    (void)argument;
    net_init(&own, 2);
    for (int step = 1; !stopped(); step++) {
        net_step(&own, linear, step);
        /* Fails, and is logged. */
        REQUIRE(forge_linear_check_step(linear, NULL) == FORGE_ERROR_NULL);
    }
    return NULL;
}

static void on_line(void *user, uint32_t level, const char *target, const char *message) {
    (void)user;
    (void)level;
    REQUIRE(strlen(target) > 0 && strlen(message) > 0);
}

static void log_compute_and_free(int number) {
    REQUIRE(forge_linear_check_step(linear, NULL) == FORGE_ERROR_NULL);
    OK(forge_set_log_callback(number % 2 == 0 ? on_line : NULL, NULL, 5));
    net_init(&parent, 1);
    steps(&parent, linear, 1, AFTER);
    REQUIRE(net_equal(&parent, &expected));
    forge_linear_free(linear);
    forge_context_free(context);
}

static int32_t no_change(void *user, const forge_rule_tile *tile) {
    (void)user;
    (void)tile;
    return 0;
}

static void register_rule(int number) {
    char name[32];
    forge_rule_definition d;
    snprintf(name, sizeof name, "rule_%d", number);
    memset(&d, 0, sizeof d);
    d.struct_size = sizeof d;
    d.name = name;
    d.n_hyper = 2;
    d.hyper_names[0] = "lr";
    d.hyper_names[1] = "weight_decay";
    d.hyper_most[0] = d.hyper_most[1] = 1.0;
    d.cpu_function = no_change;
    OK(forge_rule_register(&d));
}

static void *register_rules(void *argument) {
    (void)argument;
    for (int number = 0; !stopped(); number = (number + 1) % RULES) {
        register_rule(number);
    }
    return NULL;
}

/* One that is there, and one that only this process will have. */
static void find_and_register(int number) {
    forge_rule_info rule;
    rule.struct_size = sizeof rule;
    OK(forge_rule_find("rule_0", 0, &rule));
    register_rule(0);
    const uint32_t before = forge_rule_count();
    register_rule(RULES + number);
    REQUIRE(forge_rule_count() == before + 1);
    REQUIRE(forge_rule_get(before, &rule) == FORGE_OK && strncmp(rule.name, "rule_", 5) == 0);
}

int main(void) {
    context = cpu_context(3);
    linear = net_linear(context);
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

    OK(forge_set_log_callback(on_line, NULL, 5));
    fork_while(compute_and_log, 30, log_compute_and_free);
    OK(forge_set_log_callback(NULL, NULL, 0));

    const uint32_t built_in = forge_rule_count();
    register_rule(0);
    fork_while(register_rules, 100, find_and_register);
    REQUIRE(forge_rule_count() <= built_in + RULES);

    forge_linear_free(linear);
    forge_context_free(context);
    printf("fork: children and theirs have the parent's bits\n");
    return 0;
}
