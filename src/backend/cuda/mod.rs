//! The CUDA backend: kernels that NVRTC compiles on first use, on the caller's stream, in the device's
//! primary context. It allocates nothing on the device: what it needs beside the call's buffers is the
//! workspace that the caller lends to the context.
//!
//! An update takes one of four ways, and none of them holds a gradient:
//! - fused, on Hopper ([`sm90`]) or elsewhere ([`sm80`]): tiles of dW on the chip;
//! - [`panels`] by cuBLASLt: dW in row panels of at most [`workspace::PANEL_BYTES`], each consumed at once;
//! - panels by [`exact`]: the same for fp32 factors, with sums that a CPU can repeat bit for bit.

pub mod blas;
pub mod cache;
pub mod compile;
pub mod driver;
pub mod driver_library;
pub mod elementwise;
pub mod exact;
pub mod gpu;
pub mod group;
pub mod images;
pub mod libraries;
pub mod mainloop;
pub mod module;
pub mod needs;
pub mod panels;
pub mod parameters;
pub mod reduce;
pub mod side_stream;
pub mod sm80;
pub mod sm90;
pub mod sources;
pub mod specialise;
pub mod warm;
pub mod workspace;

use super::warm::{Tell, Warmed, Work};
use super::{
    Accumulator, Arrays, Backend, Deliver, Factors, GroupEntry, Image, Matrix, Norm, NormMethod,
    Report, Scheme, Shard, StepSource, Stream,
};
use crate::error::{Result, bail};
use crate::format::Dtype;
use blas::{Left, Plane, Product};
use driver::{Device, DevicePtr};
use elementwise::Gradient;
use gpu::Gpu;
use mainloop::Mainloop;
use panels::{Partials, no_tokens, plane_of};
use parameters::{KernelNorm, KernelReport, Region};
use std::mem::ManuallyDrop;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use workspace::{TOTAL_BYTES, Workspace};

/// `FORGE_NORM_TILES`.
const TILES: u32 = crate::ffi::enums::forge_norm_method::FORGE_NORM_TILES as u32;

/// A GPU.
pub struct Cuda {
    /// Dropped by the process that made it: in a fork of it the driver does not work.
    gpu: ManuallyDrop<Gpu>,
    process: u32,
    /// Held while a call enqueues its launches: they share the workspace, and those of another thread must
    /// not come between them.
    enqueueing: Mutex<()>,
}

impl Cuda {
    /// The GPU of this ordinal. Compiled kernels are kept in `cache_dir`, or where [`cache::Cache`] says.
    pub fn new(device: i32, cache_dir: Option<PathBuf>) -> Result<Self> {
        Ok(Self {
            gpu: ManuallyDrop::new(Gpu::new(device, cache_dir)?),
            process: std::process::id(),
            enqueueing: Mutex::default(),
        })
    }

    /// Refuses a fork of the process that made the context, before any lock is taken.
    fn check_process(&self) -> Result<()> {
        let process = std::process::id();
        if process != self.process {
            bail!(
                FORGE_ERROR_DEVICE,
                "context: made in process {}, of which this one ({process}) is a fork; CUDA does \
                 not work in a fork: start processes by spawn or exec, or make no CUDA context \
                 before the fork",
                self.process
            );
        }
        Ok(())
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.process == std::process::id() {
            // SAFETY: dropped once, here.
            unsafe { ManuallyDrop::drop(&mut self.gpu) };
        }
    }
}

/// A one-dimensional grid.
fn grid(blocks: u64) -> Result<[u32; 3]> {
    match u32::try_from(blocks) {
        Ok(blocks) if blocks <= i32::MAX as u32 => Ok([blocks.max(1), 1, 1]),
        _ => bail!(FORGE_ERROR_UNSUPPORTED, "shape: {blocks} tiles; a launch has at most 2^31"),
    }
}

