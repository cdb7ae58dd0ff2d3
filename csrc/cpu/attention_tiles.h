// What both passes of attention share: products of small tiles, packing, bands of keys, and the scores of a row.
#pragma once

#include <utility>

#include "../attention.h"
#include "simd.h"
#include "team.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int kGroup = 6;                      // rows of a tile of a product
constexpr int kWide = kAccumulators / kGroup;  // vectors side by side in it
constexpr int64_t kTileRows = 96;             // rows that share a block of keys while the cache holds it

// Numbers that a group has one of for each row, in whole vectors.
template <class T>
constexpr int kStats = (kGroup + kLanes<T> - 1) / kLanes<T> * kLanes<T>;

template <class T>
constexpr int kBlock = 256 / int(sizeof(T));  // keys in a block: with fewer, what is done once a block costs more

template <class T>
FASTLM_INLINE T lower(T a, T b) { return b < a ? b : a; }
template <class T>
FASTLM_INLINE T higher(T a, T b) { return b > a ? b : a; }
FASTLM_INLINE int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class T>
FASTLM_INLINE int64_t padded(int64_t n) { return quotient_up(n, kLanes<T>) * kLanes<T>; }

template <class P>
FASTLM_INLINE P* at(const Strided<P>& x, int64_t b, int64_t h, int64_t i) {
  return x.data + b * x.batch + h * x.head + i * x.row;
}

// --- products -----------------------------------------------------------------------------------------------------

// An operand whose element (i, k) lies at data + i·row + k·step.
template <class T>
struct Operand {
  const T* data;
  int64_t row, step;
};

// out [MR, NV vectors] = keep ⊙ out + x [MR, depth] · panel [depth, NV vectors], or the product alone without `keep`
// [MR]; `panel_row` and `out_row` are distances of rows.
template <class T, int NV, int MR>
void product_tile(const Operand<T>& x, const T* panel, int64_t panel_row, int64_t depth, T* out, int64_t out_row,
                  const T* keep) {
  using V = Vector<T>;
  V acc[MR][NV] = {};
  const T* a = x.data;
  for (int64_t k = 0; k < depth; ++k, a += x.step, panel += panel_row) {
    V b[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) b[j] = load(panel + j * kLanes<T>);
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
      const T one = a[i * x.row];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] += one * b[j];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      T* to = out + i * out_row + j * kLanes<T>;
      store(to, keep ? load(to) * keep[i] + acc[i][j] : acc[i][j]);
    }
}

template <class T, int NV, int MR>
void product_rows(int rows, const Operand<T>& x, const T* panel, int64_t panel_row, int64_t depth, T* out,
                  int64_t out_row, const T* keep) {
  if (rows == MR) return product_tile<T, NV, MR>(x, panel, panel_row, depth, out, out_row, keep);
  if constexpr (MR > 1) product_rows<T, NV, MR - 1>(rows, x, panel, panel_row, depth, out, out_row, keep);
}

constexpr int64_t kChunk = 128;  // of a product's depth

template <class T>
constexpr T kOnes[kGroup] = {1, 1, 1, 1, 1, 1};  // for each row of a group

// The same for rows ≤ kGroup and any number of vectors, in parts as wide as each other, and for any depth: each chunk
// starts with fresh accumulators, because one long chain of additions loses too many digits.
template <class T>
void product(int rows, Operand<T> x, const T* panel, int64_t panel_row, int64_t depth, T* out, int64_t out_row,
             int64_t vectors, const T* keep) {
  const int64_t parts = quotient_up(vectors, kWide);
  for (int64_t k = 0; k < depth; k += kChunk, x.data += kChunk * x.step, panel += kChunk * panel_row, keep = kOnes<T>)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = vectors * part / parts, wide = vectors * (part + 1) / parts - first, j = first * kLanes<T>;
      const int64_t deep = lower(kChunk, depth - k);
      with_count<kWide>(wide, [&](auto n) {
        product_rows<T, n.value, kGroup>(rows, x, panel + j, panel_row, deep, out + j, out_row, keep);
      });
    }
}

// out [rows] = the sums of x ⊙ y [rows, depth], `row` numbers apart, each added up as `product` adds: where a row of x is a
// row of a panel, the two sums are the same to the last bit.
template <class T>
void row_products(int rows, const T* x, const T* y, int64_t row, int64_t depth, T* out) {
  for (int i = 0; i < rows; ++i) out[i] = 0;
  for (int64_t k = 0; k < depth; k += kChunk) {
    T acc[kGroup] = {};
    const int64_t end = lower(k + kChunk, depth);
    for (int64_t d = k; d < end; ++d)
      for (int i = 0; i < rows; ++i) acc[i] += x[i * row + d] * y[i * row + d];
    for (int i = 0; i < rows; ++i) out[i] += acc[i];
  }
}

