// Tiles of up to 6 rows of x by 4 or 8 rows of the weight, both read along K as they lie in memory: up to 24 vectors of
// partial sums, added up across their lanes at the end. The weight is widened in registers, once for all rows of x.
// Many rows go through quant_panels.h where that wins.
#include "../isa.h"
#include "../quant.h"

#if defined(__AVX512F__)

#include <cmath>
#include <type_traits>

#include "quant_panels.h"
#include "team.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int kRows = 6, kMostWide = 8, kSums = 32;  // of which a tile uses 24 at most
constexpr int64_t kBlock = 64;            // weight rows that a block takes: 64 · K bytes stay in L2
constexpr int64_t kLine = 64;             // bytes of a weight row that one step reads
constexpr int64_t kCache = 40 << 10;      // of L1, for a chunk of x and of the weight rows of two tiles

// Weight rows of a tile: many streams together read memory fastest, few leave registers for rows of x.
constexpr int wide(int rows) { return rows <= 2 ? 8 : 4; }

FASTLM_INLINE __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
FASTLM_INLINE __m512i add(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
FASTLM_INLINE __m512 bits(__m512 a) { return a; }
FASTLM_INLINE __m512 bits(__m512i a) { return _mm512_castsi512_ps(a); }
FASTLM_INLINE void from_bits(__m512 a, __m512& to) { to = a; }
FASTLM_INLINE void from_bits(__m512 a, __m512i& to) { to = _mm512_castps_si512(a); }

// Lane i of the result is the sum of the lanes of v[i]; v are 16.
template <class V>
FASTLM_INLINE V sums(V* v) {
  const auto both = [](__m512 low, __m512 high) {
    V a, b;
    from_bits(low, a);
    from_bits(high, b);
    return add(a, b);
  };
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 a = bits(v[2 * i]), b = bits(v[2 * i + 1]);
    v[i] = both(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(bits(v[2 * i])), b = _mm512_castps_pd(bits(v[2 * i + 1]));
    v[i] = both(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto quarters = [&both](V& p, V& q) {
    return both(_mm512_shuffle_f32x4(bits(p), bits(q), 0x88), _mm512_shuffle_f32x4(bits(p), bits(q), 0xdd));
  };
  V low = quarters(v[0], v[1]), high = quarters(v[2], v[3]);
  return quarters(low, high);
}

// The weight rows of a tile.
struct Rows {
  const uint8_t* bytes[kMostWide];
  const float* scale[kMostWide];
};

// Each kind of weight says how a line of x is laid out and how one line of the weight rows is multiplied with MR rows
// of it. The rows of a tile take turns line by line, so that a tile reads x from one end to the other. `left` counts the
// values of K from this line on; only the last line is a Tail.

struct Int8 {
  using X = float;
  using Sum = __m512;
  static constexpr int64_t kStep = 64;  // values of K in a line

  explicit Int8(const QuantizedLinear&) {}

  void prepare(const QuantizedLinear& p, int64_t row, X* x, int64_t stride, RowOfX*) const {
    copy_row(p, row, kStep, x, stride);
  }

  template <int MR, bool Tail, int N = wide(MR)>
  inline __attribute__((always_inline)) void step(Sum (&acc)[kSums], const X* x, const Rows& rows, int64_t line,
                                                  int64_t left) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __m512 w[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        const uint8_t* p = rows.bytes[j] + line * kLine + 16 * i;
        const __m128i q = Tail ? _mm_maskz_loadu_epi8(first(left - 16 * i), p) : _mm_loadu_si128((const __m128i*)p);
        w[j] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q));
      }
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const __m512 a = _mm512_load_ps(x + (line * MR + m) * kStep + 16 * i);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) acc[m * N + j] = _mm512_fmadd_ps(a, w[j], acc[m * N + j]);
      }
    }
  }
};

struct Int4 {
  using X = float;
  using Sum = __m512;
  static constexpr int64_t kStep = 128;

