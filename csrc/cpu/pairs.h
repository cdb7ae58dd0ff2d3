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

// As Math, to 14 bits, where the numbers have 8 and what is kept of them 11. Polynomials fitted by least squares whose
// weights follow the largest relative error; that of the estimated quotient, 2^-14, comes on top.
struct RoughMath {
  using V = Vector<float>;

  // 2^t = 2^f·2^⌊t⌋; infinity and zero come by themselves.
  FASTLM_INLINE V sigmoid(const V& x) {
    const V t = x * -1.44269504f;
    const V f = (V)_mm512_maskz_reduce_ps(0xffff, (__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    V p = f * 0.01353417f + 0.05201146f;
    p = p * f + 0.24144276f;
    p = p * f + 0.69300384f;
    p = p * f + 1.00000259f;
    return estimated(1 + (V)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)t));
  }

  // ±1 from where it is that to 14 bits, because the gradient, 1 - t², of many steps may be added up.
  FASTLM_INLINE V tanh(const V& x) {
    const V u = x * x;
    const V p = (u * 0.00161345f + 0.11630201f) * u + 1;
    const V q = ((u * 6.27806177e-05f + 0.0181767908f) * u + 0.449620101f) * u + 1;
    constexpr float end = 5.25f * 5.25f;
    const __mmask16 far = _mm512_cmp_ps_mask((__m512)u, _mm512_set1_ps(end), _CMP_GT_OQ);
    constexpr int smaller_of_absolutes = 2;  // with the sign of the first
    return (V)_mm512_mask_range_ps((__m512)(x * p * estimated(q)), far, (__m512)x, _mm512_set1_ps(1), smaller_of_absolutes);
  }

 private:
  FASTLM_INLINE V estimated(const V& x) { return (V)_mm512_maskz_rcp14_ps(0xffff, (__m512)x); }  // 1/x
};

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

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
