//! Which tile the fused kernel works with, from shape, tokens and formats.
//!
//! What decides (docs/kernels.md has the measurements):
//! - few tokens: memory is the limit. Square tiles leave room for many bytes of weights and states in
//!   flight, and stages of 32 tokens are free again sooner than stages of 64;
//! - many tokens: the tensor cores are. Tiles of 128×192 read less shared memory and L2 for each
//!   product, and two blocks that share the loads of X read less still;
//! - a tile must divide the shape into whole waves: on a small weight 192 columns may leave
//!   multiprocessors idle in the last one.

use super::Streams;

/// A tile and how it is fed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Columns of dW.
    pub cols: u32,
    /// Tokens of a stage of factors.
    pub tokens: u32,
    /// Stages.
    pub stages: u32,
    /// Columns of a chunk of weights and states.
    pub chunk_cols: u32,
    /// Chunks that each warpgroup has room for.
    pub slots: u32,
    /// Blocks that share the loads of X.
    pub cluster: u32,
}

/// Rows of every tile, and warpgroups that take turns: `forge::TILE_ROWS`, `forge::CONSUMERS`.
pub const TILE_ROWS: u32 = 128;
/// See [`TILE_ROWS`].
pub const CONSUMERS: u32 = 2;

const fn tile(
    cols: u32,
    (stages, tokens): (u32, u32),
    (chunk_cols, slots): (u32, u32),
    cluster: u32,
) -> Tile {
    Tile { cols, tokens, stages, chunk_cols, slots, cluster }
}

/// In order of preference for up to so many tokens; the first that fits is taken. Tuned on an H200 with
/// a weight of 28672×4096 and AdamW; figures in docs/kernels.md.
struct Preference {
    most_tokens: u64,
    tiles: &'static [Tile],
}

const PREFERENCES: [Preference; 3] = [
    Preference {
        most_tokens: 1024,
        tiles: &[
            tile(128, (8, 32), (128, 2), 1),
            tile(128, (8, 32), (64, 2), 1),
            tile(128, (8, 32), (32, 3), 1),
            tile(128, (8, 32), (32, 2), 1),
        ],
    },
    Preference {
        most_tokens: 3072,
        tiles: &[
            tile(192, (7, 32), (64, 3), 2),
            tile(192, (7, 32), (64, 2), 2),
            tile(128, (8, 32), (64, 2), 2),
            tile(128, (8, 32), (32, 3), 2),
            tile(128, (8, 32), (32, 2), 2),
        ],
    },
    Preference {
        most_tokens: u64::MAX,
        tiles: &[
            tile(192, (4, 64), (64, 2), 2),
            tile(192, (6, 32), (32, 4), 2),
            tile(192, (6, 32), (32, 3), 2),
            tile(128, (8, 32), (64, 2), 2),
            tile(128, (8, 32), (32, 2), 2),
        ],
    },
];

/// q8 blocks are 128 columns, so chunks and tiles are as well. Few tokens, then many.
const Q8: [Preference; 2] = [
    Preference { most_tokens: 1536, tiles: &q8_tiles(1) },
    Preference { most_tokens: u64::MAX, tiles: &q8_tiles(2) },
];

const fn q8_tiles(cluster: u32) -> [Tile; 4] {
    [
        tile(128, (8, 32), (128, 3), cluster),
        tile(128, (8, 32), (128, 2), cluster),
        tile(128, (6, 32), (128, 2), cluster),
        tile(128, (4, 32), (128, 1), 1),
    ]
}

/// Bytes of dynamic shared memory; `forge::SHARED_BYTES` of kernels/launch.cuh.
pub fn shared_bytes(tile: &Tile, streams: &Streams) -> u32 {
    let stages = tile.stages * tile.tokens * 2 * (TILE_ROWS + tile.cols);
    let slot = 32 * tile.chunk_cols * streams.bytes;
    let scales = if streams.q8 { 3 * 32 * 4 } else { 0 };
    let rings = CONSUMERS * tile.slots;
    let barriers = 8 * 2 * (tile.stages + rings);
    let tallies = 40 * CONSUMERS;
    let scalars = 140;
    stages + rings * (slot + scales) + barriers + tallies + scalars
}

/// What one multiprocessor has to multiply, in units of 64 elements of dW.
fn waves(tile: &Tile, rows: u64, cols: u64, sm_count: u32) -> u64 {
    let places =
        rows.div_ceil(u64::from(TILE_ROWS * tile.cluster)) * cols.div_ceil(tile.cols.into());
    places.div_ceil(u64::from(sm_count / tile.cluster)) * u64::from(TILE_ROWS * tile.cols) / 64
}

/// Bytes of a factor that stay in the L2 from one wave of tiles to the next: less than half of an
/// H200's, whose two halves each keep a copy of what their multiprocessors read.
const KEPT_BYTES: u64 = 24 << 20;

