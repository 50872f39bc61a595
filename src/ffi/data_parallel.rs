//! What a linear does whose W other ranks have as well: sums of dW over them, and W from the owners of its rows.

use super::boundary::{boundary, handle};
use super::buffers::Checker;
use super::linear::forge_linear;
use super::types::{forge_buffer, forge_segment};
use crate::backend::Stream;
use crate::error::{bail, forge_status};
use crate::format::Dtype;
use std::ffi::c_void;

/// `accumulator += Σ dYᵀX` over all segments and all data-parallel ranks, for the owned rows, in panels: of the factors
/// that FORGE_BACKWARD_KEEP left to the caller where dW is reduced in panels. These are of the caller's own tokens and of
/// all its rows: segments here have dy [tokens, out_local].
///
/// Written: `accumulator`, fp32 [out_owned, in_local], and `workspace`, of forge_linear_workspace for
/// FORGE_BACKWARD_ACCUMULATE and the tokens of any segment.
///
/// Errors: FORGE_ERROR_UNSUPPORTED (the linear is not data parallel), FORGE_ERROR_COLLECTIVE; as
/// forge_linear_backward.
///
/// # Safety
/// As forge_linear_backward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_reduce(
    linear: *mut forge_linear,
    segments: *const forge_segment,
    n_segments: u32,
    accumulator: forge_buffer,
    workspace: forge_buffer,
    stream: *mut c_void,
) -> forge_status {
    boundary(|| {
        // SAFETY: as promised by the caller.
        unsafe {
            let forge_linear { linear, layout } = handle("linear", linear)?;
            let stream = Stream(stream);
            linear.backend.check_stream(stream)?;
            if linear.data_parallel.is_none() {
                bail!(
                    FORGE_ERROR_UNSUPPORTED,
                    "linear: not data parallel; use forge_linear_accumulate"
                );
            }
            let mut check = Checker::new(&*linear.backend);
            let (shape, dtype) = (&linear.shape, linear.scheme.factor_dtype);
            let factors = check.segments_of(shape, &shape.shard, dtype, segments, n_segments)?;
            let (data, bytes) = (accumulator.data.cast(), accumulator.bytes);
            let Some(accumulator) = check.accumulator(data, bytes, layout, true)? else {
                bail!(FORGE_ERROR_NULL, "accumulator: data is NULL");
            };
            let needed = shape.panel_workspace() as u64;
            if workspace.bytes < needed {
                bail!(
                    FORGE_ERROR_BUFFER_SIZE,
                    "workspace: {} bytes, {needed} needed; see forge_linear_workspace",
                    workspace.bytes
                );
            }
            check.buffer("workspace", workspace.data.cast(), needed, Dtype::F32, true)?;
            check.finish()?;
            linear.reduce(&factors, accumulator, workspace.data.cast(), stream)
        }
    })
}

/// Starts to gather W from the data-parallel ranks, each of which has written the rows that it owns: an import does
/// not do so by itself, as an update does. forge_comm_wait comes before W is read. Nothing where one rank has all rows.
///
/// Written: `weight`, of the layout's size.
///
/// Errors: FORGE_ERROR_COLLECTIVE.
///
/// # Safety
/// As forge_linear_backward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_gather_weight(
    linear: *const forge_linear,
    weight: forge_buffer,
    stream: *mut c_void,
) -> forge_status {
    boundary(|| {
        // SAFETY: as promised by the caller.
        unsafe {
            let forge_linear { linear, layout } = handle("linear", linear)?;
            let stream = Stream(stream);
            linear.backend.check_stream(stream)?;
            let mut check = Checker::new(&*linear.backend);
            let data = weight.data.cast::<u8>();
            check.array("weight", data, weight.bytes, &layout.weight, true)?;
            check.finish()?;
            linear.gather_weight(data, stream)
        }
    })
}
