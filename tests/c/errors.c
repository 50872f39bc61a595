/* One deliberately wrong call for each status that a caller can cause. Each must give that status,
 * name the argument in forge_last_error(), and leave every buffer as it was. */

#include "linear.h"

#include <math.h>

enum { TOKENS = 2, OUT = 4, IN = 3, SIZE = OUT * IN };

/* Everything that a call could write, in one place, so that one memcmp sees any change. */
static struct {
    float weight[SIZE], m[SIZE], v[SIZE];
    float dy[TOKENS * OUT], x[TOKENS * IN], dx[TOKENS * IN], dbias[OUT];
    float accumulator[SIZE], fp32[SIZE];
    double norm, coefficient;
    forge_report report;
    forge_norm norm_out;
    forge_layout layout;
    forge_rule_info rule;
    forge_warm_report warm;
    uint64_t workspace_bytes;
    forge_context *context;
    forge_comm *comm;
    forge_linear *linear;
} memory, before;

static int failures = 0;

static void check(const char *file, int line, const char *call, uint32_t got, uint32_t wanted,
                  const char *argument) {
    if (got != wanted) {
        fprintf(stderr, "%s:%d: %s gave %s, not %s\n", file, line, call, forge_status_name(got),
                forge_status_name(wanted));
        failures++;
    }
    if (strstr(forge_last_error(), argument) == NULL) {
        fprintf(stderr, "%s:%d: the message does not name '%s': %s\n", file, line, argument,
                forge_last_error());
        failures++;
    }
    if (memcmp(&memory, &before, sizeof memory) != 0) {
        fprintf(stderr, "%s:%d: %s changed a buffer\n", file, line, call);
        failures++;
    }
    printf("%-28s %s\n", forge_status_name(got), forge_last_error());
}

