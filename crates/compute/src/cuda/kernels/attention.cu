// Grouped-query attention over the paged KV cache, for prompts and for single tokens.
//
// A query sees the keys of its sequence in chunks of CHUNK_TOKENS by absolute position. What it draws from a chunk is a record:
// values times weights, [quads] float4, then the largest score and the sum of weights. `attention` writes records, grid (tasks, KV
// heads); a task is a tile, some rows (query, query head of the group) of one sequence, at one of its chunks; all rows of a tile share
// each load of a key and of a value. `fold` makes of a row's records the result, grid (rows, KV heads).
//
// One order of summation, whatever the shape of the work. A score is one chain over ascending elements. In a chunk, weights are added
// up lane by lane over blocks of 32 keys, lanes by halves; values in a chain for each block, from zero, and blocks in ascending
// order. Records are scaled to the largest score of all and added up in RUNS runs, every RUNS-th chunk in ascending order, and these in
// ascending order. Chunks, blocks, lanes and runs are parts of a position, so that a query's bits depend on its position
// and what lies before it: not on its tile, its batch mates, or the cut of its prompt. Keys that a row does not see have
// a weight of -1 and are left out, for what lies there may be no number.

constexpr u32 CHUNK_TOKENS = 256;
constexpr int CHUNK_BLOCKS = CHUNK_TOKENS / BLOCK_TOKENS;
constexpr int RUNS = WARPS;
constexpr int MANY_QUERY_ROWS = 64; // of heads of up to 128 elements, else half
constexpr int SHARED_ROWS = 16;     // rows that share a lane's keys

struct Tile {
    u32 token;  // the batch's token that is the sequence's first
    u32 start;  // its position
    u32 table;  // where the sequence's blocks begin among all
    u32 first;  // row of the tile's first one: query * group + query head of the group
    u32 rows;
    u32 chunk;  // the first one that a row sees
    u32 chunks; // to the last one that a row sees
    u32 record; // its first record
};

struct Task {
    u32 tile; // NO_TILE: there is nothing to do
    u32 chunk;
};

constexpr u32 NO_TILE = 0xffffffffu;

// Positions that a query sees.
struct Seen {
    u32 from, to;
};

__device__ __forceinline__ u32 position_of(const Tile& tile, u32 row, const Heads& h)
{
    return tile.start + (tile.first + row) / h.group();
}

__device__ __forceinline__ Seen seen_from(u32 position, const Heads& h)
{
    const u32 to = position + 1;
    return {to > h.window ? to - h.window : 0, to};
}

// A row's record of a chunk.
__device__ __forceinline__ u64 record_of(const Tile& tile, u32 row, u32 kv_head, u32 chunk, u32 quads)
{
    return (tile.record + ((u64)kv_head * tile.chunks + (chunk - tile.chunk)) * tile.rows + row) * (quads + 1);
}

// 16 bytes of the cache, which are read by one warp alone or by several.
template <bool ONCE>
__device__ __forceinline__ float4 read(const float4* from)
{
    if (!ONCE)
        return *from;
    uint4 v = load_once(from);
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

// Copies the queries of a tile to shared memory, [rows, quads]; rows there are none of are zero.
__device__ __forceinline__ void read_queries(float4* to, u32 rows, const Tile& tile, const float* qkv, u32 kv_head, const Heads& h)
{
    const u32 padded = 4 * h.quads();
    for (u32 i = threadIdx.x; i < rows * padded; i += THREADS) {
        const u32 row = i / padded, at = i % padded;
        float value = 0.0f;
        if (row < tile.rows && at < h.dim) {
            const u32 query = (tile.first + row) / h.group(), member = (tile.first + row) % h.group();
            value = qkv[(u64)(tile.token + query) * h.width + (kv_head * h.group() + member) * h.dim + at];
        }
        ((float*)to)[i] = value;
    }
}

// sums += q * k of ROWS rows and a lane's KEYS keys. Reads AHEAD elements times 4 of each key at once.
template <int ROWS, int KEYS, int AHEAD>
__device__ __forceinline__ void score(float (&sums)[ROWS][KEYS], const float4* q, const float4* const (&keys)[KEYS], u32 quads)
{
    for (u32 first = 0; first < quads; first += AHEAD) {
        float4 k[AHEAD][KEYS];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a)
#pragma unroll
            for (int i = 0; i < KEYS; ++i)
                k[a][i] = read<KEYS == 1>(keys[i] + min(first + a, quads - 1) * BLOCK_TOKENS);
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            if (first + a >= quads)
                break;
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const float4 x = q[r * quads + first + a];
#pragma unroll
                for (int i = 0; i < KEYS; ++i) {
                    sums[r][i] = fmaf(x.x, k[a][i].x, sums[r][i]);
                    sums[r][i] = fmaf(x.y, k[a][i].y, sums[r][i]);
                    sums[r][i] = fmaf(x.z, k[a][i].z, sums[r][i]);
                    sums[r][i] = fmaf(x.w, k[a][i].w, sums[r][i]);
                }
            }
        }
    }
}

