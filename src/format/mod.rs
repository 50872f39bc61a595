//! How weights, states and factors are stored, and the conversions between storage and fp32.
//!
//! The rules work on fp32; a format is a pair of functions, load and store, over a run of at most
//! [`BLOCK`] elements of one row. Everything here is `#[inline(always)]` so that it takes the
//! instruction set of the loop it is used in.

pub mod bf16;
pub mod q8;
mod state;
mod weight;

pub use state::{StateFormat, StateKind, load_state, store_state};
pub use weight::{WeightFormat, load_weight, store_weight};

use crate::philox::{Noise, Stream};

/// Elements of a q8 block, and the run length of every load and store.
pub const BLOCK: usize = 128;

/// The type of a factor or of an array in a layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// 32-bit IEEE float.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit IEEE float.
    F16,
    /// Unsigned byte.
    U8,
    /// Unsigned 16-bit integer.
    U16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 | Dtype::F16 | Dtype::U16 => 2,
            Dtype::U8 => 1,
        }
    }
}

/// How a value that its format cannot hold is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest representable value.
    Nearest,
    /// Up or down with probabilities that make the mean exact.
    Stochastic,
}

/// One uniform 16-bit draw for each element of a run.
pub type Draws = [u16; BLOCK];

/// Where a run's draws come from: nowhere for nearest rounding.
#[derive(Clone, Copy)]
pub struct DrawSource<'a> {
    noise: Option<&'a Noise>,
    stream: Stream,
    first: u64,
}

impl<'a> DrawSource<'a> {
    /// Draws for elements from global index `first` on, or none when rounding is nearest.
    #[inline(always)]
    pub fn new(rounding: Rounding, noise: &'a Noise, stream: Stream, first: u64) -> Self {
        let noise = match rounding {
            Rounding::Nearest => None,
            Rounding::Stochastic => Some(noise),
        };
        Self { noise, stream, first }
    }

    /// Nearest rounding.
    pub fn nearest() -> DrawSource<'static> {
        DrawSource { noise: None, stream: Stream::Weight, first: 0 }
    }

    /// Fills `draws` and says whether there are any.
    #[inline(always)]
    pub(crate) fn fill(&self, draws: &mut [u16]) -> bool {
        match self.noise {
            None => false,
            Some(noise) => {
                noise.fill(self.stream, self.first, draws);
                true
            }
        }
    }
}

/// Reads `out.len()` factor elements from `source` on as fp32.
///
/// # Safety
/// `source` must be aligned for `dtype` and valid for reads of `out.len()` elements.
#[inline(always)]
pub unsafe fn load_factor(dtype: Dtype, source: *const u8, out: &mut [f32]) {
    let n = out.len();
    // SAFETY: the caller promises n aligned elements of `dtype` behind `source`.
    unsafe {
        match dtype {
            Dtype::F32 => out.copy_from_slice(std::slice::from_raw_parts(source.cast(), n)),
            Dtype::Bf16 => bf16::widen(std::slice::from_raw_parts(source.cast(), n), out),
            Dtype::F16 => {
                use half::slice::HalfFloatSliceExt;
                let values: &[half::f16] = std::slice::from_raw_parts(source.cast(), n);
                values.convert_to_f32_slice(out);
            }
            Dtype::U8 | Dtype::U16 => unreachable!("factors are floats; the C ABI checks this"),
        }
    }
}

/// Writes `values` as `dtype`, rounded to nearest.
///
/// # Safety
/// `target` must be aligned for `dtype` and valid for writes of `values.len()` elements.
#[inline(always)]
pub unsafe fn store_factor(dtype: Dtype, target: *mut u8, values: &[f32]) {
    let n = values.len();
    // SAFETY: the caller promises n aligned, writable elements of `dtype` behind `target`.
    unsafe {
        match dtype {
            Dtype::F32 => {
                std::slice::from_raw_parts_mut(target.cast(), n).copy_from_slice(values);
            }
            Dtype::Bf16 => {
                bf16::narrow_nearest(values, std::slice::from_raw_parts_mut(target.cast(), n));
            }
            Dtype::F16 => {
                use half::slice::HalfFloatSliceExt;
                let out: &mut [half::f16] = std::slice::from_raw_parts_mut(target.cast(), n);
                out.convert_from_f32_slice(values);
            }
            Dtype::U8 | Dtype::U16 => unreachable!("factors are floats; the C ABI checks this"),
        }
    }
}
