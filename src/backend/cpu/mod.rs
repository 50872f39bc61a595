//! The CPU backend: a tile of dW in a thread's own scratch, the rule applied there, tiles over a
//! thread pool.

mod gemm;
mod image;
pub(crate) mod isa;
mod norm;
mod scratch;
mod sgemm;
mod tile;
mod update;
mod user;

pub use tile::{Grid, Tile};

use super::{
    Accumulator, Arrays, Backend, Deliver, Factors, Image, Matrix, Norm, NormMethod, Report,
    Scheme, Shard, Step, StepSource, Stream,
};
use crate::error::{Result, bail};
use crate::format::{Dtype, store_factor};
use crate::process::PerProcess;
use rayon::prelude::*;
use scratch::{Scratch, ScratchPool};
use std::thread::JoinHandle;
use update::{TileUpdate, apply_tile, sum_of_squares};
use user::apply_function;

/// Threads and their scratch.
pub struct Cpu {
    threads: usize,
    workers: PerProcess<Workers>,
}

/// What a process has of its own: after a fork the child has neither its parent's threads nor the
/// locks that these held.
struct Workers {
    /// None: all work on the caller's thread.
    pool: Option<Pool>,
    scratch: ScratchPool,
}

/// A thread pool whose threads have ended when it is dropped, so that nothing of this library runs
/// after the last object that needs it was freed.
struct Pool {
    pool: Option<rayon::ThreadPool>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    fn new(count: usize) -> Result<Self> {
        let mut threads = Vec::with_capacity(count);
        let build = rayon::ThreadPoolBuilder::new()
            .num_threads(count)
            .spawn_handler(|thread| {
                let named = std::thread::Builder::new().name(format!("forge-{}", thread.index()));
                threads.push(named.spawn(|| thread.run())?);
                Ok(())
            })
            .build();
        match build {
            Ok(pool) => Ok(Self { pool: Some(pool), threads }),
            Err(e) => {
                // Those that were started end by themselves.
                drop(Self { pool: None, threads });
                bail!(
                    FORGE_ERROR_THREADS,
                    "threads: a pool of {count} could not be started: {e}; \
                     ask for fewer in forge_context_config.threads"
                )
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        drop(self.pool.take());
        for thread in self.threads.drain(..) {
            // A panic of a task is the caller's already; there is nothing more to be said here.
            let _ = thread.join();
        }
    }
}

impl Cpu {
    /// A backend with this many threads; 0 takes one for each core that this process may use.
    pub fn new(threads: usize) -> Result<Self> {
        let threads = match threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
            n => n,
        };
        let pool = if threads == 1 { None } else { Some(Pool::new(threads)?) };
        let workers = PerProcess::new();
        workers.get_or_make(|_| Workers { pool, scratch: ScratchPool::default() });
        Ok(Self { threads, workers })
    }

    fn workers(&self) -> &Workers {
        self.workers.get_or_make(|_| {
            let pool = (self.threads > 1).then(|| Pool::new(self.threads));
            let pool = pool.transpose().unwrap_or_else(|error| {
                // Slower, and the same bits: tiles are as they were.
                tracing::warn!(
                    target: "forge",
                    "after a fork: {}; this process works on the calling thread", error.message
                );
                None
            });
            Workers { pool, scratch: ScratchPool::default() }
        })
    }

    /// `work(index, scratch)` for each index, results in order of index.
    fn for_each<T: Send>(
        &self,
        count: usize,
        work: impl Fn(usize, &mut Scratch) -> T + Sync,
    ) -> Vec<T> {
        let Workers { pool, scratch } = self.workers();
        let one = |index: usize| scratch.with(|scratch| work(index, scratch));
        match pool.as_ref().and_then(|p| p.pool.as_ref()) {
            Some(pool) if count > 1 => {
                pool.install(|| (0..count).into_par_iter().with_max_len(1).map(one).collect())
            }
            _ => (0..count).map(one).collect(),
        }
    }

    /// The update with dW as a tensor: one product over the whole shard, stored to memory, then the
    /// same rule from there. The reference that the fused update is held against, bit for bit.
    ///
    /// # Safety
    /// As [`Backend::update`].
    #[doc(hidden)]
    pub unsafe fn update_two_phase(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        factors: &[Factors],
        arrays: &Arrays,
        step: &Step,
    ) {
        let mut gradient = vec![0.0f32; shard.rows * shard.cols];
        // SAFETY: as promised by the caller.
        unsafe {
            self.add_products(scheme, shard, factors, Accumulator::fp32(gradient.as_mut_ptr()));
            let whole = Tile { row: 0, col: 0, rows: shard.rows, cols: shard.cols };
            let update = TileUpdate { scheme, shard, arrays, step };
            apply(update, whole, &mut gradient, shard.cols).expect("the rule's function succeeds");
        }
    }

    /// `accumulator += Σ dYᵀX`.
    ///
    /// # Safety
    /// As [`Backend::accumulate`].
    unsafe fn add_products(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        factors: &[Factors],
        accumulator: Accumulator,
    ) {
        let grid = Grid::new(shard.rows, shard.cols, self.threads);
        self.for_each(grid.tiles(), |index, scratch| {
            let tile = grid.tile(index);
            let old = Some(accumulator);
            // SAFETY: as promised by the caller; tiles are disjoint.
            unsafe {
                gemm::wgrad_tile(scheme.factor_dtype, shard, factors, old, tile, scratch);
                for (row, sums) in scratch.tile.chunks_exact(tile.cols).enumerate() {
                    let at = (tile.row + row) * shard.cols + tile.col;
                    std::slice::from_raw_parts_mut(accumulator.get().add(at), tile.cols)
                        .copy_from_slice(sums);
                }
            }
        });
    }

    /// Σ over tiles of the squares of dW, tile by tile in scratch.
    ///
    /// # Safety
    /// As [`Backend::norm`].
    unsafe fn norm_of_tiles(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        factors: &[Factors],
        accumulator: Option<Accumulator>,
    ) -> f64 {
        let grid = Grid::new(shard.rows, shard.cols, self.threads);
        let sums = self.for_each(grid.tiles(), |index, scratch| {
            // SAFETY: as promised by the caller.
            unsafe {
                let tile = grid.tile(index);
                gemm::wgrad_tile(scheme.factor_dtype, shard, factors, accumulator, tile, scratch);
            }
            sum_of_squares(&scratch.tile)
        });
        sums.iter().sum()
    }

    /// The Gram norm, or None where it lost too many digits to say.
    ///
    /// # Safety
    /// As [`Backend::norm`].
    unsafe fn norm_of_grams(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        factors: &[Factors],
    ) -> Option<f64> {
        let blocks = norm::blocks(factors);
        let pairs: Vec<(usize, usize)> =
            (0..blocks.len()).flat_map(|a| (a..blocks.len()).map(move |b| (a, b))).collect();
        let partials = self.for_each(pairs.len(), |index, scratch| {
            let (a, b) = pairs[index];
            // SAFETY: as promised by the caller.
            unsafe {
                let dtype = scheme.factor_dtype;
                norm::pair(dtype, shard, factors, blocks[a], blocks[b], a == b, scratch)
            }
        });
        let total = partials.into_iter().fold(norm::Partial::default(), norm::Partial::add);
        total.is_accurate().then_some(total.sum)
    }
}

/// Applies the rule to a tile of gradient, `g`, whose rows are `g_stride` apart.
///
/// # Safety
/// As [`apply_tile`].
unsafe fn apply(update: TileUpdate, tile: Tile, g: &mut [f32], g_stride: usize) -> Result<()> {
    // SAFETY: as promised by the caller.
    unsafe {
        match update.scheme.rule.user() {
            None => apply_tile(update, tile, g, g_stride),
            Some(rule) => apply_function(rule, update, tile, g, g_stride)?,
        }
    }
    Ok(())
}

/// Whether Gram matrices take fewer operations than the tiles: `T²(in+out)` against `2·T·in·out`.
pub fn gram_is_cheaper(shard: &Shard, tokens: usize) -> bool {
    let (t, i, o) = (tokens as f64, shard.cols as f64, shard.rows as f64);
    t * (i + o) < 2.0 * i * o
}

impl Backend for Cpu {
    fn check_scheme(&self, scheme: &Scheme) -> Result<()> {
        scheme.rule.user().map_or(Ok(()), |rule| rule.function().map(|_| ()))
    }