// Replaces the scores of a row, [CHUNK_TOKENS], by their weights, and writes the largest score and the sum of weights. By a warp.
__device__ __forceinline__ void soften(float* scores, u32 chunk, Seen seen, float4* record, u32 quads)
{
    const u32 lane = threadIdx.x % 32, first = chunk * CHUNK_TOKENS + lane;
    float most = __uint_as_float(0xff800000u);
#pragma unroll
    for (int b = 0; b < CHUNK_BLOCKS; ++b) {
        const u32 position = first + b * BLOCK_TOKENS;
        if (position >= seen.from && position < seen.to)
            most = fmaxf(most, scores[b * BLOCK_TOKENS + lane]);
    }
    most = warp_max(most);
    float sum = 0.0f;
#pragma unroll
    for (int b = 0; b < CHUNK_BLOCKS; ++b) {
        const u32 position = first + b * BLOCK_TOKENS;
        float weight = -1.0f;
        if (position >= seen.from && position < seen.to) {
            weight = exp_of(scores[b * BLOCK_TOKENS + lane] - most);
            sum += weight;
        }
        scores[b * BLOCK_TOKENS + lane] = weight;
    }
    sum = warp_sum(sum);
    if (lane == 0)
        record[quads] = make_float4(most, sum, 0.0f, 0.0f);
}

template <bool ALL>
__device__ __forceinline__ void add_weighted(float4& sum, float weight, const float4& v)
{
    if (!ALL && weight < 0.0f)
        return;
    sum.x = fmaf(weight, v.x, sum.x);
    sum.y = fmaf(weight, v.y, sum.y);
    sum.z = fmaf(weight, v.z, sum.z);
    sum.w = fmaf(weight, v.w, sum.w);
}

// sums += weights * values over the keys of a block. A lane has every 32nd quad of the values, of which a row has up to SPANS * 32;
// rows of weights are CHUNK_TOKENS apart. ALL: every row sees every key. Reads AHEAD values at once.
template <int ROWS, int SPANS, int AHEAD, bool ONCE, bool ALL>
__device__ __forceinline__ void weigh(float4 (&sums)[ROWS][SPANS], const float* weights, const float4* values, u32 quads)
{
    const u32 lane = threadIdx.x % 32;
    for (u32 first = 0; first < BLOCK_TOKENS; first += AHEAD) {
        float4 v[AHEAD][SPANS];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a)
#pragma unroll
            for (int s = 0; s < SPANS; ++s)
                v[a][s] = read<ONCE>(values + (first + a) * quads + min(lane + 32 * s, quads - 1));
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int a = 0; a < AHEAD; a += 4) {
                const float4 w = *(const float4*)(weights + r * CHUNK_TOKENS + first + a);
#pragma unroll
                for (int s = 0; s < SPANS; ++s) {
                    add_weighted<ALL>(sums[r][s], w.x, v[a][s]);
                    add_weighted<ALL>(sums[r][s], w.y, v[a + 1][s]);
                    add_weighted<ALL>(sums[r][s], w.z, v[a + 2][s]);
                    add_weighted<ALL>(sums[r][s], w.w, v[a + 3][s]);
                }
            }
        }
    }
}

__device__ __forceinline__ void add(float4& sum, const float4& x)
{
    sum.x += x.x;
    sum.y += x.y;
    sum.z += x.z;
    sum.w += x.w;
}

