//! 8-bit optimizer states: blocks of 1×128 along `in`, one fp32 scale each.
//!
//! Both codes spend their 8 bits on square roots, so that small entries of a block keep relative
//! precision beside a large one (the companding idea of block-wise 8-bit optimizers, Dettmers et al.,
//! arXiv 2110.02861, with a square-root law in place of a table):
//!
//! - first moments, signed: `x = sign(c) · (|c|/127)² · scale`, `scale = max |x|`, stored as `c + 128`;
//! - second moments, non-negative: `v = (c/255 · scale)²`, `scale = max √v`. A non-zero `v` never gets
//!   code 0: a denominator may be over-, never under-estimated to nothing.
//!
//! Bounds, nearest rounding (twice that for stochastic), for `r = √(|x|/scale)`:
//! `|x' − x| ≤ scale · (r/127 + 1/(4·127²))`; `|√v' − √v| ≤ scale/510`, or `scale/255` for code 1.

use super::{BLOCK, DrawSource};

const SIGNED_LEVELS: f32 = 127.0;
const UNSIGNED_LEVELS: f32 = 255.0;
/// Below this a division by the scale would lose bits; blocks are lifted by an exact power of two.
const TINY: f32 = 1e-30;
const LIFT: f32 = 1.844_674_4e19; // 2^64

/// The largest magnitude. An infinite one (a second moment that overflowed) counts as the largest
/// finite, so that its block's other elements stay numbers: 0 · ∞ would be NaN.
#[inline(always)]
fn maximum(values: &[f32]) -> f32 {
    values.iter().fold(0.0f32, |m, v| m.max(v.abs())).min(f32::MAX)
}

/// `position` on the code's scale to an integer: nearest, ties away from zero, or by the draw.
#[inline(always)]
fn quantise(position: f32, draw: u16, stochastic: bool) -> f32 {
    let floor_of_drawn = (position + f32::from(draw) * (1.0 / 65536.0)).floor();
    let rounded = (position.abs() + 0.5).floor().copysign(position);
    if stochastic { floor_of_drawn } else { rounded }
}

/// Encodes one block of signed values; returns the scale.
#[inline(always)]
pub fn encode_signed(values: &[f32], codes: &mut [u8], source: DrawSource) -> f32 {
    let mut draws = [0u16; BLOCK];
    let stochastic = source.fill(&mut draws[..values.len()]);
    let scale = maximum(values);
    let lift = if scale < TINY { LIFT } else { 1.0 };
    let divisor = if scale > 0.0 { scale * lift } else { 1.0 };
    for ((code, value), draw) in codes.iter_mut().zip(values).zip(draws) {
        let root = (value.abs().min(f32::MAX) * lift / divisor).sqrt();
        let position = (SIGNED_LEVELS * root).copysign(*value);
        let level = quantise(position, draw, stochastic).clamp(-SIGNED_LEVELS, SIGNED_LEVELS);
        *code = (128.0 + level) as u8;
    }
    scale
}

/// Decodes one block of signed values.
#[inline(always)]
pub fn decode_signed(codes: &[u8], scale: f32, out: &mut [f32]) {
    for (value, code) in out.iter_mut().zip(codes) {
        let level = (f32::from(*code) - 128.0) * (1.0 / SIGNED_LEVELS);
        // level² · scale, with level multiplied last so that a denormal scale is not squared away.
        *value = scale * level * level.abs();
    }
}

/// Encodes one block of non-negative values; returns the scale, in units of √value.
#[inline(always)]
pub fn encode_square(values: &[f32], codes: &mut [u8], source: DrawSource) -> f32 {
    let mut draws = [0u16; BLOCK];
    let stochastic = source.fill(&mut draws[..values.len()]);
    let scale = maximum(values).sqrt();
    let divisor = if scale > 0.0 { scale } else { 1.0 };
    for ((code, value), draw) in codes.iter_mut().zip(values).zip(draws) {
        let position = UNSIGNED_LEVELS * (value.min(f32::MAX).sqrt() / divisor);
        let least = if *value > 0.0 { 1.0 } else { 0.0 };
        *code = quantise(position, draw, stochastic).clamp(least, UNSIGNED_LEVELS) as u8;
    }
    scale
}

