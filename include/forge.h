/* FORGE: fused weight gradient and optimizer update. SPDX-License-Identifier: Apache-2.0
 *
 * Generated from src/ffi by cbindgen; do not edit. `FORGE_BLESS=1 cargo test --test header` renews it.
 * docs/c-api.md tells how the calls go together. */

#ifndef FORGE_H
#define FORGE_H

#include <stdint.h>

// The ABI of this library. A header of another number does not fit it.
#define FORGE_ABI_VERSION 1

// States that a rule may have at most.
#define FORGE_MAX_STATES 3

// Hyper-parameters that a rule may have at most.
#define FORGE_MAX_HYPER 16

// Index of the learning rate in every rule's hyper-parameters.
#define FORGE_HYPER_LR 0

// Index of the weight decay in every rule's hyper-parameters.
#define FORGE_HYPER_WEIGHT_DECAY 1

// `rule_flags`: ascend instead of descend.
#define FORGE_RULE_MAXIMIZE 1

// `rule_flags`: Nesterov momentum.
#define FORGE_RULE_NESTEROV 2

// `rule_flags`: keep a momentum buffer.
#define FORGE_RULE_MOMENTUM 4

// `rule_flags`: keep the largest second moment so far, and divide by it.
#define FORGE_RULE_AMSGRAD 8

// `rule_flags`: keep an average of the gradient, and divide by its deviation.
#define FORGE_RULE_CENTERED 16

// `rule_flags`: apply weight decay to the weight instead of adding it to the gradient.
#define FORGE_RULE_DECOUPLED 32

// Every status a `forge_*` function returns, in numbered bands:
// 0 success, 1xx the call's arguments, 2xx a user's rule, 3xx communication, 4xx backend, 9xx internal.
//
// An error in the 1xx band means that nothing was written.
enum forge_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Success.
  FORGE_OK = 0,
  // A pointer that must not be NULL is NULL: pass it.
  FORGE_ERROR_NULL = 100,
  // A pointer is not aligned for the element or struct that it points to: align it.
  FORGE_ERROR_MISALIGNED = 101,
  // A buffer's size is not what the shapes and formats need: ask forge_linear_layout,
  // forge_linear_workspace or forge_context_workspace_bytes.
  FORGE_ERROR_BUFFER_SIZE = 102,
  // A size computed from the arguments does not fit 63 bits: check the dimensions.
  FORGE_ERROR_OVERFLOW = 103,
  // A scalar is NaN, infinite or out of the rule's range, or a step is 0: check the step's scalars; skip
  // the step if the norm is not finite.
  FORGE_ERROR_SCALAR = 104,
  // An enum's value is not one of this version's, or a flag is neither 0 nor 1: the message lists the
  // known ones.
  FORGE_ERROR_ENUM = 105,
  // Features or, under sequence parallelism, tokens do not divide by the ranks: pad them.
  FORGE_ERROR_SHARD = 106,
  // A struct's `struct_size` is not this version's: set it, and build against this library's header.
  FORGE_ERROR_STRUCT_SIZE = 107,
  // A buffer that is written overlaps another one of the call: separate them.
  FORGE_ERROR_OVERLAP = 108,
  // No rule of that name, or a flag that it does not take: the message lists what there is.
  FORGE_ERROR_RULE = 109,
  // Each argument is valid, the combination is not supported: the message says which, and what instead.
  FORGE_ERROR_UNSUPPORTED = 110,
  // The stream is not one of this backend's: on the CPU it is NULL.
  FORGE_ERROR_STREAM = 111,
  // A dimension, a stride or a device's ordinal is out of range.
  FORGE_ERROR_SHAPE = 112,
  // The rule has no state of that index: see `n_states` of forge_layout.
  FORGE_ERROR_STATE_INDEX = 113,
  // The CUDA context was lent no workspace: call forge_context_set_workspace first.
  FORGE_ERROR_WORKSPACE = 114,
  // Memory that the backend cannot reach, the host's where a GPU's is due: copy it there.
  FORGE_ERROR_MEMORY = 115,
  // The CPU function of a user's rule reported failure. Its tile is as it was; others may be updated.
  FORGE_ERROR_RULE_FUNCTION = 200,
  // A collective failed: the caller's own, whose reasons are there, or NCCL's, which is given up after a failure
  // or its timeout. forge_linear_backward says what has changed.
  FORGE_ERROR_COLLECTIVE = 300,
  // Rank and size do not fit each other: rank is below size, size is at least 1.
  FORGE_ERROR_RANK = 301,
  // NCCL is missing, too old, or lacks a function: the message says what was found where.
  FORGE_ERROR_NO_NCCL = 302,
  // The backend asked for is not to be had here, no driver, no GPU, or one of them too old: the message
  // says which; or use the CPU.
  FORGE_ERROR_NO_BACKEND = 400,
  // The thread pool could not be started: ask for fewer threads.
  FORGE_ERROR_THREADS = 401,
  // A call of the driver or of cuBLASLt failed, or cuBLASLt is missing; work enqueued before may be lost.
  // The message has the call and CUDA's text.
  FORGE_ERROR_DEVICE = 402,
  // NVRTC is missing (`pip install nvidia-cuda-nvrtc`), or does not compile a kernel: the message has its
  // log.
  FORGE_ERROR_COMPILE = 403,
  // The directory of compiled kernels is refused or cannot be written, in a call that is made to fill it:
  // the message says why.
  FORGE_ERROR_CACHE = 404,
  // A defect of FORGE, a panic that was caught at the C boundary: report it with the message.
  FORGE_ERROR_PANIC = 900,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum forge_status forge_status;
#else
typedef uint32_t forge_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Where a context computes.
enum forge_backend
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // The CPU's cores.
  FORGE_BACKEND_CPU = 0,
  // An NVIDIA GPU, by the driver's own API; needs NVRTC at run time.
  FORGE_BACKEND_CUDA = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum forge_backend forge_backend;
#else
typedef uint32_t forge_backend;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Element types.
enum forge_dtype
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // No array.
  FORGE_DTYPE_NONE = 0,
  // 32-bit float.
  FORGE_DTYPE_F32 = 1,
  // bfloat16.
  FORGE_DTYPE_BF16 = 2,
  // 16-bit IEEE float.
  FORGE_DTYPE_F16 = 3,
  // Unsigned byte.
  FORGE_DTYPE_U8 = 4,
  // Unsigned 16-bit integer.
  FORGE_DTYPE_U16 = 5,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum forge_dtype forge_dtype;
