//! Tensor maps of what Hopper's kernel reads and writes: which boxes of a factor, an array or its scales one
//! load takes, and how they lie in shared memory.

use super::super::super::Matrix;
use super::super::driver::{DevicePtr, Swizzle, TensorMap, TensorType, tensor_map};
use crate::error::Result;
use crate::format::Dtype;

/// No map.
pub const EMPTY: TensorMap = TensorMap { opaque: [0; 16] };

/// An array `[rows, cols]` that streams.
#[derive(Clone, Copy)]
pub struct Streamed {
    /// First element.
    pub data: DevicePtr,
    /// Of its elements.
    pub dtype: Dtype,
}

/// Boxes of 64 features × `tokens` tokens of a factor.
///
/// # Safety
/// The factor is device memory of this size.
pub unsafe fn factor_map(
    dtype: Dtype,
    factor: &Matrix,
    features: usize,
    rows: usize,
    tokens: u32,
) -> Result<TensorMap> {
    let element = match dtype {
        Dtype::Bf16 => TensorType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        _ => TensorType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    };
    let (dims, strides) = ([features as u64, rows as u64], [2 * factor.stride as u64]);
    let swizzle = Swizzle::CU_TENSOR_MAP_SWIZZLE_128B;
    // SAFETY: as promised by the caller.
    unsafe {
        tensor_map(element, factor.data as DevicePtr, &dims, &strides, &[64, tokens], swizzle)
    }
}

/// Where rows 0..8 of an array begin, and where rows 8..16 do.
pub fn array_halves(array: Streamed, cols: usize) -> [DevicePtr; 2] {
    [array.data, array.data + 8 * (cols * array.dtype.bytes()) as u64]
}

/// The same of the scales of a q8 state.
pub fn scale_halves(scales: DevicePtr) -> [DevicePtr; 2] {
    [scales, scales + 32]
}

/// Rows 0..8 and rows 8..16 of every 16 of an array, as `forge::pair_offset` expects them in shared
/// memory.
///
/// # Safety
/// The array is device memory `[rows, cols]`.
pub unsafe fn array_maps(
    array: Streamed,
    rows: usize,
    cols: usize,
    chunk_cols: u32,
) -> Result<[TensorMap; 2]> {
    let bytes = array.dtype.bytes() as u64;
    let box_cols = chunk_cols.min(128 / bytes as u32);
    let swizzle = match u64::from(box_cols) * bytes {
        128 => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        64 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        _ => Swizzle::CU_TENSOR_MAP_SWIZZLE_32B,
    };
    let element = match bytes {
        4 => TensorType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        2 => TensorType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
        _ => TensorType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
    };
    let row = cols as u64 * bytes;
    let mut maps = [EMPTY; 2];
    for (half, (map, data)) in maps.iter_mut().zip(array_halves(array, cols)).enumerate() {
        let groups = (rows as u64 / 8 + 1 - half as u64) / 2;
        // SAFETY: as promised by the caller.
        *map = unsafe {
            if bytes == 4 {
                // Two times four rows, so that rows that are read together share no banks.
                let (dims, strides) = ([cols as u64, 2, 4, groups], [4 * row, row, 16 * row]);
                tensor_map(element, data, &dims, &strides, &[box_cols, 2, 4, 4], swizzle)?
            } else {
                let (dims, strides) = ([cols as u64, 8, groups], [row, 16 * row]);
                tensor_map(element, data, &dims, &strides, &[box_cols, 8, 4], swizzle)?
            }
        };
    }
    Ok(maps)
}

/// The same rows of the scales of a q8 state, `[ceil(cols/128), rows]`.
///
/// # Safety
/// As [`array_maps`].
pub unsafe fn scale_maps(scales: DevicePtr, rows: usize, cols: usize) -> Result<[TensorMap; 2]> {
    let element = TensorType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    let swizzle = Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE;
    let mut maps = [EMPTY; 2];
    for (half, (map, data)) in maps.iter_mut().zip(scale_halves(scales)).enumerate() {
        let groups = (rows as u64 / 8 + 1 - half as u64) / 2;
        let dims = [8, groups, cols.div_ceil(128) as u64];
        // SAFETY: as promised by the caller.
        *map = unsafe {
            tensor_map(element, data, &dims, &[64, 4 * rows as u64], &[8, 4, 1], swizzle)?
        };
    }
    Ok(maps)
}
