// Matrices times rows, each in two shapes: `gate_up` computes silu(gate(x)) * up(x) of every slot, a row of one expert's work, and
// `linear` w(x), of an expert's down matrix or of a router's. Grids are (items, groups of output tiles); an item is up to 32 (few)
// or 128 (many) slots of one expert. Layout of weights: crates/compute/src/cuda/layout.rs.
//
// Activations are two bf16, the nearest to a value and the nearest to what is left of it, which is nearly f32: with one, greedy
// completions differ from the checkpoint's. Weights are multiplied with both, in turn. A row is, for each block of 64 inputs,
// the first parts of them and then the second.
//
// One order of summation, whatever the shape of the work: inputs come in blocks of 64, in ascending order, each as four tensor
// core steps of 16 (`multiply`). The blocks of a row make SEGMENTS runs, run s from block s * blocks / SEGMENTS on. Each run is
// summed up from zero; the runs' sums are added up in ascending order, from zero. `few` gives each run to a warp of its own,
// `many` computes one after the other. An output's sum is a row of the tensor core's own result, which no other row or
// column enters. So the bits of a row do not depend on the rows beside it, their number, or which of the two kernels ran.

constexpr int SEGMENTS = 8;
constexpr int THREADS = 256; // SEGMENTS warps
constexpr int FEW_ROWS = 32;
constexpr int MANY_ROWS = 128;
constexpr int MANY_TILES = 8; // 128 outputs
constexpr int STAGES = 2;     // blocks in shared memory: one in use, the other on its way
constexpr int PARTS = 2;      // bf16 of an activation
constexpr int ROW_CHUNKS = PARTS * 8; // of 16 bytes, in a row's block

enum Format { BF16, INT8, INT4 };

// Where weights are is counted from the launch's `base`.
struct Item {
    u64 gate_up; // tiles of the gate and of the other half in turn
    u64 linear;
    u32 first; // slot
    u32 rows;
};

struct Matrix {
    u32 blocks;  // of 64 inputs
    u32 tiles;   // of 16 outputs
    u32 outputs; // that are wanted: of hidden states those that are no padding
};

// Bytes of a tile's block: without scales, and its scales.
template <int FORMAT>
__device__ constexpr u32 quant_bytes() { return FORMAT == BF16 ? 2048 : FORMAT == INT8 ? 1024 : 512; }
template <int FORMAT>
__device__ constexpr u32 scale_bytes() { return FORMAT == BF16 ? 0 : 64; }

// A lane's part of a tile over 32 inputs: two steps of 16.
struct Weights {
    uint4 step[2];
    u32 scales; // bf16 of outputs lane / 4 (low) and lane / 4 + 8 (high)
};

// Four unsigned bytes, 128 too large, as four bf16. A byte in the lowest bits of 2^23's f32 is 2^23 more than itself.
__device__ __forceinline__ uint2 from_int8(u32 bytes)
{
    float v[4];
    for (int i = 0; i < 4; ++i)
        v[i] = __uint_as_float(0x4b000000u | ((bytes >> (8 * i)) & 0xffu)) - 8388736.0f;
    return make_uint2(to_bf16_pair(v[0], v[1]), to_bf16_pair(v[2], v[3]));
}

// Nibbles 0..3 and 4..7, 8 too large, as four words with nibble i in the lower and i + 4 in the upper half. A nibble in the
// lowest bits of 128's bf16 is 128 more than itself.
__device__ __forceinline__ uint4 from_int4(u32 nibbles)
{
    u32 v[4];
    for (int i = 0; i < 4; ++i)
        v[i] = fma_bf16_pair(((nibbles >> (4 * i)) & 0x000f000fu) | 0x43004300u, 0x3f803f80u, 0xc308c308u);
    return make_uint4(v[0], v[1], v[2], v[3]);
}

