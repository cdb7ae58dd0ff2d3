// Numbers of the quantized layers: three dtypes read and written as float32, rows of x made ready, y finished.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "../gates.h"
#include "../quant.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

FASTLM_INLINE __m512 load_number(const void* p, int64_t i, Number number, __mmask16 mask) {
  if (number == Number::f32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + i);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + i);
  if (number == Number::f16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

FASTLM_INLINE void store_number(void* p, int64_t i, Number number, __mmask16 mask, __m512 v) {
  if (number == Number::f32) return _mm512_mask_storeu_ps(static_cast<float*>(p) + i, mask, v);
  __m256i half;
  if (number == Number::f16) {
    half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i safe = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(safe, 16));
  }
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p) + i, mask, half);
}

FASTLM_INLINE __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
FASTLM_INLINE __mmask64 first_bytes(int64_t n) { return n >= 64 ? ~0ull : n <= 0 ? 0 : (1ull << n) - 1; }

constexpr uint32_t kInfinity = 0x7f800000;

// Of a row that was rounded to 8 bits: its scale, and 128 · Σ_k x[k], what the weight's offset adds to each sum.
struct RowOfX {
  float scale;
  int32_t offset;
};

// Rows of the weight as words. Line k of row r, of 16 words, is at first + r/16·low + r%16·row + k·step bytes.
struct Panel {
  const void* first;
  int64_t row, low, step;
};

// Rows of the weight, some bytes of each, that are brought into the cache while others are multiplied.
struct Ahead {
  const uint8_t* first;
  int64_t row_bytes, rows;

  Ahead part(int64_t begin, int64_t count) const {
    return {first + begin * row_bytes, row_bytes, std::min(count, rows - begin)};
  }
};

// Add products of unsigned a and signed b to acc, four in a lane. As text: the other functions need no VNNI.
FASTLM_INLINE __m512i dot(__m512i acc, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}

// Copy a row of x as float32, `step` values (a multiple of 16) at each `stride`; past the end come zeros.
inline void copy_row(const QuantizedLinear& p, int64_t row, int64_t step, float* x, int64_t stride) {
  for (int64_t start = 0; start < p.in; start += step, x += stride)
    for (int64_t k = 0; k < step; k += 16)
      _mm512_storeu_ps(x + k, load_number(p.x, row * p.in + start + k, p.number, first(p.in - start - k)));
}

// Call f(k, the values of a row of x from k on) for each 16 of `padded`; past the end come zeros.
template <class F>
FASTLM_INLINE void for_vectors(const QuantizedLinear& p, int64_t row, int64_t padded, const F& f) {
  int64_t k = 0;
  for (; k + 16 <= p.in; k += 16) f(k, load_number(p.x, row * p.in + k, p.number, 0xffff));
  for (; k < padded; k += 16) f(k, load_number(p.x, row * p.in + k, p.number, first(p.in - k)));
}

// The bits of the largest magnitude in a row of x: magnitudes order as their bits do, and NaN is the last.
inline uint32_t largest_of(const QuantizedLinear& p, int64_t row) {
  __m512i most = _mm512_setzero_si512();
  for_vectors(p, row, p.in, [&](int64_t, __m512 v) {
    most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
  });
  return _mm512_reduce_max_epu32(most);
}

// Round a row to scale·x, laid out as above. A number that is not finite makes the scale, and so the row of y, NaN.
inline RowOfX round_row(const QuantizedLinear& p, int64_t row, int64_t step, int8_t* x, int64_t stride) {
  const uint32_t largest = largest_of(p, row);
  float s = std::numeric_limits<float>::quiet_NaN();
  if (largest < kInfinity) {
    std::memcpy(&s, &largest, 4);
    s = std::max(s / 127.f, std::numeric_limits<float>::min());
  }
  __m512i total = _mm512_setzero_si512();
  const __m512 scale = _mm512_set1_ps(s), inverse = _mm512_set1_ps(1 / s);
  for_vectors(p, row, (p.in + step - 1) / step * step, [&](int64_t k, __m512 v) {
    // As v / s is rounded, without its division where that is far from halfway between two integers.
    __m512 quotient = _mm512_mul_ps(v, inverse);
    const __m512 off = _mm512_sub_ps(quotient, _mm512_roundscale_ps(quotient, _MM_FROUND_TO_NEAREST_INT));
    if (_mm512_cmp_ps_mask(_mm512_abs_ps(off), _mm512_set1_ps(0.4999f), _CMP_NLT_UQ))
      quotient = _mm512_div_ps(v, scale);
    const __m512i q = _mm512_cvtps_epi32(quotient);
    total = _mm512_add_epi32(total, q);
    _mm_storeu_si128((__m128i*)(x + k / step * stride + k % step), _mm512_cvtepi32_epi8(q));
  });
  return {s, static_cast<int32_t>(128u * static_cast<uint32_t>(_mm512_reduce_add_epi32(total)))};
}

// Finish y[m][n … n + width) from its sums: floats, or for int8_dynamic integers in these bits.
inline void finish(const QuantizedLinear& p, int64_t m, int64_t n0, int64_t width, const float* sums,
                   const RowOfX* of) {
  for (int64_t n = 0; n < width; n += 16) {
    const __mmask16 mask = first(width - n);
    const __m512 bias = p.bias ? _mm512_maskz_loadu_ps(mask, p.bias + n0 + n) : _mm512_setzero_ps();
    __m512 v = _mm512_loadu_ps(sums + n);
    __m512 scale = _mm512_set1_ps(1.f);
    if (p.kind != QuantizedWeight::int4) scale = _mm512_maskz_loadu_ps(mask, p.scale + n0 + n);
    if (p.kind == QuantizedWeight::int8_dynamic) {
      v = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(of->offset)));
      scale = _mm512_mul_ps(scale, _mm512_set1_ps(of->scale));
    }
    store_number(p.y, m * p.out + n0 + n, p.number, mask, _mm512_fmadd_ps(v, scale, bias));
  }
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