#else
typedef uint32_t forge_dtype;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// How a weight is stored.
enum forge_weight_format
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // fp32, exact.
  FORGE_WEIGHT_F32 = 0,
  // bf16, rounded at every update.
  FORGE_WEIGHT_BF16 = 1,
  // bf16, and an fp32 master in `weight_extra`.
  FORGE_WEIGHT_BF16_F32 = 2,
  // bf16, and the 16 bits below it in `weight_extra`: together an fp32 master.
  FORGE_WEIGHT_BF16_16 = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum forge_weight_format forge_weight_format;
#else
typedef uint32_t forge_weight_format;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// How a state is stored.
enum forge_state_format
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // fp32, exact.
  FORGE_STATE_F32 = 0,
  // bf16.
  FORGE_STATE_BF16 = 1,
  // 8 bits and an fp32 scale for each 1×128 block.
  FORGE_STATE_Q8 = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum forge_state_format forge_state_format;
#else
typedef uint32_t forge_state_format;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// What 8-bit codes may assume of a state.
enum forge_state_kind
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Either sign: codes are spaced closer near zero.
  FORGE_STATE_SIGNED = 0,
  // Never negative, such as an average of squares: its root is stored.
  FORGE_STATE_NON_NEGATIVE = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum forge_state_kind forge_state_kind;
#else
typedef uint32_t forge_state_kind;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// How a value is rounded into its format.
enum forge_rounding
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // To the nearest.
  FORGE_ROUNDING_NEAREST = 0,
  // Up or down by chance, with an exact mean.
  FORGE_ROUNDING_STOCHASTIC = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum forge_rounding forge_rounding;
#else
typedef uint32_t forge_rounding;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// How a GPU multiplies fp32 factors for dW. The CPU's products are exact either way.
enum forge_fp32_products
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // By fp32 fma, with one accumulator for each element and IEEE arithmetic in the rule: the bits of the
  // CPU backend.
  FORGE_FP32_EXACT = 0,
  // By tensor cores, about three times as fast: each factor is split into two bf16, and of their four
  // products three are summed in fp32. What is left out of a product is at most 3·2⁻¹⁶ of it. Factors
  // beyond 3.396e38 count as infinite. Factors whose address or rows are no multiples of 16 bytes, and
  // more than 32 segments, are multiplied exactly all the same.
  FORGE_FP32_BF16X3 = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum forge_fp32_products forge_fp32_products;
#else
typedef uint32_t forge_fp32_products;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Which dimension of W the ranks share out.
enum forge_parallel
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Neither.
  FORGE_PARALLEL_NONE = 0,
  // out features.
  FORGE_PARALLEL_COLUMN = 1,
  // in features.
  FORGE_PARALLEL_ROW = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum forge_parallel forge_parallel;
#else
typedef uint32_t forge_parallel;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// What a backward does with dW.
enum forge_backward_mode
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // The fused update.
  FORGE_BACKWARD_UPDATE = 0,
  // Add it to the accumulator.
  FORGE_BACKWARD_ACCUMULATE = 1,
  // Nothing: the caller keeps the factors.
  FORGE_BACKWARD_KEEP = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum forge_backward_mode forge_backward_mode;
#else
typedef uint32_t forge_backward_mode;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// How a norm is computed.
enum forge_norm_method
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // The cheaper one that is accurate.
  FORGE_NORM_AUTO = 0,
  // Gram matrices of the factors, unless digits cancel: then tiles.
  FORGE_NORM_GRAM = 1,
  // Squares of tiles of dW that are then discarded.
  FORGE_NORM_TILES = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum forge_norm_method forge_norm_method;
#else
typedef uint32_t forge_norm_method;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// When the update happens.
enum forge_schedule
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Chosen by predicted bytes.
  FORGE_SCHEDULE_AUTO = 0,
  // Inside the backward.
  FORGE_SCHEDULE_IMMEDIATE = 1,
  // At the step, from kept factors.
  FORGE_SCHEDULE_DEFERRED = 2,
  // From an fp32 buffer.
  FORGE_SCHEDULE_ACCUMULATE = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum forge_schedule forge_schedule;
#else
typedef uint32_t forge_schedule;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// How dW is summed over data-parallel ranks.
enum forge_reduction
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // In a request: by the one that moves fewer bytes, which depends on the tokens. In a plan: nothing is summed.
  FORGE_REDUCTION_AUTO = 0,
  // X is gathered, dY is sent to the owners of its columns; the kernel sums over the tokens of all ranks.
  FORGE_REDUCTION_EXCHANGE = 1,
  // Row panels of dW, fp32, are reduced and scattered.
  FORGE_REDUCTION_PANELS = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum forge_reduction forge_reduction;
#else
typedef uint32_t forge_reduction;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// A communicator. Opaque.
typedef struct forge_comm forge_comm;

// A backend and its resources. Opaque. Threads may share it.
//
// After a fork the child may go on to use, and must free as usual, what it inherited: a CPU context
// starts threads of its own there. A CUDA context does not work in a fork, as CUDA itself does not:
// calls give FORGE_ERROR_DEVICE. Arrays that the parent's threads were writing at the fork are in an
// unknown state in the child.
//
// The shared library stays loaded after dlclose; a library that libforge.a is linked into should be
// linked with `-z nodelete` as well.
typedef struct forge_context forge_context;

// A sharded linear. Opaque; immutable, so that threads may share it.
typedef struct forge_linear forge_linear;

// The caller's own collectives. Counts are in elements of `dtype` (a forge_dtype); 0 says success.
// A callback may start the operation and return: `wait` returns when all that was started is done.
// Called from the thread that calls FORGE.
typedef struct {
  // sizeof(forge_host_collectives).
  uint32_t struct_size;
  // 0.
  uint32_t reserved;
  // First argument of every callback.
  void *user;
  // recv = every rank's send, in order of rank. Of a data-parallel linear's W send is this rank's part of recv.
  int32_t (*all_gather)(void *user,
                        const void *send,
                        void *recv,
                        uint64_t send_count,
                        uint32_t dtype);
  // recv = this rank's part of the sum of every rank's send.
  int32_t (*reduce_scatter)(void *user,
                            const void *send,
                            void *recv,
                            uint64_t recv_count,
                            uint32_t dtype);
  // buffer = the sum of every rank's.
  int32_t (*all_reduce)(void *user, void *buffer, uint64_t count, uint32_t dtype);
  // May be NULL where the others return only when they are done.
  int32_t (*wait)(void *user);
  // recv = of every rank's send, in order of rank, the part that is for this one; send has a part of `count`
  // for each. NULL where no linear is data parallel.
  int32_t (*all_to_all)(void *user, const void *send, void *recv, uint64_t count, uint32_t dtype);
} forge_host_collectives;

