/* One linear with its arrays and factors, for the programs that are about where work is done and
 * not about what it computes: a step is a whole backward with the AdamW update, q8 states and
 * stochastic rounding, over enough tiles that several threads have work. */

#ifndef FORGE_TESTS_SMALL_NET_H
#define FORGE_TESTS_SMALL_NET_H

#include "linear.h"

enum { NET_OUT = 160, NET_IN = 260, NET_TOKENS = 24, NET_BLOCKS = (NET_IN + 127) / 128 };

typedef struct {
    uint16_t weight[NET_OUT * NET_IN];
    uint8_t moments[2][NET_OUT * NET_IN];
    float scales[2][NET_BLOCKS * NET_OUT];
    float dy[NET_TOKENS * NET_OUT], x[NET_TOKENS * NET_IN], dx[NET_TOKENS * NET_IN];
    forge_report report;
} net;

static inline forge_linear *net_linear(forge_context *context) {
    forge_linear_config config = linear_config(NET_OUT, NET_IN);
    config.weight_format = FORGE_WEIGHT_BF16;
    config.weight_rounding = FORGE_ROUNDING_STOCHASTIC;
    config.state_formats[0] = FORGE_STATE_Q8;
    config.state_formats[1] = FORGE_STATE_Q8;
    config.parameter_id = 7;
    return solo_linear(context, &config);
}

static inline void net_init(net *n, uint64_t seed) {
    memset(n, 0, sizeof *n);
    fill_uniform(n->dy, NET_TOKENS * NET_OUT, 0.1f, &seed);
    fill_uniform(n->x, NET_TOKENS * NET_IN, 1.0f, &seed);
    for (int i = 0; i < NET_OUT * NET_IN; i++) {
        n->weight[i] = (uint16_t)(0x3c00 + i % 256); /* bf16 about 0.01 */
    }
}

static inline void net_buffer(forge_buffer *buffer, void *data, size_t bytes) {
    buffer->data = data;
    buffer->bytes = bytes;
}

/* The status of one step, for who expects another than success. */
static inline uint32_t net_try_step(net *n, forge_linear *linear, int number) {
    forge_parameter parameter;
    forge_step step = adamw_step((uint64_t)number, 0.01);
    forge_backward backward;
    memset(&parameter, 0, sizeof parameter);
    parameter.struct_size = sizeof parameter;
    net_buffer(&parameter.weight, n->weight, sizeof n->weight);
    for (int k = 0; k < 2; k++) {
        net_buffer(&parameter.states[k], n->moments[k], sizeof n->moments[k]);
        net_buffer(&parameter.scales[k], n->scales[k], sizeof n->scales[k]);
    }
    step.scalars.seed = 11;
    memset(&backward, 0, sizeof backward);
    backward.struct_size = sizeof backward;
    backward.mode = FORGE_BACKWARD_UPDATE;
    backward.tokens = NET_TOKENS;
    backward.dy.data = n->dy;
    backward.dy.bytes = sizeof n->dy;
    backward.x.data = n->x;
    backward.x.bytes = sizeof n->x;
    net_buffer(&backward.dx, n->dx, sizeof n->dx);
    backward.parameter = &parameter;
    backward.step = &step;
    n->report.struct_size = sizeof n->report;
    return (uint32_t)forge_linear_backward(linear, &backward, &n->report, NULL);
}

static inline void net_step(net *n, forge_linear *linear, int number) {
    OK(net_try_step(n, linear, number));
    REQUIRE(n->report.nonfinite_tiles == 0 && n->report.sum_of_squares > 0.0);
}

/* The same bits in all that a step writes; how many tiles there were depends on the threads. */
static inline int net_equal(const net *a, const net *b) {
    return memcmp(a->weight, b->weight, sizeof a->weight) == 0 &&
           memcmp(a->moments, b->moments, sizeof a->moments) == 0 &&
           memcmp(a->scales, b->scales, sizeof a->scales) == 0 &&
           memcmp(a->dx, b->dx, sizeof a->dx) == 0;
}

#endif
