//! The fused kernel of every compute capability since 8.0, `kernels/wgrad_sm80.cu`: which work it takes,
//! how it is cut, and the launch. `None` and `false` leave the work to the panel path.

use super::super::{Accumulator, Arrays, Factors, Matrix, Scheme, Shard, Stream};
use super::driver::{DevicePtr, parameters};
use super::elementwise::{self, Gradient};
use super::gpu::{Gpu, Kernel};
use super::parameters::{KernelArrays, KernelShard, KernelStep, Region, TILE_COLS};
use super::workspace::MOST_PARTIALS;
use super::{grid, sources, specialise};
use crate::error::Result;
use crate::format::Dtype;

pub use super::sm90::Mode;

/// Segments that one launch takes: `forge::MOST_SEGMENTS`.
pub const MOST_SEGMENTS: usize = 32;
/// Threads of a block.
pub const THREADS: u32 = 128;
/// Tokens of a segment: 31 bits in the kernel.
const MOST_TOKENS: usize = i32::MAX as usize;
/// Bytes of a stage for each feature: 32 tokens of 16-bit factors, 16 of fp32 ones.
const STAGE_BYTES_PER_FEATURE: u32 = 64;

/// `forge::FactorPair`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct FactorPair {
    dy: DevicePtr,
    x: DevicePtr,
    dy_stride: u64,
    x_stride: u64,
    tokens: u64,
}

/// `forge::Problem`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    arrays: KernelArrays,
    shard: KernelShard,
    accumulator: DevicePtr,
    /// Where its partials go; 0: nowhere.
    pub partials: DevicePtr,
    group: u16,
    n_segments: u16,
    /// Of a grouped launch: see [`super::group`].
    pub first_block: u32,
    /// The same.
    pub first_segment: u32,
    /// The same.
    pub parameter: u32,
}

/// `forge::Params`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Params {
    problem: Problem,
    step: KernelStep,
    segments: [FactorPair; MOST_SEGMENTS],
}

impl Params {
    /// What is multiplied and updated.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The scalars, or where they are.
    pub fn step(&self) -> &KernelStep {
        &self.step
    }

    /// The segments that there are.
    pub fn segments(&self) -> &[FactorPair] {
        &self.segments[..usize::from(self.problem.n_segments)]
    }
}

/// What the kernel is compiled for, beside the scheme.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Specialisation {
    /// What becomes of dW.
    pub mode: Mode,
    /// Rows of a tile: 64 or 128.
    pub tile_rows: u32,
    /// Whether a buffer is added to dW.
    pub accumulator: bool,
    /// Whether runs of 8 elements are read and written at once: see [`elementwise::is_vector`].
    pub vector: bool,
    /// Whether a launch is of many weights: [`super::group`].
    pub group: bool,
}

impl Specialisation {
    /// `NAME=value`, for the compiler.
    pub fn defines(&self, scheme: &Scheme) -> Vec<String> {
        // Without an update neither weight nor states: one kernel for all schemes.
        let mut out = match self.mode {
            Mode::Update => specialise::update(scheme),
            Mode::Accumulate | Mode::Norm => specialise::none(),
        };
        let mut define = |name: &str, value: u32| out.push(format!("FORGE_{name}={value}"));
        define("FACTOR", specialise::dtype_code(scheme.factor_dtype));
        define("MODE", self.mode as u32);
        define("ACCUMULATOR", u32::from(self.accumulator));
        define("TILE_ROWS", self.tile_rows);
        define("VECTOR", u32::from(self.vector));
        if self.group {
            define("GROUP", 1);
        }
        out
    }
}

/// What a device has room for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Largest dynamic shared memory of a block that opts in, in bytes.
    pub shared_memory_per_block: u32,
}

impl Limits {
    /// Those of a GPU.
    pub fn of(gpu: &Gpu) -> Self {
        let p = gpu.properties();
        Self { sm_count: p.sm_count, shared_memory_per_block: p.shared_memory_per_block }
    }
}