// --- packing ------------------------------------------------------------------------------------------------------

// The lanes of a and b in turn, of their first halves or of their second ones.
template <class T, size_t... I>
FASTLM_INLINE Vector<T> interleave(const Vector<T>& a, const Vector<T>& b, bool second, std::index_sequence<I...>) {
  constexpr int lanes = kLanes<T>, half = lanes / 2;
#if defined(__clang__)
  return second ? __builtin_shufflevector(a, b, (I % 2 * lanes + I / 2 + half)...)
                : __builtin_shufflevector(a, b, (I % 2 * lanes + I / 2)...);
#else
  using Bits = typename Simd<T>::Bits;
  return second ? __builtin_shuffle(a, b, Bits{(I % 2 * lanes + I / 2 + half)...})
                : __builtin_shuffle(a, b, Bits{(I % 2 * lanes + I / 2)...});
#endif
}

// Transpose as many vectors as one has lanes: each pass deals two halves out in turn, like cards.
template <class T>
FASTLM_INLINE void transpose(Vector<T>* v) {
  constexpr int lanes = kLanes<T>;
  Vector<T> other[lanes];
#pragma GCC unroll 4
  for (int pass = 1; pass < lanes; pass *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      other[i] = interleave<T>(v[i / 2], v[i / 2 + lanes / 2], i % 2, std::make_index_sequence<lanes>());
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) v[i] = other[i];
  }
}

// Lane i of the result is the sum of the lanes of v[i]; v are as many vectors as one has lanes.
template <class T>
FASTLM_INLINE Vector<T> sums(Vector<T>* v) {
  constexpr auto all = std::make_index_sequence<kLanes<T>>();
#pragma GCC unroll 4
  for (int left = kLanes<T> / 2; left > 0; left /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < left; ++i)
      v[i] = interleave<T>(v[i], v[i + left], false, all) + interleave<T>(v[i], v[i + left], true, all);
  return v[0];
}

// out [rows, kBlock] = x [rows, depth] · the transpose of n ≤ kBlock rows of `keys`, read where they lie; zeros behind
// up to whole vectors
template <class S, class T>
void dot_products(int rows, const T* x, const S* keys, int64_t key_row, int64_t n, int64_t depth, T* out) {
  constexpr int lanes = kLanes<T>;
  for (int64_t j = 0; j < n; j += lanes)
    for (int r = 0; r < rows; ++r) {
      Vector<T> acc[lanes] = {};
      const int count = int(lower<int64_t>(n - j, lanes));
      const T* a = x + r * depth;
      const S* b = keys + j * key_row;
      int64_t d = 0;
      if (count == lanes)
        for (; d + lanes <= depth; d += lanes)
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) acc[i] += load(a + d) * load(b + i * key_row + d);
      for (; d < depth; d += lanes) {
        const int wide = int(lower<int64_t>(lanes, depth - d));
        for (int i = 0; i < count; ++i) acc[i] += load(a + d, wide) * load(b + i * key_row + d, wide);
      }
      store(out + r * kBlock<T> + j, sums<T>(acc));
    }
}

// panel [width, kBlock] = the transpose of n ≤ kBlock rows of `width` numbers, zeros behind up to whole vectors
template <class S, class T>
void pack_transposed(const S* rows, int64_t row, int64_t n, int64_t width, T* panel) {
  constexpr int lanes = kLanes<T>;
  for (int64_t j = 0; j < n; j += lanes)
    for (int64_t d = 0; d < width; d += lanes) {
      const int64_t wide = lower<int64_t>(lanes, width - d);
      Vector<T> v[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) v[i] = j + i < n ? load(rows + (j + i) * row + d, int(wide)) : Vector<T>{};
      transpose<T>(v);
      for (int64_t i = 0; i < wide; ++i) store(panel + (d + i) * kBlock<T> + j, v[i]);
    }
}

// to [n, padded(width)] = factor · rows, less `common` [padded(width)] if there is one, zeros behind
template <class S, class T>
void pack_rows(const S* rows, int64_t row, int64_t n, int64_t width, T factor, T* to, const T* common = nullptr) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = 0; d < width; d += kLanes<T>, to += kLanes<T>) {
      const Vector<T> x = factor * load(rows + i * row + d, int(lower<int64_t>(kLanes<T>, width - d)));
      store(to, common ? x - load(common + d) : x);
    }
}

