//! Updates of many small weights of one shape in one launch: below each other, as if they were one weight
//! that has enough tiles for every block. A kernel before it writes each one's tensor maps, which are too
//! many for a launch's parameters, into the workspace.

use super::super::super::{GroupEntry, Scheme, Shard, Stream};
use super::super::driver::{DevicePtr, TensorMap, parameters};
use super::super::gpu::{Gpu, Kernel};
use super::super::parameters::KernelStep;
use super::super::workspace::PANEL_BYTES;
use super::super::{grid, sources};
use super::maps::EMPTY;
use super::policy::{NARROW_COLS, TILE_ROWS, Tile, candidates, choose, plan};
use super::{Call, Reports, Rest, Specialisation, Streams, fits};
use crate::error::Result;
use crate::format::StateFormat;

/// Partials for 128 rows and 64 columns: one for each warp of a consumer.
const PARTIALS: u64 = 4;
/// Two maps for each of 6 arrays and 3 arrays of scales, and those of dY and X: `forge::MOST_MAPS`.
const MOST_MAPS: usize = 20;
/// Words of a launch that writes maps: `forge::WORDS`.
const WORDS: usize = 3758;

/// `forge::GroupMaps` of kernels/group_maps.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct GroupMaps {
    first: [TensorMap; MOST_MAPS],
    weights: DevicePtr,
    maps: u32,
    reserved: u32,
    words: [u64; WORDS],
}

// What drivers take by value since CUDA 12.1; and what a launch writes fits the place of the panel.
const _: () = assert!(size_of::<GroupMaps>() <= 32764);
const _: () = assert!(WORDS * size_of::<TensorMap>() <= PANEL_BYTES as usize);

/// `forge::Params` of a kernel for groups.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    weights: DevicePtr,
    rest: Rest<1>,
}

/// An update that can share a launch with others like it.
pub struct One<'a> {
    call: Call<'a>,
}

impl<'a> One<'a> {
    /// None where the kernel does not take it in a group. `step`: where it finds its scalars.
    pub fn new(gpu: &'a Gpu, entry: &GroupEntry<'a>, step: KernelStep) -> Option<Self> {
        let GroupEntry { scheme, shard, factors, accumulator, arrays, .. } = *entry;
        let reports = Reports::NONE;
        let call = Call::of_update(gpu, scheme, shard, factors, accumulator, arrays, step, reports);
        let possible =
            fits(scheme, shard) && call.possible() && call.factors.len() == 1 && has_room(shard);
        possible.then_some(Self { call })
    }

    /// Whether one launch may have both. Schemes and the step's scalars are the caller's to compare.
    pub fn is_like(&self, other: &Self) -> bool {
        let place = |call: &Call| {
            let shard = call.shard;
            (shard.rows, shard.cols, shard.global_index(0, 0), shard.global_cols)
        };
        let factors = |call: &Call| {
            let f = &call.factors[0];
            (f.tokens, f.dy.stride, f.x.stride)
        };
        let buffer = |call: &Call| call.arrays[super::ACCUMULATOR].is_some();
        let of = |one: &Self| (place(&one.call), factors(&one.call), buffer(&one.call));
        of(self) == of(other)
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
    WORDS / (maps + 1)
}

/// Whether weights of a shape can lie below each other.
pub fn has_room(shard: &Shard) -> bool {
    super::whole_draws(shard) && shard.rows.is_multiple_of(TILE_ROWS as usize)
}

/// The tile for so many weights of a shape.
pub fn tile(
    weights: usize,
    (rows, cols): (usize, usize),
    tokens: u64,
    streams: &Streams,
    sm_count: u32,
    most_shared: u32,
) -> Option<Tile> {
    let all_rows = (weights * rows) as u64;
    let tile = choose(all_rows, cols as u64, tokens, streams, sm_count, most_shared)?;
    Some(suited(tile, tokens, streams, most_shared))
}

/// Bytes of arrays for an element of W, beside which the keys of a weight and 192 columns are more than a
/// consumer's registers hold: fp32 states.
const MOST_BYTES_BESIDE_192: u32 = 9;

/// What a group takes in place of a large weight's tile. Without clusters: blocks that share their loads wait
/// for each other, which costs more than it saves where each weight has but a few tiles: 1.59 of a large
/// weight's time at 8192 tokens, and 1.10 without.
pub fn suited(tile: Tile, tokens: u64, streams: &Streams, most_shared: u32) -> Tile {
    let too_wide = tile.cols > 128 && streams.bytes > MOST_BYTES_BESIDE_192;
    let narrow = || candidates(tokens, streams, most_shared).into_iter().find(|t| t.cols == 128);
    let tile = if too_wide { narrow().unwrap_or(tile) } else { tile };
    Tile { cluster: 1, ..tile }
}

/// What the kernel is compiled for, that of one of the weights otherwise.
pub fn specialisation(one: Specialisation) -> Specialisation {
    Specialisation { group: true, segments: 1, ..one }
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
/// other's, or 0. `weights`: place for each weight's maps, as large as a panel. Whether the kernel takes
/// them.
///
/// # Safety
/// As [`super::super::super::Backend::update_group`]; the context is current. All are like the first, and no
/// more than [`One::room`].
pub unsafe fn enqueue(
    ones: &[&One],
    partials: impl FnOnce(u64) -> DevicePtr,
    weights: DevicePtr,
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
    let group_m = rows as u32 / TILE_ROWS;
    let special = specialisation(first.specialisation(&tile, 1));
    // SAFETY: as promised by the caller.
    unsafe { write_maps(ones, &tile, weights, stream)? };

    let across = plan.whole_cols * (tile.cols / NARROW_COLS) + plan.narrow_cols;
    let tiles = u64::from(rows as u32 / TILE_ROWS * across);
    let mut rest = first.rest::<1>(&tile, &plan, all_rows, group_m);
    rest.partials = partials(PARTIALS * tiles);
    let params = Params { weights, rest };
    // SAFETY: as promised by the caller; the kernel's only parameter.
    unsafe { first.enqueue(&special, &plan, &streams, &mut parameters!(params), stream)? };
    Ok(true)
}

/// # Safety
/// As [`enqueue`].
unsafe fn write_maps(ones: &[&One], tile: &Tile, weights: DevicePtr, stream: Stream) -> Result<()> {
    let call = &ones[0].call;
    // SAFETY: as promised by the caller.
    let first = unsafe { call.maps(tile)? };
    let maps = first.len();
    let mut all = GroupMaps {
        first: [EMPTY; MOST_MAPS],
        weights,
        maps: maps as u32,
        reserved: 0,
        words: [0; WORDS],
    };
    all.first[..maps].copy_from_slice(&first);
    for (words, One { call }) in all.words.chunks_mut(maps + 1).zip(ones) {
        let id = u64::from(call.scheme.parameter_id);
        for (to, word) in words.iter_mut().zip(call.addresses().into_iter().chain([id])) {
            *to = word;
        }
    }
    let kernel = Kernel {
        source: sources::GROUP_MAPS,
        defines: &[],
        name: "forge_group_maps",
        what: "maps of a group",
        grid: grid(ones.len() as u64)?,
        block: 32,
        shared_bytes: 0,
    };
    // SAFETY: as promised by the caller; the kernel declares this parameter.
    unsafe { call.gpu.run(kernel, &mut parameters!(all), stream) }
}
