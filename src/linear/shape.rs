//! Sizes of a linear, globally and on this rank, and of every buffer that goes with it.

use crate::backend::{Scheme, Shard};
use crate::error::{Result, bail};
use crate::format::{BLOCK, Dtype};
use crate::rule::MAX_STATES;

/// Which dimension of W the ranks share out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parallel {
    /// Neither: every rank has all of W.
    None,
    /// Rows (out features).
    Column,
    /// Columns (in features).
    Row,
}

/// A linear's sizes and its place among the ranks.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// This rank's part of W.
    pub shard: Shard,
    /// Which dimension is shared out.
    pub parallel: Parallel,
    /// Whether tokens are shared out between the layers.
    pub sequence_parallel: bool,
    /// Column parallel without SP: whether dX is all-reduced here.
    pub reduce_dgrad: bool,
    /// Ranks that share W (1 for [`Parallel::None`]).
    pub ranks: usize,
    /// This rank among those that have the same shard of W and other tokens.
    pub replica: usize,
    /// How many these are.
    pub replicas: usize,
}

/// `a · b` where it fits 63 bits.
pub(crate) fn product(what: &str, factors: &[u64]) -> Result<u64> {
    let mut total: u64 = 1;
    for factor in factors {
        match total.checked_mul(*factor) {
            Some(p) if p <= i64::MAX as u64 => total = p,
            _ => bail!(FORGE_ERROR_OVERFLOW, "{what}: the product of {factors:?} overflows"),
        }
    }
    Ok(total)
}

impl Shape {
    /// Cuts W `[out, in]` for rank `rank` of `size`.
    pub fn new(
        out: u64,
        inn: u64,
        parallel: Parallel,
        sequence_parallel: bool,
        reduce_dgrad: bool,
        rank: usize,
        size: usize,
    ) -> Result<Self> {
        for (name, value) in [("out_features", out), ("in_features", inn)] {
            if value == 0 {
                bail!(FORGE_ERROR_SHAPE, "{name}: 0; a linear has at least one");
            }
        }
        // The largest array is fp32; its bytes must fit as well.
        product("out_features * in_features", &[out, inn, 8])?;
        if sequence_parallel && parallel == Parallel::None {
            bail!(
                FORGE_ERROR_UNSUPPORTED,
                "sequence_parallel: set for a linear that is not parallel; \
                 choose FORGE_PARALLEL_COLUMN or FORGE_PARALLEL_ROW"
            );
        }
        let ranks = if parallel == Parallel::None { 1 } else { size };
        let cut = |name: &str, value: u64| {
            if !value.is_multiple_of(ranks as u64) {
                bail!(
                    FORGE_ERROR_SHARD,
                    "{name}: {value} does not divide by {ranks} ranks; pad it to a multiple"
                );
            }
            Ok(value / ranks as u64)
        };
        let rank = rank as u64;
        let mut shard = Shard {
            rows: out as usize,
            cols: inn as usize,
            row_offset: 0,
            col_offset: 0,
            global_cols: inn,
        };
        match parallel {
            Parallel::None => {}
            Parallel::Column => {
                shard.rows = cut("out_features", out)? as usize;
                shard.row_offset = rank * shard.rows as u64;
            }
            Parallel::Row => {
                shard.cols = cut("in_features", inn)? as usize;
                shard.col_offset = rank * shard.cols as u64;
            }
        }
        let (replica, replicas) = (0, 1);
        Ok(Self { shard, parallel, sequence_parallel, reduce_dgrad, ranks, replica, replicas })
    }

    /// Refuses token counts whose products overflow.
    pub fn check_unsplit_tokens(&self, tokens: u64) -> Result<()> {
        let widest = self.shard.rows.max(self.shard.cols) as u64;
        let all = product("tokens of all data-parallel ranks", &[tokens, self.replicas as u64])?;
        product("tokens * features", &[all, widest, 8, 2]).map(|_| ())
    }

    /// As above, and those that ranks cannot share.
    pub fn check_tokens(&self, tokens: u64) -> Result<()> {
        self.check_unsplit_tokens(tokens)?;
        if self.sequence_parallel && !tokens.is_multiple_of(self.ranks as u64) {
            bail!(
                FORGE_ERROR_SHARD,
                "tokens: {tokens} does not divide by {} ranks, as sequence parallelism needs",
                self.ranks
            );
        }
        Ok(())
    }

