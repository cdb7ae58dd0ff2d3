// Products of a panel by vectors: 16 rows of x in the lanes, a word of the weight to all of them.
#pragma once

#include <type_traits>

#include "../isa.h"
#include "quant_numbers.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kPanelWords = 256;               // of a weight row at a time; sums of more would cost accuracy
constexpr int64_t kFewRows = 16, kMostBlock = 128;  // of the weight
constexpr int64_t kGroup = kMostBlock;             // rows of the weight that are multiplied one after another
constexpr int kMostAcross = 3;                     // vectors of x that are multiplied at a time
constexpr bool kSpreads = false;                   // what is fetched meanwhile: all at once, as it was measured
constexpr bool kSplits = false;                    // float32's own vectors are as fast
constexpr bool kSigned = false;                    // one factor must not be negative: the weight, plus 128

// Few rows do not repay unpacking; CPUs without AVX512_BF16 were measured before there were panels (benchmarks/LOG.md
// 2026-11-26).
inline bool in_panels(const QuantizedLinear& p) {
  return p.rows >= 16 && (p.kind == QuantizedWeight::int8_dynamic || p.number == Number::bf16) && kernels.pairs;
}

FASTLM_INLINE __m512i dot_pairs(__m512i acc, __m512i w, __m512i x) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  return acc;
}

// Two vectors of float32 as bfloat16, those of `low` first.
FASTLM_INLINE __m512i narrow(__m512 low, __m512 high) {
  __m512i both;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(high), "v"(low));
  return both;
}

FASTLM_INLINE __m512i add_floats(__m512i a, __m512i b) {
  return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
}

// Where rows are unpacked to.
inline Panel packed(uint32_t* panel, int64_t) { return {panel, kPanelWords * 4, 16 * kPanelWords * 4, 64}; }

// sums [R, V·16] += x·panel, for R rows of the weight and V vectors of x that lie `next` words apart. Meanwhile rows of
// the weight are fetched, one in 16 words and a line at a time: of a burst the CPU drops some.
template <class Kind, int R, int V>
__attribute__((noinline)) void panel_tile(const uint32_t* x, int64_t next, const uint32_t* panel, int64_t words,
                                          float* sums, int64_t stride, Ahead fetch) {
  __m512i acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_si512();
  for (int64_t run = 0; run < words; run += 16, fetch.first += fetch.row_bytes) {
    const uint8_t* const ahead = run < 16 * fetch.rows ? fetch.first : reinterpret_cast<const uint8_t*>(x + run * 16);
    for (int64_t w = 0; w < 16; w += 4)
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        if (u % Kind::kVectors == 0) _mm_prefetch(ahead + (w + u) * 64 / Kind::kVectors, _MM_HINT_T0);
        __m512i a[V];
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) a[v] = _mm512_load_si512(x + v * next + (run + w + u) * 16);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const __m512i b = _mm512_set1_epi32(static_cast<int>(panel[r * kPanelWords + run + w + u]));
#pragma GCC unroll 3
          for (int v = 0; v < V; ++v)
            acc[r][v] = Kind::kIntegers ? dot(acc[r][v], b, a[v]) : dot_pairs(acc[r][v], b, a[v]);
        }
      }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      float* const to = sums + r * stride + v * 16;
      const __m512i before = _mm512_load_si512(to);
      _mm512_store_si512(to, Kind::kIntegers ? _mm512_add_epi32(acc[r][v], before) : add_floats(acc[r][v], before));
    }
}

struct PanelRegisters {};  // nothing to hold

// The same for `rows` rows of the weight and up to kMostAcross vectors of x.
template <class Kind>
void multiply_panel(const PanelRegisters&, const uint32_t* x, int64_t next, int64_t across, const Panel& panel,
                    int64_t words, int64_t rows, float* sums, int64_t stride, const Ahead& fetch) {
  const uint32_t* const w = static_cast<const uint32_t*>(panel.first);
  const auto tiles = [&](auto height, auto width) {
    for (int64_t r = 0; r < rows; r += height)
      panel_tile<Kind, height, width>(x, next, w + r * kPanelWords, words, sums + r * stride, stride,
                                      fetch.part(r, height));
  };
  if (across == 1) tiles(std::integral_constant<int, 16>(), std::integral_constant<int, 1>());
  if (across == 2) tiles(std::integral_constant<int, 8>(), std::integral_constant<int, 2>());
  if (across == 3) tiles(std::integral_constant<int, 8>(), std::integral_constant<int, 3>());
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
