//! fp32 products with one accumulator for each element and its terms in order: `kernels/exact.cu`.
//! For fp32 factors, and for what cuBLASLt does not take.

use super::super::Stream;
use super::driver::{DevicePtr, parameters};
use super::gpu::{Gpu, Kernel};
use super::{grid, sources, specialise};
use crate::error::{Result, bail};
use crate::format::Dtype;

const THREADS: u32 = 256;
/// Rows and columns of a block's tile: `TILE` of the source.
const TILE: u64 = 128;
/// Rows, columns and terms of a segment: 31 bits in the kernel.
const MOST: u64 = 1 << 30;
/// Segments of one launch: `MOST_SEGMENTS` of the source.
const MOST_SEGMENTS: usize = 32;

/// An operand: element (i, k) lies at `i * row + k * depth`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Operand {
    /// Element (0, 0).
    pub data: DevicePtr,
    /// Elements along the kept dimension.
    pub row: u64,
    /// Elements along the summed dimension.
    pub depth: u64,
}

/// A part of the summed dimension.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Segment {
    /// Rows of the result.
    pub left: Operand,
    /// Columns of the result.
    pub right: Operand,
    /// Terms.
    pub terms: u64,
}

impl Segment {
    /// Parts of at most [`MOST`] terms.
    fn parts(&self, types: Types) -> impl Iterator<Item = Segment> {
        let Segment { left, right, terms } = *self;
        let from = |o: Operand, first: u64, dtype: Dtype| Operand {
            data: o.data + first * o.depth * dtype.bytes() as u64,
            ..o
        };
        (0..terms).step_by(MOST as usize).map(move |first| Segment {
            left: from(left, first, types.left),
            right: from(right, first, types.right),
            terms: (terms - first).min(MOST),
        })
    }
}

/// `forge::exact::Params`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Params {
    /// The first `n_segments` of them.
    pub segments: [Segment; MOST_SEGMENTS],
    /// How many there are.
    pub n_segments: u64,
    /// Of the result.
    pub rows: u64,
    /// Of the result.
    pub cols: u64,
    /// What is added, fp32; 0: nothing.
    pub initial: DevicePtr,
    /// Elements between its rows.
    pub initial_stride: u64,
    /// The result.
    pub out: DevicePtr,
    /// Elements between its rows.
    pub out_stride: u64,
}

/// A result in memory: first element and elements between rows.
#[derive(Clone, Copy, Debug)]
pub struct Plane {
    /// First element.
    pub data: DevicePtr,
    /// Elements from one row to the next.
    pub stride: u64,
}

/// Types of the operands and of the result.
#[derive(Clone, Copy, Debug)]
pub struct Types {
    /// Left operand.
    pub left: Dtype,
    /// Right operand.
    pub right: Dtype,
    /// Result; what is added to it is fp32.
    pub out: Dtype,
}

/// What the kernel is compiled for; `along_rows`: which operands are contiguous along the kept dimension.
pub fn defines(types: Types, along_rows: [bool; 2]) -> Vec<String> {
    let [left, right] = along_rows.map(u32::from);
    vec![
        format!("FORGE_LEFT={}", specialise::dtype_code(types.left)),
        format!("FORGE_RIGHT={}", specialise::dtype_code(types.right)),
        format!("FORGE_OUT={}", specialise::dtype_code(types.out)),
        format!("FORGE_LEFT_ROWS={left}"),
        format!("FORGE_RIGHT_ROWS={right}"),
    ]
}

/// Enqueues `out[rows, cols] = initial + Σ left · rightᵀ` over all segments in order.
///
/// More segments than one launch takes go through `out`, which then is fp32.
///
/// # Safety
/// The context is current; operands, `initial` (fp32) and `out` are valid when the work runs.
pub unsafe fn product(
    gpu: &Gpu,
    types: Types,
    segments: &[Segment],
    (rows, cols): (u64, u64),
    initial: Option<Plane>,
    out: Plane,
    stream: Stream,
) -> Result<()> {
    if rows > MOST || cols > MOST {
        bail!(FORGE_ERROR_UNSUPPORTED, "shape: a product of {rows} × {cols}; at most {MOST} each");
    }
    let segments: Vec<Segment> = segments.iter().flat_map(|s| s.parts(types)).collect();
    // Which dimension is contiguous: a hint to the kernel, right or wrong.
    let along_rows =
        |operand: fn(&Segment) -> Operand| segments.iter().all(|s| operand(s).row == 1);
    let defines = defines(types, [along_rows(|s| s.left), along_rows(|s| s.right)]);
    let mut initial = initial;
    // One launch at least: without segments the result is `initial`, or zeros.
    let launches = segments.len().div_ceil(MOST_SEGMENTS).max(1);
    for index in 0..launches {
        let from = index * MOST_SEGMENTS;
        let part = &segments[from..segments.len().min(from + MOST_SEGMENTS)];
        let mut params = Params {
            segments: [Segment::default(); MOST_SEGMENTS],
            n_segments: part.len() as u64,
            rows,
            cols,
            initial: initial.map_or(0, |p| p.data),
            initial_stride: initial.map_or(0, |p| p.stride),
            out: out.data,
            out_stride: out.stride,
        };
        params.segments[..part.len()].copy_from_slice(part);
        let kernel = Kernel {
            source: sources::EXACT,
            defines: &defines,
            name: "forge_exact",
            what: "exact product",
            grid: grid(rows.div_ceil(TILE) * cols.div_ceil(TILE))?,
            block: THREADS,
            shared_bytes: 0,
        };
        // SAFETY: as promised by the caller; the kernel takes this struct.
        unsafe { gpu.run(kernel, &mut parameters!(params), stream)? };
        initial = Some(out);
    }
    Ok(())
}
