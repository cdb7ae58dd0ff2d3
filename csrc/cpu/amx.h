// Products of bfloat16 numbers by AMX tiles, for the few rows of one time step, and the packed matrices they need.
//
// A tile is 16 rows of 64 bytes. One instruction adds x [rows, 32] · w [32, 16] to sums [rows, 16] in float32; the tile
// of w holds pairs: its row p has numbers 2p and 2p + 1 of the depth, column by column.
//
// `parts` = 2 keeps a float32 number as the sum of two of bfloat16, so that 16 of its 24 bits count. A product is
// then high·high + high·low + low·high; low·low is smaller than what the two parts leave out.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// A gate lies between -1 and 1, where float16 has three bits more than bfloat16: near 1 the gradient lives on them.
FASTLM_INLINE Vector<float> load(const F16* p, int n) {
  __m256i v = {};
  std::memcpy(&v, p, n * sizeof *p);
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, v);
}

FASTLM_INLINE void store(F16* p, const Vector<float>& x, int n) {
  const __m256i v = _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &v, n * sizeof *p);
}

constexpr int kTileRows = 16, kTileDepth = 32, kTileNumbers = 512;

inline int64_t tiles_deep(int64_t depth) { return (depth + kTileDepth - 1) / kTileDepth; }

// The tile registers of this thread. 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 columns of w.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  ~Tiles() {
    if (first_) _tile_release();
  }

  // Give tile 4 `first` rows of x and tile 5 `second`, 0: unused. Contents are lost when that changes something.
  void shape(int first, int second) {
    if (first == first_ && second == second_) return;
    first_ = first;
    second_ = second;
    Configuration c;
    const int rows[8] = {first, first, second, second, first, second, kTileRows, kTileRows};
    for (int i = 0; i < 8; ++i) {
      c.rows[i] = uint8_t(rows[i]);
      c.bytes[i] = rows[i] ? 64 : 0;
    }
    __asm__ volatile("" : : "r"(&c) : "memory");  // GCC's intrinsic owns up to reading the first 8 bytes only
    _tile_loadconfig(&c);
  }

 private:
  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
  int first_ = 0, second_ = 0;
};

// --- packed matrices ----------------------------------------------------------------------------------------------

// A panel of `count` tiles side by side: [pair of tiles][depth / 32][part][tile][16 rows][16 columns][2]. The last
// tile of an odd count is alone. A depth that is no multiple of 32 ends in zeros.
constexpr int64_t panel_numbers(int count, int64_t depth, int parts) {
  return count * ((depth + kTileDepth - 1) / kTileDepth) * kTileNumbers * parts;
}

// Where tile `t` of such a panel begins, and the way to its second part and to its next 32 of depth.
struct TilePlace {
  Bf16* first;
  int64_t part, next;

  TilePlace(Bf16* panel, int t, int count, int64_t depth, int parts) {
    const int together = (t | 1) < count ? 2 : 1;
    first = panel + panel_numbers(t / 2 * 2, depth, parts) + (together == 2 ? t % 2 : 0) * kTileNumbers;
    part = together * kTileNumbers;
    next = parts * part;
  }
};

using Pairs = Simd<float>::Bits;  // one of each 16 columns

// Where lane `lane` of a pair of rows comes from when what lies off the diagonal in each square of 2d changes places.
FASTLM_INLINE Pairs exchange(int d, int way) {
  Pairs from = {};
#pragma GCC unroll 16
  for (int lane = 0; lane < 16; ++lane) from[lane] = (lane & d) == 0 ? lane + way * d : lane + 16 - (1 - way) * d;
  return from;
}

FASTLM_INLINE void transpose(Pairs rows[16]) {
#pragma GCC unroll 4
  for (int d = 1; d < 16; d *= 2) {
    const Pairs upper = exchange(d, 0), lower = exchange(d, 1);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i & d) continue;
      const __m512i a = (__m512i)rows[i], b = (__m512i)rows[i + d];
      rows[i] = (Pairs)_mm512_permutex2var_epi32(a, (__m512i)upper, b);
      rows[i + d] = (Pairs)_mm512_permutex2var_epi32(a, (__m512i)lower, b);
    }
  }
}

// n ≤ 16 numbers as float32, zeros after them; n may be negative
template <class T>
FASTLM_INLINE Vector<float> load_some(const T* p, int64_t n) {
  return n > 0 ? load(p, n < 16 ? int(n) : 16) : Vector<float>{};
}