// What a block of threads has to do.
struct Work {
    Tile tile;
    u32 chunk;
    u32 kv_head;
    const u32* table; // the sequence's blocks
    const float* cache;
    Seen first, last; // of the tile's first row and its last
    __device__ Work(const Task* tasks, const Tile* tiles, const u32* tables, const float* layer, const Heads& h)
        : tile(tiles[tasks[blockIdx.x].tile]), chunk(tasks[blockIdx.x].chunk), kv_head(blockIdx.y), table(tables + tile.table),
          cache(layer), first(seen_from(position_of(tile, 0, h), h)), last(seen_from(position_of(tile, tile.rows - 1, h), h))
    {
    }
    // Position of the first key of block `index` of the chunk.
    __device__ u32 position(u32 index) const { return chunk * CHUNK_TOKENS + index * BLOCK_TOKENS; }
    // Whether any row sees any key of the block, and whether every row sees all.
    __device__ bool any(u32 index) const { return position(index) < last.to && position(index) + BLOCK_TOKENS > first.from; }
    __device__ bool all(u32 index) const { return position(index) >= last.from && position(index) + BLOCK_TOKENS <= first.to; }
    // Keys of the block, then its values; of another block when no row sees it.
    __device__ const float4* block(u32 index, const Heads& h) const
    {
        return (const float4*)(cache + place_of(any(index) ? table[position(index) / BLOCK_TOKENS] : 0, kv_head, h));
    }
};

// Up to ROWS rows: each warp has a block of the chunk, each lane a key of it and then some elements of all its values. The cache is
// read once, straight into registers.
template <int ROWS, int SPANS>
__device__ __forceinline__ void attend_few(const Work& work, const float* qkv, float4* records, const Heads& h)
{
    const u32 quads = h.quads(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float4* const q = (float4*)dynamic_shared();             // [ROWS, quads]
    float* const weights = (float*)(q + ROWS * quads);       // [ROWS, CHUNK_TOKENS]
    float4* const blocks = (float4*)(weights + ROWS * CHUNK_TOKENS); // [CHUNK_BLOCKS, ROWS, quads]
    read_queries(q, ROWS, work.tile, qkv, work.kv_head, h);
    __syncthreads();

    const bool any = work.any(warp);
    const float4* const block = work.block(warp, h);
    float scores[ROWS][1];
    for (int r = 0; r < ROWS; ++r)
        scores[r][0] = 0.0f;
    if (any) {
        const float4* const keys[1] = {block + lane};
        score<ROWS, 1, 8>(scores, q, keys, quads);
    }
    for (int r = 0; r < ROWS; ++r)
        weights[r * CHUNK_TOKENS + threadIdx.x] = scores[r][0];
    __syncthreads();

    if (warp < work.tile.rows) {
        float4* record = records + record_of(work.tile, warp, work.kv_head, work.chunk, quads);
        const Seen seen = seen_from(position_of(work.tile, warp, h), h);
        soften(weights + warp * CHUNK_TOKENS, work.chunk, seen, record, quads);
    }
    __syncthreads();

    float4 sums[ROWS][SPANS];
    for (int r = 0; r < ROWS; ++r)
        for (int s = 0; s < SPANS; ++s)
            sums[r][s] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const float4* const values = block + quads * BLOCK_TOKENS;
    if (any && work.all(warp))
        weigh<ROWS, SPANS, 8 / SPANS, true, true>(sums, weights + warp * BLOCK_TOKENS, values, quads);
    else if (any)
        weigh<ROWS, SPANS, 8 / SPANS, true, false>(sums, weights + warp * BLOCK_TOKENS, values, quads);
    for (int r = 0; r < ROWS; ++r)
        for (int s = 0; s < SPANS; ++s)
            if (lane + 32 * s < quads)
                blocks[(warp * ROWS + r) * quads + lane + 32 * s] = sums[r][s];
    __syncthreads();
    for (u32 i = threadIdx.x; i < work.tile.rows * quads; i += THREADS) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int b = 0; b < CHUNK_BLOCKS; ++b)
            add(sum, blocks[b * ROWS * quads + i]);
        records[record_of(work.tile, i / quads, work.kv_head, work.chunk, quads) + i % quads] = sum;
    }
}

