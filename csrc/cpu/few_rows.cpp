// Products with few rows: W is read once, where it lies, because to pack it would take longer than to use it. What bounds
// them is bandwidth.

#include "../isa.h"
#include "../product.h"

#include <algorithm>

#include "simd.h"
#include "sums.h"
#include "team.h"

namespace fastlm {

FASTLM_DECLARE_PRODUCT(FASTLM_ISA)

namespace FASTLM_ISA {
namespace {

constexpr int64_t kWorthwhile = 1 << 16;  // multiplications for one thread

// How numbers of x and W are read and multiplied: widened, or where the CPU can (AVX512_BF16), bfloat16 as pairs.
template <class S>
struct Widened {
  using Number = S;
  using T = Compute<S>;
  static constexpr int kCount = kLanes<T>;
  static Vector<T> read(const S* p, int n) { return load(p, n); }
  static Vector<T> add(const Vector<T>& acc, const Vector<T>& a, const Vector<T>& b) { return acc + a * b; }
};

#if defined(__AVX512F__)
struct Pairs {
  using Number = Bf16;
  using T = float;
  static constexpr int kCount = 32;
  static __m512i read(const Bf16* p, int n) { return _mm512_maskz_loadu_epi16(~uint32_t{0} >> (32 - n), p); }
  static Vector<float> add(Vector<float> acc, __m512i a, __m512i b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
  }
};
#endif

// y [M, R] of rows of x and as many rows of W.
template <class Kind, int M, int R, class S = typename Kind::Number>
void tile(const FewRows& p, const S* x, const S* w, const S* bias, S* y) {
  using T = typename Kind::T;
  using V = Vector<T>;
  V acc[M][R] = {};
  const auto add = [&](int64_t k, int n) FASTLM_INLINED {
    decltype(Kind::read(x, n)) v[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) v[m] = Kind::read(x + m * p.depth + k, n);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(w + r * p.w_row + k + 1024 / sizeof(S));
      const auto a = Kind::read(w + r * p.w_row + k, n);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m][r] = Kind::add(acc[m][r], a, v[m]);
    }
  };
  int64_t k = 0;
  for (; k + Kind::kCount <= p.depth; k += Kind::kCount) add(k, Kind::kCount);
  if (k < p.depth) add(k, int(p.depth - k));
  constexpr int together = R < kLanes<T> ? R : kLanes<T>;
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; r += together) {
      T found[together];
      sums<T, together>(acc[m] + r, found);
      const V bias_of = bias ? load(bias + r, together) : V{};
      store(y + m * p.columns + r, load(found, together) + bias_of, together);
    }
}

// `columns` of y are made together: as many streams of W.
template <class Kind, int columns>
void run(const FewRows& p) {
  using S = typename Kind::Number;
  constexpr int rows = kAccumulators / columns;  // of x, that one pass over these makes
  if constexpr (columns > 4)
    if (p.rows > rows) return run<Kind, columns / 2>(p);
  if (p.rows == 0 || p.columns == 0) return;
  const S *x = static_cast<const S*>(p.x), *w = static_cast<const S*>(p.w), *bias = static_cast<const S*>(p.bias);
  const int64_t groups = (p.columns + columns - 1) / columns;
  const int64_t most = 1 + p.rows * p.columns * p.depth / kWorthwhile;
  parallel(int(std::min({int64_t(p.threads), groups, most})), [&](Member& me) {
    const int64_t end = std::min(me.end(groups) * columns, p.columns);
    for (int64_t i = me.begin(groups) * columns, count; i < end; i += count) {
      count = end - i < columns ? 1 : columns;
      for (int64_t row = 0; row < p.rows; row += rows)
        with_count<rows>(p.rows - row, [&](auto m) {
          const auto make = count == 1 ? tile<Kind, m, 1> : tile<Kind, m, columns>;
          make(p, x + row * p.depth, w + i * p.w_row, bias ? bias + i : nullptr,
               static_cast<S*>(p.y) + row * p.columns + i);
        });
    }
  });
}

}  // namespace

void few_rows(const FewRows& p, size_t number) {
  if (number == sizeof(float)) return run<Widened<float>, 8>(p);
#if defined(__AVX512F__)
  if (p.rows > 3 && kernels.pairs) return run<Pairs, 4>(p);  // fewer are bound by bandwidth
#endif
  run<Widened<Bf16>, 8>(p);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
