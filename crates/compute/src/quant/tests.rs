//! Every kernel against the oracle: the definition, written down once more without panels, padding or offsets.

use half::bf16;
use proptest::prelude::*;

use super::kernel::{Kernel, kernel, scalar};
use super::matrix::QuantPanels;
use super::rows::quantise;
use super::{GROUP, QuantExpert, QuantWidth};
use crate::exp::exp;
use crate::ffn::ExpertMatrix;
use crate::packed::PANEL;
use crate::{Isa, Pool};

/// Every kernel of this machine.
fn kernels() -> Vec<Kernel> {
    #[cfg(target_arch = "x86_64")]
    return [super::x86::kernels(), vec![scalar]].concat();
    #[cfg(target_arch = "aarch64")]
    return [super::neon::kernels(), vec![scalar]].concat();
    #[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
    vec![scalar]
}

/// Numbers of mixed size and sign, the same for the same seed.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next() * 8.0_f32.powi((next() * 3.0) as i32)).collect()
}

/// An expert of `[inter, hidden]`, `[inter, hidden]` and `[hidden, inter]`.
fn pack(width: QuantWidth, hidden: usize, inter: usize, matrices: [&[f32]; 3]) -> QuantExpert {
    let mut expert = QuantExpert::zeroed(width, hidden, inter);
    for (matrix, values) in ExpertMatrix::ALL.into_iter().zip(matrices) {
        let bytes: Vec<u8> = values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
        let inputs = if matrix == ExpertMatrix::Down { inter } else { hidden };
        for (panel, rows) in bytes.chunks(PANEL * inputs * 2).enumerate() {
            expert.fill(matrix, panel, rows);
        }
    }
    expert
}

fn expert(seed: u64, width: QuantWidth, hidden: usize, inter: usize) -> QuantExpert {
    let [gate, up, down] = [seed, !seed, seed.rotate_left(7)].map(|seed| noise(seed, hidden * inter));
    pack(width, hidden, inter, [&gate, &up, &down])
}

/// One row times the outputs of a matrix whose panel `p` is the one numbered `panel(p)`, by the definition.
fn product(x: &[f32], w: &QuantPanels, outputs: usize, panel: impl Fn(usize) -> usize) -> Vec<f32> {
    let groups: Vec<_> = x.chunks(GROUP).map(|values| quantise(values, 0)).collect();
    let output = |output: usize| {
        let row: Vec<(i32, f32)> = w.quants_and_scales(panel(output / PANEL), output % PANEL).collect();
        groups.iter().zip(row.chunks(GROUP)).fold(0.0_f32, |sum, (x, w)| {
            let dot: i32 = x.quants.iter().zip(w).map(|(x, w)| i32::from(*x) * w.0).sum();
            (dot as f32).mul_add(w[0].1 * x.scale, sum)
        })
    };
    (0..outputs).map(output).collect()
}

/// Each row's result by the definition.
fn oracle(expert: &QuantExpert, x: &[f32]) -> Vec<f32> {
    let (hidden, inter) = (expert.gate_up.inputs, expert.down.inputs);
    let row = |x: &[f32]| {
        let gate = product(x, &expert.gate_up, inter, |panel| 2 * panel);
        let up = product(x, &expert.gate_up, inter, |panel| 2 * panel + 1);
        let gated: Vec<f32> = gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + exp(-gate)) * up).collect();
        product(&gated, &expert.down, hidden, |panel| panel)
    };
    x.chunks_exact(hidden).flat_map(row).collect()
}

/// The bits, with one form for every NaN.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { f32::NAN } else { *value }.to_bits()).collect()
}

