//! Weight formats.

use super::{BLOCK, DrawSource, Dtype, bf16};

/// How a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightFormat {
    /// 4 bytes, exact.
    F32,
    /// 2 bytes, rounded at every update.
    Bf16,
    /// 6 bytes: a bf16 model weight, and the fp32 master it is rounded from.
    Bf16F32,
    /// 4 bytes: a bf16 model weight, and the 16 bits below it; together the fp32 master.
    Bf16Low16,
}

impl WeightFormat {
    /// The model weight: what forward and dgrad read.
    pub const fn model_dtype(self) -> Dtype {
        match self {
            WeightFormat::F32 => Dtype::F32,
            _ => Dtype::Bf16,
        }
    }

    /// What is kept beside the model weight.
    pub const fn extra_dtype(self) -> Option<Dtype> {
        match self {
            WeightFormat::F32 | WeightFormat::Bf16 => None,
            WeightFormat::Bf16F32 => Some(Dtype::F32),
            WeightFormat::Bf16Low16 => Some(Dtype::U16),
        }
    }
}

/// Reads the master weight of elements `at..at + out.len()`.
///
/// # Safety
/// `weight` and, where the format has one, `extra` must be aligned and valid for reads of these
/// elements.
#[inline(always)]
pub unsafe fn load_weight(
    format: WeightFormat,
    weight: *const u8,
    extra: *const u8,
    at: usize,
    out: &mut [f32],
) {
    let n = out.len();
    // SAFETY: the caller promises elements at..at+n of each array; offsets are within them.
    unsafe {
        let halves = || std::slice::from_raw_parts(weight.cast::<u16>().add(at), n);
        match format {
            WeightFormat::F32 => {
                out.copy_from_slice(std::slice::from_raw_parts(weight.cast::<f32>().add(at), n));
            }
            WeightFormat::Bf16 => bf16::widen(halves(), out),
            WeightFormat::Bf16F32 => {
                out.copy_from_slice(std::slice::from_raw_parts(extra.cast::<f32>().add(at), n));
            }
            WeightFormat::Bf16Low16 => {
                let lower = std::slice::from_raw_parts(extra.cast::<u16>().add(at), n);
                for ((value, upper), lower) in out.iter_mut().zip(halves()).zip(lower) {
                    *value = bf16::join(*upper, *lower);
                }
            }
        }
    }
}

/// Writes the master weight of elements `at..at + values.len()`, at most [`BLOCK`] of them.
///
/// # Safety
/// As [`load_weight`], for writes.
#[inline(always)]
pub unsafe fn store_weight(
    format: WeightFormat,
    weight: *mut u8,
    extra: *mut u8,
    at: usize,
    values: &[f32],
    source: DrawSource,
) {
    let n = values.len();
    // SAFETY: the caller promises elements at..at+n of each array, writable and not shared.
    unsafe {
        let halves = || std::slice::from_raw_parts_mut(weight.cast::<u16>().add(at), n);
        match format {
            WeightFormat::F32 => std::slice::from_raw_parts_mut(weight.cast::<f32>().add(at), n)
                .copy_from_slice(values),
            WeightFormat::Bf16 => {
                let mut draws = [0u16; BLOCK];
                if source.fill(&mut draws[..n]) {
                    bf16::narrow_stochastic(values, &draws, halves());
                } else {
                    bf16::narrow_nearest(values, halves());
                }
            }
            WeightFormat::Bf16F32 => {
                std::slice::from_raw_parts_mut(extra.cast::<f32>().add(at), n)
                    .copy_from_slice(values);
                bf16::narrow_nearest(values, halves());
            }
            WeightFormat::Bf16Low16 => {
                let lower = std::slice::from_raw_parts_mut(extra.cast::<u16>().add(at), n);
                for ((value, upper), lower) in values.iter().zip(halves()).zip(lower) {
                    (*upper, *lower) = bf16::split(*value);
                }
            }
        }
    }
}
