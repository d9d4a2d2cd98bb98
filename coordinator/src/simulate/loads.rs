//! Loads of experts: where they start and how they change.

use std::str::FromStr;

use super::random::Random;
use crate::plan::Shape;

/// What a layer's experts are asked for together, roughly.
const LAYER: f64 = 1e9;

/// Where loads come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Loads {
    /// The r-th hottest expert of a layer has the load r^-exponent; which one it is differs by layer.
    Zipf {
        /// How skewed: 0 is uniform, 1 is strong.
        exponent: f64,
    },
    /// All experts are asked for equally.
    Uniform,
    /// What the bundled demo model asked for on texts in one language, [4 layers, 8 experts]. Larger shapes repeat it: expert
    /// `e` of layer `l` has the load of expert `e % 8` of layer `l % 4`, from the second repetition on times a random factor
    /// between 1/2 and 3/2, so that no two experts are the same.
    Measured {
        /// The language of the texts.
        language: Language,
    },
    /// Numbers for every expert of every layer.
    Given {
        /// `layers[l][e]`
        layers: Vec<Vec<u64>>,
    },
}

/// A language that the demo model was measured in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Language {
    /// English.
    En,
    /// French.
    Fr,
    /// German.
    De,
    /// Spanish.
    Es,
    /// Italian.
    It,
}

/// What is wrong with the name of loads.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseLoadsError {
    /// No source has this name.
    #[error("loads are zipf:EXPONENT, uniform or measured:LANGUAGE, not {0:?}")]
    Unknown(String),
    /// The exponent is no number in range.
    #[error("the exponent of zipf is a number from 0 to 4, not {0:?}")]
    Exponent(String),
    /// The demo model was not measured in this language.
    #[error("the demo model was measured in en, fr, de, es and it, not {0:?}")]
    Language(String),
    /// The numbers are for another shape.
    #[error("loads are for {layers} layers of {experts} experts, the shape has {shape_layers} of {shape_experts}")]
    Shape {
        /// Layers that have loads.
        layers: usize,
        /// Experts that have loads, in the first layer that differs.
        experts: usize,
        /// Layers of the shape.
        shape_layers: usize,
        /// Experts of each layer of the shape.
        shape_experts: usize,
    },
}

impl FromStr for Language {
    type Err = ParseLoadsError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let languages = [("en", Self::En), ("fr", Self::Fr), ("de", Self::De), ("es", Self::Es), ("it", Self::It)];
        let found = languages.into_iter().find(|(name, _)| *name == text);
        found.map(|(_, language)| language).ok_or_else(|| ParseLoadsError::Language(text.into()))
    }
}

impl FromStr for Loads {
    type Err = ParseLoadsError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "uniform" => Ok(Self::Uniform),
            Some(("zipf", exponent)) => match exponent.parse() {
                Ok(number) if (0.0..=4.0).contains(&number) => Ok(Self::Zipf { exponent: number }),
                _ => Err(ParseLoadsError::Exponent(exponent.into())),
            },
            Some(("measured", language)) => Ok(Self::Measured { language: language.parse()? }),
            _ => Err(ParseLoadsError::Unknown(text.into())),
        }
    }
}

/// Loads to start with, [layers * experts]. Errors: `Shape` when given numbers are for another shape.
pub fn first(loads: &Loads, shape: Shape, seed: u64) -> Result<Vec<u64>, ParseLoadsError> {
    let mut random = Random::new(seed);
    let Shape { layers, experts, .. } = shape;
    Ok(match loads {
        Loads::Uniform => vec![(LAYER / experts as f64) as u64; shape.total()],
        Loads::Zipf { exponent } => {
            let whole: f64 = (1..=experts).map(|rank| (rank as f64).powf(-exponent)).sum();
            let ranked = (1..=experts).map(|rank| ((rank as f64).powf(-exponent) / whole * LAYER) as u64);
            let ranked: Vec<u64> = ranked.collect();
            reshuffled(&ranked.repeat(layers), experts, random.next())
        }
        Loads::Measured { language } => {
            let measured = &MEASURED[*language as usize];
            let factor = |expert: usize, random: &mut Random| if expert < 8 { 1.0 } else { 0.5 + random.unit() };
            let load = |index: usize| {
                let (layer, expert) = (index / experts, index % experts);
                (f64::from(measured[layer % 4][expert % 8]) * 1000.0 * factor(expert, &mut random)) as u64
            };
            (0..shape.total()).map(load).collect()
        }
        Loads::Given { layers: given } => {
            let other = given.iter().find(|layer| layer.len() != experts);
            if given.len() != layers || other.is_some() {
                return Err(ParseLoadsError::Shape {
                    layers: given.len(),
                    experts: other.or(given.first()).map_or(0, Vec::len),
                    shape_layers: layers,
                    shape_experts: experts,
                });
            }
            given.concat()
        }
    })
}

/// Loads after a drift: each is multiplied by its own random factor between 1 - `drift` and 1 + `drift`.
pub fn drifted(loads: &[u64], drift: f64, seed: u64) -> Vec<u64> {
    let mut random = Random::new(seed);
    loads.iter().map(|&load| (load as f64 * (1.0 + drift * (2.0 * random.unit() - 1.0))).round() as u64).collect()
}

