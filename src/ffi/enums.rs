//! C enums: named for C, received as numbers, so that an unknown one is an error and not undefined.

use crate::backend::{Fp32Products, NormMethod};
use crate::error::{Result, bail};
use crate::format::{Dtype, Rounding, StateFormat, StateKind, WeightFormat};
use crate::linear::{Parallel, Reduction, Schedule};

/// Defines the conversion of a number to the type that the library uses. (The enums themselves are
/// spelled out because cbindgen, which makes the header, sees no macros.)
macro_rules! convert {
    (fn $convert:ident($name:ident) -> $target:ty { $($variant:ident => $to:expr,)* }) => {
        pub(super) fn $convert(argument: &str, value: u32) -> Result<$target> {
            $(if value == $name::$variant as u32 {
                return Ok($to);
            })*
            let known: Vec<String> =
                [$($name::$variant),*].map(|v| format!("{v:?} = {}", v as u32)).into();
            bail!(
                FORGE_ERROR_ENUM,
                "{argument}: {value} is not a {}; known: {}",
                stringify!($name),
                known.join(", ")
            )
        }
    };
}

/// Where a context computes.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum forge_backend {
    /// The CPU's cores.
    FORGE_BACKEND_CPU = 0,
    /// An NVIDIA GPU, by the driver's own API; needs NVRTC at run time.
    FORGE_BACKEND_CUDA = 1,
}

convert!(fn backend(forge_backend) -> forge_backend {
    FORGE_BACKEND_CPU => forge_backend::FORGE_BACKEND_CPU,
    FORGE_BACKEND_CUDA => forge_backend::FORGE_BACKEND_CUDA,
});
/// Element types.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum forge_dtype {
    /// No array.
    FORGE_DTYPE_NONE = 0,
    /// 32-bit float.
    FORGE_DTYPE_F32 = 1,
    /// bfloat16.
    FORGE_DTYPE_BF16 = 2,
    /// 16-bit IEEE float.
    FORGE_DTYPE_F16 = 3,
    /// Unsigned byte.
    FORGE_DTYPE_U8 = 4,
    /// Unsigned 16-bit integer.
    FORGE_DTYPE_U16 = 5,
}

convert!(fn dtype(forge_dtype) -> Option<Dtype> {
    FORGE_DTYPE_NONE => None,
    FORGE_DTYPE_F32 => Some(Dtype::F32),
    FORGE_DTYPE_BF16 => Some(Dtype::Bf16),
    FORGE_DTYPE_F16 => Some(Dtype::F16),
    FORGE_DTYPE_U8 => Some(Dtype::U8),
    FORGE_DTYPE_U16 => Some(Dtype::U16),
});
/// How dW is summed over data-parallel ranks.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum forge_reduction {
    /// In a request: by the one that moves fewer bytes, which depends on the tokens. In a plan: nothing is summed.
    FORGE_REDUCTION_AUTO = 0,
    /// X is gathered, dY is sent to the owners of its columns; the kernel sums over the tokens of all ranks.
    FORGE_REDUCTION_EXCHANGE = 1,
    /// Row panels of dW, fp32, are reduced and scattered.
    FORGE_REDUCTION_PANELS = 2,
}

convert!(fn reduction(forge_reduction) -> Reduction {
    FORGE_REDUCTION_AUTO => Reduction::Auto,
    FORGE_REDUCTION_EXCHANGE => Reduction::Exchange,
    FORGE_REDUCTION_PANELS => Reduction::Panels,
});
/// How a weight is stored.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum forge_weight_format {
    /// fp32, exact.
    FORGE_WEIGHT_F32 = 0,
    /// bf16, rounded at every update.
    FORGE_WEIGHT_BF16 = 1,
    /// bf16, and an fp32 master in `weight_extra`.
    FORGE_WEIGHT_BF16_F32 = 2,
    /// bf16, and the 16 bits below it in `weight_extra`: together an fp32 master.
    FORGE_WEIGHT_BF16_16 = 3,
}

convert!(fn weight_format(forge_weight_format) -> WeightFormat {
    FORGE_WEIGHT_F32 => WeightFormat::F32,
    FORGE_WEIGHT_BF16 => WeightFormat::Bf16,
    FORGE_WEIGHT_BF16_F32 => WeightFormat::Bf16F32,
    FORGE_WEIGHT_BF16_16 => WeightFormat::Bf16Low16,
});
/// How a state is stored.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum forge_state_format {
    /// fp32, exact.
    FORGE_STATE_F32 = 0,
    /// bf16.
    FORGE_STATE_BF16 = 1,
    /// 8 bits and an fp32 scale for each 1×128 block.
    FORGE_STATE_Q8 = 2,
}

convert!(fn state_format(forge_state_format) -> StateFormat {
    FORGE_STATE_F32 => StateFormat::F32,
    FORGE_STATE_BF16 => StateFormat::Bf16,
    FORGE_STATE_Q8 => StateFormat::Q8,
});
/// What 8-bit codes may assume of a state.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum forge_state_kind {
    /// Either sign: codes are spaced closer near zero.
    FORGE_STATE_SIGNED = 0,
    /// Never negative, such as an average of squares: its root is stored.
    FORGE_STATE_NON_NEGATIVE = 1,
}

convert!(fn state_kind(forge_state_kind) -> StateKind {
    FORGE_STATE_SIGNED => StateKind::Signed,
    FORGE_STATE_NON_NEGATIVE => StateKind::NonNegative,
});
/// How a value is rounded into its format.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum forge_rounding {
    /// To the nearest.
    FORGE_ROUNDING_NEAREST = 0,
    /// Up or down by chance, with an exact mean.
    FORGE_ROUNDING_STOCHASTIC = 1,
}

