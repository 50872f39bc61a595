//! The calls on a linear that move data: backward, update, accumulate, norm, dgrad, images.

use super::boundary::{
    Sized32, boundary, check_out_struct, check_pointer, check_reserved, handle, read_struct,
};
use super::buffers::{Checker, read_parameter};
use super::enums::{self, forge_backward_mode};
use super::linear::forge_linear;
use super::types::{
    forge_backward, forge_buffer, forge_const_buffer, forge_norm, forge_parameter, forge_report,
    forge_segment, forge_step, forge_step_scalars, forge_update,
};
use crate::backend::{Arrays, Deliver, Image, Norm, NormMethod, Report, StepSource, Stream};
use crate::error::{Result, bail, forge_status};
use crate::format::Dtype;
use crate::linear::{Backward, GroupUpdate, Linear, Mode};
use crate::rule::{MAX_STATES, StepScalars, check_scalars};
use std::ffi::c_void;
use std::ptr::null_mut;

const _: () = assert!(size_of::<forge_step_scalars>() == size_of::<StepScalars>());

/// # Safety
/// `step` is NULL, misaligned, or points to a struct of its `struct_size`, and its `device_scalars`
/// is NULL, misaligned or readable in the backend's memory.
pub(super) unsafe fn read_step(linear: &Linear, step: *const forge_step) -> Result<StepSource> {
    // SAFETY: as promised by the caller.
    let step = unsafe { read_struct("step", step)? };
    check_reserved("step", step.reserved)?;
    let scalars = if step.device_scalars.is_null() {
        step.scalars
    } else {
        check_pointer("step.device_scalars", step.device_scalars)?;
        linear.backend.check_memory("step.device_scalars", step.device_scalars.cast())?;
        if !linear.backend.memory_is_host() {
            return Ok(StepSource::Device(step.device_scalars.cast()));
        }
        // SAFETY: as promised by the caller; both are repr-compatible (C ABI fields in order).
        unsafe { *step.device_scalars }
    };
    let scalars = StepScalars {
        step: scalars.step,
        seed: scalars.seed,
        grad_scale: scalars.grad_scale,
        hyper: scalars.hyper,
    };
    check_scalars(linear.scheme.rule, linear.scheme.flags, &scalars)?;
    Ok(StepSource::new(&linear.scheme, &scalars))
}

/// Checks the scalars of a step against the rule's ranges and does nothing else: before the first of
/// many updates, so that a bad scalar is found while no weight has moved. Of CUDA's `device_scalars` only the
/// address is checked.
///
/// Errors: FORGE_ERROR_SCALAR.
///
/// # Safety
/// `linear` is live, `step` points to a struct of its `struct_size`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_check_step(
    linear: *const forge_linear,
    step: *const forge_step,
) -> forge_status {
    // SAFETY: as promised by the caller.
    boundary(|| unsafe { read_step(&handle("linear", linear)?.linear, step).map(|_| ()) })
}

/// Where a report is wanted: on the host, in the backend's memory, both or neither.
///
/// # Safety
/// `host` is NULL, misaligned, or points to a struct of its `struct_size`.
pub(super) unsafe fn check_reports(
    check: &mut Checker,
    host: *mut forge_report,
    device: *mut forge_report,
) -> Result<Deliver> {
    if !host.is_null() {
        // SAFETY: as promised by the caller.
        unsafe { check_out(check, "report", host)? }
    }
    check_device_out(check, "device_report", device)?;
    Ok(Deliver { host: !host.is_null(), device: device.cast() })
}

/// A struct that the call fills in the backend's memory; NULL is allowed.
fn check_device_out<T>(check: &mut Checker, name: &str, out: *mut T) -> Result<()> {
    if out.is_null() {
        return Ok(());
    }
    check_pointer(name, out)?;
    check.buffer(name, out.cast_const().cast(), size_of::<T>() as u64, Dtype::U8, true)
}