/// Loads after a sudden change: each layer's loads belong to its experts in another random order.
pub fn reshuffled(loads: &[u64], experts: usize, seed: u64) -> Vec<u64> {
    let mut random = Random::new(seed);
    let mut loads = loads.to_vec();
    loads.chunks_mut(experts.max(1)).for_each(|layer| random.shuffle(layer));
    loads
}

/// `MEASURED[language][layer][expert]`: routed (token, expert) pairs of the demo model on its held-out texts, as in
/// `tests/data/demo/expert_load.json`.
const MEASURED: [[[u32; 8]; 4]; 5] = [
    [
        [10_843, 11_385, 9428, 13_193, 10_624, 9036, 13_638, 7869],
        [15_187, 7776, 9958, 10_131, 13_019, 10_140, 9383, 10_422],
        [12_191, 6531, 21_128, 4358, 8527, 12_392, 14_297, 6592],
        [5128, 6214, 5268, 22_822, 3361, 9463, 29_055, 4705],
    ],
    [
        [5120, 4924, 6561, 6283, 6042, 6666, 5980, 6552],
        [3836, 7748, 3493, 7116, 7474, 7236, 6610, 4615],
        [6012, 7581, 3322, 6575, 7668, 5838, 4940, 6192],
        [5482, 7214, 7480, 4884, 9562, 6124, 2374, 5008],
    ],
    [
        [8596, 10_863, 7960, 6547, 8191, 8041, 9120, 11_850],
        [10_498, 8609, 13_838, 7003, 5738, 6539, 9288, 9655],
        [7702, 6707, 7815, 3901, 8696, 8686, 11_398, 16_263],
        [12_266, 7907, 11_611, 7902, 14_335, 11_905, 2444, 2798],
    ],
    [
        [10_300, 13_990, 8133, 10_023, 8581, 9484, 11_947, 9462],
        [6257, 13_908, 11_075, 10_233, 11_501, 12_221, 7496, 9229],
        [11_210, 7556, 6849, 19_746, 9841, 12_022, 5833, 8863],
        [5769, 7181, 4764, 11_313, 10_568, 8522, 3291, 30_512],
    ],
    [
        [4095, 3893, 3843, 4288, 4508, 3628, 4310, 3691],
        [3547, 2285, 4363, 4438, 2129, 4549, 5513, 5432],
        [4186, 7715, 2268, 7432, 3974, 1845, 2039, 2797],
        [5530, 3631, 3261, 2909, 2928, 8169, 2025, 3803],
    ],
];

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { layers: 6, experts: 20, expert_bytes: 1 };

    #[test]
    fn loads_are_named_as_they_are_described() {
        let cases = [
            ("uniform", Ok(Loads::Uniform)),
            ("zipf:1.2", Ok(Loads::Zipf { exponent: 1.2 })),
            ("measured:de", Ok(Loads::Measured { language: Language::De })),
            ("zipf:5", Err(ParseLoadsError::Exponent("5".into()))),
            ("zipf:NaN", Err(ParseLoadsError::Exponent("NaN".into()))),
            ("measured:nl", Err(ParseLoadsError::Language("nl".into()))),
            ("zipf", Err(ParseLoadsError::Unknown("zipf".into()))),
        ];
        for (text, loads) in cases {
            assert_eq!(text.parse(), loads, "{text}");
        }
    }

    #[test]
    fn zipf_loads_differ_by_layer_in_order_only() {
        let loads = first(&Loads::Zipf { exponent: 1.0 }, SHAPE, 1).unwrap();
        let sorted = |layer: usize| {
            let mut layer = loads[layer * 20..(layer + 1) * 20].to_vec();
            layer.sort_unstable();
            layer
        };
        assert_ne!(loads[..20], loads[20..40]);
        assert_eq!(sorted(0), sorted(1));
        // the hottest has ten times the load of the tenth hottest
        assert_eq!(sorted(0)[19] / sorted(0)[10], 10);
    }

    #[test]
    fn measured_loads_repeat_for_larger_shapes() {
        let demo = Shape { layers: 4, experts: 8, expert_bytes: 1 };
        let measured = Loads::Measured { language: Language::En };
        let (small, large) = (first(&measured, demo, 1).unwrap(), first(&measured, SHAPE, 1).unwrap());
        assert_eq!(small[..8], large[..8]);
        assert_eq!(small[..8], large[4 * 20..4 * 20 + 8]);
        assert!(large[8] >= small[0] / 2 && large[8] <= small[0] * 3 / 2);
    }

    #[test]
    fn loads_for_another_shape_are_refused_with_both_shapes() {
        let error = first(&Loads::Given { layers: vec![vec![1; 20]; 5] }, SHAPE, 1).unwrap_err();
        assert_eq!(error.to_string(), "loads are for 5 layers of 20 experts, the shape has 6 of 20");
    }

    #[test]
    fn a_drift_stays_within_its_bounds_and_a_seed_repeats_it() {
        let loads = vec![1000; 50];
        let after = drifted(&loads, 0.1, 3);
        assert!(after.iter().all(|load| (900..=1100).contains(load)) && after != loads);
        assert_eq!(after, drifted(&loads, 0.1, 3));
        assert_ne!(after, drifted(&loads, 0.1, 4));
    }
}
