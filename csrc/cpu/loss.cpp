// Losses of rows of logits on the CPU. Threads share the rows. A row is read once from memory: in pieces that stay in
// the first-level cache for the two looks that a piece needs, one for its maximum and one for its sums.

#include "../loss.h"

#include <cmath>

#include "simd.h"

namespace fastlm {

FASTLM_DECLARE_LOSS(FASTLM_ISA)

namespace FASTLM_ISA {
namespace {

template <class S>
constexpr int kWidth = kLanes<Compute<S>>;

template <class S>
constexpr int64_t kPiece = 256 * kWidth<S>;  // longer chains of additions lose too many digits
template <class S>
constexpr int64_t kEqual = 16 * kWidth<S>;  // and of equal numbers, whose rounding has one sign, much shorter ones

// Numbers as they are stored, a vector of what they are computed in at a time.
template <class S>
FASTLM_INLINE Vector<S> fetch(const S* p, int n = kLanes<S>) {
  return load(p, n);
}

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

FASTLM_INLINE Vector<float> fetch(const Bf16* p, int n = kLanes<float>) {
  Halves h = {};
  if (__builtin_expect(n == kLanes<float>, 1))
    std::memcpy(&h, p, sizeof h);
  else
    std::memcpy(&h, p, n * sizeof(Bf16));
  return (Vector<float>)(__builtin_convertvector(h, Simd<float>::Bits) << 16);
}

template <class S>
FASTLM_INLINE void put(S* p, const Vector<S>& v, int n = kLanes<S>) {
  store(p, v, n);
}

FASTLM_INLINE void put(Bf16* p, const Vector<float>& v, int n = kLanes<float>) {
  const auto bits = (Simd<float>::Bits)v;
  auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, ties to even
  rounded = v == v ? rounded : (Simd<float>::Bits{} + 0x7fc0);
  const Halves h = __builtin_convertvector(rounded, Halves);
  if (__builtin_expect(n == kLanes<float>, 1))
    std::memcpy(p, &h, sizeof h);
  else
    std::memcpy(p, &h, n * sizeof(Bf16));
}

template <class T>
FASTLM_INLINE Vector<T> all(T x) {
  return Vector<T>{} + x;
}

// exp of numbers up to the point where it overflows; what would be subnormal is zero.
template <class T>
FASTLM_INLINE Vector<T> exponential(const Vector<T>& x) {
  const T end = -Simd<T>::kSigmoidEnd;
  Vector<T> scale, p;
  split_exp<T>(x < end ? all(end) : x, scale, p);
  return x < end ? Vector<T>{} : scale + scale * p;
}

// log of positive normal numbers: m·2^k with m in [√½, √2), log m = 2·atanh((m - 1) / (m + 1)).
template <class T>
FASTLM_INLINE Vector<T> logarithm(const Vector<T>& x) {
  using S = Simd<T>;
  using Bits = typename S::Bits;
  constexpr T root = T(0.70710678118654752440);
  const Bits offset = (Bits)all(T(1)) - (Bits)all(root), mantissa = Bits{} + ((typename std::conditional<
      sizeof(T) == 4, uint32_t, uint64_t>::type(1) << S::kMantissa) - 1);
  const Bits shifted = (Bits)x + offset;
  const Bits exponent = shifted >> S::kMantissa;
  const Vector<T> m = (Vector<T>)((shifted & mantissa) + (Bits)all(root));
  // The exponent becomes a number in the low bits of kRound's mantissa.
  const Vector<T> k = (Vector<T>)(exponent + (Bits)all(S::kRound)) - (S::kRound + S::kBias);
  const Vector<T> s = (m - 1) / (m + 1), s2 = s * s;
  constexpr int last = sizeof(T) == 4 ? 11 : 23;
  Vector<T> q = all(T(1) / last);
#pragma GCC unroll 16
  for (int i = last - 2; i > 1; i -= 2) q = q * s2 + T(1) / i;
  return k * S::kLn2High + (k * S::kLn2Low + 2 * (s + s * s2 * q));
}

template <class T>
FASTLM_INLINE T maximum(const Vector<T>& v) {
  T numbers[kLanes<T>];
  std::memcpy(numbers, &v, sizeof v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) numbers[i] = numbers[i + width] > numbers[i] ? numbers[i + width] : numbers[i];
  return numbers[0];
}

// Calls f(column, n) for the vectors of [begin, end), n numbers in each.
template <int width, class F>
FASTLM_INLINE void for_vectors(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + width <= end; i += width) f(i, width);
  if (i < end) f(i, int(end - i));
}

template <class F>
void for_rows(const LossTile& tile, const F& f) {
#ifdef _OPENMP
  if (tile.threads > 1 && tile.rows > 1 && tile.rows * tile.cols > 16384) {
#pragma omp parallel for num_threads(tile.threads) schedule(static)
    for (int64_t row = 0; row < tile.rows; ++row) f(row);
    return;
  }
#endif
  for (int64_t row = 0; row < tile.rows; ++row) f(row);
}

// One row of logits. `plain`: neither bias nor softcap nor scale.
template <class S, bool plain>
struct Row {
  using C = Compute<S>;
  const S* z;
  const C* bias;
  const C softcap, inverse, scale;

