//! The kernels' own source, run lane by lane on the CPU (`kernels/emulated.cpp`), against the CPU's weights and a plain loop.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use half::bf16;
use sirocco_types::ExpertDtype;

use super::kernels::{SOURCE, grid_y, shared_bytes};
use super::layout::{Layout, Matrix, row_bytes, write_row};
use super::plan::{FEW_ROWS, MANY_ROWS};
use crate::ffn::ExpertMatrix;
use crate::quant::{QuantWidth, quantise};

const DTYPES: [ExpertDtype; 3] = [ExpertDtype::Bf16, ExpertDtype::Int8, ExpertDtype::Int4];

/// The emulator, compiled beside this test's program, once for each of its sources, by the C++ compiler that `SIROCCO_CXX_BIN`
/// names, else by `c++`.
fn emulator() -> &'static PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let mut hasher = DefaultHasher::new();
        (SOURCE, include_str!("kernels/emulated.cpp")).hash(&mut hasher);
        let own = std::env::current_exe().unwrap();
        let out = own.with_file_name(format!("sirocco-emulated-{:016x}", hasher.finish()));
        if !out.is_file() {
            let new = out.with_extension(format!("{}.new", std::process::id()));
            let compiler = std::env::var_os("SIROCCO_CXX_BIN").map_or_else(|| "c++".into(), PathBuf::from);
            let program = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/cuda/kernels/emulated.cpp");
            let mut command = Command::new(&compiler);
            command.args(["-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas", "-Werror"]);
            let status = command.arg(&program).arg("-o").arg(&new).status().unwrap_or_else(|error| {
                panic!("{}: {error}; a C++ compiler is needed, or SIROCCO_CXX_BIN names one", compiler.display())
            });
            assert!(status.success(), "{} ended with {status}", compiler.display());
            std::fs::rename(&new, &out).unwrap();
        }
        out
    })
}

/// An item as kernels read it, its addresses being offsets.
fn item(layout: Layout, expert: usize, first: usize, rows: usize) -> Vec<u8> {
    let at = (expert * layout.bytes()) as u64;
    let (first, rows) = (first as u32, rows as u32);
    let addresses = [at, at + layout.down_offset() as u64].map(u64::to_le_bytes).concat();
    [addresses, [first, rows].map(u32::to_le_bytes).concat()].concat()
}

/// What a kernel is run on.
struct Run<'a> {
    name: String,
    grid_y: usize,
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
        let Matrix { blocks, tiles, outputs } = self.matrix;
        let head = [self.grid_y as u32, blocks, tiles, outputs, outputs, self.shared as u32, self.out as u32];
        let mut input = head.map(u32::to_le_bytes).concat();
        let row_of: Vec<u8> = self.row_of.iter().flat_map(|row| row.to_le_bytes()).collect();
        for part in [self.items, self.weights, self.x, &row_of] {
            input.extend((part.len() as u64).to_le_bytes());
            input.extend(part);
        }
        let mut command = Command::new(emulator());
        let mut child = command.arg(&self.name).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(&input).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{} ended with {}", self.name, output.status);
        assert_eq!(output.stdout.len(), self.out);
        output.stdout
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
    let items: Vec<u8> = items.iter().flat_map(|&(expert, first, rows)| item(layout, expert, first, rows)).collect();
    let half = |gated: bool, matrix: Matrix, x: &[u8], row_of: &[u32], slots: usize| {
        let (few, many) = grid_y(matrix.tiles, gated);
        let (grid_y, shared) = if kernels == "few" { (few, 0) } else { (many, shared_bytes(dtype)) };
        let name = format!("{}_{kernels}_{dtype}", if gated { "gate_up" } else { "down" });
        let out = slots * if gated { row_bytes(layout.inter) } else { 4 * hidden };
        Run { name, grid_y, matrix, shared, items: &items, weights: &weights, x, row_of, out }.run()
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