impl Cuda {
    /// One update.
    ///
    /// # Safety
    /// As [`Backend::update`]; the context is current, and [`Cuda::alone`] is held.
    unsafe fn update_one(
        &self,
        entry: &GroupEntry,
        host: bool,
        workspace: &Workspace,
        stream: Stream,
    ) -> Result<Option<Report>> {
        let gpu = &self.gpu;
        let GroupEntry { scheme, shard, factors, accumulator, arrays, step, device_report } =
            *entry;
        // SAFETY: as promised by the caller.
        unsafe {
            let step = reduce::prologue(gpu, scheme, step, workspace.scalars, stream)?;
            let to_host = if host { workspace.result } else { 0 };
            let out = [to_host, device_report as DevicePtr];
            let fused = match self.mainloop(scheme, factors) {
                Mainloop::Sm90 => {
                    let reports = sm90_reports(workspace, out);
                    let taken = sm90::try_update(
                        gpu,
                        scheme,
                        shard,
                        factors,
                        accumulator,
                        arrays,
                        step,
                        reports,
                        stream,
                    )?;
                    taken.then_some(Squares::Reported)
                }
                Mainloop::Sm80 => {
                    let call = sm80::Call {
                        scheme,
                        shard,
                        factors,
                        accumulator,
                        arrays: Some(arrays),
                        mode: sm80::Mode::Update,
                        step,
                        partials: workspace.partials,
                    };
                    call.run(gpu, stream)?.then(|| Squares::partials_of(shard))
                }
                Mainloop::Panel => None,
            };
            let squares = match fused {
                Some(squares) => squares,
                None => {
                    let apply = |region: Region, gradient: Option<Plane>, to: &mut Partials| {
                        let at = to.take(region.tiles())?;
                        let dtype = gradient_dtype(factors, accumulator);
                        let gradient = gradient.map_or(Gradient::ZERO, |plane| Gradient {
                            data: plane.data,
                            stride: plane.stride as u64,
                            dtype,
                        });
                        elementwise::update(
                            gpu, scheme, shard, region, arrays, gradient, &step, at, stream,
                        )
                    };
                    Squares::Partials(panels::for_each(
                        gpu,
                        scheme,
                        shard,
                        factors,
                        accumulator,
                        workspace,
                        stream,
                        apply,
                    )?)
                }
            };
            if let Squares::Partials(count) = squares
                && out != [0, 0]
            {
                reduce::report(gpu, workspace.partials, count, out, stream)?;
            }
            if !host {
                return Ok(None);
            }
            let report: KernelReport = driver::read(workspace.result, stream)?;
            Ok(Some(Report {
                tiles: report.tiles,
                nonfinite_tiles: report.nonfinite_tiles,
                sum_of_squares: report.sum_of_squares,
            }))
        }
    }

    fn alone(&self) -> MutexGuard<'_, ()> {
        // Nothing is left half-written by a panic while it was held.
        self.enqueueing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The fused kernel that may be asked; none of them where there is nothing to multiply.
    fn mainloop(&self, scheme: &Scheme, factors: &[Factors]) -> Mainloop {
        let capability = self.gpu.properties().capability;
        if no_tokens(factors) { Mainloop::Panel } else { Mainloop::choose(capability, scheme) }
    }
}

/// Of the gradient that panels are of: in fp32, or where nothing is multiplied as it lies.
fn gradient_dtype(factors: &[Factors], accumulator: Option<Accumulator>) -> Dtype {
    accumulator.filter(|_| no_tokens(factors)).map_or(Dtype::F32, Accumulator::dtype)
}

/// Where the sum of squares of a gradient is that has been consumed.
enum Squares {
    /// In the report or the norm.
    Reported,
    /// In this many partials.
    Partials(u64),
}

impl Squares {
    /// By the kernel of 8.0: one partial for each tile.
    fn partials_of(shard: &Shard) -> Self {
        Self::Partials(Region::whole(shard).tiles())
    }
}

/// What the kernel of 9.0 needs to leave a report at `targets`.
fn sm90_reports(workspace: &Workspace, targets: [DevicePtr; 2]) -> sm90::Reports {
    let (partials, counter) = (workspace.partials, workspace.counters);
    sm90::Reports { targets, partials, counter, method: TILES }
}

impl Backend for Cuda {
    fn check_scheme(&self, scheme: &Scheme) -> Result<()> {
        scheme.rule.user().map_or(Ok(()), |rule| reduce::check_rule(&self.gpu, scheme, rule))
    }

    fn check_stream(&self, _stream: Stream) -> Result<()> {
        self.check_process()
    }

    fn alignment(&self, element_bytes: usize) -> usize {
        element_bytes
    }

    fn memory_is_host(&self) -> bool {
        false
    }

    fn device(&self) -> Option<Arc<Device>> {
        Some(self.gpu.device.clone())
    }

    fn check_memory(&self, name: &str, data: *const u8) -> Result<()> {
        let properties = self.gpu.properties();
        if !properties.reads_pageable_memory && !driver::knows(data as DevicePtr) {
            bail!(
                FORGE_ERROR_MEMORY,
                "{name}: {data:p} is no memory of CUDA but the host's, which GPU {} cannot reach; copy it \
                 to the GPU, or use a context of FORGE_BACKEND_CPU",
                properties.ordinal
            );
        }
        Ok(())
    }

    fn workspace_bytes(&self) -> u64 {
        TOTAL_BYTES
    }

