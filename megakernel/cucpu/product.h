// The arithmetic of mma_m16n8k16, once for a whole warp.
#pragma once
#include "state.h"

namespace cucpu {

typedef float Row __attribute__((vector_size(32)));

// Eight rows at a time: their sums stay in registers.
__attribute__((target_clones("avx2", "default"))) static void multiply(const MmaOperands& operands, Row* product) {
  for (int rows = 0; rows < 16; rows += 8) {
    Row sum[8] = {};
    for (int k = 0; k < 16; k++) {
      const Row b = *reinterpret_cast<const Row*>(operands.b[k]);
#pragma GCC unroll 8
      for (int m = 0; m < 8; m++) sum[m] += operands.a[rows + m][k] * b;
    }
#pragma GCC unroll 8
    for (int m = 0; m < 8; m++) product[rows + m] = sum[m];
  }
}

// d += a b for all lanes of a warp; products[lane] points at the four elements that the lane holds.
inline void multiply_for_warp(Warp& warp) {
  alignas(32) float product[16][8];
  multiply(warp.operands, reinterpret_cast<Row*>(product));
  for (unsigned lane = 0; lane < kWarp; lane++) {
    const unsigned row = lane / 4, column = lane % 4 * 2;
    float* d = warp.products[lane];
    d[0] += product[row][column];
    d[1] += product[row][column + 1];
    d[2] += product[row + 8][column];
    d[3] += product[row + 8][column + 1];
  }
}

}  // namespace cucpu
