/* The header against the library: versions, struct sizes, and what rules there are. */

#include "check.h"

#include <string.h>

/* On a 64-bit machine, ABI 1 has these sizes for ever: a change of one needs a new
 * FORGE_ABI_VERSION or an appended field and a longer struct_size. */
#define HAS_SIZE(type, bytes) REQUIRE(sizeof(type) == (bytes))

static void check_sizes(void) {
    HAS_SIZE(forge_status, 4);
    HAS_SIZE(forge_buffer, 16);
    HAS_SIZE(forge_const_buffer, 16);
    HAS_SIZE(forge_context_config, 24);
    HAS_SIZE(forge_host_collectives, 56);
    HAS_SIZE(forge_nccl_config, 144);
    HAS_SIZE(forge_linear_config, 80);
    HAS_SIZE(forge_array_layout, 32);
    HAS_SIZE(forge_layout, 56 + 9 * 32);
    HAS_SIZE(forge_parameter, 8 + 8 * 16);
    HAS_SIZE(forge_step_scalars, 24 + 16 * 8);
    HAS_SIZE(forge_step, 8 + 152 + 8);
    HAS_SIZE(forge_backward, 16 + 2 * 16 + 2 * 8 + 4 * 16 + 4 * 8);
    HAS_SIZE(forge_report, 32);
    HAS_SIZE(forge_segment, 56);
    HAS_SIZE(forge_update, 16 + 16 + 3 * 8);
    HAS_SIZE(forge_norm, 24);
    HAS_SIZE(forge_plan_request, 24);
    HAS_SIZE(forge_plan, 48 + 256);
    HAS_SIZE(forge_rule_info, 24 + 3 * 8 + 16 * 8 + 16 * 8);
}

/* The library was built with the same sizes: it takes this size and no other. */
static void check_the_library_agrees(forge_linear *linear) {
    forge_layout layout;
    forge_plan_request request;
    forge_plan plan;
    memset(&request, 0, sizeof request);
    request.struct_size = sizeof request;
    request.tokens_per_micro_batch = 4;
    request.micro_batches = 2;
    plan.struct_size = sizeof plan;
    OK(forge_linear_plan(linear, &request, &plan));
    printf("plan: schedule %u, %s\n", (unsigned)plan.schedule, plan.reason);
    REQUIRE(plan.gradient_bytes == 4 * 7 * 5 && strlen(plan.reason) > 0);
    plan.struct_size = sizeof plan - 8;
    REQUIRE(forge_linear_plan(linear, &request, &plan) == FORGE_ERROR_STRUCT_SIZE);

    layout.struct_size = sizeof layout;
    OK(forge_linear_layout(linear, &layout));
    REQUIRE(layout.struct_size == sizeof layout && layout.out_local == 7 && layout.in_local == 5);
    layout.struct_size = sizeof layout + 8;
    REQUIRE(forge_linear_layout(linear, &layout) == FORGE_ERROR_STRUCT_SIZE);
    REQUIRE(strstr(forge_last_error(), "struct_size") != NULL);
}

static void list_rules(void) {
    int adamw_was_listed = 0;
    REQUIRE(forge_rule_count() >= 4);
    for (uint32_t i = 0; i < forge_rule_count(); i++) {
        forge_rule_info rule, found;
        rule.struct_size = sizeof rule;
        found.struct_size = sizeof found;
        OK(forge_rule_get(i, &rule));
        REQUIRE(rule.n_states <= FORGE_MAX_STATES && rule.n_hyper <= FORGE_MAX_HYPER);
        REQUIRE(strcmp(rule.hyper_names[FORGE_HYPER_LR], "lr") == 0);
        REQUIRE(strcmp(rule.hyper_names[FORGE_HYPER_WEIGHT_DECAY], "weight_decay") == 0);
        printf("%-6s flags %u, states:", rule.name, (unsigned)rule.allowed_flags);
        for (uint32_t k = 0; k < rule.n_states; k++) {
            printf(" %s", rule.state_names[k]);
        }
        printf("; hyper:");
        for (uint32_t k = 0; k < rule.n_hyper; k++) {
            printf(" %s=%g", rule.hyper_names[k], rule.hyper_defaults[k]);
        }
        printf("\n");
        OK(forge_rule_find(rule.name, 0, &found));
        REQUIRE(strcmp(found.name, rule.name) == 0 && found.n_states <= rule.n_states);
        adamw_was_listed |= strcmp(rule.name, "adamw") == 0;
    }
    REQUIRE(adamw_was_listed);
}

int main(void) {
    forge_context_config config = {sizeof config, FORGE_BACKEND_CPU, 0, 1, NULL};
    forge_linear_config linear_config;
    forge_context *context = NULL;
    forge_comm *comm = NULL;
    forge_linear *linear = NULL;

    printf("forge %s, ABI %u\n", forge_version(), (unsigned)forge_abi_version());
    REQUIRE(forge_abi_version() == FORGE_ABI_VERSION);
    REQUIRE(strchr(forge_version(), '.') != NULL);
    REQUIRE(strcmp(forge_status_name(FORGE_ERROR_SHARD), "FORGE_ERROR_SHARD") == 0);
    REQUIRE(strcmp(forge_status_name(12345), "FORGE_UNKNOWN_STATUS") == 0);
    REQUIRE(strcmp(forge_last_error(), "") == 0);
    check_sizes();
    list_rules();

    OK(forge_context_new(&config, &context));
    OK(forge_comm_new_solo(context, &comm));
    memset(&linear_config, 0, sizeof linear_config);
    linear_config.struct_size = sizeof linear_config;
    linear_config.factor_dtype = FORGE_DTYPE_BF16;
    linear_config.out_features = 7;
    linear_config.in_features = 5;
    linear_config.rule = "lion";
    OK(forge_linear_new(context, comm, &linear_config, &linear));
    /* A linear keeps what it needs of both. */
    forge_comm_free(comm);
    forge_context_free(context);
    check_the_library_agrees(linear);
    forge_linear_free(linear);

    /* Freeing nothing is allowed. */
    forge_linear_free(NULL);
    forge_comm_free(NULL);
    forge_context_free(NULL);
    return 0;
}
