/* A linear and its arrays as most programs need them: on the CPU, of one rank, of fp32 factors and
 * AdamW. C99 and C++17. */

#ifndef FORGE_TESTS_LINEAR_H
#define FORGE_TESTS_LINEAR_H

#include "check.h"

#include <string.h>

static inline forge_context *cpu_context(uint32_t threads) {
    const forge_context_config config = {sizeof config, FORGE_BACKEND_CPU, 0, threads, NULL};
    forge_context *context = NULL;
    OK(forge_context_new(&config, &context));
    return context;
}

/* fp32 everywhere; a program changes what it is about. */
static inline forge_linear_config linear_config(uint64_t out_features, uint64_t in_features) {
    forge_linear_config config;
    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.factor_dtype = FORGE_DTYPE_F32;
    config.out_features = out_features;
    config.in_features = in_features;
    config.rule = "adamw";
    return config;
}

/* Of a communicator of its own, of one rank; the linear keeps what it needs of it. */
static inline forge_linear *solo_linear(forge_context *context, const forge_linear_config *config) {
    forge_comm *comm = NULL;
    forge_linear *linear = NULL;
    OK(forge_comm_new_solo(context, &comm));
    OK(forge_linear_new(context, comm, config, &linear));
    forge_comm_free(comm);
    return linear;
}

/* An array as the layout asks for it, of zeros; one it has no use for stays NULL. */
static inline forge_buffer array_new(const forge_array_layout *layout) {
    forge_buffer buffer = {NULL, 0};
    if (layout->bytes != 0) {
        /* malloc's alignment is enough for the CPU backend; another may ask for more. */
        REQUIRE(layout->alignment <= 16);
        buffer.data = calloc(1, (size_t)layout->bytes);
        buffer.bytes = layout->bytes;
        REQUIRE(buffer.data != NULL);
    }
    return buffer;
}

static inline forge_parameter parameter_new(const forge_linear *linear) {
    forge_layout layout;
    forge_parameter p;
    layout.struct_size = sizeof layout;
    OK(forge_linear_layout(linear, &layout));
    memset(&p, 0, sizeof p);
    p.struct_size = sizeof p;
    p.weight = array_new(&layout.weight);
    p.weight_extra = array_new(&layout.weight_extra);
    for (int k = 0; k < FORGE_MAX_STATES; k++) {
        p.states[k] = array_new(&layout.states[k]);
        p.scales[k] = array_new(&layout.scales[k]);
    }
    return p;
}

static inline void parameter_free(forge_parameter *p) {
    free(p->weight.data);
    free(p->weight_extra.data);
    for (int k = 0; k < FORGE_MAX_STATES; k++) {
        free(p->states[k].data);
        free(p->scales[k].data);
    }
}

static inline int same_bytes(forge_buffer a, forge_buffer b) {
    return a.bytes == b.bytes && (a.bytes == 0 || memcmp(a.data, b.data, (size_t)a.bytes) == 0);
}

static inline int parameters_equal(const forge_parameter *a, const forge_parameter *b) {
    int equal = same_bytes(a->weight, b->weight) && same_bytes(a->weight_extra, b->weight_extra);
    for (int k = 0; k < FORGE_MAX_STATES; k++) {
        equal = equal && same_bytes(a->states[k], b->states[k]) &&
                same_bytes(a->scales[k], b->scales[k]);
    }
    return equal;
}

/* AdamW's scalars at a step: torch's defaults without decay, and neither seed nor scale. */
static inline forge_step adamw_step(uint64_t number, double lr) {
    forge_step step;
    memset(&step, 0, sizeof step);
    step.struct_size = sizeof step;
    step.scalars.step = number;
    step.scalars.grad_scale = 1.0;
    step.scalars.hyper[FORGE_HYPER_LR] = lr;
    step.scalars.hyper[2] = 0.9;
    step.scalars.hyper[3] = 0.999;
    step.scalars.hyper[4] = 1e-8;
    return step;
}

#endif
