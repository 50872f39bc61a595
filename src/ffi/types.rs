//! The structs of the C ABI. Those that may grow start with `struct_size = sizeof(the struct)`.

use super::boundary::Sized32;
use super::warm::forge_warm_callback;
use std::ffi::{c_char, c_void};

macro_rules! sized {
    ($($name:ty),*) => { $(
        // SAFETY: repr(C), Copy, and `struct_size: u32` is the first field.
        unsafe impl Sized32 for $name {}
    )* };
}
sized!(
    forge_context_config,
    forge_rule_info,
    forge_rule_definition,
    forge_host_collectives,
    forge_nccl_config,
    forge_linear_config,
    forge_layout,
    forge_parameter,
    forge_step,
    forge_report,
    forge_backward,
    forge_update,
    forge_norm,
    forge_plan_request,
    forge_plan,
    forge_warm_config,
    forge_warm_report
);

/// Memory that FORGE may write: of the context's backend, allocated by the caller.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_buffer {
    /// First byte, aligned to the element.
    pub data: *mut c_void,
    /// Exact size in bytes (workspaces: at least).
    pub bytes: u64,
}

/// Memory that FORGE only reads.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_const_buffer {
    /// First byte, aligned to the element.
    pub data: *const c_void,
    /// Size in bytes, at least what shape and stride need.
    pub bytes: u64,
}

/// What a context is made of.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_context_config {
    /// sizeof(forge_context_config).
    pub struct_size: u32,
    /// A forge_backend.
    pub backend: u32,
    /// Index of the GPU, as CUDA counts; 0 for the CPU.
    pub device: i32,
    /// Threads of the CPU backend; 0: one for each core that the process may use.
    pub threads: u32,
    /// CUDA: directory of compiled kernels, copied; made if it is not there. NULL: `$FORGE_CACHE_DIR`,
    /// else `$XDG_CACHE_HOME/forge`, else `~/.cache/forge`.
    pub cache_dir: *const c_char,
}

/// What a rule is.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_rule_info {
    /// sizeof(forge_rule_info).
    pub struct_size: u32,
    /// States with the flags asked for (forge_rule_get: with all).
    pub n_states: u32,
    /// Hyper-parameters.
    pub n_hyper: u32,
    /// Flags that the rule takes.
    pub allowed_flags: u32,
    /// Static.
    pub name: *const c_char,
    /// Static, n_states of them.
    pub state_names: [*const c_char; 3],
    /// Static, n_hyper of them.
    pub hyper_names: [*const c_char; 16],
    /// n_hyper of them.
    pub hyper_defaults: [f64; 16],
}

/// A rule of the caller's own, element by element. Arrays beyond their counts are not read; all strings
/// are copied.
///
/// `cuda_source` is statements of CUDA C over one element in fp32, such as
/// `momentum = beta * momentum + g; w -= lr * (momentum + weight_decay * w);`. It finds by name: `g`, the
/// gradient times grad_scale; `w` and the states, to be updated; `step`, from 1, the hyper-parameters and
/// the per-step values, as fp32 constants. `a * b + c` is rounded twice, as written; `fmaf` once. CUDA's
/// mathematical functions are there; of the library `root(x)` and `quotient(a, b)`, which are IEEE's
/// with exact fp32 factors and else within 2 ulp and cheaper. Loops count between numbers,
/// `for (int i = 0; i < 8; ++i)`.
///
/// `cpu_function` does the same on the CPU backend, a tile at a time.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_rule_definition {
    /// sizeof(forge_rule_definition).
    pub struct_size: u32,
    /// At most 3.
    pub n_states: u32,
    /// At least 2; with n_per_step at most 15.
    pub n_hyper: u32,
    /// Values computed once for each step.
    pub n_per_step: u32,
    /// An identifier of C that no other rule has.
    pub name: *const c_char,
    /// Identifiers of C; as in checkpoints.
    pub state_names: [*const c_char; 3],
    /// forge_state_kind of each.
    pub state_kinds: [u32; 3],
    /// 0.
    pub reserved: u32,
    /// Identifiers of C; the first two are "lr" and "weight_decay".
    pub hyper_names: [*const c_char; 16],
    /// Of each hyper-parameter.
    pub hyper_defaults: [f64; 16],
    /// Smallest accepted values.
    pub hyper_least: [f64; 16],
    /// Largest accepted values; those of fp32 are the limit.
    pub hyper_most: [f64; 16],
    /// Identifiers of C.
    pub per_step_names: [*const c_char; 16],
    /// Each an expression of CUDA C in fp64 over hyper-parameters, `step` and the values before it, such
    /// as `1.0 - pow(beta, step)`. On a GPU they cost a launch of some 2 microseconds for each update.
    pub per_step_expressions: [*const c_char; 16],
    /// NULL: the rule is for the CPU only.
    pub cuda_source: *const c_char,
    /// NULL: the rule is for GPUs only.
    pub cpu_function: forge_rule_function,
    /// First argument of `cpu_function`.
    pub cpu_user: *mut c_void,
}

