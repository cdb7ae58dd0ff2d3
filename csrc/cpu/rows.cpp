// Functions of rows on the CPU: each thread takes a range of rows, so that a row stays in its cache between passes.

#include "../rows.h"

#include "simd.h"
#include "team.h"

namespace fastlm {

FASTLM_DECLARE_ROWS(FASTLM_ISA)

namespace FASTLM_ISA {
namespace {

using V = Vector<float>;
using M = Math<float>;
constexpr int kWide = kLanes<float>;

// --- numbers in memory, float32 in registers --------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef int32_t Lanes __attribute__((vector_size(kVectorBytes)));

FASTLM_INLINE V read(const float* p, int n = kWide) { return load<float>(p, n); }

FASTLM_INLINE V read(const bf16* p, int n = kWide) {
  Halves h = {};
  if (__builtin_expect(n == kWide, 1))
    std::memcpy(&h, p, sizeof h);
  else
    std::memcpy(&h, p, n * sizeof(bf16));
  return (V)(__builtin_convertvector(h, Words) << 16);
}

FASTLM_INLINE void write(float* p, const V& v, int n = kWide) { store<float>(p, v, n); }

// Round to nearest, ties to even; a NaN stays one.
FASTLM_INLINE void write(bf16* p, const V& v, int n = kWide) {
  const Words bits = (Words)v;
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = v == v ? rounded : Words{} + 0x7fc0;
  const Halves h = __builtin_convertvector(rounded, Halves);
  if (__builtin_expect(n == kWide, 1))
    std::memcpy(p, &h, sizeof h);
  else
    std::memcpy(p, &h, n * sizeof(bf16));
}

// Calls f(column, lanes) over a row, whole vectors first.
template <class F>
FASTLM_INLINE void columns(int64_t begin, int64_t end, const F& f) {
  int64_t j = begin;
  for (; j + kWide <= end; j += kWide) f(j, kWide);
  if (j < end) f(j, int(end - j));
}

// Σ term(j): chains of few additions in float32, their ends in double.
template <class Term>
FASTLM_INLINE double total(int64_t cols, const Term& term) {
  double found = 0;
  for (int64_t start = 0; start < cols; start += 64 * kWide) {
    const int64_t end = start + 64 * kWide < cols ? start + 64 * kWide : cols;
    V part[4] = {};
    int64_t j = start;
    for (; j + 4 * kWide <= end; j += 4 * kWide) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) part[i] += term(j + i * kWide, kWide);
    }
    columns(j, end, [&](int64_t j, int n) FASTLM_INLINED { part[0] += term(j, n); });
    found += sum<float>((part[0] + part[1]) + (part[2] + part[3]));
  }
  return found;
}

// The first n lanes, and `rest` in those that stand for no element.
FASTLM_INLINE V keep(const V& v, int n, float rest = 0) {
  if (__builtin_expect(n == kWide, 1)) return v;
  V kept = V{} + rest;
  std::memcpy(&kept, &v, n * sizeof(float));
  return kept;
}

// How many threads are worth their start, as torch reckons: one for 32768 numbers, none without a row.
int team_size(int threads, int64_t rows, int64_t cols) {
  const int64_t worthwhile = (rows * cols + 32767) / 32768;
  int64_t n = threads < rows ? threads : rows;
  n = n < worthwhile ? n : worthwhile;
  return int(n < 1 ? 1 : n);
}

// Each thread's share of the rows.
template <class Body>
void share_rows(int threads, int64_t rows, int64_t cols, const Body& body) {
  parallel(team_size(threads, rows, cols), [&](Member& me) { body(me.index, me.begin(rows), me.end(rows)); });
}

// --- norms --------------------------------------------------------------------------------------------------------

template <class T, bool centred>
void norm_forward(const NormForward& a) {
  const int64_t H = a.cols;
  share_rows(a.threads, a.rows, H, [&](int, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.x_row;
      if (a.residual) {
        const T* residual = static_cast<const T*>(a.residual) + row * a.residual_row;
        T* sum = static_cast<T*>(a.sum) + row * H;
        columns(0, H, [&](int64_t j, int n) FASTLM_INLINED {
          write(sum + j, read(x + j, n) + read(residual + j, n), n);
        });
        x = sum;
      }
      float mean = 0;
      if (centred) mean = float(total(H, [&](int64_t j, int n) FASTLM_INLINED { return read(x + j, n); }) / H);
      const double squares = total(H, [&](int64_t j, int n) FASTLM_INLINED {
        const V d = keep(read(x + j, n) - mean, n);
        return d * d;
      });
      const float rstd = float(1 / __builtin_sqrt(squares / H + a.eps));
      T* y = static_cast<T*>(a.y) + row * H;
      const auto finish = [&](auto weighted, auto biased) {
        columns(0, H, [&](int64_t j, int n) FASTLM_INLINED {
          V v = (read(x + j, n) - mean) * rstd;
          if (weighted) v *= read(a.weight + j, n);
          if (biased) v += read(a.bias + j, n);
          write(y + j, v, n);
        });
      };
      struct Yes { constexpr operator bool() const { return true; } };
      struct No { constexpr operator bool() const { return false; } };
      if (a.weight && a.bias)
        finish(Yes{}, Yes{});
      else if (a.weight)
        finish(Yes{}, No{});
      else if (a.bias)
        finish(No{}, Yes{});
      else
        finish(No{}, No{});
      if (centred) a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
  });
}

// The gradients of weight and bias grow in a row of float32 a thread; after so many rows they are added to a second
// one, so that no chain of additions is long. In the end the threads' rows are added up.
constexpr int kBlock = 4, kFlush = 64;

// Rows [row, row + N): dx, and what they add to the gradients of weight and bias.
template <class T, bool centred, int N>
void norm_backward_rows(const NormBackward& a, int64_t row, float* dweight, float* dbias) {
  const int64_t H = a.cols;
  const T* x[N];
  const T* dy[N];
  float mean[N], rstd[N], along[N], level[N];  // mean(u ⊙ x̂) and mean(u) of formula in ops/norm.py
  for (int i = 0; i < N; ++i) {
    x[i] = static_cast<const T*>(a.x) + (row + i) * a.x_row;
    dy[i] = static_cast<const T*>(a.dy) + (row + i) * H;
    mean[i] = centred ? a.mean[row + i] : 0.f;
    rstd[i] = a.rstd[row + i];
    along[i] = level[i] = 0;
    if (!a.dx) continue;
    const auto u = [&](int64_t j, int n) FASTLM_INLINED {
      const V g = read(dy[i] + j, n);
      return a.weight ? g * read(a.weight + j, n) : g;
    };
    const auto product = [&](int64_t j, int n) FASTLM_INLINED { return u(j, n) * (read(x[i] + j, n) - mean[i]); };
    along[i] = float(total(H, product) * rstd[i] / H);
    if (centred) level[i] = float(total(H, u) / H);
  }
  T* const dx = a.dx ? static_cast<T*>(a.dx) + row * H : nullptr;
  const T* const dsum = a.dsum ? static_cast<const T*>(a.dsum) + row * H : nullptr;
  columns(0, H, [&](int64_t j, int n) FASTLM_INLINED {
    const V weight = a.weight ? read(a.weight + j, n) : V{} + 1;
    V dw = {}, db = {};
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const V g = read(dy[i] + j, n), normal = (read(x[i] + j, n) - mean[i]) * rstd[i];
      dw += g * normal;
      db += g;
      if (!dx) continue;
      V d = (g * weight - normal * along[i] - level[i]) * rstd[i];
      if (dsum) d += read(dsum + i * H + j, n);
      write(dx + i * H + j, d, n);
    }
    if (dweight) write(dweight + j, read(dweight + j, n) + dw, n);
    if (dbias) write(dbias + j, read(dbias + j, n) + db, n);
  });
}

