//! `c += a · bᵀ` in fp32 on one thread, each element with one accumulator: it starts as what `c` holds
//! and takes the terms in order, each by one fused multiply-add.
//!
//! That is what kernels/exact.cu does, so that CPU and GPU give the same bits, on every machine and for
//! every way to cut a matrix into tiles or a sum into calls. GEMM libraries sum a block of terms apart
//! and add it to `c`, in blocks of their own choice, which is why this is not one of them.
//!
//! The blocking is the usual one (Goto & van de Geijn, "Anatomy of high-performance matrix
//! multiplication", 2008): operands are packed into panels as wide as the registers' block, a panel of
//! `b` stays in L1 and a block of `a` in L2.

use super::gemm::Operand;
use std::cell::RefCell;

/// Terms that are packed at once.
const DEPTH: usize = 256;

/// `c[m, n] += a · bᵀ` over `depth` terms; `c` row-major, rows `c_stride` apart.
///
/// # Safety
/// The operands and `c` are valid for these sizes and strides.
pub unsafe fn sgemm(size: [usize; 3], a: Operand, b: Operand, c: *mut f32, c_stride: usize) {
    thread_local! {
        /// Of packed operands; kept, since the next call wants as much.
        static PACKED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    PACKED.with_borrow_mut(|packed| {
        // SAFETY: as promised by the caller; features are detected before they are used.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            {
                if super::isa::has_avx512() {
                    return x86::avx512(size, a, b, c, c_stride, packed);
                }
                if std::arch::is_x86_feature_detected!("avx2")
                    && std::arch::is_x86_feature_detected!("fma")
                {
                    return x86::avx2(size, a, b, c, c_stride, packed);
                }
            }
            blocked::<[f32; 4], 4, 2>(size, a, b, c, c_stride, packed);
        }
    });
}

/// A register of fp32 numbers.
trait Vector: Copy {
    const LANES: usize;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// `a · b + self`, rounded once.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
}

impl Vector for [f32; 4] {
    const LANES: usize = 4;
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        [value; 4]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: as promised by the caller.
        unsafe { from.cast::<Self>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as promised by the caller.
        unsafe { to.cast::<Self>().write_unaligned(self) }
    }
    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        std::array::from_fn(|i| a[i].mul_add(b[i], self[i]))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Operand, Vector, blocked};
    use std::arch::x86_64::*;

    macro_rules! vector {
        ($type:ty, $lanes:literal, $splat:ident, $load:ident, $store:ident, $fma:ident) => {
            impl Vector for $type {
                const LANES: usize = $lanes;
                #[inline(always)]
                unsafe fn splat(value: f32) -> Self {
                    // SAFETY: the caller runs with the features of this type.
                    unsafe { $splat(value) }
                }
                #[inline(always)]
                unsafe fn load(from: *const f32) -> Self {
                    // SAFETY: as above; the memory is the caller's promise.
                    unsafe { $load(from) }
                }
                #[inline(always)]
                unsafe fn store(self, to: *mut f32) {
                    // SAFETY: as above.
                    unsafe { $store(to, self) }
                }
                #[inline(always)]
                unsafe fn add_product(self, a: Self, b: Self) -> Self {
                    // SAFETY: as above.
                    unsafe { $fma(a, b, self) }
                }
            }
        };
    }
    vector!(__m512, 16, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_fmadd_ps);
    vector!(__m256, 8, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_fmadd_ps);

    macro_rules! compiled_for {
        ($name:ident, $features:literal, $vector:ty, $rows:literal) => {
            #[target_feature(enable = $features)]
            pub unsafe fn $name(
                size: [usize; 3],
                a: Operand,
                b: Operand,
                c: *mut f32,
                c_stride: usize,
                packed: &mut Vec<f32>,
            ) {
                // SAFETY: as promised by the caller.
                unsafe { blocked::<$vector, $rows, 2>(size, a, b, c, c_stride, packed) }
            }
        };
    }
    // 24 of 32 registers are accumulators, and 12 of 16.
    compiled_for!(avx512, "avx512f", __m512, 12);
    compiled_for!(avx2, "avx2,fma", __m256, 6);
}

/// Packs terms `first..first + depth` of `rows` rows into panels of `width` rows: term after term, the
/// rows of a panel beside each other, zeros where there is no row.
#[inline(always)]
unsafe fn pack(
    operand: Operand,
    rows: usize,
    first: usize,
    depth: usize,
    width: usize,
    out: &mut [f32],
) {
    for (panel, out) in (0..rows).step_by(width).zip(out.chunks_exact_mut(width * depth)) {
        let present = width.min(rows - panel);
        // SAFETY: the caller vouches for these rows and terms.
        unsafe {
            let from = operand.data.add(panel * operand.row + first * operand.depth);
            for (term, out) in out.chunks_exact_mut(width).enumerate() {
                let from = from.add(term * operand.depth);
                if operand.row == 1 {
                    out[..present].copy_from_slice(std::slice::from_raw_parts(from, present));
                } else {
                    for (row, out) in out[..present].iter_mut().enumerate() {
                        *out = *from.add(row * operand.row);
                    }
                }
                out[present..].fill(0.0);
            }
        }
    }
}

