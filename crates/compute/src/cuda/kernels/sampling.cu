// Draws tokens from logits, as crates/compute/src/sampling/mod.rs says it step by step, with the bits of the CPU's code there.
//
// A row is a block of threads, which read it several times; what they add up are integers, so that no order of adding changes a sum.
// The tokens that `top_k` and `top_p` keep are found in the ordered numbers of the logits, by sums over 11 bits at a time, and the
// drawn one in the sums of ever smaller ranges of ids.

constexpr int DRAW_THREADS = 1024;
constexpr u32 DRAW_WARPS = DRAW_THREADS / 32;
constexpr u32 BINS = 2048;
constexpr u32 MOST_REPORTED = 20;
constexpr u32 NONE = 0xffffffffu;

// How a row is drawn from, as `Draw` says. Lists and sets are at these words, counted from the first draw on.
struct Draw {
    u64 uniform;
    u64 share; // `top_p` times 2^64; 0 when it keeps all
    float temperature;
    float min_p;
    float repetition;
    float frequency;
    float presence;
    u32 top_k;
    u32 report;    // how many; NONE when nothing is reported
    u32 seen;      // a bit for each token; NONE when there is no set
    u32 allowed;   // the same
    u32 generated; // pairs of id and count
    u32 generated_count;
    u32 bias; // pairs of id and f32
    u32 bias_count;
    u32 unused;
};

struct Candidate {
    u32 id;
    float logit;
};

// What a row gives, as `Drawn` and `Report` say.
struct Drawn {
    u32 id; // NONE when logits are not all finite, or nothing is allowed
    float logit;
    float largest;
    u32 unused;
    u64 sum;
    Candidate top[MOST_REPORTED];
};

// What the threads of a block write for each other.
struct Draft {
    u64 of_warps[DRAW_WARPS];
    // Lower and upper half of each bin's sum.
    u32 low[BINS];
    u32 high[BINS];
};

// The worst of those that are kept, best first: its ordered number, and its id.
struct Least {
    u32 key;
    u32 id;
    __device__ bool keeps(u32 i, float x) const
    {
        const u32 own = ordered(x);
        return own > key || (own == key && i <= id);
    }
};

__device__ __forceinline__ u64 warp_sum(u64 x)
{
#pragma unroll
    for (int half = 16; half > 0; half /= 2)
        x += __shfl_xor_sync(ALL_LANES, x, half);
    return x;
}

// The largest, and the sum, of what the threads have. What they wrote before, all of them see after.
__device__ u64 block_max(u64 x, Draft& draft)
{
    x = warp_max(x);
    __syncthreads(); // others may still read what was there
    if (threadIdx.x % 32 == 0)
        draft.of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_max(draft.of_warps[threadIdx.x % 32]);
}

__device__ u64 block_sum(u64 x, Draft& draft)
{
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        draft.of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(draft.of_warps[threadIdx.x % 32]);
}

// A weight as an integer.
__device__ __forceinline__ u64 whole(float weight) { return (u64)(weight * 1099511627776.0f); }

__device__ __forceinline__ bool has(const u32* set, u32 id) { return set[id / 32] >> id % 32 & 1; }

// The first index at which the sum of the amounts up to it exceeds `target`, which is less than that of all `count`. Of `target` there
// remains what those before leave of it.
template <typename Amount>
__device__ u32 reach(u32 count, u64& target, Draft& draft, Amount amount)
{
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 from = 0, to = count;
    while (from + 1 < to) {
        const u32 part = (to - from + DRAW_WARPS - 1) / DRAW_WARPS, start = from + warp * part, end = min(start + part, to);
        u64 sum = 0;
        for (u32 i = start + lane; i < end; i += 32)
            sum += amount(i);
        sum = warp_sum(sum);
        __syncthreads();
        if (lane == 0)
            draft.of_warps[warp] = sum;
        __syncthreads();
        for (u32 w = 0; w + 1 < DRAW_WARPS && target >= draft.of_warps[w]; ++w) {
            target -= draft.of_warps[w];
            from += part;
        }
        to = min(from + part, to);
    }
    return from;
}

// The first, best first, with which the sum of the amounts comes to `goal`, or where there is a share to that share of the sum of all.
// The amounts of equals are the same or 0.
template <typename Amount>
__device__ Least least(const float* row, u32 width, u64 share, u64 goal, Draft& draft, Amount amount)
{
    u32 key = 0;
    u64 target = goal - 1;
    for (int level = 0; level < 3; ++level) {
        const u32 shift = level == 0 ? 21 : level == 1 ? 10 : 0, bins = level < 2 ? BINS : BINS / 2;
        for (u32 i = threadIdx.x; i < bins; i += DRAW_THREADS)
            draft.low[i] = draft.high[i] = 0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < width; i += DRAW_THREADS) {
            const float x = row[i];
            const u32 own = ordered(x), bin = bins - 1 - (own >> shift) % bins;
            // The bits above are those that were found.
            if ((own ^ key) >> shift >= bins)
                continue;
            const u64 value = amount(i, x);
            const u32 low = (u32)value, before = low ? atomicAdd(&draft.low[bin], low) : 0;
            const u32 high = (u32)(value >> 32) + (before + low < before);
            if (high)
                atomicAdd(&draft.high[bin], high);
        }
        __syncthreads();
        const auto of_bin = [&](u32 i) { return (u64)draft.high[i] << 32 | draft.low[i]; };
        if (level == 0 && share) {
            u64 sum = 0;
            for (u32 i = threadIdx.x; i < bins; i += DRAW_THREADS)
                sum += of_bin(i);
            sum = __umul64hi(share, block_sum(sum, draft));
            target = sum ? sum - 1 : 0;
        }
        key |= (bins - 1 - reach(bins, target, draft, of_bin)) << shift;
    }
    const auto of_equal = [&](u32 i) { return ordered(row[i]) == key ? amount(i, row[i]) : (u64)0; };
    return {key, reach(width, target, draft, of_equal)};
}

