//! Weights and states as fp32 images, for checkpoints and for moving between formats.

use super::super::{Arrays, Image, Scheme, Shard};
use crate::format::{BLOCK, DrawSource, load_state, load_weight, store_state, store_weight};

/// The runs of one row: `(first column, length)`.
fn runs(cols: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..cols).step_by(BLOCK).map(move |col| (col, BLOCK.min(cols - col)))
}

/// # Safety
/// Arrays and `out` are valid for the shard.
pub unsafe fn export_row(
    scheme: &Scheme,
    shard: &Shard,
    arrays: &Arrays,
    image: Image,
    row: usize,
    out: *mut f32,
) {
    for (col, n) in runs(shard.cols) {
        let at = row * shard.cols + col;
        // SAFETY: the run lies within the row.
        unsafe {
            let out = std::slice::from_raw_parts_mut(out.add(at), n);
            match image {
                Image::Weight => {
                    load_weight(scheme.weight_format, arrays.weight, arrays.extra, at, out);
                }
                Image::State(k) => load_state(
                    scheme.state_formats[k],
                    scheme.state_kind(k),
                    arrays.states[k],
                    at,
                    arrays.scales[k].wrapping_add(col / BLOCK * shard.rows + row),
                    out,
                ),
            }
        }
    }
}

/// # Safety
/// Arrays and `values` are valid for the shard.
pub unsafe fn import_row(
    scheme: &Scheme,
    shard: &Shard,
    arrays: &Arrays,
    image: Image,
    row: usize,
    values: *const f32,
) {
    for (col, n) in runs(shard.cols) {
        let at = row * shard.cols + col;
        let nearest = DrawSource::nearest();
        // SAFETY: the run lies within the row.
        unsafe {
            let values = std::slice::from_raw_parts(values.add(at), n);
            match image {
                Image::Weight => {
                    let format = scheme.weight_format;
                    store_weight(format, arrays.weight, arrays.extra, at, values, nearest);
                }
                Image::State(k) => store_state(
                    scheme.state_formats[k],
                    scheme.state_kind(k),
                    arrays.states[k],
                    at,
                    arrays.scales[k].wrapping_add(col / BLOCK * shard.rows + row),
                    values,
                    nearest,
                ),
            }
        }
    }
}
