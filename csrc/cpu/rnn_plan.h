// How a pass over a sequence is laid out: in which order its steps are visited, what lies where in the workspace, which
// thread makes which units.
#pragma once

#include "../rnn.h"

#include "gemm.h"
#include "pace.h"

#if defined(FASTLM_TILES)
#include "amx.h"
#include "pair_product.h"
#elif defined(FASTLM_DOTS)
#include "dots.h"
#include "pair_product.h"
#endif

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// What multiplies in this build: float32, and another type of number.
#if defined(FASTLM_TILES)
template <class T>
using Product = PairProduct<T, Tiles>;
using Other = Bf16;
#elif defined(FASTLM_DOTS)
template <class T>
using Product = PairProduct<T, Dots>;
using Other = Bf16;
#else
template <class T>
using Product = VectorProduct<T>;
using Other = double;
#endif

constexpr int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

// Columns of dgates, and of gates where they are kept, in units of H.
constexpr int kept_of(Cell cell) { return cell == Cell::lstm || cell == Cell::gru ? 4 : 1; }

// The backward pass of one sequence needs no packed matrix where vectors multiply.
template <class P>
bool is_alone(const RnnProblem& p) {
  return P::kInPlace && p.batch == 1 && !p.projection;
}

constexpr int64_t vectors_in(int64_t units, int lanes) { return (units + lanes - 1) / lanes; }

// The block's steps in the order of reading, or against it, with the first row of each step among all and in the block.
struct Walk {
  const RnnProblem& p;
  const bool down;
  int64_t t, row, row_in_block = 0;

  Walk(const RnnProblem& p, bool against) : p(p), down(p.reverse != against), t(0), row(0) {
    for (; t < p.first; ++t) row += rows_at(t);
    for (; down && t + 1 < p.last; ++t) row_in_block += rows_at(t);
    row += row_in_block;
  }
  int64_t rows_at(int64_t step) const { return p.batch_sizes ? p.batch_sizes[step] : p.batch; }
  int64_t rows() const { return rows_at(t); }
  bool done() const { return t < p.first || t >= p.last; }
  void next() {
    const int64_t passed = down ? (t > 0 ? -rows_at(t - 1) : 0) : rows_at(t);
    t += down ? -1 : 1;
    row += passed;
    row_in_block += passed;
  }
  // True where this step is the first of the pass.
  bool begins() const { return t == (down ? p.steps - 1 : 0); }
  // Units from u on of sequence b's state one step earlier in reading; of `initial` before the first.
  template <class T, class S>
  FASTLM_INLINED Vector<S> before(const T* states, const S* initial, int64_t b, int64_t u, int n) const {
    if (!p.reverse && t > 0) return load(states + (row - rows_at(t - 1) + b) * p.hidden + u, n);
    if (p.reverse && t + 1 < p.steps && b < rows_at(t + 1))
      return load(states + (row + rows() + b) * p.hidden + u, n);
    return load(initial + b * p.hidden + u, n);
  }
};

// Steps whose products with x are made at once: a panel that is read pays off with some tens of rows.
template <class P>
int64_t steps_ahead(const RnnProblem& p) {
  return p.batch < 1 || p.batch > P::kRowsAhead ? 1 : P::kRowsAhead / p.batch;
}

// What lies where in the workspace, each part on its own cache lines.
template <class P>
class Workspace {
  using Operand = typename P::Operand;
  using S = State<typename P::Number>;
  char* const base;
  const int threads;
  int64_t of_panels, of_operand, of_projection = 0, of_projected = 0, of_inputs = 0, of_ahead = 0;
  int64_t of_scratch, of_partial;