  Row(const Logits<S>& a, int64_t row)
      : z(a.z + row * a.stride), bias(a.bias), softcap(C(a.softcap)), inverse(a.softcap ? C(1 / a.softcap) : 0),
        scale(C(a.scale)) {}

  static bool fits(const Logits<S>& a) { return !a.bias && !a.softcap && a.scale == 1; }

  // tanh((z + bias) / softcap); without a softcap z + bias
  inline __attribute__((always_inline)) Vector<C> bounded(int64_t i, int n) const {
    Vector<C> v = fetch(z + i, n);
    if (plain) return v;
    if (bias) v += load(bias + i, n);
    return softcap ? Math<C>::tanh(v * inverse) : v;
  }
  inline __attribute__((always_inline)) Vector<C> logit(const Vector<C>& bounded) const {
    if (plain) return bounded;
    return softcap ? bounded * (softcap * scale) : bounded * scale;
  }
  inline __attribute__((always_inline)) Vector<C> slope(const Vector<C>& bounded) const {
    return 1 - bounded * bounded;
  }
  inline __attribute__((always_inline)) Vector<C> operator()(int64_t i, int n) const { return logit(bounded(i, n)); }
};

// The part of a row's target distribution that is spread over the classes.
template <class S>
struct Spread {
  using C = Compute<S>;
  const S* soft;
  const C* weight;
  const C share, even;

  Spread(const Targets<S>& t, int64_t row)
      : soft(t.soft ? t.soft + row * t.stride : nullptr), weight(t.weight), share(C(t.share)), even(C(t.even)) {}

  static bool any(const Targets<S>& t) { return t.even || (t.soft && t.share); }

