// Attention backward: blocks of keys go through the tiles of rows that see them; scores are computed again from the
// log-sum-exp. One thread at a time works on a head of keys, whose gradients of keys it owns block by block, while those
// of queries add up in the order of the blocks. Where heads cannot be shared out evenly, each takes every n-th block, and
// the n gradients of queries are added in order: deterministic for a number of threads.
#include "attention_tiles.h"

namespace fastlm {

FASTLM_DECLARE_ATTENTION(FASTLM_ISA)

namespace FASTLM_ISA {
namespace {

// An item of work is a part of the blocks of one head of keys; of all heads, or rows of the batch, that share elements
// of the bias's gradient, which no two threads may add to.
template <class S>
struct BackwardPlan {
  using T = Compute<S>;

  int64_t group, rows, blocks, owners, parts;
  int threads;

  explicit BackwardPlan(const Attention<S>& a) {
    group = a.heads / a.kv_heads;
    rows = a.queries * group;
    blocks = quotient_up(a.keys, kBlock<T>);
    const bool bias = a.dbias.data;
    owners = (bias && a.batch_shared ? 1 : a.batch) * (bias && a.heads_shared ? 1 : a.kv_heads);
    const bool even = owners % a.threads == 0 && !a.spans && !a.key_ids;  // as much work for each thread without a cut
    parts = even || owners >= 4 * a.threads ? 1 : lower(quotient_up(4 * a.threads, owners), blocks);
    threads = team_size(a, owners * parts);
  }
};

template <class S>
struct BackwardMemory {
  using T = Compute<S>;

  T *query, *dout, *dquery;  // of all rows of a head of keys: [rows, padded D], [rows, padded Dv], [rows, padded D]
  T *lse, *delta;            // [rows]
  T* out;                    // of a group of rows: [kGroup, padded Dv]
  T* common;                 // of all keys of a head: [padded D]
  Row<T>* rows;
  Range* documents;                        // of each block
  T *keys, *keys_across, *values_across;   // of a block: [kBlock, padded D], [D, kBlock], [Dv, kBlock]
  T *dkeys, *dvalues;                      // [kBlock, padded D], [kBlock, padded Dv]
  T *weights, *slopes, *tanh;              // of a tile: [kTileRows, kBlock]

  BackwardMemory(Arena& arena, const Attention<S>& a, const BackwardPlan<S>& plan) {
    const int64_t deep = padded<T>(a.dim), wide = padded<T>(a.value_dim);
    query = arena.take<T>(plan.rows * deep);
    dout = arena.take<T>(plan.rows * wide);
    dquery = arena.take<T>(plan.parts == 1 ? plan.rows * deep : 0);
    lse = arena.take<T>(plan.rows);
    delta = arena.take<T>(plan.rows);
    out = arena.take<T>(kGroup * wide);
    common = arena.take<T>(deep);
    rows = arena.take<Row<T>>(plan.rows);
    documents = arena.take<Range>(a.key_ids ? plan.blocks : 0);
    keys = arena.take<T>(kBlock<T> * deep);
    keys_across = arena.take<T>(kBlock<T> * a.dim);
    values_across = arena.take<T>(kBlock<T> * a.value_dim);
    dkeys = arena.take<T>(kBlock<T> * deep);
    dvalues = arena.take<T>(kBlock<T> * wide);
    weights = arena.take<T>(kTileRows * kBlock<T>);
    slopes = arena.take<T>(kTileRows * kBlock<T>);
    tanh = arena.take<T>(kGroup * kBlock<T>);
  }
};

template <class S>
struct Backward {
  using T = Compute<S>;

  const Attention<S>& a;
  BackwardPlan<S> plan;
  int64_t deep, wide;  // padded D and Dv
  Share* shares;
  T* partials;  // [B, H_kv, parts, rows, padded D] gradients of queries, where there are several parts
  Arena arena;

  explicit Backward(const Attention<S>& a)
      : a(a), plan(a), deep(padded<T>(a.dim)), wide(padded<T>(a.value_dim)), arena{static_cast<char*>(a.workspace)} {
    shares = arena.take<Share>(plan.threads);
    partials = arena.take<T>(plan.parts > 1 ? a.batch * a.kv_heads * plan.parts * plan.rows * deep : 0);
  }

