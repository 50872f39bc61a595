//! Matrix products of a tile on one thread, in fp32: operands are converted a chunk of terms at a time, and
//! every element is one chain of fused multiply-adds in the order of its terms ([`super::sgemm`]), through
//! all segments. That order depends on nothing else, so tiles, shards and schedules give the same bits,
//! and so does a GPU with fp32 factors.

use super::super::{Accumulator, Factors, Matrix, Shard};
use super::scratch::Scratch;
use super::sgemm::sgemm;
use super::tile::Tile;
use crate::format::{Dtype, load_factor};

/// Terms that are converted at once.
const CHUNK: usize = 256;

/// An operand in fp32: element `(i, k)` is at `i * row + k * depth` (in elements).
#[derive(Clone, Copy)]
pub struct Operand {
    /// Element (0, 0).
    pub data: *const f32,
    /// Distance along the operand's kept dimension.
    pub row: usize,
    /// Distance along the summed dimension.
    pub depth: usize,
}

/// Terms to give to one [`sgemm`]: operands that are fp32 already go in one call, others are converted a
/// chunk at a time.
pub fn terms_per_call(dtypes: &[Dtype], total: usize) -> usize {
    let in_place = dtypes.iter().all(|d| *d == Dtype::F32);
    if in_place { total.max(1) } else { CHUNK }
}

/// Rows `first..first+rows` and `cols` columns from `col` of a matrix as fp32, row-major: in place
/// where it is fp32 already, converted into `buffer` otherwise. Returns first element and stride.
///
/// # Safety
/// The matrix is valid for these rows and columns.
pub unsafe fn rows_as_f32(
    dtype: Dtype,
    matrix: Matrix,
    first: usize,
    rows: usize,
    col: usize,
    cols: usize,
    buffer: &mut Vec<f32>,
) -> (*const f32, usize) {
    // SAFETY: offsets stay within the rows and columns that the caller promises.
    unsafe {
        let at = |row: usize| matrix.data.add((row * matrix.stride + col) * dtype.bytes());
        if dtype == Dtype::F32 {
            return (at(first).cast(), matrix.stride);
        }
        if buffer.len() < rows * cols {
            buffer.resize(rows * cols, 0.0);
        }
        for row in 0..rows {
            load_factor(dtype, at(first + row), &mut buffer[row * cols..(row + 1) * cols]);
        }
        (buffer.as_ptr(), cols)
    }
}

/// One tile of `dW = Σ dYᵀX (+ accumulator)` into `scratch.tile`, row-major, `tile.cols` wide.
///
/// # Safety
/// Factors and accumulator are valid for the shard.
pub unsafe fn wgrad_tile(
    dtype: Dtype,
    shard: &Shard,
    factors: &[Factors],
    accumulator: Option<Accumulator>,
    tile: Tile,
    scratch: &mut Scratch,
) {
    let Scratch { tile: out, left, right } = scratch;
    out.clear();
    out.resize(tile.rows * tile.cols, 0.0);
    // Starting from +0 (and adding to it) is what an accumulator that starts as zeros does, so the
    // schedules agree in the sign of zero, too.
    // SAFETY: the tile lies within the shard.
    unsafe {
        if let Some(buffer) = accumulator {
            let matrix = Matrix { data: buffer.data(), stride: shard.cols };
            let (values, stride) =
                rows_as_f32(buffer.dtype(), matrix, tile.row, tile.rows, tile.col, tile.cols, left);
            for (row, out) in out.chunks_exact_mut(tile.cols).enumerate() {
                let row = std::slice::from_raw_parts(values.add(row * stride), tile.cols);
                out.copy_from_slice(row);
            }
        }
        for segment in factors {
            let terms = terms_per_call(&[dtype], segment.tokens);
            for first in (0..segment.tokens).step_by(terms) {
                let depth = terms.min(segment.tokens - first);
                let (dy, dy_stride) =
                    rows_as_f32(dtype, segment.dy, first, depth, tile.row, tile.rows, left);
                let (x, x_stride) =
                    rows_as_f32(dtype, segment.x, first, depth, tile.col, tile.cols, right);
                let dy = Operand { data: dy, row: 1, depth: dy_stride };
                let x = Operand { data: x, row: 1, depth: x_stride };
                sgemm([tile.rows, tile.cols, depth], dy, x, out.as_mut_ptr(), tile.cols);
            }
        }
    }
}

/// One tile of `dX += dY · W`: `tile.rows` tokens by `tile.cols` columns at `out`, rows `out_stride`
/// apart.
///
/// # Safety
/// dY and W are valid for the shard and these tokens, `out` for the tile.
pub unsafe fn add_dgrad_tile(
    dtype: Dtype,
    weight_dtype: Dtype,
    shard: &Shard,
    dy: Matrix,
    weight: *const u8,
    tile: Tile,
    out: *mut f32,
    out_stride: usize,
    converted: (&mut Vec<f32>, &mut Vec<f32>),
) {
    let weight = Matrix { data: weight, stride: shard.cols };
    // SAFETY: the tile lies within tokens × shard columns.
    unsafe {
        let terms = terms_per_call(&[dtype, weight_dtype], shard.rows);
        for first in (0..shard.rows).step_by(terms) {
            let depth = terms.min(shard.rows - first);
            let (dy, dy_stride) =
                rows_as_f32(dtype, dy, tile.row, tile.rows, first, depth, converted.0);
            let (w, w_stride) =
                rows_as_f32(weight_dtype, weight, first, depth, tile.col, tile.cols, converted.1);
            let dy = Operand { data: dy, row: dy_stride, depth: 1 };
            let w = Operand { data: w, row: 1, depth: w_stride };
            sgemm([tile.rows, tile.cols, depth], dy, w, out, out_stride);
        }
    }
}