/// Bytes of dynamic shared memory: the larger of `forge::FACTOR_BYTES` and `forge::TILE_BYTES`.
pub fn shared_bytes(tile_rows: u32) -> u32 {
    let cols = TILE_COLS as u32;
    let stages = if tile_rows == 128 { 4 } else { 3 };
    let factors = stages * STAGE_BYTES_PER_FEATURE * (tile_rows + cols);
    let tile = tile_rows * (cols + 8) * 4;
    factors.max(tile)
}

/// Rows of a tile. 128 where two blocks have room on a multiprocessor, whose shared memory is 1 KiB more
/// than a block can have, and 1 KiB for each block is reserved; and where all blocks have something to do.
pub fn tile_rows(shard: &Shard, limits: &Limits) -> u32 {
    rows_for(tall_tiles(&Region::whole(shard)), limits)
}

/// Tiles of 128 rows in a region.
pub fn tall_tiles(region: &Region) -> u64 {
    region.rows.div_ceil(128) * region.cols.div_ceil(TILE_COLS)
}

/// Rows of a tile for a launch that has so many of 128.
pub fn rows_for(tall_tiles: u64, limits: &Limits) -> u32 {
    let room = 2 * (shared_bytes(128) + 1024) <= limits.shared_memory_per_block + 1024;
    if room && tall_tiles >= u64::from(2 * limits.sm_count) { 128 } else { 64 }
}

/// One call of the kernel.
pub struct Call<'a> {
    /// How the parameter is stored and updated.
    pub scheme: &'a Scheme,
    /// Its shard.
    pub shard: &'a Shard,
    /// Its factors.
    pub factors: &'a [Factors],
    /// A buffer that is added to dW, or in [`Mode::Accumulate`] takes it.
    pub accumulator: Option<Accumulator>,
    /// Its weight and states, for [`Mode::Update`].
    pub arrays: Option<&'a Arrays>,
    /// What becomes of dW.
    pub mode: Mode,
    /// The step's scalars.
    pub step: KernelStep,
    /// Room for a `TilePartial` for each 64 × 128 of the shard, row by row.
    pub partials: DevicePtr,
}

/// A launch.
#[derive(Clone, Debug)]
pub struct Launch {
    /// What the kernel is compiled for.
    pub specialisation: Specialisation,
    /// Blocks: one for each tile.
    pub blocks: u64,
    /// Dynamic shared memory.
    pub shared_bytes: u32,
    /// The kernel's only parameter.
    pub params: Params,
    /// All of the shard.
    pub whole: Region,
}

impl Launch {
    /// The same work in tiles of this many rows.
    pub fn cut(mut self, tile_rows: u32) -> Self {
        let down = self.whole.rows.div_ceil(tile_rows.into());
        self.specialisation.tile_rows = tile_rows;
        self.blocks = down * self.whole.cols.div_ceil(TILE_COLS);
        self.shared_bytes = shared_bytes(tile_rows);
        // About square: what the multiprocessors work on at a time reads few rows and columns.
        self.params.problem.group = down.min(16) as u16;
        self
    }
}

/// Whether a factor can be copied in units of 16 bytes.
fn readable(factor: &Matrix, dtype: Dtype) -> bool {
    (factor.data as usize).is_multiple_of(16) && (factor.stride * dtype.bytes()).is_multiple_of(16)
}

impl<'a> Call<'a> {
    /// A mode that touches neither weight nor states.
    pub fn plain(
        scheme: &'a Scheme,
        shard: &'a Shard,
        factors: &'a [Factors],
        accumulator: Option<Accumulator>,
        mode: Mode,
        partials: DevicePtr,
    ) -> Self {
        let (arrays, step) = (None, KernelStep::default());
        Self { scheme, shard, factors, accumulator, arrays, mode, step, partials }
    }

    /// How the work is done, or none where the kernel does not take it. Each mode asks the same of factors,
    /// so that a gradient which is stored first comes from the same sums as one in registers.
    pub fn plan(&self, limits: &Limits) -> Option<Launch> {
        let tile_rows = tile_rows(self.shard, limits);
        self.plan_with(tile_rows).filter(|l| l.shared_bytes <= limits.shared_memory_per_block)
    }

