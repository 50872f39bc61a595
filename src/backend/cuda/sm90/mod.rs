//! The fused kernel of compute capability 9.0, `kernels/wgrad_sm90.cu`. Each function says whether it
//! took the work: `false` leaves it to the panel path.

pub mod group;
mod maps;
pub mod policy;

use super::super::{Accumulator, Arrays, Factors, Matrix, Scheme, Shard, Stream};
use super::driver::{DevicePtr, TensorMap, parameters};
use super::gpu::{Gpu, Kernel};
use super::parameters::KernelStep;
use super::{sources, specialise};
use crate::error::Result;
use crate::format::{Dtype, Rounding, StateFormat, WeightFormat};
use crate::philox::{ROUNDS, round_keys};
use crate::rule::MAX_STATES;
use maps::{EMPTY, Streamed, array_halves, array_maps, factor_map, scale_halves, scale_maps};
use policy::{CONSUMERS, Plan, TILE_ROWS, Tile, choose, plan, rows_together, shared_bytes};

/// `forge::Array`: weight, extra, three states, accumulator.
const ARRAYS: usize = 6;
const ACCUMULATOR: usize = 5;
/// Segments that one launch takes; kernels are specialised for one, some, or this many.
pub const MOST_SEGMENTS: usize = 32;

/// What becomes of dW: `forge::Mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The rule consumes it.
    Update = 0,
    /// A buffer takes it.
    Accumulate = 1,
    /// Its squares are summed.
    Norm = 2,
}

/// What streams beside dW.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Streams {
    /// Bytes for each element of W.
    pub bytes: u32,
    /// Whether a state is q8.
    pub q8: bool,
}

impl Streams {
    /// Of a mode, with or without a buffer.
    pub fn of(scheme: &Scheme, mode: Mode, accumulator: bool) -> Self {
        let mut bytes = if accumulator { Dtype::F32.bytes() } else { 0 };
        let mut q8 = false;
        if mode == Mode::Update {
            let states = &scheme.state_formats[..scheme.n_states];
            bytes += scheme.weight_format.model_dtype().bytes();
            bytes += scheme.weight_format.extra_dtype().map_or(0, Dtype::bytes);
            bytes += states.iter().map(|s| s.dtype().bytes()).sum::<usize>();
            q8 = states.contains(&StateFormat::Q8);
        }
        Self { bytes: bytes as u32, q8 }
    }
}

/// `forge::Params` for a number of segments.
#[repr(C)]
struct Params<const SEGMENTS: usize> {
    arrays: [[TensorMap; 2]; ARRAYS],
    scales: [[TensorMap; 2]; MAX_STATES],
    dy: [TensorMap; SEGMENTS],
    x: [TensorMap; SEGMENTS],
    rest: Rest<SEGMENTS>,
}

/// What lies in it behind the maps.
#[repr(C)]
#[derive(Clone, Copy)]
struct Rest<const SEGMENTS: usize> {
    token_blocks: [u32; SEGMENTS],
    n_segments: u32,
    rows: u32,
    tiles_m: u32,
    whole_cols: u32,
    whole_places: u32,
    narrow_cols: u32,
    places: u32,
    group_m: u32,
    first_index: u64,
    global_cols: u64,
    step: KernelStep,
    keys: [[u32; 2]; ROUNDS],
    reports: [DevicePtr; 2],
    partials: DevicePtr,
    counter: DevicePtr,
    method: u32,
    draw_high: u32,
}

/// Where the kernel leaves its report or norm, and what it needs to make one.
#[derive(Clone, Copy, Debug)]
pub struct Reports {
    /// Where it goes; 0: nowhere.
    pub targets: [DevicePtr; 2],
    /// Room for a `TilePartial` of each consumer.
    pub partials: DevicePtr,
    /// A zero, which the kernel leaves as one.
    pub counter: DevicePtr,
    /// Of a norm: the `forge_norm_method` that it says.
    pub method: u32,
}

impl Reports {
    /// No report.
    const NONE: Self = Self { targets: [0; 2], partials: 0, counter: 0, method: 0 };
}

