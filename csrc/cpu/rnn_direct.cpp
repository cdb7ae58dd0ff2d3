// The recurrent layer for few rows: one step of a stream, a cell, a short sequence. One call makes both products and
// reads the weights where they lie, because to pack them takes longer than to use them: what bounds it is bandwidth.

#include "../rnn.h"

#include <type_traits>

#include "simd.h"
#include "sums.h"
#include "team.h"

namespace fastlm {

FASTLM_DECLARE_RNN_DIRECT(FASTLM_ISA)

namespace FASTLM_ISA {
namespace {

// --- weights as they are stored -----------------------------------------------------------------------------------

FASTLM_INLINE Vector<float> widen(const float* p) { return load(p); }
FASTLM_INLINE Vector<double> widen(const double* p) { return load(p); }
FASTLM_INLINE Vector<float> widen(const Bf16* p) { return load(p); }

FASTLM_INLINE Vector<float> widen(const F16* p) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  using Bits = Simd<float>::Bits;
  Halves stored;
  std::memcpy(&stored, p, sizeof stored);
  const Bits half = __builtin_convertvector(stored, Bits), magnitude = (half & 0x7fff) << 13;
  const Bits finite = (Bits)((Vector<float>)magnitude * 0x1p112f);  // the two formats differ in the exponent's bias
  const Bits special = (Bits)(magnitude >= 0x0f800000u) & 0x7f800000u;
  return (Vector<float>)(finite | special | (half & 0x8000) << 16);
#endif
}

// The last `count` of a row's `depth` numbers in the last lanes, zeros in the others.
template <class T, class W>
FASTLM_INLINE Vector<T> row_end(const W* row, int64_t depth, int count) {
  constexpr int lanes = kLanes<T>;
  if (depth < lanes) {
    W end[lanes] = {};
    std::memcpy(end + lanes - count, row, count * sizeof(W));
    return widen(end);
  }
  using Bits = typename Simd<T>::Bits;
  Bits lane;
  for (int i = 0; i < lanes; ++i) lane[i] = i;
  const Bits keep = (Bits)(lane >= Bits{} + static_cast<unsigned>(lanes - count));
  return (Vector<T>)((Bits)widen(row + depth - lanes) & keep);
}

// --- products -----------------------------------------------------------------------------------------------------

// acc[m][r] += w[r] · x[m] lane by lane, for R rows of w [·, depth] and M of x [·, depth]; the rows from `next` on follow.
// A row is too short a stream for the hardware to run ahead of: each is fetched 512 bytes ahead (benchmarks/LOG.md,
// 2026-11-24).
template <class T, class W, int R, int M>
FASTLM_INLINE void accumulate(const W* w, const W* next, const T* x, int64_t depth, Vector<T> (&acc)[M][R]) {
  constexpr int lanes = kLanes<T>;
  constexpr int64_t ahead = 512 / sizeof(W);
  int64_t k = 0;
  for (; k + lanes <= depth; k += lanes) {
    Vector<T> v[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) v[m] = load(x + m * depth + k);
    const W* const later = k + ahead < depth ? w + k + ahead : next + (k + ahead - depth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(later + r * depth);
      const Vector<T> a = widen(w + r * depth + k);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m][r] += a * v[m];
    }
  }
  if (k == depth) return;
  const int rest = static_cast<int>(depth - k);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Vector<T> a = row_end<T>(w + r * depth, depth, rest);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[m][r] += a * row_end<T>(x + m * depth, depth, rest);
  }
}

// Rows g·H + u + i of a weight matrix, one for each gate g < G and each of the `count` units from u on.
template <class W>
struct Units {
  const W* w;
  int64_t hidden, depth, u;
  int gates, count;

  const W* row(int g, int i) const { return w + (g * hidden + u + i) * depth; }
};