 public:
  Workspace(const RnnProblem& p, bool backward, void* memory) : base(static_cast<char*>(memory)), threads(p.threads) {
    const int gates = gates_of(p.cell), wide = gates * P::units(gates), lanes = kLanes<S>;
    const int64_t vectors = backward ? vectors_in(p.out(), lanes) : vectors_in(p.hidden, lanes) * gates;
    const P product(p, backward ? gates * p.hidden : p.out());
    const auto lines = [](int64_t bytes) { return (bytes + 127) / 128 * 128; };
    of_panels = backward && is_alone<P>(p) ? 0 : lines(vectors * product.panel_numbers() * sizeof(Operand));
    of_operand = backward && P::kInPlace ? 0 : lines(product.numbers(p.batch) * sizeof(Operand));
    if (p.projection) {
      const P second(p, backward ? p.projection : p.hidden);
      const int64_t columns = vectors_in(backward ? p.hidden : p.projection, lanes);
      of_projection = lines(columns * second.panel_numbers() * sizeof(Operand));
      of_projected = backward && P::kInPlace ? 0 : lines(second.numbers(p.batch) * sizeof(Operand));
    }
    if (P::kTakesX && !backward) {
      of_inputs = lines(vectors * P(p, p.inputs).panel_numbers() * sizeof(Operand));
      of_ahead = lines(vectors * lanes * steps_ahead<P>(p) * p.batch * sizeof(S));
    }
    of_scratch = lines(p.batch * (wide > kPanel ? wide : kPanel) * lanes * sizeof(S));
    of_partial = backward && is_alone<P>(p) ? lines(p.hidden * sizeof(S)) : 0;
  }
  size_t bytes() const { return shared() + threads * (of_scratch + 2 * of_partial); }
  Operand* panels() const { return reinterpret_cast<Operand*>(base); }
  // What all threads multiply by W_hh, for steps in turn.
  Operand* operand(int turn) const { return reinterpret_cast<Operand*>(base + of_panels + turn * of_operand); }
  // W_hr, and what all threads multiply by it.
  Operand* projection() const { return operand(2); }
  Operand* projected() const { return reinterpret_cast<Operand*>(base + of_panels + 2 * of_operand + of_projection); }
  // W_ih, and the products with it of the steps that come next.
  Operand* inputs() const { return reinterpret_cast<Operand*>(base + shared() - of_inputs - of_ahead); }
  S* ahead() const { return reinterpret_cast<S*>(base + shared() - of_ahead); }
  // Of one thread: the products of a panel, and its share of a sum, for steps in turn.
  S* scratch(int i) const { return reinterpret_cast<S*>(base + shared() + i * of_scratch); }
  S* partial(int turn, int i) const {
    return reinterpret_cast<S*>(base + shared() + threads * of_scratch + (turn * threads + i) * of_partial);
  }

 private:
  int64_t shared() const { return of_panels + 2 * of_operand + of_projection + of_projected + of_inputs + of_ahead; }
};

int team_size(const RnnProblem& p, int lanes) {
  const int64_t vectors = vectors_in(p.hidden, lanes);
  const int64_t worthwhile = 1 + p.batch * p.hidden * p.out() * gates_of(p.cell) / 32768;
  int64_t n = p.threads < vectors ? p.threads : vectors;
  return int(n < worthwhile ? n : worthwhile);
}

// Panels are of `most` vectors of units, or less where a member's share of the vectors asks for it; the last may be smaller.
template <class P, int most>
struct Panels {
  static constexpr int lanes = kLanes<State<typename P::Number>>;
  int64_t vectors, wide, count;

  Panels(int64_t units, int members) : vectors(vectors_in(units, lanes)) {
    const int64_t share = std::max<int64_t>((vectors + members - 1) / members, 1);
    wide = std::min<int64_t>({P::panel_vectors(share), share, most});
    count = (vectors + wide - 1) / wide;
  }
};

// Calls f(u, count, next) for this member's share of the panels of `units`, each of `count` vectors from unit u on;
// `next` is the unit that comes after, u at the end. Every other step runs `back`, so that it starts with the weights that the
// caches still hold.
template <class P, int most, class F>
void for_units(const Shares& shares, int64_t units, bool back, const F& f) {
  const Panels<P, most> panels(units, shares.members());
  constexpr int lanes = panels.lanes;
  const int64_t begin = shares.begin(panels.count), end = shares.end(panels.count);
  for (int64_t i = 0; i < end - begin; ++i) {
    const int64_t v = panels.wide * (back ? end - 1 - i : begin + i);
    const int64_t next = i + 1 == end - begin ? v : back ? v - panels.wide : v + panels.wide;
    with_count<most>(std::min(panels.wide, panels.vectors - v), [&](auto count) { f(v * lanes, count, next * lanes); });
  }
}

template <int lanes>
int lanes_left(int64_t units, int64_t u) {
  return units - u < lanes ? int(units - u) : lanes;
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