template <class T, bool centred>
void norm_backward(const NormBackward& a) {
  const int64_t H = a.cols;
  float* const out[2] = {a.dweight, a.dbias};
  parallel(team_size(a.threads, a.rows, H), [&](Member& me) {
    float* const mine = a.workspace ? a.workspace + me.index * 4 * H : nullptr;
    if (mine) std::memset(mine, 0, 4 * H * sizeof(float));
    float* const now[2] = {a.dweight ? mine : nullptr, a.dbias ? mine + H : nullptr};
    const auto flush = [&] {
      for (float* part : now) {
        if (!part) continue;
        columns(0, H, [&](int64_t j, int n) FASTLM_INLINED {
          write(part + 2 * H + j, read(part + 2 * H + j, n) + read(part + j, n), n);
          write(part + j, V{}, n);
        });
      }
    };
    const int64_t last = me.end(a.rows);
    int blocks = 0;
    for (int64_t row = me.begin(a.rows); row < last;) {
      if (row + kBlock <= last) {
        norm_backward_rows<T, centred, kBlock>(a, row, now[0], now[1]);
        row += kBlock;
      } else {
        norm_backward_rows<T, centred, 1>(a, row++, now[0], now[1]);
      }
      if (++blocks % kFlush == 0) flush();
    }
    if (!mine) return;
    flush();
    me.meet();
    for (int which = 0; which < 2; ++which) {
      if (!out[which]) continue;
      columns(me.begin(H), me.end(H), [&](int64_t j, int n) FASTLM_INLINED {
        V all = {};
        for (int i = 0; i < me.count; ++i) all += read(a.workspace + (i * 4 + 2 + which) * H + j, n);
        write(out[which] + j, all, n);
      });
    }
  });
}

