// What a router computes between its matrices, which are `linear` of ffn.cu: embedding, residual stream, RMSNorm, rotation, the writes
// of the KV cache, the gate's choice. Attention is in attention.cu, drawing in sampling.cu.
//
// Everything here is written out in single additions and fused multiply-adds, without a function whose rounding is a platform's own, so
// that a CPU that runs it comes to the same bits. Sums of a row have an order that depends on its width alone: a thread
// adds up every THREADS-th element in ascending order, the lanes of a warp are added up by halves, and warps in ascending order.

constexpr u32 ALL_LANES = 0xffffffffu;
constexpr int WARPS = THREADS / 32;
constexpr u32 BLOCK_TOKENS = 32; // of a block of the KV cache, as many as a warp has lanes

// Attention's heads, and where they lie in a row of queries, keys and values.
struct Heads {
    u32 heads;
    u32 kv_heads;
    u32 dim;
    u32 window; // tokens that a token sees, itself included; the largest number when there is no limit
    u32 k_at;   // where a row's keys begin
    u32 v_at;
    u32 width; // of a row
    __device__ u32 group() const { return heads / kv_heads; }
    __device__ u32 quads() const { return (dim + 3) / 4; }
};

// Where a KV head's part of a block begins, in a layer of the cache: keys, [quads, BLOCK_TOKENS, 4], so that lanes that have a key each
// read whole lines; then values, [BLOCK_TOKENS, quads, 4], so that lanes that have elements each do. What pads a head is zero.
__device__ __forceinline__ u64 place_of(u32 block, u32 kv_head, const Heads& h)
{
    return ((u64)block * h.kv_heads + kv_head) * (2 * BLOCK_TOKENS * 4) * h.quads();
}

__device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int half = 16; half > 0; half /= 2)
        x += __shfl_xor_sync(ALL_LANES, x, half);
    return x;
}

__device__ __forceinline__ float warp_max(float x)
{
#pragma unroll
    for (int half = 16; half > 0; half /= 2)
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, half));
    return x;
}

__device__ __forceinline__ u64 warp_max(u64 x)
{
#pragma unroll
    for (int half = 16; half > 0; half /= 2) {
        u64 other = __shfl_xor_sync(ALL_LANES, x, half);
        x = other > x ? other : x;
    }
    return x;
}

// e^x as crates/compute/src/exp.rs has it, bit for bit.
__device__ __forceinline__ float exp_of(float x)
{
    const float shift = 12582912.0f;
    float shifted = fmaf(x, 1.44269504f, shift);
    float n = shifted - shift;
    float r = fmaf(n, 2.1219444e-4f, fmaf(n, -0.6933594f, x));
    float p = 1.9875691e-4f;
    p = fmaf(p, r, 1.3982e-3f);
    p = fmaf(p, r, 8.333452e-3f);
    p = fmaf(p, r, 4.1665796e-2f);
    p = fmaf(p, r, 1.6666665e-1f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(r * r, p, r) + 1.0f;
    // 2^(n - 1), as its bits; the other half of the factor keeps the largest results finite.
    u32 exponent = (__float_as_uint(shifted) - __float_as_uint(shift) + 126u) << 23;
    float result = p * __uint_as_float(exponent) * 2.0f;
    result = x < -86.6f ? 0.0f : result;
    result = x > 88.7f ? __uint_as_float(0x7f800000u) : result;
    return x != x ? x : result;
}

__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7fffffffu) < 0x7f800000u; }

// A number that is larger for what is larger in the order of all f32, NaN at its ends.
__device__ __forceinline__ u32 ordered(float x)
{
    u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered(u32 number)
{
    return __uint_as_float(number & 0x80000000u ? number & 0x7fffffffu : ~number);
}

// One number for a value and its index, larger for the better of two: the larger value, of equals the lower index.
__device__ __forceinline__ u64 candidate(float x, u32 index) { return (u64)ordered(x) << 32 | (0xffffffffu - index); }

// Writes the embedding of each token to `hidden`, [tokens, width]. `table` is tiles, as all matrices are. A block for each token.
extern "C" __global__ void __launch_bounds__(THREADS)
    embed(const u32* tokens, const u8* table, Matrix m, float* hidden, u32 width)
{
    const u32 token = tokens[blockIdx.x], output = token % 16;
    const u32* tile = (const u32*)(table + (u64)(token / 16) * m.blocks * quant_bytes<BF16>());
    float* row = hidden + (u64)blockIdx.x * width;
    for (u32 i = 2 * threadIdx.x; i < width; i += 2 * THREADS) {
        const u32 quad = i % 32 / 4;
        const u32 step = i / 32 * 2 + quad % 2, lane = output % 8 * 4 + quad / 2, word = output / 8 + i % 4 / 2 * 2;
        const u32 pair = tile[(step * 32 + lane) * 4 + word];
        row[i] = __uint_as_float(pair << 16);
        if (i + 1 < width)
            row[i + 1] = __uint_as_float(pair & 0xffff0000u);
    }
}

// hidden += addend, when there is one; then RMSNorm of it times `weight`, to `parts`, rows for the next matrix, and to `normed`,
// [tokens, width], when there is one. A row that is not finite becomes zeros, and its query's number in `overflows`, if larger,
// `layer`. A block for each token.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_norm(float* hidden, const float* addend, u32 width, const u32* query_of, u32* overflows, u32 layer, const float* weight,
             float epsilon, u16* parts, u32 blocks, float* normed)
{
    __shared__ float sums[WARPS];
    __shared__ u32 broken;
    if (threadIdx.x == 0)
        broken = 0;
    __syncthreads();
    float* row = hidden + (u64)blockIdx.x * width;
    const float* added = addend ? addend + (u64)blockIdx.x * width : nullptr;
    float sum = 0.0f;
    bool finite = true;
    for (u32 i = threadIdx.x; i < width; i += THREADS) {
        float x = row[i];
        if (added) {
            x += added[i];
            row[i] = x;
        }
        finite = finite && is_finite(x);
        sum = fmaf(x, x, sum);
    }
    if (!finite)
        broken = 1;
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0)
        sums[threadIdx.x / 32] = sum;
    __syncthreads();
    const bool zero = broken != 0;
    sum = 0.0f;
    for (int w = 0; w < WARPS; ++w)
        sum += sums[w];
    if (zero && threadIdx.x == 0)
        atomicMin(overflows + query_of[blockIdx.x], layer);
    const float scale = zero ? 0.0f : 1.0f / sqrtf(sum / (float)width + epsilon);
    u16* out = parts + (u64)blockIdx.x * blocks * (64 * PARTS);
    for (u32 i = threadIdx.x; i < width; i += THREADS) {
        if (zero)
            row[i] = 0.0f;
        float value = weight[i] * (row[i] * scale);
        write_parts(out, i, value);
        if (normed)
            normed[(u64)blockIdx.x * width + i] = value;
    }
}