/// A struct that the call fills: it must lie apart from the buffers as well.
///
/// # Safety
/// `out` is NULL, misaligned, or points to a struct of its `struct_size`.
unsafe fn check_out<T: Sized32>(check: &mut Checker, name: &str, out: *mut T) -> Result<()> {
    // SAFETY: as promised by the caller.
    unsafe { check_out_struct(name, out)? };
    check.range(name, out.cast_const().cast(), size_of::<T>() as u64, Dtype::U8, true)
}

/// Writes a report to the host, and to the backend's memory where that is the host's as well.
///
/// # Safety
/// Both pointers passed [`check_reports`].
pub(super) unsafe fn write_reports(
    linear: &Linear,
    host: *mut forge_report,
    device: *mut forge_report,
    report: Option<Report>,
) {
    let report = report.unwrap_or_default();
    let value = forge_report {
        struct_size: size_of::<forge_report>() as u32,
        reserved: 0,
        tiles: report.tiles,
        nonfinite_tiles: report.nonfinite_tiles,
        sum_of_squares: report.sum_of_squares,
    };
    let in_host_memory = [!host.is_null(), !device.is_null() && linear.backend.memory_is_host()];
    for (out, wanted) in [host, device].into_iter().zip(in_host_memory) {
        if wanted {
            // SAFETY: checked by the caller, and the host's memory.
            unsafe { *out = value };
        }
    }
}