// out[m·stride + g·spread + i] = row (g, i) · x[m], for `rows` rows of x [·, depth], which are M at most; `next` are the
// weights that follow
template <class T, class W, int M>
void multiply(int rows, const Units<W>& units, const W* next, const T* x, T* out, int64_t stride, int64_t spread) {
  if constexpr (M > 1)
    if (rows < M) return multiply<T, W, M - 1>(rows, units, next, x, out, stride, spread);
  constexpr int most = 8 * M > kAccumulators ? 4 : 8, together = most < kLanes<T> ? most : kLanes<T>;
  const auto tile = [&](auto size, int g, int i) {
    constexpr int R = decltype(size)::value;
    Vector<T> acc[M][R] = {};
    const W* const then = i + R < units.count ? units.row(g, i + R) : g + 1 < units.gates ? units.row(g + 1, 0) : next;
    accumulate<T, W, R, M>(units.row(g, i), then, x, units.depth, acc);
    for (int m = 0; m < M; ++m) sums<T, R>(acc[m], out + m * stride + g * spread + i);
  };
  for (int g = 0; g < units.gates; ++g) {
    int i = 0;
    for (; i + together <= units.count; i += together) tile(std::integral_constant<int, together>(), g, i);
    for (; i < units.count; ++i) tile(std::integral_constant<int, 1>(), g, i);
  }
}

constexpr int kMostRows = kAccumulators / 4;

// Calls f(first, count) for rows begin..end, kMostRows at most at a time.
template <class F>
void for_rows(int64_t begin, int64_t end, const F& f) {
  const int64_t blocks = (end - begin + kMostRows - 1) / kMostRows;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = begin + (end - begin) * i / blocks;
    f(first, static_cast<int>(begin + (end - begin) * (i + 1) / blocks - first));
  }
}

// --- gates --------------------------------------------------------------------------------------------------------

constexpr int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

// Turn the products with x, `spread` numbers from gate to gate, and with h, s [G, lanes], of one sequence and `n` units
// from u on into its next state.
template <class T, Cell cell>
void gates(const RnnProblem& p, const RnnDirect<T>& a, int64_t row, int64_t b, int64_t u, int n, const T* x,
           int64_t spread, const T* s, const T* h_before, const T* c_before, bool ends) {
  constexpr int lanes = kLanes<T>;
  using V = Vector<T>;
  const int64_t H = p.hidden;
  const auto bias = [&](const T* from, int g) { return from ? load(from + g * H + u, n) : V{}; };
  const auto of_x = [&](int g) { return load(x + g * spread, n) + bias(a.b_ih, g); };
  const auto of_h = [&](int g) { return load(s + g * lanes) + bias(a.b_hh, g); };
  // x knows no bounds as h does: it comes last, lest its size costs the others their digits.
  const auto both = [&](int g) { return load(x + g * spread, n) + (of_h(g) + bias(a.b_ih, g)); };
  const auto keep = [&](const V& first, const V& second, const V& third, const V& fourth) {
    if (!a.train) return;
    T* const kept = a.gates + row * a.ld + u;
    store(kept, first, n);
    store(kept + H, second, n);
    store(kept + 2 * H, third, n);
    store(kept + 3 * H, fourth, n);
  };
  V h;
  if constexpr (cell == Cell::lstm) {
    V i = both(0), f = both(1), g = both(2), o = both(3), c;
    lstm_forward<Math<T>>(i, f, g, o, load(c_before + b * H + u, n), c, h);
    store(a.cn + b * H + u, c, n);
    keep(i, f, g, o);
    if (a.train) store(a.c + row * H + u, c, n);
  } else if constexpr (cell == Cell::gru) {
    V r = both(0), z = both(1), g = of_x(2), hn = of_h(2);
    gru_forward<Math<T>>(r, z, g, hn, load(h_before + b * H + u, n), h);
    keep(r, z, g, hn);
  } else if constexpr (cell == Cell::tanh) {
    h = Math<T>::tanh(both(0));
  } else {
    h = both(0);
    h = h < 0 ? V{} : h;
  }
  store(a.y + row * H + u, h, n);
  if (ends) store(a.hn + b * H + u, h, n);
}

// --- the layer ----------------------------------------------------------------------------------------------------

