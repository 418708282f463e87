// What a kernel sees: the names of CUDA C++ that our kernels use, run by runtime.cpp with one fiber per CUDA thread.
//
// Left out on purpose, so that using it does not compile: static __shared__ variables (take cucpu::shared_memory()),
// __threadfence (order memory with add_release and load_acquire), __ldg (stale for data that the same kernel writes).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __device__
#define __host__
#define __global__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __shared__ _Pragma("GCC error \"cucpu: no static __shared__ variables; take cucpu::shared_memory()\"")

// ---- vector types ----------------------------------------------------------------------------------------------------
// With CUDA's alignment: the asan flavour reports a misaligned 8- or 16-byte access, which faults on a GPU.

struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- the running thread ----------------------------------------------------------------------------------------------

namespace cucpu {

struct bfloat16 { uint16_t bits; };

// The operands of one warp's mma; every lane puts its own elements in place.
struct alignas(64) MmaOperands {
  float a[16][16];
  float b[16][8];
};

struct Thread {
  uint3 thread, block;
  dim3 block_size, grid_size;
  unsigned lane;
  unsigned loads;  // load_acquire calls since the thread last waited
  MmaOperands* operands;
};

extern Thread* current;

void changed_memory();  // an atomic that others may be waiting for
[[noreturn]] void too_many_loads(const char* file, int line);
uint64_t shuffle(unsigned mask, uint64_t value, unsigned source, const char* what, const char* file, int line);
unsigned ballot(unsigned mask, bool predicate, const char* what, const char* file, int line);
void mma(float* d, const char* file, int line);

// ---- what platform.h maps its primitives onto ------------------------------------------------------------------------
// `file` and `line` are where a report says that the thread waits. A wrapper passes on its caller's:
//   inline void wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { ... cucpu::spin(file, line); }

// The block's dynamic shared memory: 128-byte aligned, all bytes 0xff (so every float a NaN) when the block starts.
void* shared_memory();

// Once per failed poll of every polling loop: lets others run, and finds out that nobody ever will. What is polled must
// change by an atomic or add_release.
void spin(const char* file = __builtin_FILE(), int line = __builtin_LINE());

// Ends the launch; the caller gets `message` with the block and the thread.
[[noreturn]] void trap(const char* message);

// The launch's own clock, the same in every run: it stands still while threads compute, and a poll takes 10 us, so that a
// kernel's own timeout of seconds comes in milliseconds.
unsigned long long nanoseconds();

inline unsigned load_acquire(const unsigned* address, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  constexpr unsigned kLoadsWithoutWait = 1u << 24;  // nobody else runs meanwhile, so a loop without spin() is endless
  if (++current->loads > kLoadsWithoutWait) too_many_loads(file, line);
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}

inline void add_release(unsigned* address, unsigned value) {
  __atomic_fetch_add(address, value, __ATOMIC_RELEASE);
  changed_memory();
}

inline unsigned add_acq_rel(unsigned* address, unsigned value) {
  unsigned before = __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
  changed_memory();
  return before;
}

inline float to_float(float value) { return value; }

inline float to_float(bfloat16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

// Nearest, ties to even; a NaN stays a NaN.
inline bfloat16 to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// d += A B for the whole warp, in the fragment layout of PTX mma.m16n8k16 (row.col). With g = lane / 4, t = lane % 4:
//   a [8]  A(g, 2t) A(g, 2t+1) A(g+8, 2t) A(g+8, 2t+1), then the same with columns + 8
//   b [4]  B(2t, g) B(2t+1, g) B(2t+8, g) B(2t+9, g)
//   d [4]  D(g, 2t) D(g, 2t+1) D(g+8, 2t) D(g+8, 2t+1), fp32
template <class E>
inline void mma_m16n8k16(float (&d)[4], const E* a, const E* b, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
  static_assert(std::is_same_v<E, bfloat16> || std::is_same_v<E, float>, "mma_m16n8k16 takes bfloat16 or float");
  const unsigned g = current->lane / 4, t = current->lane % 4;
  MmaOperands& warp = *current->operands;
  float* upper = &warp.a[g][2 * t];
  float* lower = &warp.a[g + 8][2 * t];
  upper[0] = to_float(a[0]), upper[1] = to_float(a[1]), lower[0] = to_float(a[2]), lower[1] = to_float(a[3]);
  upper[8] = to_float(a[4]), upper[9] = to_float(a[5]), lower[8] = to_float(a[6]), lower[9] = to_float(a[7]);
  warp.b[2 * t][g] = to_float(b[0]), warp.b[2 * t + 1][g] = to_float(b[1]);
  warp.b[2 * t + 8][g] = to_float(b[2]), warp.b[2 * t + 9][g] = to_float(b[3]);
  mma(d, file, line);
}

// ---- kernels ---------------------------------------------------------------------------------------------------------

// One entry of the list in which cucpu_launch looks up a name.
struct Kernel {
  const char* name;
  size_t args_size;
  void (*run)(const void* args);
  const Kernel* next;
  Kernel(const char* name, size_t args_size, void (*run)(const void* args));
};

template <class T>
inline T shuffle_as(unsigned mask, T value, unsigned source, const char* what, const char* file, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof(T));
  word = shuffle(mask, word, source, what, file, line);
  memcpy(&value, &word, sizeof(T));
  return value;
}

// CUDA's atomics order nothing but themselves.
template <class T, class F>
inline T update(T* address, F change) {
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do {
    after = change(before);
  } while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  if (memcmp(&before, &after, sizeof(T)) != 0) changed_memory();  // else it may be a poll
  return before;
}

template <class T>
using Same = std::common_type_t<T>;  // lets atomicAdd(unsigned*, 1) find T from the pointer alone

}  // namespace cucpu

