// Products of a panel by AMX: 16 rows of the panel are a tile as they lie, and so are 16 words of a vector of x.
#pragma once

#include "quant_numbers.h"
#include "tiles.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kPanelWords = 256;                // of a weight row at a time
constexpr int64_t kFewRows = 32, kMostBlock = 256;  // of the weight, in groups
constexpr int64_t kGroup = 32;                      // rows of the weight: two tiles, which stay in L1 while x passes
constexpr int kMostAcross = 2;                      // vectors of x that are multiplied at a time
constexpr int kTile = TileRegisters::kRows;         // or words of one
constexpr bool kSpreads = true;                     // what is fetched meanwhile: tiles would wait for all at once
constexpr bool kSplits = true;                      // float32 and float16 are multiplied as sums of bfloat16
constexpr bool kSigned = true;                      // integers are multiplied as they are

// Measured in benchmarks/LOG.md 2026-11-27.
inline bool in_panels(const QuantizedLinear& p) {
  if (p.kind == QuantizedWeight::int8_dynamic || p.number == Number::bf16) return p.rows >= 8;
  return p.kind == QuantizedWeight::int8 && p.rows >= 12;
}

// Two vectors of float32 as bfloat16, those of `low` first.
FASTLM_INLINE __m512i narrow(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

template <class Kind, int V>
FASTLM_INLINE void add_products() {
  if constexpr (Kind::kIntegers) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(2, 5, 6);
    if constexpr (V == 2) _tile_dpbssd(1, 4, 7);
    if constexpr (V == 2) _tile_dpbssd(3, 5, 7);
  } else {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (V == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (V == 2) _tile_dpbf16ps(3, 5, 7);
  }
}

// Where rows are unpacked to: each tile in one piece.
inline Panel packed(uint32_t* panel, int64_t words) { return {panel, 64, words * 64, 1024}; }

// sums [32, V·16] += x·panel, for V vectors of x that lie `next` words apart. Meanwhile rows of the weight are fetched.
template <class Kind, int V>
void panel_tile(const uint32_t* x, int64_t next, const Panel& panel, int64_t words, float* sums, int64_t stride,
                Ahead fetch) {
  constexpr int64_t line = 64, lines = kPanelWords / kTile / Kind::kVectors;  // of a row in the panel
  int64_t fetched = 0;
  constexpr bool apart = Kind::kParts > 1;  // sums of a panel are added up first: float32 would lose digits in one chain
  alignas(64) float own[2 * kTile * 2 * kTile];
  float* const to = apart ? own : sums;
  const int64_t row = (apart ? 2 * kTile : stride) * int64_t(sizeof *sums);
  float* const below = to + kTile * row / int64_t(sizeof *sums);
  __asm__ volatile("" : : : "memory");  // GCC's tile loads do not say that they read memory
  if constexpr (apart) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, to, row);
    _tile_loadd(2, below, row);
    if constexpr (V == 2) {
      _tile_loadd(1, to + kTile, row);
      _tile_loadd(3, below + kTile, row);
    }
  }
  const auto* w = static_cast<const uint8_t*>(panel.first);
  for (int64_t run = 0; run < words; run += kTile, w += panel.step) {
    for (const int64_t end = fetch.rows * (run + kTile) / kPanelWords; fetched < end; ++fetched)
#pragma GCC unroll 16
      for (int64_t i = 0; i < lines; ++i)
        _mm_prefetch(fetch.first + fetched * fetch.row_bytes + i * line, _MM_HINT_T1);
    _tile_loadd(4, w, panel.row);
    _tile_loadd(5, w + panel.low, panel.row);
    _tile_stream_loadd(6, x + run * kTile, line);  // leaves L1 to the panel
    if constexpr (V == 2) _tile_stream_loadd(7, x + next + run * kTile, line);
    add_products<Kind, V>();
  }
  _tile_stored(0, to, row);
  _tile_stored(2, below, row);
  if constexpr (V == 2) {
    _tile_stored(1, to + kTile, row);
    _tile_stored(3, below + kTile, row);
  }
  __asm__ volatile("" : : : "memory");
  if constexpr (apart)
    for (int i = 0; i < 2 * kTile; ++i)
      for (int v = 0; v < V; ++v) {
        float* const sum = sums + i * stride + v * kTile;
        _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), _mm512_load_ps(own + i * 2 * kTile + v * kTile)));
      }
}

// What a thread holds while it multiplies.
struct PanelRegisters {
  TileRegisters tiles;

  PanelRegisters() { tiles.shape(kTile, kTile); }
};

// The same for up to kGroup rows of the weight and kMostAcross vectors of x.
template <class Kind>
void multiply_panel(const PanelRegisters&, const uint32_t* x, int64_t next, int64_t across, const Panel& panel,
                    int64_t words, int64_t, float* sums, int64_t stride, const Ahead& fetch) {
  const auto tile = across == 2 ? panel_tile<Kind, 2> : panel_tile<Kind, 1>;
  tile(x, next, panel, words, sums, stride, fetch);
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
