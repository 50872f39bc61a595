/* The example of docs/c-api.md: fits one linear layer to a known one, with the global norm clipped.
 *
 * Forward and loss are the program's own plain loops; everything about the gradient is FORGE's. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "forge.h"

enum { TOKENS = 48, IN = 20, OUT = 12, STEPS = 60 };

static void check(forge_status status, const char *what) {
    if (status != FORGE_OK) {
        fprintf(stderr, "%s: %s: %s\n", what, forge_status_name(status), forge_last_error());
        exit(1);
    }
}

static float uniform(void) { return (float)rand() / (float)RAND_MAX - 0.5f; }

/* FORGE allocates no tensor: the sizes come from forge_linear_layout, the memory from here. */
static forge_buffer allocate(const forge_array_layout *layout) {
    forge_buffer buffer = {NULL, layout->bytes};
    if (layout->bytes != 0 && (buffer.data = calloc(1, layout->bytes)) == NULL)
        exit(1);
    return buffer;
}

/* Y = X W^T, dY = 2 (Y - target) / elements; returns the mean squared error. */
static double loss_and_gradient(const float *x, const float *w, const float *target, float *dy) {
    double loss = 0.0;
    for (int t = 0; t < TOKENS; t++)
        for (int o = 0; o < OUT; o++) {
            float y = 0.0f;
            for (int i = 0; i < IN; i++)
                y += x[t * IN + i] * w[o * IN + i];
            float difference = y - target[t * OUT + o];
            loss += (double)difference * difference / (TOKENS * OUT);
            dy[t * OUT + o] = 2.0f * difference / (TOKENS * OUT);
        }
    return loss;
}

int main(void) {
    if (forge_abi_version() != FORGE_ABI_VERSION)
        return 1;

    /* 1. Once: a context (threads), a communicator (here: alone), a linear. */
    forge_context_config context_config = {sizeof context_config, FORGE_BACKEND_CPU, 0, 2, NULL};
    forge_context *context = NULL;
    check(forge_context_new(&context_config, &context), "forge_context_new");
    forge_comm *comm = NULL;
    check(forge_comm_new_solo(context, &comm), "forge_comm_new_solo");
    forge_linear_config config = {0};
    config.struct_size = sizeof config;
    config.factor_dtype = FORGE_DTYPE_F32;
    config.out_features = OUT;
    config.in_features = IN;
    config.weight_format = FORGE_WEIGHT_F32;
    config.rule = "adamw"; /* state_formats: FORGE_STATE_F32, which is 0 */
    forge_linear *linear = NULL;
    check(forge_linear_new(context, comm, &config, &linear), "forge_linear_new");

    /* 2. Once: the memory. States must start as zeros. */
    forge_layout layout = {0};
    layout.struct_size = sizeof layout;
    check(forge_linear_layout(linear, &layout), "forge_linear_layout");
    forge_parameter parameter = {0};
    parameter.struct_size = sizeof parameter;
    parameter.weight = allocate(&layout.weight);
    parameter.weight_extra = allocate(&layout.weight_extra);
    for (int k = 0; k < FORGE_MAX_STATES; k++) {
        parameter.states[k] = allocate(&layout.states[k]);
        parameter.scales[k] = allocate(&layout.scales[k]);
    }

    /* 3. Once: hyper-parameters by name; each rule says which it has. */
    forge_rule_info rule = {0};
    rule.struct_size = sizeof rule;
    check(forge_rule_find("adamw", 0, &rule), "forge_rule_find");
    forge_step step = {0};
    step.struct_size = sizeof step;
    step.scalars.seed = 1;
    for (uint32_t i = 0; i < rule.n_hyper; i++)
        step.scalars.hyper[i] = rule.hyper_defaults[i];
    step.scalars.hyper[FORGE_HYPER_LR] = 0.03;

    static float x[TOKENS * IN], dy[TOKENS * OUT], dx[TOKENS * IN];
    static float truth[OUT * IN], target[TOKENS * OUT];
    for (int i = 0; i < TOKENS * IN; i++)
        x[i] = uniform();
    for (int i = 0; i < OUT * IN; i++)
        truth[i] = uniform();
    loss_and_gradient(x, truth, target, dy); /* target is zero: dY is Y up to a factor */
    for (int i = 0; i < TOKENS * OUT; i++)
        target[i] = dy[i] * (TOKENS * OUT) / 2.0f;

    double first = 0.0, last = 0.0;
    for (int s = 1; s <= STEPS; s++) {
        last = loss_and_gradient(x, parameter.weight.data, target, dy);
        if (s == 1)
            first = last;

        /* 4. The backward: dX now; dW later, from the factors (the schedule `deferred`). */
        forge_backward backward = {0};
        backward.struct_size = sizeof backward;
        backward.mode = FORGE_BACKWARD_KEEP;
        backward.tokens = TOKENS;
        backward.dy = (forge_const_buffer){dy, sizeof dy};
        backward.x = (forge_const_buffer){x, sizeof x};
        backward.dx = (forge_buffer){dx, sizeof dx};
        backward.parameter = &parameter;
        check(forge_linear_backward(linear, &backward, NULL, NULL), "forge_linear_backward");

        /* 5. The global norm without a gradient. Several layers: add up their sums of squares. */
        forge_segment segment = {backward.dy, backward.x, TOKENS, 0, 0};
        forge_norm norm = {0};
        norm.struct_size = sizeof norm;
        forge_const_buffer none = {NULL, 0};
        check(forge_linear_norm(linear, &segment, 1, none, FORGE_NORM_AUTO, &norm, NULL),
              "forge_linear_norm");
        if (norm.nonfinite)
            continue; /* skip the whole step; nothing has changed */
        double length = 0.0;
        check(forge_clip_coefficient(norm.sum_of_squares, 1.0, 0.1, &length,
                                     &step.scalars.grad_scale),
              "forge_clip_coefficient");

        /* 6. The fused update. */
        step.scalars.step++;
        forge_update update = {0};
        update.struct_size = sizeof update;
        update.n_segments = 1;
        update.segments = &segment;
        update.parameter = &parameter;
        update.step = &step;
        check(forge_linear_update(linear, &update, NULL, NULL), "forge_linear_update");
        if (s % 20 == 0)
            printf("step %d: loss %.6f, gradient norm %.6f\n", s, last, length);
    }

    /* 7. Any order: objects keep what they need of each other. */
    forge_context_free(context);
    forge_comm_free(comm);
    forge_linear_free(linear);
    free(parameter.weight.data);
    free(parameter.weight_extra.data);
    for (int k = 0; k < FORGE_MAX_STATES; k++) {
        free(parameter.states[k].data);
        free(parameter.scales[k].data);
    }
    printf("loss %.6f -> %.6f\n", first, last);
    return last < 0.01 * first ? 0 : 1;
}
