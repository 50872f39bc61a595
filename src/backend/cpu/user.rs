//! A user's rule over a tile: weight and states in fp32 beside the gradient, one call, and back.

use super::tile::Tile;
use super::update::TileUpdate;
use crate::error::{Result, bail};
use crate::format::{BLOCK, DrawSource, load_state, load_weight, store_state, store_weight};
use crate::philox::Stream;
use crate::rule::MAX_STATES;
use crate::rule::user::{UserRule, forge_rule_tile};
use std::ptr::null_mut;

/// Applies the rule's function to `tile`; `g` is row-major with rows `g_stride` apart.
///
/// # Safety
/// As [`super::update::apply_tile`].
pub unsafe fn apply_function(
    rule: &UserRule,
    update: TileUpdate,
    tile: Tile,
    g: &[f32],
    g_stride: usize,
) -> Result<()> {
    let cpu = rule.function()?;
    let TileUpdate { scheme, step, .. } = update;
    let count = tile.rows * tile.cols;
    let scaled: Vec<f32> = (0..tile.rows)
        .flat_map(|row| &g[row * g_stride..][..tile.cols])
        .map(|g| g * step.grad_scale)
        .collect();
    let mut w = vec![0.0f32; count];
    let mut states: [Vec<f32>; MAX_STATES] =
        std::array::from_fn(|k| vec![0.0; if k < scheme.n_states { count } else { 0 }]);
    // SAFETY: as promised by the caller.
    unsafe { for_each_run(update, tile, &mut w, &mut states, load) };
    let pointer = |v: &mut Vec<f32>| if v.is_empty() { null_mut() } else { v.as_mut_ptr() };
    let [s0, s1, s2] = &mut states;
    let argument = forge_rule_tile {
        count: count as u64,
        step: step.scalars.step,
        g: scaled.as_ptr(),
        w: w.as_mut_ptr(),
        states: [pointer(s0), pointer(s1), pointer(s2)],
        hyper: step.scalars.hyper.as_ptr(),
    };
    // SAFETY: the arrays have `count` elements; the function keeps to them, as its definition promises.
    let status = unsafe { (cpu.function)(cpu.user, &argument) };
    if status != 0 {
        bail!(
            FORGE_ERROR_RULE_FUNCTION,
            "rule '{}': its CPU function returned {status} for the tile at row {}, column {}; this tile is \
             as it was, others may have been updated",
            scheme.rule.info().name.to_string_lossy(),
            tile.row,
            tile.col
        );
    }
    // SAFETY: as promised by the caller.
    unsafe { for_each_run(update, tile, &mut w, &mut states, store) };
    Ok(())
}

/// Where a run of at most [`BLOCK`] elements of one row lies in the shard's arrays.
struct Place {
    at: usize,
    scale_at: usize,
    first: u64,
}

type Work = unsafe fn(&TileUpdate, Place, &mut [f32], &mut [&mut [f32]]);

unsafe fn for_each_run(
    update: TileUpdate,
    tile: Tile,
    w: &mut [f32],
    states: &mut [Vec<f32>; MAX_STATES],
    work: Work,
) {
    let TileUpdate { scheme, shard, .. } = update;
    for row in 0..tile.rows {
        for start in (0..tile.cols).step_by(BLOCK) {
            let run = row * tile.cols + start..row * tile.cols + (start + BLOCK).min(tile.cols);
            let (i, j) = (tile.row + row, tile.col + start);
            let place = Place {
                at: i * shard.cols + j,
                scale_at: j / BLOCK * shard.rows + i,
                first: shard.global_index(i, j),
            };
            let mut runs = states.each_mut().map(|s| s.get_mut(run.clone()).unwrap_or_default());
            // SAFETY: the run lies within the tile; the caller vouches for the arrays.
            unsafe { work(&update, place, &mut w[run], &mut runs[..scheme.n_states]) };
        }
    }
}

unsafe fn load(u: &TileUpdate, place: Place, w: &mut [f32], states: &mut [&mut [f32]]) {
    let (scheme, arrays) = (u.scheme, u.arrays);
    // SAFETY: as promised by the caller.
    unsafe {
        load_weight(scheme.weight_format, arrays.weight, arrays.extra, place.at, w);
        for (k, values) in states.iter_mut().enumerate() {
            let scale = arrays.scales[k].wrapping_add(place.scale_at);
            let (format, kind) = (scheme.state_formats[k], scheme.state_kind(k));
            load_state(format, kind, arrays.states[k], place.at, scale, values);
        }
    }
}

unsafe fn store(u: &TileUpdate, place: Place, w: &mut [f32], states: &mut [&mut [f32]]) {
    let (scheme, arrays, noise) = (u.scheme, u.arrays, u.step.noise);
    // SAFETY: as promised by the caller.
    unsafe {
        let draws = DrawSource::new(scheme.weight_rounding, &noise, Stream::Weight, place.first);
        store_weight(scheme.weight_format, arrays.weight, arrays.extra, place.at, w, draws);
        for (k, values) in states.iter().enumerate() {
            let scale = arrays.scales[k].wrapping_add(place.scale_at);
            let stream = Stream::State(k);
            let draws = DrawSource::new(scheme.state_rounding, &noise, stream, place.first);
            let (format, kind) = (scheme.state_formats[k], scheme.state_kind(k));
            store_state(format, kind, arrays.states[k], place.at, scale, values, draws);
        }
    }
}