    fn check_stream(&self, Stream(stream): Stream) -> Result<()> {
        if !stream.is_null() {
            bail!(FORGE_ERROR_STREAM, "stream: {stream:p} given to the CPU backend; pass NULL");
        }
        Ok(())
    }

    fn alignment(&self, element_bytes: usize) -> usize {
        element_bytes
    }

    fn memory_is_host(&self) -> bool {
        true
    }

    unsafe fn update(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        factors: &[Factors],
        accumulator: Option<Accumulator>,
        arrays: &Arrays,
        step: &StepSource,
        _deliver: Deliver,
        _stream: Stream,
    ) -> Result<Option<Report>> {
        let StepSource::Value(step) = step else {
            bail!(FORGE_ERROR_UNSUPPORTED, "step: the CPU backend reads scalars by value");
        };
        let grid = Grid::new(shard.rows, shard.cols, self.threads);
        let update = TileUpdate { scheme, shard, arrays, step };
        let sums = self.for_each(grid.tiles(), |index, scratch| {
            let tile = grid.tile(index);
            // SAFETY: as promised by the caller; tiles are disjoint.
            let (squares, finite) = unsafe {
                gemm::wgrad_tile(scheme.factor_dtype, shard, factors, accumulator, tile, scratch);
                let squares = sum_of_squares(&scratch.tile);
                // The scale can overflow what was finite, so it is part of the question.
                let largest = squares.sqrt() * f64::from(step.grad_scale).abs();
                let finite = largest.is_finite()
                    && (largest < f64::from(f32::MAX)
                        || scratch.tile.iter().all(|g| (g * step.grad_scale).is_finite()));
                if finite {
                    apply(update, tile, &mut scratch.tile, tile.cols)?;
                }
                (squares, finite)
            };
            Ok((squares, finite))
        });
        let sums = sums.into_iter().collect::<Result<Vec<_>>>()?;
        Ok(Some(Report {
            tiles: sums.len() as u64,
            nonfinite_tiles: sums.iter().filter(|(_, finite)| !finite).count() as u64,
            sum_of_squares: sums.iter().map(|(squares, _)| squares).sum(),
        }))
    }

