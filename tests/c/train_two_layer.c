/* Trains a two-layer net y = W2 tanh(W1 x) with plain C loops and FORGE, schedule `immediate`: each
 * backward updates its weight, and no weight gradient exists. Beside it runs the same training with
 * materialised gradients and a plain AdamW; both must end with the same weights. */

#include "check.h"

#include <math.h>
#include <string.h>

enum { SAMPLES = 64, IN = 3, HIDDEN = 24, OUT = 2, STEPS = 200 };

static const double LR = 0.01, DECAY = 0.01, BETA1 = 0.9, BETA2 = 0.999, EPS = 1e-8;

/* A weight as FORGE sees it: the linear, and the arrays that this program owns. */
typedef struct {
    forge_linear *linear;
    forge_parameter parameter;
    float weight[HIDDEN * IN]; /* the larger of the two layers; HIDDEN * OUT is smaller */
    float m[HIDDEN * IN], v[HIDDEN * IN];
} layer;

typedef struct {
    float weight[HIDDEN * IN], m[HIDDEN * IN], v[HIDDEN * IN];
} reference;

/* c[rows, out] = a[rows, in] w[out, in]^T */
static void linear_forward(int rows, int in, int out, const float *a, const float *w, float *c) {
    for (int r = 0; r < rows; r++) {
        for (int o = 0; o < out; o++) {
            float sum = 0.0f;
            for (int i = 0; i < in; i++) {
                sum += a[r * in + i] * w[o * in + i];
            }
            c[r * out + o] = sum;
        }
    }
}

/* The forward of both runs; leaves dL/dy in `dy` and returns the loss, the mean squared error. */
static double forward(const float *w1, const float *w2, const float *x, const float *target,
                      float *hidden, float *dy) {
    float y[SAMPLES * OUT];
    double loss = 0.0;
    linear_forward(SAMPLES, IN, HIDDEN, x, w1, hidden);
    for (int i = 0; i < SAMPLES * HIDDEN; i++) {
        hidden[i] = tanhf(hidden[i]);
    }
    linear_forward(SAMPLES, HIDDEN, OUT, hidden, w2, y);
    for (int i = 0; i < SAMPLES * OUT; i++) {
        const float difference = y[i] - target[i];
        loss += (double)difference * difference / (SAMPLES * OUT);
        dy[i] = 2.0f * difference / (SAMPLES * OUT);
    }
    return loss;
}

static void tanh_backward(const float *hidden, float *gradient) {
    for (int i = 0; i < SAMPLES * HIDDEN; i++) {
        gradient[i] *= 1.0f - hidden[i] * hidden[i];
    }
}

/* dW = dY^T X in an array, then AdamW (Loshchilov & Hutter, arXiv 1711.05101) over it. */
static void reference_step(reference *r, int in, int out, const float *dy, const float *x, int t) {
    const double bias1 = 1.0 - pow(BETA1, t), bias2 = 1.0 - pow(BETA2, t);
    float gradient[HIDDEN * IN];
    for (int o = 0; o < out; o++) {
        for (int i = 0; i < in; i++) {
            float sum = 0.0f;
            for (int s = 0; s < SAMPLES; s++) {
                sum += dy[s * out + o] * x[s * in + i];
            }
            gradient[o * in + i] = sum;
        }
    }
    for (int k = 0; k < out * in; k++) {
        const double g = gradient[k];
        const double m = BETA1 * r->m[k] + (1.0 - BETA1) * g;
        const double v = BETA2 * r->v[k] + (1.0 - BETA2) * g * g;
        const double w = r->weight[k] * (1.0 - LR * DECAY);
        r->m[k] = (float)m;
        r->v[k] = (float)v;
        r->weight[k] = (float)(w - LR / bias1 * m / (sqrt(v) / sqrt(bias2) + EPS));
    }
}

/* Fills in place: `parameter` points into the struct itself. */
static void layer_init(layer *l, forge_context *context, forge_comm *comm, int in, int out,
                       uint32_t parameter_id, uint64_t *seed) {
    forge_linear_config config;
    forge_layout layout;
    memset(&config, 0, sizeof config);
    config.struct_size = sizeof config;
    config.factor_dtype = FORGE_DTYPE_F32;
    config.out_features = (uint64_t)out;
    config.in_features = (uint64_t)in;
    config.parallel = FORGE_PARALLEL_NONE;
    config.weight_format = FORGE_WEIGHT_F32;
    config.parameter_id = parameter_id;
    config.rule = "adamw";
    OK(forge_linear_new(context, comm, &config, &l->linear));

    layout.struct_size = sizeof layout;
    OK(forge_linear_layout(l->linear, &layout));
    REQUIRE(layout.n_states == 2 && layout.weight_extra.bytes == 0);
    REQUIRE(layout.weight.bytes == sizeof(float) * (size_t)(in * out));
    REQUIRE(layout.weight.bytes <= sizeof l->weight);

    memset(&l->parameter, 0, sizeof l->parameter);
    memset(l->m, 0, sizeof l->m);
    memset(l->v, 0, sizeof l->v);
    l->parameter.struct_size = sizeof l->parameter;
    l->parameter.weight.data = l->weight;
    l->parameter.weight.bytes = layout.weight.bytes;
    l->parameter.states[0].data = l->m;
    l->parameter.states[0].bytes = layout.states[0].bytes;
    l->parameter.states[1].data = l->v;
    l->parameter.states[1].bytes = layout.states[1].bytes;
    fill_uniform(l->weight, (size_t)(in * out), 1.0f / sqrtf((float)in), seed);
}

