// The instructions that CUDA C++ has no words for, one function each; everything else is plain C++. They exist since sm_80.
// Source: PTX ISA, sections "ld.global.nc", "cp.async", "mma.sync" (m16n8k16, bf16) and "cvt".

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// The shared memory that a launch asks for.
__device__ __forceinline__ uint4* dynamic_shared()
{
    extern __shared__ uint4 memory[];
    return memory;
}

// 16 bytes that are read once: past the first-level cache, which keeps what is read again.
__device__ __forceinline__ uint4 load_once(const void* from)
{
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(from));
    return v;
}

// Starts copying 16 bytes from global to shared memory.
__device__ __forceinline__ void copy_async(void* to_shared, const void* from)
{
    u32 to = (u32)__cvta_generic_to_shared(to_shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Ends a group of copies: those this thread has started since the last group.
__device__ __forceinline__ void copy_group()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING>
__device__ __forceinline__ void copy_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// sums += a * b, by a whole warp: a is [16 outputs, 16 inputs], b [16 inputs, 8 rows], both bf16, sums [16 outputs, 8 rows] f32.
// Of lane = 4 * i + j:
//   a.x: output i,     inputs 2j and 2j + 1      b.x: inputs 2j and 2j + 1, row i
//   a.y: output i + 8, inputs 2j and 2j + 1      b.y: inputs 2j + 8 and 2j + 9, row i
//   a.z: output i,     inputs 2j + 8 and 2j + 9  sums: output i, rows 2j and 2j + 1; output i + 8, rows 2j and 2j + 1
//   a.w: output i + 8, inputs 2j + 8 and 2j + 9
__device__ __forceinline__ void multiply_add(float (&sums)[4], uint4 a, uint2 b)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

// The bf16 nearest to x, ties to even.
__device__ __forceinline__ u16 to_bf16(float x)
{
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Two bf16 in one word, `low` in the lower half.
__device__ __forceinline__ u32 to_bf16_pair(float low, float high)
{
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// a * b + c of both halves.
__device__ __forceinline__ u32 fma_bf16_pair(u32 a, u32 b, u32 c)
{
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
