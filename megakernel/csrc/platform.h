// The only file that knows what runs the kernel: a GPU (nvcc or NVRTC, inline PTX) or the CPU runtime of the tests
// (g++, MK_CPU). It gives element types, loads with a cache policy, one tensor-core product, and the few operations
// between blocks. It knows nothing of the model.
#pragma once

#ifdef MK_CPU
#include "cucpu.h"
#define MK_DEV inline
#define MK_SIZE constexpr
#define MK_UNROLL
#else
#define MK_DEV __device__ __forceinline__
#define MK_SIZE __host__ __device__ constexpr
#define MK_UNROLL _Pragma("unroll")
#define MK_KERNEL(name, Args) extern "C" __global__ void __launch_bounds__(THREADS, 1) name(const __grid_constant__ Args args)
#endif

namespace mk {

typedef unsigned int u32;
typedef unsigned long long u64;

// ---- elements: what weights, KV and activations between phases are stored in ----------------------------------------

#ifdef MK_FLOAT  // the fp32 instance, for comparisons on the CPU
struct Element {
    float value;
};
MK_DEV float widen(Element x) { return x.value; }
MK_DEV Element narrow(float x) { return Element{x}; }
#else
struct Element {  // bfloat16
    unsigned short bits;
};
MK_DEV float widen(Element x) { return __uint_as_float(u32(x.bits) << 16); }
MK_DEV Element narrow(float x) {  // round to nearest even; a NaN stays one
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return Element{(unsigned short)(bits >> 16 | 0x40u)};
    return Element{(unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
#endif

struct alignas(8 * sizeof(Element)) Fragment {  // one lane's part of a 16 x 16 weight tile; 16 bytes in bf16
    Element e[8];
};
struct alignas(4 * sizeof(Element)) Quad {  // one lane's part of a 16 x 8 activation tile
    Element e[4];
};

MK_DEV Quad narrow4(float4 x) { return Quad{{narrow(x.x), narrow(x.y), narrow(x.z), narrow(x.w)}}; }

// ---- PTX or its stand-in --------------------------------------------------------------------------------------------

#ifdef MK_CPU

MK_DEV int thread() { return threadIdx.x; }
MK_DEV Fragment load_weights(const Fragment* p, bool real = true) { return real ? *p : Fragment{}; }
MK_DEV Quad load_quad(const Quad* p, bool real) { return real ? *p : Quad{}; }
#define MK_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
MK_DEV void mma(float (&d)[4], const Fragment& a, const Quad& b, MK_CALLER) {
#ifdef MK_FLOAT
    cucpu::mma_m16n8k16<float>(d, (const float*)a.e, (const float*)b.e, file, line);
#else
    cucpu::mma_m16n8k16<cucpu::bfloat16>(d, (const cucpu::bfloat16*)a.e, (const cucpu::bfloat16*)b.e, file, line);
#endif
}
MK_DEV u32 load_acquire(const u32* p) { return cucpu::load_acquire(p); }
MK_DEV void add_release(u32* p, u32 v) { cucpu::add_release(p, v); }
MK_DEV u64 nanoseconds() { return cucpu::nanoseconds(); }
MK_DEV void pause(u32, MK_CALLER) { cucpu::spin(file, line); }
MK_DEV void stop() { cucpu::trap("the grid barrier timed out"); }
MK_DEV void wait_for_previous_kernel() {}
MK_DEV void let_next_kernel_start() {}
MK_DEV char* shared_memory() { return (char*)cucpu::shared_memory(); }
#define MK_KERNEL(name, Args) \
    void name(Args args);     \
    CUCPU_KERNEL(name, Args)  \
    void name(Args args)

#else

// threadIdx.x, read anew each time: what compilers compute from it ahead of the phases' loop is more than registers hold.
MK_DEV int thread() {
    int t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    __builtin_assume(t >= 0 && t < THREADS);
    return t;
}
// Weights are read once a frame: past L1, through the read-only path (the kernel never writes them).
// What is not real is zeros and is not read, by a predicate and no branch: behind a branch the compiler waits for each
// load before it requests the next one.
MK_DEV Fragment load_weights(const Fragment* p, bool real = true) {
    union {
        uint4 v;
        Fragment f;
    } x;
    asm volatile(
        "{.reg .pred real; setp.ne.u32 real, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
        "@real ld.global.nc.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4];}"
        : "=&r"(x.v.x), "=&r"(x.v.y), "=&r"(x.v.z), "=&r"(x.v.w)
        : "l"(p), "r"(u32(real)));
    return x.f;
}
MK_DEV Quad load_quad(const Quad* p, bool real) {
    union {
        uint2 v;
        Quad q;
    } x;
    asm volatile(
        "{.reg .pred real; setp.ne.u32 real, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0;"
        "@real ld.global.v2.b32 {%0,%1}, [%2];}"
        : "=&r"(x.v.x), "=&r"(x.v.y)
        : "l"(p), "r"(u32(real)));
    return x.q;
}
// d += A B with A 16 x 16 (weights), B 16 x 8 (eight columns); fragment layout: PTX ISA, mma.m16n8k16.
MK_DEV void mma(float (&d)[4], const Fragment& a, const Quad& b) {
    const u32* x = (const u32*)a.e;
    const u32* y = (const u32*)b.e;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
}
MK_DEV u32 load_acquire(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
MK_DEV void add_release(u32* p, u32 v) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MK_DEV u64 nanoseconds() {
    u64 t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}
MK_DEV void pause(u32 polls) {
    if (polls > 256) __nanosleep(20);
}
MK_DEV void stop() {
    __threadfence_system();  // the report must have reached the host
    asm volatile("trap;");
}
MK_DEV void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
MK_DEV void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
MK_DEV char* shared_memory() {
    extern __shared__ __align__(128) char bytes[];
    return bytes;
}

#endif

// ---- what both share ------------------------------------------------------------------------------------------------

constexpr int LANES = 32;
constexpr int WARPS = THREADS / LANES;
constexpr float NEGATIVE_INFINITY = __builtin_bit_cast(float, 0xff800000u);  // NVRTC knows no INFINITY

MK_DEV float add_over(float v, int from, int below) {  // sum over the lanes that differ in the bits from .. below/2
    for (int bit = from; bit < below; bit *= 2) v += __shfl_xor_sync(0xffffffffu, v, bit);
    return v;
}

MK_DEV float max_over(float v, int from, int below) {
    for (int bit = from; bit < below; bit *= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, bit));
    return v;
}

}  // namespace mk