/// The product with blocks of `R` rows by `N` registers.
#[inline(always)]
unsafe fn blocked<V: Vector, const R: usize, const N: usize>(
    [m, n, depth]: [usize; 3],
    a: Operand,
    b: Operand,
    c: *mut f32,
    c_stride: usize,
    packed: &mut Vec<f32>,
) {
    let width = N * V::LANES;
    let (a_len, b_len) = (m.next_multiple_of(R) * DEPTH, n.next_multiple_of(width) * DEPTH);
    if packed.len() < a_len + b_len {
        packed.resize(a_len + b_len, 0.0);
    }
    let (pa, pb) = packed.split_at_mut(a_len);
    // At the edges blocks are whole in here, and only what exists goes to `c`.
    let mut edge = [0.0f32; 32 * 32];
    debug_assert!(R * width <= edge.len());
    for first in (0..depth).step_by(DEPTH) {
        let terms = DEPTH.min(depth - first);
        // SAFETY: as promised by the caller; blocks lie within packed operands, `c` or `edge`.
        unsafe {
            pack(a, m, first, terms, R, pa);
            pack(b, n, first, terms, width, pb);
            for col in (0..n).step_by(width) {
                let b_panel = pb.as_ptr().add(col * terms);
                for row in (0..m).step_by(R) {
                    let a_panel = pa.as_ptr().add(row * terms);
                    let at = c.add(row * c_stride + col);
                    let (rows, cols) = (R.min(m - row), width.min(n - col));
                    if (rows, cols) == (R, width) {
                        block::<V, R, N>(terms, a_panel, b_panel, at, c_stride);
                        continue;
                    }
                    for i in 0..rows {
                        let from = std::slice::from_raw_parts(at.add(i * c_stride), cols);
                        edge[i * width..][..cols].copy_from_slice(from);
                    }
                    block::<V, R, N>(terms, a_panel, b_panel, edge.as_mut_ptr(), width);
                    for i in 0..rows {
                        let to = std::slice::from_raw_parts_mut(at.add(i * c_stride), cols);
                        to.copy_from_slice(&edge[i * width..][..cols]);
                    }
                }
            }
        }
    }
}

/// A block of `c` through the registers.
#[inline(always)]
unsafe fn block<V: Vector, const R: usize, const N: usize>(
    terms: usize,
    mut a: *const f32,
    mut b: *const f32,
    c: *mut f32,
    c_stride: usize,
) {
    // SAFETY: as promised by the caller.
    unsafe {
        let at = |i: usize, j: usize| c.add(i * c_stride + j * V::LANES);
        let mut sums = [[V::splat(0.0); N]; R];
        for (i, row) in sums.iter_mut().enumerate() {
            for (j, sum) in row.iter_mut().enumerate() {
                *sum = V::load(at(i, j));
            }
        }
        for _ in 0..terms {
            let mut right = [V::splat(0.0); N];
            for (j, right) in right.iter_mut().enumerate() {
                *right = V::load(b.add(j * V::LANES));
            }
            for (i, row) in sums.iter_mut().enumerate() {
                let left = V::splat(*a.add(i));
                for (sum, right) in row.iter_mut().zip(right) {
                    *sum = sum.add_product(left, right);
                }
            }
            a = a.add(R);
            b = b.add(N * V::LANES);
        }
        for (i, row) in sums.into_iter().enumerate() {
            for (j, sum) in row.into_iter().enumerate() {
                sum.store(at(i, j));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut state = u64::from(seed) | 1;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    /// The definition, in any layout of the operands.
    fn check(m: usize, n: usize, depth: usize, along: [bool; 2], split: usize, seed: u32) {
        let (a, b) = (numbers(m * depth, seed), numbers(n * depth, seed + 1));
        let operand = |data: &[f32], rows: usize, along: bool| Operand {
            data: data.as_ptr(),
            row: if along { depth } else { 1 },
            depth: if along { 1 } else { rows },
        };
        let (left, right) = (operand(&a, m, along[0]), operand(&b, n, along[1]));
        let stride = n + 3;
        let start = numbers(m * stride, seed + 2);
        let mut c = start.clone();
        let later = |o: Operand| Operand { data: o.data.wrapping_add(split * o.depth), ..o };
        // SAFETY: sizes and strides are those of the vectors.
        unsafe {
            sgemm([m, n, split], left, right, c.as_mut_ptr(), stride);
            let rest = depth - split;
            sgemm([m, n, rest], later(left), later(right), c.as_mut_ptr(), stride);
        }
        for i in 0..m {
            for j in 0..stride {
                let mut sum = start[i * stride + j];
                for k in 0..if j < n { depth } else { 0 } {
                    let at = |o: Operand, row: usize| row * o.row + k * o.depth;
                    sum = a[at(left, i)].mul_add(b[at(right, j)], sum);
                }
                assert_eq!(c[i * stride + j].to_bits(), sum.to_bits(), "({i}, {j})");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_element_is_a_chain_of_fused_multiply_adds(
            m in 1usize..40, n in 1usize..80, depth in 0usize..600, left: bool, right: bool,
            split in 0usize..600, seed in 0u32..1000,
        ) {
            check(m, n, depth, [left, right], split.min(depth), seed);
        }
    }

    #[test]
    fn so_it_is_without_special_instructions() {
        let (m, n, depth) = (5, 9, 300);
        let (a, b) = (numbers(m * depth, 1), numbers(n * depth, 2));
        let left = Operand { data: a.as_ptr(), row: 1, depth: m };
        let right = Operand { data: b.as_ptr(), row: 1, depth: n };
        let (mut c, mut d) = (vec![0.5f32; m * n], vec![0.5f32; m * n]);
        // SAFETY: sizes and strides are those of the vectors.
        unsafe {
            sgemm([m, n, depth], left, right, c.as_mut_ptr(), n);
            let mut packed = Vec::new();
            let size = [m, n, depth];
            blocked::<[f32; 4], 4, 2>(size, left, right, d.as_mut_ptr(), n, &mut packed);
        }
        assert_eq!(c, d);
    }
}
