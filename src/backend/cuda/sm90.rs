//! The fused kernel of compute capability 9.0. Each function says whether it took the work: `None` or
//! `false` leaves it to the panel path.

use super::super::{Accumulator, Arrays, Factors, Scheme, Shard, Stream};
use super::driver::DevicePtr;
use super::gpu::Gpu;
use super::parameters::KernelStep;
use crate::error::Result;

/// The fused update. Returns the number of `TilePartial`s written from `partials` on.
///
/// # Safety
/// As [`super::super::Backend::update`]; the context is current.
pub unsafe fn try_update(
    _gpu: &Gpu,
    _scheme: &Scheme,
    _shard: &Shard,
    _factors: &[Factors],
    _accumulator: Option<Accumulator>,
    _arrays: &Arrays,
    _step: KernelStep,
    _partials: DevicePtr,
    _stream: Stream,
) -> Result<Option<u64>> {
    Ok(None)
}

/// `accumulator += Σ dYᵀX`. Returns whether it was enqueued.
///
/// # Safety
/// As [`try_update`].
pub unsafe fn try_accumulate(
    _gpu: &Gpu,
    _scheme: &Scheme,
    _shard: &Shard,
    _factors: &[Factors],
    _accumulator: Accumulator,
    _stream: Stream,
) -> Result<bool> {
    Ok(false)
}

/// The squares of each tile. Returns the number of `TilePartial`s written from `partials` on.
///
/// # Safety
/// As [`try_update`].
pub unsafe fn try_norm(
    _gpu: &Gpu,
    _scheme: &Scheme,
    _shard: &Shard,
    _factors: &[Factors],
    _accumulator: Option<Accumulator>,
    _partials: DevicePtr,
    _stream: Stream,
) -> Result<Option<u64>> {
    Ok(None)
}
