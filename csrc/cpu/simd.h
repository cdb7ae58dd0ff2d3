// Vectors as wide as the instruction set, by GCC's vector extensions, and the functions that gates need.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../gates.h"
#include "../numbers.h"

// Of a lambda or member that works on a vector: called in more than one place, GCC leaves a call for each vector.
#define FASTLM_INLINED __attribute__((always_inline))

namespace fastlm {
namespace FASTLM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kAccumulators = 24;  // of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kAccumulators = 12;  // of 16
#else
constexpr int kVectorBytes = 16;
constexpr int kAccumulators = 12;
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr float kLog2e = 1.44269504088896f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // Cody and Waite
  static constexpr float kRound = 12582912.f;  // 1.5·2^23: adding it leaves the nearest integer in the low bits
  static constexpr int kMantissa = 23, kBias = 127, kDegree = 7;
  static constexpr float kSigmoidEnd = 87.f, kTanhEnd = 10.f;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr double kLog2e = 1.44269504088896340736;
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kRound = 6755399441055744.0;
  static constexpr int kMantissa = 52, kBias = 1023, kDegree = 13;
  static constexpr double kSigmoidEnd = 708., kTanhEnd = 20.;
};

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
using Vector = typename Simd<T>::V;

// With masks a part of a vector is as fast as a whole one. A sanitizer does not see what they leave out.
#if defined(__AVX512BW__) && !defined(__SANITIZE_ADDRESS__)
#define FASTLM_MASKS
FASTLM_INLINE uint32_t first(int n) { return (uint32_t(1) << n) - 1; }
#endif

// Read n ≤ lanes numbers; the rest of the vector is zero.
template <class T>
FASTLM_INLINE Vector<T> load(const T* p, int n = kLanes<T>) {
  if (__builtin_expect(n == kLanes<T>, 1)) return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
#if defined(FASTLM_MASKS)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_maskz_loadu_ps(first(n), p);
  else return (Vector<T>)_mm512_maskz_loadu_pd(first(n), p);
#else
  Vector<T> v = {};
  std::memcpy(&v, p, n * sizeof(T));
  return v;
#endif
}

template <class T>
FASTLM_INLINE void store(T* p, const Vector<T>& v, int n = kLanes<T>) {
  if (__builtin_expect(n == kLanes<T>, 1)) {
    *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
    return;
  }
#if defined(FASTLM_MASKS)
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, first(n), (__m512)v);
  else _mm512_mask_storeu_pd(p, first(n), (__m512d)v);
#else
  std::memcpy(p, &v, n * sizeof(T));
#endif
}

// Bring n numbers from p on into the L2 cache, to be read.
template <class T>
FASTLM_INLINE void prefetch(const T* p, int n) {
  for (int j = 0; j < n; j += 64 / sizeof(T)) __builtin_prefetch(p + j, 0, 2);
}

// Likewise, to be written: takes the lines away from other cores, which a store would wait for.
template <class T>
FASTLM_INLINE void prefetch_to_write(T* p, int n) {
#if defined(__AVX2__)  // volatile: GCC 12 takes a function that only prefetches for one that does nothing
  for (int j = 0; j < n; j += 64 / sizeof(T)) asm volatile("prefetchw %0" : : "m"(p[j]));
#endif
}

// Calls f with min(n, most) as a compile-time constant.
template <int most, class F>
void with_count(int64_t n, const F& f) {
  if constexpr (most > 1)
    if (n < most) return with_count<most - 1>(n, f);
  f(std::integral_constant<int, most>{});
}

// --- bfloat16, the upper half of a float32 ---

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

FASTLM_INLINE Vector<float> widen(const Halves& x) {
#if defined(__AVX512F__)  // GCC 12 makes four instructions of the conversion
  return (Vector<float>)((Simd<float>::Bits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x) << 16);
#endif
  return (Vector<float>)(__builtin_convertvector(x, Simd<float>::Bits) << 16);
}

// Round to the nearest, ties to even; a NaN stays one.
FASTLM_INLINE Halves narrow(const Vector<float>& x) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  using Bits = Simd<float>::Bits;
  const Bits bits = (Bits)x, rounded = bits + 0x7fff + (bits >> 16 & 1);
  return __builtin_convertvector((x == x ? rounded : bits | 0x400000) >> 16, Halves);
#endif
}

