// Many rows of x: 64 rows of the weight at a time are unpacked into a panel in L2, from which tiles of up to 6 rows by
// 64 outputs are multiplied. A panel holds words of 32 bits, [word][output]: four integers or a pair of bfloat16,
// as a word of a row of x does; so nothing is added up across lanes. Weights of 8 bits are exact in bfloat16, and take
// their scale at the end; those of 4 bits, which take theirs here, are rounded as a bfloat16 weight is.
#pragma once

#include "quant_numbers.h"
#include "team.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int kWide = 64, kTall = 6;      // outputs and rows of a tile: 24 vectors of sums
constexpr int64_t kPanelWords = 256;      // 64 KB; sums of more at a stretch would cost accuracy
constexpr int64_t kSlice = 512;           // rows of x that are made ready together

// Each kind says how a vector that holds one word of 16 weight rows becomes kWords vectors of a panel, and how these
// are multiplied with a word of x.

FASTLM_INLINE __m512i dot_pairs(__m512i acc, __m512i w, __m512i x) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  return acc;
}

// Two vectors of float32 as pairs of bfloat16.
FASTLM_INLINE __m512i pairs(__m512 low, __m512 high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  __m512i both;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(high), "v"(low));
  return _mm512_permutexvar_epi16(order, both);
}

// Value i of the 4 or 8 in each word.
FASTLM_INLINE __m512 value8(__m512i w, int i) {
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(w, 24 - 8 * i), 24));
}

FASTLM_INLINE __m512 value4(__m512i w, int i) {
  const __m512 values = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(w, 4 * i), values);
}

struct BytePanel {
  static constexpr int kValues = 4, kWords = 1;  // in a word of the weight, and words of a panel that it becomes
  static __m512i multiply(__m512i acc, __m512i w, __m512i x) { return dot(acc, w, x); }
  static __m512i add(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
  static void unpack(__m512i w, __m512, uint32_t* to) {
    _mm512_store_si512(to, _mm512_xor_si512(w, _mm512_set1_epi8(-128)));  // + 128: one factor must be unsigned
  }
};

template <int bits>
struct PairPanel {
  static constexpr int kValues = 32 / bits, kWords = kValues / 2;
  static __m512i multiply(__m512i acc, __m512i w, __m512i x) { return dot_pairs(acc, w, x); }
  static __m512i add(__m512i a, __m512i b) {
    return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
  }
  static void unpack(__m512i w, __m512 scale, uint32_t* to) {
    const auto value = [&](int i) { return bits == 8 ? value8(w, i) : _mm512_mul_ps(value4(w, i), scale); };
#pragma GCC unroll 4
    for (int i = 0; i < kWords; ++i) _mm512_store_si512(to + i * kWide, pairs(value(2 * i), value(2 * i + 1)));
  }
};

// v[r] holds words of row r; afterwards v[w] holds word w of all 16 rows.
FASTLM_INLINE void transpose(__m512i* v) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      v[i + 2 * c] = _mm512_unpacklo_epi64(t[i + c], t[i + c + 2]);
      v[i + 2 * c + 1] = _mm512_unpackhi_epi64(t[i + c], t[i + c + 2]);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // v[4r + c]: quarter q holds word 4q + c of rows 4r … 4r + 3
    const __m512i even = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88), odd = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88);
    const __m512i odd2 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xdd);
    v[c] = _mm512_shuffle_i32x4(even, even2, 0x88);
    v[8 + c] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    v[4 + c] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    v[12 + c] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
}

// Unpack lines [begin, end) of weight rows n … n + 15 into 16 columns of a panel. Rows and values past the end count
// as the last row and as 0.
template <class Kind>
void unpack(const QuantizedLinear& p, int64_t n, int64_t begin, int64_t end, uint32_t* to) {
  const bool int4 = p.kind == QuantizedWeight::int4;
  const int64_t row_bytes = int4 ? (p.in + 1) / 2 : p.in, groups = int4 ? (p.in + p.group - 1) / p.group : 1;
  const int64_t in_line = 16 * Kind::kValues, here = int4 ? in_line / p.group : 1;  // values and groups of a line
  alignas(64) float scale[4][16] = {};
  for (int64_t line = begin; line < end; ++line) {
    const __mmask64 present = first_bytes(row_bytes - line * 64);
    __m512i v[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      const int64_t row = std::min(n + r, p.out - 1);
      v[r] = _mm512_maskz_loadu_epi8(present, static_cast<const uint8_t*>(p.weight) + row * row_bytes + line * 64);
      if (int4)
        for (int64_t g = 0; g < here; ++g)
          scale[g][r] = line * here + g < groups ? p.scale[row * groups + line * here + g] : 0.f;
    }
    transpose(v);
#pragma GCC unroll 16
    for (int w = 0; w < 16; ++w, to += Kind::kWords * kWide)
      Kind::unpack(v[w], _mm512_load_ps(scale[w * here / 16]), to);
  }
}

// Lines of weight rows that a tile brings into L2 meanwhile.
struct Fetch {
  const uint8_t* from;
  int64_t row_bytes, rows;
};

