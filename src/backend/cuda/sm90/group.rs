//! Updates of many small weights of one shape in one launch: below each other, as if they were one weight
//! that has enough tiles for every block.

use super::super::super::{GroupEntry, Scheme, Shard, StepSource, Stream};
use super::super::driver::{DevicePtr, TensorMap};
use super::super::gpu::Gpu;
use super::super::parameters::KernelStep;
use super::policy::{NARROW_COLS, TILE_ROWS, Tile, choose, plan};
use super::{Call, Mode, Reports, Rest, Specialisation, Streams, fits, streamed, with_tokens};
use crate::error::Result;
use crate::format::StateFormat;

/// What the driver takes by value since CUDA 12.1.
const MOST_BYTES: usize = 32764;
/// Partials for 128 rows and 64 columns: one for each warp of a consumer.
const PARTIALS: u64 = 4;

/// An update that can share a launch with others like it.
pub struct One<'a> {
    call: Call<'a>,
}

impl<'a> One<'a> {
    /// None where the kernel does not take it in a group.
    pub fn new(gpu: &'a Gpu, entry: &GroupEntry<'a>) -> Option<Self> {
        let GroupEntry { scheme, shard, factors, accumulator, arrays, .. } = *entry;
        let StepSource::Value(step) = &entry.step else { return None };
        let call = Call {
            gpu,
            scheme,
            shard,
            factors: with_tokens(factors),
            arrays: streamed(scheme, accumulator, arrays),
            scales: arrays.scales.map(|s| s as DevicePtr),
            mode: Mode::Update,
            step: KernelStep::from(step),
            reports: Reports::NONE,
        };
        let possible =
            fits(scheme, shard) && call.possible() && call.factors.len() == 1 && has_room(shard);
        possible.then_some(Self { call })
    }

    /// Whether one launch may have both. Schemes are the caller's to compare.
    pub fn is_like(&self, other: &Self) -> bool {
        let (ours, theirs) = (&self.call, &other.call);
        let place = |call: &Call| {
            let shard = call.shard;
            (shard.rows, shard.cols, shard.global_index(0, 0), shard.global_cols)
        };
        let buffer = |call: &Call| call.arrays[super::ACCUMULATOR].is_some();
        place(ours) == place(theirs)
            && ours.factors[0].tokens == theirs.factors[0].tokens
            && buffer(ours) == buffer(theirs)
            && ours.step.value.same_step(&theirs.step.value)
    }

    /// Weights that a launch has room for.
    pub fn room(&self) -> usize {
        room(self.call.scheme, self.call.arrays[super::ACCUMULATOR].is_some())
    }
}

/// The same for a scheme.
pub fn room(scheme: &Scheme, accumulator: bool) -> usize {
    let states = &scheme.state_formats[..scheme.n_states];
    let q8 = states.iter().filter(|s| **s == StateFormat::Q8).count();
    let extra = usize::from(scheme.weight_format.extra_dtype().is_some());
    let arrays = 1 + extra + states.len() + usize::from(accumulator);
    let maps = 2 * (arrays + q8) + 2;
    // The struct ends at a multiple of its alignment.
    (MOST_BYTES / 64 * 64 - size_of::<Rest<1>>()) / (maps * size_of::<TensorMap>() + 4)
}

/// Whether weights of a shape can lie below each other.
pub fn has_room(shard: &Shard) -> bool {
    super::whole_draws(shard) && shard.rows.is_multiple_of(TILE_ROWS as usize)
}

/// The tile for so many weights of a shape, where they can share launches.
pub fn tile(
    weights: usize,
    (rows, cols): (usize, usize),
    tokens: u64,
    streams: &Streams,
    sm_count: u32,
    most_shared: u32,
) -> Option<Tile> {
    let all_rows = (weights * rows) as u64;
    choose(all_rows, cols as u64, tokens, streams, sm_count, most_shared)
        .filter(|tile| rows.is_multiple_of((TILE_ROWS * tile.cluster) as usize))
}

/// What the kernel is compiled for, that of one of the weights but for the room.
pub fn specialisation(one: Specialisation, room: usize) -> Specialisation {
    Specialisation { weights: room, device_step: false, segments: 1, ..one }
}

