//! The experts' kernels, run lane by lane on the CPU, against the CPU's weights and a plain loop.

use half::bf16;
use sirocco_types::ExpertDtype;

use super::emulator::{BASE, Emulator};
use super::kernels::{grid_y, shared_bytes};
use super::launch::Operands;
use super::layout::{Layout, Matrix, row_bytes, write_row};
use super::plan::{FEW_ROWS, ITEM, MANY_ROWS, item};
use crate::ffn::ExpertMatrix;
use crate::quant::{QuantWidth, quantise};

const DTYPES: [ExpertDtype; 3] = [ExpertDtype::Bf16, ExpertDtype::Int8, ExpertDtype::Int4];

/// What a kernel is run on.
struct Run<'a> {
    kernel: String,
    grid: (usize, usize),
    matrix: Matrix,
    shared: usize,
    items: &'a [u8],
    weights: &'a [u8],
    x: &'a [u8],
    row_of: &'a [u32],
    /// Bytes that it writes.
    out: usize,
}

impl Run<'_> {
    fn run(&self) -> Vec<u8> {
        let row_of: Vec<u8> = self.row_of.iter().flat_map(|row| row.to_le_bytes()).collect();
        // Memory that is not written is NaN.
        let parts = [self.items, self.weights, self.x, &row_of, &vec![0xff; self.out]];
        let mut places = [0; 5];
        for i in 1..5 {
            places[i] = (places[i - 1] + parts[i - 1].len()).next_multiple_of(16);
        }
        let mut emulator = Emulator::new(places[4] + self.out);
        parts.iter().zip(places).for_each(|(part, place)| emulator.write(place, part));
        let [items, base, from, row_of, to] = places.map(|place| BASE + place as u64);
        let row_of = if self.row_of.is_empty() { 0 } else { row_of };
        let operands = Operands { items, base, from, row_of, to, matrix: self.matrix, width: self.matrix.outputs };
        emulator.launch(&self.kernel, self.grid, self.shared, &operands.arguments());
        emulator.read(places[4], self.out)
    }
}

/// bf16 values that are as good as random, `[rows, width]`.
fn values(rows: usize, width: usize, step: f32) -> Vec<bf16> {
    (0..rows * width).map(|i| bf16::from_f32((i as f32 * step).sin() * 0.5)).collect()
}

/// `[rows, width]`, of all of f32's bits.
fn activations(rows: usize, width: usize) -> Vec<f32> {
    (0..rows * width).map(|i| (i as f32 * 0.37).sin()).collect()
}

/// An expert's matrices.
struct Expert {
    layout: Layout,
    /// `[outputs, inputs]` of gate, up and down.
    matrices: [Vec<bf16>; 3],
}

impl Expert {
    fn new(layout: Layout, seed: f32) -> Self {
        let Layout { hidden, inter, .. } = layout;
        let matrices = [
            values(inter, hidden, 0.713 + seed),
            values(inter, hidden, 1.317 + seed),
            values(hidden, inter, 0.917 + seed),
        ];
        Self { layout, matrices }
    }

    /// As it lies on a device.
    fn packed(&self) -> Vec<u8> {
        let layout = self.layout;
        let mut bytes = vec![0; layout.bytes()];
        for (matrix, values) in ExpertMatrix::ALL.into_iter().zip(&self.matrices) {
            let width = if matrix == ExpertMatrix::Down { layout.inter } else { layout.hidden };
            let rows: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            for (tile, rows) in rows.chunks(16 * width * 2).enumerate() {
                let at = layout.tile_offset(matrix, tile);
                layout.pack(matrix, rows, &mut bytes[at..at + layout.tile_bytes_of(matrix)]);
            }
        }
        bytes
    }

    /// The weights as they count, `[outputs, inputs]`: as the CPU quantises them.
    fn weights(&self, matrix: ExpertMatrix) -> Vec<f32> {
        let values = &self.matrices[matrix as usize];
        let width = match self.layout.dtype {
            ExpertDtype::Bf16 => return values.iter().map(|value| value.to_f32()).collect(),
            ExpertDtype::Int8 => QuantWidth::Int8,
            ExpertDtype::Int4 => QuantWidth::Int4,
        };
        let offset = if width == QuantWidth::Int8 { 128.0 } else { 8.0 };
        let inputs = if matrix == ExpertMatrix::Down { self.layout.inter } else { self.layout.hidden };
        let group = |values: &[bf16]| {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            let (scale, quants) = quantise(width, &bytes);
            let scale = bf16::from_bits(scale).to_f32();
            quants[..values.len()].iter().map(|&quant| (f32::from(quant) - offset) * scale).collect::<Vec<_>>()
        };
        values.chunks(inputs).flat_map(|row| row.chunks(32).flat_map(group).collect::<Vec<_>>()).collect()
    }

    /// The result for one row, by plain loops in f64.
    fn forward(&self, x: &[f32]) -> Vec<f32> {
        let [gate, up, down] = ExpertMatrix::ALL.map(|matrix| self.weights(matrix));
        let dot = |w: &[f32], x: &[f32]| w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>();
        let gated: Vec<f32> = gate
            .chunks(x.len())
            .zip(up.chunks(x.len()))
            .map(|(gate, up)| {
                let (gate, up) = (dot(gate, x), dot(up, x));
                (gate / (1.0 + (-gate).exp()) * up) as f32
            })
            .collect();
        down.chunks(gated.len()).map(|down| dot(down, &gated) as f32).collect()
    }
}

