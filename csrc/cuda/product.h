// A block's product of one step: sums[row][sequence] = Σ_k weights[row][k] · published[sequence][k]. Weights lie in
// shared memory; what was published is read by X::load straight into registers, again and again until X::complete, each
// number by one warp of the block.
//
// Product<T, m, n> makes 16·m rows of 8·n sequences. `place` says where a weight lies. `Lane` is where a thread begins,
// with chunk `first` of the depth, and `multiply` its warp's part, of `chunks` chunks from there on; it writes
// part[sequence][part_row(m)], rows fastest, and runs `meanwhile` once. Sequences from `sequences` on count as zero and
// are not read.
#pragma once

#include "device.h"
#include "plan.h"

namespace fastlm::cuda {

constexpr uint32_t kPatience = 1u << 28;  // loads

// Loads groups of kLoad bytes, `row_step` groups apart from row to row and `step` from step to step, of the first
// `steps` steps; zeros where a row is not wanted. `meanwhile` runs before they are there. Again until all of them are
// complete, all or, X::kSparing, what was not: the latter leaves L2 to the blocks that are late. What does not come at
// all ends the launch with an error after about two minutes: longer than anything else may hold a part of the GPU.
template <class X, int kSteps, int kRows, class Wanted, class Meanwhile>
__device__ void load(uint4 (&to)[kSteps][kRows], const uint4* from, int row_step, int step, int steps,
                     const Wanted& wanted, const Meanwhile& meanwhile) {
  for (uint32_t polls = 0;; ++polls) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s >= steps) break;
#pragma unroll
      for (int j = 0; j < kRows; ++j)
        to[s][j] = wanted(j) ? X::load(from + j * row_step + s * step) : uint4{0, 0, 0, 0};
    }
    if (polls == 0) meanwhile();
    bool complete = true;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s < steps) {
#pragma unroll
        for (int j = 0; j < kRows; ++j) complete &= X::complete(to[s][j]);
      }
    }
    if (complete || X::kSparing) break;
    if (polls == kPatience) __trap();
  }
  for (uint32_t polls = 0; X::kSparing; ++polls) {
    bool complete = true;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s >= steps) break;
#pragma unroll
      for (int j = 0; j < kRows; ++j)
        if (!X::complete(to[s][j])) {
          to[s][j] = X::load(from + j * row_step + s * step);
          complete = false;
        }
    }
    if (complete) break;
    if (polls == kPatience) __trap();
  }
  sync_warp();
}

// By tensor cores. The two products of a chunk take the depth in another order than it lies in memory, the same for
// both operands, so that each thread loads kLoad bytes in one piece: lane 4·r + q holds bytes 16q to 16q + 15 of row r.
template <class T, int m, int n>
struct TensorProduct {
  using Number = T;
  static constexpr bool kTensorCore = true;
  static constexpr int kRows = 16 * m, kSequences = 8 * n;
  static constexpr bool kAhead = m <= 4;  // weights are loaded ahead of the wait or of the product before

  // Operands lie in shared memory in the order of chunk, tile, product, lane, and a lane's in the order of registers:
  // no bank conflicts, no moves.
  __device__ static int place(int row, int k, int) {
    constexpr int each = kLoad / sizeof(T), chunk = kChunk / sizeof(T), word = 4 / sizeof(T);
    const int lane = row % 8 * 4 + k % chunk / each, product = k % each / (2 * word), second = k / word % 2;
    const int in_lane = (second * 2 + row % 16 / 8) * word + k % word;
    return (((k / chunk * m + row / 16) * 2 + product) * 32 + lane) * each + in_lane;
  }

  __device__ static T operand(T x) {
    if constexpr (sizeof(T) == 4)
      return round_tf32(x);
    else
      return x;
  }

  struct Lane {
    const uint4* weights;
    int64_t published;  // numbers from the first sequence's first
    int step;           // from one sequence to the eighth after it, in groups of kLoad bytes
    int row;            // the lane's first sequence
    float* part;

    __device__ Lane(const T* weights, float* part, const Plan& plan, int first, int) : Lane(weights, part, plan, first) {}
    __device__ Lane(const T* weights, float* part, const Plan& plan, int first) {
      const int lane = int(threadIdx.x) % 32, quarter = lane % 4;
      row = lane / 4;
      this->weights = reinterpret_cast<const uint4*>(weights) + first * m * 64 + lane;
      published = row * plan.row + (first * kChunk + quarter * kLoad) / int(sizeof(T));
      step = 8 * plan.row / (kLoad / int(sizeof(T)));
      this->part = part + quarter * 2 * part_row(m) + row;
    }
  };