    /// The same for tiles of this many rows.
    pub fn plan_with(&self, tile_rows: u32) -> Option<Launch> {
        let mut segments = [FactorPair::default(); MOST_SEGMENTS];
        let mut n_segments = 0;
        for f in self.factors.iter().filter(|f| f.tokens > 0) {
            let dtype = self.scheme.factor_dtype;
            if !readable(&f.dy, dtype) || !readable(&f.x, dtype) || f.tokens > MOST_TOKENS {
                return None;
            }
            *segments.get_mut(n_segments)? = FactorPair {
                dy: f.dy.data as DevicePtr,
                x: f.x.data as DevicePtr,
                dy_stride: f.dy.stride as u64,
                x_stride: f.x.stride as u64,
                tokens: f.tokens as u64,
            };
            n_segments += 1;
        }
        let whole = Region::whole(self.shard);
        let possible = !self.scheme.is_exact() && n_segments > 0 && whole.tiles() <= MOST_PARTIALS;
        let problem = Problem {
            arrays: KernelArrays::from(self.arrays.unwrap_or(&Arrays::NONE)),
            shard: KernelShard::from(self.shard),
            accumulator: self.accumulator.map_or(0, |a| a.get() as DevicePtr),
            partials: self.partials,
            group: 0,
            n_segments: n_segments as u16,
            first_block: 0,
            first_segment: 0,
            parameter: self.scheme.parameter_id,
        };
        let launch = Launch {
            specialisation: self.specialisation(tile_rows),
            blocks: 0,
            shared_bytes: 0,
            params: Params { problem, step: self.step, segments },
            whole,
        };
        possible.then(|| launch.cut(tile_rows))
    }

    fn specialisation(&self, tile_rows: u32) -> Specialisation {
        let buffer = self.accumulator.map_or(Gradient::ZERO, |a| Gradient {
            data: a.get() as DevicePtr,
            stride: self.shard.cols as u64,
            dtype: a.dtype(),
        });
        let arrays = self.arrays.unwrap_or(&Arrays::NONE);
        Specialisation {
            mode: self.mode,
            tile_rows,
            accumulator: self.accumulator.is_some(),
            vector: elementwise::is_vector(self.scheme, self.shard, arrays, buffer),
            group: false,
        }
    }

    /// Enqueues the kernel. Returns whether it took the work; a report is for the caller to make from the
    /// partials.
    ///
    /// # Safety
    /// As [`super::super::Backend::update`]; the context is current.
    pub unsafe fn run(&self, gpu: &Gpu, stream: Stream) -> Result<bool> {
        let Some(launch) = self.plan(&Limits::of(gpu)) else { return Ok(false) };
        let kernel = Kernel {
            source: sources::WGRAD_SM80,
            defines: &launch.specialisation.defines(self.scheme),
            name: "forge_wgrad_sm80",
            what: &specialise::name(self.scheme),
            grid: grid(launch.blocks)?,
            block: THREADS,
            shared_bytes: launch.shared_bytes,
        };
        let params = launch.params;
        // SAFETY: as promised by the caller; the kernel declares this parameter.
        unsafe { gpu.run(kernel, &mut parameters!(params), stream)? };
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(rows: usize, cols: usize) -> Shard {
        Shard { rows, cols, row_offset: 0, col_offset: 0, global_cols: cols as u64 }
    }

    #[test]
    fn two_blocks_fit_a_multiprocessor() {
        // Of 8.0, 8.6 and 12.0, 9.0 and 10.0.
        for (kib, rows) in [(163, 128), (99, 64), (227, 128)] {
            let limits = Limits { sm_count: 108, shared_memory_per_block: kib << 10 };
            assert_eq!(tile_rows(&shard(4096, 4096), &limits), rows);
            assert!(2 * (shared_bytes(rows) + 1024) <= (kib + 1) << 10);
        }
    }

    #[test]
    fn small_weights_are_cut_smaller() {
        let limits = Limits { sm_count: 108, shared_memory_per_block: 163 << 10 };
        assert_eq!(tile_rows(&shard(1024, 1024), &limits), 64);
        assert_eq!(tile_rows(&shard(2048, 2048), &limits), 128);
    }
}