// Copies a row to `raw`, and reports of it all but the drawn token's logit.
__device__ void report(const float* row, u32 width, u32 count, float* raw, Drawn* drawn, Draft& draft)
{
    u64 own = 0;
    for (u32 i = threadIdx.x; i < width; i += DRAW_THREADS) {
        raw[i] = row[i];
        const u64 other = candidate(row[i], i);
        own = other > own ? other : own;
    }
    const float largest = from_ordered((u32)(block_max(own, draft) >> 32));
    u64 sum = 0;
    for (u32 i = threadIdx.x; i < width; i += DRAW_THREADS)
        sum += whole(exp_of(row[i] - largest));
    sum = block_sum(sum, draft);
    if (threadIdx.x == 0) {
        drawn->largest = largest;
        drawn->sum = sum;
    }
    for (u32 rank = 0; rank < min(count, width); ++rank) {
        const u64 best = block_max(own, draft);
        if (own != best)
            continue;
        drawn->top[rank] = {NONE - (u32)best, from_ordered((u32)(best >> 32))};
        own = 0;
        for (u32 i = threadIdx.x; i < width; i += DRAW_THREADS) {
            const u64 other = candidate(row[i], i);
            own = other < best && other > own ? other : own;
        }
    }
}

// Applies penalties and biases to a row.
__device__ void change(float* row, u32 width, const Draw& d, const u32* words)
{
    if (d.seen != NONE)
        for (u32 i = threadIdx.x; i < width; i += DRAW_THREADS)
            if (has(words + d.seen, i))
                row[i] = row[i] > 0.0f ? row[i] / d.repetition : row[i] * d.repetition;
    __syncthreads();
    for (u32 i = threadIdx.x; i < d.generated_count; i += DRAW_THREADS) {
        const u32* pair = words + d.generated + 2 * i;
        row[pair[0]] = row[pair[0]] - d.frequency * (float)pair[1] - d.presence;
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < d.bias_count; i += DRAW_THREADS) {
        const u32* pair = words + d.bias + 2 * i;
        row[pair[0]] += __uint_as_float(pair[1]);
    }
    __syncthreads();
}

// The id that is drawn at a temperature above 0, of logits whose largest is `largest`.
__device__ u32 draw_from(const float* row, u32 width, float largest, const Draw& d, Draft& draft)
{
    Least kept = {0, NONE};
    const auto weight = [&](float x) { return exp_of((x - largest) / d.temperature); };
    if (d.top_k && d.top_k < width)
        kept = least(row, width, 0, d.top_k, draft, [](u32, float) { return (u64)1; });
    if (d.share)
        kept = least(row, width, d.share, 1, draft, [&](u32 i, float x) { return kept.keeps(i, x) ? whole(weight(x)) : (u64)0; });
    const auto amount = [&](u32 i) {
        const float x = row[i];
        if (!kept.keeps(i, x))
            return (u64)0;
        const float own = weight(x);
        return own < d.min_p ? (u64)0 : whole(own);
    };
    u64 sum = 0;
    for (u32 i = threadIdx.x; i < width; i += DRAW_THREADS)
        sum += amount(i);
    u64 target = __umul64hi(d.uniform, block_sum(sum, draft));
    return reach(width, target, draft, amount);
}

// Draws from each row of `logits`, [rows, width], which it changes, by its draw. `raws`, of the same shape, is written for rows that are
// reported. A block of DRAW_THREADS for each row.
extern "C" __global__ void __launch_bounds__(DRAW_THREADS)
    sample(float* logits, u32 width, const Draw* draws, float* raws, Drawn* out)
{
    __shared__ Draft draft;
    const Draw d = draws[blockIdx.x];
    const u32* words = (const u32*)draws;
    float* row = logits + (u64)blockIdx.x * width;
    float* raw = raws + (u64)blockIdx.x * width;
    Drawn* drawn = out + blockIdx.x;
    if (d.report != NONE)
        report(row, width, d.report, raw, drawn, draft);
    change(row, width, d, words);
    u64 best = 0;
    for (u32 i = threadIdx.x; i < width; i += DRAW_THREADS) {
        float x = row[i];
        // The largest number of all for what is not finite.
        u64 own = is_finite(x) ? candidate(x, i) : ~0ull;
        if (d.allowed != NONE && own != ~0ull && !has(words + d.allowed, i)) {
            row[i] = x = __uint_as_float(0xff800000u);
            own = candidate(x, i);
        }
        best = own > best ? own : best;
    }
    best = block_max(best, draft);
    const float largest = from_ordered((u32)(best >> 32));
    u32 id = NONE - (u32)best;
    if (best == ~0ull || !is_finite(largest))
        id = NONE;
    else if (d.temperature != 0.0f)
        id = draw_from(row, width, largest, d, draft);
    if (threadIdx.x == 0) {
        drawn->id = id;
        if (d.report != NONE && id != NONE)
            drawn->logit = raw[id];
    }
}
