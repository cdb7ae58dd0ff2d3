// Attention forward: tiles of rows go through blocks of keys with a running maximum and total (online softmax). Keys are
// packed for the products once for each head that a thread works on; few queries split the keys among the threads and
// merge what they found.
#include "attention_tiles.h"

namespace fastlm {

FASTLM_DECLARE_ATTENTION(FASTLM_ISA)

namespace FASTLM_ISA {
namespace {

constexpr int64_t kFewRows = 8;  // whose keys are read in place: benchmarks/LOG.md 2026-11-25

// How a call is cut: `items` tiles, each in `splits` ranges of keys.
template <class S>
struct ForwardPlan {
  using T = Compute<S>;

  int64_t group, tile_queries, tile_rows, tiles, items, splits, blocks;
  bool keys_in_place, values_in_place;  // where packing would not pay
  int threads;

  explicit ForwardPlan(const Attention<S>& a) {
    group = a.heads / a.kv_heads;
    tile_queries = higher<int64_t>(1, kTileRows / group);
    tile_queries = lower(tile_queries, a.queries);
    tile_rows = tile_queries * group;
    tiles = quotient_up(a.queries, tile_queries);
    items = a.batch * a.kv_heads * tiles;
    blocks = quotient_up(a.keys, kBlock<T>);
    splits = items >= 2 * a.threads ? 1 : lower(quotient_up(4 * a.threads, items), quotient_up(blocks, 8));
    splits = higher<int64_t>(splits, 1);
    keys_in_place = tiles == 1 && tile_rows <= kFewRows;
    values_in_place = std::is_same_v<S, T> && tiles == 1 && a.value_dim % kLanes<T> == 0;
    threads = team_size(a, items * splits);
  }
};

// What a row has of some keys: the highest score, the sum of the weights and of the weighted values.
template <class T>
struct Partial {
  T highest, total;
};

template <class S>
struct ForwardMemory {
  using T = Compute<S>;

  T *query, *sums, *highest, *totals;  // [rows, D], [rows, padded Dv], [groups, kStats], [rows, lanes]
  T *keys, *values;                    // of each slot [D, kBlock], [kBlock, padded Dv]
  int64_t* packed;                     // which block a slot holds
  Row<T>* rows;
  Range* documents;  // of each block
  int64_t slots;

  ForwardMemory(Arena& arena, const Attention<S>& a, const ForwardPlan<S>& plan) {
    const int64_t wide = padded<T>(a.value_dim);
    slots = plan.tiles > 1 ? plan.blocks : 1;  // where tiles share keys, all are kept
    query = arena.take<T>(plan.tile_rows * a.dim);
    sums = arena.take<T>(plan.tile_rows * wide);
    highest = arena.take<T>(quotient_up(plan.tile_rows, kGroup) * kStats<T>);
    totals = arena.take<T>(plan.tile_rows * kLanes<T>);
    keys = arena.take<T>(slots * a.dim * kBlock<T>);
    values = arena.take<T>(slots * wide * kBlock<T>);
    packed = arena.take<int64_t>(slots);
    rows = arena.take<Row<T>>(plan.tile_rows);
    documents = arena.take<Range>(a.key_ids ? plan.blocks : 0);
  }
};

template <class S>
struct Forward {
  using T = Compute<S>;

  const Attention<S>& a;
  ForwardPlan<S> plan;
  int64_t wide;  // padded Dv
  Share* shares;
  Partial<T>* partials;  // [items, splits, tile_rows]
  T* partial_sums;       // [items, splits, tile_rows, padded Dv]
  Arena arena;

  explicit Forward(const Attention<S>& a)
      : a(a), plan(a), wide(padded<T>(a.value_dim)), arena{static_cast<char*>(a.workspace)} {
    const int64_t parts = plan.splits > 1 ? plan.items * plan.splits * plan.tile_rows : 0;
    shares = arena.take<Share>(plan.threads);
    partials = arena.take<Partial<T>>(parts);
    partial_sums = arena.take<T>(parts * wide);
  }

  size_t run() {
    Arena all = arena;
    ForwardMemory<S>(all, a, plan);
    const size_t each = all.used - arena.used;
    if (!a.workspace) return arena.used + plan.threads * each;
    share_out(shares, plan.threads, plan.items * plan.splits);
    parallel(plan.threads, [&](Member& me) {
      Arena own = arena;
      own.used += me.index * each;
      Worker worker{*this, ForwardMemory<S>(own, a, plan)};
      worker.begin();
      work_through(shares, plan.threads, me.index, [&](int64_t i) { worker.tile(i / plan.splits, i % plan.splits); });
      if (plan.splits == 1) return;
      me.meet();
      for (int64_t item = me.begin(plan.items); item < me.end(plan.items); ++item) worker.merge(item);
    });
    return 0;
  }

  struct Worker {
    Forward& f;
    ForwardMemory<S> m;
    int64_t documents_of = -1;

