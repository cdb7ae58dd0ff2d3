// Many rows of x: the lanes of a vector are 16 of them, [word][16 rows], and a word of the weight is multiplied with
// all 16 at once; so nothing is added up across lanes, and the weight is unpacked without being transposed. A word is
// of 32 bits: four integers or a pair of bfloat16. Weights of 8 bits are exact in bfloat16, and take their scale at the
// end; those of 4 bits, which take theirs here, are rounded as a bfloat16 weight is.
#pragma once

#include "quant_numbers.h"
#include "team.h"
#ifdef FASTLM_TILES
#include "quant_tiles.h"
#else
#include "quant_vectors.h"
#endif

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kLanes = 16;     // rows of x in a vector
constexpr int64_t kSlice = 512;    // rows of x that are made ready together

// Each kind says how a line of 64 bytes of a weight row becomes kVectors of words.

FASTLM_INLINE __m128i quarter(const uint8_t* line, int i) { return _mm_loadu_si128((const __m128i*)line + i); }

struct Bytes {
  static constexpr int kValues = 64, kVectors = 1, kParts = 1;
  static constexpr bool kIntegers = true;
  static void unpack(const uint8_t* line, const float*, int, uint32_t* to, int64_t) {
    const __m512i w = _mm512_loadu_si512(line);
    _mm512_store_si512(to, kSigned ? w : _mm512_xor_si512(w, _mm512_set1_epi8(-128)));
  }
};

struct Pairs8 {
  static constexpr int kValues = 64, kVectors = 2, kParts = 1;
  static constexpr bool kIntegers = false;
  static void unpack(const uint8_t* line, const float*, int, uint32_t* to, int64_t step) {
    const auto value = [&](int i) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter(line, i))); };
    for (int i = 0; i < kVectors; ++i) _mm512_store_si512(to + step * i, narrow(value(2 * i), value(2 * i + 1)));
  }
};

// The same, where x has more digits than a bfloat16: it is the exact sum of so many. (Tiles take denormal numbers for
// zero, so that numbers below 2^-110 lose digits.)
template <int parts>
struct Split8 : Pairs8 {
  static constexpr int kParts = parts;
};