fn width() -> impl Strategy<Value = QuantWidth> {
    prop_oneof![Just(QuantWidth::Int8), Just(QuantWidth::Int4)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_kernel_and_thread_count_gives_the_oracles_bits(
        seed in any::<u64>(), width in width(), rows in 1usize..=40, hidden in 1usize..140, inter in 1usize..140,
    ) {
        let expert = expert(seed, width, hidden, inter);
        let x = noise(!seed.rotate_left(9), rows * hidden);
        let expected = bits(&oracle(&expert, &x));
        for kernel in kernels() {
            for threads in [1, 3] {
                let got = expert.forward_by(kernel, &x, &Pool::new(threads).unwrap());
                prop_assert_eq!(bits(&got), &expected[..]);
            }
        }
    }

    #[test]
    fn special_values_are_as_the_oracle_has_them(
        seed in any::<u64>(), width in width(), places in prop::collection::vec((0usize..300, 0usize..8), 1..6),
    ) {
        const SPECIAL: [f32; 8] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 1e-40, f32::MAX, f32::MIN_POSITIVE, 0.0];
        let (hidden, inter) = (100, 70);
        let expert = expert(seed, width, hidden, inter);
        let mut x = noise(!seed.rotate_left(9), 3 * hidden);
        for (at, which) in places {
            x[at] = SPECIAL[which];
        }
        let expected = oracle(&expert, &x);
        for kernel in kernels() {
            let got = expert.forward_by(kernel, &x, &Pool::new(1).unwrap());
            prop_assert_eq!(bits(&got), bits(&expected));
        }
        for (x, got) in x.chunks_exact(hidden).zip(expected.chunks_exact(hidden)) {
            if x.iter().any(|value| !value.is_finite()) {
                prop_assert!(got.iter().all(|value| value.is_nan()));
            }
        }
    }
}

#[test]
fn every_instruction_set_here_has_a_kernel_and_the_portable_one_is_scalar() {
    assert!(
        Isa::available().into_iter().all(|isa| kernels().iter().any(|&found| std::ptr::fn_addr_eq(found, kernel(isa))))
    );
    assert!(std::ptr::fn_addr_eq(kernel(Isa::Portable), scalar as Kernel));
}

#[test]
fn a_few_rows_are_read_in_long_streams_and_have_the_oracles_bits() {
    let (hidden, inter) = (70, 1250);
    for width in [QuantWidth::Int8, QuantWidth::Int4] {
        let expert = expert(5, width, hidden, inter);
        for rows in [1, 8] {
            let x = noise(9, rows * hidden);
            let expected = bits(&oracle(&expert, &x));
            for (kernel, threads) in kernels().into_iter().flat_map(|kernel| [(kernel, 1), (kernel, 2)]) {
                assert_eq!(bits(&expert.forward_by(kernel, &x, &Pool::new(threads).unwrap())), expected);
            }
        }
    }
}

#[test]
fn hundreds_of_rows_on_any_number_of_threads_are_each_what_they_are_alone() {
    let (hidden, inter) = (300, 450);
    for width in [QuantWidth::Int8, QuantWidth::Int4] {
        let expert = expert(3, width, hidden, inter);
        let x = noise(8, 600 * hidden);
        let alone = Pool::new(1).unwrap();
        for rows in [1, 7, 96, 97, 600] {
            for threads in [1, 2, 5] {
                let together = expert.forward(&x[..rows * hidden], &Pool::new(threads).unwrap());
                for row in [0, rows / 2, rows - 1] {
                    let single = expert.forward(&x[row * hidden..][..hidden], &alone);
                    assert_eq!(bits(&together[row * hidden..][..hidden]), bits(&single));
                }
            }
        }
    }
}

#[test]
fn the_largest_weights_and_activations_do_not_saturate() {
    let (hidden, inter) = (256, 64);
    for width in [QuantWidth::Int8, QuantWidth::Int4] {
        for sign in [1.0, -1.0] {
            let flat = vec![sign; inter * hidden];
            let expert = pack(width, hidden, inter, [&flat, &flat, &flat]);
            let x = [vec![1.0; hidden], vec![-1.0; hidden]].concat();
            let expected = bits(&oracle(&expert, &x));
            for kernel in kernels() {
                assert_eq!(bits(&expert.forward_by(kernel, &x, &Pool::new(1).unwrap())), expected);
            }
        }
    }
}