/// Decodes one block of non-negative values.
#[inline(always)]
pub fn decode_square(codes: &[u8], scale: f32, out: &mut [f32]) {
    for (value, code) in out.iter_mut().zip(codes) {
        let root = scale * (f32::from(*code) * (1.0 / UNSIGNED_LEVELS));
        *value = root * root;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block() -> impl Strategy<Value = Vec<f32>> {
        let element = prop_oneof![
            Just(0.0f32),
            -1.0f32..1.0,
            (-40i32..38, -1.0f32..1.0).prop_map(|(e, m)| m * 10f32.powi(e)),
            Just(f32::MIN_POSITIVE / 8.0),
            Just(f32::from_bits(1)),
            Just(1e37f32),
        ];
        prop::collection::vec(element, 1..=BLOCK)
    }

    proptest! {
        #[test]
        fn signed_error_is_bounded(values in block()) {
            let mut codes = vec![0u8; values.len()];
            let scale = encode_signed(&values, &mut codes, DrawSource::nearest());
            let mut decoded = vec![0f32; values.len()];
            decode_signed(&codes, scale, &mut decoded);
            for (x, y) in values.iter().zip(&decoded) {
                let (x, y, s) = (f64::from(*x), f64::from(*y), f64::from(scale));
                let r = if s > 0.0 { (x.abs() / s).sqrt() } else { 0.0 };
                let bound = s * (r / 127.0 + 0.25 / (127.0 * 127.0)) * (1.0 + 1e-5) + 3e-45;
                prop_assert!((x - y).abs() <= bound, "{x} -> {y}, scale {s}");
            }
        }

        #[test]
        fn square_error_is_bounded(values in block()) {
            let values: Vec<f32> = values.iter().map(|v| v.abs()).collect();
            let mut codes = vec![0u8; values.len()];
            let scale = encode_square(&values, &mut codes, DrawSource::nearest());
            let mut decoded = vec![0f32; values.len()];
            decode_square(&codes, scale, &mut decoded);
            for ((v, w), code) in values.iter().zip(&decoded).zip(&codes) {
                prop_assert!(w.is_finite());
                prop_assert_eq!(*v == 0.0, *code == 0);
                let (a, s) = (f64::from(*v).sqrt(), f64::from(scale));
                // w itself may underflow fp32 (√v' does not): bound the root from the code.
                let root = s * f64::from(*code) / 255.0;
                let bound = if *code == 1 { s / 255.0 } else { s / 510.0 };
                prop_assert!((root - a).abs() <= bound * (1.0 + 1e-5), "{a} {root} {s}");
            }
        }

        #[test]
        fn encoding_a_decoded_block_changes_nothing(values in block()) {
            let mut codes = vec![0u8; values.len()];
            let scale = encode_signed(&values, &mut codes, DrawSource::nearest());
            prop_assume!(scale == 0.0 || scale > 1e-30);
            let mut decoded = vec![0f32; values.len()];
            decode_signed(&codes, scale, &mut decoded);
            let mut again = vec![0u8; values.len()];
            prop_assert_eq!(encode_signed(&decoded, &mut again, DrawSource::nearest()), scale);
            // 127 and 129 around zero both decode to tiny numbers; equal codes all the same.
            prop_assert_eq!(again, codes);
        }
    }

    #[test]
    fn an_overflowed_element_leaves_numbers() {
        let values = [f32::INFINITY, f32::MAX, 1.0, 0.0];
        let (mut codes, mut out) = ([0u8; 4], [0f32; 4]);
        let scale = encode_square(&values, &mut codes, DrawSource::nearest());
        decode_square(&codes, scale, &mut out);
        assert!(out.iter().all(|v| !v.is_nan()) && out[3] == 0.0, "{out:?}");
        let values = [f32::NEG_INFINITY, f32::MAX, 1.0, 0.0];
        let scale = encode_signed(&values, &mut codes, DrawSource::nearest());
        decode_signed(&codes, scale, &mut out);
        assert!(out.iter().all(|v| v.is_finite()) && out[0] < 0.0, "{out:?}");
    }

    #[test]
    fn a_zero_block_is_zero() {
        let mut codes = [7u8; 4];
        assert_eq!(encode_signed(&[0.0; 4], &mut codes, DrawSource::nearest()), 0.0);
        assert_eq!(codes, [128; 4]);
        let mut out = [1f32; 4];
        decode_signed(&codes, 0.0, &mut out);
        assert_eq!(out, [0.0; 4]);
        assert_eq!(encode_square(&[0.0; 4], &mut codes, DrawSource::nearest()), 0.0);
        decode_square(&codes, 0.0, &mut out);
        assert_eq!(out, [0.0; 4]);
    }
}