  template <class X, int kChunks, class Meanwhile>
  __device__ static void multiply(const Lane& lane, const T* published, int sequences, int chunks,
                                  const Meanwhile& meanwhile) {
    // Chunks that are loaded at a time, as far as registers go and code stays in its cache.
    constexpr int kSteps = kChunks * n <= 16 ? kChunks : 16 / n;
    const uint4* a = lane.weights;
    const uint4* b = reinterpret_cast<const uint4*>(published);
    float sums[m][n][4] = {};
    uint4 next[m][2];  // weights
    const auto load_weights = [&](int chunk) {
#pragma unroll
      for (int i = 0; i < m; ++i) {
        next[i][0] = a[(chunk * m + i) * 64];
        next[i][1] = a[(chunk * m + i) * 64 + 32];
      }
    };
    if (kAhead && chunks > 0) load_weights(0);
    for (int chunk = 0; chunk < max(chunks, 1); chunk += kSteps) {
      uint4 x[kSteps][n];
      load<X>(x, b + chunk * 4, lane.step, 4, chunks - chunk, [&](int j) { return 8 * j + lane.row < sequences; },
              [&] { if (chunk == 0) meanwhile(); });
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (chunk + s >= chunks) break;
        if (!kAhead) load_weights(chunk + s);
        uint4 now[m][2];
#pragma unroll
        for (int i = 0; i < m; ++i) {
          now[i][0] = next[i][0];
          now[i][1] = next[i][1];
        }
        if (kAhead) load_weights(min(chunk + s + 1, chunks - 1));  // the last ones again: a branch would cost moves
#pragma unroll
        for (int i = 0; i < m; ++i) {
          const uint4 w = now[i][0], v = now[i][1];
#pragma unroll
          for (int j = 0; j < n; ++j) mma(T(), sums[i][j], w.x, w.y, w.z, w.w, x[s][j].x, x[s][j].y);
#pragma unroll
          for (int j = 0; j < n; ++j) mma(T(), sums[i][j], v.x, v.y, v.z, v.w, x[s][j].z, x[s][j].w);
        }
      }
    }
    store(lane, sums);
  }

  __device__ static void store(const Lane& lane, const float (&sums)[m][n][4]) {
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
      for (int j = 0; j < n; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          lane.part[(j * 8 + e % 2) * part_row(m) + i * 16 + e / 2 * 8] = sums[i][j][e];
  }
};

// The same with the weights of a warp's chunks, at most `held`, in registers: what all warps read of them at each step
// takes as long as the rest of a product of few sequences.
template <class T, int m, int n, int held>
struct HeldProduct : TensorProduct<T, m, n> {
  using Base = TensorProduct<T, m, n>;
  struct Lane : Base::Lane {
    uint4 w[held][m][2];

    // The weights are in shared memory by now.
    __device__ Lane(const T* weights, float* part, const Plan& plan, int first, int chunks)
        : Base::Lane(weights, part, plan, first) {
#pragma unroll
      for (int s = 0; s < held; ++s)
#pragma unroll
        for (int i = 0; i < m; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            w[s][i][half] = s < chunks ? this->weights[(s * m + i) * 64 + half * 32] : uint4{0, 0, 0, 0};
    }
  };

  template <class X, int, class Meanwhile>
  __device__ static void multiply(const Lane& lane, const T* published, int sequences, int chunks,
                                  const Meanwhile& meanwhile) {
    uint4 x[held][n];
    load<X>(x, reinterpret_cast<const uint4*>(published), lane.step, 4, chunks,
            [&](int j) { return 8 * j + lane.row < sequences; }, meanwhile);
    float sums[m][n][4] = {};
#pragma unroll
    for (int s = 0; s < held; ++s) {
      if (s >= chunks) break;
#pragma unroll
      for (int i = 0; i < m; ++i) {
        const uint4 w = lane.w[s][i][0], v = lane.w[s][i][1];
#pragma unroll
        for (int j = 0; j < n; ++j) mma(T(), sums[i][j], w.x, w.y, w.z, w.w, x[s][j].x, x[s][j].y);
#pragma unroll
        for (int j = 0; j < n; ++j) mma(T(), sums[i][j], v.x, v.y, v.z, v.w, x[s][j].z, x[s][j].w);
      }
    }
    Base::store(lane, sums);
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

  struct Lane {
    const uint4* weights;
    int width;          // from one row of weights to the next, in groups of kLoad bytes
    int64_t published;  // numbers from the first sequence's first
    int step;           // from one sequence to the fourth after it, in groups of kLoad bytes
    int column;         // the lane's first sequence
    T* part;

    __device__ Lane(const T* weights, T* part, const Plan& plan, int first, int) {
      const int lane = int(threadIdx.x) % 32, row = lane / 4, k = first * kChunk / int(sizeof(T));
      column = lane % 4;
      width = plan.depth / kEach + 1;
      this->weights = reinterpret_cast<const uint4*>(weights + place(row, k, plan.depth));
      published = column * plan.row + k;
      step = 4 * plan.row / kEach;
      this->part = part + column * part_row(m) + row;
    }
  };

  template <class X, int kChunks, class Meanwhile>
  __device__ static void multiply(const Lane& lane, const T* published, int sequences, int chunks,
                                  const Meanwhile& meanwhile) {
    constexpr int kSteps = kChunk / kLoad;
    const uint4* a = lane.weights;
    const uint4* b = reinterpret_cast<const uint4*>(published);
    T sums[2 * m][2 * n] = {};
    for (int chunk = 0; chunk < max(chunks, 1); ++chunk) {
      uint4 found[kSteps][2 * n];
      load<X>(found, b + chunk * kSteps, lane.step, 1, chunks > 0 ? kSteps : 0,
              [&](int j) { return 4 * j + lane.column < sequences; }, [&] { if (chunk == 0) meanwhile(); });
      if (chunks <= 0) break;
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
#pragma unroll
        for (int i = 0; i < 2 * m; ++i) {
          const uint4 loaded = a[8 * i * lane.width + chunk * kSteps + s];
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
      for (int j = 0; j < 2 * n; ++j) lane.part[4 * j * part_row(m) + 8 * i] = sums[i][j];
  }
};

}  // namespace fastlm::cuda
