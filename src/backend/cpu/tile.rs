//! Which tiles a shard is cut into.

use crate::format::BLOCK;

/// Rows and columns of the largest tile: 1 MiB of fp32, which stays in a core's L2 beside the
/// factors that stream through it. Smaller tiles repack the factors more often.
pub const MAX_TILE: usize = 512;
const MIN_TILE: usize = 128;

/// A rectangle of the shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// First row.
    pub row: usize,
    /// First column, a multiple of [`BLOCK`].
    pub col: usize,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
}

/// A shard cut into tiles, in row-major order.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    rows: usize,
    cols: usize,
    tile_rows: usize,
    tile_cols: usize,
}

/// `extent` in equal parts of at most `most`, each a multiple of `quantum` but the last.
fn part(extent: usize, most: usize, quantum: usize) -> usize {
    extent.div_ceil(extent.div_ceil(most).max(1)).next_multiple_of(quantum).max(quantum)
}

impl Grid {
    /// A grid for this many threads. The results are the same bits for every grid.
    pub fn new(rows: usize, cols: usize, threads: usize) -> Self {
        Self::with_widest(rows, cols, threads, MAX_TILE)
    }

    /// A grid whose tiles have at most `widest` columns.
    pub fn with_widest(rows: usize, cols: usize, threads: usize, widest: usize) -> Self {
        let (mut most_rows, mut most_cols) = (MAX_TILE, widest);
        loop {
            let grid = Self {
                rows,
                cols,
                tile_rows: part(rows, most_rows, 16),
                tile_cols: part(cols, most_cols, BLOCK),
            };
            let rounds = grid.tiles().div_ceil(threads.max(1));
            let balanced = grid.tiles() * 100 >= rounds * threads * 80;
            if balanced || (most_rows == MIN_TILE && most_cols == MIN_TILE) {
                return grid;
            }
            if most_rows > MIN_TILE && most_rows >= most_cols {
                most_rows /= 2;
            } else {
                most_cols /= 2;
            }
        }
    }

    /// Number of tiles.
    pub fn tiles(&self) -> usize {
        self.rows.div_ceil(self.tile_rows) * self.cols.div_ceil(self.tile_cols)
    }

    /// The tile of this index.
    pub fn tile(&self, index: usize) -> Tile {
        let across = self.cols.div_ceil(self.tile_cols);
        let row = index / across * self.tile_rows;
        let col = index % across * self.tile_cols;
        Tile {
            row,
            col,
            rows: self.tile_rows.min(self.rows - row),
            cols: self.tile_cols.min(self.cols - col),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn tiles_cover_every_element_once(rows in 1usize..1500, cols in 1usize..1500, threads in 1usize..40) {
            let grid = Grid::new(rows, cols, threads);
            let mut area = 0;
            for i in 0..grid.tiles() {
                let t = grid.tile(i);
                prop_assert!(t.rows > 0 && t.cols > 0 && t.rows <= MAX_TILE && t.cols <= MAX_TILE);
                prop_assert!(t.row + t.rows <= rows && t.col + t.cols <= cols);
                prop_assert_eq!(t.col % BLOCK, 0);
                area += t.rows * t.cols;
                for j in 0..i {
                    let o = grid.tile(j);
                    let apart = o.row + o.rows <= t.row || t.row + t.rows <= o.row
                        || o.col + o.cols <= t.col || t.col + t.cols <= o.col;
                    prop_assert!(apart);
                }
            }
            prop_assert_eq!(area, rows * cols);
        }
    }
}