    fn warm(&self, work: &Work, threads: usize, tell: &mut Tell) -> Result<Warmed> {
        let properties = self.gpu.properties();
        let target = needs::Target {
            capability: properties.capability,
            sm_count: properties.sm_count,
            shared_memory_per_block: properties.shared_memory_per_block,
        };
        warm::warm(&self.gpu.modules.images, &needs::needs(&target, work), threads, tell)
    }

    unsafe fn set_workspace(&self, data: *mut u8, _bytes: u64) -> Result<()> {
        self.check_process()?;
        let base = data as DevicePtr;
        let _entered = self.gpu.device.enter()?;
        // SAFETY: the caller lends this memory; nothing uses it yet.
        unsafe { driver::zero(Workspace::at(base).counters, Workspace::COUNTERS_BYTES)? };
        self.gpu.workspace.set(base);
        Ok(())
    }

    unsafe fn update(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        factors: &[Factors],
        accumulator: Option<Accumulator>,
        arrays: &Arrays,
        step: &StepSource,
        deliver: Deliver,
        stream: Stream,
    ) -> Result<Option<Report>> {
        let workspace = self.gpu.workspace.get()?;
        let _alone = self.alone();
        let _entered = self.gpu.device.enter()?;
        let device_report = deliver.device;
        let entry = GroupEntry { scheme, shard, factors, accumulator, arrays, step, device_report };
        // SAFETY: as promised by the caller.
        unsafe { self.update_one(&entry, deliver.host, &workspace, stream) }
    }

    unsafe fn update_group(
        &self,
        entries: &[GroupEntry],
        stream: Stream,
    ) -> Result<Vec<Option<Report>>> {
        let workspace = self.gpu.workspace.get()?;
        let _alone = self.alone();
        let _entered = self.gpu.device.enter()?;
        let mainloop = |e: &GroupEntry| self.mainloop(e.scheme, e.factors);
        // SAFETY: as promised by the caller.
        unsafe {
            let taken = group::enqueue(&self.gpu, entries, mainloop, &workspace, stream)?;
            for (entry, _) in entries.iter().zip(taken).filter(|(_, taken)| !taken) {
                self.update_one(entry, false, &workspace, stream)?;
            }
        }
        Ok(vec![None; entries.len()])
    }

    unsafe fn accumulate(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        factors: &[Factors],
        accumulator: Accumulator,
        stream: Stream,
    ) -> Result<()> {
        let workspace = self.gpu.workspace.get()?;
        let _alone = self.alone();
        let _entered = self.gpu.device.enter()?;
        // SAFETY: as promised by the caller.
        unsafe {
            let gpu = &self.gpu;
            let fused = match self.mainloop(scheme, factors) {
                Mainloop::Sm90 => {
                    sm90::try_accumulate(gpu, scheme, shard, factors, accumulator, stream)?
                }
                Mainloop::Sm80 => {
                    let buffer = Some(accumulator);
                    let mode = sm80::Mode::Accumulate;
                    sm80::Call::plain(scheme, shard, factors, buffer, mode, 0).run(gpu, stream)?
                }
                Mainloop::Panel => false,
            };
            if fused {
                return Ok(());
            }
            let region = Region::whole(shard);
            let out = plane_of(accumulator, shard, region);
            let dtype = scheme.factor_dtype;
            panels::products(gpu, dtype, factors, region, Some(out), out, &workspace, stream)
        }
    }

    unsafe fn norm(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        factors: &[Factors],
        accumulator: Option<Accumulator>,
        _method: NormMethod,
        deliver: Deliver,
        stream: Stream,
    ) -> Result<Option<Norm>> {
        let gpu = &self.gpu;
        let workspace = gpu.workspace.get()?;
        let _alone = self.alone();
        let _entered = gpu.device.enter()?;
        // SAFETY: as promised by the caller.
        unsafe {
            let host = if deliver.host { workspace.result } else { 0 };
            let out = [host, deliver.device as DevicePtr];
            let fused = match self.mainloop(scheme, factors) {
                Mainloop::Sm90 => {
                    let reports = sm90_reports(&workspace, out);
                    sm90::try_norm(gpu, scheme, shard, factors, accumulator, reports, stream)?
                        .then_some(Squares::Reported)
                }
                Mainloop::Sm80 => {
                    let (at, mode) = (workspace.partials, sm80::Mode::Norm);
                    let call = sm80::Call::plain(scheme, shard, factors, accumulator, mode, at);
                    call.run(gpu, stream)?.then(|| Squares::partials_of(shard))
                }
                Mainloop::Panel => None,
            };
            let squares = match fused {
                Some(squares) => squares,
                None => {
                    let square = |region: Region, gradient: Option<Plane>, to: &mut Partials| {
                        // Zeros need no partial: the sum over none is 0.
                        let Some(Plane { data, stride }) = gradient else { return Ok(()) };
                        let at = to.take(region.tiles())?;
                        let size = (region.rows, region.cols);
                        let gradient = Gradient {
                            data,
                            stride: stride as u64,
                            dtype: gradient_dtype(factors, accumulator),
                        };
                        reduce::squares(gpu, gradient, size, at, stream)
                    };
                    Squares::Partials(panels::for_each(
                        gpu,
                        scheme,
                        shard,
                        factors,
                        accumulator,
                        &workspace,
                        stream,
                        square,
                    )?)
                }
            };
            if let Squares::Partials(count) = squares {
                reduce::norm(gpu, workspace.partials, count, TILES, out, stream)?;
            }
            if !deliver.host {
                return Ok(None);
            }
            let norm: KernelNorm = driver::read(workspace.result, stream)?;
            let method = NormMethod::Tiles;
            Ok(Some(Norm { method, sum_of_squares: norm.sum_of_squares }))
        }
    }

