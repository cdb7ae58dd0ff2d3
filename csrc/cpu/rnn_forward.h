// The forward pass: at each step every thread multiplies the state by its panels of W_hh, and turns the products into
// the gates and the next state of its units.
#pragma once

#include "rnn_plan.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// The products with x that P makes itself, in float32: of this step and of those that come next, for a member's units.
template <class P, Cell cell>
class Inputs {
  using Operand = typename P::Operand;
  using S = State<typename P::Number>;
  static constexpr int G = gates_of(cell), lanes = kLanes<S>;
  const RnnProblem& p;
  const RnnForward<typename P::Number>& a;
  const P product;
  Operand* const panels;
  S* const made;  // for each panel of units [rows, G·count vectors]
  int64_t first = 0, left = 0;

  Operand* panel(int64_t u) const { return panels + u / lanes * G * product.panel_numbers(); }
  S* products(int64_t u) const { return made + u * G * steps_ahead<P>(p) * p.batch; }

 public:
  Inputs(const RnnProblem& p, const RnnForward<typename P::Number>& a, const Workspace<P>& space,
         typename P::Registers* registers)
      : p(p), a(a), product(p, p.inputs, registers), panels(space.inputs()), made(space.ahead()) {}

  template <int count>
  void pack(int64_t u) const {
    if constexpr (P::kTakesX) product.template pack_gates<G, count>(a.w_ih, p.hidden, u, panel(u));
  }
  // Have the products of the step at hand.
  void make(const Shares& shares, const Walk& at) {
    if constexpr (P::kTakesX) {
      if (left-- > 0) return;
      left = steps_ahead<P>(p) - 1;
      int64_t end = at.row + at.rows();
      first = at.row;
      Walk later = at;
      for (int64_t i = 0; i < left && (later.next(), !later.done()); ++i) {
        first = later.row < first ? later.row : first;
        end = later.row + later.rows() > end ? later.row + later.rows() : end;
      }
      for_units<P, P::units(G)>(shares, p.hidden, false, [&](int64_t u, auto count, int64_t next) {
        product.template multiply<G * count>(product.rows_at(a.x + first * product.padded, product.padded),
                                             end - first, panel(u), panel(next), products(u),
                                             [](int64_t, int64_t) {});
      });
    }
  }
  // Those of one row and the j-th vector of a panel's units, [G vectors].
  template <int count>
  const S* of(int64_t row, int64_t u, int j) const {
    return P::kTakesX ? products(u) + ((row - first) * count + j) * G * lanes : nullptr;
  }
};

// Turn the products of one sequence and one vector of units, s [G vectors] with h and x with x where P makes them, into
// its next state h, not projected.
template <class P, Cell cell>
FASTLM_INLINE Vector<State<typename P::Number>> forward_gates(
    const RnnProblem& p, const RnnForward<typename P::Number>& a, const Walk& at, int64_t b, int64_t u, int n,
    const State<typename P::Number>* s, const State<typename P::Number>* x) {
  using T = typename P::Number;
  using S = State<T>;
  using V = Vector<S>;
  using Gate = typename P::Gate;
  constexpr int lanes = kLanes<S>;
  const int64_t H = p.hidden, block_row = at.row_in_block + b;
  T* const row = a.gates ? a.gates + block_row * a.ld + u : nullptr;
  Gate* const kept = reinterpret_cast<Gate*>(row);
  const auto of_x = [&](int g) FASTLM_INLINED {
    if constexpr (!P::kTakesX) return load(row + g * H, n);
    return a.bias ? load(x + g * lanes) + load(a.bias + g * H + u, n) : load(x + g * lanes);
  };
  V h;
  if constexpr (cell == Cell::lstm) {
    V i = of_x(0) + load(s), f = of_x(1) + load(s + lanes);
    V g = of_x(2) + load(s + 2 * lanes), o = of_x(3) + load(s + 3 * lanes), c;
    S* const running_c = a.cn + b * H + u;
    lstm_forward<typename P::Functions>(i, f, g, o, load(running_c, n), c, h);
    store(running_c, c, n);
    if (a.train) {
      store(kept, i, n);
      store(kept + H, f, n);
      store(kept + 2 * H, g, n);
      store(kept + 3 * H, o, n);
      store(a.c + (at.row + b) * H + u, c, n);
    }
  } else if constexpr (cell == Cell::gru) {
    V r = of_x(0) + load(s), z = of_x(1) + load(s + lanes), g = of_x(2);
    V hn = load(s + 2 * lanes);
    if (a.b_hn) hn += load(a.b_hn + u, n);
    gru_forward<typename P::Functions>(r, z, g, hn, load(a.hn + b * H + u, n), h);
    if (a.train) {
      store(kept, r, n);
      store(kept + H, z, n);
      store(kept + 2 * H, g, n);
      store(row + 3 * H, hn, n);
    }
  } else {
    h = of_x(0) + load(s);
    if constexpr (cell == Cell::tanh)
      h = P::Functions::tanh(h);
    else
      h = h < 0 ? V{} : h;
  }
  return h;
}

