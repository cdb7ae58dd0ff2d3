// A block's product of one step: sums[row][sequence] = Σ_k weights[row][k] · published[sequence][k]. Weights lie in
// shared memory; what was published is read by X::load straight into registers, each number once by one warp of the
// block.
//
// Product<T, m, n> makes 16·m rows of 8·n sequences. `place` says where a weight lies. `multiply` is one warp's part,
// of chunks first ≤ i < last of the plan's depth; it writes part[sequence][part_row(m)], rows fastest. Sequences from
// `sequences` on count as zero and are not read.
#pragma once

#include "device.h"
#include "plan.h"

namespace fastlm::cuda {

// Loads [kSteps][kRows] groups of kLoad bytes, `row_step` rows apart, `step` groups apart, zeros where not `wanted`.
template <class X, int kSteps, int kRows, class Wanted>
__device__ void load(uint4 (&to)[kSteps][kRows], const uint4* from, int64_t row_step, int step, const Wanted& wanted) {
#pragma unroll
  for (int s = 0; s < kSteps; ++s)
#pragma unroll
    for (int j = 0; j < kRows; ++j)
      to[s][j] = wanted(s, j) ? X::load(from + j * row_step + s * step) : uint4{0, 0, 0, 0};
}

// By tensor cores. The two products of a chunk take the depth in another order than it lies in memory, the same for
// both operands, so that each thread loads kLoad bytes in one piece: lane 4·r + q holds bytes 16q to 16q + 15 of row r.
template <class T, int m, int n>
struct TensorProduct {
  using Number = T;
  static constexpr bool kTensorCore = true;
  static constexpr int kRows = 16 * m, kSequences = 8 * n;

  // Operands lie in shared memory in the order of chunk, tile, half of the tile, lane: no bank conflicts.
  __device__ static int place(int row, int k, int) {
    constexpr int each = kLoad / sizeof(T), chunk = kChunk / sizeof(T);
    const int lane = row % 8 * 4 + k % chunk / each;
    return (((k / chunk * m + row / 16) * 2 + row % 16 / 8) * 32 + lane) * each + k % each;
  }

  __device__ static T operand(T x) {
    if constexpr (sizeof(T) == 4)
      return round_tf32(x);
    else
      return x;
  }

  template <class X>
  __device__ static void multiply(const T* weights, const T* published, int sequences, const Plan& plan, int first,
                                  int last, float* part) {
    constexpr int kSteps = 8 / n;  // chunks that are loaded while those before them are multiplied
    const int lane = int(threadIdx.x) % 32, row = lane / 4, quarter = lane % 4;
    const int width = plan.row * int(sizeof(T)) / kLoad;
    const uint4* a = reinterpret_cast<const uint4*>(weights) + lane;
    const uint4* b = reinterpret_cast<const uint4*>(published) + int64_t(row) * width + quarter;
    float sums[m][n][4] = {};
    uint4 now[kSteps][n], next[kSteps][n];
    const auto load_from = [&](int chunk) {
      load<X>(next, b + chunk * 4, int64_t(8) * width, 4,
              [&](int s, int j) { return chunk + s < last && row + 8 * j < sequences; });
    };
    load_from(first);
    for (int chunk = first; chunk < last; chunk += kSteps) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
#pragma unroll
        for (int j = 0; j < n; ++j) now[s][j] = next[s][j];
      load_from(chunk + kSteps);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (chunk + s >= last) break;
#pragma unroll
        for (int i = 0; i < m; ++i) {
          const uint4 low = a[((chunk + s) * m + i) * 64], high = a[((chunk + s) * m + i) * 64 + 32];
#pragma unroll
          for (int j = 0; j < n; ++j) mma(T(), sums[i][j], low.x, high.x, low.y, high.y, now[s][j].x, now[s][j].y);
#pragma unroll
          for (int j = 0; j < n; ++j) mma(T(), sums[i][j], low.z, high.z, low.w, high.w, now[s][j].z, now[s][j].w);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
      for (int j = 0; j < n; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          part[(j * 8 + quarter * 2 + e % 2) * part_row(m) + i * 16 + row + e / 2 * 8] = sums[i][j][e];
  }
};

// By fused multiply-add, in float32 and float64 as they are: 8 lanes across the rows, 4 across the sequences.
template <class T, int m, int n>
struct ScalarProduct {
  using Number = T;
  static constexpr bool kTensorCore = false;
  static constexpr int kRows = 16 * m, kSequences = 8 * n;
  static constexpr int kEach = kLoad / sizeof(T);

  __device__ static int place(int row, int k, int depth) { return row * (depth + kEach) + k; }
  __device__ static T operand(T x) { return x; }

  template <class X>
  __device__ static void multiply(const T* weights, const T* published, int sequences, const Plan& plan, int first,
                                  int last, T* part) {
    constexpr int kSteps = kChunk / kLoad;
    const int lane = int(threadIdx.x) % 32, row = lane / 4, column = lane % 4, width = plan.depth / kEach;
    const uint4* a = reinterpret_cast<const uint4*>(weights) + row * (width + 1);
    const uint4* b = reinterpret_cast<const uint4*>(published) + int64_t(column) * plan.row / kEach;
    T sums[2 * m][2 * n] = {};
    for (int chunk = first; chunk < last; ++chunk) {
      uint4 found[kSteps][2 * n];
      load<X>(found, b + chunk * kSteps, int64_t(4) * plan.row / kEach, 1,
              [&](int, int j) { return column + 4 * j < sequences; });
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
#pragma unroll
        for (int i = 0; i < 2 * m; ++i) {
          const uint4 loaded = a[8 * i * (width + 1) + chunk * kSteps + s];
          const T* x = reinterpret_cast<const T*>(&loaded);
#pragma unroll
          for (int j = 0; j < 2 * n; ++j)
#pragma unroll
            for (int e = 0; e < kEach; ++e) sums[i][j] += x[e] * reinterpret_cast<const T*>(&found[s][j])[e];
        }
    }
#pragma unroll
    for (int i = 0; i < 2 * m; ++i)
#pragma unroll
      for (int j = 0; j < 2 * n; ++j) part[(column + 4 * j) * part_row(m) + row + 8 * i] = sums[i][j];
  }
};

}  // namespace fastlm::cuda
