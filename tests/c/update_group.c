/* Several linears of different shapes and formats, updated by one call: the bytes of a call for
 * each, reports too. And what such a call refuses, before it has written anything. */

#include "check.h"

#include <string.h>

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

/* The same random bits for both; every array as the layout asks for it. */
static void allocate(const forge_array_layout *layout, forge_buffer *alone,
                     forge_buffer *together) {
    if (layout->bytes == 0) {
        return;
    }
    alone->bytes = together->bytes = layout->bytes;
    alone->data = calloc(1, (size_t)layout->bytes);
    together->data = calloc(1, (size_t)layout->bytes);
    REQUIRE(alone->data != NULL && together->data != NULL);
}

static void parameters(layer *l) {
    static float values[MOST];
    forge_layout layout;
    uint64_t seed = l->rows;
    forge_const_buffer image = {values, sizeof(float) * l->rows * l->cols};
    layout.struct_size = sizeof layout;
    OK(forge_linear_layout(l->linear, &layout));
    memset(&l->alone, 0, sizeof l->alone);
    l->alone.struct_size = sizeof l->alone;
    l->together = l->alone;
    allocate(&layout.weight, &l->alone.weight, &l->together.weight);
    allocate(&layout.weight_extra, &l->alone.weight_extra, &l->together.weight_extra);
    for (int k = 0; k < FORGE_MAX_STATES; k++) {
        allocate(&layout.states[k], &l->alone.states[k], &l->together.states[k]);
        allocate(&layout.scales[k], &l->alone.scales[k], &l->together.scales[k]);
    }
    fill_uniform(values, MOST, 0.5f, &seed);
    OK(forge_linear_import_weight(l->linear, &l->alone, image, NULL));
    OK(forge_linear_import_weight(l->linear, &l->together, image, NULL));
}

static forge_linear *linear_new(forge_context *context, int k, uint64_t rows, uint64_t cols) {
    forge_linear *linear = NULL;
    forge_comm *comm = NULL;
    forge_linear_config config;
    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.factor_dtype = FORGE_DTYPE_F32;
    config.out_features = rows;
    config.in_features = cols;
    config.weight_format = k % 2 == 0 ? FORGE_WEIGHT_F32 : FORGE_WEIGHT_BF16_16;
    config.state_formats[0] = config.state_formats[1] = k == 3 ? FORGE_STATE_Q8 : FORGE_STATE_F32;
    config.state_rounding = FORGE_ROUNDING_STOCHASTIC;
    config.parameter_id = 100 + (uint32_t)k;
    config.rule = k == 4 ? "lion" : "adamw";
    OK(forge_comm_new_solo(context, &comm));
    OK(forge_linear_new(context, comm, &config, &linear));
    forge_comm_free(comm);
    return linear;
}

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
    l->step.struct_size = sizeof l->step;
    l->step.scalars.step = 1;
    l->step.scalars.seed = 5;
    l->step.scalars.grad_scale = 1.0;
    l->step.scalars.hyper[FORGE_HYPER_LR] = k == 1 ? 0.02 : 0.01;
    l->step.scalars.hyper[2] = 0.9;
    l->step.scalars.hyper[3] = 0.99;
    l->step.scalars.hyper[4] = 1e-8;
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

static int same_bytes(forge_buffer a, forge_buffer b) {
    return a.bytes == b.bytes && (a.bytes == 0 || memcmp(a.data, b.data, (size_t)a.bytes) == 0);
}

static int same(const layer *l) {
    int same = same_bytes(l->alone.weight, l->together.weight) &&
               same_bytes(l->alone.weight_extra, l->together.weight_extra);
    for (int k = 0; k < FORGE_MAX_STATES; k++) {
        same = same && same_bytes(l->alone.states[k], l->together.states[k]) &&
               same_bytes(l->alone.scales[k], l->together.scales[k]);
    }
    return same;
}

#define REFUSED(status, part, call)                                                                \
    do {                                                                                           \
        REQUIRE((call) == (status));                                                               \
        REQUIRE(strstr(forge_last_error(), part) != NULL);                                         \
    } while (0)

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
    forge_context_config config = {sizeof config, FORGE_BACKEND_CPU, 0, 2, NULL};
    forge_context *context = NULL, *other = NULL;
    forge_linear *linears[COUNT], *foreign;
    const forge_update *updates[COUNT];
    uint64_t seed = 9;

    OK(forge_context_new(&config, &context));
    OK(forge_context_new(&config, &other));
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
        forge_parameter *const both[2] = {&layers[k].alone, &layers[k].together};
        for (int i = 0; i < 2; i++) {
            free(both[i]->weight.data);
            free(both[i]->weight_extra.data);
            for (int s = 0; s < FORGE_MAX_STATES; s++) {
                free(both[i]->states[s].data);
                free(both[i]->scales[s].data);
            }
        }
        forge_linear_free(layers[k].linear);
    }
    forge_context_free(other);
    forge_context_free(context);
    return 0;
}