// A lane's weights of 32 inputs, from what it read: `first` and `second` for bf16, `first` for the others (int4: two words).
template <int FORMAT>
__device__ __forceinline__ Weights decode(uint4 first, uint4 second, u32 scales)
{
    Weights w;
    w.scales = scales;
    if (FORMAT == BF16) {
        w.step[0] = first;
        w.step[1] = second;
    } else if (FORMAT == INT8) {
        uint2 a = from_int8(first.x), b = from_int8(first.y), c = from_int8(first.z), d = from_int8(first.w);
        w.step[0] = make_uint4(a.x, a.y, b.x, b.y);
        w.step[1] = make_uint4(c.x, c.y, d.x, d.y);
    } else {
        w.step[0] = from_int4(first.x);
        w.step[1] = from_int4(first.y);
    }
    return w;
}

// sums += w * x over 32 inputs: one tile of outputs, 8 rows, of which x is this lane's: first and second parts. The integers of a
// group of 32 are summed up as they are and then scaled, once.
template <int FORMAT>
__device__ __forceinline__ void multiply(float (&sums)[4], const Weights& w, const uint4 (&x)[PARTS])
{
    float group[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float(&into)[4] = FORMAT == BF16 ? sums : group;
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        multiply_add(into, w.step[0], make_uint2(x[p].x, x[p].y));
        multiply_add(into, w.step[1], make_uint2(x[p].z, x[p].w));
    }
    if (FORMAT != BF16) {
        float low = __uint_as_float(w.scales << 16), high = __uint_as_float(w.scales & 0xffff0000u);
        sums[0] = fmaf(group[0], low, sums[0]);
        sums[1] = fmaf(group[1], low, sums[1]);
        sums[2] = fmaf(group[2], high, sums[2]);
        sums[3] = fmaf(group[3], high, sums[3]);
    }
}

// Writes input `at` of a row of the next matrix.
__device__ __forceinline__ void write_parts(u16* row, u32 at, float value)
{
    u16* to = row + at / 64 * (64 * PARTS) + at % 64;
    for (int p = 0; p < PARTS; ++p) {
        u16 part = to_bf16(value);
        to[64 * p] = part;
        value -= __uint_as_float((u32)part << 16);
    }
}

// Writes silu(gate) * up to it.
__device__ __forceinline__ void write_gated(u16* row, u32 at, float gate, float up)
{
    write_parts(row, at, gate / (1.0f + expf(-gate)) * up);
}

