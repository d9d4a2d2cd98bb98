//! The exponential function, so written that a compiler computes several at once.

use crate::wide::wide;

/// Below this e^x is taken for 0.
const LEAST: f32 = -86.6;
/// Above this e^x is taken for infinity.
const MOST: f32 = 88.7;
/// Added to a small number it leaves its nearest integer in the lowest bits.
const SHIFT: f32 = 12_582_912.0;
/// ln 2 in two parts, so that multiples of it can be subtracted exactly.
const LN_2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);

/// e^x within three units in the last place; the same bits whatever the instruction set. Exactly 1 at 0, 0 below -86.6, infinity
/// above 88.7, and NaN for NaN.
///
/// Source: `expf` of the Cephes library, S. Moshier.
#[expect(clippy::inline_always, reason = "it is compiled for the registers of the loop it stands in")]
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let shifted = x.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = n.mul_add(-LN_2.1, n.mul_add(-LN_2.0, x));
    let mut p = 1.987_569_1e-4_f32;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p.mul_add(r, coefficient);
    }
    let p = (r * r).mul_add(p, r) + 1.0;
    // 2^(n - 1), as its bits; the other half of the factor keeps the largest results finite.
    let exponent = shifted.to_bits().wrapping_sub(SHIFT.to_bits()).wrapping_add(126) << 23;
    let result = p * f32::from_bits(exponent) * 2.0;
    let result = if x < LEAST { 0.0 } else { result };
    let result = if x > MOST { f32::INFINITY } else { result };
    if x.is_nan() { x } else { result }
}

wide! {
    /// Replaces each of `values` by e^((value - max) / scale), within a few units in the last place.
    pub fn exp_relative(values: &mut [f32], max: f32, scale: f32) = relative
}

#[expect(clippy::inline_always, reason = "compiled once per instruction set, inside the caller that enables it")]
#[inline(always)]
fn relative(values: &mut [f32], max: f32, scale: f32) {
    for x in values {
        *x = exp((*x - max) / scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_known_function_within_three_units_in_the_last_place() {
        let mut furthest = 0;
        for i in -865_000..887_000_i32 {
            let x = i as f32 * 1e-4;
            let (got, want) = (exp(x), f64::from(x).exp() as f32);
            furthest = furthest.max(got.to_bits().abs_diff(want.to_bits()));
        }
        assert!(furthest <= 3, "{furthest}");
    }

    #[test]
    fn the_ends_are_exact() {
        assert_eq!(exp(0.0).to_bits(), 1.0_f32.to_bits());
        for x in [-86.7, -100.0, -1e30, f32::NEG_INFINITY] {
            assert_eq!(exp(x).to_bits(), 0);
        }
        assert!(exp(88.0).is_finite() && exp(88.8).is_infinite() && exp(f32::INFINITY).is_infinite());
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn several_at_once_are_what_each_is_alone() {
        let values: Vec<f32> = (0..1003).map(|i| (i as f32 * 12.9898).sin() * 90.0).collect();
        let mut together = values.clone();
        exp_relative(&mut together, 3.0, 0.7);
        let alone = |x: f32| exp((x - 3.0) / 0.7).to_bits();
        assert!(together.iter().zip(&values).all(|(got, x)| got.to_bits() == alone(*x)));
    }
}