/// A whole backward: communication, dX, dbias, and what the mode says of dW. dX is computed with W as
/// it was before the update. If a collective fails before the update, W is unchanged; a failure of
/// the last wait is reported after it. `report` may be NULL; where it is not, CUDA waits for the
/// stream (`backward->device_report` needs no wait).
///
/// Written: `dx`, `dbias`, `workspace`, and by mode weight, `weight_extra`, states and scales (UPDATE),
/// `accumulator` (ACCUMULATE) or `device_norm` (KEEP).
///
/// Errors: FORGE_ERROR_COLLECTIVE; for CUDA FORGE_ERROR_DEVICE, FORGE_ERROR_COMPILE, FORGE_ERROR_WORKSPACE; those
/// of the 1xx band about the argument that the message names, before anything is written.
///
/// # Safety
/// `linear` is live, structs have their `struct_size`, buffers have the sizes that they say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_backward(
    linear: *mut forge_linear,
    backward: *const forge_backward,
    report: *mut forge_report,
    stream: *mut c_void,
) -> forge_status {
    boundary(|| {
        // SAFETY: as promised by the caller.
        unsafe {
            let forge_linear { linear, layout } = handle("linear", linear)?;
            let mut check = Checker::new(&*linear.backend);
            let b = read_struct("backward", backward)?;
            let deliver = check_reports(&mut check, report, b.device_report)?;
            check_device_out(&mut check, "device_norm", b.device_norm)?;
            let stream = Stream(stream);
            linear.backend.check_stream(stream)?;
            linear.shape.check_tokens(b.tokens)?;
            let (shape, dtype) = (&linear.shape, linear.scheme.factor_dtype);
            let tokens = b.tokens as usize;

            let (dy_rows, x_rows) = (shape.dy_tokens(tokens), shape.x_tokens(tokens));
            let (rows, cols) = (shape.shard.rows as u64, shape.shard.cols as u64);
            for (name, stride, width, is_x) in
                [("dy_stride", b.dy_stride, rows, false), ("x_stride", b.x_stride, cols, true)]
            {
                let gathered = shape.gathered_features().is_some_and(|(_, x)| x == is_x)
                    || (is_x && linear.data_parallel.is_some());
                if gathered && stride != 0 && stride != width {
                    bail!(
                        FORGE_ERROR_UNSUPPORTED,
                        "{name}: {stride}; a factor that is gathered must be contiguous (0 or {width})"
                    );
                }
            }
            let dy = check.factor("dy", &b.dy, dy_rows as u64, rows, b.dy_stride, dtype)?;
            let x = check.factor("x", &b.x, x_rows as u64, cols, b.x_stride, dtype)?;
            let dx = check.output("dx", &b.dx, x_rows as u64 * cols, dtype)?;
            let dbias = check.output("dbias", &b.dbias, rows, dtype)?;

            let backward_mode = enums::backward_mode("mode", b.mode)?;
            let keeps = backward_mode == forge_backward_mode::FORGE_BACKWARD_KEEP;
            let needed = linear.workspace_bytes(keeps, tokens) as u64;
            if b.workspace.bytes < needed {
                bail!(
                    FORGE_ERROR_BUFFER_SIZE,
                    "workspace: {} bytes, {needed} needed for {tokens} tokens; \
                     see forge_linear_workspace",
                    b.workspace.bytes
                );
            }
            if needed > 0 {
                // Panels are fp32, whatever the factors are.
                let panels = linear.data_parallel.is_some() && !linear.exchanges(tokens);
                let widest = if panels { Dtype::F32 } else { dtype };
                check.buffer("workspace", b.workspace.data.cast(), needed, widest, true)?;
            }

            let buffer = &b.accumulator;
            let mode = match backward_mode {
                forge_backward_mode::FORGE_BACKWARD_UPDATE => Mode::Update {
                    step: read_step(linear, b.step)?,
                    accumulator: check.accumulator(
                        buffer.data.cast(),
                        buffer.bytes,
                        layout,
                        false,
                    )?,
                },
                forge_backward_mode::FORGE_BACKWARD_ACCUMULATE => {
                    let accumulator =
                        check.accumulator(buffer.data.cast(), buffer.bytes, layout, true)?;
                    match accumulator {
                        Some(accumulator) => Mode::Accumulate(accumulator),
                        None => bail!(
                            FORGE_ERROR_NULL,
                            "accumulator: data is NULL; FORGE_BACKWARD_ACCUMULATE adds to it"
                        ),
                    }
                }
                forge_backward_mode::FORGE_BACKWARD_KEEP => {
                    let local = linear.data_parallel.is_some() && !linear.exchanges(tokens);
                    if local && !b.device_norm.is_null() {
                        bail!(
                            FORGE_ERROR_UNSUPPORTED,
                            "device_norm: dW of {tokens} tokens is reduced in panels, and is not known before; take \
                             the norm of what forge_linear_reduce leaves"
                        );
                    }
                    Mode::Keep { norm: b.device_norm.cast() }
                }
            };
            let arrays = if matches!(mode, Mode::Update { .. }) {
                check.arrays(&read_parameter(b.parameter)?, layout, true)?
            } else {
                let mut arrays = Arrays {
                    weight: null_mut(),
                    extra: null_mut(),
                    states: [null_mut(); MAX_STATES],
                    scales: [null_mut(); MAX_STATES],
                };
                if dx.is_some() {
                    let weight = read_parameter(b.parameter)?.weight;
                    let data = weight.data.cast::<u8>();
                    check.array("parameter.weight", data, weight.bytes, &layout.weight, false)?;
                    arrays.weight = data;
                }
                arrays
            };
            check.finish()?;
            let workspace = b.workspace.data.cast();
            let work =
                Backward { tokens, dy, x, dx, dbias, workspace, arrays, mode, deliver, stream };
            let told = linear.backward(&work)?;
            if let Some(norm) = told.norm.filter(|_| linear.backend.memory_is_host()) {
                *b.device_norm = norm_struct(norm);
            }
            if matches!(mode, Mode::Update { .. }) {
                write_reports(linear, report, b.device_report, told.report);
            } else {
                // As on a device, where nothing runs that would write one.
                write_reports(linear, report, null_mut(), None);
            }
            Ok(())
        }
    })
}