/// What the kernel is compiled for, beside the scheme.
#[derive(Clone, Copy, Debug)]
pub struct Specialisation {
    /// What becomes of dW.
    pub mode: Mode,
    /// How it is cut.
    pub tile: Tile,
    /// Whether a buffer is added to it.
    pub accumulator: bool,
    /// Whether blocks of 64 draws (see kernels/philox.cuh) begin where rows of the shard do, and the
    /// upper words of their numbers are all the same.
    pub whole_draws: bool,
    /// Whether the step's scalars are in device memory.
    pub device_step: bool,
    /// Segments that there is room for.
    pub segments: usize,
    /// Whether a launch is of many weights.
    pub group: bool,
}

impl Specialisation {
    /// `NAME=value`, for the compiler.
    pub fn defines(&self, scheme: &Scheme) -> Vec<String> {
        let (mut out, whole_draws) = if self.mode == Mode::Update {
            let random = scheme.weight_format == WeightFormat::Bf16
                && scheme.weight_rounding == Rounding::Stochastic
                || scheme.state_rounding == Rounding::Stochastic;
            (specialise::update(scheme), self.whole_draws || !random)
        } else {
            // Neither weight nor states: one kernel for all schemes.
            (specialise::none(), true)
        };
        let mut define = |name: &str, value: u32| out.push(format!("FORGE_{name}={value}"));
        define("FACTOR", specialise::dtype_code(scheme.factor_dtype));
        define("MODE", self.mode as u32);
        define("ACCUMULATOR", u32::from(self.accumulator));
        define("DRAWS_ALIGNED", u32::from(whole_draws));
        define("DEVICE_STEP", u32::from(self.device_step));
        define("MAX_SEGMENTS", self.segments as u32);
        define("TILE_COLS", self.tile.cols);
        define("TILE_TOKENS", self.tile.tokens);
        define("STAGES", self.tile.stages);
        define("CHUNK_COLS", self.tile.chunk_cols);
        define("SLOTS", self.tile.slots);
        define("CLUSTER", self.tile.cluster);
        if self.group {
            define("GROUP", 1);
        }
        out
    }
}

/// One call of the kernel.
struct Call<'a> {
    gpu: &'a Gpu,
    scheme: &'a Scheme,
    shard: &'a Shard,
    factors: Vec<Factors>,
    arrays: [Option<Streamed>; ARRAYS],
    scales: [DevicePtr; MAX_STATES],
    mode: Mode,
    step: KernelStep,
    reports: Reports,
}

/// The fused update. Returns whether it was enqueued, its report included.
///
/// # Safety
/// As [`super::super::Backend::update`]; the context is current.
pub unsafe fn try_update(
    gpu: &Gpu,
    scheme: &Scheme,
    shard: &Shard,
    factors: &[Factors],
    accumulator: Option<Accumulator>,
    arrays: &Arrays,
    step: KernelStep,
    reports: Reports,
    stream: Stream,
) -> Result<bool> {
    if !fits(scheme, shard) {
        return Ok(false);
    }
    let call = Call::of_update(gpu, scheme, shard, factors, accumulator, arrays, step, reports);
    // SAFETY: as promised by the caller.
    unsafe { call.run(stream) }
}

/// What an update streams.
fn streamed(
    scheme: &Scheme,
    accumulator: Option<Accumulator>,
    arrays: &Arrays,
) -> [Option<Streamed>; ARRAYS] {
    let mut out = [None; ARRAYS];
    let at = |data: *mut u8, dtype| Some(Streamed { data: data as DevicePtr, dtype });
    out[0] = at(arrays.weight, scheme.weight_format.model_dtype());
    out[1] = scheme.weight_format.extra_dtype().and_then(|dtype| at(arrays.extra, dtype));
    for (k, format) in scheme.state_formats[..scheme.n_states].iter().enumerate() {
        out[2 + k] = at(arrays.states[k], format.dtype());
    }
    out[ACCUMULATOR] = accumulator.and_then(|a| at(a.get().cast(), Dtype::F32));
    out
}

/// Rows, columns and tokens: 31 bits in the kernel.
const MOST: usize = u32::MAX as usize / 2;