/// No fewer partials than a launch of these leaves.
pub fn most_partials(ones: &[&One]) -> u64 {
    let of = |one: &&One| {
        let Shard { rows, cols, .. } = *one.call.shard;
        // Whole tiles may reach over the edge.
        PARTIALS * (rows / TILE_ROWS as usize) as u64 * (cols as u64 / u64::from(NARROW_COLS) + 4)
    };
    ones.iter().map(of).sum()
}

/// Enqueues the update of all of them. `partials(n)`: room for n partials of each, one weight's behind the
/// other's, or 0. Whether the kernel takes them.
///
/// # Safety
/// As [`super::super::super::Backend::update_group`]; the context is current. All are like the first, and no
/// more than [`One::room`].
pub unsafe fn enqueue(
    ones: &[&One],
    partials: impl FnOnce(u64) -> DevicePtr,
    stream: Stream,
) -> Result<bool> {
    let Some(first) = ones.first().map(|one| &one.call) else { return Ok(false) };
    let (rows, cols) = (first.shard.rows, first.shard.cols);
    let properties = first.gpu.properties();
    let streams = Streams::of(first.scheme, first.mode, first.arrays[super::ACCUMULATOR].is_some());
    let (sm_count, most) = (properties.sm_count, properties.shared_memory_per_block);
    let Some(tile) = tile(ones.len(), (rows, cols), first.tokens(), &streams, sm_count, most)
    else {
        return Ok(false);
    };
    let all_rows = ones.len() * rows;
    let plan = plan(&tile, all_rows as u64, cols as u64, sm_count);
    // A weight after the other: what follows on its factors finds them in the L2.
    let group_m = rows as u32 / (TILE_ROWS * tile.cluster);
    let room = ones[0].room();
    let special = specialisation(first.specialisation(&tile, 1), room);

    let mut maps: Vec<TensorMap> = Vec::new();
    // SAFETY: as promised by the caller.
    unsafe {
        for one in ones {
            one.call.append_maps(&tile, &mut maps)?;
        }
    }
    maps.resize(room * (maps.len() / ones.len()), super::EMPTY);
    let across = plan.whole_cols * (tile.cols / NARROW_COLS) + plan.narrow_cols;
    let tiles = u64::from(rows as u32 / TILE_ROWS * across);
    let mut rest = first.rest::<1>(&tile, &plan, all_rows, group_m);
    rest.partials = partials(PARTIALS * tiles);
    let ids = ones.iter().map(|one| one.call.scheme.parameter_id);
    let params = Buffer::new(maps, &rest, ids);
    // SAFETY: as promised by the caller; the kernel's only parameter.
    unsafe {
        let mut parameters = [params.0.as_ptr().cast_mut().cast()];
        first.enqueue(&special, &plan, &streams, &mut parameters, stream)?;
    }
    Ok(true)
}

/// `forge::Params` of a kernel for groups: maps, then [`Rest`], then the parameters' ids.
struct Buffer(Vec<TensorMap>);

impl Buffer {
    fn new(mut maps: Vec<TensorMap>, rest: &Rest<1>, ids: impl Iterator<Item = u32>) -> Self {
        let mut words = Vec::new();
        // SAFETY: a struct of u32s, u64s and f32s without gaps that matter; read as 8-byte words.
        words.extend_from_slice(unsafe {
            std::slice::from_raw_parts((&raw const *rest).cast::<u32>(), size_of::<Rest<1>>() / 4)
        });
        words.extend(ids);
        for chunk in words.chunks(size_of::<TensorMap>() / 4) {
            let mut map = super::EMPTY;
            for (to, pair) in map.opaque.iter_mut().zip(chunk.chunks(2)) {
                *to = u64::from(pair[0]) | u64::from(pair.get(1).copied().unwrap_or(0)) << 32;
            }
            maps.push(map);
        }
        // As many as the driver copies of the largest.
        maps.resize(MOST_BYTES.div_ceil(size_of::<TensorMap>()).max(maps.len()), super::EMPTY);
        Self(maps)
    }
}
