//! The structs that kernels take by value, as `kernels/prelude.cuh` and `kernels/shard.cuh` declare
//! them.

use super::super::{Arrays, Shard, Step};
use super::driver::DevicePtr;
use crate::rule::{MAX_HYPER, MAX_STATES, StepScalars};

/// `forge::StepScalars`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelScalars {
    /// Of the rule.
    pub constants: [f32; 16],
    /// Multiplies dW; carries the sign of `maximize`.
    pub grad_scale: f32,
    /// Philox key.
    pub key: [u32; 2],
    /// Philox counter word 2.
    pub step: u32,
    /// Philox counter word 3.
    pub seed_high: u32,
}

impl KernelScalars {
    /// Whether both are of the same step, bit for bit, whatever the parameter.
    pub fn same_step(&self, other: &Self) -> bool {
        let bits = |s: &Self| (s.constants.map(f32::to_bits), s.grad_scale.to_bits());
        let numbers = |s: &Self| (s.key[0], s.step, s.seed_high);
        bits(self) == bits(other) && numbers(self) == numbers(other)
    }
}

impl From<&Step> for KernelScalars {
    fn from(step: &Step) -> Self {
        let (key, number, seed_high) = step.noise.parts();
        let (constants, grad_scale) = (step.constants, step.grad_scale);
        Self { constants, grad_scale, key, step: number, seed_high }
    }
}

/// `forge::StepSource`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelStep {
    /// Used where `device` is 0.
    pub value: KernelScalars,
    /// A `forge::StepScalars` that the prologue has written.
    pub device: DevicePtr,
}

impl From<&Step> for KernelStep {
    fn from(step: &Step) -> Self {
        Self { value: step.into(), device: 0 }
    }
}

/// `ScalarsInMemory` of kernels/prologue.cu, which is the C ABI's `forge_step_scalars`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct KernelSource {
    step: u64,
    seed: u64,
    grad_scale: f64,
    hyper: [f64; MAX_HYPER],
}

impl From<&StepScalars> for KernelSource {
    fn from(s: &StepScalars) -> Self {
        Self { step: s.step, seed: s.seed, grad_scale: s.grad_scale, hyper: s.hyper }
    }
}

/// `forge::ShardArrays`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct KernelArrays {
    weight: *mut u8,
    extra: *mut u8,
    states: [*mut u8; MAX_STATES],
    scales: [*mut f32; MAX_STATES],
}

impl From<&Arrays> for KernelArrays {
    fn from(a: &Arrays) -> Self {
        Self { weight: a.weight, extra: a.extra, states: a.states, scales: a.scales }
    }
}

/// `forge::Shard`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct KernelShard {
    rows: u64,
    cols: u64,
    first_index: u64,
    global_cols: u64,
}

impl From<&Shard> for KernelShard {
    fn from(s: &Shard) -> Self {
        Self {
            rows: s.rows as u64,
            cols: s.cols as u64,
            first_index: s.global_index(0, 0),
            global_cols: s.global_cols,
        }
    }
}

/// `forge::Region`: a rectangle of a shard.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First row.
    pub row: u64,
    /// First column, a multiple of 128.
    pub col: u64,
    /// Rows.
    pub rows: u64,
    /// Columns.
    pub cols: u64,
}

impl Region {
    /// All of a shard.
    pub fn whole(shard: &Shard) -> Self {
        Self { row: 0, col: 0, rows: shard.rows as u64, cols: shard.cols as u64 }
    }

    /// Tiles that [`super::elementwise`] and the norm cut it into.
    pub fn tiles(&self) -> u64 {
        self.rows.div_ceil(TILE_ROWS) * self.cols.div_ceil(TILE_COLS)
    }
}

/// Rows of a tile of the element-wise kernels: `forge::TILE_ROWS`.
pub const TILE_ROWS: u64 = 64;
/// Columns: `forge::TILE_COLS`, one q8 block.
pub const TILE_COLS: u64 = 128;

/// `forge::Report` of kernels/reduce.cu, which is the C ABI's `forge_report`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelReport {
    /// Of the struct.
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// Tiles.
    pub tiles: u64,
    /// Not finite ones.
    pub nonfinite_tiles: u64,
    /// Σ dW².
    pub sum_of_squares: f64,
}

/// `forge::Norm` of kernels/reduce.cu, which is the C ABI's `forge_norm`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelNorm {
    /// Of the struct.
    pub struct_size: u32,
    /// A `forge_norm_method`.
    pub method: u32,
    /// Σ dW².
    pub sum_of_squares: f64,
    /// 1 where it is not finite.
    pub nonfinite: u32,
    /// 0.
    pub reserved: u32,
}