    unsafe fn accumulate(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        factors: &[Factors],
        accumulator: Accumulator,
        _stream: Stream,
    ) -> Result<()> {
        // SAFETY: as promised by the caller.
        unsafe { self.add_products(scheme, shard, factors, accumulator) };
        Ok(())
    }

    unsafe fn norm(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        factors: &[Factors],
        accumulator: Option<Accumulator>,
        method: NormMethod,
        _deliver: Deliver,
        _stream: Stream,
    ) -> Result<Option<Norm>> {
        let tokens = factors.iter().map(|f| f.tokens).sum();
        let try_gram = accumulator.is_none()
            && match method {
                NormMethod::Auto => gram_is_cheaper(shard, tokens),
                NormMethod::Gram => true,
                NormMethod::Tiles => false,
            };
        // SAFETY: as promised by the caller.
        unsafe {
            if try_gram && let Some(sum) = self.norm_of_grams(scheme, shard, factors) {
                return Ok(Some(Norm { method: NormMethod::Gram, sum_of_squares: sum }));
            }
            let sum = self.norm_of_tiles(scheme, shard, factors, accumulator);
            Ok(Some(Norm { method: NormMethod::Tiles, sum_of_squares: sum }))
        }
    }

    unsafe fn dgrad(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        tokens: usize,
        dy: Matrix,
        weight: *const u8,
        dx: *mut u8,
        _stream: Stream,
    ) -> Result<()> {
        let dtype = scheme.factor_dtype;
        let (weight, dx) = (Shared(weight.cast_mut()), Shared(dx));
        let weight_dtype = scheme.weight_format.model_dtype();
        if dtype == Dtype::F32 {
            // Straight into dX: wider tiles, since none has to stay in the cache for a conversion.
            let grid = Grid::with_widest(tokens, shard.cols, self.threads, 4 * tile::MAX_TILE);
            self.for_each(grid.tiles(), |index, scratch| {
                let tile = grid.tile(index);
                // SAFETY: as promised by the caller; tiles of dX are disjoint.
                unsafe {
                    let out = dx.get().cast::<f32>().add(tile.row * shard.cols + tile.col);
                    for row in 0..tile.rows {
                        out.add(row * shard.cols).write_bytes(0, tile.cols);
                    }
                    let converted = (&mut scratch.left, &mut scratch.right);
                    let w = weight.get();
                    let stride = shard.cols;
                    gemm::add_dgrad_tile(
                        dtype,
                        weight_dtype,
                        shard,
                        dy,
                        w,
                        tile,
                        out,
                        stride,
                        converted,
                    );
                }
            });
            return Ok(());
        }
        let grid = Grid::new(tokens, shard.cols, self.threads);
        self.for_each(grid.tiles(), |index, scratch| {
            let tile = grid.tile(index);
            let Scratch { tile: out, left, right } = scratch;
            out.clear();
            out.resize(tile.rows * tile.cols, 0.0);
            // SAFETY: as promised by the caller; tiles of dX are disjoint.
            unsafe {
                gemm::add_dgrad_tile(
                    dtype,
                    weight_dtype,
                    shard,
                    dy,
                    weight.get(),
                    tile,
                    out.as_mut_ptr(),
                    tile.cols,
                    (left, right),
                );
                for (row, values) in out.chunks_exact(tile.cols).enumerate() {
                    let at = (tile.row + row) * shard.cols + tile.col;
                    store_factor(dtype, dx.get().add(at * dtype.bytes()), values);
                }
            }
        });
        Ok(())
    }

