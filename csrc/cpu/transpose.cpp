// Transposing matrices of 16-bit numbers: squares of them in registers, two rows side by side in one vector.

#include "../product.h"

#include <algorithm>

#include "pack.h"
#include "team.h"

namespace fastlm {

FASTLM_DECLARE_PRODUCT(FASTLM_ISA)

namespace FASTLM_ISA {
namespace {

constexpr int kColumns = kLanes<float>, kRows = 2 * kColumns;  // of a square
constexpr int64_t kWorthwhile = 1 << 14;                       // numbers for one thread

// Write a vector past the caches where it is a whole line: what is made is read later, and all of it once.
FASTLM_INLINE void store_line(void* to, const Vector<float>& v) {
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0) return _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)v);
#endif
  std::memcpy(to, &v, sizeof v);
}

// Transpose rows x columns numbers, at most kRows x kColumns.
FASTLM_INLINE void square(const Bf16* from, int64_t from_row, Bf16* to, int64_t to_row, int rows, int columns) {
  const auto read = [&](int i) FASTLM_INLINED {
    return i < rows ? (Simd<float>::Bits)load(from + i * from_row, columns) : Simd<float>::Bits{};
  };
  Vector<float> pairs[kColumns];
#pragma GCC unroll 16
  for (int i = 0; i < kColumns; ++i) pairs[i] = (Vector<float>)(read(2 * i) >> 16 | read(2 * i + 1));
  transpose<float>(pairs);
#pragma GCC unroll 16
  for (int i = 0; i < kColumns; ++i) {
    if (i >= columns) break;
    if (rows == kRows)
      store_line(to + i * to_row, pairs[i]);
    else
      std::memcpy(to + i * to_row, &pairs[i], rows * sizeof *to);
  }
}

}  // namespace

void transpose_halves(const Transpose& p) {
  constexpr int line = 32;  // columns that are read together
  const int64_t lines = (p.columns + line - 1) / line, most = 1 + p.rows * p.columns / kWorthwhile;
  const auto* const from = static_cast<const Bf16*>(p.from);
  auto* const to = static_cast<Bf16*>(p.to);
  parallel(int(std::min({int64_t(p.threads), std::max<int64_t>(lines, 1), most})), [&](Member& me) {
    const int64_t end = std::min(me.end(lines) * line, p.columns);
    for (int64_t begin = me.begin(lines) * line; begin < end; begin += line)
      for (int64_t row = 0; row < p.rows; row += kRows)
        for (int64_t u = begin; u < std::min(begin + line, end); u += kColumns) {
          const int rows = int(std::min<int64_t>(p.rows - row, kRows));
          const int columns = int(std::min<int64_t>(end - u, kColumns));
          const Bf16* const x = from + row * p.from_row + u;
          Bf16* const y = to + u * p.to_row + row;
          if (rows == kRows && columns == kColumns)
            square(x, p.from_row, y, p.to_row, kRows, kColumns);
          else
            square(x, p.from_row, y, p.to_row, rows, columns);
        }
#if defined(__AVX512F__)
    _mm_sfence();
#endif
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
