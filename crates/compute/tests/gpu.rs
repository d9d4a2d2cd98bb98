//! What only a GPU can show. `cargo xtask gpu-check` runs these; where there is none, they fail and say what is missing.

use std::path::PathBuf;

use half::bf16;
use sirocco_compute::{
    BLOCK_TOKENS, Batch, CpuBackend, CpuRouter, CpuWeights, CudaBackend, CudaRouter, DeviceError, Draw, ExpertBackend,
    ExpertMatrix, ExpertWeights, KernelSettings, KvBlocks, PackedMatrix, Part, Pool, Queries, RouterBackend,
    RouterLimits, RouterMatrix, RouterVector, TokenSet, sample,
};
use sirocco_types::{Dtype, ExpertDtype, ModelSpec};

const DTYPES: [ExpertDtype; 3] = [ExpertDtype::Bf16, ExpertDtype::Int8, ExpertDtype::Int4];

/// How far a result may be from the CPU's, over the largest of its row. With quantised weights the CPU has activations of 8 bits.
fn tolerance(dtype: ExpertDtype) -> f32 {
    if dtype == ExpertDtype::Bf16 { 1e-3 } else { 0.03 }
}

/// Hidden and intermediate size of Mixtral 8x7B.
const MIXTRAL: (usize, usize) = (4096, 14_336);

fn gpu(dtype: ExpertDtype, shape: (usize, usize)) -> CudaBackend {
    let settings = KernelSettings { nvrtc: std::env::var_os("SIROCCO_NVRTC").map(PathBuf::from), ..Default::default() };
    CudaBackend::open(0, &settings, dtype, shape).unwrap_or_else(|error| panic!("{error}"))
}

fn cpu(dtype: ExpertDtype, (hidden_size, intermediate_size): (usize, usize)) -> CpuBackend {
    CpuBackend { pool: Pool::new(2).unwrap(), dtype, hidden_size, intermediate_size }
}

