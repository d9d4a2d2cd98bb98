//! Loads as weights: the whole of a layer is [`WHOLE`], whatever unit the loads came in.

/// The weight of a layer's experts together, roughly: rounding and the floor change it a little.
pub(super) const WHOLE: u64 = 1 << 40;

/// A cold expert weighs at least the mean over this: cold experts are spread too, they may not stay cold.
const FLOOR: u64 = 64;

/// The weights of one layer's experts, all positive. Loads that are all zero count as equal.
pub(super) fn weights(loads: &[u64]) -> Vec<u64> {
    let total: u128 = loads.iter().map(|&load| u128::from(load)).sum();
    let mean = WHOLE / loads.len().max(1) as u64;
    let weigh = |&load: &u64| match (u128::from(load) * u128::from(WHOLE)).checked_div(total) {
        None => mean.max(1),
        Some(weight) => (weight as u64).max(mean / FLOOR).max(1),
    };
    loads.iter().map(weigh).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_do_not_depend_on_the_unit_and_are_never_zero() {
        assert_eq!(weights(&[1, 3]), [WHOLE / 4, WHOLE / 4 * 3]);
        assert_eq!(weights(&[u64::MAX, u64::MAX]), [WHOLE / 2, WHOLE / 2]);
        assert_eq!(weights(&[0, 0]), [WHOLE / 2, WHOLE / 2]);
        assert_eq!(weights(&[0, 9]), [WHOLE / 2 / FLOOR, WHOLE]);
    }
}
