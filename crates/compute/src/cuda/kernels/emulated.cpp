// Runs the kernels on the CPU, lane by lane, so that their indices and their order of summation are tested where there is no
// GPU. Every lane is a coroutine; a warp's lanes meet at tensor core steps and shuffles, a block's at __syncthreads. Copies are made at
// once, so a missing wait is not noticed, nor what only a GPU does: alignment, memory it may not read, speed.
//
// A device of one piece of memory, whose first byte has an address that the host chooses. Reads what to do from standard input,
// one thing after the other, and writes what is asked for to standard output. See `Emulator` in crates/compute/src/cuda/emulator.rs.

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
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
static u32 threads; // of the block that runs
static ucontext_t first;
static jmp_buf scheduler;
static Meeting warps[32], block;
static std::function<void()> body;

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

static void run_block()
{
    if (lanes.size() < threads)
        lanes.resize(threads);
    for (u32 i = 0; i < threads; ++i) {
        Lane& lane = lanes[i];
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

static void __syncthreads() { meet(block, threads); }
static float __uint_as_float(u32 bits) { float f; memcpy(&f, &bits, 4); return f; }
static u32 bits_of(float f) { u32 bits; memcpy(&bits, &f, 4); return bits; }
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static u32 __float_as_uint(float f) { return bits_of(f); }
static u32 min(u32 a, u32 b) { return a < b ? a : b; }
static void atomicMin(u32* at, u32 value) { *at = min(*at, value); }
static u32 atomicAdd(u32* at, u32 value) { return std::exchange(*at, *at + value); }
static u64 __umul64hi(u64 a, u64 b) { return (unsigned __int128)a * b >> 64; }
template <typename T> static T __shfl_xor_sync(u32, T value, int mask)
{
    static T values_of[2][32][32];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Two in turn, as in `multiply_add`.
    T* values = values_of[warps[warp].generation % 2][warp];
    values[lane] = value;
    meet(warps[warp], 32);
    return values[lane ^ mask];
}

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
#include "router.cu"
#include "attention.cu"
#include "sampling.cu"

static void read_bytes(void* to, u64 len)
{
    if (len && fread(to, 1, len, stdin) != len)
        exit(2);
}

template <typename T> static T take()
{
    T value;
    read_bytes(&value, sizeof value);
    return value;
}

static std::vector<uint4> memory;
static u64 base;

static u8* at(u64 address) { return address ? (u8*)memory.data() + (address - base) : nullptr; }

constexpr u32 ARGUMENT = 32; // bytes

// An argument as the kernel takes it.
template <typename T> static T argument(const u8* from)
{
    if constexpr (std::is_pointer<T>::value)
        return (T)at(argument<u64>(from));
    T value;
    static_assert(sizeof value <= ARGUMENT, "an argument fits");
    memcpy(&value, from, sizeof value);
    return value;
}

// A call of `kernel` with `count` arguments, one after the other.
template <typename... A> static std::function<void()> call(void (*kernel)(A...), const u8* arguments, u32 count)
{
    if (count != sizeof...(A))
        exit(4);
    std::tuple<A...> values{argument<A>(std::exchange(arguments, arguments + ARGUMENT))...};
    return [=] { std::apply(kernel, values); };
}

using Caller = std::function<std::function<void()>(const u8*, u32)>;
#define CALLER(NAME) {#NAME, [](const u8* arguments, u32 count) { return call(NAME, arguments, count); }}
static const std::map<std::string, Caller> kernels = {
    CALLER(gate_up_few_bf16), CALLER(gate_up_few_int8), CALLER(gate_up_few_int4), CALLER(gate_up_many_bf16),
    CALLER(gate_up_many_int8), CALLER(gate_up_many_int4), CALLER(linear_few_bf16), CALLER(linear_few_int8),
    CALLER(linear_few_int4), CALLER(linear_many_bf16), CALLER(linear_many_int8), CALLER(linear_many_int4), CALLER(embed),
    CALLER(add_norm), CALLER(rotate), CALLER(choose), CALLER(copy_block), CALLER(attention_1), CALLER(attention_2),
    CALLER(attention_4), CALLER(attention_8), CALLER(attention_many), CALLER(fold), CALLER(sample),
};

// Grid's x and y, bytes of shared memory, length of the name, number of arguments, each u32; the name; the arguments.
static void launch()
{
    u32 head[5];
    read_bytes(head, sizeof head);
    std::string name(head[3], 0);
    read_bytes(&name[0], name.size());
    std::vector<u8> arguments(head[4] * ARGUMENT);
    read_bytes(arguments.data(), arguments.size());
    auto kernel = kernels.find(name);
    if (kernel == kernels.end())
        exit(3);
    body = kernel->second(arguments.data(), head[4]);
    threads = name == "sample" ? DRAW_THREADS : THREADS;
    // Shared memory is not zero at first, nor what the last block of threads left there: NaN.
    dynamic.resize(head[2] / 16);
    for (blockIdx.y = 0; blockIdx.y < head[1]; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < head[0]; ++blockIdx.x) {
            memset(dynamic.data(), 0xff, dynamic.size() * 16);
            run_block();
        }
}

// Standard input: the memory's address and its length, u64; then letters with what they need. Memory is zero at first.
int main()
{
    base = take<u64>();
    memory.resize(take<u64>() / 16);
    for (int letter; (letter = getchar()) != EOF;) {
        if (letter == 'l') {
            launch();
        } else {
            u64 address = take<u64>(), len = take<u64>();
            if (letter == 'w') {
                read_bytes(at(address), len);
            } else {
                fwrite(at(address), 1, len, stdout);
                fflush(stdout);
            }
        }
    }
    return 0;
}