// --- gated units --------------------------------------------------------------------------------------------------

constexpr float kRootHalf = 0.70710678f, kRootTwoOverPi = 0.79788456f, kCubic = 0.044715f;
constexpr float kDensity = 0.39894228f;  // 1 / √(2π)

// exp(x) for x ≤ 0; zero below the normal numbers.
FASTLM_INLINE V exp_negative(const V& x) {
  V scale, p;
  split_exp<float>(x < -87.f ? V{} - 87.f : x, scale, p);
  return x < -87.f ? V{} : scale + scale * p;
}

// Φ(a), and e = exp(-a²/2). Φ(-|a|) = t h(t) e with t = 1 / (1 + 0.47 |a|/√2) and a polynomial h fitted to a relative
// error of 4e-8.
FASTLM_INLINE V normal_cdf(const V& a, V& e) {
  constexpr float h[] = {-0.0226901573f, 0.130093091f, -0.274978921f, 0.226060218f, -0.0578857430f,
                         0.121941733f,   0.111661499f, 0.133243156f,  0.132555193f};
  V distance = a < 0 ? -a : a;
  distance = distance > 20.f ? V{} + 20.f : distance;  // infinity has no quotient
  e = exp_negative(-0.5f * a * a);
  const V t = quotient(V{} + 1, 1 + (0.47f * kRootHalf) * distance);
  V q = V{} + h[0];
#pragma GCC unroll 8
  for (int i = 1; i < 9; ++i) q = q * t + h[i];
  q *= t * e;
  return a < 0 ? q : 1 - q;
}

constexpr float kSiluEnd = 88.72284f;  // e to this is infinite: what is beyond must not get a sigmoid that is not 0

// The gate's value, and its derivative where it is asked for.
template <Gate kind>
FASTLM_INLINE V gate(const V& a, V* slope = nullptr) {
  if (kind == Gate::silu) {
    const V s = a < -kSiluEnd ? V{} : M::sigmoid(a);
    if (slope) *slope = s + a * s * (1 - s);
    return a * s;
  }
  if (kind == Gate::gelu) {
    V e;
    const V cdf = normal_cdf(a, e);
    if (slope) *slope = cdf + a * e * kDensity;
    return a * cdf;
  }
  const V t = M::tanh(kRootTwoOverPi * (a + kCubic * a * a * a));
  if (slope) *slope = 0.5f * (1 + t) + 0.5f * a * (1 - t * t) * (kRootTwoOverPi * (1 + 3 * kCubic * a * a));
  return 0.5f * a * (1 + t);
}

// Calls body(a, b, where y and its like begin, numbers): row by row, or where all lie together in pieces of one length.
template <class T, class Body>
void gated_rows(const Gated& g, const Body& body) {
  const bool together = g.a_row == g.cols && g.b_row == g.cols;
  const int64_t all = g.rows * g.cols, piece = together ? 4096 : g.cols;
  const int64_t a_step = together ? piece : g.a_row, b_step = together ? piece : g.b_row;
  share_rows(g.threads, (all + piece - 1) / piece, piece, [&](int, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t begin = row * piece, left = all - begin;
      body(static_cast<const T*>(g.a) + row * a_step, static_cast<const T*>(g.b) + row * b_step, begin,
           left < piece ? left : piece);
    }
  });
}