  int64_t group, groups;  // values in a group, groups in a line
  __m512i lane_group;

  explicit Int4(const QuantizedLinear& p) : group(p.group), groups(kStep / p.group) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    lane_group = _mm512_srl_epi32(lane, _mm_cvtsi64_si128(group == 32 ? 2 : group == 64 ? 3 : 4));
  }

  // Word l of a line holds the nibbles of k = 8l … 8l + 7: vector i of x takes k = 8l + i into its lane l.
  void prepare(const QuantizedLinear& p, int64_t row, X* x, int64_t stride, RowOfX*) const {
    alignas(64) float plain[kStep];
    for (int64_t start = 0; start < p.in; start += kStep, x += stride) {
      for (int64_t k = 0; k < kStep; k += 16)
        _mm512_store_ps(plain + k, load_number(p.x, row * p.in + start + k, p.number, first(p.in - start - k)));
      for (int i = 0; i < 8; ++i)
        for (int l = 0; l < 16; ++l) x[16 * i + l] = plain[8 * l + i];
    }
  }

  template <int MR, bool Tail, int N = wide(MR)>
  inline __attribute__((always_inline)) void step(Sum (&acc)[kSums], const X* x, const Rows& rows, int64_t line,
                                                  int64_t left) const {
    const __m512 values = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    __m512i q[N];
    __m512 scale[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const uint8_t* p = rows.bytes[j] + line * kLine;
      q[j] = Tail ? _mm512_maskz_loadu_epi8(first_bytes((left + 1) / 2), p) : _mm512_loadu_si512(p);
      const int64_t present = Tail ? std::min(groups, (left + group - 1) / group) : groups;
      const __m128 s = _mm_maskz_loadu_ps(first(present), rows.scale[j] + line * groups);
      scale[j] = _mm512_permutexvar_ps(lane_group, _mm512_zextps128_ps512(s));
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      __m512 w[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j)  // the permutation reads the low four bits of each index
        w[j] = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(q[j], 4 * i), values), scale[j]);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const __m512 a = _mm512_load_ps(x + (line * MR + m) * kStep + 16 * i);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) acc[m * N + j] = _mm512_fmadd_ps(a, w[j], acc[m * N + j]);
      }
    }
  }
};

struct Dynamic {
  using X = int8_t;
  using Sum = __m512i;
  static constexpr int64_t kStep = 64;

  explicit Dynamic(const QuantizedLinear&) {}

  void prepare(const QuantizedLinear& p, int64_t row, X* x, int64_t stride, RowOfX* rows) const {
    rows[row] = round_row(p, row, kStep, x, stride);
  }

  template <int MR, bool Tail, int N = wide(MR)>
  inline __attribute__((always_inline)) void step(Sum (&acc)[kSums], const X* x, const Rows& rows, int64_t line,
                                                  int64_t left) const {
    __m512i w[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const uint8_t* p = rows.bytes[j] + line * kLine;
      w[j] = Tail ? _mm512_maskz_loadu_epi8(first_bytes(left), p) : _mm512_loadu_si512(p);
      w[j] = _mm512_xor_si512(w[j], _mm512_set1_epi8(-128));  // + 128: one factor must be unsigned
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const __m512i a = _mm512_load_si512(x + (line * MR + m) * kStep);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[m * N + j] = dot(acc[m * N + j], w[j], a);
    }
  }
};

// `next`: bytes from each weight row to the one that is fetched meanwhile.
template <class Kind, int MR>
void tile(const Kind& kind, const typename Kind::X* x, const Rows& rows, int64_t next, int64_t begin, int64_t end,
          int64_t in, float* sum) {
  constexpr int N = wide(MR);
  typename Kind::Sum acc[kSums], before;
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) from_bits(_mm512_setzero_ps(), acc[i]);
  const int64_t whole = std::min(end, in / Kind::kStep);
  for (int64_t line = begin; line < whole; ++line) {
    // Rows of a weight are too short, and in too many pages, for the hardware to foresee.
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) _mm_prefetch(rows.bytes[j] + next + line * kLine, _MM_HINT_T0);
    kind.template step<MR, false>(acc, x, rows, line, 0);
  }
  if (whole < end) kind.template step<MR, true>(acc, x, rows, whole, in - whole * Kind::kStep);
