// Products with a packed matrix, for the few rows of one time step.
#pragma once

#include "pack.h"
#include "simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// Vectors side by side in a panel of weights: as many units as fit with all their gates, so 1 for LSTM and GRU.
constexpr int kPanel = 4;

constexpr int64_t kChunkBytes = 32768;  // of a panel, to stay in the L1 cache

template <int NV>
constexpr int kMostRows = kAccumulators / NV < 12 ? kAccumulators / NV : 12;  // at most

// out [MR, NV vectors] (+)= x [MR, depth] · panel [depth, NV vectors]; meanwhile `depth` cache lines from `ahead` on
// are fetched: the hardware cannot know that the panel goes on there once all rows have used this part. Few rows use it
// once, as fast as it comes, and to fetch more would only take turns from them.
template <class T, int NV, int MR>
void tile(const T* x, int64_t ldx, const T* panel, int64_t depth, T* out, bool add, const T* ahead) {
  using V = Vector<T>;
  V acc[MR][NV] = {};
  const V* b = reinterpret_cast<const V*>(panel);
  const char* line = reinterpret_cast<const char*>(ahead);
  for (int64_t k = 0; k < depth; ++k, b += NV, line += 64) {
    if constexpr (3 * MR > 2 * kMostRows<NV>) __builtin_prefetch(line, 0, 2);
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
      const T a = x[i * ldx + k];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] += a * b[j];
    }
  }
  V* c = reinterpret_cast<V*>(out);
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) c[i * NV + j] = add ? c[i * NV + j] + acc[i][j] : acc[i][j];
}

template <class T, int NV, int MR>
void tile_of(int rows, const T* x, int64_t ldx, const T* panel, int64_t depth, T* out, bool add, const T* ahead) {
  if (rows == MR) return tile<T, NV, MR>(x, ldx, panel, depth, out, add, ahead);
  if constexpr (MR > 1) tile_of<T, NV, MR - 1>(rows, x, ldx, panel, depth, out, add, ahead);
}

// out [rows, NV vectors] = x [rows, depth] · panel [depth, NV vectors]; `next` is the panel that will follow.
// The panel is taken in chunks; each starts with fresh accumulators, because one long chain of additions loses too
// many digits. fetch(i, n) is called before the i-th of n tiles, to fetch what the product will be used with.
template <class T, int NV, class Fetch>
void multiply(const T* x, int64_t ldx, int64_t rows, const T* panel, const T* next, int64_t depth, T* out,
              const Fetch& fetch) {
  constexpr int most = kMostRows<NV>;
  constexpr int64_t chunk = kChunkBytes / (NV * kVectorBytes), line = 64 / sizeof(T);
  constexpr int width = NV * kLanes<T>;
  const int64_t groups = (rows + most - 1) / most, tiles = groups * ((depth + chunk - 1) / chunk);
  int64_t i = 0;
  for (int64_t k = 0; k < depth; k += chunk) {
    const int64_t deep = depth - k < chunk ? depth - k : chunk;
    const T* ahead = k + deep < depth ? panel + (k + deep) * width : next;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = rows * g / groups, last = rows * (g + 1) / groups;
      fetch(i++, tiles);
      tile_of<T, NV, most>(static_cast<int>(last - first), x + first * ldx + k, ldx, panel + k * width, deep,
                           out + first * width, k > 0, ahead + g * deep * line);
    }
  }
}

// out [width] += Σ_i d[i] · w[i] for `rows` rows of w, read in place, from the last on if `back`; eight products are
// summed before each addition
template <class T>
void add_rows(const T* w, int64_t width, int rows, bool back, const T* d, T* out) {
  constexpr int lanes = kLanes<T>, together = 8;
  const int groups = (rows + together - 1) / together;
  for (int group = 0; group < groups; ++group) {
    const int i = together * (back ? groups - 1 - group : group), now = rows - i < together ? rows - i : together;
    const T* p = w + i * width;
    for (int64_t u = 0; u < width; u += lanes) {
      const int n = width - u < lanes ? int(width - u) : lanes;
      Vector<T> part = {};
      if (now == together && n == lanes) {
#pragma GCC unroll 8
        for (int j = 0; j < together; ++j) part += d[i + j] * load(p + j * width + u);
      } else {
        for (int j = 0; j < now; ++j) part += d[i + j] * load(p + j * width + u, n);
      }
      store(out + u, load(out + u, n) + part, n);
    }
  }
}

// How a time step multiplies its operand, [B, depth] numbers of T, by W_hh: see rnn_plan.h. A panel of it is packed for
// the gates of `count` vectors of units (forward: one vector a gate) or for the units themselves (backward).
template <class T>
struct VectorProduct {
  using Number = T;   // of the tensors
  using Operand = T;  // of the operand and the panels
  using Gate = T;     // of the gates that the forward pass keeps, as large as a Number
  using Functions = Math<T>;
  static constexpr bool kInPlace = true;  // gradients of gates are an operand as they are, and one sequence's need
                                          // no packed matrix: add_rows
  static constexpr bool kTakesX = false;  // the products with x are the caller's
  static constexpr int kRowsAhead = 1;
  static constexpr int units(int gates) { return kPanel / gates; }  // vectors of units in a forward panel
  static constexpr int64_t panel_vectors(int64_t share) { return share; }  // of a member that has so many
  struct Registers {};                    // what the products of one thread share

  int64_t depth;
  int64_t ld;  // between rows of the operand

  VectorProduct(const RnnProblem&, int64_t depth, Registers* = nullptr)
      : depth(depth), ld((depth + 31) / 32 * 32 + 16) {
    if (ld * sizeof(T) % 4096 == 0) ld += 16;  // rows a page apart share cache sets
  }
  int64_t panel_numbers() const { return kLanes<T> * depth; }  // for each vector

  // What a panel is multiplied by: any rows, or those of an operand.
  struct Rows {
    const T* first;
    int64_t ld;
  };
  Rows rows_at(const T* x, int64_t ldx) const { return {x, ldx}; }
  Rows rows_of(const T* operand) const { return {operand, ld}; }
  int64_t numbers(int64_t rows) const { return rows * ld; }  // of an operand
  T* row(T* operand, int64_t b) const { return operand + b * ld; }

  // Numbers `at`.. of a row of the operand.
  FASTLM_INLINED void put(T* row, int64_t at, const Vector<T>& x, int n) const { store(row + at, x, n); }
  void pad(T*) const {}
  void prefetch_row(T* row, int64_t at, int n) const { prefetch_to_write(row + at, n); }

  // Rows of w [G·units, depth].
  template <int G, int count>
  void pack_gates(const T* w, int64_t units, int64_t u, T* panel) const {
    for (int g = 0; g < G; ++g)
      pack<T, count>(w + (g * units + u) * depth, depth, 1, units - u, depth, [&](int64_t k, int j, const Vector<T>& v)
                         FASTLM_INLINED { store(panel + ((k * count + j) * G + g) * kLanes<T>, v); });
  }
  // n columns of w [depth, units].
  template <int count>
  void pack_units(const T* w, int64_t units, int64_t u, int64_t n, T* panel) const {
    pack<T, count>(w + u, 1, units, n, depth, [&](int64_t k, int j, const Vector<T>& v)
                       FASTLM_INLINED { store(panel + (k * count + j) * kLanes<T>, v); });
  }
  template <int count, class Fetch>
  void multiply(const Rows& x, int64_t rows, const T* panel, const T* next, T* out, const Fetch& fetch) const {
    fastlm::FASTLM_ISA::multiply<T, count>(x.first, x.ld, rows, panel, next, depth, out, fetch);
  }
};

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
