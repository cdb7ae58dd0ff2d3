// Sums of the lanes of several vectors at once.
#pragma once

#include <utility>

#include "simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// Sums of neighbouring lanes: those of a, then those of b.
template <class V, class Bits, size_t... I>
FASTLM_INLINE V add_pairs(const V& a, const V& b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
#else
  return __builtin_shuffle(a, b, Bits{(2 * I)...}) + __builtin_shuffle(a, b, Bits{(2 * I + 1)...});
#endif
}

// out[i] = the sum of v[i]'s lanes; n ≤ lanes is a power of two
template <class T, int n>
FASTLM_INLINE void sums(Vector<T>* v, T* out) {
  constexpr int lanes = kLanes<T>;
  const auto pair = [](const Vector<T>& a, const Vector<T>& b) {
    return add_pairs<Vector<T>, typename Simd<T>::Bits>(a, b, std::make_index_sequence<lanes>());
  };
#pragma GCC unroll 4
  for (int left = n / 2; left > 0; left /= 2)
#pragma GCC unroll 8
    for (int j = 0; j < left; ++j) v[j] = pair(v[2 * j], v[2 * j + 1]);
#pragma GCC unroll 4
  for (int folded = n; folded < lanes; folded *= 2) v[0] = pair(v[0], v[0]);
  store(out, v[0], n);
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
