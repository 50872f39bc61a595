/* The shared library through dlopen: used, closed, opened again. It stays in place when it is
 * closed (it is linked with -z nodelete), so that neither threads that still run nor what threads
 * do at their end can find its code gone. The library's path is the argument. */

#define _POSIX_C_SOURCE 200809L

/* Not check.h: that calls the library by name, and here it has none until it is opened. */
#include "forge.h"
#include "require.h"

#include <dlfcn.h>
#include <pthread.h>
#include <string.h>

typedef struct {
    void *handle;
    forge_status (*context_new)(const forge_context_config *, forge_context **);
    void (*context_free)(forge_context *);
    forge_status (*context_workspace_bytes)(const forge_context *, uint64_t *);
    const char *(*last_error)(void);
} library;

/* ISO C has no conversion from an object's pointer to a function's; POSIX promises this one. */
static void find(void *handle, const char *name, void *function) {
    void *symbol = dlsym(handle, name);
    REQUIRE(symbol != NULL);
    memcpy(function, &symbol, sizeof symbol);
}

static library open_library(const char *path) {
    library l;
    l.handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (l.handle == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    find(l.handle, "forge_context_new", &l.context_new);
    find(l.handle, "forge_context_free", &l.context_free);
    find(l.handle, "forge_context_workspace_bytes", &l.context_workspace_bytes);
    find(l.handle, "forge_last_error", &l.last_error);
    return l;
}

/* A context with threads of its own, and an error, which is a value of this thread. */
static forge_context *use(const library *l) {
    const forge_context_config config = {sizeof config, FORGE_BACKEND_CPU, 0, 3, NULL};
    forge_context *context = NULL;
    REQUIRE(l->context_new(&config, &context) == FORGE_OK);
    REQUIRE(l->context_workspace_bytes(context, NULL) == FORGE_ERROR_NULL);
    REQUIRE(strstr(l->last_error(), "out_bytes") != NULL);
    return context;
}

static pthread_barrier_t closed;

/* A thread that has used the library and ends after it was closed. */
static void *end_later(void *argument) {
    const library *l = argument;
    l->context_free(use(l));
    pthread_barrier_wait(&closed);
    pthread_barrier_wait(&closed);
    return NULL;
}

int main(int count, char **arguments) {
    REQUIRE(count == 2);
    const char *path = arguments[1];
    for (int round = 0; round < 5; round++) {
        library l = open_library(path);
        pthread_t thread;
        REQUIRE(pthread_barrier_init(&closed, NULL, 2) == 0);
        REQUIRE(pthread_create(&thread, NULL, end_later, &l) == 0);
        pthread_barrier_wait(&closed);
        /* Closed while this context's threads wait for work. */
        forge_context *context = use(&l);
        REQUIRE(dlclose(l.handle) == 0);
        pthread_barrier_wait(&closed);
        REQUIRE(pthread_join(thread, NULL) == 0);
        REQUIRE(pthread_barrier_destroy(&closed) == 0);

        /* Opened again it is the same library, which knows its objects. */
        library again = open_library(path);
        REQUIRE(again.context_new == l.context_new);
        uint64_t bytes = 1;
        REQUIRE(again.context_workspace_bytes(context, &bytes) == FORGE_OK && bytes == 0);
        again.context_free(context);
        again.context_free(use(&again));
        REQUIRE(dlclose(again.handle) == 0);
    }
    /* Still there. */
    REQUIRE(dlopen(path, RTLD_NOW | RTLD_NOLOAD) != NULL);
    printf("unload: closed and opened 10 times\n");
    return 0;
}
