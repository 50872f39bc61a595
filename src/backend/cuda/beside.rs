//! Updates of small weights beside each other on 9.0: a weight with fewer tiles than the GPU has
//! multiprocessors leaves the others idle, so each launch takes as many as it can keep busy, and several run
//! at once. With few tokens a launch is not worth its overhead, and [`super::group`] is the better way.

use super::super::{GroupEntry, StepSource, Stream};
use super::driver::DevicePtr;
use super::gpu::Gpu;
use super::group;
use super::mainloop::Mainloop;
use super::parameters::KernelStep;
use super::sm90::{self, Reports};
use super::workspace::{MOST_PARTIALS, Workspace};
use crate::backend::Shard;
use crate::error::Result;

/// Tokens of an update from which it has a launch of its own.
pub const LEAST_TOKENS: u64 = 256;

/// Multiprocessors for a shard: two tiles for each, of which one is updated while the other is multiplied.
pub fn share(shard: &Shard, sm_count: u32) -> u32 {
    let tiles = shard.rows.div_ceil(128) * shard.cols.div_ceil(128);
    (tiles as u32 / 2).clamp(1, sm_count)
}

/// Whether an update is one of those.
fn takes(gpu: &Gpu, entry: &GroupEntry, mainloop: Mainloop) -> bool {
    let tokens: u64 = entry.factors.iter().map(|f| f.tokens as u64).sum();
    mainloop == Mainloop::Sm90
        && tokens >= LEAST_TOKENS
        && group::is_small(entry.shard, gpu.properties().sm_count, mainloop)
        && group::has_scalars(entry.scheme)
        && sm90::fits(entry.scheme, entry.shard)
}

/// Enqueues them; which entries that were, by index. The others are left to the caller.
///
/// # Safety
/// As [`super::super::Backend::update_group`]; the context is current.
pub unsafe fn enqueue(
    gpu: &Gpu,
    entries: &[GroupEntry],
    mainloop: impl Fn(&GroupEntry) -> Mainloop,
    workspace: &Workspace,
    stream: Stream,
) -> Result<Vec<bool>> {
    let mut taken = vec![false; entries.len()];
    let sm_count = gpu.properties().sm_count;
    // Each has its own room for partials and its own counter.
    let each = 2 * u64::from(sm_count);
    let room = (MOST_PARTIALS / each).min(Workspace::COUNTERS_BYTES / 4) as usize;
    let mut work = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let StepSource::Value(step) = &entry.step else { continue };
        if work.len() < room && takes(gpu, entry, mainloop(entry)) {
            work.push((work.len() as u64, index, entry, KernelStep::from(step)));
        }
    }
    if work.len() < 2 {
        return Ok(taken);
    }
    let update = |(slot, index, entry, step): &(u64, usize, &GroupEntry, KernelStep), side| {
        let GroupEntry { scheme, shard, factors, accumulator, arrays, device_report, .. } = **entry;
        let reports = Reports {
            targets: [0, device_report as DevicePtr],
            partials: workspace.partials + 16 * each * slot,
            counter: workspace.counters + 4 * slot,
            method: 0,
        };
        let of = sm90::Target { gpu, sm_count: share(shard, sm_count) };
        // SAFETY: as promised by the caller.
        taken[*index] = unsafe {
            sm90::try_update(
                of,
                scheme,
                shard,
                factors,
                accumulator,
                arrays,
                *step,
                reports,
                side,
            )?
        };
        Ok(())
    };
    // SAFETY: as promised by the caller.
    unsafe { gpu.side_streams.spread(&work, stream, update)? };
    Ok(taken)
}
