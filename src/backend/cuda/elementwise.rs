//! The rule over a gradient in memory: `kernels/elementwise.cu`.

use super::super::{Arrays, Scheme, Shard, Stream};
use super::driver::{DevicePtr, parameters};
use super::gpu::{Gpu, Kernel};
use super::parameters::{KernelArrays, KernelShard, KernelStep, Region};
use super::{grid, sources, specialise};
use crate::error::Result;
use crate::format::{Dtype, StateFormat, WeightFormat};

/// Threads of a block.
pub const THREADS: u32 = 256;

/// A gradient in memory: first element of the region, and elements between rows. Address 0: zeros.
#[derive(Clone, Copy, Debug)]
pub struct Gradient {
    /// First element.
    pub data: DevicePtr,
    /// Elements from one row to the next.
    pub stride: u64,
    /// fp32, or the factors' type.
    pub dtype: Dtype,
}

impl Gradient {
    /// No gradient: decay and moments move as on zeros.
    pub const ZERO: Self = Self { data: 0, stride: 0, dtype: Dtype::F32 };
}

/// Enqueues the rule over a region; writes [`Region::tiles`] partials.
///
/// # Safety
/// The context is current; arrays, gradient and partials are valid when the work runs.
pub unsafe fn update(
    gpu: &Gpu,
    scheme: &Scheme,
    shard: &Shard,
    region: Region,
    arrays: &Arrays,
    gradient: Gradient,
    step: &KernelStep,
    partials: DevicePtr,
    stream: Stream,
) -> Result<()> {
    let vector = is_vector(scheme, shard, arrays, gradient);
    let defines = defines(scheme, vector);
    let kernel = Kernel {
        source: sources::ELEMENTWISE,
        defines: &defines,
        name: "forge_elementwise",
        what: &specialise::name(scheme),
        grid: grid(region.tiles())?,
        block: THREADS,
        shared_bytes: 0,
    };
    let (arrays, shard) = (KernelArrays::from(arrays), KernelShard::from(shard));
    let Gradient { data, stride, dtype } = gradient;
    let dtype = specialise::dtype_code(dtype);
    let mut parameters = parameters!(arrays, shard, region, data, stride, dtype, *step, partials);
    // SAFETY: as promised by the caller; the kernel declares these parameters.
    unsafe { gpu.run(kernel, &mut parameters, stream) }
}

/// What the kernel is compiled for; `vector`: whether runs of 8 elements are
/// read at once.
pub fn defines(scheme: &Scheme, vector: bool) -> Vec<String> {
    let mut defines = specialise::update(scheme);
    defines.push(format!("FORGE_VECTOR={}", u32::from(vector)));
    defines
}

/// Whether a shard's rows are whole runs of 8 elements, whose global indices begin at multiples of 32.
pub fn has_runs(shard: &Shard) -> bool {
    shard.global_index(0, 0).is_multiple_of(32)
        && shard.global_cols.is_multiple_of(32)
        && shard.cols.is_multiple_of(8)
}

/// Whether runs of 8 elements can be read and written at once and share their Philox calls: rows of
/// whole runs, everything aligned to 16 bytes (codes of q8 states to 8), global indices to 32.
pub fn is_vector(scheme: &Scheme, shard: &Shard, arrays: &Arrays, gradient: Gradient) -> bool {
    let aligned = |address: u64, bytes: u64| address.is_multiple_of(bytes);
    let extra = matches!(scheme.weight_format, WeightFormat::Bf16F32 | WeightFormat::Bf16Low16);
    let states = (0..scheme.n_states).all(|k| {
        let bytes = if scheme.state_formats[k] == StateFormat::Q8 { 8 } else { 16 };
        aligned(arrays.states[k] as u64, bytes)
    });
    has_runs(shard)
        && gradient.stride.is_multiple_of(16 / gradient.dtype.bytes() as u64)
        && aligned(gradient.data, 16)
        && aligned(arrays.weight as u64, 16)
        && (!extra || aligned(arrays.extra as u64, 16))
        && states
}