/// Numbers of -1 to 1 that follow from `seed`.
fn numbers(seed: usize) -> impl Iterator<Item = f32> {
    let mut state = seed as u64 + 1;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// An expert whose weights follow from `seed`, so scaled that results are near 1.
fn expert(backend: &dyn ExpertBackend, seed: usize) -> Result<ExpertWeights, DeviceError> {
    let mut packer = backend.packer()?;
    for matrix in ExpertMatrix::ALL {
        let (outputs, inputs) = packer.shape(matrix);
        let scale = 2.0 / (inputs as f32).sqrt();
        let values =
            numbers(seed * 3 + matrix as usize).take(outputs * inputs).map(|value| bf16::from_f32(value * scale));
        packer.push_rows(matrix, &values.flat_map(bf16::to_le_bytes).collect::<Vec<u8>>());
    }
    packer.finish()
}

/// The results of `parts`, experts with their rows: `[rows, hidden]` of each.
fn run(backend: &dyn ExpertBackend, hidden: usize, parts: &[(&ExpertWeights, Vec<usize>)]) -> Vec<Vec<f32>> {
    let append = |row: usize, out: &mut Vec<f32>| out.extend(numbers(1000 + row).take(hidden));
    let mut outputs: Vec<Vec<f32>> = parts.iter().map(|(_, rows)| vec![f32::NAN; rows.len() * hidden]).collect();
    let parts: Vec<Part> = parts.iter().map(|(weights, rows)| Part { weights, rows: rows.clone() }).collect();
    let mut done = |part: usize, first: usize, rows: &[f32]| {
        outputs[part][first * hidden..][..rows.len()].copy_from_slice(rows);
    };
    backend.run(&Batch { append: &append, parts: &parts }, &mut done).unwrap();
    outputs
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Compares the results of as many experts as `rows` has numbers of rows.
fn compare(dtype: ExpertDtype, shape: (usize, usize), rows: &[usize]) {
    let (gpu, cpu) = (gpu(dtype, shape), cpu(dtype, shape));
    let results = |backend: &dyn ExpertBackend| {
        let experts: Vec<ExpertWeights> = (0..rows.len()).map(|seed| expert(backend, seed).unwrap()).collect();
        let rows =
            rows.iter().enumerate().map(|(part, &count)| (0..count).map(|row| (row * 7 + part * 3) % 64).collect());
        run(backend, shape.0, &experts.iter().zip(rows).collect::<Vec<_>>())
    };
    for (part, (got, want)) in results(&gpu).iter().zip(&results(&cpu)).enumerate() {
        for (row, (got, want)) in got.chunks(shape.0).zip(want.chunks(shape.0)).enumerate() {
            let largest = want.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
            let near = got.iter().zip(want).all(|(got, want)| (got - want).abs() <= largest * tolerance(dtype));
            assert!(near, "{dtype} {shape:?}: expert {part}, row {row}: {got:?}, not {want:?}");
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
fn small_shapes_are_computed_as_the_cpu_does_it() {
    for dtype in DTYPES {
        for shape in [(64, 128), (40, 24), (136, 584), (256, 320)] {
            compare(dtype, shape, &[1, 0, 3, 17, 33, 64, 129]);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
fn mixtrals_shape_is_computed_as_the_cpu_does_it() {
    for dtype in DTYPES {
        compare(dtype, MIXTRAL, &[1, 40]);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
fn a_row_has_the_same_bits_alone_and_among_4096_and_beside_other_experts() {
    for (dtype, shape) in DTYPES.into_iter().flat_map(|dtype| [(dtype, MIXTRAL), (dtype, (136, 584))]) {
        let gpu = gpu(dtype, shape);
        let (first, second) = (expert(&gpu, 1).unwrap(), expert(&gpu, 2).unwrap());
        let together = run(&gpu, shape.0, &[(&first, (0..4096).collect()), (&second, (0..777).collect())]);
        for count in [1, 2, 7, 8, 9, 16, 31, 32, 33, 100, 128, 129, 500] {
            for start in [0, 5, 1000] {
                let rows: Vec<usize> = (start..start + count).collect();
                let alone = run(&gpu, shape.0, &[(&second, vec![3]), (&first, rows)]);
                let among = &together[0][start * shape.0..][..count * shape.0];
                assert!(bits(&alone[1]) == bits(among), "{dtype} {shape:?}: {count} rows from {start} on");
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
fn batches_that_are_launched_as_graphs_have_the_bits_of_those_that_are_not() {
    let (gpu, shape) = (gpu(ExpertDtype::Bf16, (136, 584)), (136, 584));
    let experts: Vec<ExpertWeights> = (0..4).map(|seed| expert(&gpu, seed).unwrap()).collect();
    // As many items each time, of other experts, rows and numbers of rows.
    let batch = |step: usize| -> Vec<(&ExpertWeights, Vec<usize>)> {
        let rows = |part: usize| (0..=(step + part) % 5).map(|row| step * 7 + part + row).collect();
        (0..3).map(|part| (&experts[(step + part) % 4], rows(part))).collect()
    };
    gpu.use_graphs(false);
    let plain: Vec<_> = (0..40).map(|step| run(&gpu, shape.0, &batch(step))).collect();
    assert_eq!(gpu.graph_launches(), 0);
    gpu.use_graphs(true);
    for (step, plain) in plain.iter().enumerate() {
        let got = run(&gpu, shape.0, &batch(step));
        assert!(got.iter().zip(plain).all(|(got, plain)| bits(got) == bits(plain)), "step {step}");
    }
    assert_eq!(gpu.graph_launches(), 39);
    // The graphs go before what they name.
    drop(experts);
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
fn a_batch_of_many_waves_comes_whole_and_rows_may_be_wanted_twice() {
    let gpu = gpu(ExpertDtype::Bf16, (64, 128));
    let experts: Vec<ExpertWeights> = (0..3).map(|seed| expert(&gpu, seed).unwrap()).collect();
    let rows: Vec<usize> = (0..9000).map(|i| i % 500).collect();
    let parts: Vec<(&ExpertWeights, Vec<usize>)> = experts.iter().map(|expert| (expert, rows.clone())).collect();
    for (part, output) in run(&gpu, 64, &parts).iter().enumerate() {
        let alone = &run(&gpu, 64, &[(&experts[part], (0..500).collect())])[0];
        for (place, output) in output.chunks(500 * 64).enumerate() {
            assert!(bits(output) == bits(&alone[..output.len()]), "expert {part}, rows from {} on", place * 500);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
fn a_full_gpu_refuses_one_more_expert_by_numbers_and_goes_on() {
    let gpu = gpu(ExpertDtype::Bf16, MIXTRAL);
    let first = expert(&gpu, 1).unwrap();
    let before = run(&gpu, MIXTRAL.0, &[(&first, vec![0, 1, 2])]);
    let mut packers = Vec::new();
    let error = loop {
        match gpu.packer() {
            Ok(packer) => packers.push(packer),
            Err(error) => break error,
        }
    };
    assert!(matches!(&error, DeviceError::OutOfMemory { bytes, .. } if *bytes == first.bytes()), "{error}");
    assert_eq!(run(&gpu, MIXTRAL.0, &[(&first, vec![0, 1, 2])]), before);
    let room = gpu.capacity_bytes().unwrap() / first.bytes() as u64;
    assert!(packers.len() as u64 + 1 >= room, "{} experts fit, {room} were announced", packers.len() + 1);
    drop(packers);
    expert(&gpu, 2).unwrap();
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
fn a_gpu_says_what_it_is_and_how_it_fares() {
    let gpu = gpu(ExpertDtype::Bf16, (64, 128));
    assert_eq!((gpu.kind(), gpu.name().is_empty()), ("cuda", false));
    let readings = gpu.readings().expect("the driver's management library is there");
    assert!((0.0..=1.0).contains(&readings.utilisation) && readings.memory_bytes > 0, "{readings:?}");
    assert!((1.0..150.0).contains(&readings.temperature_celsius), "{readings:?}");
}

/// A small model whose widths fill no block, with four query heads to a KV head, and more tokens than a block of threads has threads.
fn spec() -> ModelSpec {
    ModelSpec {
        model_type: "mixtral".into(),
        hidden_size: 200,
        intermediate_size: 64,
        num_hidden_layers: 2,
        num_local_experts: 8,
        num_experts_per_tok: 2,
        num_attention_heads: 8,
        num_key_value_heads: 2,
        head_dim: 64,
        vocab_size: 5003,
        max_position_embeddings: 4096,
        sliding_window: Some(1500),
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        tie_word_embeddings: false,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        dtype: Dtype::Bf16,
    }
}

/// Blocks of its cache.
const BLOCKS: usize = 96;

/// Its matrices, little-endian bf16.
fn matrices(spec: &ModelSpec) -> impl Iterator<Item = (RouterMatrix, Vec<u8>)> {
    RouterMatrix::all(spec).enumerate().map(|(index, matrix)| {
        let (outputs, inputs) = matrix.shape(spec);
        let scale = 2.0 / (inputs as f32).sqrt();
        let values = numbers(index).take(outputs * inputs).map(|value| bf16::from_f32(value * scale));
        (matrix, values.flat_map(bf16::to_le_bytes).collect())
    })
}

fn vectors(spec: &ModelSpec) -> impl Iterator<Item = (RouterVector, Vec<f32>)> {
    RouterVector::all(spec).enumerate().map(|(index, vector)| {
        (vector, numbers(1000 + index).take(spec.hidden_size).map(|value| 1.0 + value / 4.0).collect())
    })
}

fn router_with(spec: &ModelSpec, kv_blocks: KvBlocks) -> Result<CudaRouter, DeviceError> {
    let settings = KernelSettings { nvrtc: std::env::var_os("SIROCCO_NVRTC").map(PathBuf::from), ..Default::default() };
    let limits = RouterLimits { step_tokens: 512, step_sequences: 8, kv_blocks };
    let mut router = CudaRouter::open(0, &settings, spec, limits)?;
    matrices(spec).try_for_each(|(matrix, rows)| router.load_matrix(matrix, &rows))?;
    vectors(spec).try_for_each(|(vector, values)| router.load_vector(vector, &values))?;
    Ok(router)
}

fn router(spec: &ModelSpec) -> CudaRouter {
    router_with(spec, KvBlocks::Exactly(BLOCKS)).unwrap_or_else(|error| panic!("{error}"))
}

fn router_on_cpu(spec: &ModelSpec) -> CpuRouter {
    let packed = |(matrix, rows): (RouterMatrix, Vec<u8>)| {
        let (outputs, inputs) = matrix.shape(spec);
        PackedMatrix::from_bf16(&rows, outputs, inputs).unwrap()
    };
    let matrices = matrices(spec).map(packed).collect();
    let vectors = vectors(spec).map(|(_, values)| values).collect();
    CpuRouter::new(spec, CpuWeights { matrices, vectors }, BLOCKS, Pool::new(2).unwrap())
}

/// The tokens and the blocks of a sequence.
type Sequence = (Vec<u32>, Vec<u32>);

fn sequence(spec: &ModelSpec, len: usize, first_block: u32) -> Sequence {
    let tokens = (0..len).map(|i| ((i * 37 + first_block as usize) % spec.vocab_size) as u32);
    (tokens.collect(), (first_block..first_block + len.div_ceil(BLOCK_TOKENS) as u32).rev().collect())
}

/// Draws of several kinds.
fn draw(row: u32) -> Draw {
    let random = Draw { temperature: 0.8, uniform: u64::from(row) << 54, ..Draw::default() };
    let mut even = TokenSet::none_of(500);
    (0..500).step_by(2).for_each(|id| even.insert(id));
    match row % 5 {
        0 => Draw::default(),
        1 => random,
        2 => Draw { top_k: 40, top_p: 0.9, report: Some(5), ..random },
        3 => {
            Draw { repetition_penalty: 1.5, seen: Some(even), generated: vec![(3, 2)], presence_penalty: 1.0, ..random }
        }
        _ => Draw { min_p: 0.2, allowed: Some(even), bias: vec![(4, 9.0), (5, 90.0)], report: Some(20), ..random },
    }
}

/// Takes parts of sequences, (sequence, start, length), through all layers, with experts that are a formula: what each token's experts
/// were asked in the last layer, `[hidden]`, with its logits, `[vocab]`.
fn forward(
    router: &mut dyn RouterBackend,
    spec: &ModelSpec,
    lane: usize,
    parts: &[(&Sequence, usize, usize)],
) -> Vec<Vec<f32>> {
    let tokens: Vec<u32> =
        parts.iter().flat_map(|(sequence, start, len)| &sequence.0[*start..start + len]).copied().collect();
    let queries: Vec<Queries> =
        parts.iter().map(|&(sequence, start, len)| Queries { blocks: &sequence.1, start, len }).collect();
    router.begin(lane, &tokens, &queries).unwrap();
    let mut normed = Vec::new();
    for layer in spec.layers() {
        let routing = router.attend(lane, layer, &mut normed).unwrap();
        let mut combined = Vec::new();
        for (token, normed) in normed.chunks_exact(spec.hidden_size).enumerate() {
            let (experts, weights) = routing.of(token);
            let factor: f32 = experts.iter().zip(weights).map(|(e, w)| w * (0.1 * (e.0 + 1) as f32)).sum();
            combined.extend((1..=normed.len()).map(|i| factor * normed[i % normed.len()]));
        }
        router.add_experts(lane, layer, &combined).unwrap();
    }
    let rows: Vec<u32> = (0..tokens.len() as u32).collect();
    let logits = router.logits(lane, &rows).unwrap();
    let logits = logits.chunks_exact(spec.vocab_size);
    let draws: Vec<Draw> = rows.iter().map(|row| draw(*row)).collect();
    let drawn = router.sample(lane, &rows, &draws.iter().collect::<Vec<_>>()).unwrap();
    for ((logits, draw), drawn) in logits.clone().zip(&draws).zip(drawn) {
        assert_eq!(drawn, sample(&mut logits.to_vec(), draw), "{draw:?}");
    }
    assert_eq!(router.overflows(lane).unwrap(), vec![None; parts.len()]);
    normed.chunks_exact(spec.hidden_size).zip(logits).map(|(normed, logits)| [normed, logits].concat()).collect()
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
fn a_router_computes_what_the_cpus_does() {
    for spec in [spec(), ModelSpec { num_attention_heads: 2, num_key_value_heads: 1, head_dim: 160, ..spec() }] {
        let (mut gpu, mut cpu) = (router(&spec), router_on_cpu(&spec));
        let (a, b) = (sequence(&spec, 600, 0), sequence(&spec, 40, 50));
        for parts in [vec![(&b, 0, 1), (&a, 0, 500)], vec![(&a, 500, 1), (&b, 1, 38)], vec![(&a, 501, 99), (&b, 39, 1)]]
        {
            let got = forward(&mut gpu, &spec, 1, &parts);
            let want = forward(&mut cpu, &spec, 1, &parts);
            for (token, (got, want)) in got.iter().zip(&want).enumerate() {
                let largest = want.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
                let near = got.iter().zip(want).all(|(got, want)| (got - want).abs() <= largest * 1e-3);
                assert!(near, "{spec:?}: token {token}: {got:?}, not {want:?}");
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
fn a_routers_bits_depend_neither_on_batch_mates_nor_on_the_cut_of_a_prompt() {
    let spec = spec();
    let mut router = router(&spec);
    let (a, b) = (sequence(&spec, 1900, 0), sequence(&spec, 500, 64));
    let mut whole = Vec::new();
    for start in (0..1900).step_by(500) {
        whole.extend(forward(&mut router, &spec, 0, &[(&a, start, 500.min(1900 - start))]));
    }
    let (mut start, mut mate) = (0, 0);
    for (step, len) in [1, 7, 300, 1, 250, 1, 30, 400, 2, 1, 400, 100, 1, 400, 6].into_iter().enumerate() {
        let got = forward(&mut router, &spec, step % 2, &[(&b, mate, step * 3 + 1), (&a, start, len)]);
        for (token, (got, whole)) in got[step * 3 + 1..].iter().zip(&whole[start..]).enumerate() {
            assert!(bits(got) == bits(whole), "token {} of {len} from {start} on", start + token);
        }
        (start, mate) = (start + len, mate + step * 3 + 1);
    }
    assert_eq!(start, 1900);
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
fn steps_that_are_launched_as_graphs_have_the_bits_of_those_that_are_not() {
    let spec = ModelSpec { sliding_window: None, ..spec() };
    let mut router = router(&spec);
    let sequences = [sequence(&spec, 1100, 0), sequence(&spec, 700, 40), sequence(&spec, 340, 70)];
    let mut decode = |graphs: bool| {
        router.use_graphs(graphs);
        for sequence in &sequences {
            let prompt = sequence.0.len() - 100;
            for start in (0..prompt).step_by(500) {
                forward(&mut router, &spec, 0, &[(sequence, start, 500.min(prompt - start))]);
            }
        }
        let before = router.graph_launches();
        let step = |step: usize| {
            let parts: Vec<_> = sequences.iter().map(|sequence| (sequence, sequence.0.len() - 100 + step, 1)).collect();
            forward(&mut router, &spec, step % 2, &parts)
        };
        let tokens: Vec<Vec<f32>> = (0..100).flat_map(step).collect();
        (tokens, router.graph_launches() - before)
    };
    let (plain, none) = decode(false);
    let (graphs, launched) = decode(true);
    for (token, (got, plain)) in graphs.iter().zip(&plain).enumerate() {
        assert!(bits(got) == bits(plain), "step {}, sequence {}", token / 3, token % 3);
    }
    assert_eq!(none, 0);
    // 8 tasks, then 9 and 10, which are both 10: in each lane a layer's launches come for the first time twice.
    assert!(launched >= 100 * 2 - 2 * 2 * 2, "{launched}");
}

#[test]
#[ignore = "needs an NVIDIA GPU: cargo xtask gpu-check"]
fn a_router_that_does_not_fit_is_refused_by_numbers_and_one_that_is_told_to_takes_what_is_left() {
    let spec = spec();
    let error = router_with(&spec, KvBlocks::Exactly(1 << 30)).unwrap_err();
    assert!(matches!(&error, DeviceError::NoRoom { cache, .. } if *cache > 1 << 40), "{error}");
    assert_eq!(router_with(&spec, KvBlocks::AsFit { most: 77 }).unwrap().kv_blocks(), 77);
    let wide = ModelSpec { head_dim: 512, ..spec };
    let error = router_with(&wide, KvBlocks::Exactly(1)).unwrap_err();
    assert!(matches!(error, DeviceError::Shape { field: "head_dim", .. }), "{error}");
}