// A rank of a new NCCL communicator.
typedef struct {
  // sizeof(forge_nccl_config).
  uint32_t struct_size;
  // This rank, below `size`.
  uint32_t rank;
  // Ranks, each with the same `id`.
  uint32_t size;
  // After which a collective, or the making of the communicator, has failed; 0: 600,000.
  uint32_t timeout_ms;
  // Of forge_nccl_unique_id, which one rank calls and sends to the others.
  uint8_t id[128];
} forge_nccl_config;

// What a context is made of.
typedef struct {
  // sizeof(forge_context_config).
  uint32_t struct_size;
  // A forge_backend.
  uint32_t backend;
  // Index of the GPU, as CUDA counts; 0 for the CPU.
  int32_t device;
  // Threads of the CPU backend; 0: one for each core that the process may use.
  uint32_t threads;
  // CUDA: directory of compiled kernels, copied; made if it is not there. NULL: `$FORGE_CACHE_DIR`,
  // else `$XDG_CACHE_HOME/forge`, else `~/.cache/forge`.
  const char *cache_dir;
} forge_context_config;

// Memory that FORGE may write: of the context's backend, allocated by the caller.
typedef struct {
  // First byte, aligned to the element.
  void *data;
  // Exact size in bytes (workspaces: at least).
  uint64_t bytes;
} forge_buffer;

// Memory that FORGE only reads.
typedef struct {
  // First byte, aligned to the element.
  const void *data;
  // Size in bytes, at least what shape and stride need.
  uint64_t bytes;
} forge_const_buffer;

// The factors of one micro-batch, as the owned rows of W need them: after gathering, and where the linear is data
// parallel after the exchange, of the tokens of all its ranks.
typedef struct {
  // [tokens, out_owned].
  forge_const_buffer dy;
  // [tokens, in_local].
  forge_const_buffer x;
  // Rows of both.
  uint64_t tokens;
  // Elements from one row of dy to the next; 0: contiguous.
  uint64_t dy_stride;
  // Elements from one row of x to the next; 0: contiguous.
  uint64_t x_stride;
} forge_segment;

// Receives log lines: level 1 error, 2 warning, 3 information, 4 debugging, 5 trace. The strings
// are valid during the call. May be called from several threads at once.
typedef void (*forge_log_callback)(void *user,
                                   uint32_t level,
                                   const char *target,
                                   const char *message);

// What a linear is made of: Y[tokens, out] = X[tokens, in] · W[out, in]ᵀ.
typedef struct {
  // sizeof(forge_linear_config).
  uint32_t struct_size;
  // A forge_dtype: F32, BF16 or F16; of X, dY, dX and dbias.
  uint32_t factor_dtype;
  // Of the whole W.
  uint64_t out_features;
  // Of the whole W.
  uint64_t in_features;
  // A forge_parallel: which dimension of W the communicator's ranks share out.
  uint32_t parallel;
  // 1: tokens are shared out between the layers.
  uint32_t sequence_parallel;
  // 1: column parallel without SP all-reduces dX.
  uint32_t reduce_dgrad;
  // A forge_weight_format.
  uint32_t weight_format;
  // A forge_rounding, of FORGE_WEIGHT_BF16.
  uint32_t weight_rounding;
  // A forge_rounding, of bf16 and q8 states.
  uint32_t state_rounding;
  // A forge_state_format for each state; those the rule lacks are ignored.
  uint32_t state_formats[3];
  // FORGE_RULE_… bits.
  uint32_t rule_flags;
  // Unique among the run's parameters, and the same on every rank: it picks the random numbers.
  uint32_t parameter_id;
  // A forge_fp32_products, of fp32 factors; 0 with others.
  uint32_t fp32_products;
  // A rule's name, copied.
  const char *rule;
} forge_linear_config;

// One array to allocate.
typedef struct {
  // Exact size; 0: no such array.
  uint64_t bytes;
  // Rows, contiguous.
  uint64_t rows;
  // Columns.
  uint64_t cols;
  // A forge_dtype.
  uint32_t dtype;
  // Of the first byte.
  uint32_t alignment;
} forge_array_layout;

// All arrays of this rank's part of a parameter. States and scales must be zero before first use.
typedef struct {
  // sizeof(forge_layout).
  uint32_t struct_size;
  // States that the rule has.
  uint32_t n_states;
  // Rows of W here.
  uint64_t out_local;
  // Columns of W here.
  uint64_t in_local;
  // First row of W here.
  uint64_t row_offset;
  // First column of W here.
  uint64_t col_offset;
  // Rows of W that this rank updates: all that it has, but for data parallelism, where `weight_extra`, states,
  // scales and accumulator are of these rows alone.
  uint64_t out_owned;
  // First of them among the rows here.
  uint64_t owned_offset;
  // The model weight, [out_local, in_local].
  forge_array_layout weight;
  // Master weight or lower halves.
  forge_array_layout weight_extra;
  // States.
  forge_array_layout states[3];
  // Scales of q8 states, [ceil(in_local / 128), out_owned].
  forge_array_layout scales[3];
  // Buffer of the schedule `accumulate`.
  forge_array_layout accumulator;
} forge_layout;

// What a step looks like, for forge_linear_plan.
typedef struct {
  // sizeof(forge_plan_request).
  uint32_t struct_size;
  // A forge_schedule: AUTO, or the one asked for.
  uint32_t schedule;
  // After gathering.
  uint64_t tokens_per_micro_batch;
  // In a step.
  uint32_t micro_batches;
  // 1: the update waits for all gradients (clipping, all-or-nothing check).
  uint32_t needs_norm;
} forge_plan_request;

// A schedule and its cost.
typedef struct {
  // sizeof(forge_plan).
  uint32_t struct_size;
  // A forge_schedule, never AUTO.
  uint32_t schedule;
  // Kept from backward to step.
  uint64_t factor_bytes;
  // Of the accumulator.
  uint64_t accumulator_bytes;
  // What a stock fp32 gradient of the owned rows takes.
  uint64_t gradient_bytes;
  // Received in a step to sum dW over data-parallel ranks; W is gathered besides.
  uint64_t wire_bytes;
  // A forge_reduction, AUTO where nothing is summed.
  uint32_t reduction;
  // 0.
  uint32_t reserved;
  // One sentence, NUL-terminated.
  char reason[256];
} forge_plan;