// sums [MR, kWide] = or, with `more`, += x [MR, lines]·panel.
template <class Kind, int MR>
void panel_tile(const uint32_t* x, int64_t stride, const uint32_t* panel, int64_t lines, float* sums, bool more,
                const Fetch& fetch) {
  __m512i acc[MR][4];
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      acc[m][j] = _mm512_setzero_si512();
  for (int64_t line = 0; line < lines; ++line) {
    for (int64_t r = 0; r < fetch.rows; ++r) _mm_prefetch(fetch.from + r * fetch.row_bytes + line * 64, _MM_HINT_T1);
    for (int w = 0; w < 16 * Kind::kWords; w += 4, x += 4, panel += 4 * kWide)
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        __m512i b[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) b[j] = _mm512_load_si512(panel + u * kWide + 16 * j);
#pragma GCC unroll 6
        for (int m = 0; m < MR; ++m) {
          const __m512i a = _mm512_set1_epi32(static_cast<int>(x[m * stride + u]));
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) acc[m][j] = Kind::multiply(acc[m][j], b[j], a);
        }
      }
  }
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      float* const to = sums + m * kWide + 16 * j;
      if (more) acc[m][j] = Kind::add(acc[m][j], _mm512_loadu_si512(to));
      _mm512_storeu_si512(to, acc[m][j]);
    }
}

// What the workspace holds, in lines of 64 bytes: a slice of x, its scales, and for each thread a panel and sums.
template <class Kind>
struct PanelPlan {
  int64_t lines, chunk, stride, slice, x, scales, mine;  // the last three in bytes

  explicit PanelPlan(const QuantizedLinear& p)
      : lines((p.in + 16 * Kind::kValues - 1) / (16 * Kind::kValues)),
        chunk(std::min(lines, kPanelWords / (16 * Kind::kWords))),
        stride((lines * Kind::kWords + 1) * 16),  // words of a row of x; one line more keeps rows in other cache sets
        slice(std::min(p.rows, kSlice)),
        x(slice * stride * 4),
        scales((slice * int64_t(sizeof(RowOfX)) + 63) / 64 * 64),
        mine((chunk * 16 * Kind::kWords + slice) * kWide * 4) {}

  size_t bytes(int threads) const { return x + scales + mine * threads; }
};

template <class Kind>
void ready(const QuantizedLinear& p, int64_t row, uint32_t* x, int64_t words, RowOfX* of) {
  if (p.kind == QuantizedWeight::int8_dynamic) {
    *of = round_row(p, row, 64, reinterpret_cast<int8_t*>(x), 64);
  } else {
    std::memset(x + p.in / 2, 0, (words - p.in / 2) * 4);
    std::memcpy(x, static_cast<const uint16_t*>(p.x) + row * p.in, p.in * 2);
  }
}

// Outputs n … n + width of the rows of a slice, the first of which is row m0 of x.
template <class Kind>
void panel_block(const QuantizedLinear& p, const PanelPlan<Kind>& plan, int64_t n, int64_t m0, int64_t rows,
                 const uint32_t* x, const RowOfX* of, uint32_t* panel, float* sums) {
  using Tile = decltype(&panel_tile<Kind, 1>);
  static constexpr Tile tile[kTall] = {panel_tile<Kind, 1>, panel_tile<Kind, 2>, panel_tile<Kind, 3>,
                                       panel_tile<Kind, 4>, panel_tile<Kind, 5>, panel_tile<Kind, 6>};
  const int64_t row_bytes = p.kind == QuantizedWeight::int4 ? (p.in + 1) / 2 : p.in;
  const int64_t tiles = (rows + kTall - 1) / kTall;
  for (int64_t line = 0; line < plan.lines; line += plan.chunk) {
    const int64_t end = std::min(line + plan.chunk, plan.lines);
    for (int j = 0; j < kWide; j += 16) unpack<Kind>(p, n + j, line, end, panel + j);
    const int64_t next = end < plan.lines ? n : n + kWide, there = std::min<int64_t>(kWide, p.out - next);
    const uint8_t* from = static_cast<const uint8_t*>(p.weight) + next * row_bytes + (end < plan.lines ? end * 64 : 0);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m = rows * t / tiles, height = rows * (t + 1) / tiles - m;
      const int64_t begin = there * t / tiles, share = there <= 0 ? 0 : there * (t + 1) / tiles - begin;
      tile[height - 1](x + m * plan.stride + line * 16 * Kind::kWords, plan.stride, panel, end - line,
                       sums + m * kWide, line > 0, {from + begin * row_bytes, row_bytes, share});
      if (end == plan.lines)
        for (int64_t i = m; i < m + height; ++i)
          finish(p, m0 + i, n, std::min<int64_t>(kWide, p.out - n), sums + i * kWide, of + i);
    }
  }
}

template <class Kind>
void panels(const QuantizedLinear& p) {
  const PanelPlan<Kind> plan(p);
  char* const workspace = static_cast<char*>(p.workspace);
  uint32_t* const x = reinterpret_cast<uint32_t*>(workspace);
  RowOfX* const of = reinterpret_cast<RowOfX*>(workspace + plan.x);
  const int64_t blocks = (p.out + kWide - 1) / kWide;
  parallel(p.threads, [&](Member& member) {
    uint32_t* const panel = reinterpret_cast<uint32_t*>(workspace + plan.x + plan.scales + member.index * plan.mine);
    float* const sums = reinterpret_cast<float*>(panel + plan.chunk * 16 * Kind::kWords * kWide);
    for (int64_t m0 = 0; m0 < p.rows; m0 += plan.slice) {
      const int64_t rows = std::min(plan.slice, p.rows - m0);
      if (m0 > 0) member.meet();  // all are through with the slice before
      for (int64_t m = member.begin(rows); m < member.end(rows); ++m)
        ready<Kind>(p, m0 + m, x + m * plan.stride, plan.stride, of + m);
      member.meet();
      for (int64_t block = member.begin(blocks); block < member.end(blocks); ++block)
        panel_block<Kind>(p, plan, block * kWide, m0, rows, x, of, panel, sums);
    }
  });
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