/// A rule over a tile on the CPU; 0 says success. The library calls it from several threads at once, each
/// with another tile, until the process ends.
pub type forge_rule_function =
    Option<unsafe extern "C" fn(user: *mut c_void, tile: *const forge_rule_tile) -> i32>;

pub use crate::rule::user::forge_rule_tile;

/// The caller's own collectives. Counts are in elements of `dtype` (a forge_dtype); 0 says success.
/// A callback may start the operation and return: `wait` returns when all that was started is done.
/// Called from the thread that calls FORGE.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_host_collectives {
    /// sizeof(forge_host_collectives).
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// First argument of every callback.
    pub user: *mut c_void,
    /// recv = every rank's send, in order of rank. Of a data-parallel linear's W send is this rank's part of recv.
    pub all_gather: Option<
        unsafe extern "C" fn(
            user: *mut c_void,
            send: *const c_void,
            recv: *mut c_void,
            send_count: u64,
            dtype: u32,
        ) -> i32,
    >,
    /// recv = this rank's part of the sum of every rank's send.
    pub reduce_scatter: Option<
        unsafe extern "C" fn(
            user: *mut c_void,
            send: *const c_void,
            recv: *mut c_void,
            recv_count: u64,
            dtype: u32,
        ) -> i32,
    >,
    /// buffer = the sum of every rank's.
    pub all_reduce: Option<
        unsafe extern "C" fn(user: *mut c_void, buffer: *mut c_void, count: u64, dtype: u32) -> i32,
    >,
    /// May be NULL where the others return only when they are done.
    pub wait: Option<unsafe extern "C" fn(user: *mut c_void) -> i32>,
    /// recv = of every rank's send, in order of rank, the part that is for this one; send has a part of `count`
    /// for each. NULL where no linear is data parallel.
    pub all_to_all: Option<
        unsafe extern "C" fn(
            user: *mut c_void,
            send: *const c_void,
            recv: *mut c_void,
            count: u64,
            dtype: u32,
        ) -> i32,
    >,
}

/// What a linear is made of: Y[tokens, out] = X[tokens, in] · W[out, in]ᵀ.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_linear_config {
    /// sizeof(forge_linear_config).
    pub struct_size: u32,
    /// A forge_dtype: F32, BF16 or F16; of X, dY, dX and dbias.
    pub factor_dtype: u32,
    /// Of the whole W.
    pub out_features: u64,
    /// Of the whole W.
    pub in_features: u64,
    /// A forge_parallel: which dimension of W the communicator's ranks share out.
    pub parallel: u32,
    /// 1: tokens are shared out between the layers.
    pub sequence_parallel: u32,
    /// 1: column parallel without SP all-reduces dX.
    pub reduce_dgrad: u32,
    /// A forge_weight_format.
    pub weight_format: u32,
    /// A forge_rounding, of FORGE_WEIGHT_BF16.
    pub weight_rounding: u32,
    /// A forge_rounding, of bf16 and q8 states.
    pub state_rounding: u32,
    /// A forge_state_format for each state; those the rule lacks are ignored.
    pub state_formats: [u32; 3],
    /// FORGE_RULE_… bits.
    pub rule_flags: u32,
    /// Unique among the run's parameters, and the same on every rank: it picks the random numbers.
    pub parameter_id: u32,
    /// A forge_fp32_products, of fp32 factors; 0 with others.
    pub fp32_products: u32,
    /// A rule's name, copied.
    pub rule: *const c_char,
}

/// One array to allocate.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct forge_array_layout {
    /// Exact size; 0: no such array.
    pub bytes: u64,
    /// Rows, contiguous.
    pub rows: u64,
    /// Columns.
    pub cols: u64,
    /// A forge_dtype.
    pub dtype: u32,
    /// Of the first byte.
    pub alignment: u32,
}