FASTLM_INLINE Vector<float> rounded(const Vector<float>& x) { return widen(narrow(x)); }

// A tile's columns = the first 16 rows of w [rows, depth], zeros after the last.
template <class T>
void pack_rows(const T* w, int64_t rows, int64_t depth, TilePlace to, int parts) {
  for (int64_t k = 0; k < depth; k += kTileDepth, to.first += to.next)
    for (int part = 0; part < parts; ++part) {
      Pairs all[16];
      for (int i = 0; i < 16; ++i) {
        const T* from = w + i * depth + k;
        const int64_t n = i < rows ? depth - k : 0;
        Vector<float> a = load_some(from, n), b = load_some(from + 16, n - 16);
        if (part) a -= rounded(a), b -= rounded(b);
        Bf16 row[kTileDepth];
        store(row, a);
        store(row + 16, b);
        std::memcpy(&all[i], row, sizeof row);
      }
      transpose(all);
      std::memcpy(to.first + part * to.part, all, sizeof all);
    }
}

// A tile's columns = the first 16 of n columns of w [depth, width], zeros after the last.
template <class T>
void pack_columns(const T* w, int64_t n, int64_t width, int64_t depth, TilePlace to, int parts) {
  for (int64_t k = 0; k < depth; k += kTileDepth, to.first += to.next)
    for (int i = 0; i < 16; ++i) {
      const int64_t row = k + 2 * i;
      Vector<float> even = load_some(w + row * width, row < depth ? n : 0);
      Vector<float> odd = load_some(w + (row + 1) * width, row + 1 < depth ? n : 0);
      for (int part = 0; part < parts; ++part) {
        const Vector<float> a = rounded(even), b = rounded(odd);
        const Pairs both = (Pairs)a >> 16 | (Pairs)b;
        std::memcpy(to.first + part * to.part + i * 32, &both, sizeof both);
        even -= a;
        odd -= b;
      }
    }
}

// --- products -----------------------------------------------------------------------------------------------------

template <bool tall>
FASTLM_INLINE void load_rows(const Bf16* x, int64_t ld) {
  _tile_loadd(4, x, ld * 2);
  if constexpr (tall) _tile_loadd(5, x + kTileRows * ld, ld * 2);
}

template <bool wide>
FASTLM_INLINE void load_columns(const Bf16* w) {
  _tile_loadd(6, w, 64);
  if constexpr (wide) _tile_loadd(7, w + kTileNumbers, 64);
}

template <bool tall, bool wide>
FASTLM_INLINE void add_products() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (wide) _tile_dpbf16ps(1, 4, 7);
  if constexpr (tall) _tile_dpbf16ps(2, 5, 6);
  if constexpr (tall && wide) _tile_dpbf16ps(3, 5, 7);
}

// out [up to 32 rows, up to 2 tiles] = x · w over `deep` tiles of depth. Rows of out are ldo numbers apart; the second
// part of x lies `low` numbers after the first.
template <int parts, bool tall, bool wide>
void tile_block(const Bf16* x, int64_t ld, int64_t low, const Bf16* w, int64_t deep, float* out, int64_t ldo) {
  constexpr int64_t step = (wide ? 2 : 1) * kTileNumbers, ahead = 8 * kTileNumbers;
  _tile_zero(0);
  if constexpr (wide) _tile_zero(1);
  if constexpr (tall) _tile_zero(2);
  if constexpr (tall && wide) _tile_zero(3);
  for (int64_t k = 0; k < deep; ++k, x += kTileDepth, w += parts * step) {
#pragma GCC unroll 64
    for (int64_t i = 0; i < parts * step; i += 32) __builtin_prefetch(w + ahead + i);
    load_rows<tall>(x, ld);
    if constexpr (parts == 2) {
      load_columns<wide>(w + step);
      add_products<tall, wide>();
    }
    load_columns<wide>(w);
    add_products<tall, wide>();
    if constexpr (parts == 2) {
      load_rows<tall>(x + low, ld);
      add_products<tall, wide>();
    }
  }
  _tile_stored(0, out, ldo * 4);
  if constexpr (wide) _tile_stored(1, out + 16, ldo * 4);
  if constexpr (tall) _tile_stored(2, out + kTileRows * ldo, ldo * 4);
  if constexpr (tall && wide) _tile_stored(3, out + kTileRows * ldo + 16, ldo * 4);
}

