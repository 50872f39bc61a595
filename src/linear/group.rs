//! The updates of several linears together.

use super::Linear;
use crate::backend::{Accumulator, Arrays, Factors, GroupEntry, Report, StepSource, Stream};
use crate::error::Result;
use std::ffi::c_void;

/// One linear's.
pub struct GroupUpdate<'a> {
    /// What is updated.
    pub linear: &'a Linear,
    /// Over these.
    pub factors: Vec<Factors>,
    /// Earlier micro-batches' sum.
    pub accumulator: Option<Accumulator>,
    /// Its parameter.
    pub arrays: Arrays,
    /// Scalars of the step.
    pub step: StepSource,
    /// Where the backend writes its report; NULL: nowhere.
    pub device_report: *mut c_void,
}

/// All of them, which are of one backend; their reports, where the host has them.
///
/// # Safety
/// As [`Linear::update`], of each; none writes what another reads or writes.
pub unsafe fn update_group(updates: &[GroupUpdate], stream: Stream) -> Result<Vec<Option<Report>>> {
    let Some(first) = updates.first() else { return Ok(Vec::new()) };
    let own: Vec<_> =
        updates.iter().map(|u| (u.linear.shape.owned(), u.linear.own(&u.arrays))).collect();
    let mut entries = Vec::with_capacity(updates.len());
    for (u, (shard, arrays)) in updates.iter().zip(&own) {
        entries.push(GroupEntry {
            scheme: &u.linear.scheme,
            shard,
            factors: &u.factors,
            accumulator: u.accumulator,
            arrays,
            step: &u.step,
            device_report: u.device_report,
        });
    }
    // SAFETY: as promised by the caller.
    let reports = unsafe { first.linear.backend.update_group(&entries, stream)? };
    for (update, report) in updates.iter().zip(&reports) {
        update.linear.warn_of(*report);
        // SAFETY: as promised by the caller.
        unsafe { update.linear.gather_weight(update.arrays.weight, stream)? };
    }
    Ok(reports)
}