template <class T, Gate kind>
void gated_forward(const Gated& g) {
  gated_rows<T>(g, [&](const T* a, const T* b, int64_t begin, int64_t count) {
    T* const y = static_cast<T*>(g.y) + begin;
    columns(0, count, [&](int64_t j, int n) FASTLM_INLINED {
      write(y + j, gate<kind>(read(a + j, n)) * read(b + j, n), n);
    });
  });
}

template <class T, Gate kind>
void gated_backward(const Gated& g) {
  gated_rows<T>(g, [&](const T* a, const T* b, int64_t begin, int64_t count) {
    const T* const dy = static_cast<const T*>(g.dy) + begin;
    T *const da = static_cast<T*>(g.y) + begin, *const db = static_cast<T*>(g.db) + begin;
    columns(0, count, [&](int64_t j, int n) FASTLM_INLINED {
      V slope;
      const V d = read(dy + j, n), value = gate<kind>(read(a + j, n), &slope);
      write(db + j, d * value, n);
      write(da + j, d * read(b + j, n) * slope, n);
    });
  });
}

// --- rotary embedding ---------------------------------------------------------------------------------------------

// Turns one head's pairs: the first column's numbers are `step` apart, the second's lie `apart` after them.
template <class T>
void turn(const T* x, T* y, int64_t half, bool interleaved, const float* cos, const float* sin, int64_t second,
          float sign) {
  const auto turned = [&](int64_t j, int n, V& a, V& b) FASTLM_INLINED {
    const V sa = sign * read(sin + j, n), sb = second ? sign * read(sin + second + j, n) : sa;
    const V ca = read(cos + j, n), cb = second ? read(cos + second + j, n) : ca;
    // The transposed rotation takes each product's sine from where the other column had it.
    const V first = a * ca - b * (sign < 0 ? sb : sa);
    b = b * cb + a * (sign < 0 ? sa : sb);
    a = first;
  };
  if (!interleaved) {
    columns(0, half, [&](int64_t j, int n) FASTLM_INLINED {
      V a = read(x + j, n), b = read(x + half + j, n);
      turned(j, n, a, b);
      write(y + j, a, n);
      write(y + half + j, b, n);
    });
    return;
  }
  Lanes even, odd, low, high;
  for (int i = 0; i < kWide; ++i) {
    even[i] = 2 * i, odd[i] = 2 * i + 1;
    low[i] = i / 2 + i % 2 * kWide, high[i] = low[i] + kWide / 2;
  }
  columns(0, half, [&](int64_t j, int n) FASTLM_INLINED {
    const int n0 = 2 * n < kWide ? 2 * n : kWide, n1 = 2 * n - n0;
    const V u = read(x + 2 * j, n0), v = n1 ? read(x + 2 * j + kWide, n1) : V{};
    V a = __builtin_shuffle(u, v, even), b = __builtin_shuffle(u, v, odd);
    turned(j, n, a, b);
    write(y + 2 * j, __builtin_shuffle(a, b, low), n0);
    if (n1) write(y + 2 * j + kWide, __builtin_shuffle(a, b, high), n1);
  });
}

template <class T>
void rotary(const Rotary& r) {
  const int64_t rest = r.dim - 2 * r.half;
  share_rows(r.threads, r.batch * r.heads * r.steps, r.dim, [&](int, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t s = row % r.steps, h = row / r.steps % r.heads, b = row / r.steps / r.heads;
      const T* x = static_cast<const T*>(r.x) + b * r.x_strides[0] + h * r.x_strides[1] + s * r.x_strides[2];
      T* y = static_cast<T*>(r.y) + b * r.y_strides[0] + h * r.y_strides[1] + s * r.y_strides[2];
      const int64_t angle = b * r.table_strides[0] + s * r.table_strides[1];
      turn(x, y, r.half, r.interleaved, r.cos + angle, r.sin + angle, r.table_strides[2], r.inverse ? -1.f : 1.f);
      if (rest) std::memcpy(y + 2 * r.half, x + 2 * r.half, rest * sizeof(T));
    }
  });
}

// --- softmax ------------------------------------------------------------------------------------------------------

