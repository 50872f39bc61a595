//! Which tile the fused kernel works with, from shape, tokens and formats.
//!
//! What decides (docs/kernels.md has the measurements):
//! - few tokens: memory is the limit. Square tiles leave room for many bytes of weights and states in
//!   flight, and stages of 32 tokens are free again sooner than stages of 64;
//! - many tokens: the tensor cores are. Tiles of 128×192 read less shared memory and L2 for each
//!   product, and two blocks that share the loads of X read less still;
//! - what is left over at the right edge and in the last wave of blocks is cut into narrow tiles, or
//!   on a small weight 192 columns would leave multiprocessors idle.

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

const PREFERENCES: [Preference; 4] = [
    Preference {
        most_tokens: 768,
        tiles: &[
            tile(128, (8, 32), (128, 2), 1),
            tile(128, (8, 32), (64, 2), 1),
            tile(128, (8, 32), (32, 3), 1),
            tile(128, (8, 32), (32, 2), 1),
        ],
    },
    Preference {
        most_tokens: 1536,
        tiles: &[
            tile(192, (7, 32), (64, 3), 2),
            tile(192, (6, 32), (32, 4), 2),
            tile(192, (6, 32), (32, 3), 2),
            tile(128, (8, 32), (128, 2), 1),
            tile(128, (8, 32), (64, 2), 1),
            tile(128, (8, 32), (32, 2), 1),
        ],
    },
    Preference {
        most_tokens: 3072,
        tiles: &[
            tile(192, (8, 32), (64, 2), 2),
            tile(192, (7, 32), (64, 2), 2),
            tile(192, (7, 32), (32, 3), 2),
            tile(192, (6, 32), (32, 3), 2),
            tile(128, (5, 64), (64, 2), 2),
            tile(128, (5, 64), (32, 3), 2),
            tile(128, (8, 32), (32, 2), 2),
        ],
    },
    Preference {
        most_tokens: u64::MAX,
        tiles: &[
            tile(192, (4, 64), (64, 2), 2),
            tile(192, (4, 64), (32, 3), 2),
            tile(192, (4, 64), (32, 2), 2),
            tile(192, (6, 32), (32, 3), 2),
            tile(128, (5, 64), (64, 2), 2),
            tile(128, (5, 64), (32, 3), 2),
            tile(128, (8, 32), (32, 2), 2),
        ],
    },
];

/// q8 blocks are 128 columns, so chunks and tiles are as well. Stages of 64 tokens are faster between 1024
/// and 4096 tokens, and on a weight of 128256×4096 much slower at 8192 (docs/kernels.md).
const Q8: [Preference; 4] = [
    Preference { most_tokens: 768, tiles: &q8_slots(1) },
    Preference { most_tokens: 1536, tiles: &q8_stages(1) },
    Preference { most_tokens: 6144, tiles: &q8_stages(2) },
    Preference { most_tokens: u64::MAX, tiles: &q8_slots(2) },
];

const fn q8_slots(cluster: u32) -> [Tile; 4] {
    [
        tile(128, (8, 32), (128, 3), cluster),
        tile(128, (8, 32), (128, 2), cluster),
        tile(128, (6, 32), (128, 2), cluster),
        tile(128, (4, 32), (128, 1), 1),
    ]
}