// What a rule is.
typedef struct {
  // sizeof(forge_rule_info).
  uint32_t struct_size;
  // States with the flags asked for (forge_rule_get: with all).
  uint32_t n_states;
  // Hyper-parameters.
  uint32_t n_hyper;
  // Flags that the rule takes.
  uint32_t allowed_flags;
  // Static.
  const char *name;
  // Static, n_states of them.
  const char *state_names[3];
  // Static, n_hyper of them.
  const char *hyper_names[16];
  // n_hyper of them.
  double hyper_defaults[16];
} forge_rule_info;

// A tile of a parameter in fp32, for a rule's CPU function. Arrays have `count` elements, row after row.
typedef struct {
  // Elements.
  uint64_t count;
  // The step, from 1.
  uint64_t step;
  // Gradients: finite, times grad_scale, with the sign of FORGE_RULE_MAXIMIZE.
  const float *g;
  // Weights, updated in place.
  float *w;
  // States, updated in place; NULL behind the last one.
  float *states[3];
  // Hyper-parameters, in the order of the definition.
  const double *hyper;
} forge_rule_tile;

// A rule over a tile on the CPU; 0 says success. The library calls it from several threads at once, each
// with another tile, until the process ends.
typedef int32_t (*forge_rule_function)(void *user, const forge_rule_tile *tile);

// A rule of the caller's own, element by element. Arrays beyond their counts are not read; all strings
// are copied.
//
// `cuda_source` is statements of CUDA C over one element in fp32, such as
// `momentum = beta * momentum + g; w -= lr * (momentum + weight_decay * w);`. It finds by name: `g`, the
// gradient times grad_scale; `w` and the states, to be updated; `step`, from 1, the hyper-parameters and
// the per-step values, as fp32 constants. `a * b + c` is rounded twice, as written; `fmaf` once. CUDA's
// mathematical functions are there; of the library `root(x)` and `quotient(a, b)`, which are IEEE's
// with exact fp32 factors and else within 2 ulp and cheaper. Loops count between numbers,
// `for (int i = 0; i < 8; ++i)`.
//
// `cpu_function` does the same on the CPU backend, a tile at a time.
typedef struct {
  // sizeof(forge_rule_definition).
  uint32_t struct_size;
  // At most 3.
  uint32_t n_states;
  // At least 2; with n_per_step at most 15.
  uint32_t n_hyper;
  // Values computed once for each step.
  uint32_t n_per_step;
  // An identifier of C that no other rule has.
  const char *name;
  // Identifiers of C; as in checkpoints.
  const char *state_names[3];
  // forge_state_kind of each.
  uint32_t state_kinds[3];
  // 0.
  uint32_t reserved;
  // Identifiers of C; the first two are "lr" and "weight_decay".
  const char *hyper_names[16];
  // Of each hyper-parameter.
  double hyper_defaults[16];
  // Smallest accepted values.
  double hyper_least[16];
  // Largest accepted values; those of fp32 are the limit.
  double hyper_most[16];
  // Identifiers of C.
  const char *per_step_names[16];
  // Each an expression of CUDA C in fp64 over hyper-parameters, `step` and the values before it, such
  // as `1.0 - pow(beta, step)`. On a GPU they cost a launch of some 2 microseconds for each update.
  const char *per_step_expressions[16];
  // NULL: the rule is for the CPU only.
  const char *cuda_source;
  // NULL: the rule is for GPUs only.
  forge_rule_function cpu_function;
  // First argument of `cpu_function`.
  void *cpu_user;
} forge_rule_definition;

// The scalars of a step.
typedef struct {
  // Counted from 1.
  uint64_t step;
  // Of stochastic rounding; the same on every rank.
  uint64_t seed;
  // Multiplies the gradient: clip coefficient, inverse loss scale.
  double grad_scale;
  // In the rule's order; index 0 the learning rate, 1 the weight decay.
  double hyper[16];
} forge_step_scalars;

// The scalars of a step, by value or by pointer.
typedef struct {
  // sizeof(forge_step).
  uint32_t struct_size;
  // 0.
  uint32_t reserved;
  // Used when device_scalars is NULL.
  forge_step_scalars scalars;
  // In the backend's memory, read when the work runs; NULL: use `scalars`. CUDA does not check them
  // against the rule's ranges.
  const forge_step_scalars *device_scalars;
} forge_step;

// The arrays of a parameter, of the sizes that forge_linear_layout gives; unused ones zeroed.
typedef struct {
  // sizeof(forge_parameter).
  uint32_t struct_size;
  // 0.
  uint32_t reserved;
  // The model weight.
  forge_buffer weight;
  // Master weight or lower halves.
  forge_buffer weight_extra;
  // States.
  forge_buffer states[3];
  // Scales of q8 states.
  forge_buffer scales[3];
} forge_parameter;

// What an update did.
typedef struct {
  // sizeof(forge_report).
  uint32_t struct_size;
  // 0.
  uint32_t reserved;
  // Tiles of the shard.
  uint64_t tiles;
  // Tiles whose gradient was not finite: left as they were.
  uint64_t nonfinite_tiles;
  // Σ dW² of this shard before grad_scale.
  double sum_of_squares;
} forge_report;

// A norm without a gradient.
typedef struct {
  // sizeof(forge_norm).
  uint32_t struct_size;
  // The forge_norm_method that gave it: GRAM or TILES.
  uint32_t method;
  // Σ dW² of this shard, before any scale; not finite where dW is not.
  double sum_of_squares;
  // 1 where dW is not finite.
  uint32_t nonfinite;
  // 0.
  uint32_t reserved;
} forge_norm;