// Rotates the queries and keys of each row of `qkv` by its `angles`, [tokens, dim / 2] cosines and sines, element i with element
// i + dim / 2. Queries stay where they are, times `scale`; keys and values go to slot slots[token] of the layer's cache. A block for
// each token.
extern "C" __global__ void __launch_bounds__(THREADS)
    rotate(float* qkv, const float2* angles, const u32* slots, float scale, float* cache, Heads h)
{
    const u32 half = h.dim / 2, quads = h.quads(), slot = slots[blockIdx.x] % BLOCK_TOKENS;
    float* row = qkv + (u64)blockIdx.x * h.width;
    const float2* angle = angles + (u64)blockIdx.x * half;
    for (u32 i = threadIdx.x; i < (h.heads + h.kv_heads) * half; i += THREADS) {
        const u32 head = i / half, at = i % half;
        float* x = head < h.heads ? row + head * h.dim : row + h.k_at + (head - h.heads) * h.dim;
        const float a = x[at], b = x[at + half], cosine = angle[at].x, sine = angle[at].y;
        const float first = a * cosine - b * sine, second = b * cosine + a * sine;
        if (head < h.heads) {
            x[at] = first * scale;
            x[at + half] = second * scale;
        } else {
            float* keys = cache + place_of(slots[blockIdx.x] / BLOCK_TOKENS, head - h.heads, h);
            keys[(at / 4 * BLOCK_TOKENS + slot) * 4 + at % 4] = first;
            keys[((at + half) / 4 * BLOCK_TOKENS + slot) * 4 + (at + half) % 4] = second;
        }
    }
    for (u32 i = threadIdx.x; i < h.kv_heads * h.dim; i += THREADS) {
        float* values = cache + place_of(slots[blockIdx.x] / BLOCK_TOKENS, i / h.dim, h) + quads * (BLOCK_TOKENS * 4);
        values[slot * quads * 4 + i % h.dim] = row[h.v_at + i];
    }
}

// The gate: replaces `logits`, [tokens, experts], by their softmax, and writes the `top_k` largest, best first, of equals the lowest
// expert first: `chosen` and `weights`, [tokens, top_k]; weights sum to 1. A warp for each token.
extern "C" __global__ void __launch_bounds__(THREADS)
    choose(float* logits, u32 tokens, u32 experts, u32 top_k, u32* chosen, float* weights)
{
    const u32 token = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= tokens)
        return;
    float* row = logits + (u64)token * experts;
    float most = __uint_as_float(0xff800000u);
    for (u32 i = lane; i < experts; i += 32)
        most = fmaxf(most, row[i]);
    most = warp_max(most);
    float sum = 0.0f;
    for (u32 i = lane; i < experts; i += 32) {
        row[i] = exp_of(row[i] - most);
        sum += row[i];
    }
    sum = warp_sum(sum);
    for (u32 i = lane; i < experts; i += 32)
        row[i] /= sum;
    u64 last = ~0ull;
    float all = 0.0f;
    for (u32 rank = 0; rank < top_k; ++rank) {
        u64 best = 0;
        for (u32 i = lane; i < experts; i += 32) {
            u64 own = candidate(row[i], i);
            // NaN of the first expert may be the largest number of all.
            if ((rank == 0 || own < last) && own > best)
                best = own;
        }
        last = best = warp_max(best);
        float weight = from_ordered((u32)(best >> 32));
        all += weight;
        if (lane == 0) {
            chosen[(u64)token * top_k + rank] = 0xffffffffu - (u32)best;
            weights[(u64)token * top_k + rank] = weight;
        }
    }
    if (lane == 0)
        for (u32 rank = 0; rank < top_k; ++rank)
            weights[(u64)token * top_k + rank] /= all;
}

// Copies a block of the KV cache, `size` times 16 bytes, in each layer; layers are `layer` times 16 bytes apart. Grid: (parts of a
// block, layers).
extern "C" __global__ void __launch_bounds__(THREADS)
    copy_block(uint4* cache, u64 layer, u32 size, u32 from, u32 to)
{
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    uint4* own = cache + blockIdx.y * layer;
    if (i < size)
        own[(u64)to * size + i] = own[(u64)from * size + i];
}