#pragma GCC unroll 2
  for (int i = 0; i < MR * N; i += 16) {
    from_bits(_mm512_load_ps(sum + i), before);
    _mm512_store_ps(sum + i, bits(add(sums(acc + i), before)));
  }
}

struct Sizes {
  int64_t lines, padded, x_bytes, row_bytes;
};

template <class Kind>
Sizes sizes(const QuantizedLinear& p) {
  const int64_t lines = (p.in + Kind::kStep - 1) / Kind::kStep, padded = lines * Kind::kStep;
  const auto aligned = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  return {lines, padded, aligned(p.rows * padded * int64_t(sizeof(typename Kind::X))),
          aligned(p.rows * int64_t(sizeof(RowOfX)))};
}

template <class Kind>
void run(const QuantizedLinear& p) {
  using X = typename Kind::X;
  constexpr bool int4 = std::is_same<Kind, Int4>::value;
  using Tile = decltype(&tile<Kind, 1>);
  const Tile tiles[kRows] = {tile<Kind, 1>, tile<Kind, 2>, tile<Kind, 3>, tile<Kind, 4>, tile<Kind, 5>, tile<Kind, 6>};
  const Kind kind(p);
  const Sizes size = sizes<Kind>(p);
  X* const x = static_cast<X*>(p.workspace);
  RowOfX* const rows_of_x = reinterpret_cast<RowOfX*>(static_cast<char*>(p.workspace) + size.x_bytes);
  const uint8_t* const weight = static_cast<const uint8_t*>(p.weight);
  const int64_t row_bytes = int4 ? (p.in + 1) / 2 : p.in, row_scales = int4 ? (p.in + p.group - 1) / p.group : 1;
  const int64_t blocks = (p.out + kBlock - 1) / kBlock;

  parallel(p.threads, [&](Member& member) {
    for (int64_t m = member.begin(p.rows); m < member.end(p.rows); ++m) {
      const int64_t top = m / kRows * kRows, height = std::min<int64_t>(kRows, p.rows - top);
      kind.prepare(p, m, x + top * size.padded + (m - top) * Kind::kStep, height * Kind::kStep, rows_of_x);
    }
    if (member.count > 1) member.meet();

    alignas(64) float sum[kBlock / 4 * kSums];  // [tile][row of x][row of the weight], or integers in these bits
    alignas(64) float row[kBlock] = {};
    for (int64_t block = member.begin(blocks); block < member.end(blocks); ++block) {
      const int64_t n0 = block * kBlock, width = std::min(kBlock, p.out - n0);
      for (int64_t m = 0; m < p.rows; m += kRows) {
        const int height = static_cast<int>(std::min<int64_t>(kRows, p.rows - m)), across = wide(height);
        const int64_t count = (width + across - 1) / across;
        const int64_t chunk = kCache / (height * Kind::kStep * int64_t(sizeof(X)) + 2 * across * kLine);
        const int64_t pass = m / kRows, passes = (p.rows + kRows - 1) / kRows;
        std::fill_n(sum, count * kSums, 0.f);
        for (int64_t line = 0; line < size.lines; line += chunk)
          for (int64_t i = 0; i < count; ++i) {
            Rows rows;
            for (int j = 0; j < across; ++j) {
              const int64_t n = std::min(n0 + i * across + j, p.out - 1);  // what is missing is taken again
              rows.bytes[j] = weight + n * row_bytes;
              rows.scale[j] = p.scale + n * row_scales;
            }
            // The next tile, or a share of the next block, which all passes together bring into L2.
            const int64_t next = passes > 1 && i % passes == pass ? kBlock : across;
            tiles[height - 1](kind, x + m * size.padded, rows, next * row_bytes, line,
                              std::min(line + chunk, size.lines), p.in, sum + i * kSums);
          }
        for (int i = 0; i < height; ++i) {
          for (int64_t t = 0; t < count; ++t)  // not a gather: mitigations have made those slow
            std::memcpy(row + t * across, sum + t * kSums + i * across, across * sizeof(float));
          finish(p, m + i, n0, width, row, rows_of_x + m + i);
        }
      }
    }
  });
}

