/* The schedule `deferred` with exact clipping: the factors of three micro-batches are kept, the
 * norm of the whole gradient comes from them (both ways), and one call updates. Held against a
 * reference that materialises the gradient in double. Then the same with a bf16 weight, its lower
 * halves and 8-bit states, all allocated from forge_linear_layout. */

#include "linear.h"

#include <math.h>

/* IN takes two blocks of 128 of an 8-bit state, the second one short. */
enum { OUT = 9, IN = 130, SIZE = OUT * IN, MICRO_BATCHES = 3, TOKENS = 16, STEPS = 5 };

static const int micro_batch_tokens[MICRO_BATCHES] = {5, 7, 4};
static const double LR = 0.01, DECAY = 0.1, BETA1 = 0.9, BETA2 = 0.99, EPS = 1e-8, MAX_NORM = 1.0;

typedef struct {
    double w[SIZE], m[SIZE], v[SIZE];
} reference;

/* AdamW over the clipped gradient; returns the gradient's norm before clipping. */
static double reference_step(reference *r, const float *dy, const float *x, int t) {
    static double gradient[SIZE];
    double squares = 0.0;
    for (int o = 0; o < OUT; o++) {
        for (int i = 0; i < IN; i++) {
            double sum = 0.0;
            for (int s = 0; s < TOKENS; s++) {
                sum += (double)dy[s * OUT + o] * x[s * IN + i];
            }
            gradient[o * IN + i] = sum;
            squares += sum * sum;
        }
    }
    const double norm = sqrt(squares);
    const double clip = fmin(1.0, MAX_NORM / (norm + 1e-6));
    for (int k = 0; k < SIZE; k++) {
        const double g = gradient[k] * clip;
        r->m[k] += (1.0 - BETA1) * (g - r->m[k]);
        r->v[k] = BETA2 * r->v[k] + (1.0 - BETA2) * g * g;
        r->w[k] *= 1.0 - LR * DECAY;
        r->w[k] -= LR / (1.0 - pow(BETA1, t)) * r->m[k] /
                   (sqrt(r->v[k]) / sqrt(1.0 - pow(BETA2, t)) + EPS);
    }
    return norm;
}

/* Norm of all micro-batches, clip coefficient, update; returns the norm. */
static double forge_clipped_step(forge_linear *linear, const forge_parameter *parameter,
                                 const float *dy, const float *x, int t) {
    const forge_const_buffer no_accumulator = {NULL, 0};
    forge_segment segments[MICRO_BATCHES];
    forge_norm gram, tiles, device;
    forge_step step;
    forge_update update;
    forge_report report, device_report;
    double norm = 0.0, coefficient = 0.0;
    int first = 0;

    memset(segments, 0, sizeof segments);
    for (int b = 0; b < MICRO_BATCHES; b++) {
        const int n = micro_batch_tokens[b];
        segments[b].tokens = (uint64_t)n;
        segments[b].dy.data = dy + first * OUT;
        segments[b].dy.bytes = sizeof(float) * (size_t)(n * OUT);
        segments[b].x.data = x + first * IN;
        segments[b].x.bytes = sizeof(float) * (size_t)(n * IN);
        first += n;
    }
    REQUIRE(first == TOKENS);

    gram.struct_size = tiles.struct_size = sizeof gram;
    OK(forge_linear_norm(linear, segments, MICRO_BATCHES, no_accumulator, FORGE_NORM_GRAM, &gram,
                         NULL));
    OK(forge_linear_norm(linear, segments, MICRO_BATCHES, no_accumulator, FORGE_NORM_TILES, &tiles,
                         NULL));
    REQUIRE(gram.method == FORGE_NORM_GRAM && tiles.method == FORGE_NORM_TILES);
    /* In the backend's memory, whose former contents do not matter. */
    memset(&device, 0x5a, sizeof device);
    OK(forge_linear_norm_async(linear, segments, MICRO_BATCHES, no_accumulator, FORGE_NORM_TILES,
                               &device, NULL));
    REQUIRE(memcmp(&device, &tiles, sizeof device) == 0);
    REQUIRE(gram.nonfinite == 0 && tiles.nonfinite == 0);
    REQUIRE(fabs(gram.sum_of_squares / tiles.sum_of_squares - 1.0) < 1e-5);
    OK(forge_clip_coefficient(tiles.sum_of_squares, 1.0, MAX_NORM, &norm, &coefficient));
    REQUIRE(coefficient > 0.0 && coefficient < 1.0);

    memset(&step, 0, sizeof step);
    step.struct_size = sizeof step;
    step.scalars.step = (uint64_t)t;
    step.scalars.seed = 42;
    step.scalars.grad_scale = coefficient;
    step.scalars.hyper[FORGE_HYPER_LR] = LR;
    step.scalars.hyper[FORGE_HYPER_WEIGHT_DECAY] = DECAY;
    step.scalars.hyper[2] = BETA1;
    step.scalars.hyper[3] = BETA2;
    step.scalars.hyper[4] = EPS;
    memset(&update, 0, sizeof update);
    update.struct_size = sizeof update;
    update.n_segments = MICRO_BATCHES;
    update.segments = segments;
    update.parameter = parameter;
    update.step = &step;
    report.struct_size = sizeof report;
    memset(&device_report, 0x5a, sizeof device_report);
    update.device_report = &device_report;
    OK(forge_linear_update(linear, &update, &report, NULL));
    REQUIRE(memcmp(&device_report, &report, sizeof report) == 0);
    REQUIRE(report.tiles > 0 && report.nonfinite_tiles == 0);
    /* The update saw the very gradient that the norm was taken of. */
    REQUIRE(report.sum_of_squares == tiles.sum_of_squares);
    return norm;
}

