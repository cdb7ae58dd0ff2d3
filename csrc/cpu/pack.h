// Packing: lines of a matrix, rows or columns, side by side in vectors, as an inner loop will read them.
#pragma once

#include <algorithm>
#include <utility>

#include "simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

template <class T, size_t... I>
FASTLM_INLINE void zip(const Vector<T>& a, const Vector<T>& b, Vector<T>& low, Vector<T>& high,
                       std::index_sequence<I...>) {
  constexpr int lanes = kLanes<T>;
#if defined(__clang__)
  low = __builtin_shufflevector(a, b, (I / 2 + I % 2 * lanes)...);
  high = __builtin_shufflevector(a, b, (lanes / 2 + I / 2 + I % 2 * lanes)...);
#else
  using Bits = typename Simd<T>::Bits;
  low = __builtin_shuffle(a, b, Bits{(I / 2 + I % 2 * lanes)...});
  high = __builtin_shuffle(a, b, Bits{(lanes / 2 + I / 2 + I % 2 * lanes)...});
#endif
}

// Transpose a square of vectors: each round interleaves its halves.
template <class T>
FASTLM_INLINE void transpose(Vector<T> (&v)[kLanes<T>]) {
  constexpr int lanes = kLanes<T>;
#pragma GCC unroll 4
  for (int round = 1; round < lanes; round *= 2) {
    Vector<T> w[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i)
      zip<T>(v[i], v[i + lanes / 2], w[2 * i], w[2 * i + 1], std::make_index_sequence<lanes>());
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) v[i] = w[i];
  }
}

// Calls put(k, j, v) for each k < depth: v holds number k of the lines that the j-th of `vectors` vectors takes, zeros
// after `count` lines in all. Number k of line i is from[i·across + k·along].
template <class T, int vectors, class Put>
FASTLM_INLINE void pack(const T* from, int64_t across, int64_t along, int64_t count, int64_t depth, const Put& put) {
  constexpr int lanes = kLanes<T>;
  const auto there = [&](int j) { return int(std::clamp<int64_t>(count - j * lanes, 0, lanes)); };
  if (across == 1 && count >= vectors * lanes) {
    for (int64_t k = 0; k < depth; ++k)
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) put(k, j, load(from + k * along + j * lanes));
  } else if (across == 1) {
    for (int64_t k = 0; k < depth; ++k)
      for (int j = 0; j < vectors; ++j) put(k, j, load(from + k * along + j * lanes, there(j)));
  } else if (along == 1) {
    for (int j = 0; j < vectors; ++j) {
      const auto square = [&](int64_t k, int deep) FASTLM_INLINED {
        Vector<T> v[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i)
          v[i] = i < there(j) ? load(from + (j * lanes + i) * across + k, deep) : Vector<T>{};
        transpose<T>(v);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i)
          if (i < deep) put(k + i, j, v[i]);
      };
      int64_t k = 0;
      for (; k + lanes <= depth; k += lanes) square(k, lanes);
      if (k < depth) square(k, int(depth - k));
    }
  } else {
    for (int j = 0; j < vectors; ++j)
      for (int64_t k = 0; k < depth; ++k) {
        Vector<T> v = {};
        for (int i = 0; i < there(j); ++i) v[i] = from[(j * lanes + i) * across + k * along];
        put(k, j, v);
      }
  }
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
