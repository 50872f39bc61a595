//! State formats.

use super::{BLOCK, DrawSource, Dtype, bf16, q8};

/// How an optimizer state is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateFormat {
    /// 4 bytes, exact.
    F32,
    /// 2 bytes.
    Bf16,
    /// 1 byte, and an fp32 scale for each 1×128 block.
    Q8,
}

/// What an 8-bit code may assume about a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateKind {
    /// Any sign: a first moment, a momentum buffer.
    Signed,
    /// Never negative, used through its square root: a second moment.
    NonNegative,
}

impl StateFormat {
    /// The type of the state's array.
    pub const fn dtype(self) -> Dtype {
        match self {
            StateFormat::F32 => Dtype::F32,
            StateFormat::Bf16 => Dtype::Bf16,
            StateFormat::Q8 => Dtype::U8,
        }
    }

    /// Whether there is an array of scales beside it.
    pub const fn has_scales(self) -> bool {
        matches!(self, StateFormat::Q8)
    }
}

/// Reads a run of one row: elements `at..at + out.len()`; for q8 a whole block with scale `scale`.
///
/// # Safety
/// `data` must be aligned and valid for reads of these elements; `scale`, for q8, of one fp32.
#[inline(always)]
pub unsafe fn load_state(
    format: StateFormat,
    kind: StateKind,
    data: *const u8,
    at: usize,
    scale: *const f32,
    out: &mut [f32],
) {
    let n = out.len();
    // SAFETY: the caller promises elements at..at+n, and the block's scale for q8.
    unsafe {
        match format {
            StateFormat::F32 => {
                out.copy_from_slice(std::slice::from_raw_parts(data.cast::<f32>().add(at), n));
            }
            StateFormat::Bf16 => {
                bf16::widen(std::slice::from_raw_parts(data.cast::<u16>().add(at), n), out);
            }
            StateFormat::Q8 => {
                let codes = std::slice::from_raw_parts(data.add(at), n);
                // The state starts as zeroed memory, and code 0 of a signed block is not zero: but
                // its scale is, and that makes it zero.
                match kind {
                    StateKind::Signed => q8::decode_signed(codes, *scale, out),
                    StateKind::NonNegative => q8::decode_square(codes, *scale, out),
                }
            }
        }
    }
}

/// Writes a run of one row, at most [`BLOCK`] elements; for q8 a whole block and its scale.
///
/// # Safety
/// As [`load_state`], for writes.
#[inline(always)]
pub unsafe fn store_state(
    format: StateFormat,
    kind: StateKind,
    data: *mut u8,
    at: usize,
    scale: *mut f32,
    values: &[f32],
    source: DrawSource,
) {
    let n = values.len();
    // SAFETY: the caller promises elements at..at+n, and the block's scale for q8, writable.
    unsafe {
        match format {
            StateFormat::F32 => std::slice::from_raw_parts_mut(data.cast::<f32>().add(at), n)
                .copy_from_slice(values),
            StateFormat::Bf16 => {
                let out = std::slice::from_raw_parts_mut(data.cast::<u16>().add(at), n);
                let mut draws = [0u16; BLOCK];
                if source.fill(&mut draws[..n]) {
                    bf16::narrow_stochastic(values, &draws, out);
                } else {
                    bf16::narrow_nearest(values, out);
                }
            }
            StateFormat::Q8 => {
                let codes = std::slice::from_raw_parts_mut(data.add(at), n);
                *scale = match kind {
                    StateKind::Signed => q8::encode_signed(values, codes, source),
                    StateKind::NonNegative => q8::encode_square(values, codes, source),
                };
            }
        }
    }
}