// Of 32 values those at even places come first, in x too.
struct Pairs4 {
  static constexpr int kValues = 128, kVectors = 4, kParts = 1;
  static constexpr bool kIntegers = false;
  static void unpack(const uint8_t* line, const float* scale, int groups, uint32_t* to, int64_t step) {
    const __m512 values = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    for (int i = 0; i < kVectors; ++i) {
      const __m512i q = _mm512_cvtepu8_epi32(quarter(line, i));
      const __m512 s = _mm512_set1_ps(scale[i * groups / 4]);
      const auto value = [&](__m512i q) { return _mm512_mul_ps(_mm512_permutexvar_ps(q, values), s); };  // low 4 bits
      _mm512_store_si512(to + step * i, narrow(value(q), value(_mm512_srli_epi32(q, 4))));
    }
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

// Write word w of 16 rows, `stride` words apart, to to[w · to_stride …].
inline void transpose(const uint32_t* from, int64_t stride, uint32_t* to, int64_t to_stride) {
  __m512i v[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) v[r] = _mm512_loadu_si512(from + r * stride);
  transpose(v);
#pragma GCC unroll 16
  for (int w = 0; w < 16; ++w) _mm512_storeu_si512(to + w * to_stride, v[w]);
}

// What the workspace holds, in lines of 64 bytes: a slice of x by rows and by lanes, its scales, and for each thread a
// panel and sums.
template <class Kind>
struct PanelPlan {
  int64_t lines, part, words, stride, slice;
  int64_t sums;             // from row to row of the sums: as for x
  int64_t block;            // rows of the weight: in L1, or in L2 for several tiles of x
  int64_t x, scales, mine;  // bytes

  explicit PanelPlan(const QuantizedLinear& p)
      : lines((p.in + Kind::kValues - 1) / Kind::kValues),
        part(lines * Kind::kVectors * 16),   // words of a part of a row
        words(part * Kind::kParts),          // of a row
        stride(words + 16),                  // one line more keeps rows in other cache sets
        slice((std::min(p.rows, kSlice) + kLanes - 1) / kLanes * kLanes),
        sums(kSpreads && slice > kMostAcross * kLanes ? slice + kLanes : slice),
        block(slice <= kMostAcross * kLanes ? kFewRows : kMostBlock),
        x(slice * stride * 4),
        scales((slice * int64_t(sizeof(RowOfX)) + 63) / 64 * 64),
        mine((kPanelWords + sums) * block * 4) {}

  size_t bytes(int threads) const { return 2 * x + scales + mine * threads; }
};

// Unpack lines [begin, end) of row n of the weight, into lines that are `step` words apart. What is past the end counts
// as 0.
template <class Kind>
void unpack(const QuantizedLinear& p, int64_t n, int64_t begin, int64_t end, uint32_t* to, int64_t step) {
  const bool int4 = p.kind == QuantizedWeight::int4;
  const int64_t row_bytes = int4 ? (p.in + 1) / 2 : p.in, whole = std::min(end, row_bytes / 64);
  const int groups = int4 ? 128 / p.group : 0;  // of a line
  const int64_t all_groups = int4 ? (p.in + p.group - 1) / p.group : 1;
  const uint8_t* const from = static_cast<const uint8_t*>(p.weight) + n * row_bytes;
  const float* const scale = p.scale + n * all_groups;
  for (int64_t line = begin; line < whole; ++line, to += step * Kind::kVectors)
    Kind::unpack(from + line * 64, scale + line * groups, groups, to, step);
  if (whole == end) return;
  alignas(64) uint8_t last[64];
  float last_scale[4] = {};
  _mm512_store_si512(last, _mm512_maskz_loadu_epi8(first_bytes(row_bytes - whole * 64), from + whole * 64));
  if (int4) std::copy(scale + whole * groups, scale + all_groups, last_scale);
  Kind::unpack(last, last_scale, groups, to, step);
}

// A block of outputs, from n0 on, of the rows of a slice, the first of which is row m0 of x.
template <class Kind>
void panel_block(const QuantizedLinear& p, const PanelPlan<Kind>& plan, const PanelRegisters& registers, int64_t n0,
                 int64_t m0, int64_t rows, const uint32_t* x, const RowOfX* of, uint32_t* panel, float* sums) {
  constexpr int64_t line_words = 16 * Kind::kVectors, chunk = kPanelWords / line_words;
  const int64_t row_bytes = p.kind == QuantizedWeight::int4 ? (p.in + 1) / 2 : p.in, next = plan.words * kLanes;
  const int64_t vectors = (rows + kLanes - 1) / kLanes, tiles = vectors <= kMostAcross ? 1 : (vectors + 1) / 2;
  const uint8_t* const weight = static_cast<const uint8_t*>(p.weight);
  std::fill_n(sums, plan.block * plan.sums, 0.f);
  for (int64_t line = 0; line < plan.lines; line += chunk) {
    const int64_t end = std::min(line + chunk, plan.lines), words = (end - line) * line_words;
    Panel part{weight + n0 * row_bytes + line * 64, row_bytes, 16 * row_bytes, 64};
    if (!(kSigned && Kind::kIntegers && tiles == 1 && n0 + plan.block <= p.out && end * 64 <= p.in)) {
      part = packed(panel, words);  // integers may be multiplied where they lie, once
      for (int64_t r = 0; r < plan.block; ++r)  // what is missing is taken again
        unpack<Kind>(p, std::min(n0 + r, p.out - 1), line, end,
                     panel + (r / 16 * part.low + r % 16 * part.row) / 4, part.step / 4);
    }
    const bool ends = end == plan.lines;
    const int64_t next_row = ends ? n0 + plan.block : n0, next_byte = ends ? 0 : end * 64;
    const Ahead ahead{weight + next_row * row_bytes + next_byte, row_bytes, p.out - next_row};
    const int64_t shares = kSpreads ? tiles : 1;  // of the rows to fetch, one with each of the first vectors
    for (int64_t r = 0; r < plan.block; r += kGroup) {
      const int64_t group = std::min(kGroup, plan.block - r);
      const Panel here{static_cast<const uint8_t*>(part.first) + r / 16 * part.low, part.row, part.low, part.step};
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t v = vectors * i / tiles, across = vectors * (i + 1) / tiles - v;
        const int64_t some = group * std::min(i, shares) / shares, more = group * std::min(i + 1, shares) / shares;
        for (int64_t k = Kind::kParts - 1; k >= 0; --k)  // the smallest first
          multiply_panel<Kind>(registers, x + v * next + (k * plan.part + line * line_words) * kLanes, next, across,
                               here, words, group, sums + r * plan.sums + v * kLanes, plan.sums,
                               ahead.part(r + some, k > 0 ? 0 : more - some));
      }
    }
  }
  alignas(64) float y[kLanes * kMostBlock];
  const int64_t width = std::min(plan.block, p.out - n0);
  for (int64_t m = 0; m < rows; ++m) {
    if (m % kLanes == 0)
      for (int64_t r = 0; r < plan.block; r += 16)
        transpose(reinterpret_cast<const uint32_t*>(sums) + r * plan.sums + m, plan.sums,
                  reinterpret_cast<uint32_t*>(y) + r, kMostBlock);
    finish(p, m0 + m, n0, width, y + m % kLanes * kMostBlock, of + m);
  }
}

// Row m of x in bfloat16, as parts of `part` words, each of the digits that the ones before leave out.
template <int parts>
void split_row(const QuantizedLinear& p, int64_t m, int64_t part, uint32_t* x) {
  for_vectors(p, m, part * 2, [&](int64_t k, __m512 v) {
    const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_sub_ps(v, v), _mm512_setzero_ps(), _CMP_EQ_OQ);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    __m512i bits = _mm512_mask_mov_epi32(_mm512_castps_si512(v), nan, _mm512_set1_epi32(0x7fc00000));
#pragma GCC unroll 3
    for (int i = 0; i < parts; ++i) {
      const __m512i kept = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(x + i * part) + k),
                          _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
      const __m512 left = _mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_castsi512_ps(kept));
      bits = _mm512_maskz_mov_epi32(finite, _mm512_castps_si512(left));
    }
  });
}