/// How many rows of places (tiles, or clusters of tiles below each other) are walked together, down
/// these rows first.
///
/// Along the shorter side of dW the longer side's factor is read once, and the other again and again
/// from the L2. Where that does not fit there, each wave of tiles is made as square as the number of
/// places in a wave allows, which reads the fewest rows and columns.
pub fn rows_together(tile: &Tile, rows: u64, cols: u64, tokens: u64, sm_count: u32) -> u32 {
    let height = TILE_ROWS * tile.cluster;
    let rows_of_places = rows.div_ceil(height.into()) as u32;
    if rows.min(cols) * tokens * 2 <= KEPT_BYTES {
        return if rows <= cols { rows_of_places } else { 1 };
    }
    let wave = sm_count / tile.cluster;
    let edge = |down: u32| down * height + wave / down * tile.cols;
    let down = (1..=wave).filter(|down| wave.is_multiple_of(*down)).min_by_key(|d| edge(*d));
    down.unwrap_or(1).min(rows_of_places)
}

/// The environment variable by which `benchmarks/tune_tiles.py` tries tiles.
const OVERRIDE: &str = "FORGE_SM90_TILE";

/// `cols,tokens,stages,chunk_cols,slots,cluster`.
pub fn parse(text: &str) -> Option<Tile> {
    let numbers: Vec<u32> =
        text.split(',').map(|n| n.trim().parse().ok()).collect::<Option<_>>()?;
    let [cols, tokens, stages, chunk_cols, slots, cluster] = numbers[..] else {
        return None;
    };
    let tile = Tile { cols, tokens, stages, chunk_cols, slots, cluster };
    // What the kernel is written for.
    let known = [128, 192].contains(&cols)
        && [32, 64].contains(&tokens)
        && [32, 64, 128].contains(&chunk_cols)
        && cols.is_multiple_of(chunk_cols)
        && [1, 2].contains(&cluster)
        && (2..=16).contains(&stages)
        && (1..=8).contains(&slots);
    known.then_some(tile)
}

/// The tile for a shape, or none where no tile's chunks fit into `most_shared` bytes.
pub fn choose(
    rows: u64,
    cols: u64,
    tokens: u64,
    streams: &Streams,
    sm_count: u32,
    most_shared: u32,
) -> Option<Tile> {
    let fits = |tile: &&Tile| shared_bytes(tile, streams) <= most_shared;
    if let Ok(text) = std::env::var(OVERRIDE) {
        let tile = parse(&text).filter(|t| fits(&t) && (!streams.q8 || t.chunk_cols == 128));
        if tile.is_none() {
            tracing::warn!(target: "forge", "{OVERRIDE}={text}: no tile that fits; the panel path is taken");
        }
        return tile;
    }
    let preferences: &[Preference] = if streams.q8 { &Q8 } else { &PREFERENCES };
    let preference = preferences.iter().find(|p| tokens <= p.most_tokens)?;
    let mut tiles = preference.tiles.iter().filter(fits);
    let first = *tiles.next()?;
    // An eighth more waves eats up what the wider tile saves.
    let narrow = tiles.find(|t| t.cols < first.cols);
    let most = waves(&first, rows, cols, sm_count);
    Some(match narrow {
        Some(other) if waves(other, rows, cols, sm_count) * 9 / 8 <= most => *other,
        _ => first,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: (u32, u32) = (132, 232_448);

    #[test]
    fn every_choice_fits_shared_memory() {
        for bytes in 0..=22 {
            for q8 in [false, true] {
                for tokens in [1, 512, 1024, 2048, 4096, 16384] {
                    let streams = Streams { bytes, q8 };
                    let Some(tile) = choose(28672, 4096, tokens, &streams, H200.0, H200.1) else {
                        assert!(bytes > 18 || q8 && bytes > 12, "{bytes} bytes, q8 {q8}");
                        continue;
                    };
                    assert!(shared_bytes(&tile, &streams) <= H200.1);
                    assert!(!q8 || tile.chunk_cols == 128);
                    assert_eq!(tile.cols % tile.chunk_cols, 0, "{tile:?}");
                }
            }
        }
    }

    #[test]
    fn a_tile_can_be_named() {
        let tile = parse("192,32,7,64,3,2").unwrap();
        assert_eq!(tile, super::tile(192, (7, 32), (64, 3), 2));
        for wrong in ["", "192,32", "192,32,7,96,3,2", "a,b,c,d,e,f"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn factors_that_leave_the_l2_are_walked_in_squares() {
        let wide = tile(192, (4, 64), (64, 2), 2);
        let down = |rows, cols, tokens| rows_together(&wide, rows, cols, tokens, H200.0);
        assert_eq!(down(28672, 4096, 512), 1);
        assert_eq!(down(4096, 14336, 512), 16);
        // 66 pairs of tiles: 6 × 256 rows and 11 × 192 columns.
        assert_eq!(down(28672, 4096, 4096), 6);
        assert_eq!(down(512, 100_000, 100_000), 2);
    }

    #[test]
    fn wide_tiles_only_where_they_fill_the_waves() {
        let streams = Streams { bytes: 6, q8: false };
        let at = |rows, cols| choose(rows, cols, 4096, &streams, H200.0, H200.1).unwrap().cols;
        assert_eq!(at(28672, 4096), 192);
        assert_eq!(at(4096, 4096), 128);
    }
}