/// Whether the kernel's boxes fit the shape, and the update's epilogue knows the formats. The other modes
/// ask as well, though they touch no state: then a gradient that is stored first comes from the same sums
/// as the one in registers.
pub fn fits(scheme: &Scheme, shard: &Shard) -> bool {
    let Shard { rows, cols, .. } = *shard;
    let q8 = scheme.state_formats[..scheme.n_states].contains(&StateFormat::Q8);
    // Whole blocks of q8: the rest is rare enough for the panel path.
    let unit = if q8 { 128 } else { 8 };
    rows.is_multiple_of(8)
        && cols.is_multiple_of(unit)
        && (64..MOST).contains(&rows)
        && (64..MOST).contains(&cols)
}

/// The number of segments that a kernel has room for which is called with `n`.
pub fn room(n: usize) -> usize {
    match n {
        0 | 1 => 1,
        2..=8 => 8,
        _ => MOST_SEGMENTS,
    }
}

/// See [`Specialisation::whole_draws`].
pub fn whole_draws(shard: &Shard) -> bool {
    let (first, last) = first_and_last_call(shard);
    shard.global_index(0, 0).is_multiple_of(64)
        && shard.global_cols.is_multiple_of(64)
        && first >> 32 == last >> 32
}

/// The first and the last of a shard's elements over 16, as many as a Philox call serves: their upper
/// words are those of the calls' numbers.
fn first_and_last_call(shard: &Shard) -> (u64, u64) {
    let Shard { rows, cols, .. } = *shard;
    (shard.global_index(0, 0) / 16, shard.global_index(rows - 1, cols - 1) / 16)
}

/// `accumulator += Σ dYᵀX`. Returns whether it was enqueued.
///
/// # Safety
/// As [`try_update`].
pub unsafe fn try_accumulate(
    gpu: &Gpu,
    scheme: &Scheme,
    shard: &Shard,
    factors: &[Factors],
    accumulator: Accumulator,
    stream: Stream,
) -> Result<bool> {
    let (buffer, none) = (Some(accumulator), Reports::NONE);
    // SAFETY: as promised by the caller.
    unsafe { plain(gpu, scheme, shard, factors, buffer, Mode::Accumulate, none, stream) }
}

/// The norm. Returns whether it was enqueued.
///
/// # Safety
/// As [`try_update`].
pub unsafe fn try_norm(
    gpu: &Gpu,
    scheme: &Scheme,
    shard: &Shard,
    factors: &[Factors],
    accumulator: Option<Accumulator>,
    reports: Reports,
    stream: Stream,
) -> Result<bool> {
    // SAFETY: as promised by the caller.
    unsafe { plain(gpu, scheme, shard, factors, accumulator, Mode::Norm, reports, stream) }
}

/// A mode that touches neither weight nor states.
///
/// # Safety
/// As [`try_update`].
unsafe fn plain(
    gpu: &Gpu,
    scheme: &Scheme,
    shard: &Shard,
    factors: &[Factors],
    accumulator: Option<Accumulator>,
    mode: Mode,
    reports: Reports,
    stream: Stream,
) -> Result<bool> {
    if !fits(scheme, shard) {
        return Ok(false);
    }
    let mut arrays = [None; ARRAYS];
    arrays[ACCUMULATOR] =
        accumulator.map(|a| Streamed { data: a.get() as DevicePtr, dtype: Dtype::F32 });
    let call = Call {
        gpu,
        scheme,
        shard,
        factors: with_tokens(factors),
        arrays,
        scales: [0; MAX_STATES],
        mode,
        step: KernelStep::default(),
        reports,
    };
    // SAFETY: as promised by the caller.
    unsafe { call.run(stream) }
}

fn with_tokens(factors: &[Factors]) -> Vec<Factors> {
    factors.iter().filter(|f| f.tokens > 0).copied().collect()
}

/// Whether the tensor memory accelerator can read a factor: 16-byte addresses and rows.
fn readable(factor: &Matrix) -> bool {
    (factor.data as usize).is_multiple_of(16) && factor.stride.is_multiple_of(8)
}

impl<'a> Call<'a> {
    fn of_update(
        gpu: &'a Gpu,
        scheme: &'a Scheme,
        shard: &'a Shard,
        factors: &[Factors],
        accumulator: Option<Accumulator>,
        arrays: &Arrays,
        step: KernelStep,
        reports: Reports,
    ) -> Self {
        Self {
            gpu,
            scheme,
            shard,
            factors: with_tokens(factors),
            arrays: streamed(scheme, accumulator, arrays),
            scales: arrays.scales.map(|s| s as DevicePtr),
            mode: Mode::Update,
            step,
            reports,
        }
    }