// One backward. All data-parallel ranks have the same tokens. Column parallel with SP: x and dx have tokens/ranks rows; row parallel with SP: dy
// has tokens/ranks rows. dx and dbias may have data NULL: not wanted.
typedef struct {
  // sizeof(forge_backward).
  uint32_t struct_size;
  // A forge_backward_mode.
  uint32_t mode;
  // After gathering.
  uint64_t tokens;
  // [tokens, out_local].
  forge_const_buffer dy;
  // [tokens, in_local].
  forge_const_buffer x;
  // Elements from one row of dy to the next; 0: contiguous, as it must be under row parallel SP.
  uint64_t dy_stride;
  // Elements from one row of x to the next; 0: contiguous, as it must be under column parallel SP and with data
  // parallelism.
  uint64_t x_stride;
  // [tokens, in_local], contiguous, factor_dtype.
  forge_buffer dx;
  // `[out_local]`, factor_dtype.
  forge_buffer dbias;
  // forge_linear_workspace bytes. With SP, KEEP leaves the gathered factor at its start. Where factors are exchanged
  // these are there instead: X [tokens of all ranks, in_local], and from the next multiple of 256 bytes on dY [tokens of all
  // ranks, out_owned].
  forge_buffer workspace;
  // fp32 [out_owned, in_local]. ACCUMULATE adds to it; UPDATE adds it to dW and leaves it as it is
  // (data NULL: none).
  forge_buffer accumulator;
  // The parameter; KEEP and ACCUMULATE read `weight` alone, and only for dx.
  const forge_parameter *parameter;
  // Of UPDATE; else NULL.
  const forge_step *step;
  // In the backend's memory, written whole when an UPDATE runs; NULL: none.
  forge_report *device_report;
  // Of KEEP: the norm of dW, as of forge_linear_norm_async with FORGE_NORM_AUTO over these factors alone; NULL:
  // none.
  forge_norm *device_norm;
} forge_backward;

// One fused update over kept factors.
typedef struct {
  // sizeof(forge_update).
  uint32_t struct_size;
  // Of `segments`; 0 is allowed: decay and moments move as on a zero gradient.
  uint32_t n_segments;
  // In the order in which they are summed.
  const forge_segment *segments;
  // fp32 [out_owned, in_local], added to dW; data NULL: none. Without segments it is the gradient, and may
  // also be of factor_dtype: its bytes tell.
  forge_const_buffer accumulator;
  // The parameter.
  const forge_parameter *parameter;
  // Scalars.
  const forge_step *step;
  // In the backend's memory, written whole when the work runs; NULL: none.
  forge_report *device_report;
} forge_update;

// Is told of each kernel that forge_warm or forge_context_warm has made ready: `what` names it and
// `path` is its file (both valid during the call), `compiled` is 1 where it was compiled, in `seconds`, and 0
// where it was there. Called by one thread at a time, not always by the one that called FORGE.
typedef void (*forge_warm_callback)(void *user,
                                    const char *what,
                                    const char *path,
                                    uint32_t compiled,
                                    double seconds);

// What to compile ahead of time, for forge_warm and forge_context_warm.
typedef struct {
  // sizeof(forge_warm_config).
  uint32_t struct_size;
  // Multiprocessors of the GPUs, which decide on tiles; 0: as most GPUs of the architecture have (132
  // for sm_90a, an H100 or H200 SXM).
  uint32_t sm_count;
  // "sm_80", "sm_90a" and their like.
  const char *architecture;
  // As in forge_context_config. It is an error if it is refused or cannot be written.
  const char *cache_dir;
  // The linear, as for forge_linear_new. out_features and in_features both 0: any shape.
  const forge_linear_config *linear;
  // Ranks that share out W, if `linear->parallel` says that they do; 0: one. Shards of all of them are
  // compiled for.
  uint32_t ranks;
  // Segments that an update or a norm will sum; 0: any number. One segment is always compiled for.
  uint32_t micro_batches;
  // Tokens of a micro-batch, after gathering; 0: any number.
  uint64_t tokens;
  // 1: `device_scalars` will be used as well (captured graphs).
  uint32_t device_scalars;
  // Threads that compile; 0: one for each core that the process may use.
  uint32_t threads;
  // Told of each kernel, or NULL.
  forge_warm_callback progress;
  // First argument of `progress`.
  void *user;
} forge_warm_config;

// What forge_warm did.
typedef struct {
  // sizeof(forge_warm_report).
  uint32_t struct_size;
  // The version of NVRTC, 1000 · major + 10 · minor: a run finds the kernels with this version only. 0 on
  // the CPU.
  uint32_t nvrtc;
  // Kernels that were compiled.
  uint64_t compiled;
  // Kernels that were there.
  uint64_t present;
} forge_warm_report;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The ABI version of the library that is loaded; compare it with `FORGE_ABI_VERSION`.
uint32_t forge_abi_version(void);

// The library's version, as `major.minor.patch`. Static.
const char *forge_version(void);

// The communicator of a single rank, for linears that are not shared out.
//
// # Safety
// `context` is a live context, `out_comm` points to a pointer.
forge_status forge_comm_new_solo(forge_context *context, forge_comm **out_comm);

// Rank `rank` of `size`, with the caller's own collectives. The callbacks are copied and must stay
// callable until the communicator and all linears made with it are freed. They are
// given memory of the context's backend.
//
// Errors: FORGE_ERROR_RANK (`rank` is not below `size`), FORGE_ERROR_NULL (a callback other than `wait`).
//
// # Safety
// `context` is a live context, `collectives` points to a struct of its `struct_size` whose callbacks
// do what their comments say, `out_comm` points to a pointer.
forge_status forge_comm_new_host(forge_context *context,
                                 uint32_t rank,
                                 uint32_t size,
                                 const forge_host_collectives *collectives,
                                 forge_comm **out_comm);

// NCCL's version, as it counts itself: 22703 is 2.27.3. The library is that of the environment variable FORGE_NCCL,
// else the one that the process has loaded, as torch has, else the system's `libnccl.so.2`.
//
// Errors: FORGE_ERROR_NO_NCCL.
//
// # Safety
// `out_version` points to a number.
forge_status forge_nccl_version(uint32_t *out_version);

// A new id for forge_comm_new_nccl: one rank calls this and sends the 128 bytes to the others.
//
// Errors: FORGE_ERROR_NO_NCCL, FORGE_ERROR_COLLECTIVE.
//
// # Safety
// `out_id` points to 128 bytes.
forge_status forge_nccl_unique_id(uint8_t *out_id);

// A communicator of NCCL, between GPUs. All ranks call this at the same time; it returns when they have. Its
// collectives run on a stream of their own, which the backward's streams are ordered with; no call waits for
// them on the host. A rank that is lost is noticed by the next collective, or by forge_comm_check.
//
// Errors: FORGE_ERROR_NO_NCCL, FORGE_ERROR_RANK, FORGE_ERROR_COLLECTIVE (a rank did not come within the
// timeout, or NCCL's own words), FORGE_ERROR_DEVICE, FORGE_ERROR_UNSUPPORTED (the CPU's context).
//
// # Safety
// `context` is a live context, `config` points to a struct of its `struct_size`, `out_comm` to a pointer.
forge_status forge_comm_new_nccl(forge_context *context,
                                 const forge_nccl_config *config,
                                 forge_comm **out_comm);