    /// Tokens that this rank has between the layers.
    pub fn local_tokens(&self, tokens: usize) -> usize {
        if self.sequence_parallel { tokens / self.ranks } else { tokens }
    }

    /// Rows of dY as the backward receives it.
    pub fn dy_tokens(&self, tokens: usize) -> usize {
        if self.parallel == Parallel::Row { self.local_tokens(tokens) } else { tokens }
    }

    /// Rows of X and dX as the backward receives and leaves them.
    pub fn x_tokens(&self, tokens: usize) -> usize {
        if self.parallel == Parallel::Column { self.local_tokens(tokens) } else { tokens }
    }

    /// Width of the factor that SP gathers, and whether that is X.
    pub fn gathered_features(&self) -> Option<(usize, bool)> {
        match (self.sequence_parallel, self.parallel) {
            (true, Parallel::Column) => Some((self.shard.cols, true)),
            (true, Parallel::Row) => Some((self.shard.rows, false)),
            _ => None,
        }
    }

    /// Whether dX is reduce-scattered.
    pub fn scatters_dx(&self) -> bool {
        self.sequence_parallel && self.parallel == Parallel::Column
    }

    /// Whether dX is all-reduced.
    pub fn reduces_dx(&self) -> bool {
        self.parallel == Parallel::Column && !self.sequence_parallel && self.reduce_dgrad
    }

    /// Bytes of the gathered factor, rounded up so that what follows is aligned.
    pub fn gathered_bytes(&self, tokens: usize, dtype: Dtype) -> usize {
        let (features, _) = self.gathered_features().unwrap_or((0, false));
        (tokens * features * dtype.bytes()).next_multiple_of(256)
    }

    /// Bytes that a backward of this many tokens needs beside its buffers.
    pub fn workspace_bytes(&self, tokens: usize, dtype: Dtype) -> usize {
        let partial_dx =
            if self.scatters_dx() { tokens * self.shard.cols * dtype.bytes() } else { 0 };
        self.gathered_bytes(tokens, dtype) + partial_dx
    }
}

/// One array to allocate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArrayLayout {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// None where there is no such array.
    pub dtype: Option<Dtype>,
}

impl ArrayLayout {
    fn new(rows: usize, cols: usize, dtype: Option<Dtype>) -> Self {
        if dtype.is_some() { Self { rows, cols, dtype } } else { Self::default() }
    }

    /// Bytes of the array.
    pub fn bytes(&self) -> usize {
        self.rows * self.cols * self.dtype.map_or(0, Dtype::bytes)
    }
}

/// All arrays of a parameter's shard.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Model weight.
    pub weight: ArrayLayout,
    /// Master or lower halves.
    pub extra: ArrayLayout,
    /// States.
    pub states: [ArrayLayout; MAX_STATES],
    /// Scales of q8 states, `[ceil(cols/128), rows]`: those of a tile's column block are contiguous.
    pub scales: [ArrayLayout; MAX_STATES],
    /// Of the schedule `accumulate`.
    pub accumulator: ArrayLayout,
}

impl Layout {
    /// The arrays that a scheme needs: the weight of a shard, all else of the rows of it that are owned.
    pub fn new(scheme: &Scheme, shard: &Shard, owned: &Shard) -> Self {
        let (rows, cols) = (owned.rows, owned.cols);
        let mut states = [ArrayLayout::default(); MAX_STATES];
        let mut scales = states;
        for k in 0..scheme.n_states {
            let format = scheme.state_formats[k];
            states[k] = ArrayLayout::new(rows, cols, Some(format.dtype()));
            let dtype = format.has_scales().then_some(Dtype::F32);
            scales[k] = ArrayLayout::new(cols.div_ceil(BLOCK), rows, dtype);
        }
        Self {
            weight: ArrayLayout::new(shard.rows, cols, Some(scheme.weight_format.model_dtype())),
            extra: ArrayLayout::new(rows, cols, scheme.weight_format.extra_dtype()),
            states,
            scales,
            accumulator: ArrayLayout::new(rows, cols, Some(Dtype::F32)),
        }
    }
}
