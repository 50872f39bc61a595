//! Reductions in a fixed order, images, and the prologue of a step: `kernels/{reduce,image,prologue}.cu`.

use super::super::{Arrays, Image, Matrix, Scheme, Shard, StepSource, Stream};
use super::driver::{DevicePtr, parameters};
use super::elementwise::Gradient;
use super::gpu::{Gpu, Kernel};
use super::parameters::{
    KernelArrays, KernelScalars, KernelShard, KernelSource, KernelStep, Region,
};
use super::{grid, sources, specialise};
use crate::error::Result;
use crate::format::{BLOCK, StateFormat, StateKind};
use crate::rule::MAXIMIZE;
use crate::rule::user::UserRule;

/// One block: a fixed order.
const REDUCE_THREADS: u32 = 1024;
const THREADS: u32 = 256;

fn kernel<'a>(name: &'a str, defines: &'a [String], grid: [u32; 3], block: u32) -> Kernel<'a> {
    Kernel { source: sources::REDUCE, defines, name, what: name, grid, block, shared_bytes: 0 }
}

/// Partials to a `forge_report`, at one or two places (0: not wanted).
///
/// # Safety
/// The context is current; the memory is valid when the work runs.
pub unsafe fn report(
    gpu: &Gpu,
    partials: DevicePtr,
    count: u64,
    out: [DevicePtr; 2],
    stream: Stream,
) -> Result<()> {
    let kernel = kernel("forge_report", &[], [1; 3], REDUCE_THREADS);
    let [first, second] = out;
    // SAFETY: as promised by the caller; the kernel declares these parameters.
    unsafe { gpu.run(kernel, &mut parameters!(partials, count, first, second), stream) }
}

/// Reports that one launch takes: `forge::MOST_REPORTS`.
pub const MOST_REPORTS: usize = 1024;

/// `forge::ReportOf`: partials, and where their report goes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ReportOf {
    /// The first.
    pub partials: DevicePtr,
    /// How many.
    pub count: u64,
    /// A `forge_report`.
    pub target: DevicePtr,
}

/// `forge::Reports`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Reports([ReportOf; MOST_REPORTS]);

const _: () = assert!(size_of::<Reports>() <= 32764);

impl Reports {
    /// At most [`MOST_REPORTS`].
    pub fn new(of: &[ReportOf]) -> Self {
        let mut all = [ReportOf::default(); MOST_REPORTS];
        all[..of.len()].copy_from_slice(of);
        Self(all)
    }
}

/// Several reports in one launch; no launch for none of them.
///
/// # Safety
/// As [`report`].
pub unsafe fn reports(gpu: &Gpu, of: &[ReportOf], stream: Stream) -> Result<()> {
    if of.is_empty() {
        return Ok(());
    }
    let kernel = kernel("forge_reports", &[], grid(of.len() as u64)?, REDUCE_THREADS);
    let all = Reports::new(of);
    // SAFETY: as promised by the caller; the kernel declares this parameter.
    unsafe { gpu.run(kernel, &mut parameters!(all), stream) }
}

/// Partials to a `forge_norm` of this method, at one or two places (0: not wanted).
///
/// # Safety
/// As [`report`].
pub unsafe fn norm(
    gpu: &Gpu,
    partials: DevicePtr,
    count: u64,
    method: u32,
    out: [DevicePtr; 2],
    stream: Stream,
) -> Result<()> {
    let kernel = kernel("forge_norm", &[], [1; 3], REDUCE_THREADS);
    let [first, second] = out;
    // SAFETY: as promised by the caller; the kernel declares these parameters.
    unsafe { gpu.run(kernel, &mut parameters!(partials, count, method, first, second), stream) }
}

/// The squares of a gradient in memory, a partial for each of its tiles.
///
/// # Safety
/// As [`report`].
pub unsafe fn squares(
    gpu: &Gpu,
    gradient: Gradient,
    (rows, cols): (u64, u64),
    partials: DevicePtr,
    stream: Stream,
) -> Result<()> {
    let Gradient { data, stride, dtype } = gradient;
    let dtype = specialise::dtype_code(dtype);
    let tiles = Region { row: 0, col: 0, rows, cols }.tiles();
    let kernel = kernel("forge_squares", &[], grid(tiles)?, THREADS);
    // SAFETY: as promised by the caller; the kernel declares these parameters.
    unsafe { gpu.run(kernel, &mut parameters!(data, stride, dtype, rows, cols, partials), stream) }
}

/// What the kernel of the bias gradient is compiled for.
pub fn bias_defines(scheme: &Scheme) -> Vec<String> {
    vec![format!("FORGE_FACTOR={}", specialise::dtype_code(scheme.factor_dtype))]
}