// Up to FEW_ROWS rows: a block of threads computes one tile of outputs (of `gate_up`, both halves of one), each warp one run
// of the inputs. Reads weights once, straight into registers.
template <int FORMAT, bool GATED, int ROWS8>
__device__ __forceinline__ void few(const u8* weights, Matrix m, const uint4* const (&x)[4], float* shared)
{
    constexpr int TILES = GATED ? 2 : 1;
    const u32 lane = threadIdx.x % 32, segment = threadIdx.x / 32;
    const u64 tile_bytes = (u64)m.blocks * (quant_bytes<FORMAT>() + scale_bytes<FORMAT>());
    const u8* tile = weights + (u64)blockIdx.y * TILES * tile_bytes;
    const u8* scales = tile + (u64)m.blocks * quant_bytes<FORMAT>();
    float sums[TILES][ROWS8][4];
    for (int t = 0; t < TILES; ++t)
        for (int r = 0; r < ROWS8; ++r)
            for (int i = 0; i < 4; ++i)
                sums[t][r][i] = 0.0f;

    const u32 end = (segment + 1) * m.blocks / SEGMENTS;
    for (u32 block = segment * m.blocks / SEGMENTS; block < end; ++block) {
        uint4 quants[TILES][4];
        u32 scale[TILES][2];
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            const u8* from = tile + t * tile_bytes + (u64)block * quant_bytes<FORMAT>() + 16 * lane;
#pragma unroll
            for (int i = 0; i < (int)quant_bytes<FORMAT>() / 512; ++i)
                quants[t][i] = load_once(from + 512 * i);
            if (FORMAT != BF16) {
                const u32* s = (const u32*)(scales + t * tile_bytes + (u64)block * 64) + lane / 4;
                scale[t][0] = s[0];
                scale[t][1] = s[8];
            }
        }
#pragma unroll
        for (int g = 0; g < 2; ++g) {
            Weights w[TILES];
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                if (FORMAT == BF16)
                    w[t] = decode<FORMAT>(quants[t][2 * g], quants[t][2 * g + 1], 0);
                else if (FORMAT == INT8)
                    w[t] = decode<FORMAT>(quants[t][g], quants[t][g], scale[t][g]);
                else
                    w[t] = decode<FORMAT>(g == 0 ? quants[t][0] : make_uint4(quants[t][0].z, quants[t][0].w, 0, 0),
                                          quants[t][0], scale[t][g]);
            }
#pragma unroll
            for (int r = 0; r < ROWS8; ++r) {
                uint4 row[PARTS];
#pragma unroll
                for (int p = 0; p < PARTS; ++p)
                    row[p] = x[r][ROW_CHUNKS * block + 8 * p + 4 * g];
#pragma unroll
                for (int t = 0; t < TILES; ++t)
                    multiply<FORMAT>(sums[t][r], w[t], row);
            }
        }
    }
    // shared: [SEGMENTS, TILES * ROWS8 * 4, 32 lanes]
    for (int t = 0; t < TILES; ++t)
        for (int r = 0; r < ROWS8; ++r)
            for (int i = 0; i < 4; ++i)
                shared[((segment * TILES + t) * ROWS8 + r) * 128 + i * 32 + lane] = sums[t][r][i];
    __syncthreads();
}

template <int FORMAT, bool GATED>
__device__ __forceinline__ void few(const Item* items, const u8* base, const u16* x, const u32* row_of, void* out, Matrix m,
                                    u32 out_width)
{
    constexpr int TILES = GATED ? 2 : 1;
    __shared__ float shared[SEGMENTS * TILES * (FEW_ROWS / 8) * 128];
    const Item item = items[blockIdx.x];
    const u32 lane = threadIdx.x % 32;
    // Rows there are none of are read as the last one, and not written.
    const uint4* rows[4];
    for (int r = 0; r < 4; ++r) {
        u32 slot = item.first + min(r * 8 + lane / 4, item.rows - 1);
        u64 row = row_of ? row_of[slot] : slot;
        rows[r] = (const uint4*)x + row * m.blocks * ROW_CHUNKS + lane % 4;
    }
    const u8* weights = base + (GATED ? item.gate_up : item.linear);
    const u32 rows8 = item.rows <= 8 ? 1 : item.rows <= 16 ? 2 : 4;
    if (rows8 == 1)
        few<FORMAT, GATED, 1>(weights, m, rows, shared);
    else if (rows8 == 2)
        few<FORMAT, GATED, 2>(weights, m, rows, shared);
    else
        few<FORMAT, GATED, 4>(weights, m, rows, shared);
    for (u32 e = threadIdx.x; e < 16 * item.rows; e += THREADS) {
        const u32 output = e % 16, row = e / 16;
        const u32 place = (row / 8) * 128 + ((output / 8) * 2 + row % 2) * 32 + (output % 8) * 4 + row % 8 / 2;
        float sum[TILES];
        for (int t = 0; t < TILES; ++t) {
            sum[t] = 0.0f;
            for (int s = 0; s < SEGMENTS; ++s)
                sum[t] += shared[(s * TILES + t) * rows8 * 128 + place];
        }
        const u32 at = blockIdx.y * 16 + output;
        const u64 slot = item.first + row;
        if (GATED)
            write_gated((u16*)out + slot * out_width * PARTS, at, sum[0], sum[TILES - 1]);
        else if (at < m.outputs)
            ((float*)out)[slot * out_width + at] = sum[0];
    }
}

