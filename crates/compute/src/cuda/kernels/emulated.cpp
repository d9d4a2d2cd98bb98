// Runs a kernel of ffn.cu on the CPU, lane by lane, so that its indices and its order of summation are tested where there is no
// GPU. Every lane is a coroutine; a warp's lanes meet at tensor core steps, a block's at __syncthreads. Copies are made at once, so
// a missing wait is not noticed, nor what only a GPU does: alignment, memory it may not read, speed.
//
// Reads from standard input, writes what the kernel wrote to standard output. See `emulated` in crates/compute/src/cuda/tests.rs.

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <ucontext.h>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct Index { u32 x, y; };

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

static Index threadIdx, blockIdx;
static std::vector<uint4> dynamic;

struct Lane {
    ucontext_t context; // where it starts
    jmp_buf place;      // where it goes on; jumping is quicker than changing contexts, which asks the system
    bool started;
    std::vector<char> stack;
    bool ended;
};
struct Meeting { u32 arrived, generation; };

static std::vector<Lane> lanes;
static ucontext_t first;
static jmp_buf scheduler;
static Meeting warps[32], block;
static void (*body)();

static void meet(Meeting& meeting, u32 all)
{
    u32 generation = meeting.generation, self = threadIdx.x;
    if (++meeting.arrived == all) {
        meeting.arrived = 0;
        ++meeting.generation;
    }
    while (meeting.generation == generation) {
        if (!_setjmp(lanes[self].place))
            _longjmp(scheduler, 1);
        threadIdx.x = self;
    }
}

static void start()
{
    u32 self = threadIdx.x;
    body();
    lanes[self].ended = true;
    _longjmp(scheduler, 1);
}

// Lets a lane run until it waits or ends.
static void resume(Lane& lane)
{
    if (_setjmp(scheduler))
        return;
    if (lane.started)
        _longjmp(lane.place, 1);
    lane.started = true;
    swapcontext(&first, &lane.context);
}

static void run_block(u32 threads)
{
    lanes = std::vector<Lane>(threads);
    for (Lane& lane : lanes) {
        lane.stack.resize(64 << 10);
        lane.started = lane.ended = false;
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack.data();
        lane.context.uc_stack.ss_size = lane.stack.size();
        makecontext(&lane.context, start, 0);
    }
    for (bool any = true; any;) {
        any = false;
        for (u32 i = 0; i < threads; ++i) {
            if (lanes[i].ended)
                continue;
            any = true;
            threadIdx.x = i;
            resume(lanes[i]);
        }
    }
}

static void __syncthreads() { meet(block, lanes.size()); }
static float __uint_as_float(u32 bits) { float f; memcpy(&f, &bits, 4); return f; }
static u32 bits_of(float f) { u32 bits; memcpy(&bits, &f, 4); return bits; }
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static u32 min(u32 a, u32 b) { return a < b ? a : b; }

// What ptx.cu says in instructions.
static uint4* dynamic_shared() { return dynamic.data(); }
static uint4 load_once(const void* from) { uint4 v; memcpy(&v, from, 16); return v; }
static void copy_async(void* to, const void* from) { memcpy(to, from, 16); }
static void copy_group() {}
template <int PENDING> static void copy_wait() {}
static u16 to_bf16(float x)
{
    u32 bits = bits_of(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static u32 to_bf16_pair(float low, float high) { return (u32)to_bf16(high) << 16 | to_bf16(low); }
static float half_of(u32 pair, u32 half) { return __uint_as_float(half ? pair & 0xffff0000u : pair << 16); }
static u32 fma_bf16_pair(u32 a, u32 b, u32 c)
{
    return to_bf16_pair(fmaf(half_of(a, 0), half_of(b, 0), half_of(c, 0)), fmaf(half_of(a, 1), half_of(b, 1), half_of(c, 1)));
}
// Sums in f32 over ascending inputs; a GPU's order within a step is its own.
static void multiply_add(float (&sums)[4], uint4 a, uint2 b)
{
    static uint4 as_of[2][32][32];
    static uint2 bs_of[2][32][32];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, i = lane / 4, j = lane % 4;
    // Two in turn: who writes one again has met the others, who have read it, in between.
    u32 turn = warps[warp].generation % 2;
    auto as = as_of[turn][warp];
    auto bs = bs_of[turn][warp];
    as[lane] = a;
    bs[lane] = b;
    meet(warps[warp], 32);
    for (u32 sum = 0; sum < 4; ++sum) {
        u32 output = i + sum / 2 * 8, row = 2 * j + sum % 2;
        for (u32 input = 0; input < 16; ++input) {
            const uint4& wa = as[output % 8 * 4 + input % 8 / 2];
            const uint2& wb = bs[row * 4 + input % 8 / 2];
            u32 pair = input < 8 ? (output < 8 ? wa.x : wa.y) : (output < 8 ? wa.z : wa.w);
            // The product of two bf16 is an f32, so that this is rounded once.
            sums[sum] += half_of(pair, input % 2) * half_of(input < 8 ? wb.x : wb.y, input % 2);
        }
    }
}

#include "ffn.cu"

static std::vector<u8> read_bytes()
{
    u64 len;
    if (fread(&len, 8, 1, stdin) != 1)
        exit(2);
    std::vector<u8> bytes(len);
    if (fread(bytes.data(), 1, len, stdin) != len)
        exit(2);
    return bytes;
}

static const Item* items;
static const u16* x;
static const u32* row_of;
static u8* out;
static Matrix matrix;
static u32 out_width;
static std::string name;

#define RUN(NAME) if (name == #NAME) body = [] { NAME(items, x, row_of, out, matrix, out_width); };

// Standard input: grid.y, blocks, tiles, outputs, out_width, bytes of shared memory, bytes written, each u32; then items, weights (the
// addresses of items are offsets into them), rows and row_of (none: empty), each a u64 length and bytes.
int main(int, char** args)
{
    name = args[1];
    u32 head[7];
    if (fread(head, 4, 7, stdin) != 7)
        return 2;
    std::vector<u8> item_bytes = read_bytes(), weights = read_bytes(), x_bytes = read_bytes(), index = read_bytes();
    std::vector<Item> all(item_bytes.size() / sizeof(Item));
    memcpy(all.data(), item_bytes.data(), item_bytes.size());
    for (Item& item : all) {
        item.gate_up += (u64)weights.data();
        item.down += (u64)weights.data();
    }
    items = all.data();
    x = (const u16*)x_bytes.data();
    row_of = index.empty() ? nullptr : (const u32*)index.data();
    matrix = {head[1], head[2], head[3]};
    out_width = head[4];
    dynamic.resize(head[5] / 16);
    // Memory that is not written is NaN.
    std::vector<u8> written(head[6], 0xff);
    out = written.data();
    RUN(gate_up_few_bf16) RUN(gate_up_few_int8) RUN(gate_up_few_int4) RUN(gate_up_many_bf16) RUN(gate_up_many_int8)
    RUN(gate_up_many_int4) RUN(down_few_bf16) RUN(down_few_int8) RUN(down_few_int4) RUN(down_many_bf16) RUN(down_many_int8)
    RUN(down_many_int4)
    if (!body)
        return 3;
    for (blockIdx.y = 0; blockIdx.y < head[0]; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < all.size(); ++blockIdx.x)
            run_block(THREADS);
    fwrite(written.data(), 1, written.size(), stdout);
    return 0;
}
