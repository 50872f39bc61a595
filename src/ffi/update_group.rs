//! The updates of several linears in one call.

use super::boundary::{boundary, check_pointer, handle, read_struct};
use super::buffers::Checker;
use super::linear::forge_linear;
use super::run::{check_reports, read_update, write_reports};
use super::types::forge_update;
use crate::backend::Stream;
use crate::error::{Error, Result, bail, forge_status};
use crate::linear::{GroupUpdate, update_group};
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Arc;

/// An error of one of them says of which.
fn of_entry<T>(index: usize, result: Result<T>) -> Result<T> {
    result.map_err(|e| Error::new(e.status, format!("updates[{index}]: {}", e.message)))
}

/// forge_linear_update of several linears of one context, `updates[i]` of `linears[i]`, without waiting:
/// reports go to `device_report` alone. Many small weights leave most of a GPU idle one by one; here those with
/// the same formats, rule and scalars share launches. All updates are checked before the first of them begins,
/// and none may write what another one reads or writes. `count` may be 0.
///
/// A weight that shares a launch may get other bits than from forge_linear_update on GPUs of compute capability
/// 9.0, which have a kernel of their own for one weight; the same calls always give the same bits.
///
/// Written: weight, `weight_extra`, states and scales of each `updates[i]->parameter`.
///
/// Errors: as forge_linear_update, with `updates[i]` in the message; FORGE_ERROR_UNSUPPORTED (linears of
/// different contexts). Those of a device, and of a rule's own function, may leave some updates done and the
/// others not, and reports unwritten.
///
/// # Safety
/// As forge_linear_backward, of each; `linears` and `updates` have `count` elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forge_linear_update_group(
    linears: *const *mut forge_linear,
    updates: *const *const forge_update,
    count: u32,
    stream: *mut c_void,
) -> forge_status {
    boundary(|| {
        if count == 0 {
            return Ok(());
        }
        check_pointer("linears", linears)?;
        check_pointer("updates", updates)?;
        // SAFETY: as promised by the caller.
        unsafe {
            let linears = std::slice::from_raw_parts(linears, count as usize);
            let updates = std::slice::from_raw_parts(updates, count as usize);
            let backend = &handle("linears[0]", linears[0])?.linear.backend;
            let stream = Stream(stream);
            backend.check_stream(stream)?;
            let mut check = Checker::new(&**backend);
            let mut work: Vec<GroupUpdate> = Vec::with_capacity(linears.len());
            for (i, (linear, update)) in linears.iter().zip(updates).enumerate() {
                let linear = handle(&format!("linears[{i}]"), linear.cast_const())?;
                if !Arc::ptr_eq(backend, &linear.linear.backend) {
                    bail!(
                        FORGE_ERROR_UNSUPPORTED,
                        "linears[{i}]: of another context than linears[0]; make a call for each"
                    );
                }
                check.owner = format!("updates[{i}]: ");
                work.push(of_entry(i, read_entry(linear, *update, &mut check))?);
            }
            check.finish()?;
            let reports = update_group(&work, stream)?;
            for (update, report) in work.iter().zip(reports) {
                let target = update.device_report.cast();
                write_reports(update.linear, null_mut(), target, report);
            }
            Ok(())
        }
    })
}

/// # Safety
/// As forge_linear_update_group.
unsafe fn read_entry<'a>(
    linear: &'a forge_linear,
    update: *const forge_update,
    check: &mut Checker,
) -> Result<GroupUpdate<'a>> {
    // SAFETY: as promised by the caller.
    unsafe {
        let u = read_struct("update", update)?;
        check_reports(check, null_mut(), u.device_report)?;
        read_update(linear, &u, check)
    }
}