/// All arrays of this rank's part of a parameter. States and scales must be zero before first use.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_layout {
    /// sizeof(forge_layout).
    pub struct_size: u32,
    /// States that the rule has.
    pub n_states: u32,
    /// Rows of W here.
    pub out_local: u64,
    /// Columns of W here.
    pub in_local: u64,
    /// First row of W here.
    pub row_offset: u64,
    /// First column of W here.
    pub col_offset: u64,
    /// Rows of W that this rank updates: all that it has, but for data parallelism, where `weight_extra`, states,
    /// scales and accumulator are of these rows alone.
    pub out_owned: u64,
    /// First of them among the rows here.
    pub owned_offset: u64,
    /// The model weight, [out_local, in_local].
    pub weight: forge_array_layout,
    /// Master weight or lower halves.
    pub weight_extra: forge_array_layout,
    /// States.
    pub states: [forge_array_layout; 3],
    /// Scales of q8 states, [ceil(in_local / 128), out_owned].
    pub scales: [forge_array_layout; 3],
    /// Buffer of the schedule `accumulate`.
    pub accumulator: forge_array_layout,
}

/// The arrays of a parameter, of the sizes that forge_linear_layout gives; unused ones zeroed.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_parameter {
    /// sizeof(forge_parameter).
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// The model weight.
    pub weight: forge_buffer,
    /// Master weight or lower halves.
    pub weight_extra: forge_buffer,
    /// States.
    pub states: [forge_buffer; 3],
    /// Scales of q8 states.
    pub scales: [forge_buffer; 3],
}

/// The factors of one micro-batch, as the owned rows of W need them: after gathering, and where the linear is data
/// parallel after the exchange, of the tokens of all its ranks.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_segment {
    /// [tokens, out_owned].
    pub dy: forge_const_buffer,
    /// [tokens, in_local].
    pub x: forge_const_buffer,
    /// Rows of both.
    pub tokens: u64,
    /// Elements from one row of dy to the next; 0: contiguous.
    pub dy_stride: u64,
    /// Elements from one row of x to the next; 0: contiguous.
    pub x_stride: u64,
}

/// The scalars of a step.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_step_scalars {
    /// Counted from 1.
    pub step: u64,
    /// Of stochastic rounding; the same on every rank.
    pub seed: u64,
    /// Multiplies the gradient: clip coefficient, inverse loss scale.
    pub grad_scale: f64,
    /// In the rule's order; index 0 the learning rate, 1 the weight decay.
    pub hyper: [f64; 16],
}

/// The scalars of a step, by value or by pointer.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_step {
    /// sizeof(forge_step).
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// Used when device_scalars is NULL.
    pub scalars: forge_step_scalars,
    /// In the backend's memory, read when the work runs; NULL: use `scalars`. CUDA does not check them
    /// against the rule's ranges.
    pub device_scalars: *const forge_step_scalars,
}

/// What an update did.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_report {
    /// sizeof(forge_report).
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// Tiles of the shard.
    pub tiles: u64,
    /// Tiles whose gradient was not finite: left as they were.
    pub nonfinite_tiles: u64,
    /// Σ dW² of this shard before grad_scale.
    pub sum_of_squares: f64,
}

/// A rank of a new NCCL communicator.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_nccl_config {
    /// sizeof(forge_nccl_config).
    pub struct_size: u32,
    /// This rank, below `size`.
    pub rank: u32,
    /// Ranks, each with the same `id`.
    pub size: u32,
    /// After which a collective, or the making of the communicator, has failed; 0: 600,000.
    pub timeout_ms: u32,
    /// Of forge_nccl_unique_id, which one rank calls and sends to the others.
    pub id: [u8; 128],
}

/// One backward. All data-parallel ranks have the same tokens. Column parallel with SP: x and dx have tokens/ranks rows; row parallel with SP: dy
/// has tokens/ranks rows. dx and dbias may have data NULL: not wanted.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_backward {
    /// sizeof(forge_backward).
    pub struct_size: u32,
    /// A forge_backward_mode.
    pub mode: u32,
    /// After gathering.
    pub tokens: u64,
    /// [tokens, out_local].
    pub dy: forge_const_buffer,
    /// [tokens, in_local].
    pub x: forge_const_buffer,
    /// Elements from one row of dy to the next; 0: contiguous, as it must be under row parallel SP.
    pub dy_stride: u64,
    /// Elements from one row of x to the next; 0: contiguous, as it must be under column parallel SP and with data
    /// parallelism.
    pub x_stride: u64,
    /// [tokens, in_local], contiguous, factor_dtype.
    pub dx: forge_buffer,
    /// `[out_local]`, factor_dtype.
    pub dbias: forge_buffer,
    /// forge_linear_workspace bytes. With SP, KEEP leaves the gathered factor at its start. Where factors are exchanged
    /// these are there instead: X [tokens of all ranks, in_local], and from the next multiple of 256 bytes on dY [tokens of all
    /// ranks, out_owned].
    pub workspace: forge_buffer,
    /// fp32 [out_owned, in_local]. ACCUMULATE adds to it; UPDATE adds it to dW and leaves it as it is
    /// (data NULL: none).
    pub accumulator: forge_buffer,
    /// The parameter; KEEP and ACCUMULATE read `weight` alone, and only for dx.
    pub parameter: *const forge_parameter,
    /// Of UPDATE; else NULL.
    pub step: *const forge_step,
    /// In the backend's memory, written whole when an UPDATE runs; NULL: none.
    pub device_report: *mut forge_report,
    /// Of KEEP: the norm of dW, as of forge_linear_norm_async with FORGE_NORM_AUTO over these factors alone; NULL:
    /// none.
    pub device_norm: *mut forge_norm,
}

