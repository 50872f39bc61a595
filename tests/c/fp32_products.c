/* fp32 products that a GPU may split are the CPU's own, exact ones. */

#include "linear.h"

enum { ROWS = 37, COLS = 29, TOKENS = 11 };

static float dy[TOKENS * ROWS], x[TOKENS * COLS], weights[ROWS * COLS];

static forge_parameter updated(forge_context *context, uint32_t products) {
    const forge_const_buffer image = {weights, sizeof weights};
    forge_linear_config config = linear_config(ROWS, COLS);
    forge_segment segment;
    forge_update update;
    forge_step step = adamw_step(1, 0.01);
    forge_report report;
    config.fp32_products = products;
    forge_linear *linear = solo_linear(context, &config);
    forge_parameter parameter = parameter_new(linear);
    OK(forge_linear_import_weight(linear, &parameter, image, NULL));

    memset(&segment, 0, sizeof segment);
    segment.tokens = TOKENS;
    segment.dy.data = dy;
    segment.dy.bytes = sizeof dy;
    segment.x.data = x;
    segment.x.bytes = sizeof x;
    memset(&update, 0, sizeof update);
    update.struct_size = sizeof update;
    update.segments = &segment;
    update.n_segments = 1;
    update.step = &step;
    update.parameter = &parameter;
    report.struct_size = sizeof report;
    OK(forge_linear_update(linear, &update, &report, NULL));
    REQUIRE(report.nonfinite_tiles == 0 && report.sum_of_squares > 0.0);
    forge_linear_free(linear);
    return parameter;
}

int main(void) {
    uint64_t seed = 3;
    forge_context *context = cpu_context(2);
    fill_uniform(dy, TOKENS * ROWS, 1.0f, &seed);
    fill_uniform(x, TOKENS * COLS, 1.0f, &seed);
    fill_uniform(weights, ROWS * COLS, 0.5f, &seed);
    forge_parameter exact = updated(context, FORGE_FP32_EXACT);
    forge_parameter split = updated(context, FORGE_FP32_BF16X3);
    REQUIRE(parameters_equal(&exact, &split));
    REQUIRE(memcmp(exact.weight.data, weights, sizeof weights) != 0);
    parameter_free(&exact);
    parameter_free(&split);
    forge_context_free(context);
    return 0;
}