// --- one row of x ---------------------------------------------------------------------------------------------------

// By rows of 8 bits: x becomes fixed-point numbers of four signed bytes, which the weight is multiplied by as it lies.
// That takes 5 instructions for 64 weights; to widen them to float32 takes 12.
class FixedRow {
  static constexpr int kDigits = 4, kTogether = 4;  // bytes of a number, rows of the weight
  static constexpr int64_t kStep = 64;              // inputs of a line, which is [digit][input], the lowest digit first
  static constexpr int64_t kMost = 1024;            // lines whose sums of products fit in 32 bits

  const QuantizedLinear& p;
  const int64_t lines;
  int8_t* const digits;
  double unit, offset = 0;  // of x, and 128 times the sum of its numbers: what the weight's offset adds

 public:
  // Whether x keeps the digits that it has in float32: a quarter of what is not 0 is within 64 times of the largest.
  static bool fits(const QuantizedLinear& p, uint32_t largest) {
    if (largest >= kInfinity) return false;
    float most;
    std::memcpy(&most, &largest, sizeof most);
    const __m512 limit = _mm512_set1_ps(most / 64);
    int64_t large = 0, there = 0;
    for_vectors(p, 0, p.in, [&](int64_t, __m512 v) {
      large += __builtin_popcount(_mm512_cmp_ps_mask(_mm512_abs_ps(v), limit, _CMP_GE_OQ));
      there += __builtin_popcount(_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_OQ));
    });
    return 4 * large >= there;
  }

  // `largest`: the bits of the largest magnitude. Of 2^-shift, the unit, it has less than 2^30.
  FixedRow(const QuantizedLinear& p, uint32_t largest)
      : p(p), lines((p.in + kStep - 1) / kStep), digits(static_cast<int8_t*>(p.workspace)) {
    const int shift = 156 - int(std::max(largest, uint32_t{1} << 23) >> 23);
    const __m512 scale = _mm512_set1_ps(float(shift));
    const __m512i half = _mm512_set1_epi32(0x00808080);
    __m512i total = _mm512_setzero_si512();
    for_vectors(p, 0, lines * kStep, [&](int64_t k, __m512 v) {
      const __m512i q = _mm512_cvtps_epi32(_mm512_scalef_ps(v, scale));
      total = _mm512_add_epi64(total, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(q)));
      total = _mm512_add_epi64(total, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(q, 1)));
      const __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(q, half), half);  // of -128 to 127 each
      int8_t* const to = digits + k / kStep * kStep * kDigits + k % kStep;
      for (int d = 0; d < kDigits; ++d)
        _mm_storeu_si128((__m128i*)(to + d * kStep),
                         _mm512_cvtepi32_epi8(_mm512_srl_epi32(bytes, _mm_cvtsi32_si128(8 * d))));
    });
    unit = std::ldexp(1., -shift);
    offset = 128. * double(_mm512_reduce_add_epi64(total));
  }

  void run() const {
    const int64_t blocks = (p.out + kBlock - 1) / kBlock;
    parallel(p.threads, [&](Member& member) {
      alignas(64) float found[kBlock] = {};
      for (int64_t block = member.begin(blocks); block < member.end(blocks); ++block) {
        const int64_t n0 = block * kBlock, width = std::min(kBlock, p.out - n0);
        for (int64_t n = 0; n < width; n += kTogether) multiply(n0 + n, found + n);
        finish(p, 0, n0, width, found, nullptr);
      }
    });
  }

 private:
  // found [kTogether] = rows of the weight from n on, the last one again for those that are missing, times x.
  void multiply(int64_t n, float* found) const {
    const uint8_t* rows[kTogether];
    for (int j = 0; j < kTogether; ++j)
      rows[j] = static_cast<const uint8_t*>(p.weight) + std::min(n + j, p.out - 1) * p.in;
    double total[kTogether] = {};
    for (int64_t line = 0; line < lines; line += kMost) {
      alignas(64) int32_t sum[kTogether * kDigits];
      _mm512_store_si512(sum, products(rows, line, std::min(line + kMost, lines)));
      for (int j = 0; j < kTogether; ++j) {
        const int32_t* const d = sum + j * kDigits;
        total[j] += d[0] + 256. * d[1] + 65536. * d[2] + 16777216. * d[3];
      }
    }
    for (int j = 0; j < kTogether; ++j) found[j] = float((total[j] - offset) * unit);
  }

  // The sums of some lines, [kTogether][kDigits].
  __m512i products(const uint8_t* const* rows, int64_t begin, int64_t end) const {
    __m512i acc[kTogether * kDigits] = {};
    const auto step = [&](int64_t line, __mmask64 there) __attribute__((always_inline)) {
      __m512i x[kDigits];
#pragma GCC unroll 4
      for (int d = 0; d < kDigits; ++d) x[d] = _mm512_loadu_si512(digits + (line * kDigits + d) * kStep);
#pragma GCC unroll 4
      for (int j = 0; j < kTogether; ++j) {
        const uint8_t* const at = rows[j] + line * kStep;
        _mm_prefetch(at + kTogether * p.in, _MM_HINT_T0);
        const __m512i w = _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, at), _mm512_set1_epi8(-128));
#pragma GCC unroll 4
        for (int d = 0; d < kDigits; ++d) acc[j * kDigits + d] = dot(acc[j * kDigits + d], w, x[d]);
      }
    };
    const int64_t whole = std::min(end, p.in / kStep);
    for (int64_t line = begin; line < whole; ++line) step(line, ~__mmask64{0});
    if (whole < end) step(whole, first_bytes(p.in % kStep));
    return sums(acc);
  }
};