template <class T, class W, Cell cell>
void direct(const RnnProblem& p, const RnnDirect<T>& a) {
  constexpr int G = gates_of(cell), lanes = kLanes<T>, width = G * lanes;
  constexpr bool elman = G == 1;
  const int64_t H = p.hidden, I = a.inputs, vectors = (H + lanes - 1) / lanes;
  const auto rows_at = [&](int64_t i) {  // of the i-th step in reading order; none before the first and after the last
    if (i < 0 || i >= p.steps) return int64_t(0);
    return p.batch_sizes ? p.batch_sizes[p.reverse ? p.steps - 1 - i : i] : p.batch;
  };
  int64_t all = 0;
  for (int64_t i = 0; i < p.steps; ++i) all += rows_at(i);
  const int64_t worthwhile = 1 + all * G * H * (H + I) / 65536, team = p.threads < vectors ? p.threads : vectors;
  parallel(int(team < worthwhile ? team : worthwhile), [&](Member& me) {
    // Calls f(u, count, next) for each vector of this member's units; `next` is the unit that follows.
    const auto for_units = [&](bool back, const auto& f) {
      const int64_t first = me.begin(vectors), last = me.end(vectors);
      for (int64_t i = first; i < last; ++i) {
        const int64_t u = (back ? first + last - 1 - i : i) * lanes, next = u + (back ? -lanes : lanes);
        f(u, H - u < lanes ? int(H - u) : lanes, i + 1 < last ? next : u);
      }
    };
    const auto row_of = [&](const void* w, int64_t depth, int64_t u) { return static_cast<const W*>(w) + u * depth; };
    // The products with x of several steps are made first, where gates or y will lie, and read W_ih once.
    const auto product_of_x = [&](int64_t u, int n, const W* next, int64_t row, int count, T* out, int64_t stride,
                                  int64_t spread) {
      const Units<W> units{static_cast<const W*>(a.w_ih), H, I, u, G, n};
      multiply<T, W, kMostRows>(count, units, next, a.x + row * I, out, stride, spread);
    };
    const int64_t stride = elman ? H : a.ld;
    T* const products_of_x = elman ? a.y : a.gates;
    if (p.steps > 1)
      for_units(a.back, [&](int64_t u, int n, int64_t next) {
        for_rows(0, all, [&](int64_t row, int count) {
          product_of_x(u, n, row_of(a.w_ih, I, next), row, count, products_of_x + row * stride + u, stride, H);
        });
      });
    T products[kMostRows * width], single[kMostRows * width];
    int64_t row = p.reverse ? all - rows_at(0) : 0;
    const T* y_before = nullptr;
    for (int64_t i = 0; i < p.steps; ++i) {
      const int64_t rows = rows_at(i), earlier = rows_at(i - 1), later = rows_at(i + 1);
      const int64_t known = rows < earlier ? rows : earlier;
      for_units(a.back != (i % 2 == 1), [&](int64_t u, int n, int64_t next) {
        const Units<W> units{static_cast<const W*>(a.w_hh), H, H, u, G, n};
        const W* const then = row_of(a.w_hh, H, next);
        const auto advance = [&](const T* h_before, const T* c_before) {
          return [&, h_before, c_before](int64_t b, int count) {
            multiply<T, W, kMostRows>(count, units, p.steps == 1 ? row_of(a.w_ih, I, u) : then, h_before + b * H,
                                      products, width, lanes);
            if (p.steps == 1) product_of_x(u, n, then, b, count, single, width, lanes);
            for (int m = 0; m < count; ++m) {
              const T* const x = p.steps == 1 ? single + m * width : products_of_x + (row + b + m) * stride + u;
              gates<T, cell>(p, a, row + b + m, b + m, u, n, x, p.steps == 1 ? lanes : H, products + m * width,
                             h_before, c_before, b + m >= later);
            }
          };
        };
        for_rows(0, known, advance(y_before, a.cn));
        for_rows(known, rows, advance(a.h0, a.c0));  // sequences that begin here
      });
      if (i + 1 < p.steps) me.meet();
      y_before = a.y + row * H;
      row += p.reverse ? -later : rows;
    }
  });
}

template <class T, class W>
void direct_cell(const RnnProblem& p, const RnnDirect<T>& a) {
  switch (p.cell) {
    case Cell::lstm: return direct<T, W, Cell::lstm>(p, a);
    case Cell::gru: return direct<T, W, Cell::gru>(p, a);
    case Cell::tanh: return direct<T, W, Cell::tanh>(p, a);
    case Cell::relu: return direct<T, W, Cell::relu>(p, a);
  }
}

}  // namespace

void rnn_direct(const RnnProblem& p, const RnnDirect<float>& a) {
  if (p.batch == 0) return;
  switch (a.weights) {
    case Stored::f32: return direct_cell<float, float>(p, a);
    case Stored::bf16: return direct_cell<float, Bf16>(p, a);
    case Stored::f16: return direct_cell<float, F16>(p, a);
    case Stored::f64: return;
  }
}

void rnn_direct(const RnnProblem& p, const RnnDirect<double>& a) {
  if (p.batch > 0) direct_cell<double, double>(p, a);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
