//! `‖dW‖²` from Gram matrices: `‖dYᵀX‖² = Σ_ab (XXᵀ)_ab (dYdYᵀ)_ab`, block by block of tokens.

use super::super::{Factors, Matrix, Shard};
use super::gemm::{Operand, rows_as_f32, terms_per_call};
use super::scratch::Scratch;
use super::sgemm::sgemm;
use crate::format::Dtype;

/// Tokens of a block of the Gram matrices.
pub const TOKENS: usize = 256;

/// A block of tokens: which segment, where, how many.
#[derive(Clone, Copy)]
pub struct Block {
    segment: usize,
    first: usize,
    tokens: usize,
}

/// All tokens in blocks.
pub fn blocks(factors: &[Factors]) -> Vec<Block> {
    let mut out = Vec::new();
    for (segment, f) in factors.iter().enumerate() {
        for first in (0..f.tokens).step_by(TOKENS) {
            out.push(Block { segment, first, tokens: TOKENS.min(f.tokens - first) });
        }
    }
    out
}

/// What a pair of blocks adds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Partial {
    /// Σ of the products.
    pub sum: f64,
    /// Σ of their magnitudes: how much cancels.
    pub magnitude: f64,
    /// Σ_t ‖dY_t‖‖X_t‖, from the diagonal: no entry or partial sum of dW exceeds it.
    pub entry_bound: f64,
}

impl Partial {
    /// Adds another pair's.
    pub fn add(self, other: Self) -> Self {
        Self {
            sum: self.sum + other.sum,
            magnitude: self.magnitude + other.magnitude,
            entry_bound: self.entry_bound + other.entry_bound,
        }
    }

    /// Whether fp32 products kept enough digits: their rounding errors, a few 2⁻²⁴ of the
    /// magnitudes, must be below 1e-5 of the sum with room to spare, and nothing in dW itself may
    /// come near overflow.
    pub fn is_accurate(&self) -> bool {
        self.magnitude <= MOST_CANCELLATION * self.sum && self.entry_bound < 1e37
    }
}

/// Largest Σ|products| / Σ products that a Gram norm may have. Factors of independent tokens stay
/// near `1 + tokens/√(in·out)`.
pub const MOST_CANCELLATION: f64 = 8.0;

/// The contribution of the pair `(a, b)` of blocks, twice off the diagonal.
///
/// # Safety
/// The factors are valid for the shard.
pub unsafe fn pair(
    dtype: Dtype,
    shard: &Shard,
    factors: &[Factors],
    a: Block,
    b: Block,
    same: bool,
    scratch: &mut Scratch,
) -> Partial {
    let Scratch { tile, left, right } = scratch;
    let area = a.tokens * b.tokens;
    tile.clear();
    tile.resize(2 * area, 0.0);
    let (gram_x, gram_dy) = tile.split_at_mut(area);
    let mut gram = |left_m: Matrix, right_m: Matrix, width: usize, out: &mut [f32]| {
        let terms = terms_per_call(&[dtype], width);
        for first in (0..width).step_by(terms) {
            let depth = terms.min(width - first);
            // SAFETY: the blocks' rows and `width` columns are valid.
            unsafe {
                let (p, p_stride) =
                    rows_as_f32(dtype, left_m, a.first, a.tokens, first, depth, left);
                let (q, q_stride) =
                    rows_as_f32(dtype, right_m, b.first, b.tokens, first, depth, right);
                let p = Operand { data: p, row: p_stride, depth: 1 };
                let q = Operand { data: q, row: q_stride, depth: 1 };
                sgemm([a.tokens, b.tokens, depth], p, q, out.as_mut_ptr(), b.tokens);
            }
        }
    };
    let (fa, fb) = (&factors[a.segment], &factors[b.segment]);
    gram(fa.x, fb.x, shard.cols, gram_x);
    gram(fa.dy, fb.dy, shard.rows, gram_dy);
    let mut partial = Partial::default();
    for (p, q) in gram_x.iter().zip(gram_dy.iter()) {
        let product = f64::from(*p) * f64::from(*q);
        partial.sum += product;
        partial.magnitude += product.abs();
    }
    if same {
        for t in 0..a.tokens {
            let at = t * b.tokens + t;
            partial.entry_bound += (f64::from(gram_x[at]) * f64::from(gram_dy[at])).sqrt();
        }
    } else {
        partial.sum *= 2.0;
        partial.magnitude *= 2.0;
    }
    partial
}
