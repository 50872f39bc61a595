//! bfloat16 as the upper 16 bits of an fp32, and the roundings into it.

/// Exponent all ones, mantissa zero.
const INFINITY: u32 = 0x7F80_0000;
/// The largest finite bf16, as fp32 bits.
const MAX_FINITE: u32 = 0x7F7F_0000;

/// bf16 to fp32, exact.
#[inline(always)]
pub fn widen(source: &[u16], out: &mut [f32]) {
    for (value, bits) in out.iter_mut().zip(source) {
        *value = f32::from_bits(u32::from(*bits) << 16);
    }
}

/// Nearest, ties to even; overflow goes to infinity and NaN stays NaN, as IEEE 754 has it.
#[inline(always)]
pub fn nearest(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
    let quiet_nan = (bits >> 16) | 0x0040;
    (if bits & 0x7FFF_FFFF > INFINITY { quiet_nan } else { rounded }) as u16
}

/// Up in magnitude with probability (lower 16 bits) / 65536, else down: the mean of many draws is the
/// value. A finite value never becomes infinite: past the largest finite bf16 it stays there.
#[inline(always)]
pub fn stochastic(value: f32, draw: u16) -> u16 {
    let bits = value.to_bits();
    let magnitude = bits & 0x7FFF_FFFF;
    let finite = (magnitude + u32::from(draw)).min(MAX_FINITE | 0xFFFF) >> 16;
    let quiet_nan = (magnitude >> 16) | 0x0040;
    let special = if magnitude > INFINITY { quiet_nan } else { INFINITY >> 16 };
    let rounded = if magnitude >= INFINITY { special } else { finite };
    (rounded | (bits >> 31 << 15)) as u16
}

/// fp32 to bf16, nearest.
#[inline(always)]
pub fn narrow_nearest(source: &[f32], out: &mut [u16]) {
    for (bits, value) in out.iter_mut().zip(source) {
        *bits = nearest(*value);
    }
}

/// fp32 to bf16, stochastic, one draw for each element.
#[inline(always)]
pub fn narrow_stochastic(source: &[f32], draws: &[u16], out: &mut [u16]) {
    for ((bits, value), draw) in out.iter_mut().zip(source).zip(draws) {
        *bits = stochastic(*value, *draw);
    }
}

/// Splits an fp32 into a bf16 and the 16 bits below it: `(upper, lower)` with
/// `upper = bits >> 16, plus one where lower >= 0x8000`.
///
/// The bf16 is the fp32 rounded to nearest, ties away from zero. Ties to even cannot be had: an even
/// bf16 would be the image of 65,537 fp32 values, one more than 16 bits can tell apart.
#[inline(always)]
pub fn split(value: f32) -> (u16, u16) {
    let bits = value.to_bits();
    let lower = bits as u16;
    let upper = (bits >> 16) as u16;
    (upper.wrapping_add(lower >> 15), lower)
}

/// The inverse of [`split`], exact for every bit pattern.
#[inline(always)]
pub fn join(upper: u16, lower: u16) -> f32 {
    let top = upper.wrapping_sub(lower >> 15);
    f32::from_bits(u32::from(top) << 16 | u32::from(lower))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn neighbours(value: f32) -> [u16; 2] {
        let down = (value.to_bits() >> 16) as u16;
        [down, down.wrapping_add(1)]
    }

    proptest! {
        #[test]
        fn split_and_join_are_inverse(bits: u32) {
            let (upper, lower) = split(f32::from_bits(bits));
            prop_assert_eq!(join(upper, lower).to_bits(), bits);
        }

        #[test]
        fn nearest_is_the_half_crates(bits: u32) {
            let value = f32::from_bits(bits);
            prop_assert_eq!(nearest(value), half::bf16::from_f32(value).to_bits());
        }

        #[test]
        fn stochastic_gives_a_neighbour(bits: u32, draw: u16) {
            let value = f32::from_bits(bits);
            let stored = stochastic(value, draw);
            let widened = f32::from_bits(u32::from(stored) << 16);
            if value.is_nan() {
                prop_assert!(widened.is_nan());
            } else if value.is_infinite() {
                prop_assert_eq!(widened, value);
            } else if bits & 0xFFFF == 0 {
                prop_assert_eq!(widened.to_bits(), bits);
            } else {
                prop_assert!(neighbours(value).contains(&stored));
                prop_assert!(widened.is_finite());
            }
        }

        #[test]
        fn upper_half_is_within_half_an_ulp(bits: u32) {
            let value = f32::from_bits(bits);
            prop_assume!(value.is_finite() && value.abs() < 3.3e38);
            let upper = f32::from_bits(u32::from(split(value).0) << 16);
            let [down, up] = neighbours(value).map(|b| f32::from_bits(u32::from(b) << 16));
            prop_assert!((upper - value).abs() <= (up - down).abs() / 2.0);
        }
    }

    #[test]
    fn every_draw_once_is_exactly_unbiased() {
        for value in [1.0f32, 1.001, -3.25159, 1e-40, 6.5e-39, 0.1, -65504.3] {
            let mean = (0..=u16::MAX)
                .map(|draw| f64::from(f32::from_bits(u32::from(stochastic(value, draw)) << 16)))
                .sum::<f64>()
                / 65536.0;
            assert!((mean - f64::from(value)).abs() <= f64::from(value.abs()) * 1e-12, "{value}");
        }
    }

    #[test]
    fn the_largest_values_stay_finite() {
        assert_eq!(stochastic(f32::MAX, u16::MAX), 0x7F7F);
        assert_eq!(stochastic(-f32::MAX, u16::MAX), 0xFF7F);
        assert_eq!(stochastic(f32::INFINITY, u16::MAX), 0x7F80);
        assert_eq!(nearest(f32::MAX), 0x7F80);
    }
}
