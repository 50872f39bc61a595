/* What the C programs of this directory share: calls that must succeed or fail, and random numbers
 * that are the same everywhere. C99 and C++17. */

#ifndef FORGE_TESTS_CHECK_H
#define FORGE_TESTS_CHECK_H

#include "forge.h"
#include "require.h"

#include <stdint.h>
#include <string.h>

/* A call that must succeed; otherwise FORGE's own sentence is the message. */
#define OK(call)                                                                                   \
    do {                                                                                           \
        const uint32_t ok_status_ = (uint32_t)(call);                                              \
        if (ok_status_ != FORGE_OK) {                                                              \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, forge_status_name(ok_status_),  \
                    forge_last_error());                                                           \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

/* A call that must fail so, with these words in its message. */
#define REFUSED(status, words, call)                                                               \
    do {                                                                                           \
        REQUIRE((call) == (status));                                                               \
        if (strstr(forge_last_error(), (words)) == NULL) {                                         \
            fprintf(stderr, "%s:%d: '%s' is not in: %s\n", __FILE__, __LINE__, (words),            \
                    forge_last_error());                                                           \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

/* Uniform in [-1, 1): the upper bits of a 64-bit linear congruential generator (Knuth's MMIX). */
static inline float uniform(uint64_t *state) {
    *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (float)(*state >> 40) / 8388608.0f - 1.0f;
}

static inline void fill_uniform(float *out, size_t n, float scale, uint64_t *state) {
    for (size_t i = 0; i < n; i++) {
        out[i] = scale * uniform(state);
    }
}

#endif