// Store a vector of h, and put it into `out`, the operand of the next step.
template <class P>
FASTLM_INLINE void store_state(const RnnProblem& p, const RnnForward<typename P::Number>& a, const P& product,
                               const Walk& at, int64_t b, int64_t u, int n,
                               const Vector<State<typename P::Number>>& h, typename P::Operand* out) {
  store(a.y + (at.row + b) * p.out() + u, h, n);
  store(a.hn + b * p.out() + u, h, n);
  product.put(product.row(out, b), u, h, n);
}

// `out` is the operand of the next product: of the next step, or of the projection, then `second`.
template <class P, Cell cell, int count>
void forward_units(const RnnProblem& p, const RnnForward<typename P::Number>& a, const P& product, const P& second,
                   const Inputs<P, cell>& inputs, const Walk& at, int64_t u, const typename P::Operand* panel,
                   const typename P::Operand* next, const typename P::Operand* in, typename P::Operand* out,
                   State<typename P::Number>* scratch) {
  const bool projects = cell == Cell::lstm && p.projection;
  constexpr int G = gates_of(cell), lanes = kLanes<State<typename P::Number>>, width = G * count * lanes;
  const auto fetch = [&](int64_t i, int64_t n) {
    const int64_t columns = (G == 3 && a.train ? 4 : G) * p.hidden;
    for (int64_t b = at.rows() * i / n; b < at.rows() * (i + 1) / n; ++b) {
      for (int64_t g = 0; a.gates && g < columns; g += p.hidden) {
        auto* const gate = a.gates + (at.row_in_block + b) * a.ld + g + u;
        P::kTakesX ? prefetch_to_write(gate, count * lanes) : prefetch(gate, count * lanes);
      }
      const P& of_out = projects ? second : product;
      of_out.prefetch_row(of_out.row(out, b), u, count * lanes);
      if (!projects) prefetch_to_write(a.y + (at.row + b) * p.hidden + u, count * lanes);
      if (cell == Cell::lstm && a.train) prefetch_to_write(a.c + (at.row + b) * p.hidden + u, count * lanes);
    }
  };
  product.template multiply<G * count>(product.rows_of(in), at.rows(), panel, next, scratch, fetch);
  const auto make = [&](int64_t b, int j, int n) FASTLM_INLINED {
    const int64_t v = u + j * lanes;
    const auto h = forward_gates<P, cell>(p, a, at, b, v, n, scratch + b * width + j * G * lanes,
                                          inputs.template of<count>(at.row + b, u, j));
    if (projects)
      second.put(second.row(out, b), v, h, n);
    else
      store_state(p, a, product, at, b, v, n, h, out);
  };
  const bool whole = u + count * lanes <= p.hidden;
  for (int64_t b = 0; whole && b < at.rows(); ++b)
    for (int j = 0; j < count; ++j) make(b, j, lanes);
  for (int64_t b = 0; !whole && b < at.rows(); ++b)
    for (int j = 0; j < count; ++j) make(b, j, lanes_left<lanes>(p.hidden, u + j * lanes));
}