  inline __attribute__((always_inline)) Vector<C> operator()(int64_t i, int n) const {
    Vector<C> t = all(even);
    if (soft) t += share * fetch(soft + i, n);
    return weight ? t * load(weight + i, n) : t;
  }
};

template <class S, bool plain>
void read_row(const LossTile& tile, const LossRead<S>& a, int64_t row) {
  using C = Compute<S>;
  constexpr int width = kWidth<S>;
  const Row<S, plain> logits(a.logits, row);
  const Spread<S> spread(a.targets, row);
  const bool spreads = !plain && Spread<S>::any(a.targets), entropy = !plain && a.entropy;
  C* sums = a.sums + row * kLossSums;
  for (int64_t begin = 0; begin < tile.cols; begin += kPiece<S>) {
    const int64_t end = begin + kPiece<S> < tile.cols ? begin + kPiece<S> : tile.cols;
    Vector<C> tops[4];
    for (auto& top : tops) top = all(C(-INFINITY));
    int64_t i = begin;
    for (; i + 4 * width <= end; i += 4 * width)
      for (int j = 0; j < 4; ++j) {
        const Vector<C> u = logits(i + j * width, width);
        tops[j] = u > tops[j] ? u : tops[j];
      }
    C top = sums[0];
    for (auto& t : tops) top = maximum<C>(t) > top ? maximum<C>(t) : top;
    for (; i < end; i += width) {
      C rest[width];
      const int n = end - i < width ? int(end - i) : width;
      store(rest, logits(i, n));
      for (int j = 0; j < n; ++j) top = rest[j] > top ? rest[j] : top;
    }
    const C base = top == C(-INFINITY) ? 0 : top;
    Vector<C> total = {}, moment = {}, weighted = {}, mass = {}, some_weighted, some_mass;
    const auto add = [&](int64_t i, int n) FASTLM_INLINED {
      const Vector<C> u = logits(i, n), d = u - base;
      Vector<C> e = exponential<C>(d);
      if (n < width)
        for (int j = n; j < width; ++j) e[j] = 0;
      total += e;
      if (plain) return;
      if (entropy) moment += e > 0 ? e * d : e;
      if (spreads) {
        Vector<C> t = spread(i, n);
        if (n < width)
          for (int j = n; j < width; ++j) t[j] = 0;
        some_weighted += t == 0 ? t : t * u;
        some_mass += t;
      }
    };
    constexpr int64_t length = plain ? kPiece<S> : kEqual<S>;
    for (int64_t from = begin; from < end; from += length) {
      some_weighted = some_mass = Vector<C>{};
      for_vectors<width>(from, from + length < end ? from + length : end, add);
      weighted += some_weighted;
      mass += some_mass;
    }
    const C step = sums[0] - base, shrink = sums[0] == C(-INFINITY) ? 0 : std::exp(step);
    if (entropy) sums[2] = (shrink > 0 ? shrink * (sums[2] + step * sums[1]) : 0) + sum<C>(moment);
    sums[1] = shrink * sums[1] + sum<C>(total);
    sums[0] = top;
    if (spreads) {
      sums[4] += sum<C>(weighted);
      sums[5] += sum<C>(mass);
    }
  }
  if (a.targets.target) {
    const int64_t at = a.targets.target[row] - tile.first;
    if (at >= 0 && at < tile.cols) sums[3] = logits(at, 1)[0];
  }
}

template <class S, bool plain>
void gradient_row(const LossTile& tile, const LossGradient<S>& a, int64_t row) {
  using C = Compute<S>;
  constexpr int width = kWidth<S>;
  const C *c = a.rows + row * 5, top = c[0], up = c[2] / c[1], down = c[3], hit = c[4];
  S* out = a.gradient + row * a.stride;
  if (c[2] == 0 && down == 0 && hit == 0) {
    if (a.add) return;
    for_vectors<width>(0, tile.cols, [&](int64_t i, int n) { put(out + i, Vector<C>{}, n); });
    return;
  }
  const Row<S, plain> logits(a.logits, row);
  const Spread<S> spread(a.targets, row);
  const bool spreads = !plain && Spread<S>::any(a.targets);
  const int64_t at = a.targets.target ? a.targets.target[row] - tile.first : -1;
  const bool inside = at >= 0 && at < tile.cols;
  C exact = 0;  // the gradient at the target, made before the logits or what is added to may be overwritten
  const auto one = [&](int64_t i, int n) FASTLM_INLINED {
    const Vector<C> bounded = logits.bounded(i, n);
    Vector<C> g = up * exponential<C>(logits.logit(bounded) - top);
    if (plain) return g;
    if (spreads) g -= down * spread(i, n);
    return logits.softcap ? g * logits.slope(bounded) : g;
  };
  if (inside) {
    const Vector<C> bounded = logits.bounded(at, 1);
    exact = one(at, 1)[0] - hit * (!plain && logits.softcap ? logits.slope(bounded)[0] : 1);
    if (a.add) exact += fetch(out + at, 1)[0];
  }
  for_vectors<width>(0, tile.cols, [&](int64_t i, int n) FASTLM_INLINED {
    put(out + i, a.add ? one(i, n) + fetch(out + i, n) : one(i, n), n);
  });
  if (inside) put(out + at, all(exact), 1);
}

// What a divergence is made of, at one vector of classes.
template <class S>
struct Pair {
  using C = Compute<S>;
  using V = Vector<C>;
  const Row<S, false> student, teacher;
  const C student_lse[2], teacher_lse[2];
  V log_p, log_q, p, q;

  Pair(const Logits<S>& s, const Logits<S>& t, const C* c, int64_t row)
      : student(s, row), teacher(t, row), student_lse{c[0], c[1]}, teacher_lse{c[2], c[3]} {}