/// `dx = dy · W`, without communication: dy [tokens, out_local] with rows `dy_stride` elements apart (0:
/// contiguous), dx [tokens, in_local] contiguous, both of factor_dtype. Of `parameter` only `weight` is read.
///
/// # Safety
/// As forge_linear_backward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_dgrad(
    linear: *mut forge_linear,
    tokens: u64,
    dy: forge_const_buffer,
    dy_stride: u64,
    parameter: *const forge_parameter,
    dx: forge_buffer,
    stream: *mut c_void,
) -> forge_status {
    boundary(|| {
        // SAFETY: as promised by the caller.
        unsafe {
            let forge_linear { linear, layout } = handle("linear", linear)?;
            let stream = Stream(stream);
            linear.backend.check_stream(stream)?;
            linear.shape.check_unsplit_tokens(tokens)?;
            let (shard, dtype) = (&linear.shape.shard, linear.scheme.factor_dtype);
            let mut check = Checker::new(&*linear.backend);
            let dy = check.factor("dy", &dy, tokens, shard.rows as u64, dy_stride, dtype)?;
            let weight = read_parameter(parameter)?.weight;
            let data = weight.data.cast::<u8>();
            check.array("parameter.weight", data, weight.bytes, &layout.weight, false)?;
            let Some(dx) = check.output("dx", &dx, tokens * shard.cols as u64, dtype)? else {
                bail!(FORGE_ERROR_NULL, "dx: data is NULL");
            };
            check.finish()?;
            linear.dgrad(tokens as usize, dy, data, dx, stream)
        }
    })
}

/// What an update is of, but for its reports.
///
/// # Safety
/// As forge_linear_backward.
pub(super) unsafe fn read_update<'a>(
    of: &'a forge_linear,
    u: &forge_update,
    check: &mut Checker,
) -> Result<GroupUpdate<'a>> {
    let forge_linear { linear, layout } = of;
    // SAFETY: as promised by the caller.
    unsafe {
        let factors = check.segments(linear, u.segments, u.n_segments)?;
        let factor = linear.scheme.factor_dtype;
        let accumulator = check.addend(&u.accumulator, layout, factor, u.n_segments)?;
        let arrays = check.arrays(&read_parameter(u.parameter)?, layout, true)?;
        let step = read_step(linear, u.step)?;
        let device_report = u.device_report.cast();
        Ok(GroupUpdate { linear, factors, accumulator, arrays, step, device_report })
    }
}

/// The fused update over the tokens of all segments. `report` may be NULL; where it is not, CUDA waits
/// for the stream (`update->device_report` needs no wait). Tiles whose gradient is not finite are left as
/// they were and counted.
///
/// Written: weight, `weight_extra`, states and scales of `update->parameter`.
///
/// # Safety
/// As forge_linear_backward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_update(
    linear: *mut forge_linear,
    update: *const forge_update,
    report: *mut forge_report,
    stream: *mut c_void,
) -> forge_status {
    boundary(|| {
        // SAFETY: as promised by the caller.
        unsafe {
            let handle = handle("linear", linear)?;
            let linear = &handle.linear;
            let mut check = Checker::new(&*linear.backend);
            let u = read_struct("update", update)?;
            let deliver = check_reports(&mut check, report, u.device_report)?;
            let stream = Stream(stream);
            linear.backend.check_stream(stream)?;
            let GroupUpdate { factors, accumulator, arrays, step, .. } =
                read_update(handle, &u, &mut check)?;
            check.finish()?;
            let done = linear.update(&factors, accumulator, &arrays, &step, deliver, stream)?;
            write_reports(linear, report, u.device_report, done);
            Ok(())
        }
    })
}

/// `accumulator += Σ dYᵀX` over all segments; fp32 [out_owned, in_local]. The caller zeroes it before a step's
/// first micro-batch.
///
/// # Safety
/// As forge_linear_backward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_accumulate(
    linear: *mut forge_linear,
    segments: *const forge_segment,
    n_segments: u32,
    accumulator: forge_buffer,
    stream: *mut c_void,
) -> forge_status {
    boundary(|| {
        // SAFETY: as promised by the caller.
        unsafe {
            let forge_linear { linear, layout } = handle("linear", linear)?;
            let stream = Stream(stream);
            linear.backend.check_stream(stream)?;
            let mut check = Checker::new(&*linear.backend);
            let factors = check.segments(linear, segments, n_segments)?;
            let (data, bytes) = (accumulator.data.cast::<u8>(), accumulator.bytes);
            let Some(accumulator) = check.accumulator(data, bytes, layout, true)? else {
                bail!(FORGE_ERROR_NULL, "accumulator: data is NULL");
            };
            check.finish()?;
            linear.accumulate(&factors, accumulator, stream)
        }
    })
}