#define EXPECT(status, argument, call)                                                             \
    do {                                                                                           \
        memcpy(&before, &memory, sizeof memory);                                                   \
        const uint32_t status_ = (call);                                                           \
        check(__FILE__, __LINE__, #call, status_, (status), (argument));                           \
    } while (0)

/* Collectives of which none works. */
static int32_t no_gather(void *user, const void *send, void *recv, uint64_t count, uint32_t dtype) {
    (void)user, (void)send, (void)recv, (void)count, (void)dtype;
    return 3;
}

static int32_t no_reduce(void *user, void *buffer, uint64_t count, uint32_t dtype) {
    (void)user, (void)buffer, (void)count, (void)dtype;
    return 3;
}

static forge_host_collectives collectives(void) {
    forge_host_collectives c;
    memset(&c, 0, sizeof c);
    c.struct_size = sizeof c;
    c.all_gather = no_gather;
    c.reduce_scatter = no_gather;
    c.all_reduce = no_reduce;
    return c;
}

static forge_parameter parameter(void) {
    forge_parameter p;
    memset(&p, 0, sizeof p);
    p.struct_size = sizeof p;
    p.weight.data = memory.weight;
    p.states[0].data = memory.m;
    p.states[1].data = memory.v;
    p.weight.bytes = p.states[0].bytes = p.states[1].bytes = sizeof memory.weight;
    return p;
}

static forge_backward backward(const forge_parameter *p, const forge_step *s) {
    forge_backward b;
    memset(&b, 0, sizeof b);
    b.struct_size = sizeof b;
    b.mode = FORGE_BACKWARD_UPDATE;
    b.tokens = TOKENS;
    b.dy.data = memory.dy;
    b.dy.bytes = sizeof memory.dy;
    b.x.data = memory.x;
    b.x.bytes = sizeof memory.x;
    b.dx.data = memory.dx;
    b.dx.bytes = sizeof memory.dx;
    b.dbias.data = memory.dbias;
    b.dbias.bytes = sizeof memory.dbias;
    b.parameter = p;
    b.step = s;
    return b;
}

static void creation(void) {
    forge_context_config context_config = {sizeof context_config, FORGE_BACKEND_CUDA, 0, 1, NULL};
    forge_linear_config c;
    forge_host_collectives host;

    EXPECT(FORGE_ERROR_NULL, "out_context", forge_context_new(&context_config, NULL));
    EXPECT(FORGE_ERROR_NULL, "config", forge_context_new(NULL, &memory.context));
    EXPECT(FORGE_ERROR_NO_BACKEND, "backend", forge_context_new(&context_config, &memory.context));
    context_config.backend = 77;
    EXPECT(FORGE_ERROR_ENUM, "backend", forge_context_new(&context_config, &memory.context));
    context_config.backend = FORGE_BACKEND_CPU;
    context_config.device = 1;
    EXPECT(FORGE_ERROR_SHAPE, "device", forge_context_new(&context_config, &memory.context));
    context_config.device = 0;
    context_config.struct_size = 12;
    EXPECT(FORGE_ERROR_STRUCT_SIZE, "config", forge_context_new(&context_config, &memory.context));
    context_config.struct_size = sizeof context_config;
    OK(forge_context_new(&context_config, &memory.context));

    host = collectives();
    EXPECT(FORGE_ERROR_RANK, "rank",
           forge_comm_new_host(memory.context, 2, 2, &host, &memory.comm));
    EXPECT(FORGE_ERROR_RANK, "size",
           forge_comm_new_host(memory.context, 0, 0, &host, &memory.comm));
    host.all_reduce = NULL;
    EXPECT(FORGE_ERROR_NULL, "all_reduce",
           forge_comm_new_host(memory.context, 0, 2, &host, &memory.comm));
    host = collectives();
    OK(forge_comm_new_host(memory.context, 0, 2, &host, &memory.comm));

    c = linear_config(OUT, IN);
    c.rule = "shampoo";
    EXPECT(FORGE_ERROR_RULE, "rule",
           forge_linear_new(memory.context, memory.comm, &c, &memory.linear));
    c = linear_config(OUT, IN);
    c.rule_flags = FORGE_RULE_NESTEROV;
    EXPECT(FORGE_ERROR_RULE, "rule_flags",
           forge_linear_new(memory.context, memory.comm, &c, &memory.linear));
    c = linear_config(OUT, IN);
    c.state_formats[1] = 9;
    EXPECT(FORGE_ERROR_ENUM, "state_formats[1]",
           forge_linear_new(memory.context, memory.comm, &c, &memory.linear));
    c = linear_config(OUT, IN);
    c.fp32_products = 2;
    EXPECT(FORGE_ERROR_ENUM, "fp32_products",
           forge_linear_new(memory.context, memory.comm, &c, &memory.linear));
    c.fp32_products = FORGE_FP32_BF16X3;
    c.factor_dtype = FORGE_DTYPE_F16;
    EXPECT(FORGE_ERROR_UNSUPPORTED, "fp32_products",
           forge_linear_new(memory.context, memory.comm, &c, &memory.linear));
    c = linear_config(OUT, IN);
    c.sequence_parallel = 1;
    EXPECT(FORGE_ERROR_UNSUPPORTED, "sequence_parallel",
           forge_linear_new(memory.context, memory.comm, &c, &memory.linear));
    c = linear_config(OUT, IN);
    c.parallel = FORGE_PARALLEL_ROW;
    EXPECT(FORGE_ERROR_SHARD, "in_features",
           forge_linear_new(memory.context, memory.comm, &c, &memory.linear));
    c = linear_config(OUT, IN);
    c.in_features = 0;
    EXPECT(FORGE_ERROR_SHAPE, "in_features",
           forge_linear_new(memory.context, memory.comm, &c, &memory.linear));
    c.in_features = UINT64_MAX / 2;
    EXPECT(FORGE_ERROR_OVERFLOW, "in_features",
           forge_linear_new(memory.context, memory.comm, &c, &memory.linear));
    c = linear_config(OUT, IN);
    OK(forge_linear_new(memory.context, memory.comm, &c, &memory.linear));

    memory.layout.struct_size = 8;
    EXPECT(FORGE_ERROR_STRUCT_SIZE, "out", forge_linear_layout(memory.linear, &memory.layout));
    memory.rule.struct_size = sizeof memory.rule;
    EXPECT(FORGE_ERROR_RULE, "index", forge_rule_get(forge_rule_count(), &memory.rule));
    EXPECT(FORGE_ERROR_OVERFLOW, "tokens",
           forge_linear_workspace(memory.linear, FORGE_BACKWARD_UPDATE, UINT64_MAX,
                                  &memory.workspace_bytes));
    EXPECT(FORGE_ERROR_ENUM, "max_level", forge_set_log_callback(NULL, NULL, 6));
    EXPECT(FORGE_ERROR_SCALAR, "grad_scale",
           forge_clip_coefficient(1.0, NAN, 1.0, &memory.norm, &memory.coefficient));
}

/* What cannot be compiled ahead of time. Nothing is: no call gets as far as a compiler. */
static void warming(void) {
    forge_linear_config linear = linear_config(OUT, IN);
    forge_warm_config c;
    memset(&c, 0, sizeof c);
    c.struct_size = sizeof c;
    c.linear = &linear;
    memory.warm.struct_size = sizeof memory.warm;
    EXPECT(FORGE_ERROR_NULL, "config.architecture", forge_warm(&c, &memory.warm));
    c.architecture = "sm_70";
    EXPECT(FORGE_ERROR_UNSUPPORTED, "'sm_70'", forge_warm(&c, &memory.warm));
    EXPECT(FORGE_ERROR_UNSUPPORTED, "config.architecture",
           forge_context_warm(memory.context, &c, &memory.warm));
    c.architecture = NULL;
    c.sm_count = 1;
    EXPECT(FORGE_ERROR_UNSUPPORTED, "config.sm_count",
           forge_context_warm(memory.context, &c, &memory.warm));
    c.device_scalars = 2;
    EXPECT(FORGE_ERROR_ENUM, "device_scalars", forge_warm(&c, &memory.warm));
    c.device_scalars = 0;
    c.ranks = 1u << 20;
    EXPECT(FORGE_ERROR_RANK, "config.ranks", forge_warm(&c, &memory.warm));
    c.linear = NULL;
    EXPECT(FORGE_ERROR_NULL, "config.linear", forge_warm(&c, &memory.warm));
    memory.warm.struct_size = 8;
    EXPECT(FORGE_ERROR_STRUCT_SIZE, "out", forge_warm(&c, &memory.warm));
}

static void calls(void) {
    forge_linear *const linear = memory.linear;
    forge_report *const report = &memory.report;
    forge_parameter p = parameter();
    forge_step s = adamw_step(1, 0.1);
    forge_backward b = backward(&p, &s);
    const forge_const_buffer none = {NULL, 0};
    forge_segment segment;
    int on_the_stack = 0;

    memory.report.struct_size = sizeof memory.report;
    memory.norm_out.struct_size = sizeof memory.norm_out;
    OK(forge_linear_backward(linear, &b, report, NULL));

    EXPECT(FORGE_ERROR_NULL, "linear", forge_linear_backward(NULL, &b, report, NULL));
    EXPECT(FORGE_ERROR_STREAM, "stream", forge_linear_backward(linear, &b, report, &on_the_stack));
    b.parameter = NULL;
    EXPECT(FORGE_ERROR_NULL, "parameter", forge_linear_backward(linear, &b, report, NULL));
    b = backward(&p, &s);
    b.x.data = (const char *)memory.x + 1;
    EXPECT(FORGE_ERROR_MISALIGNED, "x:", forge_linear_backward(linear, &b, report, NULL));
    b = backward(&p, &s);
    b.dy.bytes -= 1;
    EXPECT(FORGE_ERROR_BUFFER_SIZE, "dy", forge_linear_backward(linear, &b, report, NULL));
    b = backward(&p, &s);
    b.dx.bytes += 4;
    EXPECT(FORGE_ERROR_BUFFER_SIZE, "dx", forge_linear_backward(linear, &b, report, NULL));
    b = backward(&p, &s);
    b.tokens = UINT64_C(1) << 62;
    EXPECT(FORGE_ERROR_OVERFLOW, "tokens", forge_linear_backward(linear, &b, report, NULL));
    b = backward(&p, &s);
    b.x_stride = IN - 1;
    EXPECT(FORGE_ERROR_SHAPE, "x_stride", forge_linear_backward(linear, &b, report, NULL));
    b = backward(&p, &s);
    b.mode = 3;
    EXPECT(FORGE_ERROR_ENUM, "mode", forge_linear_backward(linear, &b, report, NULL));
    b = backward(&p, &s);
    b.struct_size = sizeof b - 4;
    EXPECT(FORGE_ERROR_STRUCT_SIZE, "backward", forge_linear_backward(linear, &b, report, NULL));
    b = backward(&p, &s);
    b.dx.data = memory.x; /* in place */
    EXPECT(FORGE_ERROR_OVERLAP, "dx", forge_linear_backward(linear, &b, report, NULL));
    b = backward(&p, &s);
    b.mode = FORGE_BACKWARD_ACCUMULATE;
    EXPECT(FORGE_ERROR_NULL, "accumulator", forge_linear_backward(linear, &b, report, NULL));

    b = backward(&p, &s);
    s.scalars.hyper[FORGE_HYPER_LR] = NAN;
    EXPECT(FORGE_ERROR_SCALAR, "lr", forge_linear_backward(linear, &b, report, NULL));
    s = adamw_step(1, 0.1);
    s.scalars.grad_scale = INFINITY;
    EXPECT(FORGE_ERROR_SCALAR, "grad_scale", forge_linear_backward(linear, &b, report, NULL));
    s = adamw_step(1, 0.1);
    s.scalars.step = 0;
    EXPECT(FORGE_ERROR_SCALAR, "step", forge_linear_backward(linear, &b, report, NULL));
    EXPECT(FORGE_ERROR_SCALAR, "step", forge_linear_check_step(linear, &s));
    s = adamw_step(1, 0.1);
    OK(forge_linear_check_step(linear, &s));
    p.weight_extra.data = memory.fp32;
    p.weight_extra.bytes = sizeof memory.fp32;
    EXPECT(FORGE_ERROR_UNSUPPORTED, "weight_extra",
           forge_linear_backward(linear, &b, report, NULL));
    p = parameter();
    p.states[1].data = NULL;
    EXPECT(FORGE_ERROR_NULL, "states[1]", forge_linear_backward(linear, &b, report, NULL));
    p = parameter();

    memset(&segment, 0, sizeof segment);
    segment.tokens = TOKENS;
    segment.dy = b.dy;
    EXPECT(FORGE_ERROR_NULL, "segments[0].x",
           forge_linear_norm(linear, &segment, 1, none, FORGE_NORM_AUTO, &memory.norm_out, NULL));
    segment.x = b.x;
    EXPECT(FORGE_ERROR_ENUM, "method",
           forge_linear_norm(linear, &segment, 1, none, 3, &memory.norm_out, NULL));
    const forge_buffer fp32 = {memory.fp32, sizeof memory.fp32};
    EXPECT(FORGE_ERROR_STATE_INDEX, "index", forge_linear_export_state(linear, &p, 2, fp32, NULL));
    EXPECT(FORGE_ERROR_STREAM, "stream", forge_linear_export_weight(linear, &p, fp32, &segment));
    EXPECT(FORGE_ERROR_NULL, "device_out",
           forge_linear_norm_async(linear, &segment, 1, none, FORGE_NORM_AUTO, NULL, NULL));
    b.device_report = (forge_report *)p.weight.data;
    EXPECT(FORGE_ERROR_OVERLAP, "device_report", forge_linear_backward(linear, &b, report, NULL));
    b.device_report = (forge_report *)((char *)&memory.norm_out + 1);
    EXPECT(FORGE_ERROR_MISALIGNED, "device_report",
           forge_linear_backward(linear, &b, report, NULL));
    b.device_report = NULL;
    b.device_norm = (forge_norm *)p.weight.data;
    EXPECT(FORGE_ERROR_OVERLAP, "device_norm", forge_linear_backward(linear, &b, report, NULL));
    b.device_norm = (forge_norm *)((char *)&memory.norm_out + 1);
    EXPECT(FORGE_ERROR_MISALIGNED, "device_norm", forge_linear_backward(linear, &b, report, NULL));
    EXPECT(FORGE_ERROR_NULL, "out_bytes", forge_context_workspace_bytes(memory.context, NULL));
    EXPECT(FORGE_ERROR_NULL, "context",
           forge_context_workspace_bytes(NULL, &memory.workspace_bytes));
    EXPECT(FORGE_ERROR_NULL, "context", forge_context_set_workspace(NULL, fp32));
}

static void a_failing_collective(void) {
    forge_linear *linear = NULL;
    forge_linear_config c = linear_config(OUT, IN);
    forge_parameter p = parameter();
    forge_step s = adamw_step(1, 0.1);
    forge_backward b = backward(&p, &s);
    /* dX [2, 3] of this rank's 2 of 4 rows is summed over the ranks, and that fails. */
    c.parallel = FORGE_PARALLEL_COLUMN;
    c.reduce_dgrad = 1;
    OK(forge_linear_new(memory.context, memory.comm, &c, &linear));
    p.weight.bytes = p.states[0].bytes = p.states[1].bytes = sizeof memory.weight / 2;
    b.dy.bytes = sizeof memory.dy / 2;
    b.dbias.data = NULL;
    memcpy(&before, &memory, sizeof memory);
    const uint32_t status = forge_linear_backward(linear, &b, &memory.report, NULL);
    /* Outside the 1xx band outputs may have been written; the parameter was not. */
    memcpy(before.dx, memory.dx, sizeof before.dx);
    check(__FILE__, __LINE__, "forge_linear_backward", status, FORGE_ERROR_COLLECTIVE,
          "all_reduce");

    /* What a shard's tokens cannot be: shared out unevenly. */
    forge_linear_free(linear);
    c.sequence_parallel = 1;
    OK(forge_linear_new(memory.context, memory.comm, &c, &linear));
    EXPECT(FORGE_ERROR_SHARD, "tokens",
           forge_linear_workspace(linear, FORGE_BACKWARD_UPDATE, 3, &memory.workspace_bytes));
    b = backward(&p, &s);
    b.x_stride = IN + 1;
    EXPECT(FORGE_ERROR_UNSUPPORTED, "x_stride",
           forge_linear_backward(linear, &b, &memory.report, NULL));
    b = backward(&p, &s);
    b.dx.bytes = b.x.bytes = sizeof memory.x / 2;
    b.dbias.bytes = sizeof memory.dbias / 2;
    EXPECT(FORGE_ERROR_BUFFER_SIZE, "workspace",
           forge_linear_backward(linear, &b, &memory.report, NULL));
    forge_linear_free(linear);
}

int main(void) {
    uint64_t seed = 5;
    fill_uniform(memory.weight, SIZE, 1.0f, &seed);
    fill_uniform(memory.dy, TOKENS * OUT, 1.0f, &seed);
    fill_uniform(memory.x, TOKENS * IN, 1.0f, &seed);
    creation();
    warming();
    calls();
    a_failing_collective();
    forge_linear_free(memory.linear);
    forge_comm_free(memory.comm);
    forge_context_free(memory.context);
    return failures == 0 ? 0 : 1;
}
