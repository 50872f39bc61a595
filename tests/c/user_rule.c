/* A rule of the caller's own from C: defined, found, refused where it is wrong, and applied, with
 * its hyper-parameters, its state and what it does after one step and after two computed by hand.
 */
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "forge.h"

enum { TOKENS = 2, IN = 3, OUT = 2 };

/* Heavy-ball momentum: m = beta m + g; w -= lr m. `user` counts the calls. */
static int32_t heavy_ball(void *user, const forge_rule_tile *tile) {
    const float lr = (float)tile->hyper[0], beta = (float)tile->hyper[2];
    ++*(int *)user;
    for (uint64_t i = 0; i < tile->count; i++) {
        tile->states[0][i] = beta * tile->states[0][i] + tile->g[i];
        tile->w[i] -= lr * tile->states[0][i];
    }
    return tile->step > 2 ? 7 : 0;
}

static int calls;

static forge_rule_definition definition(void) {
    forge_rule_definition d;
    memset(&d, 0, sizeof d);
    d.struct_size = sizeof d;
    d.name = "heavy_ball";
    d.n_states = 1;
    d.state_names[0] = "m";
    d.state_kinds[0] = FORGE_STATE_SIGNED;
    d.n_hyper = 3;
    d.hyper_names[0] = "lr";
    d.hyper_names[1] = "weight_decay";
    d.hyper_names[2] = "beta";
    for (int i = 0; i < 3; i++)
        d.hyper_most[i] = 1.0;
    d.hyper_defaults[2] = 0.5;
    d.cuda_source = "m = beta * m + g; w -= lr * m;";
    d.cpu_function = heavy_ball;
    d.cpu_user = &calls;
    return d;
}

static void refusals(void) {
    forge_rule_definition d = definition();
    REFUSED(FORGE_ERROR_NULL, "definition", forge_rule_register(NULL));
    d.struct_size = 8;
    REFUSED(FORGE_ERROR_STRUCT_SIZE, "struct_size is 8", forge_rule_register(&d));
    d = definition();
    d.name = NULL;
    REFUSED(FORGE_ERROR_NULL, "name: NULL", forge_rule_register(&d));
    d = definition();
    d.hyper_names[2] = NULL;
    REFUSED(FORGE_ERROR_NULL, "hyper_names[2]: NULL", forge_rule_register(&d));
    d = definition();
    d.n_states = 4;
    REFUSED(FORGE_ERROR_RULE, "n_states: 4; a rule has at most 3", forge_rule_register(&d));
    d = definition();
    d.n_hyper = 1u << 31;
    REFUSED(FORGE_ERROR_RULE, "n_hyper: 2147483648", forge_rule_register(&d));
    d = definition();
    d.state_kinds[0] = 2;
    REFUSED(FORGE_ERROR_ENUM, "state_kinds[0]: 2", forge_rule_register(&d));
    d = definition();
    d.reserved = 1;
    REFUSED(FORGE_ERROR_UNSUPPORTED, "reserved", forge_rule_register(&d));
    d = definition();
    d.cuda_source = "m = g; for (;;) w -= m;";
    REFUSED(FORGE_ERROR_RULE, "a loop needs a bound", forge_rule_register(&d));
    d = definition();
    d.cuda_source = "m = \xff; w -= m;";
    REFUSED(FORGE_ERROR_RULE, "cuda_source: not UTF-8", forge_rule_register(&d));
    forge_rule_info info = {0};
    info.struct_size = sizeof info;
    REFUSED(FORGE_ERROR_RULE, "no rule is named 'heavy_ball'",
            forge_rule_find("heavy_ball", 0, &info));
}

int main(void) {
    refusals();
    const uint32_t built_in = forge_rule_count();
    forge_rule_definition d = definition();
    OK(forge_rule_register(&d));
    OK(forge_rule_register(&d)); /* the same again */
    REQUIRE(forge_rule_count() == built_in + 1);
    d.hyper_most[2] = 2.0;
    REFUSED(FORGE_ERROR_RULE, "choose another name", forge_rule_register(&d));

    forge_rule_info info = {0};
    info.struct_size = sizeof info;
    OK(forge_rule_get(built_in, &info));
    REQUIRE(strcmp(info.name, "heavy_ball") == 0 && strcmp(info.state_names[0], "m") == 0);
    REQUIRE(info.n_hyper == 3 && info.hyper_defaults[2] == 0.5);

    forge_context_config context_config = {sizeof context_config, FORGE_BACKEND_CPU, 0, 1, NULL};
    forge_context *context = NULL;
    OK(forge_context_new(&context_config, &context));
    forge_comm *comm = NULL;
    OK(forge_comm_new_solo(context, &comm));
    forge_linear_config config = {0};
    config.struct_size = sizeof config;
    config.factor_dtype = FORGE_DTYPE_F32;
    config.out_features = OUT;
    config.in_features = IN;
    config.rule = "heavy_ball";
    forge_linear *linear = NULL;
    OK(forge_linear_new(context, comm, &config, &linear));

    /* dW is all ones times 2: dY of ones, X of ones, two tokens. */
    float w[OUT * IN] = {0}, m[OUT * IN] = {0}, x[TOKENS * IN], dy[TOKENS * OUT];
    for (int i = 0; i < TOKENS * IN; i++)
        x[i] = 1.0f;
    for (int i = 0; i < TOKENS * OUT; i++)
        dy[i] = 1.0f;
    forge_parameter parameter = {0};
    parameter.struct_size = sizeof parameter;
    parameter.weight = (forge_buffer){w, sizeof w};
    parameter.states[0] = (forge_buffer){m, sizeof m};
    const forge_segment segment = {{dy, sizeof dy}, {x, sizeof x}, TOKENS, 0, 0};
    forge_update update = {0};
    update.struct_size = sizeof update;
    update.segments = &segment;
    update.n_segments = 1;
    update.parameter = &parameter;
    forge_step step_of = {0};
    step_of.struct_size = sizeof step_of;
    update.step = &step_of;
    step_of.scalars.grad_scale = 0.5;
    step_of.scalars.hyper[0] = 0.25;
    step_of.scalars.hyper[2] = 0.5;
    for (uint64_t step = 1; step <= 2; step++) {
        step_of.scalars.step = step;
        OK(forge_linear_update(linear, &update, NULL, NULL));
        for (int i = 0; i < OUT * IN; i++) {
            REQUIRE(m[i] == (step == 1 ? 1.0f : 1.5f));
            REQUIRE(w[i] == (step == 1 ? -0.25f : -0.625f));
        }
    }
    REQUIRE(calls == 2);
    step_of.scalars.hyper[2] = 1.5;
    REFUSED(FORGE_ERROR_SCALAR, "beta: 1.5", forge_linear_update(linear, &update, NULL, NULL));
    step_of.scalars.hyper[2] = 0.5;
    step_of.scalars.step = 3;
    REFUSED(FORGE_ERROR_RULE_FUNCTION, "returned 7",
            forge_linear_update(linear, &update, NULL, NULL));
    REQUIRE(w[0] == -0.625f && m[0] == 1.5f);

    forge_linear_free(linear);
    forge_comm_free(comm);
    forge_context_free(context);
    puts("user_rule: ok");
    return 0;
}
