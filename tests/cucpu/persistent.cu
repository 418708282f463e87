// A persistent kernel in small: layers of { RMSNorm, product, grid barrier, product and residual, grid barrier } over one
// vector, with the mistakes that such kernels are known for, one at a time.
#include "cucpu.h"

enum Bug { NONE, NO_BARRIER, NO_WAIT, RESET, ONE_ROW_TOO_MANY, NO_BLOCK_BARRIER, NO_SPIN };

struct Args {
  const float *norm, *up, *down;  // [L,H] [L,I,H] [L,H,I]
  float *x, *mid;                 // [H] [I]
  unsigned* counter;              // only grows
  unsigned arrived;               // where the counter stands when the launch begins
  int layers, hidden, inter, bug;
};

void meet_all_blocks(const Args& a, unsigned& target) {
  __syncthreads();
  if (threadIdx.x == 0) {
    target += gridDim.x;
    cucpu::add_release(a.counter, 1);  // arrive
    while (!(a.bug == NO_WAIT && blockIdx.x == 1) && int(cucpu::load_acquire(a.counter) - target) < 0) {
      if (a.bug != NO_SPIN) cucpu::spin();  // wait here
    }
  }
  __syncthreads();  // meet again
}

float add_over_warp(float v) {
  for (int bit = 16; bit; bit /= 2) v += __shfl_xor_sync(0xffffffffu, v, bit);
  return v;
}

void persistent(Args a) {
  float* vector = (float*)cucpu::shared_memory();
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int first = blockIdx.x * warps + threadIdx.x / 32, step = gridDim.x * warps;
  unsigned target = a.arrived;
  if (a.bug == RESET && blockIdx.x == 0 && threadIdx.x == 0) *a.counter = 0;  // reset here
  for (int layer = 0; layer < a.layers; layer++) {
    float squares = 0;
    for (int i = lane; i < a.hidden; i += 32) squares += a.x[i] * a.x[i];  // read x
    const float scale = rsqrtf(add_over_warp(squares) / a.hidden + 1e-6f);
    for (int i = threadIdx.x; i < a.hidden; i += blockDim.x) {
      vector[i] = a.x[i] * scale * a.norm[layer * a.hidden + i];  // write vector
    }
    if (a.bug != NO_BLOCK_BARRIER) __syncthreads();
    for (int row = first; row < a.inter + (a.bug == ONE_ROW_TOO_MANY && layer + 1 == a.layers); row += step) {
      const float* w = a.up + (size_t(layer) * a.inter + row) * a.hidden;
      float sum = 0;
      for (int i = lane; i < a.hidden; i += 32) sum += w[i] * vector[i];  // read up
      sum = add_over_warp(sum);
      if (lane == 0) a.mid[row] = fmaxf(sum, 0.0f);  // write mid
    }
    if (a.bug != NO_BARRIER) meet_all_blocks(a, target);
    for (int row = first; row < a.hidden; row += step) {
      const float* w = a.down + (size_t(layer) * a.hidden + row) * a.inter;
      float sum = 0;
      for (int i = lane; i < a.inter; i += 32) sum += w[i] * a.mid[i];  // read mid
      sum = add_over_warp(sum);
      if (lane == 0) a.x[row] += sum;  // write x
    }
    meet_all_blocks(a, target);
  }
}
CUCPU_KERNEL(persistent, Args)