// After `void name(Args args)`: makes it known to cucpu_launch.
#define CUCPU_KERNEL(name, Args)                                                                       \
  static const cucpu::Kernel cucpu_kernel_##name(#name, sizeof(Args), [](const void* cucpu_args) {     \
    name(*static_cast<const Args*>(cucpu_args));                                                       \
  });

#define threadIdx (cucpu::current->thread)
#define blockIdx (cucpu::current->block)
#define blockDim (cucpu::current->block_size)
#define gridDim (cucpu::current->grid_size)

// ---- barriers and warp collectives -----------------------------------------------------------------------------------
// All 32 lanes must meet in the same call on the same line; another mask is refused. As on a GPU only __syncthreads and
// __syncwarp order memory: shuffles, votes and mma do not.

#define CUCPU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

void __syncthreads(CUCPU_HERE);
void __syncwarp(unsigned mask = 0xffffffffu, CUCPU_HERE);

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, CUCPU_HERE) {
  return cucpu::shuffle_as(mask, value, unsigned(source) % 32, "__shfl_sync", file, line);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, CUCPU_HERE) {
  return cucpu::shuffle_as(mask, value, (cucpu::current->lane ^ unsigned(lanes)) % 32, "__shfl_xor_sync", file, line);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, CUCPU_HERE) {
  const unsigned lane = cucpu::current->lane;
  return cucpu::shuffle_as(mask, value, delta <= lane ? lane - delta : lane, "__shfl_up_sync", file, line);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, CUCPU_HERE) {
  const unsigned lane = cucpu::current->lane;
  return cucpu::shuffle_as(mask, value, delta < 32 - lane ? lane + delta : lane, "__shfl_down_sync", file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUCPU_HERE) {
  return cucpu::ballot(mask, predicate != 0, "__ballot_sync", file, line);
}
inline int __any_sync(unsigned mask, int predicate, CUCPU_HERE) {
  return cucpu::ballot(mask, predicate != 0, "__any_sync", file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUCPU_HERE) {
  return cucpu::ballot(mask, predicate != 0, "__all_sync", file, line) == 0xffffffffu;
}

// ---- atomics ---------------------------------------------------------------------------------------------------------

template <class T>
inline T atomicAdd(T* address, cucpu::Same<T> value) {
  return cucpu::update(address, [=](T old) { return T(old + value); });
}
template <class T>
inline T atomicMin(T* address, cucpu::Same<T> value) {
  return cucpu::update(address, [=](T old) { return std::min(old, value); });
}
template <class T>
inline T atomicMax(T* address, cucpu::Same<T> value) {
  return cucpu::update(address, [=](T old) { return std::max(old, value); });
}
template <class T>
inline T atomicOr(T* address, cucpu::Same<T> value) {
  return cucpu::update(address, [=](T old) { return old | value; });
}
template <class T>
inline T atomicAnd(T* address, cucpu::Same<T> value) {
  return cucpu::update(address, [=](T old) { return old & value; });
}
template <class T>
inline T atomicExch(T* address, cucpu::Same<T> value) {
  return cucpu::update(address, [=](T) { return value; });
}
template <class T>
inline T atomicCAS(T* address, cucpu::Same<T> expected, cucpu::Same<T> value) {
  return cucpu::update(address, [=](T old) { return old == expected ? value : old; });
}

// ---- bits and arithmetic ---------------------------------------------------------------------------------------------

using std::max;
using std::min;

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }
inline int __float_as_int(float value) { return int(__float_as_uint(value)); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned((uint64_t(x) * y) >> 32); }

// Built with -ffp-contract=off, so that each of these rounds once, as its name says.
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

template <class T>
T __ldg(const T*) __attribute__((error("cucpu: __ldg may read stale data that this kernel wrote; use a plain load")));
void __threadfence() __attribute__((error("cucpu: no fences; order memory with add_release and load_acquire")));
