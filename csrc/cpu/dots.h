// Products of bfloat16 pairs by vectors (AVX512_BF16): one instruction adds 16 products of pairs to 16 sums in float32.
#pragma once

#include "pairs.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// out [MR, count tiles] = x [MR, deep tiles of depth] · panel. A pair of x meets a row of each tile.
template <int MR, int count>
void dot_block(const Bf16* x, int64_t ld, const Bf16* panel, int64_t deep, float* out) {
  Vector<float> sums[MR][count] = {};
  for (int64_t k = 0; k < deep; ++k)
#pragma GCC unroll 4
    for (int p = 0; p < 16; ++p) {
      __m512bh w[count];
#pragma GCC unroll 4
      for (int t = 0; t < count; ++t) {
        const int together = (t | 1) < count ? 2 : 1;
        const Bf16* from = panel + ((t / 2 * 2 * deep) + k * together + (together == 2 ? t % 2 : 0)) * kTileNumbers + p * 32;
        if constexpr (MR < 3) __builtin_prefetch(from + 4 * kTileNumbers);  // bound by bandwidth
        std::memcpy(&w[t], from, sizeof w[t]);
      }
#pragma GCC unroll 12
      for (int i = 0; i < MR; ++i) {
        int pair;
        std::memcpy(&pair, x + i * ld + k * kTileDepth + 2 * p, sizeof pair);
        const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int t = 0; t < count; ++t) sums[i][t] = (Vector<float>)_mm512_dpbf16_ps((__m512)sums[i][t], a, w[t]);
      }
    }
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int t = 0; t < count; ++t) store(out + (i * count + t) * 16, sums[i][t]);
}

// A way to multiply pairs.
struct Dots {
  static constexpr int kParts = 1, kRowsAhead = 64;
  static constexpr bool kTiled = false;
  static constexpr int64_t panel_vectors(int64_t share) { return share; }
  static constexpr int units(int gates) { return 4 / gates; }

  template <int parts, int count, class Fetch>
  void multiply(const PairRows& x, int64_t rows, const Bf16* panel, int64_t depth, float* out,
                const Fetch& fetch) const {
    static_assert(parts == 1 && count <= 4);
    constexpr int most = kAccumulators / count < 12 ? kAccumulators / count : 12;
    const int64_t groups = (rows + most - 1) / most;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = rows * g / groups, last = rows * (g + 1) / groups;
      fetch(g, groups);
      with_count<most>(last - first, [&](auto size) {
        dot_block<decltype(size)::value, count>(x.first + first * x.row, x.row, panel, tiles_deep(depth),
                                                out + first * count * 16);
      });
    }
  }
};

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
