// A small persistent kernel for the tests of the compiler: packed weights, a tensor-core product, a grid barrier.
#include "toy.h"

extern "C" __global__ void __launch_bounds__(THREADS, 1) steps(const __grid_constant__ Arguments a) {
    extern __shared__ uint4 tile[];
    __shared__ float sums[THREADS / 32];
    float d[4] = {0, 0, 0, 0};
    for (unsigned step = 0; step < STEPS; ++step) {
        uint4 weights = load_weights(a.weights + (step * gridDim.x + blockIdx.x) * THREADS + threadIdx.x);
        tile[threadIdx.x] = weights;
        __syncthreads();
        uint4 other = tile[threadIdx.x ^ 1];
        multiply(d, weights, other.x, other.y);
        meet(a.arrived, (a.launched * STEPS + step + 1) * gridDim.x);
    }
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = d[0] + d[1];
    __syncthreads();
    a.out[blockIdx.x * THREADS + threadIdx.x] = d[2] + d[3] + sums[0] + EPSILON;
}

extern "C" __global__ void clear(const __grid_constant__ Arguments a) { a.out[threadIdx.x] = 0; }

#ifdef SPILL  // more live values than registers
extern "C" __global__ void __launch_bounds__(1024, 2) crowded(const __grid_constant__ Arguments a) {
    float held[64];
    for (int i = 0; i < 64; ++i) held[i] = a.out[i * 1024 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 64; ++i) a.out[i * 1024 + threadIdx.x] = held[(i * 7) & 63] * held[63 - i];
}
#endif