// to [width] = factor · from [padded(width)]
template <class S, class T>
FASTLM_INLINE void unpack_row(const T* from, int64_t width, T factor, S* to) {
  for (int64_t d = 0; d < width; d += kLanes<T>)
    store(to + d, factor * load(from + d), int(lower<int64_t>(kLanes<T>, width - d)));
}

// --- who sees whom ------------------------------------------------------------------------------------------------

// One row of the batch, or one packed sequence.
struct Span {
  int64_t b, first_query, queries, first_key, keys;
};

template <class S>
Span span_of(const Attention<S>& a, int64_t b) {
  if (!a.spans) return {b, 0, a.queries, 0, a.keys};
  const int64_t* s = a.spans + 4 * b;
  return {b, s[0], s[1], s[2], s[3]};
}

struct Range {
  int64_t start, end;
};

// The keys that query i may see; start and end rise with i.
template <class S>
FASTLM_INLINE Range band(const Attention<S>& a, const Span& span, int64_t i) {
  const int64_t aligned = i + span.keys - span.queries;
  Range r{0, span.keys};
  if (a.is_causal) r.end = lower(r.end, i + 1);
  if (a.right >= 0) r.end = lower(r.end, aligned + a.right + 1);
  if (a.left >= 0) r.start = higher(r.start, aligned - a.left);
  return r;
}

// The queries that may see one of the keys [first, last).
template <class S>
Range queries_of(const Attention<S>& a, const Span& span, int64_t first, int64_t last) {
  const int64_t ahead = span.keys - span.queries;
  Range r{0, span.queries};
  if (a.is_causal) r.start = higher(r.start, first);
  if (a.right >= 0) r.start = higher(r.start, first - ahead - a.right);
  if (a.left >= 0) r.end = lower(r.end, last - ahead + a.left);
  return r;
}

// A query of one head: what is added to its scores and which keys it sees.
template <class T>
struct Row {
  int64_t query, head;
  Range keys;
  int64_t id;            // its document
  T slope, aligned;      // ALiBi adds -slope·|aligned - j|
  const T* bias;         // of key 0
  const uint8_t* mask;
};

// Rows of a head of keys are queries first, then the heads that share it: row = query·group + head.
template <class S>
void describe_rows(const Attention<S>& a, const Span& span, int64_t kv_head, int64_t first_query, int64_t last_query,
                   Row<Compute<S>>* rows) {
  using T = Compute<S>;
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t i = first_query; i < last_query; ++i)
    for (int64_t g = 0; g < group; ++g) {
      const int64_t h = kv_head * group + g, place = span.first_query + i;
      *rows++ = {place, h, band(a, span, i),
                 a.query_ids ? a.query_ids[span.b * a.queries + place] : 0,
                 a.slopes ? a.slopes[span.b * a.slopes_batch + h] : T(0), T(i + span.keys - span.queries),
                 a.bias.data ? at(a.bias, span.b, h, place) : nullptr,
                 a.mask.data ? at(a.mask, span.b, h, place) : nullptr};
    }
}

// Lowest and highest document of each block of keys of one row of the batch.
template <class S>
void bound_documents(const Attention<S>& a, const Span& span, Range* bounds) {
  using T = Compute<S>;
  const int64_t* ids = a.key_ids + span.b * a.keys;
  for (int64_t j = 0; j < span.keys; ++j) {
    Range& r = bounds[j / kBlock<T>];
    if (j % kBlock<T> == 0) r = {ids[j], ids[j]};
    r = {lower(r.start, ids[j]), higher(r.end, ids[j])};
  }
}

enum class Sees { nothing, some, all };

// What `count` rows that follow each other see of the block of keys that begins at `first`.
template <class T>
Sees sees(const Row<T>* rows, int count, int64_t first, const Range* documents) {
  const int64_t last = first + kBlock<T>;
  if (rows[count - 1].keys.end <= first || rows[0].keys.start >= last) return Sees::nothing;
  bool all = rows[count - 1].keys.start <= first && rows[0].keys.end >= last;
  if (documents) {
    bool any = false;
    for (int i = 0; i < count; ++i) {
      any |= rows[i].id >= documents->start && rows[i].id <= documents->end;
      all &= rows[i].id == documents->start && rows[i].id == documents->end;
    }
    if (!any) return Sees::nothing;
  }
  return all ? Sees::all : Sees::some;
}

// --- scores -------------------------------------------------------------------------------------------------------

// exp(x), and 0 where it would be so small that products with it are slow, as denormal numbers are.
template <class T>
FASTLM_INLINE Vector<T> weight(const Vector<T>& x) {
  Vector<T> scale, p;
  split_exp<T>(x, scale, p);
  return x < T(-64) ? Vector<T>{} : scale + scale * p;
}