    /// Whether the kernel's boxes fit shapes and addresses.
    fn possible(&self) -> bool {
        (1..=MOST_SEGMENTS).contains(&self.factors.len())
            && self.factors.iter().all(|f| readable(&f.dy) && readable(&f.x) && f.tokens < MOST)
            && self.arrays.iter().flatten().all(|a| a.data.is_multiple_of(16))
            && self.scales.iter().all(|s| s.is_multiple_of(16))
    }

    /// # Safety
    /// As [`try_update`].
    unsafe fn run(&self, stream: Stream) -> Result<bool> {
        if !self.possible() {
            return Ok(false);
        }
        let Shard { rows, cols, .. } = *self.shard;
        let properties = self.gpu.properties();
        let tokens = self.tokens();
        let most = properties.shared_memory_per_block;
        let streams = Streams::of(self.scheme, self.mode, self.arrays[ACCUMULATOR].is_some());
        let (height, width) = (rows as u64, cols as u64);
        let Some(tile) = choose(height, width, tokens, &streams, properties.sm_count, most) else {
            return Ok(false);
        };
        // SAFETY: as promised by the caller.
        unsafe {
            match room(self.factors.len()) {
                1 => self.launch::<1>(&tile, &streams, stream)?,
                8 => self.launch::<8>(&tile, &streams, stream)?,
                _ => self.launch::<MOST_SEGMENTS>(&tile, &streams, stream)?,
            }
        }
        Ok(true)
    }

    fn tokens(&self) -> u64 {
        self.factors.iter().map(|f| f.tokens as u64).sum()
    }

    fn specialisation(&self, tile: &Tile, segments: usize) -> Specialisation {
        Specialisation {
            mode: self.mode,
            tile: *tile,
            accumulator: self.arrays[ACCUMULATOR].is_some(),
            whole_draws: whole_draws(self.shard),
            device_step: self.step.device != 0,
            segments,
            group: false,
        }
    }

    /// # Safety
    /// As [`try_update`]; there are at most SEGMENTS factors.
    unsafe fn launch<const SEGMENTS: usize>(
        &self,
        tile: &Tile,
        streams: &Streams,
        stream: Stream,
    ) -> Result<()> {
        let Shard { rows, cols, .. } = *self.shard;
        let sm_count = self.gpu.properties().sm_count;
        let plan = plan(tile, rows as u64, cols as u64, sm_count);
        let group_m = rows_together(tile, rows as u64, cols as u64, self.tokens(), sm_count);
        let mut params = Params::<SEGMENTS> {
            arrays: [[EMPTY; 2]; ARRAYS],
            scales: [[EMPTY; 2]; MAX_STATES],
            dy: [EMPTY; SEGMENTS],
            x: [EMPTY; SEGMENTS],
            rest: self.rest(tile, &plan, rows, group_m),
        };
        // SAFETY: as promised by the caller: pointers and sizes of the shard and of its factors.
        unsafe {
            for (k, f) in self.factors.iter().enumerate() {
                (params.dy[k], params.x[k]) = self.factor_maps(f, tile)?;
            }
            for (maps, array) in params.arrays.iter_mut().zip(self.arrays) {
                if let Some(array) = array {
                    *maps = array_maps(array, rows, cols, tile.chunk_cols)?;
                }
            }
            for (k, maps) in params.scales.iter_mut().enumerate() {
                if self.is_q8(k) {
                    *maps = scale_maps(self.scales[k], rows, cols)?;
                }
            }
            let special = self.specialisation(tile, SEGMENTS);
            self.enqueue(&special, &plan, streams, &mut parameters!(params), stream)
        }
    }