// Up to MANY_ROWS rows: a block of threads computes MANY_TILES tiles of outputs, a warp four of them for 32 rows. Blocks of
// weights and rows come through shared memory, STAGES - 1 ahead.
template <int FORMAT, bool GATED>
__device__ __forceinline__ void many(const Item* items, const u8* base, const u16* x, const u32* row_of, void* out, Matrix m,
                                     u32 out_width)
{
    constexpr u32 QUANTS = quant_bytes<FORMAT>() / 16; // of a tile's block, in 16 bytes
    constexpr u32 SCALES = scale_bytes<FORMAT>() / 16;
    constexpr u32 STAGE = MANY_TILES * (QUANTS + SCALES) + MANY_ROWS * ROW_CHUNKS;
    uint4* const stages = dynamic_shared(); // [STAGES, STAGE]: quants of all tiles, scales of all tiles, rows
    const Item item = items[blockIdx.x];
    const u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const u32 first_tile = blockIdx.y * MANY_TILES;
    const u64 tile_bytes = (u64)m.blocks * (quant_bytes<FORMAT>() + scale_bytes<FORMAT>());
    const u8* weights = base + (GATED ? item.gate_up : item.linear);
    const u32 rows_read = (item.rows + 31) / 32 * 32;

    // The four rows this thread copies its part of. Rows there are none of are read as the last one, and not written.
    const uint4* rows[4];
    for (int r = 0; r < 4; ++r) {
        u32 slot = item.first + min(thread / 8 + 32 * r, item.rows - 1);
        u64 row = row_of ? row_of[slot] : slot;
        rows[r] = (const uint4*)x + row * m.blocks * ROW_CHUNKS + thread % 8;
    }
    auto fetch = [&](u32 block) {
        uint4* stage = stages + block % STAGES * STAGE;
        for (u32 i = thread; i < MANY_TILES * QUANTS; i += THREADS) {
            const u8* tile = weights + min(first_tile + i / QUANTS, m.tiles - 1) * tile_bytes;
            copy_async(stage + i, tile + ((u64)block * QUANTS + i % QUANTS) * 16);
        }
        if (FORMAT != BF16 && thread < MANY_TILES * 4) {
            const u8* tile = weights + min(first_tile + thread / 4, m.tiles - 1) * tile_bytes;
            const u8* scales = tile + (u64)m.blocks * quant_bytes<FORMAT>() + (u64)block * 64;
            copy_async(stage + MANY_TILES * QUANTS + thread, scales + thread % 4 * 16);
        }
        uint4* to = stage + MANY_TILES * (QUANTS + SCALES);
        for (int r = 0; r < 4; ++r) {
            u32 row = thread / 8 + 32 * r;
            // Odd rows have their halves exchanged, so that eight lanes, of two rows, read from all banks.
            for (int p = 0; p < PARTS && row < rows_read; ++p)
                copy_async(to + (row * PARTS + p) * 8 + (thread % 8 ^ (row % 2 * 4)), rows[r] + ROW_CHUNKS * block + 8 * p);
        }
    };

    const u32 warp_tile = warp % 2 * 4, warp_row = warp / 2 * 32;
    float sums[4][4][4], total[4][4][4]; // [tiles, 8 rows, as of multiply_add]
    for (int t = 0; t < 4; ++t)
        for (int r = 0; r < 4; ++r)
            for (int i = 0; i < 4; ++i)
                sums[t][r][i] = total[t][r][i] = 0.0f;
    for (u32 block = 0; block < STAGES - 1; ++block) {
        if (block < m.blocks)
            fetch(block);
        copy_group();
    }
    u32 segment = 0;
    for (u32 block = 0; block < m.blocks; ++block) {
        copy_wait<STAGES - 2>();
        // What everybody copied is there, and nobody reads the stage before it any more.
        __syncthreads();
        if (block + STAGES - 1 < m.blocks)
            fetch(block + STAGES - 1);
        copy_group();
        if (warp_row < item.rows) {
            const uint4* stage = stages + block % STAGES * STAGE;
            const u32* scales = (const u32*)(stage + MANY_TILES * QUANTS);
            const uint4* x_stage = stage + MANY_TILES * (QUANTS + SCALES);
#pragma unroll
            for (int g = 0; g < 2; ++g) {
                uint4 x8[4][PARTS];
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    u32 row = warp_row + r * 8 + lane / 4;
#pragma unroll
                    for (int p = 0; p < PARTS; ++p)
                        x8[r][p] = x_stage[(row * PARTS + p) * 8 + ((g * 4 + lane % 4) ^ (row % 2 * 4))];
                }
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    const uint4* quants = stage + (warp_tile + t) * QUANTS;
                    Weights w;
                    if (FORMAT == BF16) {
                        w = decode<FORMAT>(quants[64 * g + lane], quants[64 * g + 32 + lane], 0);
                    } else {
                        u32 scale = scales[(warp_tile + t) * 16 + g * 8 + lane / 4];
                        if (FORMAT == INT8) {
                            w = decode<FORMAT>(quants[32 * g + lane], quants[lane], scale);
                        } else {
                            uint2 half = ((const uint2*)quants)[2 * lane + g];
                            w = decode<FORMAT>(make_uint4(half.x, half.y, 0, 0), make_uint4(0, 0, 0, 0), scale);
                        }
                    }
#pragma unroll
                    for (int r = 0; r < 4; ++r)
                        multiply<FORMAT>(sums[t][r], w, x8[r]);
                }
            }
        }
        while (segment < SEGMENTS && (segment + 1) * m.blocks / SEGMENTS <= block + 1) {
            ++segment;
            for (int t = 0; t < 4; ++t)
                for (int r = 0; r < 4; ++r)
                    for (int i = 0; i < 4; ++i) {
                        total[t][r][i] += sums[t][r][i];
                        sums[t][r][i] = 0.0f;
                    }
        }
    }
