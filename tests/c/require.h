/* A check that names its place, for programs that may not know the library by its names, too. C99
 * and C++17. */

#ifndef FORGE_TESTS_REQUIRE_H
#define FORGE_TESTS_REQUIRE_H

#include <stdio.h>
#include <stdlib.h>

/* assert() would vanish with NDEBUG; a test must not. */
#define REQUIRE(condition)                                                                         \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);              \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

#endif