// out [rows, count tiles of 16] = x [rows, depth] · panel. Rows of x are ld numbers apart and hold zeros from `depth`
// to the next multiple of 32; its second part lies `low` numbers after the first.
template <int parts, int count>
void multiply(Tiles& tiles, const Bf16* x, int64_t ld, int64_t low, int64_t rows, const Bf16* panel,
              int64_t depth, float* out) {
  constexpr int64_t ldo = count * 16;
  const int64_t deep = tiles_deep(depth);
  __asm__ volatile("" : : : "memory");  // GCC's tile loads do not say that they read memory
  for (int64_t r = 0; r < rows; r += 2 * kTileRows, x += 2 * kTileRows * ld, out += 2 * kTileRows * ldo) {
    const int left = int(rows - r < 2 * kTileRows ? rows - r : 2 * kTileRows);
    const bool tall = left > kTileRows;
    tiles.shape(tall ? kTileRows : left, tall ? left - kTileRows : 0);
    for (int t = 0; t < count; t += 2) {
      const Bf16* w = panel + panel_numbers(t, depth, parts);
      if (t + 1 < count)
        tall ? tile_block<parts, true, true>(x, ld, low, w, deep, out + t * 16, ldo)
             : tile_block<parts, false, true>(x, ld, low, w, deep, out + t * 16, ldo);
      else
        tall ? tile_block<parts, true, false>(x, ld, low, w, deep, out + t * 16, ldo)
             : tile_block<parts, false, false>(x, ld, low, w, deep, out + t * 16, ldo);
    }
  }
}

// As VectorProduct in gemm.h. A row of the operand is [part][depth, padded with zeros to a multiple of 32].
template <class T>
struct TileProduct {
  using Number = T;
  using Operand = Bf16;
  using Gate = std::conditional_t<sizeof(T) == 2, F16, T>;
  static constexpr bool kInPlace = false;
  static constexpr int units(int gates) { return gates == 3 ? 2 : 4 / gates; }  // an even number of tiles
  using Registers = Tiles;

  int64_t depth, padded, ld;
  int parts;
  Tiles* tiles;

  TileProduct(const RnnProblem& p, int64_t depth, Tiles* tiles = nullptr)
      : depth(depth), padded(tiles_deep(depth) * kTileDepth), tiles(tiles) {
    parts = sizeof(T) > 2 && p.precision == Precision::high ? 2 : 1;
    ld = (parts * padded / kTileDepth | 1) * kTileDepth;  // an odd number of cache lines: rows share no sets
  }
  int64_t panel_numbers() const { return fastlm::FASTLM_ISA::panel_numbers(1, depth, parts); }

  void put(Bf16* row, int64_t at, const Vector<float>& x, int n) const {
    store(row + at, x, n);
    if (parts == 2) store(row + padded + at, x - rounded(x), n);
  }
  void pad(Bf16* row) const {
    for (int part = 0; part < parts; ++part)
      std::memset(row + part * padded + depth, 0, (padded - depth) * sizeof *row);
  }

  template <int G, int count>
  void pack_gates(const T* w, int64_t units, int64_t u, Bf16* panel) const {
    for (int t = 0; t < G * count; ++t) {
      const int64_t first = u + t / G * 16;
      pack_rows(w + (t % G * units + first) * depth, units - first, depth, place(panel, t, G * count), parts);
    }
  }
  template <int count>
  void pack_units(const T* w, int64_t units, int64_t u, int64_t n, Bf16* panel) const {
    for (int t = 0; t < count; ++t)
      pack_columns(w + u + t * 16, n - t * 16, units, depth, place(panel, t, count), parts);
  }
  TilePlace place(Bf16* panel, int t, int count) const { return {panel, t, count, depth, parts}; }

  template <int count, class Fetch>
  void multiply(const Bf16* x, int64_t ldx, int64_t rows, const Bf16* panel, const Bf16*, float* out,
                const Fetch& fetch) const {
    fetch(0, 1);
    if (sizeof(T) > 2 && parts == 2)
      fastlm::FASTLM_ISA::multiply<2, count>(*tiles, x, ldx, padded, rows, panel, depth, out);
    else
      fastlm::FASTLM_ISA::multiply<1, count>(*tiles, x, ldx, padded, rows, panel, depth, out);
  }
};

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