static forge_buffer writable(float *data) {
    const forge_buffer buffer = {data, sizeof(float) * SIZE};
    return buffer;
}

static forge_const_buffer readable(const float *data) {
    const forge_const_buffer buffer = {data, sizeof(float) * SIZE};
    return buffer;
}

static double largest_difference(const float *a, const double *b) {
    double largest = 0.0;
    for (int i = 0; i < SIZE; i++) {
        const double difference = fabs(a[i] - b[i]);
        if (!(difference <= largest)) {
            largest = difference; /* a NaN comes here, too */
        }
    }
    return largest;
}

/* What is exported and imported again into fresh arrays gives the same bytes in every array. */
static void check_round_trip(forge_linear *linear, const forge_parameter *parameter) {
    static float image[SIZE];
    forge_parameter copy = parameter_new(linear);
    OK(forge_linear_export_weight(linear, parameter, writable(image), NULL));
    OK(forge_linear_import_weight(linear, &copy, readable(image), NULL));
    for (uint32_t k = 0; k < 2; k++) {
        OK(forge_linear_export_state(linear, parameter, k, writable(image), NULL));
        OK(forge_linear_import_state(linear, &copy, k, readable(image), NULL));
    }
    REQUIRE(parameters_equal(parameter, &copy));
    parameter_free(&copy);
}

/* `tolerance_first`, `tolerance_last`: of a weight after the first and after the last step. */
static void run(forge_context *context, const char *name, uint32_t weight_format,
                uint32_t state_format, double tolerance_first, double tolerance_last) {
    static float weight[SIZE], image[SIZE], dy[TOKENS * OUT], x[TOKENS * IN];
    static reference expected;
    forge_linear_config config = linear_config(OUT, IN);
    config.weight_format = weight_format;
    config.state_formats[0] = config.state_formats[1] = state_format;
    config.parameter_id = 7;
    forge_linear *linear = solo_linear(context, &config);
    forge_parameter parameter = parameter_new(linear);
    uint64_t seed = 3;
    double difference = 0.0;

    fill_uniform(weight, SIZE, 0.5f, &seed);
    memset(&expected, 0, sizeof expected);
    for (int i = 0; i < SIZE; i++) {
        expected.w[i] = weight[i];
    }
    OK(forge_linear_import_weight(linear, &parameter, readable(weight), NULL));
    OK(forge_linear_export_weight(linear, &parameter, writable(image), NULL));
    /* Both formats here hold a whole fp32 master. */
    REQUIRE(memcmp(weight, image, sizeof weight) == 0);

    for (int t = 1; t <= STEPS; t++) {
        fill_uniform(dy, TOKENS * OUT, 1.0f, &seed);
        fill_uniform(x, TOKENS * IN, 1.0f, &seed);
        const double norm = forge_clipped_step(linear, &parameter, dy, x, t);
        const double reference_norm = reference_step(&expected, dy, x, t);
        REQUIRE(fabs(norm / reference_norm - 1.0) < 1e-5);
        OK(forge_linear_export_weight(linear, &parameter, writable(image), NULL));
        difference = largest_difference(image, expected.w);
        REQUIRE(difference < (t == 1 ? tolerance_first : tolerance_last));
    }
    printf("%s: largest difference of a weight after %d steps: %.2e\n", name, STEPS, difference);
    check_round_trip(linear, &parameter);
    parameter_free(&parameter);
    forge_linear_free(linear);
}

int main(void) {
    forge_context *context = cpu_context(2);
    run(context, "fp32, fp32 states", FORGE_WEIGHT_F32, FORGE_STATE_F32, 1e-5, 1e-5);
    /* The first update is computed before its states are rounded to 8 bits, so it is exact; later
     * ones differ by fractions of the learning rate (0.01). */
    run(context, "bf16+16, q8 states", FORGE_WEIGHT_BF16_16, FORGE_STATE_Q8, 1e-5, 5e-3);
    forge_context_free(context);
    return 0;
}