// Up to MANY_QUERY_ROWS / SPANS rows: a warp has SHARED_ROWS of them and some blocks of the chunk, each lane a key of each; then some
// rows and all blocks. What several warps read they find in the first-level cache.
template <int SPANS>
__device__ __forceinline__ void attend_many(const Work& work, const float* qkv, float4* records, const Heads& h)
{
    constexpr int ROWS = MANY_QUERY_ROWS / SPANS;
    constexpr int GROUPS = ROWS / SHARED_ROWS, TOGETHER = WARPS / GROUPS; // warps that have the same rows
    constexpr int BLOCKS = CHUNK_BLOCKS / TOGETHER;
    constexpr int OWN = ROWS / WARPS;
    const u32 quads = h.quads(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float4* const q = (float4*)dynamic_shared();       // [ROWS, quads]
    float* const weights = (float*)(q + ROWS * quads); // [ROWS, CHUNK_TOKENS]
    read_queries(q, ROWS, work.tile, qkv, work.kv_head, h);
    __syncthreads();

    const u32 first_row = warp / TOGETHER * SHARED_ROWS, first_block = warp % TOGETHER * BLOCKS;
    if (first_row < work.tile.rows) {
        const float4* keys[BLOCKS];
        float scores[SHARED_ROWS][BLOCKS];
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
            keys[b] = work.block(first_block + b, h) + lane;
#pragma unroll
            for (int r = 0; r < SHARED_ROWS; ++r)
                scores[r][b] = 0.0f;
        }
        score<SHARED_ROWS, BLOCKS, 1>(scores, q + first_row * quads, keys, quads);
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
            for (int r = 0; r < SHARED_ROWS; ++r)
                weights[(first_row + r) * CHUNK_TOKENS + (first_block + b) * BLOCK_TOKENS + lane] = scores[r][b];
    }
    __syncthreads();

    for (u32 row = warp * OWN; row < min((warp + 1) * OWN, work.tile.rows); ++row) {
        float4* record = records + record_of(work.tile, row, work.kv_head, work.chunk, quads);
        const Seen seen = seen_from(position_of(work.tile, row, h), h);
        soften(weights + row * CHUNK_TOKENS, work.chunk, seen, record, quads);
    }
    __syncthreads();
    if (warp * OWN >= work.tile.rows)
        return;

    float4 sums[OWN][SPANS];
#pragma unroll
    for (int r = 0; r < OWN; ++r)
#pragma unroll
        for (int s = 0; s < SPANS; ++s)
            sums[r][s] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (u32 b = 0; b < CHUNK_BLOCKS; ++b) {
        if (!work.any(b))
            continue;
        float4 own[OWN][SPANS];
#pragma unroll
        for (int r = 0; r < OWN; ++r)
#pragma unroll
            for (int s = 0; s < SPANS; ++s)
                own[r][s] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const float4* values = work.block(b, h) + quads * BLOCK_TOKENS;
        const float* block_weights = weights + warp * OWN * CHUNK_TOKENS + b * BLOCK_TOKENS;
        if (work.all(b))
            weigh<OWN, SPANS, 4, false, true>(own, block_weights, values, quads);
        else
            weigh<OWN, SPANS, 4, false, false>(own, block_weights, values, quads);
#pragma unroll
        for (int r = 0; r < OWN; ++r)
#pragma unroll
            for (int s = 0; s < SPANS; ++s)
                add(sums[r][s], own[r][s]);
    }
#pragma unroll
    for (int r = 0; r < OWN; ++r) {
        const u32 row = warp * OWN + r;
        if (row >= work.tile.rows)
            break;
        float4* record = records + record_of(work.tile, row, work.kv_head, work.chunk, quads);
#pragma unroll
        for (int s = 0; s < SPANS; ++s)
            if (lane + 32 * s < quads)
                record[lane + 32 * s] = sums[r][s];
    }
}

