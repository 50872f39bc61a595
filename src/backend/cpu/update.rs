//! The rule over a tile of gradient that is still in scratch.

use super::super::{Arrays, Scheme, Shard, Step};
use super::isa::multiversioned;
use super::tile::Tile;
use crate::format::{BLOCK, DrawSource, load_state, load_weight, store_state, store_weight};
use crate::philox::Stream;
use crate::rule::{MAX_STATES, Run};

multiversioned!(
    /// Σ g² in fp64, row by row: finite exactly when every g is, since the square of an fp32 cannot
    /// overflow an fp64.
    pub fn sum_of_squares(values: &[f32]) -> f64 = sum_of_squares_body
);

#[inline(always)]
fn sum_of_squares_body(values: &[f32]) -> f64 {
    const LANES: usize = 16;
    let mut sums = [0.0f64; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(*value) * f64::from(*value);
        }
    }
    for (sum, value) in sums.iter_mut().zip(rest) {
        *sum += f64::from(*value) * f64::from(*value);
    }
    sums.iter().sum()
}

/// Everything a tile's update needs but the gradient.
#[derive(Clone, Copy)]
pub struct TileUpdate<'a> {
    /// Formats and rule.
    pub scheme: &'a Scheme,
    /// Where the tile lies in the shard, and the shard in W.
    pub shard: &'a Shard,
    /// The parameter.
    pub arrays: &'a Arrays,
    /// Scalars.
    pub step: &'a Step,
}

/// Applies the rule to `tile`; `g` is row-major with rows `g_stride` apart, and is scaled in place.
///
/// # Safety
/// The arrays are valid for the shard, and no other thread touches this tile.
pub unsafe fn apply_tile(update: TileUpdate, tile: Tile, g: &mut [f32], g_stride: usize) {
    // SAFETY: passed on to the body, which has the same contract.
    multiversioned!(
        fn apply(update: TileUpdate, tile: Tile, g: &mut [f32], g_stride: usize) = apply_tile_body
    );
    apply(update, tile, g, g_stride);
}

#[inline(always)]
fn apply_tile_body(update: TileUpdate, tile: Tile, g: &mut [f32], g_stride: usize) {
    let TileUpdate { scheme, shard, arrays, step } = update;
    let mut w = [0.0f32; BLOCK];
    let mut states = [[0.0f32; BLOCK]; MAX_STATES];
    for row in 0..tile.rows {
        for start in (0..tile.cols).step_by(BLOCK) {
            let n = BLOCK.min(tile.cols - start);
            let (i, j) = (tile.row + row, tile.col + start);
            let at = i * shard.cols + j;
            let scale_at = j / BLOCK * shard.rows + i;
            let first = shard.global_index(i, j);
            let g = &mut g[row * g_stride + start..][..n];
            for value in g.iter_mut() {
                *value *= step.grad_scale;
            }
            // SAFETY: the run lies within the tile; `apply_tile`'s caller vouches for the arrays.
            unsafe {
                load_weight(scheme.weight_format, arrays.weight, arrays.extra, at, &mut w[..n]);
                for (k, values) in states[..scheme.n_states].iter_mut().enumerate() {
                    let kind = scheme.state_kind(k);
                    load_state(
                        scheme.state_formats[k],
                        kind,
                        arrays.states[k],
                        at,
                        arrays.scales[k].wrapping_add(scale_at),
                        &mut values[..n],
                    );
                }
                let [s0, s1, s2] = &mut states;
                let s = [&mut s0[..n], &mut s1[..n], &mut s2[..n]];
                scheme.rule.apply(scheme.flags, &step.constants, Run { g, w: &mut w[..n], s });
                let draws =
                    DrawSource::new(scheme.weight_rounding, &step.noise, Stream::Weight, first);
                store_weight(scheme.weight_format, arrays.weight, arrays.extra, at, &w[..n], draws);
                for (k, values) in states[..scheme.n_states].iter().enumerate() {
                    let kind = scheme.state_kind(k);
                    let stream = Stream::State(k);
                    let draws = DrawSource::new(scheme.state_rounding, &step.noise, stream, first);
                    store_state(
                        scheme.state_formats[k],
                        kind,
                        arrays.states[k],
                        at,
                        arrays.scales[k].wrapping_add(scale_at),
                        &values[..n],
                        draws,
                    );
                }
            }
        }
    }
}
