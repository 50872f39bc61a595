/* Several linears of different shapes and formats, updated by one call: the bytes of a call for
 * each, reports too. And what such a call refuses, before it has written anything. */

#include "linear.h"

enum { COUNT = 5, TOKENS = 6, MOST = 140 * 20 };

typedef struct {
    forge_linear *linear;
    uint64_t rows, cols;
    forge_parameter alone, together;
    float dy[TOKENS * 140], x[TOKENS * 140], accumulator[MOST];
    forge_segment segments[2];
    forge_step step;
    forge_update update;
    forge_report report_alone, report_together;
} layer;

static layer layers[COUNT];

/* The same random bits for both. */
static void parameters(layer *l) {
    static float values[MOST];
    uint64_t seed = l->rows;
    forge_const_buffer image = {values, sizeof(float) * l->rows * l->cols};
    l->alone = parameter_new(l->linear);
    l->together = parameter_new(l->linear);
    fill_uniform(values, MOST, 0.5f, &seed);
    OK(forge_linear_import_weight(l->linear, &l->alone, image, NULL));
    OK(forge_linear_import_weight(l->linear, &l->together, image, NULL));
}

static forge_linear *linear_new(forge_context *context, int k, uint64_t rows, uint64_t cols) {
    forge_linear_config config = linear_config(rows, cols);
    config.weight_format = k % 2 == 0 ? FORGE_WEIGHT_F32 : FORGE_WEIGHT_BF16_16;
    config.state_formats[0] = config.state_formats[1] = k == 3 ? FORGE_STATE_Q8 : FORGE_STATE_F32;
    config.state_rounding = FORGE_ROUNDING_STOCHASTIC;
    config.parameter_id = 100 + (uint32_t)k;
    config.rule = k == 4 ? "lion" : "adamw";
    return solo_linear(context, &config);
}

static int same(const layer *l) { return parameters_equal(&l->alone, &l->together); }

static void prepare(forge_context *context, int k, uint64_t *seed) {
    static const uint64_t rows[COUNT] = {7, 20, 1, 20, 9}, cols[COUNT] = {13, 140, 1, 131, 64};
    layer *l = &layers[k];
    l->rows = rows[k];
    l->cols = cols[k];
    l->linear = linear_new(context, k, l->rows, l->cols);
    parameters(l);
    fill_uniform(l->dy, TOKENS * 140, 1.0f, seed);
    fill_uniform(l->x, TOKENS * 140, 1.0f, seed);
    fill_uniform(l->accumulator, MOST, 1.0f, seed);
    for (uint64_t s = 0; s < 2; s++) {
        forge_segment *segment = &l->segments[s];
        segment->tokens = TOKENS / 2;
        segment->dy.data = l->dy + s * segment->tokens * l->rows;
        segment->dy.bytes = sizeof(float) * segment->tokens * l->rows;
        segment->x.data = l->x + s * segment->tokens * l->cols;
        segment->x.bytes = sizeof(float) * segment->tokens * l->cols;
    }
    /* Infinite: a tile that is left alone, and a report that says so. */
    if (k == 2) {
        l->dy[0] = (float)1e38 * 10.0f;
    }
    l->step = adamw_step(1, k == 1 ? 0.02 : 0.01);
    l->step.scalars.seed = 5;
    l->update.struct_size = sizeof l->update;
    l->update.segments = l->segments;
    l->update.n_segments = (uint32_t)(k % 3);
    if (k % 2 == 0) {
        l->update.accumulator.data = l->accumulator;
        l->update.accumulator.bytes = sizeof(float) * l->rows * l->cols;
    }
    l->update.step = &l->step;
    l->update.parameter = &l->alone;
    l->update.device_report = &l->report_alone;
}

/* `together` is still `alone` after each. */
static void refusals(forge_linear **linears, const forge_update **updates, forge_linear *foreign) {
    const uint32_t n = COUNT;
    layer *l = &layers[3];
    forge_linear *const linear = linears[3];
    REFUSED(FORGE_ERROR_NULL, "linears", forge_linear_update_group(NULL, updates, n, NULL));
    REFUSED(FORGE_ERROR_NULL, "updates", forge_linear_update_group(linears, NULL, n, NULL));
    linears[3] = NULL;
    REFUSED(FORGE_ERROR_NULL, "linears[3]", forge_linear_update_group(linears, updates, n, NULL));
    linears[3] = foreign;
    REFUSED(FORGE_ERROR_UNSUPPORTED, "linears[3]: of another context",
            forge_linear_update_group(linears, updates, n, NULL));
    linears[3] = linear;
    l->step.scalars.hyper[FORGE_HYPER_LR] = -1.0;
    REFUSED(FORGE_ERROR_SCALAR,
            "updates[3]: ", forge_linear_update_group(linears, updates, n, NULL));
    l->step.scalars.hyper[FORGE_HYPER_LR] = 0.01;
    /* One report for two; a buffer that another one writes. */
    l->update.device_report = &layers[1].report_together;
    REFUSED(FORGE_ERROR_OVERLAP, "updates[3]: device_report: overlaps updates[1]: device_report",
            forge_linear_update_group(linears, updates, n, NULL));
    l->update.device_report = &l->report_together;
    layers[0].update.accumulator.data = layers[4].together.weight.data;
    REFUSED(FORGE_ERROR_OVERLAP, "updates[4]: parameter.weight",
            forge_linear_update_group(linears, updates, n, NULL));
    layers[0].update.accumulator.data = layers[0].accumulator;
}

int main(void) {
    forge_context *const context = cpu_context(2), *const other = cpu_context(2);
    forge_linear *linears[COUNT], *foreign;
    const forge_update *updates[COUNT];
    uint64_t seed = 9;

    foreign = linear_new(other, 3, 20, 131);
    for (int k = 0; k < COUNT; k++) {
        prepare(context, k, &seed);
        linears[k] = layers[k].linear;
        updates[k] = &layers[k].update;
    }
    for (int k = 0; k < COUNT; k++) {
        layers[k].update.parameter = &layers[k].together;
        layers[k].update.device_report = &layers[k].report_together;
    }
    refusals(linears, updates, foreign);
    OK(forge_linear_update_group(NULL, NULL, 0, NULL));
    for (int k = 0; k < COUNT; k++) {
        REQUIRE(same(&layers[k]));
    }

    OK(forge_linear_update_group(linears, updates, COUNT, NULL));
    for (int k = 0; k < COUNT; k++) {
        layer *l = &layers[k];
        REQUIRE(k == 2 || !same(l));
        l->update.parameter = &l->alone;
        l->update.device_report = &l->report_alone;
        OK(forge_linear_update(l->linear, &l->update, NULL, NULL));
        REQUIRE(same(l));
        REQUIRE(l->report_alone.struct_size == sizeof(forge_report));
        REQUIRE(l->report_alone.nonfinite_tiles == (k == 2));
        REQUIRE(memcmp(&l->report_alone, &l->report_together, sizeof(forge_report)) == 0);
    }

    forge_linear_free(foreign);
    for (int k = 0; k < COUNT; k++) {
        parameter_free(&layers[k].alone);
        parameter_free(&layers[k].together);
        forge_linear_free(layers[k].linear);
    }
    forge_context_free(other);
    forge_context_free(context);
    return 0;
}