template <class Then>
auto with_panel(const QuantizedLinear& p, const Then& then) {
  if (p.kind == QuantizedWeight::int8_dynamic) return then(Bytes());
  if (p.kind == QuantizedWeight::int4) return then(Pairs4());
  if constexpr (kSplits) {
    if (p.number == Number::f32) return then(Split8<3>());
    if (p.number == Number::f16) return then(Split8<2>());
  }
  return then(Pairs8());
}

}  // namespace

size_t quantized_linear_workspace(const QuantizedLinear& p) {
  if (in_panels(p)) return with_panel(p, [&](auto kind) { return PanelPlan<decltype(kind)>(p).bytes(p.threads); });
  const Sizes size = p.kind == QuantizedWeight::int8   ? sizes<Int8>(p)
                     : p.kind == QuantizedWeight::int4 ? sizes<Int4>(p)
                                                       : sizes<Dynamic>(p);
  return size.x_bytes + size.row_bytes;
}

void quantized_linear(const QuantizedLinear& p) {
  if (in_panels(p)) return with_panel(p, [&](auto kind) { panels<decltype(kind)>(p); });
  if (p.kind == QuantizedWeight::int8 && p.rows == 1)  // in the workspace of Int8, whose x is as large
    if (const uint32_t largest = largest_of(p, 0); FixedRow::fits(p, largest)) return FixedRow(p, largest).run();
  if (p.kind == QuantizedWeight::int8) return run<Int8>(p);
  if (p.kind == QuantizedWeight::int4) return run<Int4>(p);
  run<Dynamic>(p);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm

#endif