    void begin() {
      for (int64_t i = 0; i < m.slots; ++i) m.packed[i] = -1;
    }

    struct Tile {
      Span span;
      int64_t kv_head, first_query, last_query, head;  // head: of keys, counted through the batch
    };

    Tile tile_of(int64_t item) const {
      const int64_t head = item / f.plan.tiles, turn = item % f.plan.tiles;
      const Span span = span_of(f.a, head / f.a.kv_heads);
      // The last queries first: where they see the most keys, the longest tiles are not what is left in the end.
      const int64_t first = (f.plan.tiles - 1 - turn) * f.plan.tile_queries;
      return {span, head % f.a.kv_heads, first, lower(first + f.plan.tile_queries, span.queries), head};
    }

    void tile(int64_t item, int64_t split) {
      const Attention<S>& a = f.a;
      const Tile t = tile_of(item);
      if (t.first_query >= t.last_query) return;
      const int64_t count = (t.last_query - t.first_query) * f.plan.group;
      describe_rows(a, t.span, t.kv_head, t.first_query, t.last_query, m.rows);
      start(t, count, split == 0);
      if (a.key_ids && documents_of != t.span.b) {
        bound_documents(a, t.span, m.documents);
        documents_of = t.span.b;
      }
      const int64_t first = higher<int64_t>(m.rows[0].keys.start, 0) / kBlock<T>;
      const int64_t blocks = higher<int64_t>(quotient_up(m.rows[count - 1].keys.end, kBlock<T>) - first, 0);
      const int64_t last = first + blocks * (split + 1) / f.plan.splits;
      for (int64_t block = first + blocks * split / f.plan.splits; block < last; ++block) visit(t, count, block);
      if (f.plan.splits == 1)
        finish(t, count);
      else
        keep(item * f.plan.splits + split, count);
    }

    T& highest_of(int64_t r) { return m.highest[r / kGroup * kStats<T> + r % kGroup]; }

    // Scaled queries, and totals of nothing but the sinks.
    void start(const Tile& t, int64_t count, bool with_sinks) {
      const Attention<S>& a = f.a;
      for (int64_t r = 0; r < count; ++r) {
        const Row<T>& row = m.rows[r];
        const S* q = at(a.query, t.span.b, row.head, row.query);
        T* to = m.query + r * a.dim;
        for (int64_t d = 0; d < a.dim; d += kLanes<T>) {
          const int n = int(lower<int64_t>(kLanes<T>, a.dim - d));
          store(to + d, T(a.scale) * load(q + d, n), n);
        }
        const T sink = a.sinks && with_sinks ? a.sinks[row.head] : -T(__builtin_inf());
        highest_of(r) = sink;
        Vector<T> total = {};
        total[0] = sink == -T(__builtin_inf()) ? T(0) : T(1);
        store(m.totals + r * kLanes<T>, total);
      }
      std::memset(m.sums, 0, count * f.wide * sizeof(T));
    }

    void visit(const Tile& t, int64_t count, int64_t block) {
      const Attention<S>& a = f.a;
      const Range* documents = a.key_ids ? m.documents + block : nullptr;
      const int64_t first = block * kBlock<T>, slot = m.slots > 1 ? block : 0;
      const int64_t valid = lower<int64_t>(kBlock<T>, t.span.keys - first);
      const S* key = at(a.key, t.span.b, t.kv_head, t.span.first_key + first);
      const S* value = at(a.value, t.span.b, t.kv_head, t.span.first_key + first);
      T *keys = m.keys + slot * a.dim * kBlock<T>, *values = m.values + slot * f.wide * kBlock<T>;
      for (int64_t r = 0; r < count; r += kGroup) {
        const int rows = int(lower<int64_t>(kGroup, count - r));
        const Sees seen = sees(m.rows + r, rows, first, documents);
        if (seen == Sees::nothing) continue;
        if (const int64_t id = t.head * f.plan.blocks + block; m.packed[slot] != id) {
          if (!f.plan.keys_in_place) pack_transposed(key, a.key.row, valid, a.dim, keys);
          if (!f.plan.values_in_place) pack_rows(value, a.value.row, valid, a.value_dim, T(1), values);
          m.packed[slot] = id;
        }
        alignas(64) T scores[kGroup * kBlock<T>], keep[kStats<T>];
        if (f.plan.keys_in_place)
          dot_products(rows, m.query + r * a.dim, key, a.key.row, valid, a.dim, scores);
        else
          product(rows, Operand<T>{m.query + r * a.dim, a.dim, 1}, keys, kBlock<T>, a.dim, scores, kBlock<T>,
                  quotient_up(valid, kLanes<T>), static_cast<const T*>(nullptr));
        if (seen == Sees::some || changes_scores(a))
          for (int i = 0; i < rows; ++i)
            adjust(a, m.rows[r + i], a.key_ids ? a.key_ids + t.span.b * a.keys : nullptr, first, t.span.keys, seen,
                   scores + i * kBlock<T>, static_cast<T*>(nullptr));
        weigh(rows, r, scores, keep);
        const T* panel = values;
        if constexpr (std::is_same_v<S, T>) panel = f.plan.values_in_place ? value : values;
        product(rows, Operand<T>{scores, kBlock<T>, 1}, panel, f.plan.values_in_place ? a.value.row : f.wide, valid,
                m.sums + r * f.wide, f.wide, f.wide / kLanes<T>, keep);
      }
    }