    /// Boxes of 64 features of a segment's factors.
    ///
    /// # Safety
    /// As [`try_update`].
    unsafe fn factor_maps(&self, f: &Factors, tile: &Tile) -> Result<(TensorMap, TensorMap)> {
        let (dtype, shard) = (self.scheme.factor_dtype, self.shard);
        // SAFETY: as promised by the caller.
        unsafe {
            let dy = factor_map(dtype, &f.dy, shard.rows, f.tokens, tile.tokens)?;
            let x = factor_map(dtype, &f.x, shard.cols, f.tokens, tile.tokens / tile.cluster)?;
            Ok((dy, x))
        }
    }

    /// A weight's maps as a group has them: of its arrays, of q8 states' scales, of dY and of X.
    ///
    /// # Safety
    /// As [`try_update`].
    unsafe fn maps(&self, tile: &Tile) -> Result<Vec<TensorMap>> {
        let Shard { rows, cols, .. } = *self.shard;
        let mut maps = Vec::new();
        // SAFETY: as promised by the caller.
        unsafe {
            for array in self.arrays.into_iter().flatten() {
                maps.extend(array_maps(array, rows, cols, tile.chunk_cols)?);
            }
            for k in (0..MAX_STATES).filter(|k| self.is_q8(*k)) {
                maps.extend(scale_maps(self.scales[k], rows, cols)?);
            }
            for f in &self.factors {
                let (dy, x) = self.factor_maps(f, tile)?;
                maps.extend([dy, x]);
            }
        }
        Ok(maps)
    }

    /// Where each of [`Call::maps`] begins.
    fn addresses(&self) -> Vec<DevicePtr> {
        let cols = self.shard.cols;
        let arrays = self.arrays.iter().flatten().flat_map(|array| array_halves(*array, cols));
        let scales =
            (0..MAX_STATES).filter(|k| self.is_q8(*k)).flat_map(|k| scale_halves(self.scales[k]));
        let factors = self.factors.iter().flat_map(|f| [f.dy.data, f.x.data]);
        arrays.chain(scales).chain(factors.map(|data| data as DevicePtr)).collect()
    }

    fn is_q8(&self, state: usize) -> bool {
        self.arrays[2 + state].is_some_and(|a| a.dtype == Dtype::U8)
    }

    /// `all_rows`: of all weights of the launch.
    fn rest<const SEGMENTS: usize>(
        &self,
        tile: &Tile,
        plan: &Plan,
        all_rows: usize,
        group_m: u32,
    ) -> Rest<SEGMENTS> {
        let mut token_blocks = [0; SEGMENTS];
        for (to, f) in token_blocks.iter_mut().zip(&self.factors) {
            *to = f.tokens.div_ceil(tile.tokens as usize) as u32;
        }
        Rest {
            token_blocks,
            n_segments: self.factors.len() as u32,
            rows: self.shard.rows as u32,
            tiles_m: all_rows.div_ceil(TILE_ROWS as usize) as u32,
            whole_cols: plan.whole_cols,
            whole_places: plan.whole_places,
            narrow_cols: plan.narrow_cols,
            places: plan.places,
            group_m,
            first_index: self.shard.global_index(0, 0),
            global_cols: self.shard.global_cols,
            step: self.step,
            keys: round_keys(self.step.value.key),
            reports: self.reports.targets,
            partials: self.reports.partials,
            counter: self.reports.counter,
            method: self.reports.method,
            draw_high: (first_and_last_call(self.shard).0 >> 32) as u32 & 0x00FF_FFFF,
        }
    }

    /// # Safety
    /// As [`try_update`]; the parameter is the kernel's of this specialisation.
    unsafe fn enqueue(
        &self,
        special: &Specialisation,
        plan: &Plan,
        streams: &Streams,
        parameters: &mut [*mut std::ffi::c_void],
        stream: Stream,
    ) -> Result<()> {
        let tile = &special.tile;
        let sm_count = self.gpu.properties().sm_count;
        let blocks = (sm_count / tile.cluster).min(plan.places) * tile.cluster;
        let kernel = Kernel {
            source: sources::WGRAD_SM90,
            defines: &special.defines(self.scheme),
            name: "forge_wgrad_sm90",
            what: &specialise::name(self.scheme),
            grid: [blocks, 1, 1],
            block: 128 * (CONSUMERS + 1),
            shared_bytes: shared_bytes(tile, streams),
        };
        // SAFETY: as promised by the caller.
        unsafe { self.gpu.run(kernel, parameters, stream) }
    }
}