  size_t run() {
    Arena all = arena;
    BackwardMemory<S>(all, a, plan);
    const size_t each = all.used - arena.used;
    if (!a.workspace) return arena.used + plan.threads * each;
    share_out(shares, plan.threads, plan.owners * plan.parts);
    parallel(plan.threads, [&](Member& me) {
      Arena own = arena;
      own.used += me.index * each;
      Worker worker{*this, ForThread(own, a, plan)};
      work_through(shares, plan.threads, me.index, [&](int64_t i) { own_part(worker, i / plan.parts, i % plan.parts); });
      if (plan.parts == 1 || !a.dquery.data) return;
      me.meet();
      const int64_t all_rows = a.batch * a.kv_heads * plan.rows;
      for (int64_t i = me.begin(all_rows); i < me.end(all_rows); ++i) add_parts(i / plan.rows, i % plan.rows);
    });
    return 0;
  }

  using ForThread = BackwardMemory<S>;
  struct Worker;

  // A part of all heads and rows of the batch that belong to an owner.
  void own_part(Worker& worker, int64_t owner, int64_t part) {
    const bool heads = a.dbias.data && a.heads_shared, batch = a.dbias.data && a.batch_shared;
    const int64_t owned_heads = heads ? a.kv_heads : 1, owned_rows = batch ? a.batch : 1;
    const int64_t per_row = a.kv_heads / owned_heads;
    for (int64_t b = 0; b < owned_rows; ++b)
      for (int64_t h = 0; h < owned_heads; ++h)
        worker.head(batch ? b : owner / per_row, heads ? h : owner % per_row, part);
  }

  // Write the gradient of one row of queries: the sum over the parts, in order.
  void add_parts(int64_t head, int64_t r) {
    const Span span = span_of(a, head / a.kv_heads);
    if (r >= span.queries * plan.group) return;
    T* first = partials + (head * plan.parts * plan.rows + r) * deep;
    for (int64_t part = 1; part < plan.parts; ++part)
      for (int64_t d = 0; d < deep; d += kLanes<T>)
        store(first + d, load(first + d) + load(first + part * plan.rows * deep + d));
    unpack_row(first, a.dim, T(a.scale),
               at(a.dquery, span.b, head % a.kv_heads * plan.group + r % plan.group, span.first_query + r / plan.group));
  }

  struct Worker {
    Backward& f;
    BackwardMemory<S> m;

    void head(int64_t b, int64_t kv_head, int64_t part) {
      const Attention<S>& a = f.a;
      const Span span = span_of(a, b);
      const int64_t rows = span.queries * f.plan.group;
      T* dquery = m.dquery;
      if (f.plan.parts > 1) dquery = f.partials + ((b * a.kv_heads + kv_head) * f.plan.parts + part) * f.plan.rows * f.deep;
      describe_rows(a, span, kv_head, 0, span.queries, m.rows);
      if (a.key_ids) bound_documents(a, span, m.documents);
      start(span, rows);
      find_common(span, kv_head);
      std::memset(dquery, 0, rows * f.deep * sizeof(T));
      const int64_t blocks = quotient_up(span.keys, kBlock<T>);
      for (int64_t block = part; block < blocks; block += f.plan.parts) visit(span, kv_head, block, dquery);
      if (f.plan.parts > 1 || !a.dquery.data) return;
      for (int64_t r = 0; r < rows; ++r)
        unpack_row(dquery + r * f.deep, a.dim, T(a.scale), at(a.dquery, b, m.rows[r].head, m.rows[r].query));
    }