    // Scores become weights below the rows' new maximum; `keep` is what earlier sums are worth there.
    void weigh(int rows, int64_t r, T* scores, T* keep) {
      constexpr int lanes = kLanes<T>, stride = kBlock<T>;
      alignas(64) T tops[kStats<T>] = {};
      for (int i = 0; i < rows; ++i) {
        Vector<T> top = load(scores + i * stride);
#pragma GCC unroll 8
        for (int j = lanes; j < stride; j += lanes) {
          const Vector<T> s = load(scores + i * stride + j);
          top = s > top ? s : top;
        }
        tops[i] = highest<T>(top);
      }
      for (int i = 0; i < kStats<T>; i += lanes) {
        const Vector<T> old = load(m.highest + r / kGroup * kStats<T> + i);
        Vector<T> top = load(tops + i);
        top = top > old ? top : old;
        store(m.highest + r / kGroup * kStats<T> + i, top);
        top = top == -T(__builtin_inf()) ? Vector<T>{} : top;
        store(tops + i, top);
        store(keep + i, weight<T>(old - top));
      }
      for (int i = 0; i < rows; ++i) {
        Vector<T> total = load(m.totals + (r + i) * lanes) * keep[i];
#pragma GCC unroll 4
        for (int j = 0; j < stride; j += lanes) {
          T* s = scores + i * stride + j;
          const Vector<T> w = weight<T>(load(s) - tops[i]);
          total += w;
          store(s, w);
        }
        store(m.totals + (r + i) * lanes, total);
      }
    }

    void finish(const Tile& t, int64_t count) {
      for (int64_t r = 0; r < count; ++r)
        write(t, m.rows[r], m.sums + r * f.wide, highest_of(r), sum<T>(load(m.totals + r * kLanes<T>)));
    }

    void write(const Tile& t, const Row<T>& row, const T* sums, T highest, T total) {
      const Attention<S>& a = f.a;
      unpack_row(sums, a.value_dim, total == 0 ? T(0) : 1 / total, at(a.out, t.span.b, row.head, row.query));
      *at(a.lse, t.span.b, row.head, row.query) =
          total == 0 ? T(__builtin_inf()) : T(highest + __builtin_log(double(total)));
    }

    void keep(int64_t part, int64_t count) {
      for (int64_t r = 0; r < count; ++r)
        f.partials[part * f.plan.tile_rows + r] = {highest_of(r), sum<T>(load(m.totals + r * kLanes<T>))};
      std::memcpy(f.partial_sums + part * f.plan.tile_rows * f.wide, m.sums, count * f.wide * sizeof(T));
    }

    // Add up what the splits of a tile found, each at the weight of its maximum.
    void merge(int64_t item) {
      const Tile t = tile_of(item);
      if (t.first_query >= t.last_query) return;
      describe_rows(f.a, t.span, t.kv_head, t.first_query, t.last_query, m.rows);
      const int64_t splits = f.plan.splits, rows = f.plan.tile_rows, count = (t.last_query - t.first_query) * f.plan.group;
      for (int64_t r = 0; r < count; ++r) {
        const Partial<T>* parts = f.partials + item * splits * rows + r;
        const T* sums = f.partial_sums + (item * splits * rows + r) * f.wide;
        T top = -T(__builtin_inf()), total = 0;
        for (int64_t p = 0; p < splits; ++p) top = higher(top, parts[p * rows].highest);
        std::memset(m.sums, 0, f.wide * sizeof(T));
        for (int64_t p = 0; p < splits; ++p) {
          if (parts[p * rows].total == 0) continue;
          const T factor = weight<T>(Vector<T>{} + (parts[p * rows].highest - top))[0];
          total += factor * parts[p * rows].total;
          for (int64_t d = 0; d < f.wide; d += kLanes<T>)
            store(m.sums + d, load(m.sums + d) + factor * load(sums + p * rows * f.wide + d));
        }
        write(t, m.rows[r], m.sums, top, total);
      }
    }
  };
};

}  // namespace

size_t attention_forward(const Attention<float>& a) { return Forward<float>(a).run(); }
size_t attention_forward(const Attention<double>& a) { return Forward<double>(a).run(); }
size_t attention_forward(const Attention<Bf16>& a) { return Forward<Bf16>(a).run(); }

}  // namespace FASTLM_ISA
}  // namespace fastlm