#define ATTENTION(NAME, PER_SM, SHORT, LONG)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, PER_SM)                                                               \
        NAME(const Task* tasks, const Tile* tiles, const u32* tables, const float* qkv, const float* cache, float4* records,    \
             Heads h)                                                                                                           \
    {                                                                                                                           \
        if (tasks[blockIdx.x].tile == NO_TILE)                                                                                  \
            return;                                                                                                             \
        const Work work(tasks, tiles, tables, cache, h);                                                                        \
        if (h.dim <= 128)                                                                                                       \
            SHORT(work, qkv, records, h);                                                                                       \
        else                                                                                                                    \
            LONG(work, qkv, records, h);                                                                                        \
    }
ATTENTION(attention_1, 3, (attend_few<1, 1>), (attend_few<1, 2>))
ATTENTION(attention_2, 3, (attend_few<2, 1>), (attend_few<2, 2>))
ATTENTION(attention_4, 3, (attend_few<4, 1>), (attend_few<4, 2>))
ATTENTION(attention_8, 2, (attend_few<8, 1>), (attend_few<8, 2>))
ATTENTION(attention_many, 2, attend_many<1>, attend_many<2>)

// Folds the records of rows into what their query heads attend to, and writes it to `out`, rows of the next matrix. `places`: for
// each row tile * MANY_QUERY_ROWS + its row of the tile. Warps have the runs, lanes elements.
extern "C" __global__ void __launch_bounds__(THREADS)
    fold(const u32* places, const Tile* tiles, const float4* records, u16* out, u32 blocks, Heads h)
{
    __shared__ float4 runs[RUNS][64]; // [RUNS, quads]
    __shared__ float sums[RUNS], mosts[WARPS];
    const Tile tile = tiles[places[blockIdx.x] / MANY_QUERY_ROWS];
    const u32 row = places[blockIdx.x] % MANY_QUERY_ROWS, kv_head = blockIdx.y;
    const u32 quads = h.quads(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Seen seen = seen_from(position_of(tile, row, h), h);
    const u32 from = seen.from / CHUNK_TOKENS, to = (seen.to - 1) / CHUNK_TOKENS + 1;

    float most = __uint_as_float(0xff800000u);
    for (u32 chunk = from + threadIdx.x; chunk < to; chunk += THREADS)
        most = fmaxf(most, records[record_of(tile, row, kv_head, chunk, quads) + quads].x);
    most = warp_max(most);
    if (lane == 0)
        mosts[warp] = most;
    __syncthreads();
    for (int w = 0; w < WARPS; ++w)
        most = fmaxf(most, mosts[w]);

    float sum = 0.0f;
    float4 values[2] = {make_float4(0.0f, 0.0f, 0.0f, 0.0f), make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
#pragma unroll 4
    for (u32 chunk = from + (warp + RUNS - from % RUNS) % RUNS; chunk < to; chunk += RUNS) {
        const float4* record = records + record_of(tile, row, kv_head, chunk, quads);
        const float4 about = record[quads];
        const float scale = exp_of(about.x - most);
        sum = fmaf(about.y, scale, sum);
        for (int s = 0; s < 2; ++s) {
            if (32 * s >= (int)quads)
                break;
            const float4 v = record[min(lane + 32 * s, quads - 1)];
            values[s].x = fmaf(v.x, scale, values[s].x);
            values[s].y = fmaf(v.y, scale, values[s].y);
            values[s].z = fmaf(v.z, scale, values[s].z);
            values[s].w = fmaf(v.w, scale, values[s].w);
        }
    }
    for (int s = 0; s < 2; ++s)
        if (lane + 32 * s < quads)
            runs[warp][lane + 32 * s] = values[s];
    if (lane == 0)
        sums[warp] = sum;
    __syncthreads();

    const u32 query = (tile.first + row) / h.group(), member = (tile.first + row) % h.group();
    u16* to_row = out + (u64)(tile.token + query) * blocks * (64 * PARTS);
    if (threadIdx.x < h.dim) {
        float all = 0.0f, value = 0.0f;
        for (int w = 0; w < RUNS; ++w) {
            all += sums[w];
            value += ((const float*)runs[w])[threadIdx.x];
        }
        write_parts(to_row, (kv_head * h.group() + member) * h.dim + threadIdx.x, value / all);
    }
}
