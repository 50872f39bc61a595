//! Data parallelism without a gradient: every rank has a copy of W and other tokens, and *owns* some of W's rows:
//! it holds their states, and updates them over the tokens of all ranks. Then W is gathered.
//!
//! Two reductions, by what they move:
//! - **exchange**: X of all ranks is gathered, dY is sent to the owners of its columns, and the fused kernel runs
//!   over the tokens of all. The sum over ranks is in the kernel: the bits are those of one rank with all tokens.
//! - **panels**: dW in panels of rows, summed over ranks into an fp32 buffer of the owned rows, while the next
//!   panel is multiplied. Ranks may have different numbers of tokens, or none.

use super::{Linear, Shape};
use crate::backend::{Accumulator, Arrays, Backend, Factors, Matrix, Scheme, Shard, Stream};
use crate::comm::Comm;
use crate::error::{Result, bail};
use crate::format::Dtype;
use std::sync::Arc;

/// How dW is summed over the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// The one that moves fewer bytes.
    Auto,
    /// Of factors.
    Exchange,
    /// Of row panels of dW.
    Panels,
}

/// Whom a linear shares tokens with, and how dW is summed.
pub struct DataParallel {
    /// Ranks that have the same W.
    pub comm: Arc<dyn Comm>,
    /// As asked for.
    pub reduction: Reduction,
    /// Backwards in a step: factors are exchanged in each, panels may be reduced once for all.
    pub micro_batches: u32,
}

/// Bytes of a panel of fp32, of which there are two.
const PANEL_BYTES: usize = 32 << 20;

/// Rows of a panel that are a multiple of this keep whole tiles of every kernel.
const PANEL_ROWS: usize = 128;

/// What buffers must be aligned to.
const ALIGNMENT: usize = 256;

fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// Where in the workspace the exchanged factors are, and what is sent; bytes from its start.
#[derive(Clone, Copy, Debug)]
pub struct ExchangePlaces {
    /// dY of the owned rows, of all tokens; X of all tokens is at 0.
    pub dy: usize,
    /// dY of this rank's tokens, by owner.
    pub sent: usize,
    /// All of it.
    pub bytes: usize,
}

/// As above, where panels are reduced.
#[derive(Clone, Copy, Debug)]
struct PanelPlaces {
    /// Rows of each owner in a panel.
    rows: usize,
    /// Of the two panels.
    panels: [usize; 2],
    /// dW of the owned rows, where the caller has no accumulator.
    owned: usize,
    bytes: usize,
}

/// Bytes that a rank receives to exchange the factors of this many tokens of each rank.
pub fn exchange_bytes(shape: &Shape, tokens: u64, dtype: Dtype) -> u128 {
    let (others, owned) = ((shape.replicas - 1) as u128, shape.owned());
    others * u128::from(tokens) * (owned.rows + owned.cols) as u128 * dtype.bytes() as u128
}

/// Bytes that a rank receives when panels of dW are reduced once.
pub fn panel_bytes(shape: &Shape) -> u128 {
    let owned = shape.owned();
    (shape.replicas - 1) as u128 * (owned.rows * owned.cols * 4) as u128
}

/// How often panels are reduced in a step where factors wait as long as they are no larger than the buffer that they
/// are reduced to, as under `accumulate`.
pub fn reductions(shape: &Shape, tokens: u64, micro_batches: u32, dtype: Dtype) -> u32 {
    let (shard, owned) = (&shape.shard, shape.owned());
    let one = u128::from(tokens) * ((shard.rows + shard.cols) * dtype.bytes()) as u128;
    let fit = ((owned.rows * owned.cols * 4) as u128 / one.max(1)).max(1);
    micro_batches.div_ceil(u32::try_from(fit).unwrap_or(u32::MAX))
}

impl ExchangePlaces {
    /// For this many tokens of a rank.
    pub fn new(shape: &Shape, tokens: usize, dtype: Dtype) -> Self {
        let (all, element) = (shape.replicas * tokens, dtype.bytes());
        let dy = aligned(all * shape.shard.cols * element);
        let sent = dy + aligned(all * shape.owned().rows * element);
        Self { dy, sent, bytes: sent + aligned(tokens * shape.shard.rows * element) }
    }
}