// A communicator over an `ncclComm_t` that somebody else made, such as a framework's: no memory of its own, but
// the owner must not use it during a call, and must keep it until this one and all linears made with it are
// freed. `timeout_ms` as in forge_nccl_config.
//
// Errors: as forge_comm_new_nccl; FORGE_ERROR_NULL.
//
// # Safety
// `context` is a live context, `nccl_comm` a live communicator of its GPU, `out_comm` points to a pointer.
forge_status forge_comm_borrow_nccl(forge_context *context,
                                    void *nccl_comm,
                                    uint32_t timeout_ms,
                                    forge_comm **out_comm);

// Whether all is well with a communicator, without waiting: NCCL's failures so far, and collectives that have
// not ended within the timeout. After a failure every call that needs it fails in the same words.
//
// Errors: FORGE_ERROR_COLLECTIVE.
//
// # Safety
// `comm` is a live communicator.
forge_status forge_comm_check(const forge_comm *comm);

// What `stream` gets from now on comes after all collectives so far; on the CPU this returns when they are done.
// Before W of a data-parallel linear is read.
//
// Errors: FORGE_ERROR_COLLECTIVE, FORGE_ERROR_DEVICE.
//
// # Safety
// `comm` is a live communicator, `stream` a stream of its context's device.
forge_status forge_comm_wait(const forge_comm *comm,
                             void *stream);

// Frees a communicator; NULL is allowed. Linears made with it stay valid.
//
// # Safety
// `comm` is NULL or was made by a forge_comm_new_… function and not freed.
void forge_comm_free(forge_comm *comm);

// Makes a context. For CUDA it takes the device's primary context, which frameworks use as well. It
// starts the CPU's threads or loads the driver and NVRTC; no device memory is allocated.
//
// Errors: FORGE_ERROR_NO_BACKEND (no driver, no GPU, one too old), FORGE_ERROR_COMPILE (no NVRTC, and
// no cache that forge_warm has filled),
// FORGE_ERROR_THREADS, FORGE_ERROR_SHAPE (no device of this ordinal, more than 4096 threads). A cache
// directory that is refused is no error; a log line of level 2 says why.
//
// # Safety
// `config` points to a struct of its `struct_size` whose `cache_dir` is NULL or NUL-terminated,
// `out_context` to a pointer.
forge_status forge_context_new(const forge_context_config *config,
                               forge_context **out_context);

// Frees a context; NULL is allowed. Communicators and linears made with it stay valid. When the last
// of the context and its linears is freed, its threads have ended. Not to be called from a callback.
//
// # Safety
// `context` is NULL or was made by forge_context_new and not freed.
void forge_context_free(forge_context *context);

// Bytes of device memory that forge_context_set_workspace wants: 0 on the CPU, below 60 MiB on CUDA.
//
// # Safety
// `context` is live, `out_bytes` points to a u64.
forge_status forge_context_workspace_bytes(const forge_context *context,
                                           uint64_t *out_bytes);

// Lends the context device memory for its life and that of its linears, or until the next call of
// this function. It is scratch of the work on a stream, so only one stream at a time may have work of
// this context in it; what is enqueued already goes on to use the old one. CUDA calls that need it
// fail without. On the CPU nothing is needed and nothing happens. `workspace` is aligned to 256 bytes and
// has at least forge_context_workspace_bytes; some counters in it are cleared at once.
//
// Errors: FORGE_ERROR_BUFFER_SIZE, FORGE_ERROR_MISALIGNED, FORGE_ERROR_MEMORY (the host's).
//
// # Safety
// `context` is live; the memory has `workspace.bytes` bytes and nothing else uses it, work that is
// still enqueued included.
forge_status forge_context_set_workspace(forge_context *context,
                                         forge_buffer workspace);

// `accumulator += Σ dYᵀX` over all segments and all data-parallel ranks, for the owned rows, in panels: of the factors
// that FORGE_BACKWARD_KEEP left to the caller where dW is reduced in panels. These are of the caller's own tokens and of
// all its rows: segments here have dy [tokens, out_local].
//
// Written: `accumulator`, fp32 [out_owned, in_local], and `workspace`, of forge_linear_workspace for
// FORGE_BACKWARD_ACCUMULATE and the tokens of any segment.
//
// Errors: FORGE_ERROR_UNSUPPORTED (the linear is not data parallel), FORGE_ERROR_COLLECTIVE; as
// forge_linear_backward.
//
// # Safety
// As forge_linear_backward.
forge_status forge_linear_reduce(forge_linear *linear,
                                 const forge_segment *segments,
                                 uint32_t n_segments,
                                 forge_buffer accumulator,
                                 forge_buffer workspace,
                                 void *stream);

// Starts to gather W from the data-parallel ranks, each of which has written the rows that it owns: an import does
// not do so by itself, as an update does. forge_comm_wait comes before W is read. Nothing where one rank has all rows.
//
// Written: `weight`, of the layout's size.
//
// Errors: FORGE_ERROR_COLLECTIVE.
//
// # Safety
// As forge_linear_backward.
forge_status forge_linear_gather_weight(const forge_linear *linear,
                                        forge_buffer weight,
                                        void *stream);

// The sentence of this thread's last failed call; "" when none failed. Never NULL; valid until the
// next failure on this thread.
const char *forge_last_error(void);

// The enumerator's name, or "FORGE_UNKNOWN_STATUS". Static.
const char *forge_status_name(uint32_t status);

// Sends log lines up to `max_level` to `callback`; NULL turns them off. Replaces an earlier one;
// a call already under way on another thread may still end after this returns. `max_level` is 1 (errors)
// to 5 (traces), or 0: none.
//
// Errors: FORGE_ERROR_ENUM (a level above 5).
forge_status forge_set_log_callback(forge_log_callback callback,
                                    void *user,
                                    uint32_t max_level);

// Makes a linear. It keeps what it needs of context and communicator, which may be freed before it.
// Nothing is allocated that grows with W.
//
// Errors: FORGE_ERROR_RULE (no such rule, a flag that it does not take), FORGE_ERROR_ENUM, FORGE_ERROR_SHAPE
// (features of 0), FORGE_ERROR_OVERFLOW, FORGE_ERROR_SHARD (features that do not divide by the ranks),
// FORGE_ERROR_UNSUPPORTED (factors of another dtype; fp32_products of 16-bit factors; sequence parallelism
// without parallelism).
//
// # Safety
// `context` and `comm` are live, `config` points to a struct of its `struct_size` whose `rule` is
// NUL-terminated, `out_linear` points to a pointer.
forge_status forge_linear_new(forge_context *context,
                              forge_comm *comm,
                              const forge_linear_config *config,
                              forge_linear **out_linear);