/// The arguments of a norm.
struct NormCall {
    linear: *mut forge_linear,
    segments: *const forge_segment,
    n_segments: u32,
    accumulator: forge_const_buffer,
    method: u32,
    stream: *mut c_void,
}

/// Checks and runs a norm: `out` on the host or, if `device`, in the backend's memory.
///
/// # Safety
/// As forge_linear_norm and forge_linear_norm_async.
unsafe fn norm(call: NormCall, out: *mut forge_norm, device: bool) -> Result<()> {
    // SAFETY: as promised by the caller.
    unsafe {
        let forge_linear { linear, layout } = handle("linear", call.linear)?;
        let mut check = Checker::new(&*linear.backend);
        if device {
            check_pointer("device_out", out)?;
            check_device_out(&mut check, "device_out", out)?;
        } else {
            check_out(&mut check, "out", out)?;
        }
        let stream = Stream(call.stream);
        linear.backend.check_stream(stream)?;
        let method = enums::norm_method("method", call.method)?;
        let factors = check.segments(linear, call.segments, call.n_segments)?;
        let factor = linear.scheme.factor_dtype;
        let accumulator = check.addend(&call.accumulator, layout, factor, call.n_segments)?;
        check.finish()?;
        let device: *mut c_void = if device { out.cast() } else { null_mut() };
        let deliver = Deliver { host: device.is_null(), device };
        let norm = linear.norm(&factors, accumulator, method, deliver, stream)?;
        let host_writes = deliver.host || linear.backend.memory_is_host();
        if let Some(norm) = norm.filter(|_| host_writes) {
            *out = norm_struct(norm);
        }
        Ok(())
    }
}

fn norm_struct(norm: Norm) -> forge_norm {
    let used = match norm.method {
        NormMethod::Gram => enums::forge_norm_method::FORGE_NORM_GRAM,
        _ => enums::forge_norm_method::FORGE_NORM_TILES,
    };
    forge_norm {
        struct_size: size_of::<forge_norm>() as u32,
        method: used as u32,
        sum_of_squares: norm.sum_of_squares,
        nonfinite: u32::from(!norm.sum_of_squares.is_finite()),
        reserved: 0,
    }
}

/// `‖Σ dYᵀX (+ accumulator)‖²` of this shard, without storing dW. The method asked for is a wish: with
/// an accumulator, or where Gram sums would cancel or overflow, tiles are taken; `out->method` tells. The
/// accumulator is as in forge_update.
/// On CUDA this waits for the stream; see forge_linear_norm_async.
///
/// # Safety
/// As forge_linear_backward; `out` points to a struct of its `struct_size`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_norm(
    linear: *mut forge_linear,
    segments: *const forge_segment,
    n_segments: u32,
    accumulator: forge_const_buffer,
    method: u32,
    out: *mut forge_norm,
    stream: *mut c_void,
) -> forge_status {
    let call = NormCall { linear, segments, n_segments, accumulator, method, stream };
    // SAFETY: as promised by the caller.
    boundary(|| unsafe { norm(call, out, false) })
}

/// As forge_linear_norm, with the result in the backend's memory, written whole when the work runs:
/// the host does not wait.
///
/// # Safety
/// As forge_linear_backward; `device_out` is writable in the backend's memory until the work is done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_norm_async(
    linear: *mut forge_linear,
    segments: *const forge_segment,
    n_segments: u32,
    accumulator: forge_const_buffer,
    method: u32,
    device_out: *mut forge_norm,
    stream: *mut c_void,
) -> forge_status {
    let call = NormCall { linear, segments, n_segments, accumulator, method, stream };
    // SAFETY: as promised by the caller.
    boundary(|| unsafe { norm(call, device_out, true) })
}