impl PanelPlaces {
    fn new(shape: &Shape) -> Self {
        let (owned, row) = (shape.owned(), shape.shard.cols * 4);
        let most = PANEL_BYTES / (row * shape.replicas);
        let whole = if most > PANEL_ROWS { most / PANEL_ROWS * PANEL_ROWS } else { most.max(1) };
        let rows = whole.min(owned.rows);
        let panel = aligned(rows * row * shape.replicas);
        let end = 2 * panel;
        let bytes = end + aligned(owned.rows * row);
        Self { rows, panels: [0, panel], owned: end, bytes }
    }
}

impl Shape {
    /// Shares tokens with the other ranks of `replicas` that have the same W: each owns as many of its rows.
    pub fn replicated(mut self, rank: usize, replicas: usize) -> Result<Self> {
        let rows = self.shard.rows;
        if !rows.is_multiple_of(replicas) {
            bail!(
                FORGE_ERROR_SHARD,
                "out_features: {rows} rows of W here do not divide by {replicas} data-parallel ranks; pad them to a \
                 multiple, or leave this weight to an optimizer that has gradients"
            );
        }
        (self.replica, self.replicas) = (rank, replicas);
        Ok(self)
    }

    /// The rows that this rank updates: all of its shard, or its part of them.
    pub fn owned(&self) -> Shard {
        let rows = self.shard.rows / self.replicas;
        let first = self.replica * rows;
        Shard { rows, row_offset: self.shard.row_offset + first as u64, ..self.shard }
    }

    /// Bytes that panels need of a workspace.
    pub fn panel_workspace(&self) -> usize {
        PanelPlaces::new(self).bytes
    }
}

impl DataParallel {
    /// How dW of this many tokens of a rank is summed, which every rank must have: by bytes of a step that a rank
    /// receives.
    pub fn choose(&self, shape: &Shape, tokens: usize, dtype: Dtype) -> Reduction {
        if self.reduction != Reduction::Auto {
            return self.reduction;
        }
        let (tokens, micro_batches) = (tokens as u64, self.micro_batches);
        let exchanged = exchange_bytes(shape, tokens, dtype) * u128::from(micro_batches);
        let reductions = reductions(shape, tokens, micro_batches, dtype);
        let panels = panel_bytes(shape) * u128::from(reductions);
        if exchanged <= panels { Reduction::Exchange } else { Reduction::Panels }
    }

    /// Starts to send dY to the owners of its columns.
    ///
    /// # Safety
    /// As [`Linear::backward`]; `workspace` has what [`Linear::workspace_bytes`] says.
    pub unsafe fn send_dy(
        &self,
        backend: &dyn Backend,
        (shape, dtype): (&Shape, Dtype),
        tokens: usize,
        dy: Matrix,
        workspace: *mut u8,
        stream: Stream,
    ) -> Result<()> {
        let places = ExchangePlaces::new(shape, tokens, dtype);
        let rows = shape.owned().rows;
        // SAFETY: as promised by the caller; parts of what is sent are apart.
        unsafe {
            let (sent, part) = (workspace.add(places.sent), tokens * rows);
            for owner in 0..shape.replicas {
                let from = dy.skip_columns(owner * rows, dtype);
                let to = sent.add(owner * part * dtype.bytes());
                backend.copy(from, (tokens, rows), dtype, to, stream)?;
            }
            self.comm.all_to_all(sent, workspace.add(places.dy), part, dtype, stream)
        }
    }

    /// Starts to gather X, which is contiguous.
    ///
    /// # Safety
    /// As [`DataParallel::send_dy`].
    pub unsafe fn gather_x(
        &self,
        (shape, dtype): (&Shape, Dtype),
        tokens: usize,
        x: Matrix,
        workspace: *mut u8,
        stream: Stream,
    ) -> Result<()> {
        let count = tokens * shape.shard.cols;
        // SAFETY: as promised by the caller.
        unsafe { self.comm.all_gather(x.data, workspace, count, dtype, stream) }
    }

    /// What the owner multiplies once both have arrived, which the caller's stream waits for here.
    ///
    /// # Safety
    /// As [`DataParallel::send_dy`].
    pub unsafe fn received(
        &self,
        (shape, dtype): (&Shape, Dtype),
        tokens: usize,
        workspace: *mut u8,
        stream: Stream,
    ) -> Result<Factors> {
        self.comm.wait(stream)?;
        let places = ExchangePlaces::new(shape, tokens, dtype);
        let owned = shape.owned();
        // SAFETY: as promised by the caller.
        let dy = unsafe { workspace.add(places.dy) };
        Ok(Factors {
            dy: Matrix { data: dy, stride: owned.rows },
            x: Matrix { data: workspace, stride: owned.cols },
            tokens: shape.replicas * tokens,
        })
    }