#pragma unroll
    for (int t = 0; t < 4; t += GATED ? 2 : 1)
        for (int r = 0; r < 4; ++r)
            for (int i = 0; i < 4; ++i) {
                const u32 tile = first_tile + warp_tile + t;
                const u32 row = warp_row + r * 8 + lane % 4 * 2 + i % 2;
                const u32 at = tile / (GATED ? 2 : 1) * 16 + i / 2 * 8 + lane / 4;
                const u64 slot = item.first + row;
                if (tile >= m.tiles || row >= item.rows)
                    continue;
                if (GATED)
                    write_gated((u16*)out + slot * out_width * PARTS, at, total[t][r][i], total[(t + 1) % 4][r][i]);
                else if (at < m.outputs)
                    ((float*)out)[slot * out_width + at] = total[t][r][i];
            }
}

#define KERNEL(NAME, SHAPE, FORMAT, GATED, PER_SM)                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, PER_SM)                                                               \
        NAME(const Item* items, const u8* base, const u16* x, const u32* row_of, void* out, Matrix m, u32 out_width)            \
    {                                                                                                                           \
        SHAPE<FORMAT, GATED>(items, base, x, row_of, out, m, out_width);                                                        \
    }
KERNEL(gate_up_few_bf16, few, BF16, true, 2)
KERNEL(gate_up_few_int8, few, INT8, true, 2)
KERNEL(gate_up_few_int4, few, INT4, true, 2)
KERNEL(gate_up_many_bf16, many, BF16, true, 1)
KERNEL(gate_up_many_int8, many, INT8, true, 1)
KERNEL(gate_up_many_int4, many, INT4, true, 1)
KERNEL(linear_few_bf16, few, BF16, false, 2)
KERNEL(linear_few_int8, few, INT8, false, 2)
KERNEL(linear_few_int4, few, INT4, false, 2)
KERNEL(linear_many_bf16, many, BF16, false, 1)
KERNEL(linear_many_int8, many, INT8, false, 1)
KERNEL(linear_many_int4, many, INT4, false, 1)