/* One call: dX (where wanted), dW and the AdamW update of the weight. */
static void layer_backward(layer *l, int in, int out, const float *dy, const float *x, float *dx,
                           int step_number) {
    forge_step step;
    forge_backward backward;
    memset(&step, 0, sizeof step);
    step.struct_size = sizeof step;
    step.scalars.step = (uint64_t)step_number;
    step.scalars.grad_scale = 1.0;
    step.scalars.hyper[FORGE_HYPER_LR] = LR;
    step.scalars.hyper[FORGE_HYPER_WEIGHT_DECAY] = DECAY;
    step.scalars.hyper[2] = BETA1;
    step.scalars.hyper[3] = BETA2;
    step.scalars.hyper[4] = EPS;

    memset(&backward, 0, sizeof backward);
    backward.struct_size = sizeof backward;
    backward.mode = FORGE_BACKWARD_UPDATE;
    backward.tokens = SAMPLES;
    backward.dy.data = dy;
    backward.dy.bytes = sizeof(float) * (size_t)(SAMPLES * out);
    backward.x.data = x;
    backward.x.bytes = sizeof(float) * (size_t)(SAMPLES * in);
    backward.dx.data = dx;
    backward.dx.bytes = sizeof(float) * (size_t)(SAMPLES * in);
    backward.parameter = &l->parameter;
    backward.step = &step;
    OK(forge_linear_backward(l->linear, &backward, NULL, NULL));
}

static double largest_difference(const float *a, const float *b, int n) {
    double largest = 0.0;
    for (int i = 0; i < n; i++) {
        const double difference = fabs((double)a[i] - b[i]);
        /* Written so that a NaN on either side is the largest. */
        if (!(difference <= largest)) {
            largest = difference;
        }
    }
    return largest;
}

int main(void) {
    static float x[SAMPLES * IN], target[SAMPLES * OUT];
    static float hidden[SAMPLES * HIDDEN], dhidden[SAMPLES * HIDDEN], dy[SAMPLES * OUT];
    static layer first, second;
    static reference ref1, ref2;
    forge_context_config config = {sizeof config, FORGE_BACKEND_CPU, 0, 2, NULL};
    const forge_buffer no_workspace = {NULL, 0};
    forge_context *context = NULL;
    forge_comm *comm = NULL;
    uint64_t seed = 1, workspace_bytes = 1;
    double first_loss = 0.0, last_loss = 0.0, reference_loss = 0.0;

    /* An 8x8 grid of points and a constant (the bias), and two smooth functions of them. */
    for (int s = 0; s < SAMPLES; s++) {
        const float a = (float)(s % 8) / 3.5f - 1.0f, b = (float)(s / 8) / 3.5f - 1.0f;
        x[s * IN] = a;
        x[s * IN + 1] = b;
        x[s * IN + 2] = 1.0f;
        target[s * OUT] = sinf(2.0f * a) * cosf(b);
        target[s * OUT + 1] = a * b;
    }

    OK(forge_context_new(&config, &context));
    /* The CPU wants no workspace, and takes none amiss. */
    OK(forge_context_workspace_bytes(context, &workspace_bytes));
    REQUIRE(workspace_bytes == 0);
    OK(forge_context_set_workspace(context, no_workspace));
    OK(forge_comm_new_solo(context, &comm));
    layer_init(&first, context, comm, IN, HIDDEN, 1, &seed);
    layer_init(&second, context, comm, HIDDEN, OUT, 2, &seed);
    memcpy(ref1.weight, first.weight, sizeof ref1.weight);
    memcpy(ref2.weight, second.weight, sizeof ref2.weight);

    for (int step = 1; step <= STEPS; step++) {
        last_loss = forward(first.weight, second.weight, x, target, hidden, dy);
        if (step == 1) {
            first_loss = last_loss;
        }
        layer_backward(&second, HIDDEN, OUT, dy, hidden, dhidden, step);
        tanh_backward(hidden, dhidden);
        layer_backward(&first, IN, HIDDEN, dhidden, x, NULL, step);
    }

    for (int step = 1; step <= STEPS; step++) {
        reference_loss = forward(ref1.weight, ref2.weight, x, target, hidden, dy);
        for (int s = 0; s < SAMPLES; s++) {
            for (int h = 0; h < HIDDEN; h++) {
                float sum = 0.0f;
                for (int o = 0; o < OUT; o++) {
                    sum += dy[s * OUT + o] * ref2.weight[o * HIDDEN + h];
                }
                dhidden[s * HIDDEN + h] = sum;
            }
        }
        reference_step(&ref2, HIDDEN, OUT, dy, hidden, step);
        tanh_backward(hidden, dhidden);
        reference_step(&ref1, IN, HIDDEN, dhidden, x, step);
    }

    const double d1 = largest_difference(first.weight, ref1.weight, HIDDEN * IN);
    const double d2 = largest_difference(second.weight, ref2.weight, HIDDEN * OUT);
    printf("loss: first %.6f, last %.6f (reference %.6f)\n", first_loss, last_loss, reference_loss);
    printf("largest difference of a weight: W1 %.2e, W2 %.2e\n", d1, d2);
    REQUIRE(last_loss < first_loss / 20.0);
    REQUIRE(d1 < 1e-5 && d2 < 1e-5);

    forge_linear_free(first.linear);
    forge_linear_free(second.linear);
    forge_comm_free(comm);
    forge_context_free(context);
    return 0;
}