convert!(fn rounding(forge_rounding) -> Rounding {
    FORGE_ROUNDING_NEAREST => Rounding::Nearest,
    FORGE_ROUNDING_STOCHASTIC => Rounding::Stochastic,
});
/// How a GPU multiplies fp32 factors for dW. The CPU's products are exact either way.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum forge_fp32_products {
    /// By fp32 fma, with one accumulator for each element and IEEE arithmetic in the rule: the bits of the
    /// CPU backend.
    FORGE_FP32_EXACT = 0,
    /// By tensor cores, about three times as fast: each factor is split into two bf16, and of their four
    /// products three are summed in fp32. What is left out of a product is at most 3·2⁻¹⁶ of it. Factors
    /// beyond 3.396e38 count as infinite. Factors whose address or rows are no multiples of 16 bytes, and
    /// more than 32 segments, are multiplied exactly all the same.
    FORGE_FP32_BF16X3 = 1,
}

convert!(fn fp32_products(forge_fp32_products) -> Fp32Products {
    FORGE_FP32_EXACT => Fp32Products::Exact,
    FORGE_FP32_BF16X3 => Fp32Products::Bf16x3,
});
/// Which dimension of W the ranks share out.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum forge_parallel {
    /// Neither.
    FORGE_PARALLEL_NONE = 0,
    /// out features.
    FORGE_PARALLEL_COLUMN = 1,
    /// in features.
    FORGE_PARALLEL_ROW = 2,
}

convert!(fn parallel(forge_parallel) -> Parallel {
    FORGE_PARALLEL_NONE => Parallel::None,
    FORGE_PARALLEL_COLUMN => Parallel::Column,
    FORGE_PARALLEL_ROW => Parallel::Row,
});
/// What a backward does with dW.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum forge_backward_mode {
    /// The fused update.
    FORGE_BACKWARD_UPDATE = 0,
    /// Add it to the accumulator.
    FORGE_BACKWARD_ACCUMULATE = 1,
    /// Nothing: the caller keeps the factors.
    FORGE_BACKWARD_KEEP = 2,
}

convert!(fn backward_mode(forge_backward_mode) -> forge_backward_mode {
    FORGE_BACKWARD_UPDATE => forge_backward_mode::FORGE_BACKWARD_UPDATE,
    FORGE_BACKWARD_ACCUMULATE => forge_backward_mode::FORGE_BACKWARD_ACCUMULATE,
    FORGE_BACKWARD_KEEP => forge_backward_mode::FORGE_BACKWARD_KEEP,
});
/// How a norm is computed.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum forge_norm_method {
    /// The cheaper one that is accurate.
    FORGE_NORM_AUTO = 0,
    /// Gram matrices of the factors, unless digits cancel: then tiles.
    FORGE_NORM_GRAM = 1,
    /// Squares of tiles of dW that are then discarded.
    FORGE_NORM_TILES = 2,
}

convert!(fn norm_method(forge_norm_method) -> NormMethod {
    FORGE_NORM_AUTO => NormMethod::Auto,
    FORGE_NORM_GRAM => NormMethod::Gram,
    FORGE_NORM_TILES => NormMethod::Tiles,
});
/// When the update happens.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum forge_schedule {
    /// Chosen by predicted bytes.
    FORGE_SCHEDULE_AUTO = 0,
    /// Inside the backward.
    FORGE_SCHEDULE_IMMEDIATE = 1,
    /// At the step, from kept factors.
    FORGE_SCHEDULE_DEFERRED = 2,
    /// From an fp32 buffer.
    FORGE_SCHEDULE_ACCUMULATE = 3,
}

convert!(fn schedule(forge_schedule) -> Schedule {
    FORGE_SCHEDULE_AUTO => Schedule::Auto,
    FORGE_SCHEDULE_IMMEDIATE => Schedule::Immediate,
    FORGE_SCHEDULE_DEFERRED => Schedule::Deferred,
    FORGE_SCHEDULE_ACCUMULATE => Schedule::Accumulate,
});

/// The number of a dtype.
pub(crate) fn dtype_code(dtype: Dtype) -> u32 {
    (match dtype {
        Dtype::F32 => forge_dtype::FORGE_DTYPE_F32,
        Dtype::Bf16 => forge_dtype::FORGE_DTYPE_BF16,
        Dtype::F16 => forge_dtype::FORGE_DTYPE_F16,
        Dtype::U8 => forge_dtype::FORGE_DTYPE_U8,
        Dtype::U16 => forge_dtype::FORGE_DTYPE_U16,
    }) as u32
}

/// The number of a reduction.
pub(super) fn reduction_code(reduction: Reduction) -> u32 {
    (match reduction {
        Reduction::Auto => forge_reduction::FORGE_REDUCTION_AUTO,
        Reduction::Exchange => forge_reduction::FORGE_REDUCTION_EXCHANGE,
        Reduction::Panels => forge_reduction::FORGE_REDUCTION_PANELS,
    }) as u32
}

/// The number of a schedule.
pub(super) fn schedule_code(schedule: Schedule) -> u32 {
    (match schedule {
        Schedule::Auto => forge_schedule::FORGE_SCHEDULE_AUTO,
        Schedule::Immediate => forge_schedule::FORGE_SCHEDULE_IMMEDIATE,
        Schedule::Deferred => forge_schedule::FORGE_SCHEDULE_DEFERRED,
        Schedule::Accumulate => forge_schedule::FORGE_SCHEDULE_ACCUMULATE,
    }) as u32
}