// n ≤ lanes numbers of 16 bits, zeros after them.
FASTLM_INLINE Halves load_halves(const void* p, int n) {
  Halves v = {};
#if defined(FASTLM_MASKS)
  if (n != kLanes<float>) return (Halves)_mm256_maskz_loadu_epi16(first(n), p);
  std::memcpy(&v, p, sizeof v);
#else
  if (__builtin_expect(n == kLanes<float>, 1))  // the size a constant, or GCC calls memcpy each time
    std::memcpy(&v, p, sizeof v);
  else
    std::memcpy(&v, p, n * 2);
#endif
  return v;
}

FASTLM_INLINE void store_halves(void* p, const Halves& v, int n) {
#if defined(FASTLM_MASKS)
  if (n != kLanes<float>) return _mm256_mask_storeu_epi16(p, first(n), (__m256i)v);
  std::memcpy(p, &v, sizeof v);
#else
  if (__builtin_expect(n == kLanes<float>, 1))
    std::memcpy(p, &v, sizeof v);
  else
    std::memcpy(p, &v, n * 2);
#endif
}

FASTLM_INLINE Vector<float> load(const Bf16* p, int n = kLanes<float>) { return widen(load_halves(p, n)); }

FASTLM_INLINE void store(Bf16* p, const Vector<float>& x, int n = kLanes<float>) { store_halves(p, narrow(x), n); }

// ---

template <class T>
FASTLM_INLINE T sum(const Vector<T>& v) {
  T half[kLanes<T>];
  std::memcpy(half, &v, sizeof v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) half[i] += half[i + width];
  return half[0];
}

// exp(x) = scale·(1 + p) with scale a power of two; p = exp(r) - 1 by its Taylor series, |r| ≤ ln 2 / 2.
template <class T>
FASTLM_INLINE void split_exp(const Vector<T>& x, Vector<T>& scale, Vector<T>& p) {
  using S = Simd<T>;
  constexpr int degree = S::kDegree;
  const Vector<T> shifted = x * S::kLog2e + S::kRound;
  const Vector<T> n = shifted - S::kRound;
  scale = (Vector<T>)(((typename S::Bits)shifted + S::kBias) << S::kMantissa);
  const Vector<T> r = (x - n * S::kLn2High) - n * S::kLn2Low;
  T inverse = 1;
  for (int k = 2; k <= degree; ++k) inverse /= k;
  Vector<T> q = Vector<T>{} + inverse;
#pragma GCC unroll 16
  for (int k = degree; k > 2; --k) {
    inverse *= k;
    q = q * r + inverse;
  }
  p = q * r * r + r;
}

template <class V>
FASTLM_INLINE V quotient(const V& a, const V& b) {
#if defined(__AVX512F__)
  // A gate would spend most of its time in the divider: a 14-bit estimate, and one Newton step of third order.
  if constexpr (std::is_same_v<V, Vector<float>>) {
    const V y = (V)_mm512_maskz_rcp14_ps(0xffff, (__m512)b);
    const V e = 1 - b * y;
    return a * (y + y * (e + e * e));
  }
#endif
  return a / b;
}

// The lower of x and a bound; a NaN passes.
template <class V>
FASTLM_INLINE V at_most(const V& x, const V& end) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vector<float>>) return (V)_mm512_maskz_min_ps(0xffff, (__m512)end, (__m512)x);
#endif
  return x > end ? end : x;
}

// Within 2.5 units in the last place.
template <class T>
struct Math {
  FASTLM_INLINE Vector<T> sigmoid(const Vector<T>& x) {
    const Vector<T> end = Vector<T>{} + Simd<T>::kSigmoidEnd;
    Vector<T> scale, p;
    split_exp<T>(at_most(-at_most(x, end), end), scale, p);
    return quotient(Vector<T>{} + 1, 1 + (scale + scale * p));
  }

  FASTLM_INLINE Vector<T> tanh(const Vector<T>& x) {
    const Vector<T> a = at_most(x < 0 ? -x : x, Vector<T>{} + Simd<T>::kTanhEnd);
    Vector<T> scale, p;
    split_exp<T>(-2 * a, scale, p);
    const Vector<T> expm1 = scale * p + (scale - 1);  // of -2a
    // Near 1 the small distance from 1 is what must be exact: the gradient 1 - t² lives on it.
    const Vector<T> part = quotient(a > 1 ? 2 * (scale + scale * p) : -expm1, expm1 + 2);
    const Vector<T> t = a > 1 ? 1 - part : part;
    return x < 0 ? -t : t;
  }
};

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