/// Checks and runs an export (`out` written) or an import.
///
/// # Safety
/// As forge_linear_backward.
unsafe fn image(
    linear: *const forge_linear,
    parameter: *const forge_parameter,
    image: impl FnOnce(&Linear) -> Result<Image>,
    fp32: (*mut c_void, u64),
    export: bool,
    stream: *mut c_void,
) -> Result<()> {
    // SAFETY: as promised by the caller.
    unsafe {
        let forge_linear { linear, layout } = handle("linear", linear)?;
        let image = image(linear)?;
        let stream = Stream(stream);
        linear.backend.check_stream(stream)?;
        let mut check = Checker::new(&*linear.backend);
        let arrays = check.arrays(&read_parameter(parameter)?, layout, !export)?;
        let (data, bytes) = (fp32.0.cast::<u8>(), fp32.1);
        let mut plain = layout.accumulator;
        plain.dtype = Some(Dtype::F32);
        check.array("fp32", data, bytes, &plain, export)?;
        check.finish()?;
        if export {
            linear.export(&arrays, image, data.cast(), stream)
        } else {
            linear.import(&arrays, image, data.cast(), stream)
        }
    }
}

fn state_image(index: u32) -> impl FnOnce(&Linear) -> Result<Image> {
    move |linear| {
        let n = linear.scheme.n_states;
        if index as usize >= n {
            bail!(FORGE_ERROR_STATE_INDEX, "index: {index}; the rule has {n} states");
        }
        Ok(Image::State(index as usize))
    }
}

/// Writes the master weight as fp32 [out_owned, in_local].
///
/// # Safety
/// As forge_linear_backward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_export_weight(
    linear: *const forge_linear,
    parameter: *const forge_parameter,
    fp32: forge_buffer,
    stream: *mut c_void,
) -> forge_status {
    // SAFETY: as promised by the caller.
    boundary(|| unsafe {
        image(linear, parameter, |_| Ok(Image::Weight), (fp32.data, fp32.bytes), true, stream)
    })
}

/// Reads the master weight from fp32 [out_owned, in_local], rounding to nearest.
///
/// # Safety
/// As forge_linear_backward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_import_weight(
    linear: *const forge_linear,
    parameter: *const forge_parameter,
    fp32: forge_const_buffer,
    stream: *mut c_void,
) -> forge_status {
    let fp32 = (fp32.data.cast_mut(), fp32.bytes);
    // SAFETY: as promised by the caller; an import only reads it.
    boundary(|| unsafe { image(linear, parameter, |_| Ok(Image::Weight), fp32, false, stream) })
}

/// Writes state `index` as fp32 [out_owned, in_local].
///
/// # Safety
/// As forge_linear_backward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_export_state(
    linear: *const forge_linear,
    parameter: *const forge_parameter,
    index: u32,
    fp32: forge_buffer,
    stream: *mut c_void,
) -> forge_status {
    // SAFETY: as promised by the caller.
    boundary(|| unsafe {
        image(linear, parameter, state_image(index), (fp32.data, fp32.bytes), true, stream)
    })
}

/// Reads state `index` from fp32 [out_owned, in_local], rounding to nearest.
///
/// # Safety
/// As forge_linear_backward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_import_state(
    linear: *const forge_linear,
    parameter: *const forge_parameter,
    index: u32,
    fp32: forge_const_buffer,
    stream: *mut c_void,
) -> forge_status {
    let fp32 = (fp32.data.cast_mut(), fp32.bytes);
    // SAFETY: as promised by the caller; an import only reads it.
    boundary(|| unsafe { image(linear, parameter, state_image(index), fp32, false, stream) })
}