    unsafe fn bias_grad(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        tokens: usize,
        dy: Matrix,
        dbias: *mut u8,
        _stream: Stream,
    ) -> Result<()> {
        let dtype = scheme.factor_dtype;
        let width = tile::MAX_TILE;
        let dbias = Shared(dbias);
        self.for_each(shard.rows.div_ceil(width), |index, scratch| {
            let col = index * width;
            let cols = width.min(shard.rows - col);
            scratch.tile.clear();
            scratch.tile.resize(cols, 0.0);
            for token in 0..tokens {
                // SAFETY: as promised by the caller.
                let row = unsafe {
                    let (row, _) =
                        gemm::rows_as_f32(dtype, dy, token, 1, col, cols, &mut scratch.left);
                    std::slice::from_raw_parts(row, cols)
                };
                for (sum, value) in scratch.tile.iter_mut().zip(row) {
                    *sum += value;
                }
            }
            // SAFETY: as promised by the caller; column ranges are disjoint.
            unsafe { store_factor(dtype, dbias.get().add(col * dtype.bytes()), &scratch.tile) };
        });
        Ok(())
    }

    unsafe fn copy(
        &self,
        from: Matrix,
        (rows, cols): (usize, usize),
        dtype: Dtype,
        to: *mut u8,
        _stream: Stream,
    ) -> Result<()> {
        let element = dtype.bytes();
        let (source, pitch) = (Shared(from.data.cast_mut()), from.stride * element);
        let to = Shared(to);
        // Rows enough for a thread to be worth its while.
        let height = (tile::MAX_TILE * tile::MAX_TILE).div_ceil(cols.max(1));
        self.for_each(rows.div_ceil(height), |index, _| {
            for row in index * height..rows.min((index + 1) * height) {
                // SAFETY: as promised by the caller; rows are disjoint.
                unsafe {
                    let source = source.get().add(row * pitch).cast_const();
                    let target = to.get().add(row * cols * element);
                    source.copy_to_nonoverlapping(target, cols * element);
                }
            }
        });
        Ok(())
    }

    unsafe fn zero(&self, to: *mut u8, bytes: usize, _stream: Stream) -> Result<()> {
        // SAFETY: as promised by the caller.
        unsafe { to.write_bytes(0, bytes) };
        Ok(())
    }

    unsafe fn export(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        arrays: &Arrays,
        image: Image,
        out: *mut f32,
        _stream: Stream,
    ) -> Result<()> {
        let out = Accumulator::fp32(out);
        self.for_each(shard.rows, |row, _| {
            // SAFETY: as promised by the caller; rows are disjoint.
            unsafe { image::export_row(scheme, shard, arrays, image, row, out.get()) };
        });
        Ok(())
    }

    unsafe fn import(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        arrays: &Arrays,
        image: Image,
        values: *const f32,
        _stream: Stream,
    ) -> Result<()> {
        let values = Accumulator::fp32(values.cast_mut());
        self.for_each(shard.rows, |row, _| {
            // SAFETY: as promised by the caller; rows are disjoint.
            unsafe { image::import_row(scheme, shard, arrays, image, row, values.get()) };
        });
        Ok(())
    }
}

/// A pointer that tiles on several threads use at disjoint places.
#[derive(Clone, Copy)]
struct Shared(*mut u8);

// SAFETY: see the type's own line.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn get(self) -> *mut u8 {
        self.0
    }
}