    /// dW of the owned rows, summed over the ranks in panels: added to `accumulator`, or in the workspace.
    ///
    /// # Safety
    /// As [`DataParallel::send_dy`].
    pub unsafe fn reduce_panels(
        &self,
        backend: &dyn Backend,
        scheme: &Scheme,
        shape: &Shape,
        factors: &[Factors],
        accumulator: Option<Accumulator>,
        writes_accumulator: bool,
        workspace: *mut u8,
        stream: Stream,
    ) -> Result<Accumulator> {
        let places = PanelPlaces::new(shape);
        let (owned, cols) = (shape.owned(), shape.shard.cols);
        // SAFETY: as promised by the caller; places are apart, and a panel is written again only when the stream
        // has waited for its reduction.
        unsafe {
            let out: *mut f32 = match accumulator.filter(|_| writes_accumulator) {
                Some(accumulator) => accumulator.get(),
                None => workspace.add(places.owned).cast(),
            };
            let mut turn = 0;
            for first in (0..owned.rows).step_by(places.rows) {
                let rows = places.rows.min(owned.rows - first);
                let count = rows * cols;
                let panel = workspace.add(places.panels[turn]).cast::<f32>();
                for owner in 0..shape.replicas {
                    let part = panel.add(owner * count);
                    match accumulator.filter(|_| owner == shape.replica) {
                        // Earlier micro-batches join the sum, which may then replace them.
                        Some(sum) => {
                            let from = sum.get().add(first * cols).cast_const().cast();
                            let from = Matrix { data: from, stride: cols };
                            backend.copy(from, (rows, cols), Dtype::F32, part.cast(), stream)?;
                        }
                        None => backend.zero(part.cast(), count * 4, stream)?,
                    }
                    let at = owner * owned.rows + first;
                    let row_offset = shape.shard.row_offset + at as u64;
                    let shard = Shard { rows, row_offset, ..shape.shard };
                    let of_rows = |f: &Factors| Factors {
                        dy: f.dy.skip_columns(at, scheme.factor_dtype),
                        ..*f
                    };
                    let own: Vec<Factors> =
                        factors.iter().filter(|f| f.tokens > 0).map(of_rows).collect();
                    let sum = Accumulator::fp32(part);
                    backend.accumulate(scheme, &shard, &own, sum, stream)?;
                }
                // The panel before this one, which was reduced while this one was multiplied.
                self.comm.wait(stream)?;
                let to = out.add(first * cols).cast();
                let panel = panel.cast_const().cast();
                self.comm.reduce_scatter(panel, to, count, Dtype::F32, stream)?;
                turn = 1 - turn;
            }
            self.comm.wait(stream)?;
            Ok(Accumulator::fp32(out))
        }
    }
}

impl Linear {
    /// A parameter's arrays as they are of the owned rows, though the caller has all rows of the weight.
    pub(super) fn own(&self, arrays: &Arrays) -> Arrays {
        let before = self.shape.replica * self.shape.owned().rows * self.shape.shard.cols;
        let weight = if arrays.weight.is_null() {
            arrays.weight
        } else {
            let bytes = before * self.scheme.weight_format.model_dtype().bytes();
            arrays.weight.wrapping_add(bytes)
        };
        Arrays { weight, ..*arrays }
    }

    /// Starts to gather W from the owners of its rows; nothing where this rank owns all of them.
    ///
    /// # Safety
    /// `weight` is valid for all rows of this rank's shard until [`Comm::wait`].
    pub unsafe fn gather_weight(&self, weight: *mut u8, stream: Stream) -> Result<()> {
        let Some(data_parallel) = &self.data_parallel else { return Ok(()) };
        let (owned, dtype) = (self.shape.owned(), self.scheme.weight_format.model_dtype());
        let count = owned.rows * owned.cols;
        // SAFETY: as promised by the caller.
        unsafe {
            let own = weight.add(self.shape.replica * count * dtype.bytes());
            data_parallel.comm.all_gather(own, weight, count, dtype, stream)
        }
    }
}