// Each lane beside the one `width` lanes from it.
template <class T, size_t... I>
FASTLM_INLINE Vector<T> exchange(const Vector<T>& v, unsigned width, std::index_sequence<I...>) {
  using Bits = typename Simd<T>::Bits;
#if defined(__clang__)
  Vector<T> found;
  for (int i = 0; i < kLanes<T>; ++i) found[i] = v[i ^ width];
  return found;
#else
  return __builtin_shuffle(v, Bits{(unsigned(I) ^ width)...});
#endif
}

template <class T>
FASTLM_INLINE T highest(Vector<T> v) {
#pragma GCC unroll 4
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    const Vector<T> other = exchange<T>(v, width, std::make_index_sequence<kLanes<T>>());
    v = other > v ? other : v;
  }
  return v[0];
}

// Cap, bias and bar the scores [kBlock] of a row with the keys from `first` on, of which the span has `keys` in all;
// `tanh` [kBlock] (or null) keeps tanh(s / c).
template <class S, class T = Compute<S>>
void adjust(const Attention<S>& a, const Row<T>& row, const int64_t* key_ids, int64_t first, int64_t keys, Sees seen,
            T* __restrict scores, T* __restrict tanh) {
  constexpr T never = -T(__builtin_inf());
  const int n = int(lower<int64_t>(kBlock<T>, keys - first));
  if (a.softcap) {
    const T cap = T(a.softcap), inverse = T(1 / a.softcap);
    for (int j = 0; j < kBlock<T>; j += kLanes<T>) {
      const Vector<T> t = Math<T>::tanh(load(scores + j) * inverse);
      if (tanh) store(tanh + j, t);
      store(scores + j, t * cap);
    }
  }
  if (row.bias) {
    const T* __restrict bias = row.bias + first * a.column;
    if (a.column)
      for (int j = 0; j < n; ++j) scores[j] += bias[j];
    else
      for (int j = 0; j < n; ++j) scores[j] += *bias;
  }
  if (row.slope != 0) {
    const T distance = row.aligned - T(first);
    for (int j = 0; j < kBlock<T>; ++j) scores[j] -= row.slope * __builtin_fabs(distance - T(j));
  }
  if (row.mask) {
    const uint8_t* __restrict mask = row.mask + first * a.column;
    for (int j = 0; j < n; ++j) scores[j] = mask[j * a.column] ? scores[j] : never;
  }
  if (seen == Sees::all) return;
  const int from = int(higher<int64_t>(row.keys.start - first, 0));
  const int to = int(higher<int64_t>(lower<int64_t>(row.keys.end - first, kBlock<T>), 0));
  for (int j = 0; j < kBlock<T>; ++j) scores[j] = j >= from && j < to ? scores[j] : never;
  if (key_ids)
    for (int j = 0; j < n; ++j) scores[j] = key_ids[first + j] == row.id ? scores[j] : never;
}

// Tell whether scores are changed by more than the band and the documents.
template <class S>
bool changes_scores(const Attention<S>& a) {
  return a.softcap || a.bias.data || a.mask.data || a.slopes;
}

// --- memory and work ----------------------------------------------------------------------------------------------

// Hands out parts of the workspace, each on a cache line; from null it only counts.
struct Arena {
  char* base;
  size_t used = 0;

  template <class P>
  P* take(int64_t count) {
    char* found = base + used;
    used += (size_t(count) * sizeof(P) + 63) / 64 * 64;
    return base ? reinterpret_cast<P*>(found) : nullptr;
  }
};

// Pieces of work that one thread begins with, and others take from when they are done with theirs.
struct alignas(64) Share {
  int64_t next, end;
};

FASTLM_INLINE void share_out(Share* shares, int count, int64_t work) {
  for (int i = 0; i < count; ++i) shares[i] = {work * i / count, work * (i + 1) / count};
}

template <class Body>
void work_through(Share* shares, int count, int index, const Body& body) {
  for (int k = 0; k < count; ++k) {
    Share& share = shares[(index + k) % count];
    for (int64_t i; (i = __atomic_fetch_add(&share.next, 1, __ATOMIC_RELAXED)) < share.end;) body(i);
  }
}

// How many threads are worth their start for so many pieces of work and operations.
template <class S>
int team_size(const Attention<S>& a, int64_t work) {
  const double operations = 2.0 * a.batch * a.heads * a.queries * a.keys * (a.dim + a.value_dim);
  const double worthwhile = operations / 1e6;
  const int64_t most = lower<int64_t>(a.threads, higher<int64_t>(work, 1));
  return worthwhile < most ? int(worthwhile) + 1 : int(most);
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