    // What the products need of the rows: scaled queries, gradients of the output, and what sums up a row.
    void start(const Span& span, int64_t rows) {
      const Attention<S>& a = f.a;
      for (int64_t first = 0; first < rows; first += kGroup) {
        const int count = int(lower<int64_t>(kGroup, rows - first));
        for (int64_t r = first; r < first + count; ++r) {
          const Row<T>& row = m.rows[r];
          pack_rows(at(a.query, span.b, row.head, row.query), 0, 1, a.dim, T(a.scale), m.query + r * f.deep);
          pack_rows(at(a.dout, span.b, row.head, row.query), 0, 1, a.value_dim, T(1), m.dout + r * f.wide);
          pack_rows(at(a.out, span.b, row.head, row.query), 0, 1, a.value_dim, T(1), m.out + (r - first) * f.wide);
        }
        // A row's products with values and with its output nearly cancel: it matters that they are rounded alike.
        row_products(count, m.out, m.dout + first * f.wide, f.wide, a.value_dim, m.delta + first);
        for (int64_t r = first; r < first + count; ++r) {
          const Row<T>& row = m.rows[r];
          if (a.dlse.data) m.delta[r] -= *at(a.dlse, span.b, row.head, row.query);
          m.lse[r] = *at(a.lse, span.b, row.head, row.query);
        }
      }
    }

    // What keys have in common: of 16 of them the number nearest to 0, where they have one sign. A row's gradients of
    // scores add up to 0 (but for a cap, sinks and dlse), so ds k = ds (k - common), and what delta lacks, because the
    // output was rounded, is not multiplied by it.
    void find_common(const Span& span, int64_t kv_head) {
      const Attention<S>& a = f.a;
      std::memset(m.common, 0, f.deep * sizeof(T));
      if (a.softcap || a.sinks || a.dlse.data || !span.keys) return;
      const int64_t count = lower<int64_t>(16, span.keys);
      for (int64_t d = 0; d < a.dim; d += kLanes<T>) {
        const auto key = [&](int64_t i) {
          const S* k = at(a.key, span.b, kv_head, span.first_key + i * span.keys / count);
          return load(k + d, int(lower<int64_t>(kLanes<T>, a.dim - d)));
        };
        Vector<T> low = key(0), high = low;
        for (int64_t i = 1; i < count; ++i) {
          const Vector<T> k = key(i);
          low = k < low ? k : low;
          high = k > high ? k : high;
        }
        store(m.common + d, low > 0 ? low : high < 0 ? high : Vector<T>{});
      }
    }

    void visit(const Span& span, int64_t kv_head, int64_t block, T* dquery) {
      const Attention<S>& a = f.a;
      const int64_t first = block * kBlock<T>, place = span.first_key + first;
      const int64_t valid = lower<int64_t>(kBlock<T>, span.keys - first);
      const S *keys = at(a.key, span.b, kv_head, place), *values = at(a.value, span.b, kv_head, place);
      pack_rows(keys, a.key.row, valid, a.dim, T(1), m.keys, m.common);
      pack_transposed(keys, a.key.row, valid, a.dim, m.keys_across);
      pack_transposed(values, a.value.row, valid, a.value_dim, m.values_across);
      std::memset(m.dkeys, 0, kBlock<T> * f.deep * sizeof(T));
      std::memset(m.dvalues, 0, kBlock<T> * f.wide * sizeof(T));
      const Range seeing = queries_of(a, span, first, first + valid);
      const int64_t last = seeing.end * f.plan.group;
      for (int64_t r = seeing.start * f.plan.group; r < last; r += kTileRows)
        tile(span, block, r, lower<int64_t>(kTileRows, last - r), valid, dquery);
      for (int64_t j = 0; j < valid; ++j) {
        if (a.dkey.data) unpack_row(m.dkeys + j * f.deep, a.dim, T(1), at(a.dkey, span.b, kv_head, place + j));
        if (a.dvalue.data)
          unpack_row(m.dvalues + j * f.wide, a.value_dim, T(1), at(a.dvalue, span.b, kv_head, place + j));
      }
    }