  inline __attribute__((always_inline)) void at(int64_t i, int n) {
    log_p = student(i, n) - student_lse[0] - student_lse[1];
    log_q = teacher(i, n) - teacher_lse[0] - teacher_lse[1];
    p = exponential<C>(log_p);
    q = exponential<C>(log_q);
  }
  // log(q/m) and log(p/m), m = β·q + (1 - β)·p, both from the logarithm of m over the larger of p and q
  inline __attribute__((always_inline)) void over_mixture(C beta, V& q_over, V& p_over) const {
    const V d = log_q - log_p, e = exponential<C>(d > 0 ? -d : d);
    const V above = logarithm<C>(d > 0 ? beta + (1 - beta) * e : (1 - beta) + beta * e);
    q_over = d > 0 ? -above : d - above;
    p_over = d > 0 ? -d - above : -above;
  }
};

template <class S>
void divergence_row(const LossTile& tile, const DivergenceRead<S>& a, int64_t row) {
  using C = Compute<S>;
  using V = Vector<C>;
  const C beta = C(a.beta);
  Pair<S> pair(a.student, a.teacher, a.rows + row * 4, row);
  const auto run = [&](auto kind) FASTLM_INLINED {
    C of_q = 0, of_p = 0;
    for (int64_t begin = 0; begin < tile.cols; begin += kPiece<S>) {
      const int64_t end = begin + kPiece<S> < tile.cols ? begin + kPiece<S> : tile.cols;
      V piece_q = {}, piece_p = {};
      for_vectors<kWidth<S>>(begin, end, [&](int64_t i, int n) FASTLM_INLINED {
        pair.at(i, n);
        V q_over = pair.log_q - pair.log_p, p_over = -q_over;
        if constexpr (kind.value == Divergence::jsd) pair.over_mixture(beta, q_over, p_over);
        V term_q = {}, term_p = {};
        if constexpr (kind.value != Divergence::reverse_kl)
          if (beta > 0) term_q = pair.q == 0 ? pair.q : pair.q * q_over;
        if constexpr (kind.value != Divergence::forward_kl)
          if (beta < 1) term_p = pair.p == 0 ? pair.p : pair.p * p_over;
        for (int j = n; j < kWidth<S>; ++j) term_q[j] = term_p[j] = 0;
        piece_q += term_q;
        piece_p += term_p;
      });
      of_q += sum<C>(piece_q);
      of_p += sum<C>(piece_p);
    }
    a.divergence[2 * row] += of_q;
    a.divergence[2 * row + 1] += of_p;
  };
  using D = Divergence;
  if (a.kind == D::forward_kl) run(std::integral_constant<D, D::forward_kl>{});
  else if (a.kind == D::reverse_kl) run(std::integral_constant<D, D::reverse_kl>{});
  else run(std::integral_constant<D, D::jsd>{});
}

template <class S>
void divergence_gradient_row(const LossTile& tile, const DivergenceGradient<S>& a, int64_t row) {
  using C = Compute<S>;
  using V = Vector<C>;
  const C beta = C(a.beta), factor = a.factor[row], whole = a.divergence[2 * row + 1];
  S* out = a.gradient + row * a.stride;
  Pair<S> pair(a.student, a.teacher, a.rows + row * 4, row);
  const auto run = [&](auto kind) FASTLM_INLINED {
    for_vectors<kWidth<S>>(0, tile.cols, [&](int64_t i, int n) FASTLM_INLINED {
      V g = {};
      if (factor != 0) {
        pair.at(i, n);
        if constexpr (kind.value == Divergence::forward_kl) {
          g = factor * (pair.p - pair.q);
        } else if constexpr (kind.value == Divergence::reverse_kl) {
          g = pair.p == 0 ? pair.p : factor * pair.p * (pair.log_p - pair.log_q - whole);
        } else if (beta < 1) {
          V q_over, p_over;
          pair.over_mixture(beta, q_over, p_over);
          g = pair.p == 0 ? pair.p : factor * (1 - beta) * pair.p * (p_over - whole);
        }
      }
      put(out + i, g, n);
    });
  };
  using D = Divergence;
  if (a.kind == D::forward_kl) run(std::integral_constant<D, D::forward_kl>{});
  else if (a.kind == D::reverse_kl) run(std::integral_constant<D, D::reverse_kl>{});
  else run(std::integral_constant<D, D::jsd>{});
}

}  // namespace

#define FASTLM_DEFINE_LOSS(S)                                                                       \
  void loss_read(const LossTile& tile, const LossRead<S>& a) {                                      \
    if (Row<S, true>::fits(a.logits) && !Spread<S>::any(a.targets) && !a.entropy)                   \
      for_rows(tile, [&](int64_t row) { read_row<S, true>(tile, a, row); });                        \
    else                                                                                            \
      for_rows(tile, [&](int64_t row) { read_row<S, false>(tile, a, row); });                       \
  }                                                                                                 \
  void loss_gradient(const LossTile& tile, const LossGradient<S>& a) {                              \
    if (Row<S, true>::fits(a.logits) && !Spread<S>::any(a.targets))                                 \
      for_rows(tile, [&](int64_t row) { gradient_row<S, true>(tile, a, row); });                    \
    else                                                                                            \
      for_rows(tile, [&](int64_t row) { gradient_row<S, false>(tile, a, row); });                   \
  }                                                                                                 \
  void divergence_read(const LossTile& tile, const DivergenceRead<S>& a) {                          \
    for_rows(tile, [&](int64_t row) { divergence_row<S>(tile, a, row); });                          \
  }                                                                                                 \
  void divergence_gradient(const LossTile& tile, const DivergenceGradient<S>& a) {                  \
    for_rows(tile, [&](int64_t row) { divergence_gradient_row<S>(tile, a, row); });                 \
  }

FASTLM_DEFINE_LOSS(float)
FASTLM_DEFINE_LOSS(double)
FASTLM_DEFINE_LOSS(Bf16)

}  // namespace FASTLM_ISA
}  // namespace fastlm