const fn q8_stages(cluster: u32) -> [Tile; 4] {
    [
        tile(128, (5, 64), (128, 2), cluster),
        tile(128, (4, 64), (128, 2), cluster),
        tile(128, (3, 64), (128, 2), cluster),
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

/// Columns of a narrow tile: `forge::NARROW_COLS`.
pub const NARROW_COLS: u32 = 64;

/// Which tiles there are: `forge::Walk`. A place is a tile, or a cluster's tiles below each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Whole tiles beside each other.
    pub whole_cols: u32,
    /// Places that are walked as whole tiles. If there are more, they are cut into narrow tiles.
    pub whole_places: u32,
    /// Columns of narrow tiles right of the whole ones.
    pub narrow_cols: u32,
    /// Places of both kinds.
    pub places: u32,
}

impl Plan {
    /// `cut` places of whole tiles are walked as narrow ones.
    fn new(tile: &Tile, rows_of_places: u32, whole_cols: u32, narrow_cols: u32, cut: u32) -> Self {
        let whole_places = rows_of_places * whole_cols - cut;
        let narrow = cut * (tile.cols / NARROW_COLS) + rows_of_places * narrow_cols;
        Self { whole_cols, whole_places, narrow_cols, places: whole_places + narrow }
    }

    /// What the busiest block has to do, in sixths of 64 columns of a tile. A narrow tile costs more
    /// than its share, since products read dY's part of a stage for fewer columns; and those at the
    /// right edge, which come last, read all of dY from memory once more.
    fn cost(&self, tile: &Tile, rows: u64, wave: u32) -> u64 {
        let whole = self.whole_places.div_ceil(wave) * (tile.cols / NARROW_COLS) * 6;
        let narrow = (self.places - self.whole_places).div_ceil(wave) * 9;
        u64::from(whole + narrow) + u64::from(self.narrow_cols) * rows / 1024
    }
}

/// How a weight is cut into places. Whole tiles alone may reach beyond its right edge and leave blocks
/// idle in the last wave; narrow tiles, where the kernel has them, fill both.
pub fn plan(tile: &Tile, rows: u64, cols: u64, sm_count: u32) -> Plan {
    let rows_of_places = rows.div_ceil(u64::from(TILE_ROWS * tile.cluster)) as u32;
    let wave = (sm_count / tile.cluster).max(1);
    let all_whole = Plan::new(tile, rows_of_places, cols.div_ceil(tile.cols.into()) as u32, 0, 0);
    if tile.chunk_cols > NARROW_COLS {
        return all_whole;
    }
    let whole_cols = (cols / u64::from(tile.cols)) as u32;
    let rest = cols - u64::from(whole_cols) * u64::from(tile.cols);
    let narrow_cols = rest.div_ceil(NARROW_COLS.into()) as u32;
    let edge = Plan::new(tile, rows_of_places, whole_cols, narrow_cols, 0);
    let cut = rows_of_places * whole_cols % wave;
    let edge_and_wave = Plan::new(tile, rows_of_places, whole_cols, narrow_cols, cut);
    [all_whole, edge, edge_and_wave]
        .into_iter()
        .min_by_key(|p| p.cost(tile, rows, wave))
        .unwrap_or(edge)
}

/// What one block has to multiply.
fn work(tile: &Tile, rows: u64, cols: u64, sm_count: u32) -> u64 {
    plan(tile, rows, cols, sm_count).cost(tile, rows, (sm_count / tile.cluster).max(1))
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

/// What [`OVERRIDE`] says, if it is set: a tile, or none that fits.
fn named(streams: &Streams, most_shared: u32) -> Option<Option<Tile>> {
    let text = std::env::var(OVERRIDE).ok()?;
    let tile = parse(&text).filter(|tile| {
        shared_bytes(tile, streams) <= most_shared && (!streams.q8 || tile.chunk_cols == 128)
    });
    if tile.is_none() {
        tracing::warn!(target: "forge", "{OVERRIDE}={text}: no tile that fits; the panel path is taken");
    }
    Some(tile)
}

fn preferences(streams: &Streams) -> &'static [Preference] {
    if streams.q8 { &Q8 } else { &PREFERENCES }
}

/// The preferred tile for so many tokens that fits, and the narrower one that some shapes are given.
fn preferred(tokens: u64, streams: &Streams, most_shared: u32) -> Option<(Tile, Option<Tile>)> {
    let fits = |tile: &&Tile| shared_bytes(tile, streams) <= most_shared;
    let preference = preferences(streams).iter().find(|p| tokens <= p.most_tokens)?;
    let mut tiles = preference.tiles.iter().filter(fits);
    let first = *tiles.next()?;
    Some((first, tiles.find(|t| t.cols < first.cols).copied()))
}

/// One number of tokens of each range for which choices may differ.
pub fn token_counts(streams: &Streams) -> Vec<u64> {
    preferences(streams).iter().map(|p| p.most_tokens).collect()
}

/// The tiles that some shape is given with so many tokens.
pub fn candidates(tokens: u64, streams: &Streams, most_shared: u32) -> Vec<Tile> {
    if let Some(tile) = named(streams, most_shared) {
        return tile.into_iter().collect();
    }
    let Some((first, narrow)) = preferred(tokens, streams, most_shared) else { return Vec::new() };
    [first].into_iter().chain(narrow).collect()
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
    if let Some(tile) = named(streams, most_shared) {
        return tile;
    }
    let (first, narrow) = preferred(tokens, streams, most_shared)?;
    // An eighth more waves eats up what the wider tile saves.
    let most = work(&first, rows, cols, sm_count);
    Some(match narrow {
        Some(other) if work(&other, rows, cols, sm_count) * 9 / 8 <= most => other,
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
        assert_eq!(at(4096, 4096), 192);
        // 128 pairs of tiles for 66 pairs of multiprocessors: two full waves.
        assert_eq!(at(1024, 4096), 128);
    }

    /// `forge::Walk::tile`: row of places, first column and columns.
    fn place_of(
        place: u32,
        tile: &Tile,
        plan: &Plan,
        rows_of_places: u32,
        group_m: u32,
    ) -> [u32; 3] {
        let narrow = place >= plan.whole_places;
        let (mut at, mut within) = (place, 0);
        if narrow {
            let index = place - plan.whole_places;
            let per_tile = tile.cols / NARROW_COLS;
            let cut = (rows_of_places * plan.whole_cols - plan.whole_places) * per_tile;
            if index >= cut {
                let edge = index - cut;
                let col = plan.whole_cols * tile.cols + edge / rows_of_places * NARROW_COLS;
                return [edge % rows_of_places, col, NARROW_COLS];
            }
            at = plan.whole_places + index / per_tile;
            within = index % per_tile * NARROW_COLS;
        }
        let (group, rest) = (at / (group_m * plan.whole_cols), at % (group_m * plan.whole_cols));
        let height = group_m.min(rows_of_places - group * group_m);
        let n = rest / height;
        let n = if group % 2 == 0 { n } else { plan.whole_cols - 1 - n };
        let cols = if narrow { NARROW_COLS } else { tile.cols };
        [group * group_m + rest % height, n * tile.cols + within, cols]
    }

    #[test]
    fn places_cover_the_weight_once() {
        let shapes = [(4096, 4096), (4096, 14336), (28672, 4096), (64, 64), (136, 264), (640, 200)];
        let tiles = [
            tile(192, (7, 32), (64, 2), 2),
            tile(192, (7, 32), (32, 3), 1),
            tile(128, (8, 32), (64, 2), 1),
            tile(128, (8, 32), (128, 2), 1),
        ];
        for (rows, cols) in shapes {
            for tile in &tiles {
                let plan = plan(tile, rows, cols, H200.0);
                let rows_of_places = rows.div_ceil(u64::from(TILE_ROWS * tile.cluster)) as u32;
                let group_m = rows_together(tile, rows, cols, 8192, H200.0);
                let units = cols.div_ceil(NARROW_COLS.into()) as usize;
                let mut seen = vec![0; rows_of_places as usize * units];
                for place in 0..plan.places {
                    let [row, col, width] = place_of(place, tile, &plan, rows_of_places, group_m);
                    assert!(u64::from(col) < cols, "{rows}x{cols} {tile:?}: a tile outside");
                    for unit in col / NARROW_COLS..(col + width) / NARROW_COLS {
                        if let Some(n) = seen.get_mut(row as usize * units + unit as usize)
                            && (unit as usize) < units
                        {
                            *n += 1;
                        }
                    }
                }
                assert!(seen.iter().all(|n| *n == 1), "{rows}x{cols} {tile:?} {plan:?}");
            }
        }
    }

    #[test]
    fn narrow_tiles_fill_the_last_wave() {
        let wide = tile(192, (8, 32), (64, 2), 2);
        // 112 × 22 are 37.3 waves; 64 columns at the edge would save one, and read dY again.
        assert_eq!(plan(&wide, 28672, 4096, H200.0).narrow_cols, 0);
        // 16 rows of 74 whole tiles are 17.9 waves of 66 pairs; 128 columns are left over.
        let at = plan(&wide, 4096, 14336, H200.0);
        assert_eq!((at.whole_cols, at.narrow_cols, at.whole_places), (74, 2, 16 * 74));
        // 16 × 21 are 5 waves and 6: these are cut in three.
        let at = plan(&wide, 4096, 4096, H200.0);
        assert_eq!((at.whole_places, at.places), (330, 330 + 6 * 3 + 16));
        // Where a chunk is wider than a narrow tile, there are none.
        let at = plan(&tile(128, (8, 32), (128, 2), 1), 4096, 4160, H200.0);
        assert_eq!((at.whole_places, at.places), (32 * 33, 32 * 33));
    }
}