/// Rows of activations as kernels read them.
fn rows(values: &[f32], width: usize) -> Vec<u8> {
    let mut rows = vec![0; values.len() / width * row_bytes(width)];
    for (values, row) in values.chunks(width).zip(rows.chunks_mut(row_bytes(width))) {
        write_row(values, row);
    }
    rows
}

/// Runs both halves on slots whose hidden states are `x[row_of[slot]]`: `[slots, hidden]`, by the kernels for few or many rows. Items
/// are `(expert, first slot, rows)`.
fn run(kernels: &str, experts: &[Expert], x: &[f32], row_of: &[u32], items: &[(usize, usize, usize)]) -> Vec<f32> {
    let layout = experts[0].layout;
    let Layout { dtype, hidden, .. } = layout;
    let weights: Vec<u8> = experts.iter().flat_map(Expert::packed).collect();
    let place = |expert: usize| (expert * layout.bytes()) as u64;
    let weights_of = |expert: usize| [place(expert), place(expert) + layout.down_offset() as u64];
    let items: Vec<u8> =
        items.iter().flat_map(|&(expert, first, rows)| item(weights_of(expert), first, rows)).collect();
    let count = items.len() / ITEM;
    let half = |gated: bool, matrix: Matrix, x: &[u8], row_of: &[u32], slots: usize| {
        let (few, many) = grid_y(matrix.tiles, gated);
        let (grid_y, shared) = if kernels == "few" { (few, 0) } else { (many, shared_bytes(dtype)) };
        let kernel = format!("{}_{kernels}_{dtype}", if gated { "gate_up" } else { "linear" });
        let out = slots * if gated { row_bytes(layout.inter) } else { 4 * hidden };
        let grid = (count, grid_y);
        Run { kernel, grid, matrix, shared, items: &items, weights: &weights, x, row_of, out }.run()
    };
    let gated = half(true, layout.gate_up(), &rows(x, hidden), row_of, row_of.len());
    let out = half(false, layout.down(), &gated, &[], row_of.len());
    out.as_chunks::<4>().0.iter().map(|&value| f32::from_le_bytes(value)).collect()
}

#[test]
fn kernels_compute_the_formula_for_each_expert_and_row_whatever_the_shape() {
    for dtype in DTYPES {
        // Widths that are whole blocks and that are not; segments with blocks, without, and of several.
        for (hidden, inter) in [(64, 128), (40, 24), (136, 584)] {
            let layout = Layout { dtype, hidden, inter };
            let experts = [Expert::new(layout, 0.0), Expert::new(layout, 0.25)];
            let x = activations(5, hidden);
            let row_of = [3, 1, 4, 4, 0, 2];
            let items = [(1, 0, 2), (0, 2, 1), (1, 3, 3)];
            for kernels in ["few", "many"] {
                let got = run(kernels, &experts, &x, &row_of, &items);
                for (expert, first, rows) in items {
                    for slot in first..first + rows {
                        let want = experts[expert].forward(&x[row_of[slot] as usize * hidden..][..hidden]);
                        let largest = want.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
                        for (got, want) in got[slot * hidden..][..hidden].iter().zip(want) {
                            let near = (got - want).abs() <= largest * 1e-3;
                            assert!(near, "{kernels} {layout:?} slot {slot}: {got}, not {want} of {largest}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_others_in_both_kernels() {
    for dtype in DTYPES {
        let layout = Layout { dtype, hidden: 96, inter: 640 };
        let experts = [Expert::new(layout, 0.0)];
        let count = MANY_ROWS;
        let x = activations(count, 96);
        let all: Vec<u32> = (0..count as u32).collect();
        let bits = |rows: &[f32]| rows.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let together = bits(&run("many", &experts, &x, &all, &[(0, 0, count)]));
        for (first, rows) in [(0, 1), (5, 8), (17, 12), (60, 20), (96, FEW_ROWS)] {
            let few = bits(&run("few", &experts, &x, &all[first..first + rows], &[(0, 0, rows)]));
            assert!(few == together[first * 96..][..rows * 96], "{dtype}: {rows} rows from {first} on, few");
        }
        for (first, rows) in [(0, 1), (31, 2), (40, 65)] {
            let many = bits(&run("many", &experts, &x, &all[first..first + rows], &[(0, 0, rows)]));
            assert!(many == together[first * 96..][..rows * 96], "{dtype}: {rows} rows from {first} on, many");
        }
    }
}

#[test]
fn quantised_tiles_take_the_bytes_that_are_announced() {
    let spec = |dtype| Layout { dtype, hidden: 4096, inter: 14_336 }.bytes();
    let weights = 3 * 4096 * 14_336;
    assert_eq!(DTYPES.map(spec), [2 * weights, weights * 17 / 16, weights * 9 / 16]);
}

#[test]
fn what_is_not_finite_stays_in_its_row() {
    for dtype in DTYPES {
        let layout = Layout { dtype, hidden: 64, inter: 64 };
        let experts = [Expert::new(layout, 0.0)];
        let mut x = activations(3, 64);
        let clean = run("few", &experts, &x, &[0, 1, 2], &[(0, 0, 3)]);
        x[64] = f32::NAN;
        for kernels in ["few", "many"] {
            let got = run(kernels, &experts, &x, &[0, 1, 2], &[(0, 0, 3)]);
            assert!(got[64..128].iter().all(|value| value.is_nan()));
            assert!(got[..64] == clean[..64] && got[128..] == clean[128..], "{kernels} {dtype}");
        }
    }
}