template <class T>
void softmax(const Softmax& a) {
  const int64_t H = a.cols;
  const float lowest = -__builtin_inff();
  share_rows(a.threads, a.rows, H, [&](int thread, int64_t first, int64_t last) {
    float* const scores = a.workspace + thread * H;
    for (int64_t row = first; row < last; ++row) {
      const int64_t k = row % a.mask_sizes[1], j = row / a.mask_sizes[1] % a.mask_sizes[0],
                    i = row / a.mask_sizes[1] / a.mask_sizes[0];
      const int64_t at = i * a.mask_strides[0] + j * a.mask_strides[1] + k * a.mask_strides[2];
      const bool* mask = a.mask ? a.mask + at : nullptr;
      const bool by_column = mask && a.mask_strides[3];
      const T* x = static_cast<const T*>(a.x) + row * a.x_row;
      T* y = static_cast<T*>(a.y) + row * H;
      if (mask && !by_column && !*mask) {
        columns(0, H, [&](int64_t c, int n) FASTLM_INLINED { write(y + c, V{}, n); });
        continue;
      }
      const auto masked = [&](int64_t c, int n, const V& kept, const V& absent) FASTLM_INLINED {
        Bytes bytes = {};
        std::memcpy(&bytes, mask + c, n);
        return __builtin_convertvector(bytes, Words) != 0 ? kept : absent;
      };
      V highest = V{} + lowest;
      columns(0, H, [&](int64_t c, int n) FASTLM_INLINED {
        V z = read(x + c, n) * a.scale;
        if (by_column) z = masked(c, n, z, V{} + lowest);
        store<float>(scores + c, z, n);
        z = keep(z, n, lowest);
        highest = z > highest ? z : highest;
      });
      float top = lowest;
      for (int lane = 0; lane < kWide; ++lane) top = highest[lane] > top ? highest[lane] : top;
      const double mass = total(H, [&](int64_t c, int n) FASTLM_INLINED {
        const V e = keep(exp_negative(load<float>(scores + c, n) - top), n);
        store<float>(scores + c, e, n);
        return e;
      });
      const float factor = float(1 / mass);
      columns(0, H, [&](int64_t c, int n) FASTLM_INLINED {
        V p = load<float>(scores + c, n) * factor;
        // Also where nothing is kept, and inf - inf has made the mass NaN.
        if (by_column && mass != mass) p = masked(c, n, p, V{});
        write(y + c, p, n);
      });
    }
  });
}

// --- by kind of number --------------------------------------------------------------------------------------------

void norm_forward_any(const NormForward& a) {
  if (a.bf16)
    a.mean ? norm_forward<bf16, true>(a) : norm_forward<bf16, false>(a);
  else
    a.mean ? norm_forward<float, true>(a) : norm_forward<float, false>(a);
}

void norm_backward_any(const NormBackward& a) {
  if (a.bf16)
    a.mean ? norm_backward<bf16, true>(a) : norm_backward<bf16, false>(a);
  else
    a.mean ? norm_backward<float, true>(a) : norm_backward<float, false>(a);
}

template <Gate kind>
void gated(const Gated& g, bool backward) {
  if (g.bf16)
    backward ? gated_backward<bf16, kind>(g) : gated_forward<bf16, kind>(g);
  else
    backward ? gated_backward<float, kind>(g) : gated_forward<float, kind>(g);
}

void gated_any(const Gated& g, bool backward) {
  switch (g.kind) {
    case Gate::silu: return gated<Gate::silu>(g, backward);
    case Gate::gelu: return gated<Gate::gelu>(g, backward);
    case Gate::gelu_tanh: return gated<Gate::gelu_tanh>(g, backward);
  }
}

void gated_forward_any(const Gated& g) { gated_any(g, false); }
void gated_backward_any(const Gated& g) { gated_any(g, true); }
void rotary_any(const Rotary& r) { r.bf16 ? rotary<bf16>(r) : rotary<float>(r); }
void softmax_any(const Softmax& a) { a.bf16 ? softmax<bf16>(a) : softmax<float>(a); }

}  // namespace

RowKernels row_kernels() {
  return {norm_forward_any, norm_backward_any, gated_forward_any, gated_backward_any, rotary_any, softmax_any};
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