// As forge_linear_new, of a linear whose W the ranks of `data_parallel` have as well, with other tokens. Each rank
// owns as many of its rows: it has their states, and updates them over the tokens of all; no rank ever has a whole
// gradient. `reduction` (a forge_reduction) says how dW is summed; a backward and an update start to gather W, and
// forge_comm_wait of `data_parallel` comes before W is read. Ranks make the same calls with as many tokens each; with
// FORGE_REDUCTION_PANELS their numbers of tokens may differ, and be 0.
//
// `micro_batches` is how many backwards a step has, at least 1: FORGE_REDUCTION_AUTO compares factors that are
// exchanged in each with panels that are reduced when the factors that wait outgrow the accumulator. A gradient is
// the sum over ranks: divide by their number with grad_scale where the loss is a mean.
//
// Errors: as forge_linear_new; FORGE_ERROR_SHARD (rows that do not divide by the ranks of `data_parallel`);
// FORGE_ERROR_NULL (collectives of the caller's without `all_to_all`).
//
// # Safety
// As forge_linear_new; `data_parallel` is live, and of the same context.
forge_status forge_linear_new_data_parallel(forge_context *context,
                                            forge_comm *comm,
                                            forge_comm *data_parallel,
                                            uint32_t reduction,
                                            uint32_t micro_batches,
                                            const forge_linear_config *config,
                                            forge_linear **out_linear);

// Frees a linear; NULL is allowed. The parameter's arrays are the caller's.
//
// # Safety
// `linear` is NULL or was made by forge_linear_new and not freed.
void forge_linear_free(forge_linear *linear);

// What to allocate for this rank's part of the parameter: bytes, rows, columns, dtype and alignment of each
// array, and which rows and columns of W it is.
//
// # Safety
// `linear` is live, `out` points to a struct of its `struct_size`.
forge_status forge_linear_layout(const forge_linear *linear,
                                 forge_layout *out);

// Bytes of workspace that a forge_linear_backward of this mode (a forge_backward_mode) and of this many (gathered)
// tokens needs: 0 without sequence parallelism and data parallelism. Not the context's workspace.
//
// Errors: FORGE_ERROR_OVERFLOW, FORGE_ERROR_SHARD (tokens that do not divide by the ranks).
//
// # Safety
// `linear` is live, `out_bytes` points to a u64.
forge_status forge_linear_workspace(const forge_linear *linear,
                                    uint32_t mode,
                                    uint64_t tokens,
                                    uint64_t *out_bytes);

// Chooses a schedule by predicted bytes, or checks the one asked for, and says why.
//
// Errors: FORGE_ERROR_UNSUPPORTED (`immediate` where it is not possible; the message has the way out).
//
// # Safety
// `linear` is live, `request` and `out` point to structs of their `struct_size`.
forge_status forge_linear_plan(const forge_linear *linear,
                               const forge_plan_request *request,
                               forge_plan *out);

// How many rules there are: those of this build, then those of forge_rule_register.
uint32_t forge_rule_count(void);

// The rule of this index, from 0, with all states that some flags need.
//
// Errors: FORGE_ERROR_RULE (an index that is not below forge_rule_count).
//
// # Safety
// `out` points to a struct of its `struct_size`.
forge_status forge_rule_get(uint32_t index, forge_rule_info *out);

// The rule of this name, with the states that these flags need.
//
// Errors: FORGE_ERROR_RULE (no such rule, a flag that it does not take).
//
// # Safety
// `name` is NUL-terminated, `out` points to a struct of its `struct_size`.
forge_status forge_rule_find(const char *name, uint32_t rule_flags, forge_rule_info *out);

// Makes a rule of the caller's own known by its name, for the life of the process; `rule` of a
// forge_linear_config may name it then. To define the same rule again changes nothing. CUDA source is
// compiled when the first linear is made with it on a GPU, which reports errors in it.
//
// # Safety
// `definition` points to a struct of its `struct_size` whose strings are NULL or NUL-terminated;
// `cpu_function` stays callable, reads and writes `count` elements of each array that it is given, and
// nothing else of the library's.
forge_status forge_rule_register(const forge_rule_definition *definition);

// The gradient norm and what to multiply gradients by: `norm = grad_scale · √sum_of_squares`,
// `coefficient = grad_scale · min(1, max_norm / (norm + 1e-6))`, as torch's clip_grad_norm_ and
// Megatron-LM have it. `max_norm <= 0`: no clipping. A sum that is not finite gives that norm and a
// coefficient of 0: skip the step. `sum_of_squares` is the sum over all layers and ranks, `grad_scale` what
// gradients are multiplied by anyway (an inverse loss scale, or 1).
//
// Errors: FORGE_ERROR_SCALAR (a negative sum, a scale that is not finite, a `max_norm` of NaN).
//
// # Safety
// `out_norm` and `out_coefficient` point to doubles.
forge_status forge_clip_coefficient(double sum_of_squares,
                                    double grad_scale,
                                    double max_norm,
                                    double *out_norm,
                                    double *out_coefficient);

// Checks the scalars of a step against the rule's ranges and does nothing else: before the first of
// many updates, so that a bad scalar is found while no weight has moved. Of CUDA's `device_scalars` only the
// address is checked.
//
// Errors: FORGE_ERROR_SCALAR.
//
// # Safety
// `linear` is live, `step` points to a struct of its `struct_size`.
forge_status forge_linear_check_step(const forge_linear *linear,
                                     const forge_step *step);

// A whole backward: communication, dX, dbias, and what the mode says of dW. dX is computed with W as
// it was before the update. If a collective fails before the update, W is unchanged; a failure of
// the last wait is reported after it. `report` may be NULL; where it is not, CUDA waits for the
// stream (`backward->device_report` needs no wait).
//
// Written: `dx`, `dbias`, `workspace`, and by mode weight, `weight_extra`, states and scales (UPDATE),
// `accumulator` (ACCUMULATE) or `device_norm` (KEEP).
//
// Errors: FORGE_ERROR_COLLECTIVE; for CUDA FORGE_ERROR_DEVICE, FORGE_ERROR_COMPILE, FORGE_ERROR_WORKSPACE; those
// of the 1xx band about the argument that the message names, before anything is written.
//
// # Safety
// `linear` is live, structs have their `struct_size`, buffers have the sizes that they say.
forge_status forge_linear_backward(forge_linear *linear,
                                   const forge_backward *backward,
                                   forge_report *report,
                                   void *stream);