    // The gradients that `count` rows from r on have a part in, of one block of keys.
    void tile(const Span& span, int64_t block, int64_t r, int64_t count, int64_t valid, T* dquery) {
      const Attention<S>& a = f.a;
      const Range* documents = a.key_ids ? m.documents + block : nullptr;
      bool any = false;
      for (int64_t i = 0; i < count; i += kGroup) {
        const int rows = int(lower<int64_t>(kGroup, count - i));
        const Sees seen = sees(m.rows + r + i, rows, block * kBlock<T>, documents);
        T *weights = m.weights + i * kBlock<T>, *slopes = m.slopes + i * kBlock<T>;
        if (seen == Sees::nothing) {
          std::memset(weights, 0, rows * kBlock<T> * sizeof(T));
          std::memset(slopes, 0, rows * kBlock<T> * sizeof(T));
          continue;
        }
        any = true;
        differentiate(span, block * kBlock<T>, r + i, rows, seen, weights, slopes);
        if (a.dquery.data)
          product(rows, Operand<T>{slopes, kBlock<T>, 1}, m.keys, f.deep, valid, dquery + (r + i) * f.deep, f.deep,
                  f.deep / kLanes<T>, kOnes<T>);
      }
      if (!any) return;
      for (int64_t j = 0; j < valid; j += kGroup) {
        const int rows = int(lower<int64_t>(kGroup, valid - j));
        if (a.dvalue.data)
          product(rows, Operand<T>{m.weights + j, 1, kBlock<T>}, m.dout + r * f.wide, f.wide, count,
                  m.dvalues + j * f.wide, f.wide, f.wide / kLanes<T>, kOnes<T>);
        if (a.dkey.data)
          product(rows, Operand<T>{m.slopes + j, 1, kBlock<T>}, m.query + r * f.deep, f.deep, count,
                  m.dkeys + j * f.deep, f.deep, f.deep / kLanes<T>, kOnes<T>);
      }
    }

    // The weights of rows r.. and the gradients of their scores before the cap, [rows, kBlock] each.
    void differentiate(const Span& span, int64_t first, int64_t r, int rows, Sees seen, T* weights, T* slopes) {
      const Attention<S>& a = f.a;
      constexpr int stride = kBlock<T>;
      const int64_t vectors = quotient_up(lower<int64_t>(stride, span.keys - first), kLanes<T>);
      product(rows, Operand<T>{m.query + r * f.deep, f.deep, 1}, m.keys_across, stride, a.dim, weights, stride, vectors,
              static_cast<const T*>(nullptr));
      product(rows, Operand<T>{m.dout + r * f.wide, f.wide, 1}, m.values_across, stride, a.value_dim, slopes, stride,
              vectors, static_cast<const T*>(nullptr));
      if (seen == Sees::some || changes_scores(a))
        for (int i = 0; i < rows; ++i)
          adjust(a, m.rows[r + i], a.key_ids ? a.key_ids + span.b * a.keys : nullptr, first, span.keys, seen,
                 weights + i * stride, a.softcap ? m.tanh + i * stride : nullptr);
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
        for (int j = i * stride; j < (i + 1) * stride; j += kLanes<T>) {
          const Vector<T> w = weight<T>(load(weights + j) - m.lse[r + i]);
          store(weights + j, w);
          store(slopes + j, w * (load(slopes + j) - m.delta[r + i]));
        }
      if (a.dbias.data)
        for (int i = 0; i < rows; ++i) give_bias(span, m.rows[r + i], first, slopes + i * stride);
      if (a.softcap)
        for (int j = 0; j < rows * stride; j += kLanes<T>) {
          const Vector<T> t = load(m.tanh + j);
          store(slopes + j, load(slopes + j) * (1 - t * t));
        }
    }

    void give_bias(const Span& span, const Row<T>& row, int64_t first, const T* slopes) {
      const Attention<S>& a = f.a;
      const int n = int(lower<int64_t>(kBlock<T>, span.keys - first));
      T* __restrict to = at(a.dbias, span.b, row.head, row.query) + first;
      if (a.dbias_add)
        for (int j = 0; j < n; ++j) to[j] += slopes[j];
      else
        std::memcpy(to, slopes, n * sizeof(T));
    }
  };
};

}  // namespace

size_t attention_backward(const Attention<float>& a) { return Backward<float>(a).run(); }
size_t attention_backward(const Attention<double>& a) { return Backward<double>(a).run(); }
size_t attention_backward(const Attention<Bf16>& a) { return Backward<Bf16>(a).run(); }

}  // namespace FASTLM_ISA
}  // namespace fastlm
