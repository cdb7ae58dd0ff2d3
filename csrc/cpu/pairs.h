// Packed matrices of bfloat16 pairs, which AMX tiles (amx.h) and vectors (dots.h) multiply alike.
//
// A tile is 16 rows of 64 bytes: it holds w [32, 16] so that its row p has numbers 2p and 2p + 1 of the depth, column by
// column. What it multiplies is x [rows, 32] as it lies in memory; sums [rows, 16] are in float32.
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
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)load_halves(p, n));
}

FASTLM_INLINE void store(F16* p, const Vector<float>& x, int n) {
  store_halves(p, (Halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT), n);
}

constexpr int kTileRows = 16, kTileDepth = 32, kTileNumbers = 512;

inline int64_t tiles_deep(int64_t depth) { return (depth + kTileDepth - 1) / kTileDepth; }

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
        Halves row[2] = {};
        if constexpr (sizeof(T) == 2) {
          if (n > 0) row[0] = load_halves(from, n < 16 ? int(n) : 16);
          if (n > 16) row[1] = load_halves(from + 16, n < 32 ? int(n) - 16 : 16);
        } else {
          Vector<float> a = load_some(from, n), b = load_some(from + 16, n - 16);
          if (part) a -= rounded(a), b -= rounded(b);
          row[0] = narrow(a), row[1] = narrow(b);
        }
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
        const Vector<float> a = sizeof(T) == 2 ? even : rounded(even), b = sizeof(T) == 2 ? odd : rounded(odd);
        const Pairs both = (Pairs)a >> 16 | (Pairs)b;
        std::memcpy(to.first + part * to.part + i * 32, &both, sizeof both);
        even -= a;
        odd -= b;
      }
    }
}

// What a panel is multiplied by: 32 numbers of row r, tile k of the depth, are at first + r/16·group + r%16·row + k·next,
// their second part `low` numbers after them. After `depth` numbers zeros follow up to the next multiple of 32.
struct PairRows {
  const Bf16* first;
  int64_t row, group, next, low;
};

// As VectorProduct in gemm.h. The operand is [rows][part][depth, padded with zeros to a multiple of 32], or where that is
// Way::kTiled, [rows / 16][part][padded / 32][16 rows][32].
//
// Way is what multiplies: Tiles or Dots. Way::units(gates) is the vectors of units of a forward panel, Way::kParts the
// most parts that it knows, and way.multiply<parts, count>(x, rows, panel, depth, out, fetch) makes
// out [rows, count tiles of 16] = x [rows, depth] · panel. fetch as in gemm.h.
template <class T, class Way>
struct PairProduct {
  using Number = T;
  using Operand = Bf16;
  using Gate = std::conditional_t<sizeof(T) == 2, F16, T>;
  using Functions = Math<float, sizeof(T) == 2 ? 5 : Simd<float>::kDegree>;  // the numbers have 8 or 11 bits
  static constexpr bool kInPlace = false;
  static constexpr bool kTakesX = sizeof(T) == 2;  // as it lies in memory, and rounds no product with it
  static constexpr int kRowsAhead = Way::kRowsAhead;  // whose products with x are made at once
  static constexpr int units(int gates) { return Way::units(gates); }
  using Registers = Way;

  int64_t depth, padded;
  int parts;
  Way* way;

  PairProduct(const RnnProblem& p, int64_t depth, Way* way = nullptr)
      : depth(depth), padded(tiles_deep(depth) * kTileDepth), way(way) {
    parts = sizeof(T) > 2 && p.precision == Precision::high ? Way::kParts : 1;
  }
  using Rows = PairRows;
  Rows rows_at(const Bf16* x, int64_t ld) const { return {x, ld, kTileRows * ld, kTileDepth, padded}; }
  Rows rows_of(const Bf16* operand) const {
    if constexpr (Way::kTiled)
      return {operand, kTileDepth, kTileRows * parts * padded, kTileNumbers, kTileRows * padded};
    else
      return rows_at(operand, (parts * padded / kTileDepth | 1) * kTileDepth);  // odd cache lines: rows share no sets
  }
  int64_t numbers(int64_t rows) const { return (rows + kTileRows - 1) / kTileRows * rows_of(nullptr).group; }
  FASTLM_INLINED Bf16* row(Bf16* operand, int64_t b) const {
    const Rows all = rows_of(operand);
    return operand + b / kTileRows * all.group + b % kTileRows * all.row;
  }
  int64_t panel_numbers() const { return fastlm::FASTLM_ISA::panel_numbers(1, depth, parts); }

  FASTLM_INLINED void put(Bf16* row, int64_t at, const Vector<float>& x, int n) const {
    place(row, at, narrow(x), n);
    if (parts == 2) place(row + rows_of(nullptr).low, at, narrow(x - rounded(x)), n);
  }
  void pad(Bf16* row) const {
    for (int part = 0; part < parts; ++part)
      if (depth < padded) std::memset(found(row, depth) + part * rows_of(nullptr).low, 0, (padded - depth) * sizeof *row);
  }
  void prefetch_row(Bf16* row, int64_t at, int n) const {
    for (int j = 0; j < n; j += kTileDepth) prefetch_to_write(found(row, at + j), 1);
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
  FASTLM_INLINED Bf16* found(Bf16* row, int64_t at) const {
    return row + (Way::kTiled ? at / kTileDepth * kTileNumbers + at % kTileDepth : at);
  }
  FASTLM_INLINED void place(Bf16* row, int64_t at, const Halves& x, int n) const {
    const int left = Way::kTiled ? kTileDepth - int(at % kTileDepth) : n;
    if (n <= left) return store_halves(found(row, at), x, n);
    Bf16 all[kLanes<float>];
    store_halves(all, x, kLanes<float>);
    std::memcpy(found(row, at), all, left * sizeof *all);
    std::memcpy(found(row, at + left), all + left, (n - left) * sizeof *all);
  }

  template <int count, class Fetch>
  void multiply(const Rows& x, int64_t rows, const Bf16* panel, const Bf16*, float* out, const Fetch& fetch) const {
    if constexpr (sizeof(T) > 2 && Way::kParts == 2)
      if (parts == 2) return way->template multiply<2, count>(x, rows, panel, depth, out, fetch);
    way->template multiply<1, count>(x, rows, panel, depth, out, fetch);
  }
};

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