// `dx = dy · W`, without communication: dy [tokens, out_local] with rows `dy_stride` elements apart (0:
// contiguous), dx [tokens, in_local] contiguous, both of factor_dtype. Of `parameter` only `weight` is read.
//
// # Safety
// As forge_linear_backward.
forge_status forge_linear_dgrad(forge_linear *linear,
                                uint64_t tokens,
                                forge_const_buffer dy,
                                uint64_t dy_stride,
                                const forge_parameter *parameter,
                                forge_buffer dx,
                                void *stream);

// The fused update over the tokens of all segments. `report` may be NULL; where it is not, CUDA waits
// for the stream (`update->device_report` needs no wait). Tiles whose gradient is not finite are left as
// they were and counted.
//
// Written: weight, `weight_extra`, states and scales of `update->parameter`.
//
// # Safety
// As forge_linear_backward.
forge_status forge_linear_update(forge_linear *linear,
                                 const forge_update *update,
                                 forge_report *report,
                                 void *stream);

// `accumulator += Σ dYᵀX` over all segments; fp32 [out_owned, in_local]. The caller zeroes it before a step's
// first micro-batch.
//
// # Safety
// As forge_linear_backward.
forge_status forge_linear_accumulate(forge_linear *linear,
                                     const forge_segment *segments,
                                     uint32_t n_segments,
                                     forge_buffer accumulator,
                                     void *stream);

// `‖Σ dYᵀX (+ accumulator)‖²` of this shard, without storing dW. The method asked for is a wish: with
// an accumulator, or where Gram sums would cancel or overflow, tiles are taken; `out->method` tells. The
// accumulator is as in forge_update.
// On CUDA this waits for the stream; see forge_linear_norm_async.
//
// # Safety
// As forge_linear_backward; `out` points to a struct of its `struct_size`.
forge_status forge_linear_norm(forge_linear *linear,
                               const forge_segment *segments,
                               uint32_t n_segments,
                               forge_const_buffer accumulator,
                               uint32_t method,
                               forge_norm *out,
                               void *stream);

// As forge_linear_norm, with the result in the backend's memory, written whole when the work runs:
// the host does not wait.
//
// # Safety
// As forge_linear_backward; `device_out` is writable in the backend's memory until the work is done.
forge_status forge_linear_norm_async(forge_linear *linear,
                                     const forge_segment *segments,
                                     uint32_t n_segments,
                                     forge_const_buffer accumulator,
                                     uint32_t method,
                                     forge_norm *device_out,
                                     void *stream);

// Writes the master weight as fp32 [out_owned, in_local].
//
// # Safety
// As forge_linear_backward.
forge_status forge_linear_export_weight(const forge_linear *linear,
                                        const forge_parameter *parameter,
                                        forge_buffer fp32,
                                        void *stream);

// Reads the master weight from fp32 [out_owned, in_local], rounding to nearest.
//
// # Safety
// As forge_linear_backward.
forge_status forge_linear_import_weight(const forge_linear *linear,
                                        const forge_parameter *parameter,
                                        forge_const_buffer fp32,
                                        void *stream);

// Writes state `index` as fp32 [out_owned, in_local].
//
// # Safety
// As forge_linear_backward.
forge_status forge_linear_export_state(const forge_linear *linear,
                                       const forge_parameter *parameter,
                                       uint32_t index,
                                       forge_buffer fp32,
                                       void *stream);

// Reads state `index` from fp32 [out_owned, in_local], rounding to nearest.
//
// # Safety
// As forge_linear_backward.
forge_status forge_linear_import_state(const forge_linear *linear,
                                       const forge_parameter *parameter,
                                       uint32_t index,
                                       forge_const_buffer fp32,
                                       void *stream);

// forge_linear_update of several linears of one context, `updates[i]` of `linears[i]`, without waiting:
// reports go to `device_report` alone. Many small weights leave most of a GPU idle one by one; here those with
// the same formats, rule and scalars share launches. All updates are checked before the first of them begins,
// and none may write what another one reads or writes. `count` may be 0.
//
// A weight that shares a launch may get other bits than from forge_linear_update on GPUs of compute capability
// 9.0, which have a kernel of their own for one weight; the same calls always give the same bits.
//
// Written: weight, `weight_extra`, states and scales of each `updates[i]->parameter`.
//
// Errors: as forge_linear_update, with `updates[i]` in the message; FORGE_ERROR_UNSUPPORTED (linears of
// different contexts). Those of a device, and of a rule's own function, may leave some updates done and the
// others not, and reports unwritten.
//
// # Safety
// As forge_linear_backward, of each; `linears` and `updates` have `count` elements.
forge_status forge_linear_update_group(forge_linear *const *linears,
                                       const forge_update *const *updates,
                                       uint32_t count,
                                       void *stream);

// Compiles the kernels that a linear will need into a directory, for a GPU that need not be here: on a
// login node, for an air-gapped cluster. `config->architecture` must be set. What is there already is
// left; what is damaged is made again. Several processes may fill one directory at once.
//
// A run finds what it needs if it has the same version of this library, the same version of NVRTC
// (`out->nvrtc`) or none at all, and is given the same directory or a copy of it. What the description leaves open (features, tokens
// or micro-batches of 0) is compiled for all of its values.
//
// Errors: FORGE_ERROR_COMPILE (no NVRTC, or one that does not know the architecture),
// FORGE_ERROR_CACHE (a directory that is refused or cannot be written, a full disk),
// FORGE_ERROR_UNSUPPORTED (no such architecture, or one below sm_80), those of forge_linear_new.
//
// # Safety
// `config` points to a struct of its `struct_size` whose strings are NULL or NUL-terminated and whose
// `linear` points to a struct of its `struct_size`; `progress` may be called with `user` during the
// call; `out` points to a struct of its `struct_size`.
forge_status forge_warm(const forge_warm_config *config,
                        forge_warm_report *out);

// As forge_warm, for the context's own GPU and into its cache directory: before the first step, so that
// this does not wait for a compiler. `config->architecture` and `cache_dir` must be NULL and `sm_count`
// 0, the context has its own. On the CPU there is nothing to compile and the report is zeros.
//
// # Safety
// `context` is live; otherwise as forge_warm.
forge_status forge_context_warm(forge_context *context,
                                const forge_warm_config *config,
                                forge_warm_report *out);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* FORGE_H */
