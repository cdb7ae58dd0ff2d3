// Products of bfloat16 pairs by AMX tiles: one instruction adds x [rows, 32] · w [32, 16] to sums [rows, 16].
#pragma once

#include "pairs.h"
#include "tiles.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

template <bool tall>
FASTLM_INLINE void load_rows(const PairRows& x, int64_t at) {
  _tile_loadd(4, x.first + at, x.row * 2);
  if constexpr (tall) _tile_loadd(5, x.first + x.group + at, x.row * 2);
}

// Each is read once for many rows of x, which the hint leaves in L1.
template <bool wide>
FASTLM_INLINE void load_columns(const Bf16* w) {
  _tile_stream_loadd(6, w, 64);
  if constexpr (wide) _tile_stream_loadd(7, w + kTileNumbers, 64);
}

template <bool tall, bool wide>
FASTLM_INLINE void add_products() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (wide) _tile_dpbf16ps(1, 4, 7);
  if constexpr (tall) _tile_dpbf16ps(2, 5, 6);
  if constexpr (tall && wide) _tile_dpbf16ps(3, 5, 7);
}

// out [up to 32 rows, up to 2 tiles] = x · w over `deep` tiles of depth. Rows of out are ldo numbers apart. Before each
// tile of depth fetch() is called.
template <int parts, bool tall, bool wide, class Fetch>
FASTLM_INLINE void tile_block(const PairRows& x, const Bf16* w, int64_t deep, float* out, int64_t ldo, const Fetch& fetch) {
  constexpr int64_t step = (wide ? 2 : 1) * kTileNumbers;
  _tile_zero(0);
  if constexpr (wide) _tile_zero(1);
  if constexpr (tall) _tile_zero(2);
  if constexpr (tall && wide) _tile_zero(3);
  int64_t at = 0;
  for (int64_t k = 0; k < deep; ++k, at += x.next, w += parts * step) {
    fetch();
    load_rows<tall>(x, at);
    if constexpr (parts == 2) {
      load_columns<wide>(w + step);
      add_products<tall, wide>();
    }
    load_columns<wide>(w);
    add_products<tall, wide>();
    if constexpr (parts == 2) {
      load_rows<tall>(x, at + x.low);
      add_products<tall, wide>();
    }
  }
  _tile_stored(0, out, ldo * 4);
  if constexpr (wide) _tile_stored(1, out + 16, ldo * 4);
  if constexpr (tall) _tile_stored(2, out + kTileRows * ldo, ldo * 4);
  if constexpr (tall && wide) _tile_stored(3, out + kTileRows * ldo + 16, ldo * 4);
}

// A way to multiply pairs: the tile registers of this thread. 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 columns of w.
class Tiles {
 public:
  static constexpr int kParts = 2, kRowsAhead = 128;
  static constexpr bool kTiled = true;  // each line is a row of a tile; as fast as rows: benchmarks/LOG.md 2026-11-26
  static constexpr int64_t panel_vectors(int64_t share) { return share < 16 ? 2 : share / 4; }  // stays in L1: LOG 2026-11-27
  static constexpr int units(int gates) { return gates == 3 ? 2 : 4 / gates; }  // an even number of tiles

  template <int parts, int count, class Fetch>
  void multiply(PairRows x, int64_t rows, const Bf16* panel, int64_t depth, float* out, const Fetch& fetch) {
    constexpr int64_t ldo = count * 16;
    const int64_t deep = tiles_deep(depth);
    const int64_t steps = (rows + 2 * kTileRows - 1) / (2 * kTileRows) * ((count + 1) / 2) * deep;
    int64_t step = 0;
    const auto fetch_some = [&] { fetch(step++, steps); };  // all at once would wait for memory
    __asm__ volatile("" : : : "memory");  // GCC's tile loads do not say that they read memory
    for (int64_t r = 0; r < rows; r += 2 * kTileRows, x.first += 2 * x.group, out += 2 * kTileRows * ldo) {
      const int left = int(rows - r < 2 * kTileRows ? rows - r : 2 * kTileRows);
      const bool tall = left > kTileRows;
      registers_.shape(tall ? kTileRows : left, tall ? left - kTileRows : 0);
      for (int t = 0; t < count; t += 2) {
        const Bf16* w = panel + panel_numbers(t, depth, parts);
        if (t + 1 < count)
          tall ? tile_block<parts, true, true>(x, w, deep, out + t * 16, ldo, fetch_some)
               : tile_block<parts, false, true>(x, w, deep, out + t * 16, ldo, fetch_some);
        else
          tall ? tile_block<parts, true, false>(x, w, deep, out + t * 16, ldo, fetch_some)
               : tile_block<parts, false, false>(x, w, deep, out + t * 16, ldo, fetch_some);
      }
    }
  }

 private:
  TileRegisters registers_;
};

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