// Row m of x as words, zeros past the end; an m past the last row: zeros.
template <class Kind>
void ready(const QuantizedLinear& p, int64_t m, int64_t words, uint32_t* x, RowOfX* of) {
  if (m >= p.rows) {
    std::memset(x, 0, words * 4);
  } else if constexpr (Kind::kParts > 1) {
    split_row<Kind::kParts>(p, m, words / Kind::kParts, x);
  } else if (p.kind == QuantizedWeight::int8_dynamic) {
    *of = round_row(p, m, 64, reinterpret_cast<int8_t*>(x), 64);
    if (kSigned) of->offset = 0;
  } else {
    std::memset(x + p.in / 2, 0, (words - p.in / 2) * 4);
    std::memcpy(x, static_cast<const uint16_t*>(p.x) + m * p.in, p.in * 2);
    const __m512i even_first = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26,
                                                24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    if (p.kind == QuantizedWeight::int4)
      for (uint32_t* v = x; v < x + words; v += 16)
        _mm512_storeu_si512(v, _mm512_permutexvar_epi16(even_first, _mm512_loadu_si512(v)));
  }
}

template <class Kind>
void panels(const QuantizedLinear& p) {
  const PanelPlan<Kind> plan(p);
  char* const workspace = static_cast<char*>(p.workspace);
  uint32_t* const by_rows = reinterpret_cast<uint32_t*>(workspace);
  uint32_t* const x = reinterpret_cast<uint32_t*>(workspace + plan.x);
  RowOfX* const of = reinterpret_cast<RowOfX*>(workspace + 2 * plan.x);
  const int64_t blocks = (p.out + plan.block - 1) / plan.block;
  const bool many = plan.slice > kMostAcross * kLanes;  // few rows: what lies in order is read by one thread
  Queue queue;
  parallel(p.threads, [&](Member& member) {
    int64_t done = 0, block = many ? queue.take() : 0;
    char* const mine = workspace + 2 * plan.x + plan.scales + member.index * plan.mine;
    uint32_t* const panel = reinterpret_cast<uint32_t*>(mine);
    float* const sums = reinterpret_cast<float*>(panel + kPanelWords * plan.block);
    for (int64_t m0 = 0; m0 < p.rows; m0 += plan.slice) {
      const int64_t rows = std::min(plan.slice, p.rows - m0), vectors = (rows + kLanes - 1) / kLanes;
      if (m0 > 0) member.meet();  // all are through with the slice before
      for (int64_t m = member.begin(vectors * kLanes); m < member.end(vectors * kLanes); ++m)
        ready<Kind>(p, m0 + m, plan.words, by_rows + m * plan.stride, of + m);
      member.meet();
      const int64_t squares = plan.words / 16;  // of 16 words by 16 rows
      for (int64_t i = member.begin(vectors * squares); i < member.end(vectors * squares); ++i)
        transpose(by_rows + i / squares * kLanes * plan.stride + i % squares * 16, plan.stride, x + i * 16 * kLanes,
                  kLanes);
      member.meet();
      const PanelRegisters registers;
      const auto multiply = [&](int64_t block) {
        panel_block<Kind>(p, plan, registers, block * plan.block, m0, rows, x, of, panel, sums);
      };
      for (; many && block < done + blocks; block = queue.take()) multiply(block - done);
      for (int64_t i = member.begin(blocks); !many && i < member.end(blocks); ++i) multiply(i);
      done += blocks;
    }
  });
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
