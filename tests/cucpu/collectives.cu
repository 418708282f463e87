// Every warp collective, atomic and matrix product once, each thread writing down what it got; and what must be refused.
#include "cucpu.h"

constexpr unsigned ALL = 0xffffffffu;

struct Exchange {
  const float* in;        // [threads]
  const long long* wide;  // [threads]
  float* out;             // [5, threads]
  long long* wide_out;    // [threads]
  unsigned* votes;        // [3, threads]
};

void exchange(Exchange a) {
  const int t = threadIdx.x, n = blockDim.x;
  const float v = a.in[t];
  a.out[t] = __shfl_sync(ALL, v, 5);
  a.out[n + t] = __shfl_sync(ALL, v, t * 7 + 3);
  a.out[2 * n + t] = __shfl_xor_sync(ALL, v, 12);
  a.out[3 * n + t] = __shfl_up_sync(ALL, v, 3);
  a.out[4 * n + t] = __shfl_down_sync(ALL, v, 9);
  a.wide_out[t] = __shfl_xor_sync(ALL, a.wide[t], 1);
  a.votes[t] = __ballot_sync(ALL, v > 0);
  a.votes[n + t] = __any_sync(ALL, v > 1.5f);
  a.votes[2 * n + t] = __all_sync(ALL, v > -1.5f);
}
CUCPU_KERNEL(exchange, Exchange)

struct Atomics {
  const int* values;   // [blocks * threads]
  int *sum, *low, *high, *any, *all, *last, *swapped;
  float* fsum;
};

void atomics(Atomics a) {
  const int v = a.values[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(a.sum, v);
  atomicMin(a.low, v);
  atomicMax(a.high, v);
  atomicOr(a.any, v);
  atomicAnd(a.all, v);
  atomicExch(a.last, v);
  if (atomicCAS(a.swapped, -1, v) == -1) atomicCAS(a.swapped, v, v + 1);
  atomicAdd(a.fsum, float(v));
}
CUCPU_KERNEL(atomics, Atomics)

template <class E>
struct Product {
  const E *a, *b;  // [warps, 32, 8] [warps, 32, 4], one lane's elements together
  float* d;        // [warps, 32, 4], added to
};

template <class E>
void product(Product<E> p) {
  float d[4];
  for (int i = 0; i < 4; i++) d[i] = p.d[threadIdx.x * 4 + i];
  cucpu::mma_m16n8k16(d, p.a + threadIdx.x * 8, p.b + threadIdx.x * 4);
  for (int i = 0; i < 4; i++) p.d[threadIdx.x * 4 + i] = d[i];
}
void product_bf16(Product<cucpu::bfloat16> p) { product(p); }
void product_fp32(Product<float> p) { product(p); }
CUCPU_KERNEL(product_bf16, Product<cucpu::bfloat16>)
CUCPU_KERNEL(product_fp32, Product<float>)

struct Case {
  float* out;  // [blocks * threads]
  int number;
};

// One mistake, or one corner, per number; the tests know them by these names.
enum {
  DIVERGENT, EARLY_RETURN, TWO_BARRIERS, HALF_MASK, MIXED, TRAP, TIMEOUT, SHARED, PAST_SHARED, MISALIGNED, ROUND,
  HANDED_OVER, NOT_HANDED_OVER,
};

void mistakes(Case c) {
  const int t = threadIdx.x;
  float* shared = (float*)cucpu::shared_memory();
  float& out = c.out[blockIdx.x * blockDim.x + t];
  switch (c.number) {
    case DIVERGENT:
      if (t != 7) __syncthreads();  // divergent
      if (t == 7) __syncwarp();
      break;
    case EARLY_RETURN:
      if (t == 40) return;
      __syncthreads();  // early return
      break;
    case TWO_BARRIERS:
      if (t < 32) {
        __syncthreads();  // upper
      } else {
        __syncthreads();  // lower
      }
      break;
    case HALF_MASK:
      if (t < 16) __shfl_sync(0x0000ffffu, out, 0);  // half mask
      break;
    case MIXED:
      out = t % 2 ? __shfl_xor_sync(ALL, out, 2) : float(__ballot_sync(ALL, 1));
      break;
    case TRAP:
      if (blockIdx.x == 1 && t == 3) cucpu::trap("three is not allowed");
      __syncthreads();
      break;
    case TIMEOUT: {
      const unsigned long long start = cucpu::nanoseconds();
      while (cucpu::nanoseconds() - start < 2000000000ull) cucpu::spin();
      cucpu::trap("two seconds are over");
    }
    case SHARED:
      out = shared[t];
      break;
    case PAST_SHARED:
      shared[t + 1] = 1;  // past shared
      break;
    case MISALIGNED:
      if (t == 1) out = reinterpret_cast<const float4*>(c.out + t)->w;  // misaligned
      break;
    case ROUND:
      out = cucpu::to_float(cucpu::to_bfloat16(out));
      break;
    case HANDED_OVER:
      if (t % 32 == 0) shared[t / 32] = 1;
      __syncwarp();
      out = shared[t / 32];
      break;
    case NOT_HANDED_OVER:
      if (t % 32 == 0) shared[t / 32] = 1;  // written
      __shfl_sync(ALL, t, 0);
      out = shared[t / 32];  // read
      break;
  }
}
CUCPU_KERNEL(mistakes, Case)