/// One fused update over kept factors.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_update {
    /// sizeof(forge_update).
    pub struct_size: u32,
    /// Of `segments`; 0 is allowed: decay and moments move as on a zero gradient.
    pub n_segments: u32,
    /// In the order in which they are summed.
    pub segments: *const forge_segment,
    /// fp32 [out_owned, in_local], added to dW; data NULL: none. Without segments it is the gradient, and may
    /// also be of factor_dtype: its bytes tell.
    pub accumulator: forge_const_buffer,
    /// The parameter.
    pub parameter: *const forge_parameter,
    /// Scalars.
    pub step: *const forge_step,
    /// In the backend's memory, written whole when the work runs; NULL: none.
    pub device_report: *mut forge_report,
}

/// A norm without a gradient.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_norm {
    /// sizeof(forge_norm).
    pub struct_size: u32,
    /// The forge_norm_method that gave it: GRAM or TILES.
    pub method: u32,
    /// Σ dW² of this shard, before any scale; not finite where dW is not.
    pub sum_of_squares: f64,
    /// 1 where dW is not finite.
    pub nonfinite: u32,
    /// 0.
    pub reserved: u32,
}

/// What a step looks like, for forge_linear_plan.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_plan_request {
    /// sizeof(forge_plan_request).
    pub struct_size: u32,
    /// A forge_schedule: AUTO, or the one asked for.
    pub schedule: u32,
    /// After gathering.
    pub tokens_per_micro_batch: u64,
    /// In a step.
    pub micro_batches: u32,
    /// 1: the update waits for all gradients (clipping, all-or-nothing check).
    pub needs_norm: u32,
}

/// A schedule and its cost.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_plan {
    /// sizeof(forge_plan).
    pub struct_size: u32,
    /// A forge_schedule, never AUTO.
    pub schedule: u32,
    /// Kept from backward to step.
    pub factor_bytes: u64,
    /// Of the accumulator.
    pub accumulator_bytes: u64,
    /// What a stock fp32 gradient of the owned rows takes.
    pub gradient_bytes: u64,
    /// Received in a step to sum dW over data-parallel ranks; W is gathered besides.
    pub wire_bytes: u64,
    /// A forge_reduction, AUTO where nothing is summed.
    pub reduction: u32,
    /// 0.
    pub reserved: u32,
    /// One sentence, NUL-terminated.
    pub reason: [c_char; 256],
}

/// What to compile ahead of time, for forge_warm and forge_context_warm.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_warm_config {
    /// sizeof(forge_warm_config).
    pub struct_size: u32,
    /// Multiprocessors of the GPUs, which decide on tiles; 0: as most GPUs of the architecture have (132
    /// for sm_90a, an H100 or H200 SXM).
    pub sm_count: u32,
    /// "sm_80", "sm_90a" and their like.
    pub architecture: *const c_char,
    /// As in forge_context_config. It is an error if it is refused or cannot be written.
    pub cache_dir: *const c_char,
    /// The linear, as for forge_linear_new. out_features and in_features both 0: any shape.
    pub linear: *const forge_linear_config,
    /// Ranks that share out W, if `linear->parallel` says that they do; 0: one. Shards of all of them are
    /// compiled for.
    pub ranks: u32,
    /// Segments that an update or a norm will sum; 0: any number. One segment is always compiled for.
    pub micro_batches: u32,
    /// Tokens of a micro-batch, after gathering; 0: any number.
    pub tokens: u64,
    /// 1: `device_scalars` will be used as well (captured graphs).
    pub device_scalars: u32,
    /// Threads that compile; 0: one for each core that the process may use.
    pub threads: u32,
    /// Told of each kernel, or NULL.
    pub progress: forge_warm_callback,
    /// First argument of `progress`.
    pub user: *mut c_void,
}

/// What forge_warm did.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct forge_warm_report {
    /// sizeof(forge_warm_report).
    pub struct_size: u32,
    /// The version of NVRTC, 1000 · major + 10 · minor: a run finds the kernels with this version only. 0 on
    /// the CPU.
    pub nvrtc: u32,
    /// Kernels that were compiled.
    pub compiled: u64,
    /// Kernels that were there.
    pub present: u64,
}
