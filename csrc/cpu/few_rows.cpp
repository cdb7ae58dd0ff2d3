// Products with few rows: W is read once, where it lies, because to pack it would take longer than to use it. What bounds
// them is bandwidth.

#include "../product.h"

#include <algorithm>

#include "simd.h"
#include "team.h"

namespace fastlm {

FASTLM_DECLARE_PRODUCT(FASTLM_ISA)

namespace FASTLM_ISA {
namespace {

constexpr int kColumns = 4;                          // of y, made together: as many streams of W
constexpr int kRows = kAccumulators / kColumns;      // of x, that one pass over these makes
constexpr int64_t kWorthwhile = 1 << 16;             // multiplications for one thread

// y [M, R] of rows of x and as many rows of W.
template <class S, int M, int R>
void tile(const FewRows& p, const S* x, const S* w, const S* bias, S* y) {
  using T = Compute<S>;
  using V = Vector<T>;
  constexpr int lanes = kLanes<T>;
  V acc[M][R] = {};
  const auto add = [&](int64_t k, int n) {
    V v[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) v[m] = load(x + m * p.depth + k, n);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(w + r * p.w_row + k + 1024 / sizeof(S));
      const V a = load(w + r * p.w_row + k, n);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m][r] += a * v[m];
    }
  };
  int64_t k = 0;
  for (; k + lanes <= p.depth; k += lanes) add(k, lanes);
  if (k < p.depth) add(k, int(p.depth - k));
  for (int m = 0; m < M; ++m) {
    V found = {};
    for (int r = 0; r < R; ++r) found[r] = sum<T>(acc[m][r]);
    if (bias) found += load(bias, R);
    store(y + m * p.columns, found, R);
  }
}

template <class S>
void run(const FewRows& p) {
  if (p.rows == 0 || p.columns == 0) return;
  const S *x = static_cast<const S*>(p.x), *w = static_cast<const S*>(p.w), *bias = static_cast<const S*>(p.bias);
  const int64_t groups = (p.columns + kColumns - 1) / kColumns;
  const int64_t most = 1 + p.rows * p.columns * p.depth / kWorthwhile;
  parallel(int(std::min({int64_t(p.threads), groups, most})), [&](Member& me) {
    for (int64_t i = me.begin(groups) * kColumns, end = std::min(me.end(groups) * kColumns, p.columns); i < end;
         i += kColumns)
      for (int64_t row = 0; row < p.rows; row += kRows)
        with_count<kRows>(p.rows - row, [&](auto m) {
          with_count<kColumns>(end - i, [&](auto r) {
            tile<S, m, r>(p, x + row * p.depth, w + i * p.w_row, bias ? bias + i : nullptr,
                          static_cast<S*>(p.y) + row * p.columns + i);
          });
        });
  });
}

}  // namespace

void few_rows(const FewRows& p, size_t number) { number == sizeof(float) ? run<float>(p) : run<Bf16>(p); }

}  // namespace FASTLM_ISA
}  // namespace fastlm