// h [rows, count vectors from u on] = what is projected · W_hrᵀ
template <class P, int count>
void project(const RnnProblem& p, const RnnForward<typename P::Number>& a, const P& product, const P& second,
             const Walk& at, int64_t u, const typename P::Operand* panel, const typename P::Operand* next,
             const typename P::Operand* in, typename P::Operand* out, State<typename P::Number>* scratch) {
  constexpr int lanes = kLanes<State<typename P::Number>>;
  second.template multiply<count>(second.rows_of(in), at.rows(), panel, next, scratch, [](int64_t, int64_t) {});
  for (int64_t b = 0; b < at.rows(); ++b)
    for (int j = 0; j < count; ++j) {
      const int64_t v = u + j * lanes;
      store_state(p, a, product, at, b, v, lanes_left<lanes>(p.projection, v), load(scratch + (b * count + j) * lanes),
                  out);
    }
}

template <class P, Cell cell>
void forward(const RnnProblem& p, const RnnForward<typename P::Number>& a) {
  using S = State<typename P::Number>;
  constexpr int G = gates_of(cell), lanes = kLanes<S>, most = P::units(G), most_projected = P::units(1);
  const Workspace<P> space(p, false, a.workspace);
  const int64_t H = p.hidden, out = p.out();
  const bool projects = cell == Cell::lstm && p.projection;
  Paces paces;
  parallel(team_size(p, lanes), [&](Member& me) {
    Shares shares(me, paces, Panels<P, most>(H, me.count).count);
    typename P::Registers registers;
    const P product(p, out, &registers), second(p, H, &registers);
    Inputs<P, cell> inputs(p, a, space, &registers);
    S* const scratch = space.scratch(me.index);
    const auto panel_of = [&](int64_t u) { return space.panels() + u / lanes * G * product.panel_numbers(); };
    const auto second_panel_of = [&](int64_t u) { return space.projection() + u / lanes * second.panel_numbers(); };
    Walk at(p, false);
    for (int64_t b = me.begin(p.batch); b < me.end(p.batch); ++b) {
      for (int turn = 0; turn < 2; ++turn) product.pad(product.row(space.operand(turn), b));
      if (projects) second.pad(second.row(space.projected(), b));
    }
    if (at.begins())
      for_units<P, most>(shares, H, false, [&](int64_t u, auto count, int64_t) {
        product.template pack_gates<G, count>(a.w_hh, H, u, panel_of(u));
        inputs.template pack<count>(u);
        const int64_t n = H - u < count * lanes ? H - u : count * lanes;
        for (int64_t b = 0; b < p.batch && cell == Cell::lstm; ++b)
          std::memcpy(a.cn + b * H + u, a.c0 + b * H + u, n * sizeof(S));
      });
    for_units<P, most_projected>(shares, out, false, [&](int64_t u, auto count, int64_t) {
      if (projects && at.begins()) second.template pack_gates<1, count>(a.w_hr, out, u, second_panel_of(u));
      for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t v = u; v < u + count * lanes && v < out; v += lanes) {
          const int n = lanes_left<lanes>(out, v);
          if (at.begins()) store(a.hn + b * out + v, load(a.h0 + b * out + v, n), n);
          // Both operands: a sequence read backwards joins late, whichever of the two is then its turn.
          for (int turn = 0; turn < 2; ++turn)
            product.put(product.row(space.operand(turn), b), v, load(a.hn + b * out + v, n), n);
        }
    });
    shares.meet();
    int turn = 0;
    for (bool back = true; !at.done(); at.next(), back = !back, turn ^= 1) {
      auto* const state = space.operand(turn ^ 1);
      inputs.make(shares, at);
      for_units<P, most>(shares, H, back, [&](int64_t u, auto count, int64_t next) {
        forward_units<P, cell, count>(p, a, product, second, inputs, at, u, panel_of(u), panel_of(next),
                                      space.operand(turn), projects ? space.projected() : state, scratch);
      });
      shares.meet();
      if (!projects) continue;
      for_units<P, most_projected>(shares, out, back, [&](int64_t u, auto count, int64_t next) {
        project<P, count>(p, a, product, second, at, u, second_panel_of(u), second_panel_of(next), space.projected(),
                          state, scratch);
      });
      shares.meet();
    }
  });
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