    unsafe fn dgrad(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        tokens: usize,
        dy: Matrix,
        weight: *const u8,
        dx: *mut u8,
        stream: Stream,
    ) -> Result<()> {
        if tokens == 0 {
            return Ok(());
        }
        let workspace = self.gpu.workspace.get()?;
        let _alone = self.alone();
        let _entered = self.gpu.device.enter()?;
        let (dtype, weight_dtype) = (scheme.factor_dtype, scheme.weight_format.model_dtype());
        let (dy_data, w, dx) = (dy.data as DevicePtr, weight as DevicePtr, dx as DevicePtr);
        let product = Product {
            m: tokens,
            n: shard.cols,
            k: shard.rows,
            dtype,
            out_dtype: dtype,
            left: Left { data: dy_data, stride: dy.stride, summed_first: false },
            right: Plane { data: w, stride: shard.cols },
            addend: None,
            out: Plane { data: dx, stride: shard.cols },
        };
        // SAFETY: as promised by the caller.
        unsafe {
            if dtype == weight_dtype && self.gpu.blas.enqueue(&product, workspace.blas, stream)? {
                return Ok(());
            }
            let cols = shard.cols as u64;
            let segment = exact::Segment {
                left: exact::Operand { data: dy_data, row: dy.stride as u64, depth: 1 },
                right: exact::Operand { data: w, row: 1, depth: cols },
                terms: shard.rows as u64,
            };
            let types = exact::Types { left: dtype, right: weight_dtype, out: dtype };
            let (size, out) = ((tokens as u64, cols), exact::Plane { data: dx, stride: cols });
            exact::product(&self.gpu, types, &[segment], size, None, out, stream)
        }
    }

    unsafe fn bias_grad(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        tokens: usize,
        dy: Matrix,
        dbias: *mut u8,
        stream: Stream,
    ) -> Result<()> {
        let _entered = self.gpu.device.enter()?;
        // SAFETY: as promised by the caller.
        unsafe { reduce::bias(&self.gpu, scheme, shard.rows, tokens, dy, dbias, stream) }
    }

    unsafe fn copy(
        &self,
        from: Matrix,
        (rows, cols): (usize, usize),
        dtype: Dtype,
        to: *mut u8,
        stream: Stream,
    ) -> Result<()> {
        let _entered = self.gpu.device.enter()?;
        let element = dtype.bytes();
        let (source, pitch) = (from.data as DevicePtr, from.stride * element);
        // SAFETY: as promised by the caller.
        unsafe { driver::copy(source, pitch, to as DevicePtr, (rows, cols * element), stream) }
    }

    unsafe fn zero(&self, to: *mut u8, bytes: usize, stream: Stream) -> Result<()> {
        let _entered = self.gpu.device.enter()?;
        // SAFETY: as promised by the caller.
        unsafe { driver::set_zero(to as DevicePtr, bytes, stream) }
    }

    unsafe fn export(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        arrays: &Arrays,
        image: Image,
        out: *mut f32,
        stream: Stream,
    ) -> Result<()> {
        let _entered = self.gpu.device.enter()?;
        // SAFETY: as promised by the caller.
        unsafe { reduce::image(&self.gpu, scheme, shard, arrays, image, out, true, stream) }
    }

    unsafe fn import(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        arrays: &Arrays,
        image: Image,
        values: *const f32,
        stream: Stream,
    ) -> Result<()> {
        let _entered = self.gpu.device.enter()?;
        let values = values.cast_mut();
        // SAFETY: as promised by the caller; an import only reads the values.
        unsafe { reduce::image(&self.gpu, scheme, shard, arrays, image, values, false, stream) }
    }
}