/// `dbias[o] = Σ_t dY[t, o]`.
///
/// # Safety
/// As [`report`].
pub unsafe fn bias(
    gpu: &Gpu,
    scheme: &Scheme,
    rows: usize,
    tokens: usize,
    dy: Matrix,
    dbias: *mut u8,
    stream: Stream,
) -> Result<()> {
    const COLS: u64 = 32;
    let defines = bias_defines(scheme);
    let kernel = Kernel {
        source: sources::BIAS,
        defines: &defines,
        name: "forge_bias",
        what: "bias gradient",
        grid: grid((rows as u64).div_ceil(COLS))?,
        block: REDUCE_THREADS,
        shared_bytes: 0,
    };
    let (data, dy_stride) = (dy.data, dy.stride as u64);
    let (rows, tokens) = (rows as u64, tokens as u64);
    // SAFETY: as promised by the caller; the kernel declares these parameters.
    unsafe { gpu.run(kernel, &mut parameters!(data, dy_stride, rows, tokens, dbias), stream) }
}

/// What the kernels of an image are compiled for.
pub fn image_defines(scheme: &Scheme, image: Image) -> Vec<String> {
    let (which, format, kind) = match image {
        Image::Weight => (0, specialise::weight_code(scheme.weight_format), 0),
        Image::State(k) => {
            let format = scheme.state_formats[k];
            // The kind matters to q8 alone.
            let unsigned =
                format == StateFormat::Q8 && scheme.state_kind(k) == StateKind::NonNegative;
            (1, specialise::state_code(format), u32::from(unsigned))
        }
    };
    vec![
        format!("FORGE_IMAGE={which}"),
        format!("FORGE_FORMAT={format}"),
        format!("FORGE_KIND={kind}"),
    ]
}

/// An array to fp32 (`export`), or from it.
///
/// # Safety
/// As [`report`].
pub unsafe fn image(
    gpu: &Gpu,
    scheme: &Scheme,
    shard: &Shard,
    arrays: &Arrays,
    image: Image,
    fp32: *mut f32,
    export: bool,
    stream: Stream,
) -> Result<()> {
    let defines = image_defines(scheme, image);
    let k = match image {
        Image::Weight => 0,
        Image::State(k) => k,
    };
    let blocks = shard.rows as u64 * (shard.cols as u64).div_ceil(BLOCK as u64);
    let kernel = Kernel {
        source: sources::IMAGE,
        defines: &defines,
        name: if export { "forge_export" } else { "forge_import" },
        what: "checkpoint image",
        // A warp for each block of 128.
        grid: grid(blocks.div_ceil(u64::from(THREADS) / 32))?,
        block: THREADS,
        shared_bytes: 0,
    };
    let (arrays, shard, k) = (KernelArrays::from(arrays), KernelShard::from(shard), k as u32);
    // SAFETY: as promised by the caller; the kernels declare these parameters.
    unsafe { gpu.run(kernel, &mut parameters!(arrays, shard, k, fp32), stream) }
}

/// The kernels of a step's prologue.
fn prologue_kernel<'a>(name: &'a str, defines: &'a [String], what: &'a str) -> Kernel<'a> {
    let source = sources::PROLOGUE;
    Kernel { source, defines, name, what, grid: [1; 3], block: 1, shared_bytes: 0 }
}

/// Where the kernels of an update find the scalars of a step: by value, or where [`prologue`] has a kernel
/// leave them.
pub fn step_at(scheme: &Scheme, step: &StepSource, out: DevicePtr) -> KernelStep {
    match step {
        StepSource::Value(step) if !scheme.rule.user().is_some_and(UserRule::has_per_step) => {
            KernelStep::from(step)
        }
        _ => KernelStep { value: KernelScalars::default(), device: out },
    }
}

/// Enqueues the kernel that leaves the scalars at `out`, where the host does not know them. Returns where
/// the kernels of the update find them.
///
/// # Safety
/// The context is current; the memory is valid when the work runs.
pub unsafe fn prologue(
    gpu: &Gpu,
    scheme: &Scheme,
    step: &StepSource,
    out: DevicePtr,
    stream: Stream,
) -> Result<KernelStep> {
    let (parameter, maximize) = (scheme.parameter_id, u32::from(scheme.flags & MAXIMIZE != 0));
    let (defines, what) = (specialise::rule(scheme), specialise::name(scheme));
    let kernel = |name| prologue_kernel(name, &defines, &what);
    // SAFETY: as promised by the caller; the kernels declare these parameters.
    unsafe {
        match *step {
            StepSource::Device(source) => {
                let mut parameters = parameters!(source, parameter, maximize, out);
                gpu.run(kernel("forge_prologue"), &mut parameters, stream)?;
            }
            StepSource::Value(step) if scheme.rule.user().is_some_and(UserRule::has_per_step) => {
                let source = KernelSource::from(&step.scalars);
                let mut parameters = parameters!(source, parameter, maximize, out);
                gpu.run(kernel("forge_prologue_of_values"), &mut parameters, stream)?;
            }
            StepSource::Value(_) => {}
        }
    }
    Ok(step_at(scheme, step, out))
}

/// Compiles the rule that the caller defined, for the errors in it.
pub fn check_rule(gpu: &Gpu, scheme: &Scheme, rule: &UserRule) -> Result<()> {
    rule.header()?;
    let (defines, what) = (specialise::rule(scheme), specialise::name(scheme));
    let kernel = prologue_kernel("forge_prologue", &defines, &what);
    gpu.modules.get(kernel.source, kernel.defines, kernel.name, 0, kernel.what).map(|_| ())
}
